# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of per-record gradients in the interpreter: values of the reference, ranges, selection, order."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from wavedp.reference import per_sample as reference

pytest.importorskip("triton", reason="needs Triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, where a test overflows on purpose

# Relative to the bound of a sum, which is 1 in float64: float32 sums of some hundred terms, or float64 ones.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6, torch.float64: 1e-14}
DTYPES = list(TOLERANCES)
# B, T, d, p: one number; less than a tile in every axis; a token more than a tile of 16, 32 and 64; T in several tiles
# by the Gram way (d and p large) and by products (d or p small); widths on either side of a step of 16.
SHAPES = [(1, 1, 1, 1), (3, 5, 7, 9), (2, 17, 70, 33), (2, 66, 80, 100), (2, 70, 5, 40), (2, 33, 15, 16)]


@pytest.fixture(scope="module")
def kernels(fresh_kernels: Callable[..., ModuleType]) -> ModuleType:
    module = fresh_kernels("per_sample", interpreted=True)
    assert module.INTERPRETED
    return module


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory: None) -> None:
    """What a kernel reads without having written it is NaN."""


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def assert_near(actual: Tensor, exact: Tensor, scale: Tensor | float, dtype: torch.dtype) -> None:
    """``scale`` is what the absolute tolerance is relative to: terms of a sum may cancel."""
    assert actual.shape == exact.shape
    assert actual.isfinite().all()
    error = (actual.double() - exact.double()).abs()
    assert (error <= TOLERANCES[dtype] * torch.as_tensor(scale)).all(), (error / torch.as_tensor(scale)).max()


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "B{}-T{}-d{}-p{}".format(*shape))
def test_linear_norms(kernels: ModuleType, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    B, T, d, p = shape
    a, g = noise(B, T, d, dtype=dtype), noise(B, T, p, dtype=dtype)
    squared, bound, sums = kernels.linear_norms(a, g, True)
    exact = reference.linear_norms(a.double(), g.double(), True)
    assert (squared.dtype, bound.dtype, sums.dtype) == (torch.float64, torch.float64, wide(dtype))
    assert_near(squared, exact[0], exact[1].square(), dtype)
    assert_near(bound, exact[1], exact[1], dtype)
    assert_near(sums, exact[2], g.double().abs().sum(1), dtype)
    without = kernels.linear_norms(a, g, False)
    assert torch.equal(without[0], squared)
    assert without[2].shape == (B, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_both_ways_give_the_norm(kernels: ModuleType, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    a, g = noise(2, 37, 21, dtype=dtype), noise(2, 37, 34, dtype=dtype)
    exact = reference.linear_norms(a.double(), g.double(), True)
    for by_gram in (True, False):
        monkeypatch.setitem(kernels.linear_norms.__globals__, "takes_gram", lambda T, d, p, way=by_gram: way)
        squared, bound, sums = kernels.linear_norms(a, g, True)
        assert_near(squared, exact[0], exact[1].square(), dtype)
        assert_near(bound, exact[1], exact[1], dtype)
        assert_near(sums, exact[2], g.double().abs().sum(1), dtype)


def test_pairs_of_blocks_are_all_counted(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven blocks of 16 tokens: 21 pairs off the diagonal."""
    module = kernels.linear_norms.__globals__
    monkeypatch.setitem(module, "blocks_of", lambda *_: module["Blocks"](tile=16, depth=16, num_warps=4, num_stages=1))
    monkeypatch.setitem(module, "takes_gram", lambda *_: True)
    # Of one sign, so that terms add up and a pair left out shows.
    a, g = noise(1, 101, 10).abs(), noise(1, 101, 14).abs()
    squared, _, _ = kernels.linear_norms(a, g, False)
    assert_near(squared, reference.linear_norms(a.double(), g.double(), False)[0], squared, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_beyond_the_range_of_float32_arithmetic(kernels: ModuleType, dtype: torch.dtype) -> None:
    T, d, p = 20, 24, 24
    a, g = noise(7, T, d), noise(7, T, p)
    a[0], g[0] = a[0] * 2.0**90, g[0] * 2.0**90  # squares overflow
    a[1], g[1] = a[1] * 2.0**-90, g[1] * 2.0**-90  # squares vanish
    a[2], g[2] = a[2] * 2.0**100, g[2] * 2.0**-110  # one of each
    a[3], g[3] = 0.0, 0.0
    a[3, 0, 0], g[3, 0, 1], a[3, 1, 0], g[3, 1, 1] = 1.0, 2.0**-100, 2.0**-100, 1.0  # largest where the other is least
    a[4] = 0.0  # a gradient of zero
    a[5], g[5] = a[5] * 2.0**110, 0.0  # a large row that counts for nothing
    a[5, 3], g[5, 3] = 2.0**-70, 2.0**-70
    a, g = a.to(dtype), g.to(dtype)
    squared, bound, _ = kernels.linear_norms(a, g, False)
    exact = reference.linear_norms(a.double(), g.double(), False)
    assert (exact[0][[0, 1, 2, 3, 5, 6]] > 0).all()
    assert (squared[4], bound[4]) == (0.0, 0.0)
    assert_near(
        squared / exact[1].square().where(exact[1] > 0, 1.0),
        exact[0] / exact[1].square().where(exact[1] > 0, 1.0),
        1.0,
        dtype,
    )
    assert_near(bound / exact[1].where(exact[1] > 0, 1.0), (exact[1] > 0).double(), 1.0, dtype)
    assert squared[6] == kernels.linear_norms(a[6:], g[6:], False)[0]  # nothing of this changes another record


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_record_that_is_not_finite_has_no_finite_norm(kernels: ModuleType, value: float) -> None:
    for tokens, by_gram in ((9, True), (40, False)):
        a, g = noise(4, tokens, 12, dtype=torch.bfloat16), noise(4, tokens, 20, dtype=torch.bfloat16)
        before = kernels.linear_norms(a, g, True)
        assert kernels.linear_norms.__globals__["takes_gram"](tokens, 12, 20) == by_gram
        a[1, 2, 3] = value
        g[1, 2] = 0.0  # the product is 0 * inf
        g[2, tokens - 1, 19] = value
        after = kernels.linear_norms(a, g, True)
        assert not after[0][1:3].isfinite().any()
        assert not after[1][1:3].isfinite().any()
        for one, other in zip(before, after):
            assert torch.equal(one[[0, 3]], other[[0, 3]])


def test_strides_and_mixed_types(kernels: ModuleType) -> None:
    a = noise(10, 3, 2, 8, dtype=torch.bfloat16).permute(1, 0, 3, 2)[:, ::2, :, 0]  # [3, 5, 8]
    g = noise(3, 1, 6).expand(3, 5, 6)
    squared, _bound, _ = kernels.linear_norms(a, g, False)
    exact = reference.linear_norms(a.double(), g.double(), False)
    assert_near(squared, exact[0], exact[1].square(), torch.float32)
    factors = torch.tensor([0.5, 1.0, 0.25], dtype=torch.float64)
    total = kernels.scaled_weight_grad(g, a, factors)
    exact_total = reference.scaled_weight_grad(g.double(), a.double(), factors)
    assert_near(total, exact_total, exact[1].sum(), torch.float32)


FACTORS = torch.tensor([0.0, 1.0, 0.37, 0.0, 2.0**-70])


def factors_of(B: int) -> Tensor:
    return FACTORS.repeat(-(-B // len(FACTORS)))[:B]


@pytest.mark.parametrize("parted", [False, True], ids=["whole", "parted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 7, 9), (70, 1, 5, 6), (5, 17, 20, 33), (2, 35, 3, 70), (1, 1, 1, 1)], ids=str)
def test_scaled_weight_grad(
    kernels: ModuleType, shape: tuple[int, ...], dtype: torch.dtype, parted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one block, and parted into small ones that are added up; a record left out may hold anything."""
    B, T, d, p = shape
    if parted:
        for name, value in {"MAX_RECORDS": 4, "MAX_ROWS": 24, "LEAST_ROWS": 8}.items():
            monkeypatch.setitem(kernels.scaled_weight_grad.__globals__, name, value)
    a, g, factors = noise(B, T, d, dtype=dtype), noise(B, T, p, dtype=dtype), factors_of(B)
    exact = reference.scaled_weight_grad(g.double(), a.double(), factors.double())
    a[0, 0, 0], g[0] = float("inf"), float("nan")
    total = kernels.scaled_weight_grad(g, a, factors)
    assert total.dtype == wide(dtype)
    bound = torch.einsum(
        "b,btp,btd->pd", factors.double(), g.double().abs().nan_to_num(), a.double().abs().nan_to_num()
    )
    assert_near(total, exact, bound.nan_to_num(posinf=0.0) + 1e-300, dtype)


def test_a_small_factor_may_belong_to_a_record_beyond_float32(kernels: ModuleType) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        g, a = (noise(2, 20, 6) * 2.0**80).to(dtype), (noise(2, 20, 8) * 2.0**60).to(dtype)
        g[1] = (noise(20, 6) * 2.0**-60).to(dtype)
        factors = torch.tensor([2.0**-120, 1.0])
        exact = reference.scaled_weight_grad(g.double(), a.double(), factors.double())
        assert_near(kernels.scaled_weight_grad(g, a, factors), exact, exact.abs().max(), dtype)


@pytest.mark.parametrize("subtract_mean", [True, False], ids=["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 1, 1), (1, 70, 65), (9, 2, 3), (1, 2, 4100)], ids=str)
def test_norm_grads(
    kernels: ModuleType,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    subtract_mean: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More records than programs are wanted; rows wider than a block; a mean that is large beside the deviation."""
    monkeypatch.setitem(kernels.norm_grads.__globals__, "PROGRAMS", 6)
    x, g = noise(*shape, dtype=dtype) + 3.0, noise(*shape, dtype=dtype)
    weight, bias = kernels.norm_grads(x, g, 1e-5, subtract_mean)
    exact = reference.norm_grads(x.double(), g.double(), 1e-5, subtract_mean)
    assert (weight.dtype, bias.dtype) == (wide(dtype), wide(dtype))
    scale = g.double().abs().sum(1) + 1.0
    assert_near(weight, exact[0], 4.0 * scale, dtype)
    assert_near(bias, exact[1], scale, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3,), (1, 1), (4, 5, 7), (2, 3001), (9, 3)], ids=str)
def test_norms_and_sums_of_gradients(
    kernels: ModuleType, shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(kernels.weighted_sum.__globals__, "PROGRAMS", 6)
    grads, factors = noise(*shape, dtype=dtype), factors_of(shape[0])
    squared = kernels.squared_norms(grads)
    assert squared.dtype == torch.float64
    exact = reference.squared_norms(grads)
    assert_near(squared, exact, exact, torch.float64)
    exact = reference.weighted_sum(grads, factors)
    grads[0] = float("nan")
    total = kernels.weighted_sum(grads, factors)
    assert total.dtype == wide(dtype)
    assert_near(total, exact, exact.abs().max() + 1.0, dtype)
    assert not kernels.squared_norms(grads)[0].isfinite()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 5), (2, 70, 33)], ids=str)
def test_embedding(kernels: ModuleType, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Runs of one id that are a token, that fill a chunk of 64, and that go through several."""
    B, T, _ = shape
    ids, g, factors = torch.randint(0, 6, (B, T)), noise(*shape, dtype=dtype), factors_of(B)
    ids[-1, : T - 2] = 4
    for padding_idx in (-1, 2, 4):
        squared = kernels.embedding_norms(ids, g, padding_idx)
        exact = reference.embedding_norms(ids, g, padding_idx)
        assert squared.dtype == torch.float64
        assert_near(squared, exact, exact + 1.0, torch.float64)
        exact = reference.embedding_weight_grad(ids, g, factors, 7, padding_idx)
        poisoned = g.clone()
        poisoned[0] = float("nan")
        total = kernels.embedding_weight_grad(ids, poisoned, factors, 7, padding_idx)
        assert total.dtype == wide(dtype)
        assert_near(total, exact, exact.abs().max() + 1.0, dtype)
    assert not kernels.embedding_norms(ids, poisoned, -1)[0].isfinite()


def test_a_run_through_many_chunks(kernels: ModuleType) -> None:
    """All chunks hold one id; then its run ends where a chunk ends, and one more id starts with the next."""
    g = noise(1, 256, 2)
    for ids in (torch.full((1, 256), 3), torch.arange(256)[None] // 128, torch.arange(256)[None] // 65):
        total = kernels.embedding_weight_grad(ids, g, torch.ones(1), 4, -1)
        assert_near(total, reference.embedding_weight_grad(ids, g, torch.ones(1), 4, -1), 256.0, torch.float32)


@pytest.mark.parametrize("shape", [(0, 4, 3, 5), (2, 0, 3, 5), (2, 4, 0, 5), (2, 4, 3, 0)], ids=str)
def test_empty(kernels: ModuleType, shape: tuple[int, ...]) -> None:
    B, T, d, p = shape
    a, g, ids, factors = noise(B, T, d), noise(B, T, p), torch.zeros(B, T, dtype=torch.int64), torch.ones(B)
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("linear_norms", (a, g, True)),
        ("scaled_weight_grad", (g, a, factors)),
        ("norm_grads", (a, a, 1e-5, True)),
        ("squared_norms", (a,)),
        ("weighted_sum", (a, factors)),
    ]
    if d > 0:
        calls += [("embedding_norms", (ids, a, -1)), ("embedding_weight_grad", (ids, a, factors, 4, -1))]
    for name, arguments in calls:
        actual, exact = getattr(kernels, name)(*arguments), getattr(reference, name)(*arguments)
        several = isinstance(exact, tuple)
        for one, other in zip(actual if several else [actual], exact if several else [exact], strict=True):
            assert one.dtype == other.dtype, name
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("size", "factor"), [(2.0**120, 2.0**-70), (2.0**-120, 2.0**-70), (2.0**126, 2.0**-20)])
def test_a_factor_is_not_rounded_away(kernels: ModuleType, dtype: torch.dtype, size: float, factor: float) -> None:
    """One of ``a`` and ``g`` is huge, the other tiny, and the tiny one times the factor no normal number."""
    a, g = (1.0 + torch.rand(2, 20, 4)) * size, (1.0 + torch.rand(2, 20, 6)) / size
    a, g, factors = a.to(dtype), g.to(dtype), torch.tensor([factor * 1.37, 0.0])
    exact = reference.scaled_weight_grad(g.double(), a.double(), factors.double())
    assert_near(kernels.scaled_weight_grad(g, a, factors) / exact, torch.ones(6, 4), 1.0, dtype)


def test_tokens_that_cancel_have_no_negative_norm(kernels: ModuleType) -> None:
    a, g = noise(50, 1, 30).expand(-1, 2, -1), noise(50, 1, 30) * torch.tensor([1.0, -1.0])[:, None]
    squared, bound, _ = kernels.linear_norms(a * (1 + 1e-6 * noise(50, 2, 1)), g, False)
    assert (squared >= 0.0).all()
    assert (squared <= 2.0**-20 * bound.square()).all()
