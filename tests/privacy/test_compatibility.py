# SPDX-License-Identifier: Apache-2.0
"""The cases on which other libraries fail, each exact or refused; docs/correctness.md holds what they measure.

``python tests/privacy/test_compatibility.py`` writes the page anew. A case is a function under ``@case`` that returns
what ``measure`` returned, or an :class:`Outcome`, or raises.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wavedp import PrivacyEngine
from wavedp.privacy import FlatClipping, GradientBook

PAGE = Path(__file__).parents[2] / "docs" / "correctness.md"
LARGEST = 1 + 1e-6
HEADER = """\
# Exact, or refused

Written by `python tests/privacy/test_compatibility.py`; the test suite fails when a verdict changes.

*Gradient error*: distance of the clipped sum from that of a loop over the records, one backward each in float64,
relative to its length. *Largest contribution*: the l2 norm of what one record alone adds to the sum, in units of
`max_grad_norm`, over all records of the batch in float32 and float64; about half of the records are clipped. A case
that is refused names the error and its first words.

| case | gradient error | largest contribution |
|---|---|---|
"""


@dataclass(frozen=True)
class Outcome:
    """A row of the table."""

    error: float
    largest: float
    clipped: int = 1


@dataclass(frozen=True)
class Case:
    name: str
    run: Callable[[Callable[..., Any]], Any]
    tolerance: float  # of the gradient error


CASES: list[Case] = []


def case(name: str, *, tolerance: float = 1e-9) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add a row. The function is given ``measure(model, losses, batch, *, sample_id, bound)`` of conftest.py."""

    def add(run: Callable[..., Any]) -> Callable[..., Any]:
        CASES.append(Case(name, run, tolerance))
        return run

    return add


# A language model with what other libraries miss


VOCABULARY, WIDTH, LENGTH = 11, 8, 5


class Block(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH, bias=bias), nn.LayerNorm(WIDTH, bias=bias)])
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = (x.unflatten(2, (2, -1)).transpose(1, 2) for x in self.qkv(self.norms[0](h)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(attended.transpose(1, 2).flatten(2))
        return h + self.down(F.gelu(self.up(self.norms[1](h))))


class GPT(nn.Module):
    def __init__(self, *, tied: str = "", bias: bool = True, padding: int | None = None, saved: bool = False) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, WIDTH, padding_idx=padding)
        self.position = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList([Block(bias), Block(bias)])
        self.norm = nn.LayerNorm(WIDTH, bias=bias)
        self.tied, self.saved = tied, saved
        if tied != "function":
            self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied == "module":
            self.head.weight = self.token.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.token(ids) + self.position(torch.arange(ids.shape[1]).expand(ids.shape))
        for block in self.blocks:
            h = checkpoint(block, h, use_reentrant=False) if self.saved else block(h)
        h = self.norm(h)
        return F.linear(h, self.token.weight) if self.tied == "function" else self.head(h)


def next_token(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(ids)
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def texts(records: int = 4) -> Tensor:
    return torch.randint(0, VOCABULARY, (records, LENGTH))


def language_model(measure: Callable[..., Any], **settings: Any) -> Any:
    return measure(GPT(**settings).double(), next_token, (texts(),))


@case("GPT, untied")
def _(measure: Callable[..., Any]) -> Any:
    return language_model(measure)


@case("GPT, output layer and embedding one module parameter")
def _(measure: Callable[..., Any]) -> Any:
    return language_model(measure, tied="module")


@case("GPT, output by `F.linear(h, embedding.weight)`")
def _(measure: Callable[..., Any]) -> Any:
    return language_model(measure, tied="function")


@case("GPT, LayerNorm(bias=False)")
def _(measure: Callable[..., Any]) -> Any:
    return language_model(measure, bias=False)


@case("GPT, activation checkpointing")
def _(measure: Callable[..., Any]) -> Any:
    return language_model(measure, saved=True)


@case("GPT, autocast to bfloat16 (error of bfloat16 products)", tolerance=3e-2)
def _(measure: Callable[..., Any]) -> Any:
    def losses(model: nn.Module, ids: Tensor) -> Tensor:
        # Autocast leaves float64 alone, so that the loop stays the reference.
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)

    result = measure(GPT().double(), losses, (texts(),))
    return Outcome(result.single_error, result.largest, result.clipped)


@case("GPT, embedding with padding_idx: pads get no gradient")
def _(measure: Callable[..., Any]) -> Any:
    ids = texts()
    ids[:, :2] = 0
    result = measure(GPT(padding=0).double(), next_token, (ids,))
    assert torch.equal(result.sums["token.weight"][0], torch.zeros(WIDTH, dtype=torch.float64))
    return result


@case("GPT, a batch without records")
def _(measure: Callable[..., Any]) -> Any:
    model = GPT()
    with GradientBook(model) as book:
        return Outcome(0.0, float(len(book.clipped_sums(next_token(model, texts(0)), FlatClipping(1.0)))))


@case("GPT, a forward without a backward, and evaluation, before each")
def _(measure: Callable[..., Any]) -> Any:
    def losses(model: nn.Module, ids: Tensor) -> Tensor:
        model(texts(3))
        with torch.no_grad():
            model.eval()(texts(2))
        return next_token(model.train(), ids)

    return measure(GPT().double(), losses, (texts(),))


@case("GPT, rows of the batch belong to the same record (sample_id)")
def _(measure: Callable[..., Any]) -> Any:
    return measure(GPT().double(), next_token, (texts(5),), sample_id=torch.tensor([3, 1, 3, 4, 1]))


@case("GPT, one record of 4 has an infinite loss")
def _(measure: Callable[..., Any]) -> Any:
    def losses(model: nn.Module, ids: Tensor, scales: Tensor) -> Tensor:
        return next_token(model, ids) * scales

    scales = torch.tensor([1.0, math.inf, 1.0, 1.0], dtype=torch.float64)
    return measure(GPT().double(), losses, (texts(), scales), bound=1.0)


@case("GPT, frozen embedding, biases and one block")
def _(measure: Callable[..., Any]) -> Any:
    model = GPT().double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (name.startswith(("token", "blocks.0")) or name.endswith("bias")))
    return measure(model, next_token, (texts(),))


