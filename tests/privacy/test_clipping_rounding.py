# SPDX-License-Identifier: Apache-2.0
"""The allowance for rounding against batches made to exceed it, summed as float32 products are."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from wavedp.privacy import SUM_ROUNDING_ALLOWANCE, records_per_block
from wavedp.privacy.rounding import MAX_BLOCK_RECORDS, MAX_BLOCK_ROWS


def lost_or_counted(records: int, rows: int, large: int, tilt: float) -> Tensor:
    """``large`` records of norm 1 in their first row; then rows of about half a unit in the last place of the sum."""
    values = torch.zeros(records, rows, dtype=torch.float64)
    values[:large, 0] = 1.0
    ulp = 2.0 ** (math.floor(math.log2(large)) - 23)
    values[large:] = min(ulp * tilt, 1.0 / rows)
    return values


def identical(records: int, rows: int) -> Tensor:
    return torch.full((records, rows), (1 - 2.0**-22) / rows, dtype=torch.float64) * (1 + 1 / math.pi) / 1.5


def alternating(records: int, rows: int) -> Tensor:
    values = torch.full((records, rows), 0.9 / rows, dtype=torch.float64)
    values[:, ::2] *= 2.0**-9
    values[1::2] *= 2.0**-13
    return values


def aligned(records: int, rows: int) -> Tensor:
    torch.manual_seed(0)
    values = 1 + 0.01 * torch.randn(records, rows, dtype=torch.float64)
    return values / values.sum(1, keepdim=True)


def batches(records: int, rows: int) -> list[Tensor]:
    found = [identical(records, rows), alternating(records, rows), aligned(records, rows)]
    for large in {1, 2, 4, 8, 16, 32} & set(range(records)):
        found += [lost_or_counted(records, rows, large, tilt) for tilt in (0.49, 0.51, 0.75, 0.99, 1.01, 1.49)]
    return found


def one_after_the_other(values: Tensor) -> float:
    """The float32 sum in the worst order that a library may use."""
    rows = values.flatten().float().numpy()
    return float(np.add.accumulate(rows, dtype=np.float32)[-1]) if rows.size else 0.0


def product(values: Tensor, p: int, d: int, *, batched: bool = False) -> Tensor:
    """The same value in every entry of a ``p x d`` gradient, so that a row of 1 has norm 1."""
    g = (values.flatten()[:, None] / math.sqrt(p * d)).float().expand(-1, p).contiguous()
    if not batched:
        return (g.T @ torch.ones(len(g), d)).double()
    return torch.bmm(torch.stack([g, -g]).mT, torch.ones(2, len(g), d))[0].double()


def moved_in_order(values: Tensor, gone: int) -> float:
    """How far the sum moves beyond record ``gone``'s own, in units of C."""
    values = values.float().double()
    without = torch.cat([values[:gone], values[gone + 1 :]])
    return abs(one_after_the_other(values) - one_after_the_other(without) - values[gone].sum().item())


def moved_in_product(values: Tensor, gone: int, p: int, d: int, *, batched: bool) -> float:
    without = torch.cat([values[:gone], values[gone + 1 :]])
    exact = (values[gone] / math.sqrt(p * d)).float().double().sum()
    whole, part = (product(x, p, d, batched=batched) for x in (values, without))
    return (whole - part - exact).norm().item()


def gone(records: int) -> set[int]:
    return {0, records // 2, records - 1}


@pytest.mark.parametrize("rows", [1, 4, 16, 64, 128, 512, 2048, 4096])
def test_any_order_of_a_proven_block_stays_within_the_allowance(rows: int) -> None:
    records = records_per_block(rows)
    assert records > 1
    worst = max(moved_in_order(values, r) for values in batches(records, rows) for r in gone(records))
    assert worst <= SUM_ROUNDING_ALLOWANCE / 2


@pytest.mark.parametrize(("records", "rows"), [(64, 1), (64, 16), (64, 128), (16, 512), (4, 2048)])
@pytest.mark.parametrize(("p", "d"), [(16, 16), (64, 64)])
@pytest.mark.parametrize("batched", [False, True])
def test_products_of_the_largest_blocks_stay_within_the_allowance(
    records: int, rows: int, p: int, d: int, batched: bool
) -> None:
    assert records * rows <= MAX_BLOCK_ROWS
    found = batches(records, rows)
    worst = max(moved_in_product(values, r, p, d, batched=batched) for values in found for r in gone(records))
    assert 0.0 < worst <= SUM_ROUNDING_ALLOWANCE / 8


def test_why_narrow_products_need_smaller_blocks() -> None:
    """The largest block, one row after the other: a record more or less decides whether thousands of rows count."""
    worst = max(moved_in_order(values, 0) for values in batches(MAX_BLOCK_RECORDS, 128))
    assert worst > 2 * SUM_ROUNDING_ALLOWANCE


def test_records_per_block() -> None:
    sizes = {rows: records_per_block(rows) for rows in (0, 1, 4, 64, 128, 1024, 4096, 4097, 10**6)}
    assert sizes == {0: 64, 1: 64, 4: 64, 64: 16, 128: 11, 1024: 4, 4096: 2, 4097: 1, 10**6: 1}
    for rows in range(1, 4097, 7):
        records = records_per_block(rows)
        assert 2 * records**2 * rows * 2.0**-24 <= SUM_ROUNDING_ALLOWANCE
        assert records <= MAX_BLOCK_RECORDS
        assert records * rows <= MAX_BLOCK_ROWS
    with pytest.raises(TypeError, match="rows"):
        records_per_block(1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rows must be >= 0"):
        records_per_block(-1)
