# SPDX-License-Identifier: Apache-2.0
"""The norm of one record's ``sum_t g_t a_t^T`` in the whole range of its type: what ``linear_norms`` falls back on.

Each token's rows are divided by the power of two of their largest entry. The powers are put together, relative to the
largest of them, where Gram matrices are multiplied, and come back in float64.
"""

from __future__ import annotations

import triton
import triton.language as tl
from wavedp.kernels.per_sample_tiles import diagonal, dot, exponent, load_rows, max_of, min_of, power_of_two, sum_of

NO_TOKEN = tl.constexpr(-100000)
"""Exponent of a token whose rows are zero."""


@triton.jit
def _peaks(x_ptr, rows, stride_t, T, width, WIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    """Largest absolute entry of each row; infinite where an entry is NaN."""
    peaks = tl.full((BLOCK_T,), 0, WIDE)
    for k in range(0, width, BLOCK_K):
        x = tl.abs(load_rows(x_ptr, rows, rows < T, stride_t, k, width, BLOCK_K).to(WIDE))
        peaks = tl.maximum(peaks, max_of(tl.where(x == x, x, float("inf")), 1))
    return peaks


@triton.jit
def _scaled_gram(
    x_ptr, rows, others, e, f, stride_t, T, width, WIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr
):
    """``_gram`` of the rows divided by ``2^e`` and the others by ``2^f``, which is exact."""
    gram = tl.full((BLOCK_T, BLOCK_T), 0, WIDE)
    for k in range(0, width, BLOCK_K):
        x = load_rows(x_ptr, rows, rows < T, stride_t, k, width, BLOCK_K).to(WIDE) * power_of_two(-e, WIDE)[:, None]
        y = load_rows(x_ptr, others, others < T, stride_t, k, width, BLOCK_K).to(WIDE) * power_of_two(-f, WIDE)[:, None]
        gram = dot(x, tl.trans(y), gram, WIDE)
    return gram


@triton.jit
def _shares(peaks_a, peaks_g, WIDE: tl.constexpr):
    """Exponent of each token's ``|g_t| |a_t|``."""
    e = exponent(peaks_a, WIDE) + exponent(peaks_g, WIDE)
    return tl.where((peaks_a == 0.0) | (peaks_g == 0.0), NO_TOKEN, e)


@triton.jit
def scaled_norm(
    a_ptr, g_ptr, stride_at, stride_gt, T, d, p, WIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Squared norm and bound of one record, in the whole range of its type. One program does it all, slowly."""
    largest = tl.full((), NO_TOKEN, tl.int32)
    is_finite = tl.full((), 1, tl.int32)
    for t in range(0, T, BLOCK_T):
        rows = t + tl.arange(0, BLOCK_T)
        peaks_a = _peaks(a_ptr, rows, stride_at, T, d, WIDE, BLOCK_T, BLOCK_K)
        peaks_g = _peaks(g_ptr, rows, stride_gt, T, p, WIDE, BLOCK_T, BLOCK_K)
        largest = tl.maximum(largest, max_of(_shares(peaks_a, peaks_g, WIDE), 0))
        finite = (peaks_a < float("inf")) & (peaks_g < float("inf"))
        is_finite = tl.minimum(is_finite, min_of(finite.to(tl.int32), 0))
    squared = tl.full((), 0.0, tl.float64)
    bound = tl.full((), 0.0, tl.float64)
    if is_finite == 0:
        squared += float("nan")
        bound += float("nan")
    elif largest > NO_TOKEN:
        for t in range(0, T, BLOCK_T):
            rows = t + tl.arange(0, BLOCK_T)
            peaks_a = _peaks(a_ptr, rows, stride_at, T, d, WIDE, BLOCK_T, BLOCK_K)
            peaks_g = _peaks(g_ptr, rows, stride_gt, T, p, WIDE, BLOCK_T, BLOCK_K)
            a, g = exponent(peaks_a, WIDE), exponent(peaks_g, WIDE)
            share = power_of_two(_shares(peaks_a, peaks_g, WIDE) - largest, WIDE)
            for s in range(0, t + 1, BLOCK_T):
                others = s + tl.arange(0, BLOCK_T)
                peaks_a = _peaks(a_ptr, others, stride_at, T, d, WIDE, BLOCK_T, BLOCK_K)
                peaks_g = _peaks(g_ptr, others, stride_gt, T, p, WIDE, BLOCK_T, BLOCK_K)
                b, h = exponent(peaks_a, WIDE), exponent(peaks_g, WIDE)
                other = power_of_two(_shares(peaks_a, peaks_g, WIDE) - largest, WIDE)
                gram_a = _scaled_gram(a_ptr, rows, others, a, b, stride_at, T, d, WIDE, BLOCK_T, BLOCK_K)
                gram_g = _scaled_gram(g_ptr, rows, others, g, h, stride_gt, T, p, WIDE, BLOCK_T, BLOCK_K)
                terms = gram_a * gram_g * share[:, None] * other[None, :]
                part = sum_of(terms.to(tl.float64))
                if s == t:
                    squared += part
                    lengths = tl.sqrt(diagonal(gram_a, BLOCK_T) * diagonal(gram_g, BLOCK_T))
                    bound += sum_of((lengths * share[:, None]).to(tl.float64))
                else:
                    squared += 2.0 * part
        # In halves, because 2^largest may be no number of float64 itself.
        half = power_of_two(largest // 2, tl.float64)
        rest = power_of_two(largest - largest // 2, tl.float64)
        bound = bound * half * rest
        squared = squared * half * rest * half * rest
    return squared, bound