@case("GPT-2 of transformers, tied, `position_ids` [B, T]")
def _(measure: Callable[..., Any]) -> Any:
    def losses(model: nn.Module, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1]).expand(ids.shape)
        return next_token(lambda x: model(x, position_ids=positions).logits, ids)  # type: ignore[arg-type]

    return measure(gpt2().double(), losses, (texts(),))


@case("GPT-2 of transformers, positions shared by the batch")
def _(measure: Callable[..., Any]) -> Any:
    def losses(model: nn.Module, ids: Tensor) -> Tensor:
        return next_token(lambda x: model(x).logits, ids)  # type: ignore[arg-type]

    return measure(gpt2().double(), losses, (texts(),))


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs transformers, of the extra [sr]")
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=WIDTH,
        n_layer=2,
        n_head=2,
        attn_pdrop=0,
        embd_pdrop=0,
        resid_pdrop=0,
    )
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


# Layers


def squares(model: nn.Module, *inputs: Tensor) -> Tensor:
    y = model(*inputs)
    y = (y[0] if isinstance(y, tuple) else y).flatten(1)
    return (y.square() / 2 + y * torch.arange(1, y.shape[1] + 1, dtype=y.dtype).cos()).sum(1)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear on 4-D inputs": (lambda: nn.Linear(4, 3), (2, 3, 4)),
    "Linear without bias": (lambda: nn.Linear(4, 3, bias=False), (3, 4)),
    "LayerNorm over two axes": (lambda: nn.LayerNorm((3, 4)), (2, 3, 4)),
    "RMSNorm": (lambda: nn.RMSNorm(4), (3, 4)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (4, 3, 3)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, affine=True), (4, 3, 3)),
    "Conv1d, dilation 2": (lambda: nn.Conv1d(4, 6, 3, dilation=2), (4, 9)),
    "Conv2d, groups 2, stride 2, padding 1": (lambda: nn.Conv2d(4, 6, 3, 2, 1, groups=2), (4, 6, 6)),
    "Conv2d, depthwise, padding 'same', circular": (
        lambda: nn.Conv2d(4, 4, (2, 3), padding="same", groups=4, padding_mode="circular"),
        (4, 5, 5),
    ),
    "Conv3d, padding 1": (lambda: nn.Conv3d(2, 3, 2, padding=1), (2, 3, 3, 3)),
    "a layer called twice": (lambda: Twice(), (3, 4)),
    "a parameter of the model's own": (lambda: Root(), (3, 4)),
    "LoRA, as peft builds it": (lambda: Lora(), (3, 4)),
    "unused parameters": (lambda: Unused(), (3, 4)),
    "TransformerEncoderLayer(batch_first=True)": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), nn.Linear(4, 3)),
        (3, 4),
    ),
    "LSTM(batch_first=True), in a loop": (lambda: nn.LSTM(4, 3, batch_first=True), (3, 4)),
    "ConvTranspose2d, by torch.func": (lambda: nn.ConvTranspose2d(4, 3, 2), (4, 3, 3)),
    "MultiheadAttention(batch_first=False)": (lambda: SecondAxis(), (3, 4)),
}


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.cat([self.token.expand(len(x), -1, -1), x], 1))


