# SPDX-License-Identifier: Apache-2.0
"""Per-record gradients of one parameter, kept in the form in which they are cheapest.

Each form answers two questions without building ``[B, *parameter]`` where it can: every record's squared
norm, and the sum over records weighted by clipping factors. A factor of 0 takes a record out by selection.
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor

from wavedp.ops import per_sample as ops
from wavedp.privacy.clipping import accumulation_dtype

NORM_ROUNDING = {torch.float32: 2.0**-20, torch.float64: 2.0**-49}
"""Share of ``(sum_t |a_t| |g_t|)^2`` added to a squared norm computed in floating point.

When a record's tokens cancel, the rounding error of its norm is relative to the terms and not to the
result, and a norm that comes out too small would let the record contribute more than C. The share is 16
units in the last place, several times the error measured on cancelling terms; for T uncorrelated tokens it
raises the norm by T * 2^-21.
"""

SMALL = 1 << 12
"""Gradients of at most as many entries a record are put side by side with others."""

LONG = 4096
"""Records of more tokens have their norms taken in float64: the share above would raise them by more than 0.2 %."""

NARROW = 16
"""Products narrower than this are taken in float64: a BLAS adds their rows up one by one in float32, where 64 aligned
records of 128 tokens move by 2^-7 of C when one goes (:mod:`wavedp.privacy.rounding`)."""


class PerSampleGradient(Protocol):
    """The gradients of B records with respect to one parameter."""

    def squared_norms(self) -> Tensor:
        """Return ``[B]`` float64, not less than the squared norms; not finite where a record is not."""

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """Return the sum over records, each times its factor ``[B]``; float32 at least."""

    def materialised(self) -> Tensor:
        """Return ``[B, *parameter]``, whatever it takes."""

    def by_record(self, record: Tensor, records: int) -> "PerSampleGradient":
        """Add up the rows of every record: row i belongs to ``record[i]`` in ``[0, records)``."""


class Materialised:
    """Gradients kept as they are: biases, normalisation weights, and what nothing cheaper is known for."""

    def __init__(self, grads: Tensor) -> None:  # [B, *parameter]
        self.grads = grads
        self._squared: Tensor | None = None

    def squared_norms(self) -> Tensor:
        if self._squared is None:
            self._squared = ops.squared_norms(self.grads)
        return self._squared

    def weighted_sum(self, factors: Tensor) -> Tensor:
        total: Tensor = ops.weighted_sum(self.grads, factors)
        return total

    def materialised(self) -> Tensor:
        return self.grads

    def by_record(self, record: Tensor, records: int) -> "Materialised":
        total = torch.zeros(records, *self.grads.shape[1:], dtype=torch.float64, device=self.grads.device)
        return Materialised(total.index_add_(0, record, self.grads.double()))


def is_small(form: PerSampleGradient) -> TypeGuard[Materialised]:
    """Whether these gradients are kept as they are, and cost the calls on them more than the numbers."""
    return type(form) is Materialised and form.grads.shape[1:].numel() <= SMALL


class Part(Materialised):
    """One of several parameters whose gradients stand side by side, see :func:`side_by_side`."""

    def __init__(self, whole: "Whole", first: int, grads: Tensor) -> None:  # grads: [B, *parameter], a view of whole
        super().__init__(grads)
        self._whole = whole
        self._first = first

    def weighted_sum(self, factors: Tensor) -> Tensor:
        shape = self.grads.shape[1:]
        return self._whole.weighted_sum(factors).narrow(0, self._first, shape.numel()).view(shape).clone()


class Whole(Materialised):
    """Gradients of several parameters side by side, ``[B, entries of all]``: one norm, and one weighted sum for all."""

    def __init__(self, grads: Tensor) -> None:
        super().__init__(grads)
        self._latest: tuple[Tensor, Tensor] | None = None

    def weighted_sum(self, factors: Tensor) -> Tensor:
        if self._latest is None or self._latest[0] is not factors:
            self._latest = factors, super().weighted_sum(factors)
        return self._latest[1]


def side_by_side(forms: Sequence[Materialised]) -> tuple[Whole, list[Part]]:
    """Copy gradients of several parameters, of one type and device, into one tensor; they are views of it then."""
    sizes = [form.grads.shape[1:].numel() for form in forms]
    whole = Whole(torch.cat([form.grads.reshape(len(form.grads), size) for form, size in zip(forms, sizes)], dim=1))
    parts, first = [], 0
    for form, size in zip(forms, sizes):
        parts.append(Part(whole, first, whole.grads.narrow(1, first, size).view(form.grads.shape)))
        first += size
    return whole, parts


class OuterProducts:
    """A Linear weight: record b's gradient is ``sum_t g_bt a_bt^T``, never built."""

    def __init__(
        self,
        activations: Tensor,  # [B, T, d]
        output_grads: Tensor,  # [B, T, p]
    ) -> None:
        self.a = activations
        self.g = output_grads
        self._measured: tuple[Tensor, Tensor] | None = None
        self._squared: Tensor | None = None

    def measure(self, *, bias: bool = False) -> Tensor:
        """Take what :meth:`squared_norms` needs, now that the gradients are in the cache, and ``sum_t g_bt`` if
        ``bias``."""
        a, g = self.a, self.g
        if a.shape[1] > LONG:
            a, g = a.double(), g.double()
        squared, bound, sums = ops.linear_norms(a, g, bias)
        self._measured = squared, bound
        bias_grads: Tensor = sums
        return bias_grads

    def measured(self) -> tuple[Tensor, Tensor]:
        """The squared norms as computed, and ``sum_t |a_t| |g_t|``, both ``[B]`` float64."""
        if self._measured is None:
            self.measure()
        assert self._measured is not None
        return self._measured

    @property
    def rounding(self) -> float:
        """The share of the bound's square that is added to the squared norm."""
        wide = self.a.shape[1] > LONG or torch.float64 in (self.a.dtype, self.g.dtype)
        return NORM_ROUNDING[torch.float64 if wide else torch.float32]

    def squared_norms(self) -> Tensor:
        if self._squared is None:
            self._squared = squared_norms_of_products([self])
        return self._squared

    def transposed(self) -> "OuterProducts":
        """The gradients of the transposed weight, whose norms are the same."""
        products = OuterProducts(self.g, self.a)
        products._measured = self._measured
        return products

    def weighted_sum(self, factors: Tensor) -> Tensor:
        g, a = self.g, self.a
        if min(g.shape[2], a.shape[2]) < NARROW or factors.dtype == torch.float64:
            g, a, factors = g.double(), a.double(), factors.double()
        total: Tensor = ops.scaled_weight_grad(g, a, factors)
        return total

    def materialised(self) -> Tensor:
        dtype = accumulation_dtype(torch.promote_types(self.a.dtype, self.g.dtype))
        return self.g.to(dtype).mT @ self.a.to(dtype)

    def by_record(self, record: Tensor, records: int) -> "OuterProducts":
        # The tokens of all rows of a record stand one after another, those of missing rows being zero.
        index, missing = places_of_records(record, records)
        a, g = (x[index].masked_fill_(missing[:, :, None, None], 0).flatten(1, 2) for x in (self.a, self.g))
        return OuterProducts(a, g)


