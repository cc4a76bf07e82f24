# SPDX-License-Identifier: Apache-2.0
"""Per-record gradients of one parameter, kept in the form in which they are cheapest.

Each form answers two questions without building ``[B, *parameter]`` where it can: every record's squared
norm, and the sum over records weighted by clipping factors. A factor of 0 takes a record out by selection.

Sums over records are float64 throughout, and lower precision stays inside one record: what a record
contributes then does not depend on the rounding of the records beside it.
"""

from typing import Protocol

import torch
from torch import Tensor

from wavedp.privacy.clipping import accumulation_dtype, weighted_record_sum

NORM_ROUNDING = {torch.float32: 2.0**-20, torch.float64: 2.0**-49}
"""Share of ``(sum_t |a_t| |g_t|)^2`` added to a squared norm computed in floating point.

When a record's tokens cancel, the rounding error of its norm is relative to the terms and not to the
result, and a norm that comes out too small would let the record contribute more than C. The share is 16
units in the last place, several times the error measured on cancelling terms; for T uncorrelated tokens it
raises the norm by T * 2^-21.
"""

_CHUNK_ELEMENTS = 1 << 24
_SUM_CHUNK_ELEMENTS = 1 << 22
_MAX_TOKENS_IN_FLOAT32 = 4096

_FEW_TOKENS = 64
"""Below this many tokens, one float64 product over a block's rows is faster than building every record's."""


class PerSampleGradient(Protocol):
    """The gradients of B records with respect to one parameter."""

    def squared_norms(self) -> Tensor:
        """Return ``[B]`` float64, not less than the squared norms; not finite where a record is not."""

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """Return the sum over records, each times its factor ``[B]``, in float64."""


class Materialised:
    """Gradients small enough to be kept as they are: biases and normalisation weights."""

    def __init__(self, grads: Tensor) -> None:  # [B, *parameter]
        self._grads = grads.double()

    def squared_norms(self) -> Tensor:
        return self._grads.flatten(1).square().sum(1)

    def weighted_sum(self, factors: Tensor) -> Tensor:
        return weighted_record_sum(self._grads, factors)


