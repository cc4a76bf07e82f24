# SPDX-License-Identifier: Apache-2.0
"""Every layer type with random settings, in every situation, against a loop over records in float64."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor, nn

from wavedp.privacy import FlatClipping, GradientBook

Draw = Callable[[st.SearchStrategy[Any]], Any]

CASES_EACH = 4  # for each of the layer types and situations below
TOLERANCE = 1e-9
LARGEST = 1 + 1e-6


@dataclass
class Subject:
    """A layer, the shapes of a record's inputs, and how many ids there are where they are ids."""

    layer: nn.Module
    shapes: list[tuple[int, ...]]
    ids: int | None = None
    # What is called with the layer and inputs [B, ...], and gives tensors [B, ...].
    run: Callable[..., Any] = lambda layer, *inputs: layer(*inputs)


def integer(draw: Draw, low: int, high: int) -> int:
    return int(draw(st.integers(low, high)))


def pick(draw: Draw, *options: Any) -> Any:
    return draw(st.sampled_from(options))


def axes_of(draw: Draw, most: int) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.integers(1, 4), max_size=most)))


def linear(draw: Draw) -> Subject:
    d, p = integer(draw, 1, 9), integer(draw, 1, 9)
    return Subject(nn.Linear(d, p, bias=pick(draw, True, False)), [(*axes_of(draw, 3), d)])


def embedding(draw: Draw) -> Subject:
    rows = integer(draw, 2, 9)
    padding = pick(draw, None, 0, rows - 1)
    return Subject(nn.Embedding(rows, integer(draw, 1, 6), padding), [axes_of(draw, 2)], ids=rows)


def embedding_bag(draw: Draw) -> Subject:
    rows, mode = integer(draw, 2, 9), pick(draw, "sum", "mean")
    layer = nn.EmbeddingBag(rows, integer(draw, 1, 6), mode=mode, padding_idx=pick(draw, None, 0))
    return Subject(layer, [(integer(draw, 1, 6),)], ids=rows)


def layer_norm(draw: Draw) -> Subject:
    shape = tuple(integer(draw, 2, 5) for _ in range(integer(draw, 1, 2)))
    layer = nn.LayerNorm(shape, eps=pick(draw, 1e-5, 1e-2), bias=pick(draw, True, False))
    return Subject(layer, [(*axes_of(draw, 2), *shape)])


def rms_norm(draw: Draw) -> Subject:
    shape = tuple(integer(draw, 2, 5) for _ in range(integer(draw, 1, 2)))
    return Subject(nn.RMSNorm(shape, eps=pick(draw, None, 1e-2)), [(*axes_of(draw, 2), *shape)])


def group_norm(draw: Draw) -> Subject:
    groups = integer(draw, 1, 3)
    channels = groups * integer(draw, 1, 3)
    return Subject(nn.GroupNorm(groups, channels), [(channels, *axes_of(draw, 3), 3)])


def instance_norm(draw: Draw) -> Subject:
    axes, channels = integer(draw, 1, 3), integer(draw, 1, 4)
    kind = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[axes - 1]
    return Subject(kind(channels, affine=True), [(channels, *(integer(draw, 2, 4) for _ in range(axes)))])


def convolution(axes: int) -> Callable[[Draw], Subject]:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    longest = (9, 6, 5)[axes - 1]

    def make(draw: Draw) -> Subject:
        each: Callable[[int, int], Any] = lambda low, high: tuple(integer(draw, low, high) for _ in range(axes))  # noqa: E731
        groups = integer(draw, 1, 3)
        channels, outputs = groups * integer(draw, 1, 2), groups * integer(draw, 1, 2)
        kernel, dilation = each(1, 3), each(1, 2)
        padding = pick(draw, 0, 1, "same", "valid", each(0, 2))
        mode = pick(draw, "zeros", "zeros", "circular", "reflect", "replicate")
        layer = kind(
            channels,
            outputs,
            kernel,
            stride=1 if padding == "same" else each(1, 3),
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=pick(draw, True, False),
            padding_mode=mode,
        )
        # Long enough for the kernel, and for what reflects or wraps around.
        size = tuple(integer(draw, (k - 1) * d + 1, longest) + 2 for k, d in zip(kernel, dilation))
        return Subject(layer, [(channels, *size)])

    return make


def hugging_face_convolution(draw: Draw) -> Subject:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    d, p = integer(draw, 1, 9), integer(draw, 1, 9)
    layer = conv1d(p, d)
    nn.init.normal_(layer.bias)
    return Subject(layer, [(*axes_of(draw, 2), d)])


