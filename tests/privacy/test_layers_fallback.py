# SPDX-License-Identifier: Apache-2.0
"""Layers without a rule are run record by record, exactly and once; what cannot be is refused with a remedy."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavedp.privacy import FlatClipping, GradientBook

Make = Callable[..., Any]


def losses_of(model: nn.Module, *inputs: Tensor) -> Tensor:
    return model(*inputs).square().flatten(1).sum(1)


class Scale(nn.Module):
    def __init__(self, d: int = 3) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(d))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class OddLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Padded(nn.Conv1d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv1d(F.pad(input, (1, 1)), weight, bias) * 3


class Masked(nn.Module):
    """Takes a mask that all records share, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, mask: Tensor, *, power: int = 1) -> dict[str, Any]:
        return {"y": (mask @ x).pow(power) * self.scale, "power": power}


@pytest.mark.parametrize("layer", [Scale(), OddLinear(3, 3), nn.PReLU()], ids=lambda layer: type(layer).__name__)
def test_one_log_line_says_what_it_costs(layer: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(3, 3), layer)
    size = sum(p.numel() for p in layer.parameters())
    with caplog.at_level(logging.INFO, "wavedp.privacy"), GradientBook(model):
        (record,) = caplog.records
        assert "'1'" in record.getMessage()
        assert type(layer).__name__ in record.getMessage()
        assert f"batch size x {size}" in record.getMessage()


@pytest.mark.parametrize("layer", [OddLinear(4, 4), Padded(4, 4, 3)], ids=lambda layer: type(layer).__name__)
def test_a_subclass_with_another_forward_runs_its_own(layer: nn.Module, measured: Make) -> None:
    result = measured(layer.double(), losses_of, (torch.randn(5, 4, 4, dtype=torch.float64),))
    assert result.error < 1e-9
    assert 0.5 < result.largest <= 1 + 1e-6


def test_a_subclass_with_the_same_forward_keeps_its_rule(caplog: pytest.LogCaptureFixture) -> None:
    class Named(nn.Conv1d):
        pass

    with GradientBook(nn.Sequential(Named(2, 2, 1), nn.Flatten(), nn.Linear(4, 4))):
        assert not caplog.records


