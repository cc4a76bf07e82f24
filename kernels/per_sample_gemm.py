# SPDX-License-Identifier: Apache-2.0
"""The clipped sum of a Linear weight's per-record gradients, ``sum_b factors_b g_b^T a_b``, as one GEMM in Triton.

A program owns a tile of the result and a range of records. *Rows*: rows of ``g`` are multiplied by the factors of their
records on the way to the product. *Records*, for half precision: the product of one record is accumulated and then
added to the sum times its factor, all in float32, so that the tensor cores take the operands as they are. Scaling those
first would round every entry to 8 or 11 bits, by more than the clipping bound allows for. Where records have too few
tokens for that, rows are widened to float32.

Either way a record whose factor is 0 is not read. Sums are float32 within ``MAX_RECORDS`` records and ``MAX_ROWS``
rows, and float64 between such blocks: what a record adds hardly depends on those beside it. Where the tiles alone
would leave the device idle, the records are parted among programs, whose sums are added in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from wavedp.kernels.haar import on_device, wide_dtype
from wavedp.kernels.per_sample_tiles import cdiv, dot, exponent, load_rows, max_of, operand, power_of_two

MAX_RECORDS = 64
MAX_ROWS = 8192
SMALL_FACTOR = tl.constexpr(2.0**-60)
"""A record with a smaller factor may have entries beyond float32 before it is clipped: its rows are scaled first."""
FEW_TOKENS = 16
"""The least depth of a product on tensor cores: with fewer tokens a record would leave part of it empty."""

LEAST_ROWS = 512
"""Tokens of a split at least: its sum costs as much traffic as some hundred of them."""


@triton.jit
def _balanced(g, a, e, WIDE: tl.constexpr):
    """Rows of ``g`` divided by the power of two of their largest entry, those of ``a`` times it and ``2^e``.

    Their products are ``2^e g a``, but a power of two that makes one of them vanish is met by the other first.
    """
    g, a = g.to(WIDE), a.to(WIDE)
    peaks = exponent(max_of(tl.abs(g), 1), WIDE)
    power = peaks + e
    half = power // 2  # 2^power may be no normal number
    a = a * power_of_two(half, WIDE)[:, None] * power_of_two(power - half, WIDE)[:, None]
    return g * power_of_two(-peaks, WIDE)[:, None], a


@triton.jit
def _add_record(
    total,
    g_ptr,
    a_ptr,
    stride_gt,
    stride_at,
    factor,
    first,
    end,
    row,
    col,
    p,
    d,
    SCALED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``total`` plus ``factor g^T a`` of the tokens ``first`` to ``end`` of one record."""
    product = tl.full((BLOCK_P, BLOCK_D), 0, tl.float32)
    rest = factor
    e = exponent(tl.abs(factor), tl.float32)
    if SCALED:
        rest = factor * power_of_two(-e, tl.float32)
    for t in range(first, end, BLOCK_K):
        tokens = t + tl.arange(0, BLOCK_K)
        g = load_rows(g_ptr, tokens, tokens < end, stride_gt, row, p, BLOCK_P)
        a = load_rows(a_ptr, tokens, tokens < end, stride_at, col, d, BLOCK_D)
        if SCALED:
            g, a = _balanced(g, a, e, tl.float32)
            g, a = g.to(g_ptr.dtype.element_ty), a.to(a_ptr.dtype.element_ty)
        product = dot(tl.trans(g), a, product, tl.float32)
    return total + rest * product


