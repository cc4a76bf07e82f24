# SPDX-License-Identifier: Apache-2.0
"""Norms and clipped sums by the matrix tiles of AMX, of sizes from which on these are used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from wavedp.ops import per_sample as ops
from wavedp.ops import per_sample_native as native
from wavedp.ops import use_backend
from wavedp.ops.instructions import use_instructions

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def amx() -> Iterator[None]:
    library = pytest.importorskip("wavedp._csrc", reason="needs the C++ library")
    before: Any = library.isa()
    try:
        library.set_isa("amx")
    except ValueError:
        pytest.skip("needs a CPU with amx")
    with use_backend("native"):
        yield
    library.set_isa(before)


def exact_norms(a: Tensor, g: Tensor) -> Tensor:
    return torch.einsum("btd,btp->bpd", a.to(DOUBLE), g.to(DOUBLE)).square().sum((1, 2))


def exact_sum(g: Tensor, a: Tensor, factors: Tensor) -> Tensor:
    return torch.einsum("btp,btd,b->pd", g.to(DOUBLE), a.to(DOUBLE), factors.to(DOUBLE))


def worst(x: Tensor, exact: Tensor) -> float:
    return float((x - exact).abs().max() / exact.abs().max())


def full_mantissas(x: Tensor) -> Tensor:
    """Of every number all bits set below the exponent: what is left out of a product is largest."""
    return (x.contiguous().view(torch.int32) | 0x7FFFFF).view(torch.float32)


@pytest.mark.parametrize(
    ("B", "T", "d", "p"),
    [(3, 80, 96, 160), (2, 128, 512, 64), (2, 33, 512, 130), (3, 129, 100, 200), (1, 300, 330, 320), (2, 97, 91, 77)],
)
@pytest.mark.parametrize("change", ["normal", "full mantissas", "strides"])
def test_norms(B: int, T: int, d: int, p: int, change: str) -> None:
    torch.manual_seed(T)
    a, g = torch.randn(B, T, d), torch.randn(B, T, p) * 1e-4
    if change == "full mantissas":
        a, g = full_mantissas(a), full_mantissas(g)
    elif change == "strides":
        a, g = torch.randn(T, B, d + 3)[..., 3:].transpose(0, 1), torch.randn(1, T, p).expand(B, T, p)
    squared, bound, bias = ops.linear_norms(a, g, True)
    torch.testing.assert_close(squared, exact_norms(a, g), rtol=3e-7, atol=0)
    terms = a.to(DOUBLE).norm(dim=2) * g.to(DOUBLE).norm(dim=2)
    torch.testing.assert_close(bound, terms.sum(1), rtol=3e-7, atol=0)
    torch.testing.assert_close(bias, g.sum(1, dtype=DOUBLE).float(), rtol=2e-6, atol=2e-6 * float(g.abs().max()))


def test_equal_tokens_of_one_sign_are_not_taken_for_less() -> None:
    a = full_mantissas(torch.ones(2, 96, 96))
    g = full_mantissas(torch.full((2, 96, 128), 1e-3))
    squared, _, _ = ops.linear_norms(a, g, False)
    exact = exact_norms(a, g)
    assert ((squared - exact).abs() / exact).max() < 1e-6


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e22, 1e30])
@pytest.mark.parametrize("tokens", [96, 300])
def test_norms_of_huge_and_tiny_rows(scale: float, tokens: int) -> None:
    torch.manual_seed(1)
    a, g = torch.randn(3, tokens, 128), torch.randn(3, tokens, 144)
    a[1, ::7] *= scale
    g[1] *= 1e-3
    squared, bound, _ = ops.linear_norms(a, g, False)
    torch.testing.assert_close(squared, exact_norms(a, g), rtol=3e-6, atol=0)
    assert torch.isfinite(bound).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.4e38])
def test_norms_of_others_do_not_see_what_is_not_finite(value: float) -> None:
    torch.manual_seed(2)
    a, g = torch.randn(3, 96, 128), torch.randn(3, 96, 144)
    g[1, 5, 7] = value
    squared, _, _ = ops.linear_norms(a, g, False)
    torch.testing.assert_close(squared[[0, 2]], exact_norms(a, g)[[0, 2]], rtol=3e-7, atol=0)
    if value == 3.4e38:
        torch.testing.assert_close(squared[1], exact_norms(a, g)[1], rtol=3e-6, atol=0)
    else:
        assert not torch.isfinite(squared[1])


def test_rows_of_zeros() -> None:
    torch.manual_seed(3)
    a, g = torch.randn(2, 96, 128), torch.randn(2, 96, 144)
    a[:, 40:] = 0
    g[0] = 0
    squared, bound, bias = ops.linear_norms(a, g, True)
    assert squared[0] == bound[0] == 0
    assert not bias[0].any()
    torch.testing.assert_close(squared, exact_norms(a, g), rtol=3e-7, atol=0)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_show(threads: int) -> None:
    torch.manual_seed(4)
    a, g, factors = torch.randn(5, 260, 96), torch.randn(5, 260, 272), torch.rand(5)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        norms, total = ops.linear_norms(a, g, True), ops.scaled_weight_grad(g, a, factors)
        torch.set_num_threads(threads)
        for x, y in zip(norms, ops.linear_norms(a, g, True)):
            assert torch.equal(x, y)
        assert torch.equal(total, ops.scaled_weight_grad(g, a, factors))
    finally:
        torch.set_num_threads(before)


SUMS = [
    (130, 1, 64, 640),
    (40, 16, 64, 192),
    (3, 100, 700, 33),
    (200, 16, 35, 95),
    (70, 33, 96, 96),
    (2, 999, 515, 530),
]


def by_tiles(g: Tensor, a: Tensor, factors: Tensor) -> Tensor:
    total = native._weight_grad_by_tiles(g, a, factors)
    assert total is not None
    assert torch.equal(total, ops.scaled_weight_grad(g, a, factors))
    return total


@pytest.mark.parametrize(("B", "T", "d", "p"), SUMS)
@pytest.mark.parametrize("change", ["normal", "full mantissas", "strides"])
def test_sums(B: int, T: int, d: int, p: int, change: str) -> None:
    torch.manual_seed(B)
    a, g, factors = torch.randn(B, T, d), torch.randn(B, T, p) * 1e-3, torch.rand(B) + 1e-3
    if change == "full mantissas":
        a, g = full_mantissas(a), full_mantissas(g)
    elif change == "strides":
        a, g = torch.randn(T, B, d + 1)[..., 1:].transpose(0, 1), torch.randn(B, 1, p).expand(B, T, p)
    assert worst(by_tiles(g, a, factors), exact_sum(g, a, factors)) < 1.5e-6


@pytest.mark.parametrize("B", range(1, 20))
@pytest.mark.parametrize("T", [2731, 4097])  # two records a block of rows that are added up in float32, and one
def test_sums_of_few_long_records(B: int, T: int) -> None:
    torch.manual_seed(B)
    a, g, factors = torch.randn(B, T, 33), torch.randn(B, T, 32), torch.rand(B) + 1e-3
    factors[B // 2] *= B < 10
    assert worst(by_tiles(g, a, factors), exact_sum(g, a, factors)) < 1.5e-6


def test_a_record_of_factor_0_is_left_out() -> None:
    torch.manual_seed(5)
    a, g, factors = torch.randn(40, 16, 64), torch.randn(40, 16, 192), torch.rand(40)
    factors[[0, 7, 39]] = 0
    g[7], a[39, 3] = float("nan"), float("inf")
    kept = factors != 0
    assert worst(by_tiles(g, a, factors), exact_sum(g[kept], a[kept], factors[kept])) < 1e-6


def test_what_one_record_adds_is_no_more_than_it_is() -> None:
    torch.manual_seed(6)
    a, g = torch.randn(9, 64, 96), torch.randn(9, 64, 128)
    norms = ops.linear_norms(a, g, False)[0].sqrt()
    for record in range(9):
        factors = torch.zeros(9, dtype=DOUBLE)
        factors[record] = 1 / norms[record]
        assert by_tiles(g, a, factors).to(DOUBLE).norm() <= 1 + 1e-6


@pytest.mark.parametrize(("side", "scale"), [("a", 1e-33), ("g", 1e-33), ("a", 1e33), ("factors", 1e-34)])
def test_rows_too_large_or_small_go_the_long_way(side: str, scale: float) -> None:
    torch.manual_seed(7)
    tensors = {"g": torch.randn(40, 16, 192), "a": torch.randn(40, 16, 64), "factors": torch.rand(40, dtype=DOUBLE)}
    tensors[side][4] *= scale
    assert native._weight_grad_by_tiles(**tensors) is None
    assert worst(ops.scaled_weight_grad(*tensors.values()), exact_sum(**tensors)) < 1e-6


def test_no_records_are_kept() -> None:
    a, g = torch.randn(40, 16, 64), torch.full((40, 16, 192), float("nan"))
    assert torch.equal(ops.scaled_weight_grad(g, a, torch.zeros(40)), torch.zeros(192, 64))


def test_amx_can_be_asked_for() -> None:
    with use_instructions("amx"):
        assert native.compiled("isa")() == "amx"
