# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels of per-record gradients share: tiles of rows, products, powers of two."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

WIDENED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Triton's interpreter multiplies the bits of bfloat16 as integers, so that it is given float32."""


@triton.jit
def cdiv(x, y):
    return (x + y - 1) // y


# tl.sum and its like are kernels themselves, which stay compiled where Triton was imported before the interpreter was
# asked for; tl.reduce follows the kernel that calls it, and interprets Triton's own combinations at once.


@triton.jit
def sum_of(x, axis: tl.constexpr = None, keep_dims: tl.constexpr = False):
    return tl.reduce(x, axis, tl.standard._sum_combine, keep_dims=keep_dims)


@triton.jit
def max_of(x, axis: tl.constexpr):
    return tl.reduce(x, axis, tl.standard._elementwise_max)


@triton.jit
def min_of(x, axis: tl.constexpr):
    return tl.reduce(x, axis, tl.standard._elementwise_min)


@triton.jit
def load_rows(x_ptr, rows, kept, stride_t, first, width, BLOCK: tl.constexpr):
    """Columns ``first`` to ``first + BLOCK`` of the ``rows`` that are ``kept``, zeros outside."""
    cols = first + tl.arange(0, BLOCK)
    mask = kept[:, None] & (cols < width)[None, :]
    return tl.load(x_ptr + (rows.to(tl.int64) * stride_t)[:, None] + cols.to(tl.int64)[None, :], mask=mask, other=0.0)


@triton.jit
def dot(x, y, total, WIDE: tl.constexpr):
    """``total + x y``: products are exact in half precision, and nothing is rounded to TF32."""
    if WIDENED:
        x, y = x.to(WIDE), y.to(WIDE)
    return tl.dot(x, y, total, input_precision="ieee", out_dtype=WIDE)


@triton.jit
def diagonal(gram, BLOCK_T: tl.constexpr):
    i = tl.arange(0, BLOCK_T)
    return sum_of(tl.where(i[:, None] == i[None, :], gram, 0.0), 1, keep_dims=True)


@triton.jit
def power_of_two(e, WIDE: tl.constexpr):
    """``2^e``, zero below the normal numbers; ``e`` is at most the largest exponent."""
    if tl.float64 == WIDE:
        power = ((e.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
        return tl.where(e < -1022, 0.0, power)
    else:
        power = ((e + 127) << 23).to(tl.float32, bitcast=True)
        return tl.where(e < -126, 0.0, power)


@triton.jit
def exponent(x, WIDE: tl.constexpr):
    """Of ``x`` >= 0, kept where ``power_of_two`` of it and of its negative are normal numbers."""
    if tl.float64 == WIDE:
        e = (x.to(tl.int64, bitcast=True) >> 52).to(tl.int32) - 1023
        return tl.minimum(tl.maximum(e, -1022), 1022)
    else:
        e = (x.to(tl.int32, bitcast=True) >> 23) - 127
        return tl.minimum(tl.maximum(e, -126), 126)


def operand(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x`` of a dtype with contiguous rows, without a copy where it is so."""
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()
