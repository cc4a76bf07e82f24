# SPDX-License-Identifier: Apache-2.0
"""The per-record ops on every backend against loops over records in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from wavedp.ops import per_sample as ops
from wavedp.ops import per_sample_native as native

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Rounding of one operation, in which half precision is computed in float32.
EPS = {dtype: 2.0**-52 if dtype == torch.float64 else 2.0**-23 for dtype in DTYPES}
# Around whole tiles and vectors of every instruction set, and around a block of 128 tokens.
TOKENS = [1, 2, 15, 16, 17, 33, 64, 130, 257]
# Both sides of T^2 (d + p) / 2 against T d p, widths beside multiples of 16, and more than a chunk of 1024 entries.
WIDTHS = [(1, 1), (8, 6), (16, 100), (33, 37), (300, 7), (7, 300), (1100, 40)]


@pytest.fixture
def device(target: Any, request: pytest.FixtureRequest) -> str:
    """The device of a backend that has these ops."""
    if target.interpreted and "per_sample" not in request.getfixturevalue("interpreted_kernels"):
        pytest.skip("the kernels of Triton are not interpreted here")
    if target.backend == "cuda":
        pytest.skip("the CUDA library has none of these ops")
    name: str = target.device
    return name


def noise(*shape: int, dtype: torch.dtype, device: str, size: float = 1.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * size).to(dtype).to(device)


def weight_grads(a: Tensor, g: Tensor) -> Tensor:  # [B, p, d] float64
    return torch.stack([y.double().mT @ x.double() for x, y in zip(a, g)]) if len(a) else torch.zeros(0, 1, 1)


def lengths(a: Tensor, g: Tensor) -> Tensor:  # [B] float64: sum_t |g_t| |a_t|
    return (a.double().norm(dim=-1) * g.double().norm(dim=-1)).sum(1)


def shapes(target: Any) -> Iterator[tuple[int, int, int]]:
    if target.interpreted:  # a second for each
        return iter([(17, 33, 37), (33, 8, 6)])
    return ((tokens, *widths) for tokens, widths in itertools.product(TOKENS, WIDTHS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_norms(target: Any, device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for T, d, p in shapes(target):
        a, g = noise(3, T, d, dtype=dtype, device=device), noise(3, T, p, dtype=dtype, device=device)
        squared, bound, sums = ops.linear_norms(a, g, True)
        expected, terms = weight_grads(a, g).square().sum((1, 2)), lengths(a, g)
        assert squared.dtype == bound.dtype == torch.float64
        assert ((squared - expected).abs() <= 8 * EPS[dtype] * terms.square()).all(), (T, d, p)
        assert torch.allclose(bound, terms, rtol=8 * EPS[dtype], atol=0), (T, d, p)
        assert sums.dtype == ops.arithmetic_dtype(dtype)
        limit = 4 * EPS[dtype] * g.double().abs().sum(1) + 1e-300
        assert ((sums.double() - g.double().sum(1)).abs() <= limit).all(), (T, d, p)
        without = ops.linear_norms(a, g, False)
        assert torch.equal(without[0], squared)
        assert tuple(without[2].shape) == (3, 0)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float64, torch.float16)], ids=str)
def test_mixed_types_are_computed_in_the_wider(device: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    a, g = noise(2, 5, 24, dtype=dtypes[0], device=device), noise(2, 5, 40, dtype=dtypes[1], device=device)
    squared, bound, sums = ops.linear_norms(a, g, True)
    wide = ops.arithmetic_dtype(*dtypes)
    assert torch.allclose(squared, weight_grads(a, g).square().sum((1, 2)), rtol=50 * EPS[wide])
    assert torch.allclose(bound, lengths(a, g), rtol=8 * EPS[wide])
    assert sums.dtype == wide


@pytest.mark.parametrize("B", [0, 2])
@pytest.mark.parametrize("T", [0, 3])
@pytest.mark.parametrize(("d", "p"), [(0, 4), (4, 0), (4, 4)])
def test_empty_axes(device: str, B: int, T: int, d: int, p: int) -> None:
    a, g = torch.ones(B, T, d, device=device), torch.ones(B, T, p, device=device)
    squared, bound, sums = ops.linear_norms(a, g, True)
    assert torch.equal(squared.cpu(), torch.full((B,), float(T**2 * d * p), dtype=torch.float64))
    assert torch.allclose(bound.cpu(), torch.full((B,), T * math.sqrt(d * p), dtype=torch.float64))
    assert torch.equal(sums.cpu(), torch.full((B, p), float(T)))
    grad = ops.scaled_weight_grad(g, a, torch.ones(B, device=device))
    assert torch.equal(grad.cpu(), torch.full((p, d), float(B * T)))
    ids = torch.zeros(B, T, dtype=torch.int64, device=device)
    assert torch.equal(ops.embedding_norms(ids, g, -1).cpu(), torch.full((B,), float(p * T**2), dtype=torch.float64))
    table = ops.embedding_weight_grad(ids, g, torch.ones(B, device=device), 2, -1).cpu()
    assert torch.equal(table, torch.tensor([[float(B * T)], [0.0]]).expand(2, p))
    weight, bias = ops.norm_grads(g, g, 1e-5, True)
    assert torch.equal(weight.cpu(), torch.zeros(B, p))
    assert torch.equal(bias.cpu(), torch.full((B, p), float(T)))
    assert torch.equal(ops.squared_norms(g).cpu(), torch.full((B,), float(T * p), dtype=torch.float64))
    total = ops.weighted_sum(g, torch.ones(B, device=device))
    assert torch.equal(total.cpu(), torch.full((T, p), float(B)))


def strange_views(dtype: torch.dtype, device: str) -> Iterator[tuple[str, Tensor]]:
    """[3, 6, 20] whose memory is anything but a contiguous block."""
    memory = noise(4096, dtype=dtype, device=device)
    yield "transposed", memory[:360].view(3, 20, 6).mT
    yield "records-last", memory[:360].view(6, 20, 3).permute(2, 0, 1)
    yield "expanded-records", memory[:120].view(1, 6, 20).expand(3, 6, 20)
    yield "expanded-tokens", memory[:60].view(3, 1, 20).expand(3, 6, 20)
    yield "expanded-entries", memory[:18].view(3, 6, 1).expand(3, 6, 20)
    yield "expanded-everywhere", memory[:1].expand(3, 6, 20)
    yield "sliced", memory.view(8, 16, 32)[1:7:2, 3:15:2, 5:25]
    yield "steps", memory.view(4, 16, 64)[:3, :6, 1:61:3]
    yield "unaligned", memory[1:361].view(3, 6, 20)
    yield "overlapping", memory.as_strided((3, 6, 20), (7, 3, 1), 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strange_views(target: Any, device: str, dtype: torch.dtype) -> None:
    factors = torch.tensor([0.5, 0.0, 1.0], device=device)
    ids = torch.randint(0, 4, (6, 3), device=device).mT
    for name, x in list(strange_views(dtype, device))[:: 4 if target.interpreted else 1]:
        before, copy = x.clone(), x.clone(memory_format=torch.contiguous_format)
        other = noise(3, 6, 10, dtype=dtype, device=device)
        calls: list[tuple[Any, ...]] = [
            (ops.linear_norms, other, x, True),
            (ops.linear_norms, x, other, False),
            (ops.embedding_norms, ids, x, 1),
            (ops.embedding_weight_grad, ids, x, factors, 4, 1),
            (ops.norm_grads, x, copy, 1e-5, True),
            (ops.norm_grads, copy, x, 1e-5, False),
            (ops.squared_norms, x),
            (ops.weighted_sum, x, factors),
        ]
        for op, *arguments in calls:
            expected = op(*(copy if y is x else y for y in arguments))
            found = op(*arguments)
            for one, wanted in zip(*((y,) if isinstance(y, Tensor) else y for y in (found, expected))):
                # PyTorch's own sums take another order for other strides.
                same = torch.allclose(one, wanted) if target.backend == "reference" else torch.equal(one, wanted)
                assert same, (name, op)
        found, expected = (ops.scaled_weight_grad(y, other, factors) for y in (x, copy))
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5), name
        assert torch.equal(x, before), f"{name}: the input was changed"


# What a layer's gradients may do to float32


@pytest.mark.parametrize("T", [1, 4, 64])
@pytest.mark.parametrize("size", [1e-37, 1e-30, 1e30, 1e37])
def test_extreme_sizes_neither_overflow_nor_vanish(device: str, T: int, size: float) -> None:
    torch.manual_seed(1)
    for d, p in ((16, 16), (64, 48)):
        a = noise(3, T, d, dtype=torch.float32, device=device, size=size)
        g = noise(3, T, p, dtype=torch.float32, device=device, size=1 / size)
        squared, bound, _ = ops.linear_norms(a, g, False)
        assert torch.allclose(squared, weight_grads(a, g).square().sum((1, 2)), rtol=1e-5)
        assert torch.allclose(bound, lengths(a, g), rtol=1e-5)
    wild = noise(3, T, 16, dtype=torch.float32, device=device)
    wild *= 10.0 ** torch.empty(3, T, 1).uniform_(-30, 30).to(device)
    tame = noise(3, T, 16, dtype=torch.float32, device=device)
    terms = lengths(wild, tame)
    squared, bound, _ = ops.linear_norms(wild, tame, False)
    assert ((squared - weight_grads(wild, tame).square().sum((1, 2))).abs() <= 1e-6 * terms.square()).all()
    assert torch.allclose(bound, terms, rtol=1e-5)


def test_float64_beyond_float32(device: str) -> None:
    a = noise(2, 5, 9, dtype=torch.float64, device=device, size=1e200)
    g = noise(2, 5, 7, dtype=torch.float64, device=device, size=1e-150)
    squared, bound, _ = ops.linear_norms(a, g, False)
    expected = weight_grads(a * 1e-200, g * 1e150).square().sum((1, 2)) * 1e50 * 1e50
    assert torch.allclose(squared, expected, rtol=1e-12)
    assert torch.allclose(bound, lengths(a * 1e-200, g * 1e150) * 1e50, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_few_short_rows_of_any_size(target: Any, device: str, dtype: torch.dtype) -> None:
    """Rows of zeros, of squares that vanish or overflow and of ordinary entries, in records of whole vectors."""
    torch.manual_seed(3)
    small, large = (1e-30, 1e25) if dtype == torch.float32 else (1e-140, 1e140)
    for T in (5, 16) if target.interpreted else (1, 2, 3, 4, 5, 15, 16, 17, 31, 128):
        a, g = noise(6, T, 32, dtype=dtype, device=device), noise(6, T, 48, dtype=dtype, device=device)
        a[1, 0], g[2, -1], a[3, 0], g[4, 0], a[5], g[5] = 0.0, 0.0, small, large, 0.0, small
        a[4] *= 1e-3
        squared, bound, sums = ops.linear_norms(a, g, True)
        unit = torch.tensor([1, 1, 1, 1, large, 1], dtype=torch.float64, device=device)
        scaled = g.double() / unit[:, None, None]
        terms = lengths(a, scaled)
        expected = weight_grads(a, scaled).square().sum((1, 2))
        assert ((squared / unit / unit - expected).abs() <= 8 * EPS[dtype] * terms.square()).all(), T
        assert torch.allclose(bound / unit, terms, rtol=8 * EPS[dtype], atol=0), T
        limit = 4 * EPS[dtype] * g.double().abs().sum(1) + 1e-300
        assert ((sums.double() - g.double().sum(1)).abs() <= limit).all(), T


@pytest.mark.parametrize("T", [2, 40])
def test_a_masked_token_does_not_hide_the_others(device: str, T: int) -> None:
    a, g = torch.ones(1, T, 4, device=device), torch.ones(1, T, 4, device=device)
    a[0, 0], g[0, 0] = 1e30, 0.0  # contributes nothing
    squared, bound, _ = ops.linear_norms(a, g, False)
    assert squared.item() == pytest.approx(16.0 * (T - 1) ** 2, rel=1e-6)
    assert bound.item() == pytest.approx(4.0 * (T - 1), rel=1e-6)


@pytest.mark.parametrize("T", [2, 16, 256])
def test_cancelling_tokens(device: str, T: int) -> None:
    """Tokens in pairs that almost cancel: the error is relative to the terms, and never makes a record look small."""
    torch.manual_seed(2)
    a = torch.randn(50, 1, 300).expand(-1, T, -1) * (1 + 1e-6 * torch.randn(50, T, 1))
    g = torch.randn(50, 1, 300) * torch.tensor([1.0, -1.0]).repeat(T // 2)[None, :, None]
    a, g = a.to(device), g.to(device)
    for width in (300, 4):  # by Gram matrices where tokens are few, and by products
        squared, bound, _ = ops.linear_norms(a[..., :width], g[..., :width], False)
        exact = weight_grads(a[..., :width], g[..., :width]).square().sum((1, 2))
        assert (squared >= 0).all()
        assert ((squared - exact).abs() <= 2.0**-20 * bound.square()).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_record_that_is_not_finite_is_alone_with_it(
    target: Any, device: str, dtype: torch.dtype, poison: float
) -> None:
    factors = torch.tensor([1.0, 0.0, 0.5], device=device)
    ids = torch.tensor([[0, 1, 0, 2, 1]] * 3, device=device)
    for d, p in ((40, 24), (3, 2)):  # by Gram matrices and by products
        a, g = noise(3, 5, d, dtype=dtype, device=device), noise(3, 5, p, dtype=dtype, device=device)
        for which in (0, 1):
            spoiled = [a.clone(), g.clone()]
            spoiled[which][1, 3, 1] = poison
            if which == 0:
                spoiled[1][1, 3] = 0  # its factor in the product is 0
            found, expected = ops.linear_norms(*spoiled, True), ops.linear_norms(a, g, True)
            assert not torch.isfinite(found[0][1])
            for one, wanted in zip(found, expected):
                assert torch.equal(one[[0, 2]], wanted[[0, 2]])
            grad, without = (
                ops.scaled_weight_grad(spoiled[1], spoiled[0], factors),
                [x[[0, 2]] for x in (g, a, factors)],
            )
            assert torch.equal(grad, ops.scaled_weight_grad(*without))
        spoiled_g = g.clone()
        spoiled_g[1, 3, 1] = poison
        one = ops.embedding_norms(ids, spoiled_g, -1)
        assert not torch.isfinite(one[1])
        assert torch.equal(one[[0, 2]], ops.embedding_norms(ids, g, -1)[[0, 2]])
        table = ops.embedding_weight_grad(ids, spoiled_g, factors, 3, -1)
        assert torch.equal(table, ops.embedding_weight_grad(ids[[0, 2]], g[[0, 2]], factors[[0, 2]], 3, -1))
        for grads, wanted in zip(ops.norm_grads(g, spoiled_g, 1e-5, True), ops.norm_grads(g, g, 1e-5, True)):
            assert not torch.isfinite(grads[1]).all()
            assert torch.equal(grads[[0, 2]], wanted[[0, 2]])
        squares = ops.squared_norms(spoiled_g)
        assert not torch.isfinite(squares[1])
        assert torch.equal(squares[[0, 2]], ops.squared_norms(g)[[0, 2]])
        assert torch.equal(ops.weighted_sum(spoiled_g, factors), ops.weighted_sum(g[[0, 2]], factors[[0, 2]]))


# The other ops


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding_idx", [-1, 2])
def test_embedding(target: Any, device: str, dtype: torch.dtype, padding_idx: int) -> None:
    torch.manual_seed(3)
    for B, T, V, d in ((3, 17, 5, 33), (2, 1, 3, 8), (4, 130, 1000, 16))[: 1 if target.interpreted else None]:
        ids, g = torch.randint(0, V, (B, T)).to(device), noise(B, T, d, dtype=dtype, device=device)
        grads = torch.zeros(B, V, d, dtype=torch.float64, device=device)
        for b, t in itertools.product(range(B), range(T)):
            if ids[b, t] != padding_idx:
                grads[b, ids[b, t]] += g[b, t].double()
        found = ops.embedding_norms(ids, g, padding_idx)
        assert torch.allclose(found, grads.square().sum((1, 2)), rtol=1e-5 if target.interpreted else 1e-12)
        factors = torch.rand(B).to(device)
        factors[0] = 0
        table = ops.embedding_weight_grad(ids, g, factors, V, padding_idx)
        expected = torch.einsum("b,bvd->vd", factors.double(), grads)
        assert table.dtype == ops.arithmetic_dtype(dtype)
        assert torch.allclose(table.double(), expected, rtol=4 * EPS[dtype], atol=4 * EPS[dtype])


def test_an_id_outside_of_the_embedding_raises(target: Any, device: str) -> None:
    if target.backend == "triton" or device == "cuda":
        pytest.skip("a kernel on a GPU does not raise")
    g = torch.ones(1, 2, 3)
    for bad in (-1, 4):
        with pytest.raises((IndexError, RuntimeError)):
            ops.embedding_weight_grad(torch.tensor([[0, bad]]), g, torch.ones(1), 4, -2)
    assert ops.embedding_weight_grad(torch.tensor([[0, 9]]), g, torch.ones(1), 4, 9)[0].tolist() == [1.0] * 3


@pytest.mark.parametrize("subtract_mean", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_grads(target: Any, device: str, dtype: torch.dtype, subtract_mean: bool) -> None:
    torch.manual_seed(4)
    for T, d in ((17, 33), (1, 1), (3, 256), (70, 65))[: 1 if target.interpreted else None]:
        x, g = noise(3, T, d, dtype=dtype, device=device) + 3, noise(3, T, d, dtype=dtype, device=device)
        weight, bias = ops.norm_grads(x, g, 1e-5, subtract_mean)
        if subtract_mean:
            normalised = F.layer_norm(x.double(), (d,), eps=1e-5)
        else:
            normalised = F.rms_norm(x.double(), (d,), eps=1e-5)
        terms = (g.double() * normalised).abs().sum(1) + g.double().abs().sum(1)
        assert weight.dtype == bias.dtype == ops.arithmetic_dtype(dtype)
        assert ((weight - (g.double() * normalised).sum(1)).abs() <= 20 * EPS[dtype] * terms).all(), (T, d)
        assert ((bias - g.double().sum(1)).abs() <= 8 * EPS[dtype] * terms).all(), (T, d)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 7, 129), (3, 70_000), (9, 2049)], ids=str)
def test_sums_over_records(target: Any, device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if target.interpreted and math.prod(shape) > 10_000:
        pytest.skip("the interpreter takes too long")
    grads, factors = noise(*shape, dtype=dtype, device=device), torch.rand(shape[0]).to(device)
    factors[1] = 0
    squared = ops.squared_norms(grads)
    assert torch.allclose(squared, grads.double().flatten(1).square().sum(1) if grads.ndim > 1 else grads.double() ** 2)
    total = ops.weighted_sum(grads, factors)
    expected = torch.einsum("b,b...->...", factors.double(), grads.double())
    assert total.dtype == ops.arithmetic_dtype(dtype)
    terms = torch.einsum("b,b...->...", factors.double(), grads.double().abs())
    limit = EPS[dtype] * expected.abs() + shape[0] * 2.0**-52 * terms  # sums in float64, rounded once
    assert ((total.double() - expected).abs() <= limit).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaled_weight_grad(target: Any, device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    # 70 records make two blocks of float32, as do 9000 rows; 195 make four of 48, and three are left over.
    for B, T, d, p in ((5, 7, 20, 33), (5, 7, 33, 20), (70, 3, 4, 5), (195, 2, 4, 5), (1, 9000, 2, 3))[
        : 2 if target.interpreted else None
    ]:
        a, g = noise(B, T, d, dtype=dtype, device=device), noise(B, T, p, dtype=dtype, device=device)
        factors = torch.rand(B).to(device)
        for kept in (torch.ones(B), torch.arange(B) % 3, torch.zeros(B)):
            weights = torch.where(kept.to(device) != 0, factors, 0.0)
            found = ops.scaled_weight_grad(g, a, weights)
            expected = torch.einsum("b,bpd->pd", weights.double(), weight_grads(a, g))
            assert found.dtype == ops.arithmetic_dtype(dtype)
            limit = 16 * EPS[dtype] * math.sqrt(B * T) * 4
            assert (found.double() - expected).abs().max() <= limit, (B, T, d, p)


@pytest.mark.parametrize("threads", [1, 2, 3, 64])
def test_records_are_added_up_in_equal_blocks(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for B, T in itertools.product((0, 1, 63, 64, 65, 127, 129, 360, 4097, 100_001), (0, 1, 16, 200, 8192, 8193)):
            most = min(64, 8192 // max(T, 1))
            blocks, records = native._equal_blocks(B, T, 1)
            assert records <= most, (B, T)
            assert 0 <= B - blocks * records <= most or most == 0, (B, T)
            if 1 < blocks >= threads and most > 1:
                assert blocks % threads == 0 or records == most, (B, T)
        assert native._equal_blocks(360, 16, 1) == {1: (6, 60), 2: (6, 60), 3: (6, 60), 64: (6, 60)}[threads]
        assert native._equal_blocks(300, 16, 1) == {1: (5, 60), 2: (6, 50), 3: (6, 50), 64: (5, 60)}[threads]
        # As many sums as are held, and not one more for the threads' sake: that would take the longer way.
        assert native._equal_blocks(300, 16, native._MAX_BLOCK_ENTRIES // 5) == (5, 60)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("size", "factor"), [(1e38, 1e-6), (1e-38, 1e-6), (1e30, 1e-9), (1e-36, 1e-37)])
def test_a_factor_is_not_rounded_away(device: str, size: float, factor: float) -> None:
    """A row and a factor may be normal numbers whose float32 product is rounded to a few bits, or to none."""
    for step, (d, p) in itertools.product(range(8), ((1, 2), (2, 1))):
        a = torch.full((2, 3, d), size, device=device)
        g = torch.full((2, 3, p), (1 + step / 8) / size, device=device)
        factors = torch.tensor([factor, 0.0], device=device)
        found = ops.scaled_weight_grad(g, a, factors).double()
        expected = 3 * factors[0].double() * a[0, 0, 0].double() * g[0, 0, 0].double()
        assert torch.allclose(found, expected.expand(p, d), rtol=1e-6, atol=0)


OPS: list[Callable[[str], tuple[str, tuple[Any, ...]]]] = [
    lambda dev: ("linear_norms", (torch.randn(2, 3, 4, device=dev), torch.randn(2, 3, 5, device=dev), True)),
    lambda dev: ("linear_norms", (torch.randn(2, 3, 4, device=dev), torch.randn(2, 3, 5, device=dev), False)),
    lambda dev: (
        "embedding_norms",
        (torch.tensor([[0, 1], [1, 1]], device=dev), torch.randn(2, 2, 5, device=dev), 0),
    ),
    lambda dev: (
        "embedding_weight_grad",
        (torch.tensor([[0, 1]], device=dev), torch.randn(1, 2, 5, device=dev), torch.ones(1, device=dev), 4, -1),
    ),
    lambda dev: ("norm_grads", (torch.randn(2, 3, 4, device=dev), torch.randn(2, 3, 4, device=dev), 1e-5, True)),
    lambda dev: ("squared_norms", (torch.randn(2, 3, 4, device=dev),)),
    lambda dev: ("weighted_sum", (torch.randn(2, 3, 4, device=dev), torch.rand(2, device=dev))),
    lambda dev: (
        "scaled_weight_grad",
        (torch.randn(2, 3, 4, device=dev), torch.randn(2, 3, 5, device=dev), torch.rand(2, device=dev)),
    ),
]


@pytest.mark.parametrize("make", OPS)
def test_opcheck(device: str, make: Callable[[str], tuple[str, tuple[Any, ...]]]) -> None:
    op, arguments = make(device)
    torch.library.opcheck(getattr(torch.ops.wavedp, op).default, arguments)


class Seen(TorchDispatchMode):
    """The ops that go through the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", OPS)