class OuterProducts:
    """A Linear weight: record b's gradient is ``sum_t g_bt a_bt^T``, never built unless that is cheaper."""

    def __init__(
        self,
        activations: Tensor,  # [B, T, d]
        output_grads: Tensor,  # [B, T, p]
    ) -> None:
        self._a = activations
        self._g = output_grads
        self._dtype = accumulation_dtype(torch.promote_types(activations.dtype, output_grads.dtype))

    def squared_norms(self) -> Tensor:
        a, g, share, peak = self._scaled(slice(None))
        # |sum_t g_t a_t^T| <= sum_t |g_t| |a_t|
        lengths = share * (a.square().sum(-1) * g.square().sum(-1)).sqrt()
        bound = lengths.double().sum(1)
        squared = self._squared_sums(a, g, share).clamp_min(0.0)
        return peak.square() * (squared + NORM_ROUNDING[self._dtype] * bound.square())

    def weighted_sum(self, factors: Tensor) -> Tensor:
        T, d, p = self._a.shape[1], self._a.shape[2], self._g.shape[2]
        built = T >= _FEW_TOKENS
        total = torch.zeros(p, d, dtype=torch.float64, device=self._g.device)
        kept = factors.nonzero().squeeze(1)
        for part in torch.split(kept, max(1, _SUM_CHUNK_ELEMENTS // max(1, d * p if built else T * (d + p)))):
            a, g, share, peak = self._scaled(part)
            weights = factors[part].double() * peak
            if built:
                for product, weight in zip(_record_products(a, g, share), weights.tolist()):
                    total.add_(product, alpha=weight)
            else:
                rows = (share * weights[:, None])[..., None] * g
                total += rows.flatten(0, 1).mT @ a.double().flatten(0, 1)
        return total

    def _scaled(self, records: Tensor | slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return rows with largest entry 1, their scales relative to the record's largest, and that one.

        The gradient is ``peak_b sum_t share_bt g_bt a_bt^T``. Scales are multiplied in float64, so that neither
        huge nor tiny rows overflow or vanish on the way.
        """
        a, a_scale = _scaled_rows(self._a[records].to(self._dtype))
        g, g_scale = _scaled_rows(self._g[records].to(self._dtype))
        scale = a_scale * g_scale  # [B, T] float64
        peak = scale.amax(1) if scale.shape[1] else scale.new_zeros(scale.shape[0])
        return a, g, (scale / _one_where_zero(peak)[:, None]).to(self._dtype), peak

    def _squared_sums(self, a: Tensor, g: Tensor, share: Tensor) -> Tensor:
        """Return ``|sum_t share_t g_t a_t^T|^2`` ``[B]`` float64, by Gram matrices or by building, as is cheaper."""
        T, d, p = a.shape[1], a.shape[2], g.shape[2]
        by_gram = T * (d + p) <= d * p  # multiplications per record: T^2 (d + p) against T d p
        chunk = max(1, _CHUNK_ELEMENTS // max(1, T * T if by_gram else d * p))
        parts = []
        rows = [torch.split(x, chunk) for x in (a, g, share)]
        for a_part, g_part, s_part in zip(*rows):
            if by_gram:
                # <A A^T, G G^T> = sum_ts (a_t . a_s) (g_t . g_s)
                gram = (a_part @ a_part.mT) * (g_part @ g_part.mT)
                parts.append(((s_part[:, None] @ gram).squeeze(1) * s_part).sum(1).double())
            else:
                parts.append(_record_products(a_part, g_part, s_part).square().sum((1, 2)).double())
        return torch.cat(parts) if parts else share.new_zeros(0, dtype=torch.float64)


class RowScatter:
    """An Embedding weight: record b's gradient has ``sum_{t: id_bt = v} g_bt`` in row v."""

    def __init__(
        self,
        ids: Tensor,  # [B, T] int
        output_grads: Tensor,  # [B, T, p]
        num_rows: int,
        padding_idx: int | None,
    ) -> None:
        B, T = ids.shape
        self._records = B
        self._num_rows = num_rows
        record = torch.arange(B, device=ids.device)[:, None].expand(B, T)
        kept = torch.ones_like(ids, dtype=torch.bool) if padding_idx is None else ids != padding_idx
        # One segment per (record, row) pair that occurs; the gradients of its tokens add up.
        pairs, segment = torch.unique(record[kept] * num_rows + ids[kept], return_inverse=True)
        self._record = pairs // num_rows
        self._row = pairs % num_rows
        grads = torch.zeros(pairs.numel(), output_grads.shape[-1], dtype=torch.float64, device=ids.device)
        self._grads = grads.index_add_(0, segment, output_grads[kept].double())

    def squared_norms(self) -> Tensor:
        squared = self._grads.square().sum(1)
        return squared.new_zeros(self._records).index_add_(0, self._record, squared)

    def weighted_sum(self, factors: Tensor) -> Tensor:
        weights = factors[self._record][:, None].double()
        rows = torch.where(weights > 0, self._grads * weights, torch.zeros_like(self._grads))
        return rows.new_zeros(self._num_rows, rows.shape[1]).index_add_(0, self._row, rows)


def _record_products(a: Tensor, g: Tensor, share: Tensor) -> Tensor:
    """Return ``sum_t share_t g_t a_t^T`` ``[B, p, d]``; the partial sums of long records add up in float64."""
    rows = (share[..., None] * g).split(_MAX_TOKENS_IN_FLOAT32, dim=1)
    products: list[Tensor] = [r.mT @ x for r, x in zip(rows, a.split(_MAX_TOKENS_IN_FLOAT32, dim=1))]
    total = products[0].double() if len(products) > 1 else products[0]
    for product in products[1:]:
        total += product
    return total


def _scaled_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Divide every last-axis row of ``x`` by its largest absolute entry; return those in float64 as well."""
    scale = x.abs().amax(-1)
    return x / _one_where_zero(scale)[..., None], scale.double()


def _one_where_zero(x: Tensor) -> Tensor:
    return torch.where(x == 0, torch.ones_like(x), x)