def test_dropout_is_drawn_once_and_apart_for_every_record() -> None:
    class Dropped(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(super().forward(x), 0.5)

    model = Dropped(64).double()
    with GradientBook(model) as book:
        y = model(torch.ones(2, 64, dtype=torch.float64))
        sums = book.clipped_sums(y.square().sum(1) / 2, FlatClipping(1e6))
    assert not torch.equal(y[0] == 0, y[1] == 0)
    # d(y^2 / 2)/d(scale) = y * dropout factor, which is 0 or 2 for x = 1.
    assert torch.allclose(sums["scale"], (y * 2).sum(0).detach(), rtol=1e-12)


def test_arguments_that_records_share_are_passed_as_they_are(measured: Make) -> None:
    mask = torch.randn(4, 4, dtype=torch.float64)

    def losses(model: nn.Module, x: Tensor) -> Tensor:
        output = model(x, mask.to(x.dtype), power=3)
        assert output["power"] == 3
        return output["y"].flatten(1).sum(1)

    result = measured(Masked().double(), losses, (torch.randn(5, 4, 4, dtype=torch.float64),))
    assert result.error < 1e-9


def test_a_shared_argument_as_long_as_a_batch_is_noticed() -> None:
    model = Masked()
    with GradientBook(model) as book:
        model(torch.randn(4, 4, 4), torch.randn(4, 4))
        with pytest.raises(RuntimeError, match=r"\(4, 4\) whose first axis was the record axis in a batch before"):
            model(torch.randn(3, 4, 4), torch.randn(4, 4))
    with GradientBook(model) as book:  # and known as shared from the first batch of another size on
        for records in (3, 4):
            y = model(torch.ones(records, 4, 4), torch.ones(4, 4))["y"]
            assert torch.equal(y, (4 * model.scale).expand(records, 4, 4))
            book.clipped_sums(y.flatten(1).sum(1), FlatClipping(1.0))


def test_parameters_in_containers_belong_to_the_module_that_runs(measured: Make) -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleDict({"shifts": nn.ParameterDict({"a": torch.randn(3)}), "layer": nn.Linear(3, 3)})

        def forward(self, x: Tensor) -> Tensor:
            return self.inner["layer"](x) + self.inner["shifts"]["a"]

    model = nn.Sequential(nn.Linear(3, 3), Blocks()).double()
    result = measured(model, losses_of, (torch.randn(4, 2, 3, dtype=torch.float64),))
    assert result.error < 1e-9
    assert set(result.sums) == {name for name, _ in model.named_parameters()}


def test_weights_shared_with_layers_outside_have_their_cross_term(measured: Make) -> None:
    shared = nn.Linear(3, 3)

    class Around(Scale):
        def __init__(self) -> None:
            super().__init__()
            self.shared = shared

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(super().forward(x)) + F.linear(x, self.shared.weight)

    model = nn.Sequential(shared, nn.Tanh(), Around(), shared).double()
    result = measured(model, losses_of, (torch.randn(5, 2, 3, dtype=torch.float64),))
    assert result.error < 1e-9
    assert 0.5 < result.largest <= 1 + 1e-6


def test_a_whole_model_with_a_bare_parameter(measured: Make) -> None:
    class Vision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(1, 4, 2, stride=2)
            self.token = nn.Parameter(torch.randn(1, 1, 4))
            self.blocks = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.patches(x).flatten(2).mT
            h = self.blocks(torch.cat([self.token.expand(len(h), -1, -1), h], 1))
            return self.head(h[:, 0])

    result = measured(Vision().double(), losses_of, (torch.randn(4, 1, 4, 4, dtype=torch.float64),))
    assert result.error < 1e-9
    assert 0.5 < result.largest <= 1 + 1e-6


class Transformer(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        settings: dict[str, Any] = {"dropout": 0.0, "batch_first": batch_first}
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, **settings), 2)
        self.decoder = nn.TransformerDecoderLayer(4, 2, 8, norm_first=True, **settings)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        output: Tensor = self.decoder(y, self.encoder(x))
        return output


@pytest.mark.parametrize("train", [True, False])
def test_transformer_layers_of_torch(train: bool, measured: Make) -> None:
    """In evaluation, their fast path would pass by the layers inside: it is not taken with gradients."""
    model = Transformer(batch_first=True).double().train(train)
    inputs = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(3, 4, 4, dtype=torch.float64)
    # Not the squares: the last layer normalises.
    weights = torch.randn(4, 4, dtype=torch.float64)
    result = measured(model, lambda m, x, y: (m(x, y) * weights.to(x.dtype)).sum((1, 2)), inputs)
    assert result.error < 1e-9
    assert 0.5 < result.largest <= 1 + 1e-6
    assert set(result.sums) == {name for name, _ in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("records", [3, 5])
def test_transformer_layers_with_the_records_second_are_refused(records: int) -> None:
    model = Transformer(batch_first=False)
    x = torch.randn(records, 5, 4)
    with GradientBook(model) as book:
        losses = model(x.transpose(0, 1), x.transpose(0, 1)).square().sum((0, 2))
        with pytest.raises(RuntimeError, match="record axis"):
            book.clipped_sums(losses, FlatClipping(1.0))


class Lora(nn.Module):
    """The structure of peft's LoRA layers: a frozen layer beside two small ones in dictionaries."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})
        self.lora_embedding_A = nn.ParameterDict()

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 0.5 * self.lora_B["default"](self.lora_A["default"](x))


def test_lora(measured: Make, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(Lora(nn.Linear(5, 4), 2), nn.Tanh(), Lora(nn.Linear(4, 3), 2)).double()
    result = measured(model, losses_of, (torch.randn(4, 3, 5, dtype=torch.float64),))
    assert result.error < 1e-9
    assert len(result.sums) == 4
    assert not caplog.records


def test_lora_by_peft(measured: Make, caplog: pytest.LogCaptureFixture) -> None:
    peft = pytest.importorskip("peft", reason="needs peft, of the extra [dev]")
    base = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    config = peft.LoraConfig(r=2, target_modules=["1", "3"], lora_dropout=0.0, init_lora_weights=False)
    model = peft.get_peft_model(base, config).double()
    result = measured(model, losses_of, (torch.randint(0, 9, (4, 5)),))
    assert result.error < 1e-9
    assert 0.5 < result.largest <= 1 + 1e-6
    assert len(result.sums) == 4
    assert not caplog.records


@pytest.mark.parametrize("model", [nn.Linear(3, 3), Scale()], ids=lambda model: type(model).__name__)
def test_a_model_that_is_one_layer_is_looked_at_in_plain_backwards(model: nn.Module) -> None:
    heard: list[Any] = []
    with GradientBook(model, listener=heard.append) as book:
        model(torch.randn(4, 3)).square().mean().backward()
        (bookings,) = heard
        assert bookings.records == 4
        assert set(book.clip(bookings, FlatClipping(1.0))) == {name for name, _ in model.named_parameters()}


# Refused


class Orphans(nn.Module):
    """Trainable parameters that no module with a forward is around."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([torch.ones(3)])


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2, 3))

    def forward(self) -> Tensor:
        return self.table