def attention(draw: Draw) -> Subject:
    heads = integer(draw, 1, 3)
    width = heads * integer(draw, 1, 3)
    T, S = integer(draw, 1, 5), integer(draw, 1, 5)
    kind = pick(draw, "self", "cross", "apart")
    key_width = width if kind == "self" else pick(draw, width, 5)
    value_width = key_width if kind != "apart" else pick(draw, width, 4)
    first = pick(draw, True, False)
    layer = nn.MultiheadAttention(
        width,
        heads,
        bias=pick(draw, True, False),
        add_bias_kv=pick(draw, True, False),
        add_zero_attn=pick(draw, True, False),
        kdim=key_width,
        vdim=value_width,
        batch_first=first,
    )
    weights, average = pick(draw, True, False), pick(draw, True, False)
    masked, padded = pick(draw, None, "bool", "float", "causal"), pick(draw, True, False)
    S = T if kind == "self" or masked == "causal" else S

    def run(layer: nn.Module, query: Tensor, *others: Tensor) -> list[Tensor]:
        query, *rest = (x if first else x.transpose(0, 1) for x in (query, *others))
        key = rest[0] if rest else query
        value = rest[1] if len(rest) > 1 else key
        mask = None
        if masked:
            mask = torch.ones(T, S).triu(1).bool()  # the first token is always seen
            mask = torch.zeros(T, S, dtype=query.dtype).masked_fill(mask, -math.inf) if masked != "bool" else mask
        hidden = torch.zeros(len(others[0] if others else query), S, dtype=torch.bool)
        hidden = torch.zeros(query.shape[0 if first else 1], S, dtype=torch.bool)
        hidden[:, 1::2] = True
        output, scores = layer(
            query,
            key,
            value,
            key_padding_mask=hidden if padded else None,
            need_weights=weights,
            attn_mask=mask,
            average_attn_weights=average,
            is_causal=masked == "causal",
        )
        output = output if first else output.transpose(0, 1)
        return [output] if scores is None else [output, scores]

    shapes = {
        "self": [(T, width)],
        "cross": [(T, width), (S, key_width)],
        "apart": [(T, width), (S, key_width), (S, value_width)],
    }[kind]
    return Subject(layer, shapes, run=run)


def recurrent(draw: Draw) -> Subject:
    kind = pick(draw, nn.RNN, nn.LSTM, nn.GRU)
    d, layers, both = integer(draw, 1, 4), integer(draw, 1, 2), pick(draw, True, False)
    layer = kind(d, 3, num_layers=layers, bias=pick(draw, True, False), bidirectional=both, batch_first=True)
    start = pick(draw, True, False)

    def run(layer: nn.Module, x: Tensor, *start: Tensor) -> list[Tensor]:
        states = [state.transpose(0, 1) for state in start]
        output, last = layer(x, *([] if not start else [tuple(states)] if len(states) > 1 else states))
        return [output, *(state.transpose(0, 1) for state in (last if isinstance(last, tuple) else [last]))]

    state = (layers * (1 + both), 3)
    return Subject(layer, [(integer(draw, 1, 4), d)] + [state] * (start * (1 + (kind is nn.LSTM))), run=run)