@triton.jit
def _place(tile, p, d, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """First row and column of a tile of the result. Eight tiles down before one to the right, for the cache."""
    tiles_p, tiles_d = cdiv(p, BLOCK_P), cdiv(d, BLOCK_D)
    group = tile // (8 * tiles_d)
    height = tl.minimum(tiles_p - group * 8, 8)
    within = tile % (8 * tiles_d)
    return (group * 8 + within % height) * BLOCK_P, within // height * BLOCK_D


@triton.jit
def _store(sums_ptr, total, split, row, col, p, d, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    ps, ds = row + tl.arange(0, BLOCK_P), col + tl.arange(0, BLOCK_D)
    offsets = split.to(tl.int64) * p * d + ps.to(tl.int64)[:, None] * d + ds.to(tl.int64)[None, :]
    tl.store(sums_ptr + offsets, total.to(sums_ptr.dtype.element_ty), mask=(ps < p)[:, None] & (ds < d)[None, :])


@triton.jit(do_not_specialize=["B", "T", "records", "rows"])
def _scaled_records_kernel(
    g_ptr,  # [B, T, p], rows contiguous
    a_ptr,  # [B, T, d], rows contiguous
    factors_ptr,  # [B]
    sums_ptr,  # [splits, p, d]
    stride_gb,
    stride_gt,
    stride_ab,
    stride_at,
    stride_f,
    B,
    T,
    p,
    d,
    records,  # of a split
    rows,  # of a record in a split
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles = cdiv(p, BLOCK_P) * cdiv(d, BLOCK_D)
    pid = tl.program_id(0)
    row, col = _place(pid % tiles, p, d, BLOCK_P, BLOCK_D)
    split = pid // tiles
    of_record = cdiv(T, rows)
    first = split % of_record * rows
    end = tl.minimum(first + rows, T)
    record = split // of_record * records
    total = tl.full((BLOCK_P, BLOCK_D), 0, tl.float32)
    for i in range(record, tl.minimum(record + records, B)):
        b = tl.full((), 0, tl.int64) + i
        factor = tl.load(factors_ptr + b * stride_f)
        g, a = g_ptr + b * stride_gb, a_ptr + b * stride_ab
        is_small = (tl.abs(factor) < SMALL_FACTOR) & (g_ptr.dtype.element_ty == tl.bfloat16)
        if is_small & (factor != 0.0):
            total = _add_record(
                total, g, a, stride_gt, stride_at, factor, first, end, row, col, p, d, True, BLOCK_P, BLOCK_D, BLOCK_K
            )
        elif factor != 0.0:
            total = _add_record(
                total, g, a, stride_gt, stride_at, factor, first, end, row, col, p, d, False, BLOCK_P, BLOCK_D, BLOCK_K
            )
    _store(sums_ptr, total, split, row, col, p, d, BLOCK_P, BLOCK_D)


@triton.jit(do_not_specialize=["B", "T", "splits", "records", "rows"])
def _scaled_rows_kernel(
    g_ptr,  # [B, T, p], rows contiguous
    a_ptr,  # [B, T, d], rows contiguous
    factors_ptr,  # [B]
    sums_ptr,  # [splits, p, d]
    stride_gb,
    stride_gt,
    stride_ab,
    stride_at,
    stride_f,
    B,
    T,
    p,
    d,
    splits,
    records,  # summed in float32
    rows,  # summed in float32; all of those of the records, or one has more
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    WIDE: tl.constexpr = tl.float64 if g_ptr.dtype.element_ty == tl.float64 else tl.float32
    tiles = cdiv(p, BLOCK_P) * cdiv(d, BLOCK_D)
    pid = tl.program_id(0)
    row, col = _place(pid % tiles, p, d, BLOCK_P, BLOCK_D)
    ps, ds = (row + tl.arange(0, BLOCK_P)).to(tl.int64), (col + tl.arange(0, BLOCK_D)).to(tl.int64)
    split = pid // tiles
    share = cdiv(cdiv(B, records), splits) * records
    last = tl.minimum((split + 1) * share, B)
    total = tl.full((BLOCK_P, BLOCK_D), 0, tl.float64)
    for record in range(split * share, last, records):
        of_block = tl.minimum(last - record, records) * T
        for first in range(0, of_block, rows):
            end = tl.minimum(first + rows, of_block)
            part = tl.full((BLOCK_P, BLOCK_D), 0, WIDE)
            for k in range(first, end, BLOCK_K):
                i = k + tl.arange(0, BLOCK_K)
                b = (i // T).to(tl.int64)
                t = i - b * T
                b += record
                factors = tl.load(factors_ptr + b * stride_f, mask=i < end, other=0.0)
                kept = (factors != 0.0)[:, None]
                g_rows, a_rows = b * stride_gb + t * stride_gt, b * stride_ab + t * stride_at
                g = tl.load(g_ptr + (g_rows[:, None] + ps[None, :]), mask=kept & (ps < p)[None, :], other=0.0)
                a = tl.load(a_ptr + (a_rows[:, None] + ds[None, :]), mask=kept & (ds < d)[None, :], other=0.0)
                e = exponent(tl.abs(factors), WIDE)
                g, a = _balanced(g, a, e, WIDE)
                g *= (factors * power_of_two(-e, WIDE))[:, None]
                part = dot(tl.trans(g), a, part, WIDE)
            total += part.to(tl.float64)
    _store(sums_ptr, total, split, row, col, p, d, BLOCK_P, BLOCK_D)


@triton.jit(do_not_specialize=["splits"])
def _add_splits_kernel(
    sums_ptr,  # [splits, size]
    out_ptr,  # [size]
    size,
    splits,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.full((BLOCK,), 0, tl.float64)
    for split in range(splits):
        offsets = tl.full((), 1, tl.int64) * split * size + i
        total += tl.load(sums_ptr + offsets, mask=i < size, other=0.0).to(tl.float64)
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=i < size)


@dataclass(frozen=True)
class Tiling:
    """How a ``[p, d]`` result and its ``B`` records of ``T`` tokens are parted among programs."""

    tile_p: int
    tile_d: int
    depth: int
    num_stages: int
    by_records: bool
    records: int  # of a block that is summed in float32
    splits: int  # sums that are added afterwards


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def tiling_of(dtype: torch.dtype, B: int, T: int, p: int, d: int, device: torch.device) -> Tiling:
    """Tiles of 128 x 128 for tensor cores, whose two accumulators are 128 registers a thread; smaller ones for float32
    and float64. As many splits as fill the device once, or as there are blocks where a program takes one. Not measured
    on a device."""
    by_records = dtype.itemsize == 2 and T >= FEW_TOKENS
    if by_records:
        largest, depth, num_stages = 128, min(triton.next_power_of_2(T), 32), 3
    else:
        largest, depth, num_stages = (32 if dtype == torch.float64 else 64), 16, 2
    tile_p, tile_d = (min(max(triton.next_power_of_2(size), 16), largest) for size in (p, d))
    tiles = triton.cdiv(p, tile_p) * triton.cdiv(d, tile_d)
    wanted = max(1, min(multiprocessors(device) // tiles, B * T // LEAST_ROWS))
    records = max(1, min(MAX_RECORDS, MAX_ROWS // T, triton.cdiv(B, wanted)))
    blocks = triton.cdiv(B, records)
    splits = blocks * triton.cdiv(T, MAX_ROWS) if by_records else triton.cdiv(blocks, triton.cdiv(blocks, wanted))
    return Tiling(tile_p, tile_d, depth, num_stages, by_records, records, splits)


def scaled_weight_grad(g: torch.Tensor, a: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """``sum_b factors_b g_b^T a_b`` without the records whose factor is 0.

    Args:
        g: ``[B, T, p]``, any strides, float16, bfloat16, float32 or float64.
        a: ``[B, T, d]``, likewise.
        factors: ``[B]``, of any of these types.

    Returns:
        ``[p, d]`` float32, or float64 where ``g`` or ``a`` is.
    """
    B, T, p = g.shape
    d = a.shape[2]
    dtype = torch.promote_types(a.dtype, g.dtype)
    wide = wide_dtype(dtype)
    out = torch.empty((p, d), dtype=wide, device=g.device)
    if B == 0 or T == 0 or d == 0 or p == 0:
        return out.zero_()
    g, a, factors = operand(g, dtype), operand(a, dtype), factors.to(wide)
    tiling = tiling_of(dtype, B, T, p, d, g.device)
    kept = wide if tiling.by_records else torch.float64
    sums = out if tiling.splits == 1 else torch.empty((tiling.splits, p, d), dtype=kept, device=g.device)
    grid = (tiling.splits * triton.cdiv(p, tiling.tile_p) * triton.cdiv(d, tiling.tile_d),)
    strides = (g.stride(0), g.stride(1), a.stride(0), a.stride(1), factors.stride(0))
    tile = {"BLOCK_P": tiling.tile_p, "BLOCK_D": tiling.tile_d, "BLOCK_K": tiling.depth}
    launch = {"num_warps": 8 if tiling.by_records or tiling.tile_p == 64 else 4, "num_stages": tiling.num_stages}
    with on_device(g):
        if tiling.by_records:
            _scaled_records_kernel[grid](
                g, a, factors, sums, *strides, B, T, p, d, tiling.records, MAX_ROWS, **tile, **launch
            )
        else:
            _scaled_rows_kernel[grid](
                g, a, factors, sums, *strides, B, T, p, d, tiling.splits, tiling.records, MAX_ROWS, **tile, **launch
            )
        if tiling.splits > 1:
            _add_splits_kernel[(triton.cdiv(p * d, 1024),)](sums, out, p * d, tiling.splits, BLOCK=1024, num_warps=4)
    return out