def squared_norms_of_products(forms: Sequence[OuterProducts]) -> Tensor:
    """The squared norms ``[B]`` of the gradients of several parameters together, of one rounding and device."""
    measured = [form.measured() for form in forms]
    squared = torch.stack([one for one, _ in measured]).clamp_min_(0.0)
    bound = torch.stack([one for _, one in measured])
    return squared.addcmul_(bound, bound, value=forms[0].rounding).sum(0)


def take_norms(form: PerSampleGradient) -> None:
    """Let a form read its gradients for the norms now, while they are in the cache; the rest can wait."""
    if type(form) is not OuterProducts:
        form.squared_norms()
    else:
        form.measured()


class RowScatter:
    """An Embedding weight: record b's gradient has ``sum_{t: id_bt = v} g_bt`` in row v."""

    def __init__(
        self,
        ids: Tensor,  # [B, T] int64
        output_grads: Tensor,  # [B, T, p]
        num_rows: int,
        padding_idx: int | None,
    ) -> None:
        self.ids = ids
        self.g = output_grads
        self.num_rows = num_rows
        self.padding = -1 if padding_idx is None else padding_idx
        self._squared: Tensor | None = None

    def squared_norms(self) -> Tensor:
        if self._squared is None:
            self._squared = ops.embedding_norms(self.ids, self.g, self.padding)
        return self._squared

    def weighted_sum(self, factors: Tensor) -> Tensor:
        total: Tensor = ops.embedding_weight_grad(self.ids, self.g, factors, self.num_rows, self.padding)
        return total

    def materialised(self) -> Tensor:
        g = self.g.to(accumulation_dtype(self.g.dtype))
        g = g.masked_fill((self.ids == self.padding)[..., None], 0)
        dense = g.new_zeros(g.shape[0], self.num_rows, g.shape[2])
        return dense.scatter_add_(1, self.ids[..., None].expand_as(g), g)

    def by_record(self, record: Tensor, records: int) -> "RowScatter":
        index, missing = places_of_records(record, records)
        ids = self.ids[index].flatten(1, 2)
        g = self.g[index].masked_fill_(missing[:, :, None, None], 0).flatten(1, 2)
        return RowScatter(ids, g, self.num_rows, None if self.padding < 0 else self.padding)


