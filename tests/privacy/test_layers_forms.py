# SPDX-License-Identifier: Apache-2.0
"""The forms of convolutions and of blocks of rows: cut into pieces, joined, in the type that is promised."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wavedp.privacy import FlatClipping, GradientBook, PerGroupClipping, forms_conv
from wavedp.privacy.bookings import Bookings, Factors
from wavedp.privacy.forms_blocks import RowBlocks
from wavedp.privacy.forms_conv import Convolution, Geometry
from wavedp.privacy.per_sample import SMALL, Materialised, combined, is_small, side_by_side

Make = Callable[..., Any]


def losses_of(model: nn.Module, *inputs: Tensor) -> Tensor:
    y = model(*inputs).flatten(1)
    return (y.square() / 2 + y * torch.arange(1, y.shape[1] + 1, dtype=y.dtype).cos()).sum(1)


def convolution(records: int, dtype: torch.dtype) -> Convolution:
    geometry = Geometry((4, 3, 2, 2), (1, 2), (1, 0), (1, 1), 2)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(records, 6, 5, 6, dtype=torch.float64, generator=generator)
    g = torch.randn(records, 4, 6, 3, dtype=torch.float64, generator=generator)
    return Convolution(x.to(dtype), g.to(dtype), geometry)


@pytest.mark.parametrize(
    "limits", [{"_PATCH_ELEMENTS": 1}, {"_MAX_RECORDS_IN_FLOAT32": 2}, {"_MAX_ROWS_IN_FLOAT32": 40}]
)
@pytest.mark.parametrize("grouped", [False, True])
def test_pieces_give_the_same(limits: dict[str, int], grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers() -> list[Tensor]:
        form = convolution(5, torch.float64)
        if grouped:
            form = form.by_record(torch.tensor([2, 0, 2, 1, 2]), 3)
        factors = torch.tensor([0.5, 0.0, 1.0, 0.25, 2.0], dtype=torch.float64)[: 3 if grouped else 5]
        return [form.squared_norms(), form.weighted_sum(factors), form.materialised()]

    whole = answers()
    dense = whole[2].flatten(1)
    assert torch.allclose(whole[0], dense.square().sum(1), rtol=1e-11)
    for name, value in limits.items():
        monkeypatch.setattr(forms_conv, name, value)
    for piece, expected in zip(answers(), whole):
        assert torch.allclose(piece, expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_sum_is_that_of_the_dense_gradients(dtype: torch.dtype) -> None:
    form = convolution(70, dtype)
    factors = torch.linspace(0, 1, 70, dtype=torch.promote_types(dtype, torch.float32))
    expected = (form.materialised().double() * factors.double().reshape(-1, 1, 1, 1, 1)).sum(0)
    total = form.weighted_sum(factors)
    assert total.dtype == factors.dtype
    assert (total - expected).norm() <= (1e-13 if dtype == torch.float64 else 1e-6) * expected.norm()


def test_a_factor_of_zero_leaves_a_record_out() -> None:
    form = convolution(3, torch.float32)
    clean = form.weighted_sum(torch.tensor([1.0, 0.0, 0.5]))
    form.x[1], form.g[1] = math.nan, math.inf
    assert torch.equal(form.weighted_sum(torch.tensor([1.0, 0.0, 0.5])), clean)
    assert torch.equal(form.squared_norms().isfinite(), torch.tensor([True, False, True]))
    assert torch.equal(form.weighted_sum(torch.zeros(3)), torch.zeros(4, 3, 2, 2))


def test_blocks_join_where_they_are_the_same_or_apart() -> None:
    parts = [torch.randn(3, rows, 2, dtype=torch.float64) for rows in (2, 2, 1, 4)]
    places = [(1, 3), (1, 3), (4, 5), (0, 4)]
    forms = [RowBlocks({place: Materialised(part)}, 6) for place, part in zip(places, parts)]
    dense = torch.zeros(3, 6, 2, dtype=torch.float64)
    for count, ((first, last), part) in enumerate(zip(places, parts), start=1):
        dense[:, first:last] += part
        joined = combined(forms[:count])
        assert isinstance(joined, RowBlocks if count < 4 else Materialised)
        assert torch.allclose(joined.squared_norms(), dense.square().sum((1, 2)), rtol=1e-12)
        assert torch.allclose(joined.weighted_sum(torch.ones(3, dtype=torch.float64)), dense.sum(0), rtol=1e-12)


@pytest.mark.parametrize("records", [0, 1, 70])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_side_by_side_is_as_each_alone(records: int, dtype: torch.dtype) -> None:
    shapes = [(3,), (), (2, 3), (0,), (1, 1, 5)]
    generator = torch.Generator().manual_seed(2)
    alone = [Materialised(torch.randn(records, *shape, generator=generator).to(dtype)) for shape in shapes]
    whole, parts = side_by_side(alone)
    factors = torch.linspace(0, 1, records, dtype=torch.promote_types(dtype, torch.float32))
    squares = torch.stack([form.squared_norms() for form in alone]).sum(0)
    assert torch.allclose(whole.squared_norms(), squares, rtol=1e-12)
    for part, form in zip(parts, alone, strict=True):
        assert torch.equal(part.grads, form.grads)
        assert torch.equal(part.squared_norms(), form.squared_norms())
        assert torch.allclose(part.weighted_sum(factors), form.weighted_sum(factors), rtol=1e-6, atol=1e-7)
        assert part.weighted_sum(factors).shape == form.grads.shape[1:]
    halved = factors / 2  # other factors, and not the sums of before
    assert torch.allclose(parts[0].weighted_sum(halved), alone[0].weighted_sum(halved), rtol=1e-6, atol=1e-7)


def test_small_gradients_stand_side_by_side_within_their_group() -> None:
    names = ["a.weight", "a.bias", "b.weight", "b.bias", "b.large"]
    parameters = {name: nn.Parameter(torch.zeros(SMALL + 1 if "large" in name else 4)) for name in names}
    grads = {name: torch.randn(3, parameter.numel()) for name, parameter in parameters.items()}
    grads["a.bias"][1, 2] = math.nan
    bookings = Bookings()
    bookings.rows = 3
    for name, grad in grads.items():
        bookings.add(name, Materialised(grad), alone=True)
    clipping = PerGroupClipping({"a": 0.5, "b": 0.25}).for_parameters(names)
    norms = bookings.squared_norms(clipping, 2.0, torch.device("cpu"))
    for group in "ab":
        expected = torch.stack([4 * grads[n].double().square().sum(1) for n in names if n.startswith(group)]).sum(0)
        assert torch.allclose(norms[group], expected, rtol=1e-6, equal_nan=True)
    sums = bookings.clipped_sums(Factors(parameters, clipping, norms, 2.0))
    assert sums.keys() == set(names)
    for name in names:
        factors = clipping.group_factors(norms, torch.float32)[name[0]]
        assert factors[1] == 0
        expected = (2 * factors[[0, 2], None] * grads[name][[0, 2]]).sum(0)
        assert torch.allclose(sums[name], expected, rtol=1e-5, atol=1e-7)


def test_what_is_small() -> None:
    assert is_small(Materialised(torch.zeros(2, SMALL)))
    assert not is_small(Materialised(torch.zeros(2, SMALL + 1)))
    assert not is_small(convolution(2, torch.float32))


def test_attention_to_itself_and_then_to_another(measured: Make) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            h, _ = self.attention(x, x, x, need_weights=False)
            h, _ = self.attention(h, y, y, need_weights=False)
            return h

    inputs = tuple(torch.randn(4, tokens, 4, dtype=torch.float64) for tokens in (3, 5))
    result = measured(Model().double(), losses_of, inputs)
    assert result.error < 1e-9
    assert 0.5 < result.largest <= 1 + 1e-6


def test_convolutions_of_two_sizes_by_one_layer(measured: Make) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 2, stride=2, padding=1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.layer(x).sum((2, 3)) * self.layer(y).mean((2, 3))

    inputs = tuple(torch.randn(4, 3, size, size, dtype=torch.float64) for size in (4, 7))
    result = measured(Model().double(), losses_of, inputs)
    assert result.error < 1e-9
    assert 0.5 < result.largest <= 1 + 1e-6


class Mix(nn.Module):
    """Has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(2))

    def forward(self, h: Tensor) -> Tensor:
        return nn.functional.linear(h, self.weight) * self.scale


def test_autocast_keeps_the_bound_for_every_layer() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.mix = Mix()

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu_(self.norm(self.convolution(x))).flatten(2).mT
            h, _ = self.attention(h, h, h)
            return self.mix(h)

    model, x = Net(), torch.randn(5, 1, 4, 4)
    with GradientBook(model) as book:
        exact = book.clipped_sums(losses_of(model, x), FlatClipping(0.5))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = book.clipped_sums(losses_of(model, x), FlatClipping(0.5))
            alone = book.clipped_sums(losses_of(model, x[:1]) * 1e3, FlatClipping(0.5))
    error = sum(float((rounded[name] - total).square().sum()) for name, total in exact.items()) ** 0.5
    assert error <= 0.03 * sum(float(total.square().sum()) for total in exact.values()) ** 0.5
    norm = sum(float(total.double().square().sum()) for total in alone.values()) ** 0.5
    assert 0.499 < norm <= 0.5 * (1 + 1e-6)