class Counts(Scale):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(x.sum(0))
        return super().forward(x)


class Branches(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if bool(x.sum() > 0) else x


class Means(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Orphans(), ["scales", "ParameterList", "neither", "requires_grad_(False)"]),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), ["WeightNorm", "remove_parametrizations"]),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), ["SpectralNorm", "remove_parametrizations"]),
        (nn.utils.spectral_norm(nn.Linear(3, 3)), ["SpectralNorm", "remove_spectral_norm"]),
        (nn.Sequential(nn.LazyLinear(3)), ["LazyLinear", "run the model once"]),
        (nn.LSTM(3, 3), ["LSTM", "batch_first=True"]),
        (nn.EmbeddingBag(3, 3, mode="max"), ["mode='max'", "Embedding"]),
        (nn.EmbeddingBag(3, 3, sparse=True), ["sparse=False"]),
        (nn.SyncBatchNorm(3), ["SyncBatchNorm", "GroupNorm"]),
        (nn.Sequential(nn.Linear(3, 3), nn.DataParallel(nn.Linear(3, 3))), ["DataParallel"]),
        (nn.InstanceNorm2d(3, affine=True, track_running_stats=True), ["InstanceNorm2d", "GroupNorm"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_refused_at_attach(model: nn.Module, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        GradientBook(model)
    assert all(word in str(caught.value) for word in words), caught.value
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("layer", "inputs", "words"),
    [
        (Lookup(), (), "'layer' of type Lookup.*without a tensor whose first axis"),
        (Counts(), (torch.ones(2, 3),), "'layer' of type Counts.*one record at a time"),
        (Branches(), (torch.ones(2, 3),), "'layer' of type Branches.*control flow that depends on data"),
        (Means(), (torch.ones(2, 3),), r"'layer' of type Means.*returned a tensor of shape \(\)"),
        (nn.Conv2d(1, 1, 1), (torch.ones(1, 3, 3),), r"\(1, 3, 3\).*record axis first"),
        (nn.InstanceNorm1d(2, affine=True), (torch.ones(2, 3),), r"\(2, 3\).*record axis first"),
        (nn.MultiheadAttention(2, 1), (torch.ones(3, 2),) * 3, r"\(3, 2\).*record axis"),
        (nn.GRU(2, 2, batch_first=True), (torch.ones(3, 2),), r"\(3, 2\).*record axis first"),
        (nn.EmbeddingBag(2, 2), (torch.tensor([0, 1]), torch.tensor([0])), r"\(2,\).*\[B, T\]"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_refused_when_it_runs(layer: nn.Module, inputs: tuple[Tensor, ...], words: str) -> None:
    model = nn.ModuleDict({"layer": layer})
    with GradientBook(model), pytest.raises(RuntimeError, match=f"(?s){words}"):
        layer(*inputs)


def test_packed_sequences_are_refused() -> None:
    layer = nn.LSTM(2, 2, batch_first=True)
    packed = nn.utils.rnn.pack_padded_sequence(torch.ones(2, 3, 2), torch.tensor([3, 1]), batch_first=True)
    with GradientBook(layer), pytest.raises(RuntimeError, match="packed sequences"):
        layer(packed)