class Lora(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(4, 3).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 3, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class SecondAxis(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        output, _ = self.attention(x, x, x)
        return output.transpose(0, 1)


def add_layers() -> None:
    for name, (make, shape) in LAYERS.items():

        @case(name)
        def _(measure: Callable[..., Any], make: Any = make, shape: Any = shape) -> Any:
            return measure(make().double(), squares, (torch.randn(4, *shape, dtype=torch.float64),))


add_layers()


@case("Linear on non-contiguous inputs")
def _(measure: Callable[..., Any]) -> Any:
    return measure(nn.Linear(4, 3).double(), squares, (torch.randn(4, 8, 6, dtype=torch.float64)[:, ::2, 1::2].mT,))


@case("Conv1D of transformers")
def _(measure: Callable[..., Any]) -> Any:
    layer = pytest.importorskip("transformers.pytorch_utils", reason="needs transformers").Conv1D(3, 4)
    return measure(layer.double(), squares, (torch.randn(4, 2, 4, dtype=torch.float64),))


@case("EmbeddingBag(mode='mean')")
def _(measure: Callable[..., Any]) -> Any:
    return measure(nn.EmbeddingBag(9, 4, mode="mean").double(), squares, (torch.randint(0, 9, (4, 5)),))


@case("MultiheadAttention, cross-attention, masked, kdim and vdim, bias_k")
def _(measure: Callable[..., Any]) -> Any:
    layer = nn.MultiheadAttention(4, 2, add_bias_kv=True, kdim=3, vdim=5, batch_first=True).double()
    mask = torch.ones(2, 3).triu(1).bool()
    shapes = (2, 4), (3, 3), (3, 5)
    inputs = tuple(torch.randn(4, *shape, dtype=torch.float64) for shape in shapes)
    return measure(layer, lambda model, *x: squares(lambda *y: model(*y, attn_mask=mask), *x), inputs)  # type: ignore[arg-type]


# Refused


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(3),
    "BatchNorm1d, frozen and in evaluation": lambda: nn.Sequential(
        nn.Linear(3, 3), nn.BatchNorm1d(3).eval().requires_grad_(False)
    ),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(3),
    "InstanceNorm1d with running statistics": lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
    "DataParallel": lambda: nn.DataParallel(nn.Linear(3, 3)),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)),
    "LazyLinear before its first forward": lambda: nn.LazyLinear(3),
    "Embedding(sparse=True)": lambda: nn.Embedding(3, 3, sparse=True),
    "Embedding(max_norm=1)": lambda: nn.Embedding(3, 3, max_norm=1.0),
    "EmbeddingBag(mode='max')": lambda: nn.EmbeddingBag(3, 3, mode="max"),
    "GRU(batch_first=False)": lambda: nn.GRU(3, 3),
}


def add_refused() -> None:
    for name, make in REFUSED.items():

        @case(name)
        def _(measure: Callable[..., Any], make: Any = make) -> Any:
            with GradientBook(make()):
                raise AssertionError("was not refused")


add_refused()


def refused_losses(name: str) -> Callable[..., Any]:
    """A model of one Linear layer; the function gives losses from it and inputs [4, 2, 3]."""

    def add(losses: Callable[[nn.Module, Tensor], Tensor]) -> Callable[..., Any]:
        @case(name)
        def _(measure: Callable[..., Any]) -> Any:
            model = nn.Sequential(nn.Linear(3, 3))
            with GradientBook(model) as book:
                return book.clipped_sums(losses(model, torch.randn(4, 2, 3)), FlatClipping(1.0))

        return losses

    return add


@refused_losses("backward(losses): a mean loss in place of one per record")
def _(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).mean()


@refused_losses("backward(losses): losses that couple records (in-batch negatives)")
def _(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x).flatten(1)
    return (y @ y.mT).log_softmax(1).diagonal()


@refused_losses("backward(losses): tokens of all records as rows, [B * T, d]")
def _(model: nn.Module, x: Tensor) -> Tensor:
    return model(x.flatten(0, 1)).unflatten(0, (4, 2)).sum((1, 2))


