# SPDX-License-Identifier: Apache-2.0
"""Definition of the per-record norms and clipped sums: what a layer booked, in; squared norms and gradients, out.

Record b of a layer with weight W [p, d] has the gradient ``dW_b = sum_t g_bt a_bt^T`` (Goodfellow 2015). Half precision
is computed in float32, float64 in float64, and what is added up over records, tiles and duplicates in float64.
Nothing here scales a record by a factor of 0: such a record is left out, because 0 * inf is NaN.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 24
_MAX_TOKENS_IN_FLOAT32 = 4096

MAX_RECORDS_IN_FLOAT32 = 64
MAX_ROWS_IN_FLOAT32 = 8192
"""A block of a weight gradient that is summed in float32: not more records, nor more rows, than this."""

SMALLEST_ROW = 2.0**-100
"""Where the largest entry of a row times its factor is less, float32 would leave it a few bits or none: the block is
multiplied in float64."""


def arithmetic_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The type that these are computed in and results have: float32, or float64 where one of them is float64."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def costs_less_as_gram(tokens: int, inputs: int, outputs: int) -> bool:
    """Whether ``<a a^T, g g^T>`` takes fewer multiplications than ``g^T a``: T^2 (d + p) / 2 against T d p."""
    return tokens * (inputs + outputs) <= 2 * inputs * outputs


def linear_norms(
    a: Tensor,  # [B, T, d], inputs of the layer
    g: Tensor,  # [B, T, p], gradients of its outputs
    bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # squared [B] float64, bound [B] float64, bias gradients [B, p] or [B, 0]
    """``|sum_t g_t a_t^T|^2``, its bound ``sum_t |g_t| |a_t|`` before squaring, and ``sum_t g_t``.

    The rounding error of ``squared`` is relative to ``bound^2``: terms may cancel. Every row is divided by a power of
    two, and the powers are put together in float64, so that neither huge nor tiny rows overflow or vanish.
    """
    wide = arithmetic_dtype(a.dtype, g.dtype)
    B, T, d = a.shape
    p = g.shape[2]
    sums = g.sum(1, dtype=wide) if bias else g.new_empty((B, 0), dtype=wide)
    if 0 in (B, T, d, p):
        return a.new_zeros(B, dtype=torch.float64), a.new_zeros(B, dtype=torch.float64), sums
    a, a_power = _scaled_rows(a.to(wide))
    g, g_power = _scaled_rows(g.to(wide))
    bound = torch.ldexp(a.square().sum(-1).sqrt().double() * g.square().sum(-1).sqrt().double(), a_power + g_power)
    powers = a_power + g_power
    # A row of zeros has no part in the largest power.
    counts = (a.abs().amax(-1) > 0) & (g.abs().amax(-1) > 0)
    peak = torch.where(counts, powers, -(1 << 20)).amax(1, keepdim=True)
    peak = torch.where(peak > -(1 << 20), peak, 0)
    g = torch.where(counts[..., None] | ~g.isfinite(), torch.ldexp(g, (powers - peak)[..., None]), 0.0)
    # A row that counts for nothing still poisons its record.
    poison = (0.0 * a.double().sum((1, 2))) + (0.0 * g.double().sum((1, 2)))
    squared = torch.ldexp(_squared_sums(a, g), 2 * peak.squeeze(1)) + poison
    return squared, bound.sum(1), sums


def _scaled_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows with entries of at most 1, and the exponents of two that they were divided by."""
    power = torch.frexp(x.abs().amax(-1)).exponent
    half = power // 2  # two steps: one power of two may be out of range
    return torch.ldexp(torch.ldexp(x, -half[..., None]), (half - power)[..., None]), power


