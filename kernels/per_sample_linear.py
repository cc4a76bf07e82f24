# SPDX-License-Identifier: Apache-2.0
"""Norms of the per-record gradients ``sum_t g_t a_t^T`` of a Linear weight in Triton, without building one in memory.

Two ways, whichever takes fewer multiplications. *Gram*: ``<A A^T, G G^T>``, a program for each pair of blocks of tokens
on or above the diagonal; both Gram tiles stay in registers. *Products*: a program for each tile of the gradient itself,
which also stays in registers. A program writes one float64 number, and one program a record adds them up: no atomics,
so that results repeat, and nothing of ``T x T`` or ``d x p`` in memory.

Operands are read as they are, so that half precision goes from memory to the tensor cores. Only then is it seen whether
float32 had the range for it: with ``u`` its smallest normal number, underflow takes from a squared norm at most

    u (d (sum_t |g_t|)^2 + p (sum_t |a_t|)^2 + (d p u + 1) T^2 + d p),

and a record for which this is not far below ``(sum_t |a_t| |g_t|)^2``, or that overflowed, is computed again with each
token's rows divided by the power of two of their largest entry. Reading every record's largest entries beforehand would
cost another pass over memory for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from wavedp.kernels.haar import on_device, wide_dtype
from wavedp.kernels.per_sample_range import scaled_norm
from wavedp.kernels.per_sample_tiles import cdiv, diagonal, dot, load_rows, operand, sum_of

NEGLIGIBLE = tl.constexpr(2.0**-24)
"""Of the squared bound: below a unit in the last place of float32, and a 16th of what callers add for rounding."""


@triton.jit
def _gram(x_ptr, rows, others, stride_t, T, width, WIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    """``X_rows X_others^T``."""
    gram = tl.full((BLOCK_T, BLOCK_T), 0, WIDE)
    for k in range(0, width, BLOCK_K):
        x = load_rows(x_ptr, rows, rows < T, stride_t, k, width, BLOCK_K)
        y = load_rows(x_ptr, others, others < T, stride_t, k, width, BLOCK_K)
        gram = dot(x, tl.trans(y), gram, WIDE)
    return gram


@triton.jit
def _own_gram(
    x_ptr,
    sums_ptr,  # [width], of a block of rows, or None
    rows,
    stride_t,
    T,
    width,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``X_rows X_rows^T``, and the sum of the rows."""
    gram = tl.full((BLOCK_T, BLOCK_T), 0, WIDE)
    for k in range(0, width, BLOCK_K):
        x = load_rows(x_ptr, rows, rows < T, stride_t, k, width, BLOCK_K)
        gram = dot(x, tl.trans(x), gram, WIDE)
        if sums_ptr is not None:
            cols = k + tl.arange(0, BLOCK_K)
            tl.store(sums_ptr + cols.to(tl.int64), sum_of(x.to(WIDE), 0), mask=cols < width)
    return gram


@triton.jit
def _total(x):
    """Sum ``[1, 1]`` of a tile, which keeps its axes: Triton 3.7 fails for sm_100 to sum what a product was reduced
    to along one axis only."""
    return sum_of(sum_of(x, 1, keep_dims=True).to(tl.float64), 0, keep_dims=True)


@triton.jit
def _store_number(ptr, number):
    tl.store(ptr + tl.full((1, 1), 0, tl.int64), number)


@triton.jit
def _store_lengths(lengths_ptr, squared_a, squared_g):
    """``sum |a_t| |g_t|, sum |a_t|, sum |g_t|`` of a block of tokens, for the check of ranges."""
    a, g = tl.sqrt(squared_a.to(tl.float64)), tl.sqrt(squared_g.to(tl.float64))
    _store_number(lengths_ptr, _total(a * g))
    _store_number(lengths_ptr + tl.full((), 1, tl.int64), _total(a))
    _store_number(lengths_ptr + tl.full((), 2, tl.int64), _total(g))