@refused_losses("a parameter used along a path that is not booked")
def _(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sum((1, 2)) + (model[0].weight.sum() * x.sum((1, 2)))


# The ordinary loop


def engine_row(name: str, *, tolerance: float = 1e-9) -> Callable[..., Any]:
    """What ``run(model, ids)``, plain backwards of a GPT under the engine, adds up before the step."""

    def add(run: Callable[..., None]) -> Callable[..., Any]:
        @case(name, tolerance=tolerance)
        def _(measure: Callable[..., Any]) -> Any:
            model, ids, bound = GPT().double(), texts(6), 1.0
            expected = measure(model, next_token, (ids,), bound=bound)

            def sums(dtype: torch.dtype, rows: Tensor) -> Tensor:
                subject = copy.deepcopy(model).to(dtype)
                _, optimizer, _ = PrivacyEngine().make_private(
                    module=subject,
                    optimizer=torch.optim.SGD(subject.parameters(), lr=1.0),
                    data_loader=None,
                    sample_rate=0.1,
                    noise_multiplier=0.0,
                    max_grad_norm=bound,
                    expected_batch_size=1.0,
                    without_privacy=True,
                )
                run(subject, rows, optimizer.announce)
                added = optimizer.private._sums
                return torch.cat([added[name].double().flatten() for name in sorted(added)])

            whole = torch.cat([expected.sums[name].flatten() for name in sorted(expected.sums)])
            error = (sums(torch.float64, ids) - whole).norm() / whole.norm()
            largest = max(float(sums(torch.float32, row[None]).norm()) / bound for row in ids)
            return Outcome(expected.error + float(error), largest, expected.clipped)

        return run

    return add


@engine_row("engine, loss.backward() of the mean loss")
def _(model: nn.Module, ids: Tensor, announce: Callable[[Tensor], None]) -> None:
    next_token(model, ids).mean().backward()


@engine_row("engine, micro-batches, with evaluation and an unused forward between them")
def _(model: nn.Module, ids: Tensor, announce: Callable[[Tensor], None]) -> None:
    for part, records in zip(ids.split(4), torch.arange(len(ids)).split(4)):
        with torch.no_grad():
            model(ids)
        model(ids)
        announce(records)
        next_token(model, part).mean().backward()


@engine_row("engine, torch.compile (inductor)", tolerance=1e-6)
def _(model: nn.Module, ids: Tensor, announce: Callable[[Tensor], None]) -> None:
    next_token(torch.compile(model), ids).mean().backward()
    torch.compiler.reset()


# The table


def outcome_of(row: Case, measure: Callable[..., Any]) -> Outcome | str:
    """What a case gives: numbers, or "raises ..." with the error's first words."""
    torch.manual_seed(0)
    try:
        result = row.run(measure)
    except (RuntimeError, ValueError) as error:
        return f"raises {type(error).__name__}: {first_words(str(error))}"
    return Outcome(result.error, result.largest, result.clipped)


def first_words(message: str, limit: int = 90) -> str:
    message = " ".join(message.split()).replace("|", "/")
    return message if len(message) <= limit else message[:limit].rsplit(" ", 1)[0] + " ..."


def line(row: Case, outcome: Outcome | str) -> str:
    if isinstance(outcome, str):
        return f"| {row.name} | {outcome} | - |"
    return f"| {row.name} | {outcome.error:.0e} | {outcome.largest:.8f} |"


def committed() -> dict[str, tuple[str, str]]:
    """The rows of the page, by case."""
    rows = [
        row.strip("| \n").split(" | ") for row in PAGE.read_text(encoding="utf-8").split("|---|\n")[-1].splitlines()
    ]
    return {name: (error, largest) for name, error, largest in rows}


@pytest.mark.parametrize("row", CASES, ids=lambda row: row.name)
def test_a_case_is_as_the_page_says(row: Case, measured: Callable[..., Any]) -> None:
    error, largest = committed()[row.name]
    outcome = outcome_of(row, measured)
    if isinstance(outcome, str):
        assert (error, largest) == (outcome, "-")
        return
    assert not error.startswith("raises")
    for verdict in (outcome, Outcome(float(error), float(largest))):
        assert verdict.error <= row.tolerance
        assert verdict.largest <= LARGEST
    assert outcome.clipped > 0


def test_the_page_has_every_case_once() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert list(committed()) == [row.name for row in CASES]
    assert text.startswith(HEADER)
    assert len({row.name for row in CASES}) == len(CASES) == text.count("\n") - HEADER.count("\n")


def test_a_wrong_gradient_would_be_seen(measured: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurements can fail: the norm of a layer is planted too small, then its sum is."""
    from wavedp.privacy.per_sample import OuterProducts

    model, x = nn.Linear(4, 3).double(), torch.randn(4, 2, 4, dtype=torch.float64)
    right = OuterProducts.measured
    monkeypatch.setattr(OuterProducts, "measured", lambda self: tuple(x * 0.25 for x in right(self)))
    result = measured(copy.deepcopy(model), squares, (x,))
    assert result.error > 1e-3
    assert result.largest > 1.01


if __name__ == "__main__":
    from conftest import measure

    lines = []
    for row in CASES:
        lines.append(line(row, outcome_of(row, measure)))
        print(lines[-1])
    PAGE.write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")