class Bare(nn.Module):
    """Parameters of its own, a list of them in a module without a forward, and layers below."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, d))
        self.scale = nn.Parameter(torch.randn(d))
        self.shifts = nn.ParameterList([nn.Parameter(torch.randn(d)), nn.Parameter(torch.randn(()))])
        self.below = nn.Sequential(nn.Linear(d, d), nn.LayerNorm(d))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(len(x), 1, -1), x * self.scale], dim=1)
        return self.below(h) * self.shifts[1] + self.shifts[0]


def without_rule(draw: Draw) -> Subject:
    d, p = integer(draw, 1, 4), integer(draw, 1, 4)
    kind = pick(draw, "prelu", "bilinear", "transposed", "bare")
    if kind == "prelu":
        return Subject(nn.PReLU(pick(draw, 1, d)), [(d, 3)])
    if kind == "bilinear":
        return Subject(nn.Bilinear(d, p, 3, bias=pick(draw, True, False)), [(2, d), (2, p)])
    if kind == "transposed":
        return Subject(nn.ConvTranspose2d(d, p, 2, stride=pick(draw, 1, 2)), [(d, 3, 2)])
    return Subject(Bare(d + 1), [(2, d + 1)])


LAYERS: dict[str, Callable[[Draw], Subject]] = {
    "Linear": linear,
    "Embedding": embedding,
    "EmbeddingBag": embedding_bag,
    "LayerNorm": layer_norm,
    "RMSNorm": rms_norm,
    "GroupNorm": group_norm,
    "InstanceNorm": instance_norm,
    "Conv1d": convolution(1),
    "Conv2d": convolution(2),
    "Conv3d": convolution(3),
    "HFConv1D": hugging_face_convolution,
    "MultiheadAttention": attention,
    "RNN": recurrent,
    "torch.func": without_rule,
}
SITUATIONS = ("plain", "frozen", "twice", "strided", "grouped", "poisoned", "empty")


class Model(nn.Module):
    """Runs the layer; or twice, on other values, so that its gradients add up."""

    def __init__(self, subject: Subject, twice: bool) -> None:
        super().__init__()
        self.layer = subject.layer
        self.twice = twice
        self.run = subject.run

    def forward(self, *inputs: Tensor) -> Tensor:
        outputs = self._flat(self.run(self.layer, *inputs))
        if self.twice:
            other = tuple(x.flip(-1) * 0.7 if x.is_floating_point() else x for x in inputs)
            outputs = outputs + 0.3 * self._flat(self.run(self.layer, *other))
        return outputs

    def _flat(self, outputs: Any) -> Tensor:
        outputs = outputs if isinstance(outputs, list) else [outputs]
        return torch.cat([x.reshape(len(x), math.prod(x.shape[1:])) for x in outputs], dim=1)


def losses_of(model: nn.Module, *inputs: Tensor) -> Tensor:
    y = model(*inputs)
    weights = torch.arange(1, y.shape[1] + 1, dtype=y.dtype).cos()
    return (y.square() / 2 + weights * y).sum(1)


def make_inputs(subject: Subject, records: int, strided: bool) -> tuple[Tensor, ...]:
    inputs = []
    for shape in subject.shapes:
        if subject.ids is not None:
            x = torch.randint(0, subject.ids, (records, *shape))
        else:
            x = torch.randn(records, *shape, dtype=torch.float64)
        if strided:  # every second entry of a larger tensor, with its axes in another order
            wide = torch.stack([x, x], dim=-1).flatten(-2) if x.ndim > 1 else torch.stack([x, x], dim=1).flatten()
            x = wide.transpose(0, -1).contiguous().transpose(0, -1)[..., ::2]
        inputs.append(x)
    return tuple(inputs)


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("kind", LAYERS)
def test_exact_with_random_settings(kind: str, situation: str, measured: Callable[..., Any]) -> None:
    @settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=CASES_EACH,
        phases=[Phase.generate],  # a failure is shown as it was found
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def check(data: st.DataObject) -> None:
        torch.manual_seed(integer(data.draw, 0, 2**16))
        subject = LAYERS[kind](data.draw)
        subject.layer.double()
        if situation == "frozen":
            freeze_some(data.draw, subject.layer)
        model = Model(subject, twice=situation == "twice")
        inputs = make_inputs(subject, 4, strided=situation == "strided")
        if situation == "empty":
            check_empty(model, inputs)
        elif situation == "poisoned":
            check_poisoned(model, inputs, measured)
        else:
            groups = torch.tensor([7, 2, 7, 7]) if situation == "grouped" else None
            result = measured(model, losses_of, inputs, sample_id=groups)
            assert result.error <= TOLERANCE
            assert 0 < result.largest <= LARGEST

    check()


def freeze_some(draw: Draw, layer: nn.Module) -> None:
    """Freeze a part of the layer's parameters, and never all of them."""
    parameters = list(layer.parameters())
    kept = integer(draw, 0, len(parameters) - 1)
    for i, parameter in enumerate(parameters):
        parameter.requires_grad_(i == kept or bool(pick(draw, True, False)))


def check_empty(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    with GradientBook(model) as book:
        assert book.clipped_sums(losses_of(model, *(x[:0] for x in inputs)), FlatClipping(1.0)) == {}
        assert set(book.clipped_sums(losses_of(model, *inputs), FlatClipping(1.0)))


def check_poisoned(model: nn.Module, inputs: tuple[Tensor, ...], measured: Callable[..., Any]) -> None:
    """The loss of one record is not finite: the sum is that of the others."""
    clean = measured(model, losses_of, tuple(x[torch.tensor([0, 1, 3])] for x in inputs), bound=0.5).sums

    def losses(model: nn.Module, *inputs: Tensor) -> Tensor:
        return losses_of(model, *inputs) * torch.tensor([1.0, 1.0, math.inf, 1.0], dtype=torch.float64)

    poisons = [math.nan, math.inf]
    with GradientBook(model) as book:
        sums = book.clipped_sums(losses(model, *inputs), FlatClipping(0.5))
        compare(sums, clean)
        for poison in poisons:
            bad = tuple(x.clone() for x in inputs)
            if not bad[0].is_floating_point():
                continue
            bad[0][2] = poison
            compare(book.clipped_sums(losses_of(model, *bad), FlatClipping(0.5)), clean)


def compare(sums: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(sums) == set(expected)
    for name, total in expected.items():
        assert torch.allclose(sums[name], total, rtol=TOLERANCE, atol=TOLERANCE), name