def test_dispatcher_is_left_out_only_where_nothing_looks(
    device: str, make: Callable[[str], tuple[str, tuple[Any, ...]]]
) -> None:
    op, arguments = make(device)
    alone = getattr(ops, op)(*arguments)
    with Seen() as seen:
        seen_too = getattr(ops, op)(*arguments)
    assert seen.names[0] == f"wavedp::{op}"
    for one, other in zip(*((x,) if isinstance(x, Tensor) else x for x in (alone, seen_too))):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("make", OPS)
def test_every_result_is_written(device: str, make: Callable[[str], tuple[str, tuple[Any, ...]]]) -> None:
    op, arguments = make(device)
    found = getattr(ops, op)(*arguments)
    for one in (found,) if isinstance(found, Tensor) else found:
        assert torch.isfinite(one).all()


def refused() -> list[tuple[Any, type[Exception], str]]:
    x, y, ids, ones = torch.ones(2, 3, 4), torch.ones(2, 5, 4), torch.zeros(2, 3, dtype=torch.int64), torch.ones(2)
    return [
        (lambda: ops.linear_norms(x, y, True), ValueError, "disagree on"),
        (lambda: ops.linear_norms(x[0], x[0], True), ValueError, "must have the axes"),
        (lambda: ops.linear_norms(x.int(), x, True), TypeError, "must be float32"),
        (lambda: ops.embedding_norms(ids[:, :2], x, -1), ValueError, "expected"),
        (lambda: ops.embedding_norms(ids.int(), x, -1), TypeError, "must be int64"),
        (lambda: ops.embedding_weight_grad(ids, x, ones[:1], 4, -1), ValueError, "factors of embedding_weight_grad"),
        (lambda: ops.embedding_weight_grad(ids, x, ones, -1, -1), ValueError, "at least 0"),
        (lambda: ops.norm_grads(x, x[..., :3], 1e-5, True), ValueError, "disagree on"),
        (lambda: ops.squared_norms(torch.tensor(1.0)), ValueError, "record axis"),
        (lambda: ops.weighted_sum(x, ones[:, None]), ValueError, "must have the shape"),
        (lambda: ops.scaled_weight_grad(x, y, ones), ValueError, "disagree on"),
        (lambda: ops.scaled_weight_grad(x, x, ones.to("meta")), (ValueError, RuntimeError), "meta"),
    ]


@pytest.mark.parametrize(("call", "error", "message"), refused())
def test_refused(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