@triton.jit
def _pair(k):
    """``(i, j)``, ``i > j``, number ``k`` of the pairs (1, 0), (2, 0), (2, 1), (3, 0), ..."""
    i = ((1.0 + tl.sqrt(8.0 * k.to(tl.float32) + 1.0)) * 0.5).to(tl.int32)
    i = tl.where(i * (i - 1) // 2 > k, i - 1, i)
    i = tl.where(i * (i + 1) // 2 <= k, i + 1, i)
    return i, k - i * (i - 1) // 2


@triton.jit(do_not_specialize=["T"])
def _gram_norms_kernel(
    a_ptr,  # [B, T, d], rows contiguous
    g_ptr,  # [B, T, p], rows contiguous
    parts_ptr,  # [B, blocks (blocks + 1) / 2] float64
    lengths_ptr,  # [B, blocks, 3] float64
    sums_ptr,  # [B, blocks, p], or None
    stride_ab,
    stride_at,
    stride_gb,
    stride_gt,
    T,
    d,
    p,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    WIDE: tl.constexpr = tl.float64 if a_ptr.dtype.element_ty == tl.float64 else tl.float32
    blocks = cdiv(T, BLOCK_T)
    pairs = blocks * (blocks + 1) // 2
    pid = tl.program_id(0).to(tl.int64)
    record, k = pid // pairs, (pid % pairs).to(tl.int32)
    a_ptr += record * stride_ab
    g_ptr += record * stride_gb
    if k < blocks:
        rows = k * BLOCK_T + tl.arange(0, BLOCK_T)
        block = record * blocks + k
        gram_a = _own_gram(a_ptr, None, rows, stride_at, T, d, WIDE, BLOCK_T, BLOCK_K)
        row_sums_ptr = sums_ptr
        if sums_ptr is not None:
            row_sums_ptr = sums_ptr + block * p
        gram_g = _own_gram(g_ptr, row_sums_ptr, rows, stride_gt, T, p, WIDE, BLOCK_T, BLOCK_K)
        _store_lengths(lengths_ptr + block * 3, diagonal(gram_a, BLOCK_T), diagonal(gram_g, BLOCK_T))
        part = _total(gram_a * gram_g)
    else:
        i, j = _pair(k - blocks)
        rows = i * BLOCK_T + tl.arange(0, BLOCK_T)
        others = j * BLOCK_T + tl.arange(0, BLOCK_T)
        gram_a = _gram(a_ptr, rows, others, stride_at, T, d, WIDE, BLOCK_T, BLOCK_K)
        gram_g = _gram(g_ptr, rows, others, stride_gt, T, p, WIDE, BLOCK_T, BLOCK_K)
        part = 2.0 * _total(gram_a * gram_g)
    _store_number(parts_ptr + pid, part)


@triton.jit(do_not_specialize=["T"])
def _row_lengths_kernel(
    a_ptr,  # [B, T, d], rows contiguous
    g_ptr,  # [B, T, p], rows contiguous
    lengths_ptr,  # [B, blocks, 3] float64
    sums_ptr,  # [B, blocks, p], or None
    stride_ab,
    stride_at,
    stride_gb,
    stride_gt,
    T,
    d,
    p,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What the Gram kernel learns of rows by the way."""
    WIDE: tl.constexpr = tl.float64 if a_ptr.dtype.element_ty == tl.float64 else tl.float32
    blocks = cdiv(T, BLOCK_T)
    pid = tl.program_id(0).to(tl.int64)
    record = pid // blocks
    rows = (pid % blocks).to(tl.int32) * BLOCK_T + tl.arange(0, BLOCK_T)
    squared_a = tl.full((BLOCK_T,), 0, WIDE)
    for k in range(0, d, BLOCK_K):
        a = load_rows(a_ptr + record * stride_ab, rows, rows < T, stride_at, k, d, BLOCK_K).to(WIDE)
        squared_a += sum_of(a * a, 1)
    squared_g = tl.full((BLOCK_T,), 0, WIDE)
    for k in range(0, p, BLOCK_K):
        g = load_rows(g_ptr + record * stride_gb, rows, rows < T, stride_gt, k, p, BLOCK_K).to(WIDE)
        squared_g += sum_of(g * g, 1)
        if sums_ptr is not None:
            cols = k + tl.arange(0, BLOCK_K)
            tl.store(sums_ptr + (pid * p + cols), sum_of(g, 0), mask=cols < p)
    _store_lengths(lengths_ptr + pid * 3, squared_a[:, None], squared_g[:, None])


@triton.jit(do_not_specialize=["T"])
def _product_norms_kernel(
    a_ptr,  # [B, T, d], rows contiguous
    g_ptr,  # [B, T, p], rows contiguous
    parts_ptr,  # [B, tiles of p, tiles of d] float64
    stride_ab,
    stride_at,
    stride_gb,
    stride_gt,
    T,
    d,
    p,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    WIDE: tl.constexpr = tl.float64 if a_ptr.dtype.element_ty == tl.float64 else tl.float32
    tiles_d = cdiv(d, BLOCK_D)
    tiles = tiles_d * cdiv(p, BLOCK_P)
    pid = tl.program_id(0).to(tl.int64)
    record, tile = pid // tiles, (pid % tiles).to(tl.int32)
    a_ptr += record * stride_ab
    g_ptr += record * stride_gb
    first_p, first_d = tile // tiles_d * BLOCK_P, tile % tiles_d * BLOCK_D
    product = tl.full((BLOCK_P, BLOCK_D), 0, WIDE)
    for t in range(0, T, BLOCK_T):
        rows = t + tl.arange(0, BLOCK_T)
        g = load_rows(g_ptr, rows, rows < T, stride_gt, first_p, p, BLOCK_P)
        a = load_rows(a_ptr, rows, rows < T, stride_at, first_d, d, BLOCK_D)
        product = dot(tl.trans(g), a, product, WIDE)
    _store_number(parts_ptr + pid, _total(product * product))


@triton.jit
def _sum(x_ptr, n, stride, BLOCK: tl.constexpr):
    """Sum of ``n`` numbers of float64."""
    total = tl.full((BLOCK,), 0, tl.float64)
    for k in range(0, n, BLOCK):
        i = k + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + i.to(tl.int64) * stride, mask=i < n, other=0.0)
    return sum_of(total, 0)


@triton.jit(do_not_specialize=["T", "parts", "blocks"])
def _linear_norms_kernel(
    a_ptr,  # [B, T, d], rows contiguous
    g_ptr,  # [B, T, p], rows contiguous
    parts_ptr,  # [B, parts] float64
    lengths_ptr,  # [B, blocks, 3] float64
    sums_ptr,  # [B, blocks, p], or None
    squared_ptr,  # [B] float64
    bound_ptr,  # [B] float64
    bias_grads_ptr,  # [B, p], or None
    stride_ab,
    stride_at,
    stride_gb,
    stride_gt,
    T,
    d,
    p,
    parts,
    blocks,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Adds up a record's parts, and computes it again where their range was not enough."""
    WIDE: tl.constexpr = tl.float64 if a_ptr.dtype.element_ty == tl.float64 else tl.float32
    record = tl.program_id(0).to(tl.int64)
    squared = _sum(parts_ptr + record * parts, parts, 1, BLOCK)
    record_lengths = lengths_ptr + record * blocks * 3
    bound = _sum(record_lengths, blocks, 3, BLOCK)
    a = _sum(record_lengths + tl.full((), 1, tl.int64), blocks, 3, BLOCK)
    g = _sum(record_lengths + tl.full((), 2, tl.int64), blocks, 3, BLOCK)

    one = tl.full((), 1.0, tl.float64)  # sizes may be constants
    u = one * (2.0**-1022 if tl.float64 == WIDE else 2.0**-126)
    dp = one * d * p
    lost = u * (one * d * g * g + one * p * a * a + (dp * u + 1.0) * T * T + dp)
    # Comparisons with NaN are false, and with infinity only the last one would be true.
    in_range = (squared < float("inf")) & (bound < float("inf")) & (lost <= bound * bound * NEGLIGIBLE)
    if in_range == 0:
        squared, bound = scaled_norm(
            a_ptr + record * stride_ab,
            g_ptr + record * stride_gb,
            stride_at,
            stride_gt,
            T,
            d,
            p,
            WIDE,
            BLOCK_T,
            BLOCK_K,
        )
    tl.store(squared_ptr + record, tl.where(squared < 0.0, 0.0, squared))  # of tokens that cancel; NaN stays
    tl.store(bound_ptr + record, bound)

    if bias_grads_ptr is not None:
        for k in range(0, p, BLOCK):
            cols = k + tl.arange(0, BLOCK)
            total = tl.full((BLOCK,), 0, WIDE)
            for block in range(blocks):
                offsets = (record * blocks + block) * p + cols
                total += tl.load(sums_ptr + offsets, mask=cols < p, other=0.0)
            tl.store(bias_grads_ptr + (record * p + cols), total, mask=cols < p)


@dataclass(frozen=True)
class Blocks:
    """Tile of a Gram matrix or of a gradient, and what is read of an operand at a time."""

    tile: int
    depth: int
    num_warps: int
    num_stages: int


def blocks_of(dtype: torch.dtype, size: int) -> Blocks:
    """Tensor cores take tiles of 128, with two accumulators of 64 registers a thread; float32 and float64 are summed
    by ordinary arithmetic, whose code grows with the tile. Not measured on a device."""
    if dtype == torch.float64:
        return Blocks(tile=32, depth=16, num_warps=4, num_stages=2)
    if dtype == torch.float32:
        return Blocks(tile=32 if size <= 32 else 64, depth=16, num_warps=4, num_stages=3)
    tile = min(max(triton.next_power_of_2(size), 16), 128)
    return Blocks(tile, depth=64, num_warps=8 if tile == 128 else 4, num_stages=3)


def takes_gram(T: int, d: int, p: int) -> bool:
    """Whether the Gram way takes fewer multiplications for a record: ``T^2 (d + p) / 2`` against ``T d p``."""
    return T * (d + p) <= 2 * d * p


def linear_norms(a: torch.Tensor, g: torch.Tensor, bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``|sum_t g_t a_t^T|^2`` ``[B]``, ``sum_t |g_t| |a_t|`` ``[B]``, both float64, and ``sum_t g_t`` ``[B, p]``.

    Args:
        a: ``[B, T, d]``, any strides, float16, bfloat16, float32 or float64.
        g: ``[B, T, p]``, likewise.
        bias: whether the sums of ``g`` are wanted, else they are ``[B, 0]``.

    Returns:
        As above, the sums in float32, or float64 for float64. Where a record has an entry that is not finite, its
        norm and its bound are not finite either.
    """
    B, T, d = a.shape
    p = g.shape[2]
    dtype = torch.promote_types(a.dtype, g.dtype)
    a, g = operand(a, dtype), operand(g, dtype)
    wide = wide_dtype(dtype)
    if B == 0 or T == 0 or d == 0 or p == 0:
        nothing = torch.zeros(B, dtype=torch.float64, device=a.device)
        return nothing, nothing.clone(), g.sum(1, dtype=wide) if bias else g.new_zeros((B, 0), dtype=wide)
    strides = (a.stride(0), a.stride(1), g.stride(0), g.stride(1))
    by_gram = takes_gram(T, d, p)
    blocks = blocks_of(dtype, T if by_gram else min(d, p))
    launch = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
    of_tokens = triton.cdiv(T, blocks.tile)
    parts = of_tokens * (of_tokens + 1) // 2 if by_gram else triton.cdiv(d, blocks.tile) * triton.cdiv(p, blocks.tile)
    squared, bound, partial, lengths = (
        torch.empty(n, dtype=torch.float64, device=a.device) for n in (B, B, B * parts, B * of_tokens * 3)
    )
    sums = torch.empty((B, of_tokens, p), dtype=wide, device=a.device) if bias else None
    # One block of tokens has written the sums already.
    bias_grads = None if sums is None or of_tokens == 1 else torch.empty((B, p), dtype=wide, device=a.device)
    with on_device(a):
        if by_gram:
            _gram_norms_kernel[(B * parts,)](
                a, g, partial, lengths, sums, *strides, T, d, p,
                BLOCK_T=blocks.tile, BLOCK_K=blocks.depth, **launch,
            )  # fmt: skip
        else:
            _row_lengths_kernel[(B * of_tokens,)](
                a, g, lengths, sums, *strides, T, d, p, BLOCK_T=blocks.tile, BLOCK_K=blocks.depth, num_warps=4,
            )  # fmt: skip
            _product_norms_kernel[(B * parts,)](
                a, g, partial, *strides, T, d, p,
                BLOCK_P=blocks.tile, BLOCK_D=blocks.tile, BLOCK_T=blocks.depth, **launch,
            )  # fmt: skip
        _linear_norms_kernel[(B,)](
            a, g, partial, lengths, None if bias_grads is None else sums, squared, bound, bias_grads, *strides,
            T, d, p, parts, of_tokens, BLOCK=128, BLOCK_T=16, BLOCK_K=16, num_warps=8, num_stages=1,
        )  # fmt: skip
    if sums is None:
        return squared, bound, g.new_empty((B, 0), dtype=wide)
    return squared, bound, sums.squeeze(1) if bias_grads is None else bias_grads