class TiedEmbedding:
    """One matrix as Embedding and as Linear weight: ``|E + H|^2 = |E|^2 + |H|^2 + 2 <E, H>``.

    ``<E, H> = sum_ts h_s[id_t] (e_t . a_s)`` with e the gradient at the embedding's output, h that at the Linear's
    output and a the Linear's input (Ding et al. 2024, "phantom clipping").
    """

    def __init__(self, embedding: RowScatter, linear: OuterProducts) -> None:
        self._embedding = embedding
        self._linear = linear

    def squared_norms(self) -> Tensor:
        e, h = self._embedding, self._linear
        total = e.squared_norms() + h.squared_norms() + 2.0 * self._cross()
        lengths = e.g.double().norm(dim=-1).sum(1) * (h.g.double().norm(dim=-1) * h.a.double().norm(dim=-1)).sum(1)
        bound: Tensor = total.clamp_min(0.0) + NORM_ROUNDING[torch.float64] * lengths
        return bound

    def weighted_sum(self, factors: Tensor) -> Tensor:
        return self._embedding.weighted_sum(factors) + self._linear.weighted_sum(factors)

    def materialised(self) -> Tensor:
        return self._embedding.materialised() + self._linear.materialised()

    def by_record(self, record: Tensor, records: int) -> "TiedEmbedding":
        return TiedEmbedding(self._embedding.by_record(record, records), self._linear.by_record(record, records))

    def _cross(self) -> Tensor:
        e, h = self._embedding, self._linear
        ids = e.ids.clamp(0, e.num_rows - 1)
        parts = []
        for i in range(len(ids)):  # a record at a time: [S, T] and nothing larger
            picked = h.g[i].double()[:, ids[i]]  # [S, T]
            grads = e.g[i].double().masked_fill((e.ids[i] == e.padding)[:, None], 0)
            parts.append((picked * (h.a[i].double() @ grads.mT)).sum())
        return torch.stack(parts) if parts else e.g.new_zeros(0, dtype=torch.float64)


def combined(forms: Sequence[PerSampleGradient]) -> PerSampleGradient:
    """The sum of several uses of one parameter by the same records, cross terms included."""
    if len(forms) == 1:
        return forms[0]
    outer = [form for form in forms if isinstance(form, OuterProducts)]
    scatter = [form for form in forms if isinstance(form, RowScatter)]
    same_rows = len({(form.num_rows, form.padding) for form in scatter}) <= 1
    if len(outer) + len(scatter) == len(forms) and same_rows:
        linear = _joined_products(outer) if outer else None
        embedding = _joined_scatters(scatter) if scatter else None
        if linear is None or embedding is None:
            return linear or embedding or forms[0]
        return TiedEmbedding(embedding, linear)
    kind: Any = type(forms[0])
    if hasattr(kind, "joined") and all(type(form) is kind for form in forms):
        joined: PerSampleGradient | None = kind.joined(forms)
        if joined is not None:
            return joined
    return Materialised(torch.stack([form.materialised().double() for form in forms]).sum(0))


def _joined_products(forms: Sequence[OuterProducts]) -> OuterProducts:
    if len(forms) == 1:
        return forms[0]
    return OuterProducts(torch.cat([f.a for f in forms], dim=1), torch.cat([f.g for f in forms], dim=1))


def _joined_scatters(forms: Sequence[RowScatter]) -> RowScatter:
    if len(forms) == 1:
        return forms[0]
    ids = torch.cat([form.ids for form in forms], dim=1)
    g = torch.cat([form.g for form in forms], dim=1)
    return RowScatter(ids, g, forms[0].num_rows, None if forms[0].padding < 0 else forms[0].padding)


def places_of_records(record: Tensor, records: int) -> tuple[Tensor, Tensor]:
    """For every record its rows ``[records, K]``, and which of these places are empty."""
    counts = torch.bincount(record, minlength=records)
    order = torch.argsort(record, stable=True)
    widest = int(counts.max()) if records else 0
    column = torch.arange(widest, device=record.device)
    place = (counts.cumsum(0) - counts)[:, None] + column
    missing = column >= counts[:, None]
    return order[place.masked_fill(missing, 0)], missing
