# SPDX-License-Identifier: Apache-2.0
"""Per-record gradients that are there already, or nearly, in Triton: normalisation layers, sums over records, norms.

All of these read their inputs once and do little with them. Sums that several programs share are written as parts and
added in a fixed order: no atomics, so that results repeat. Sums over records, and squares, are float64: at two bytes an
element, memory is slower than that on the devices that this is for.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from wavedp.kernels.haar import on_device, wide_dtype
from wavedp.kernels.per_sample_tiles import cdiv, load_rows, operand, sum_of

PROGRAMS = 528
"""Enough to fill a large device four times: what is summed over records or tokens is parted until there are so many."""


@triton.jit(do_not_specialize=["T", "parts"])
def _norm_grads_kernel(
    x_ptr,  # [B, T, d], rows contiguous
    g_ptr,  # [B, T, d], rows contiguous
    weight_ptr,  # [B, parts, d]
    bias_ptr,  # [B, parts, d]
    stride_xb,
    stride_xt,
    stride_gb,
    stride_gt,
    T,
    d,
    parts,
    eps,
    SUBTRACT_MEAN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # of d; statistics of wider rows are taken over several, by every program
    ONE_BLOCK: tl.constexpr,
):
    WIDE: tl.constexpr = (
        tl.float64 if x_ptr.dtype.element_ty == tl.float64 or g_ptr.dtype.element_ty == tl.float64 else tl.float32
    )
    blocks = cdiv(d, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    first = (pid % blocks).to(tl.int32) * BLOCK
    record, part = pid // blocks // parts, (pid // blocks % parts).to(tl.int32)
    x_ptr += record * stride_xb
    g_ptr += record * stride_gb
    cols = first + tl.arange(0, BLOCK)
    weight, bias = tl.full((BLOCK,), 0, WIDE), tl.full((BLOCK,), 0, WIDE)
    for t in range(part * ROWS, T, parts * ROWS):
        rows = t + tl.arange(0, ROWS)
        kept = rows < T
        x = load_rows(x_ptr, rows, kept, stride_xt, first, d, BLOCK).to(WIDE)
        g = load_rows(g_ptr, rows, kept, stride_gt, first, d, BLOCK).to(WIDE)
        mean = tl.full((ROWS,), 0, WIDE)
        if SUBTRACT_MEAN:
            if ONE_BLOCK:
                mean = sum_of(x, 1) / d
            else:
                for k in range(0, d, BLOCK):
                    mean += sum_of(load_rows(x_ptr, rows, kept, stride_xt, k, d, BLOCK).to(WIDE), 1)
                mean = mean / d
        x = tl.where((cols < d)[None, :], x - mean[:, None], 0.0)
        if ONE_BLOCK:
            squares = sum_of(x * x, 1)
        else:
            squares = tl.full((ROWS,), 0, WIDE)
            for k in range(0, d, BLOCK):
                y = load_rows(x_ptr, rows, kept, stride_xt, k, d, BLOCK).to(WIDE) - mean[:, None]
                squares += sum_of(tl.where((k + tl.arange(0, BLOCK) < d)[None, :], y * y, 0.0), 1)
        # n(x) = (x - mean) / sqrt(var + eps)
        scale = 1.0 / tl.sqrt(squares / d + eps)
        weight += sum_of(tl.where(kept[:, None], g * (x * scale[:, None]), 0.0), 0)
        bias += sum_of(g, 0)
    offsets = (record * parts + part) * d + cols
    tl.store(weight_ptr + offsets, weight, mask=cols < d)
    tl.store(bias_ptr + offsets, bias, mask=cols < d)


def norm_grads(x: torch.Tensor, g: torch.Tensor, eps: float, subtract_mean: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """``sum_t g_t n(x_t)`` and ``sum_t g_t`` ``[B, d]`` of LayerNorm, or of RMSNorm without ``subtract_mean``.

    Args:
        x, g: ``[B, T, d]``, any strides, float16, bfloat16, float32 or float64.
        eps: added to the variance, or to the mean of squares.

    Returns:
        Both in float32, or in float64 where ``x`` or ``g`` is.
    """
    B, T, d = x.shape
    wide = wide_dtype(torch.promote_types(x.dtype, g.dtype))
    if B == 0 or T == 0 or d == 0:
        return torch.zeros((B, d), dtype=wide, device=x.device), torch.zeros((B, d), dtype=wide, device=x.device)
    x, g = operand(x, x.dtype), operand(g, g.dtype)
    block = min(triton.next_power_of_2(d), 4096)
    rows = max(1, 4096 // block)
    parts = min(triton.cdiv(T, rows), max(1, PROGRAMS // B))
    weight, bias = (torch.empty((B, parts, d), dtype=wide, device=x.device) for _ in range(2))
    with on_device(x):
        _norm_grads_kernel[(B * parts * triton.cdiv(d, block),)](
            x, g, weight, bias, x.stride(0), x.stride(1), g.stride(0), g.stride(1), T, d, parts, eps,
            SUBTRACT_MEAN=subtract_mean, ROWS=rows, BLOCK=block, ONE_BLOCK=d <= block, num_warps=8,
        )  # fmt: skip
    return (weight.squeeze(1), bias.squeeze(1)) if parts == 1 else (weight.sum(1), bias.sum(1))


@triton.jit(do_not_specialize=["parts"])
def _squared_norms_kernel(
    x_ptr,  # [B, size], rows contiguous
    parts_ptr,  # [B, parts] float64
    stride_b,
    size,
    parts,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    record, part = pid // parts, pid % parts
    squared = tl.full((), 0.0, tl.float64)
    for k in range(part * BLOCK, size, parts * BLOCK):
        i = k + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + (record * stride_b + i), mask=i < size, other=0.0).to(tl.float64)
        squared += sum_of(x * x, 0)
    tl.store(parts_ptr + pid, squared)


def squared_norms(grads: torch.Tensor) -> torch.Tensor:
    """Sums of squares ``[B]`` float64 of ``grads`` ``[B, ...]`` of any strides and floating type."""
    B, size = grads.shape[0], math.prod(grads.shape[1:])
    if grads.numel() == 0:
        return torch.zeros(B, dtype=torch.float64, device=grads.device)
    x = operand(grads.reshape(B, size), grads.dtype)
    block = min(triton.next_power_of_2(size), 2048)
    parts = min(triton.cdiv(size, block), max(1, PROGRAMS // B))
    squared = torch.empty((B, parts), dtype=torch.float64, device=x.device)
    with on_device(x):
        _squared_norms_kernel[(B * parts,)](x, squared, x.stride(0), size, parts, BLOCK=block, num_warps=4)
    return squared.squeeze(1) if parts == 1 else squared.sum(1)


@triton.jit(do_not_specialize=["B", "parts"])
def _weighted_sum_kernel(
    x_ptr,  # [B, size], rows contiguous
    factors_ptr,  # [B]
    parts_ptr,  # [parts, size] float64, or the result in its own type
    stride_b,
    stride_f,
    B,
    size,
    parts,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = cdiv(size, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    part = pid // blocks
    i = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    total = tl.full((BLOCK,), 0, tl.float64)
    for k in range(part.to(tl.int32) * ROWS, B, parts * ROWS):
        records = (k + tl.arange(0, ROWS)).to(tl.int64)
        factors = tl.load(factors_ptr + records * stride_f, mask=records < B, other=0.0).to(tl.float64)
        offsets = (records * stride_b)[:, None] + i[None, :]
        x = tl.load(x_ptr + offsets, mask=(factors != 0.0)[:, None] & (i < size)[None, :], other=0.0)
        total += sum_of(x.to(tl.float64) * factors[:, None], 0)
    tl.store(parts_ptr + (part * size + i), total.to(parts_ptr.dtype.element_ty), mask=i < size)


def weighted_sum(grads: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """``sum_b factors_b grads_b`` without the records whose factor is 0, added in float64.

    Args:
        grads: ``[B, ...]``, any strides, float16, bfloat16, float32 or float64.
        factors: ``[B]``, of any of these types.

    Returns:
        ``[...]`` float32, or float64 for float64.
    """
    B, shape = grads.shape[0], grads.shape[1:]
    size, wide = math.prod(shape), wide_dtype(grads.dtype)
    if grads.numel() == 0:
        return torch.zeros(shape, dtype=wide, device=grads.device)
    x = operand(grads.reshape(B, size), grads.dtype)
    rows, block = 4, min(max(triton.next_power_of_2(size), 16), 512)
    blocks = triton.cdiv(size, block)
    parts = min(triton.cdiv(B, rows), max(1, PROGRAMS // blocks))
    total = torch.empty((parts, size), dtype=torch.float64 if parts > 1 else wide, device=x.device)
    with on_device(x):
        _weighted_sum_kernel[(blocks * parts,)](
            x, factors, total, x.stride(0), factors.stride(0), B, size, parts, ROWS=rows, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return (total.squeeze(0) if parts == 1 else total.sum(0).to(wide)).reshape(shape)
