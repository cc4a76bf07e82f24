# SPDX-License-Identifier: Apache-2.0
"""The forms of convolutions and of blocks of rows: cut into pieces, joined, in the type that is promised."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wavedp.privacy import FlatClipping, GradientBook, forms_conv
from wavedp.privacy.forms_blocks import RowBlocks
from wavedp.privacy.forms_conv import Convolution, Geometry
from wavedp.privacy.per_sample import Materialised, combined

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