def _squared_sums(a: Tensor, g: Tensor) -> Tensor:
    """``|sum_t g_t a_t^T|^2`` [B] in float64 of rows of ordinary sizes."""
    T, d, p = a.shape[1], a.shape[2], g.shape[2]
    by_gram = costs_less_as_gram(T, d, p)
    records = max(1, _CHUNK_ELEMENTS // (T * T if by_gram else d * p))
    parts = []
    for a_part, g_part in zip(a.split(records), g.split(records)):
        if by_gram:
            # <A A^T, G G^T> = sum_ts (a_t . a_s) (g_t . g_s)
            parts.append(((a_part @ a_part.mT).double() * (g_part @ g_part.mT)).sum((1, 2)))
        else:
            rows = zip(g_part.split(_MAX_TOKENS_IN_FLOAT32, 1), a_part.split(_MAX_TOKENS_IN_FLOAT32, 1))
            products = sum((x.mT @ y).double() for x, y in rows)
            assert isinstance(products, Tensor)
            parts.append(products.square().sum((1, 2)))
    return torch.cat(parts).clamp_min(0.0)  # NaN stays NaN


def embedding_norms(
    ids: Tensor,  # [B, T] int64
    g: Tensor,  # [B, T, d]
    padding_idx: int,  # tokens with this id count for nothing; -1: none
) -> Tensor:  # [B] float64
    """Squared norms of the gradients of ``y = W[ids]``: rows of one id add up before they are squared."""
    B, T = ids.shape
    kept = (ids != padding_idx).flatten()
    record = torch.arange(B, device=ids.device)[:, None].expand(B, T).flatten()[kept]
    rows = ids.flatten()[kept]
    if rows.numel() == 0:
        return g.new_zeros(B, dtype=torch.float64)
    # One segment for each (record, row) pair that occurs.
    first, count = rows.min(), rows.max() - rows.min() + 1
    pairs, segment = torch.unique(record * count + (rows - first), return_inverse=True)
    sums = torch.zeros((pairs.numel(), g.shape[2]), dtype=torch.float64, device=g.device)
    sums.index_add_(0, segment, g.flatten(0, 1)[kept].double())
    return sums.new_zeros(B).index_add_(0, pairs // count, sums.square().sum(1))


def embedding_weight_grad(
    ids: Tensor,  # [B, T] int64
    g: Tensor,  # [B, T, d]
    factors: Tensor,  # [B]
    num_embeddings: int,
    padding_idx: int,  # -1: none
) -> Tensor:  # [num_embeddings, d] float32, float64 for float64
    """``sum_b factors_b dW_b`` of ``y = W[ids]``, without the records whose factor is 0."""
    wide = arithmetic_dtype(g.dtype)
    kept = ((ids != padding_idx) & (factors != 0)[:, None]).flatten()
    scales = factors.double()[:, None].expand(ids.shape).flatten()[kept]
    rows = g.flatten(0, 1)[kept].double() * scales[:, None]
    total = rows.new_zeros((num_embeddings, g.shape[2])).index_add_(0, ids.flatten()[kept], rows)
    return total.to(wide)


def norm_grads(
    x: Tensor,  # [B, T, d], inputs of the layer
    g: Tensor,  # [B, T, d], gradients of its outputs
    eps: float,
    subtract_mean: bool,
) -> tuple[Tensor, Tensor]:  # weight gradients [B, d], bias gradients [B, d]; float32, float64 for float64
    """``sum_t g_t * n(x_t)`` and ``sum_t g_t`` of LayerNorm (``subtract_mean``) or RMSNorm over the last axis.

    ``n(x) = (x - mean) / sqrt(var + eps)`` or ``x / sqrt(mean(x^2) + eps)``.
    """
    wide = arithmetic_dtype(x.dtype, g.dtype)
    values, grads = x.double(), g.double()
    if subtract_mean:
        values = values - values.mean(-1, keepdim=True)
    normalised = values * (values.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (grads * normalised).sum(1).to(wide), grads.sum(1).to(wide)


def squared_norms(grads: Tensor) -> Tensor:  # [B, ...] -> [B] float64
    """Sum of squares of every record."""
    return grads.double().square().sum(tuple(range(1, grads.ndim))) if grads.ndim > 1 else grads.double().square()


def weighted_sum(
    grads: Tensor,  # [B, ...]
    factors: Tensor,  # [B]
) -> Tensor:  # [...] float32, float64 for float64
    """``sum_b factors_b grads_b``, without the records whose factor is 0."""
    scales = factors.double().reshape(-1, *[1] * (grads.ndim - 1))
    return torch.where(scales != 0, grads.double() * scales, 0.0).sum(0).to(arithmetic_dtype(grads.dtype))


def scale_records(
    x: Tensor,  # [B, T, width]
    factors: Tensor,  # [B]
    dtype: torch.dtype,
) -> tuple[Tensor, bool]:
    """``factors_b x_b``, contiguous, and whether every row of it that is not 0 has an entry of at least
    :data:`SMALLEST_ROW`."""
    scaled = (x.to(dtype) * factors.to(dtype)[:, None, None]).contiguous()
    if scaled.numel() == 0:
        return scaled, True
    vanishes = (scaled.abs().amax(-1) < SMALLEST_ROW) & (x != 0).any(-1)
    return scaled, not bool(vanishes.any())


def scaled_weight_grad(
    g: Tensor,  # [B, T, p]
    a: Tensor,  # [B, T, d]
    factors: Tensor,  # [B]
    scale: Callable[[Tensor, Tensor, torch.dtype], tuple[Tensor, bool]] = scale_records,
) -> Tensor:  # [p, d] float32, float64 for float64
    """``sum_b factors_b g_b^T a_b``, without the records whose factor is 0.

    Products add up in float32 in blocks of at most :data:`MAX_RECORDS_IN_FLOAT32` records and
    :data:`MAX_ROWS_IN_FLOAT32` rows, and blocks in float64: what a record adds hardly depends on those beside it.
    """
    kept = factors != 0
    if not bool(kept.all()):
        a, g, factors = a[kept], g[kept], factors[kept]
    wide = arithmetic_dtype(a.dtype, g.dtype)
    T, d, p = a.shape[1], a.shape[2], g.shape[2]
    blocks: list[Tensor] = []
    records = max(1, min(MAX_RECORDS_IN_FLOAT32, MAX_ROWS_IN_FLOAT32 // max(1, T)))
    for g_part, a_part, weights in zip(g.split(records), a.split(records), factors.split(records)):
        narrow = a_part if d < p else g_part  # the one that is copied
        scaled, is_precise = scale(narrow, weights, wide)
        dtype = wide
        if not is_precise:
            dtype = torch.float64
            scaled = narrow.double() * weights.double()[:, None, None]
        g_part, a_part = (g_part, scaled) if d < p else (scaled, a_part)
        rows = zip(g_part.split(MAX_ROWS_IN_FLOAT32, 1), a_part.split(MAX_ROWS_IN_FLOAT32, 1))
        blocks += [y.to(dtype).flatten(0, 1).mT @ x.to(dtype).flatten(0, 1) for y, x in rows]
    if len(blocks) == 1:
        return blocks[0].to(wide)
    total = torch.zeros((p, d), dtype=torch.float64, device=g.device)
    for block in blocks:
        total += block
    return total.to(wide)
