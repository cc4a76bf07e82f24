# SPDX-License-Identifier: Apache-2.0
"""What one backward pass booked, and its clipping: norms, factors, and the sums of clipped gradients."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from wavedp.errors import InvalidTypeError, InvalidValueError, StateError
from wavedp.privacy.clipping import Clipping, accumulation_dtype
from wavedp.privacy.per_sample import (
    Materialised,
    OuterProducts,
    Part,
    PerSampleGradient,
    combined,
    is_small,
    side_by_side,
    squared_norms_of_products,
    take_norms,
)

LARGEST_IN_FLOAT32 = 2.0**20
"""Factors above this are not multiplied in float32. Clipping factors are 1 at most, times the rows of a mean."""


_SAME = 2.0**-12
"""Share of a squared norm by which two backwards may differ: their sums may be taken in another order."""


class RecordMap:
    """Which rows of a batch belong to the same record; a record's loss is the mean over its rows.

    Args:
        sample_id: ``[rows]`` int64, equal where the record is the same; its values do not matter otherwise.
    """

    def __init__(self, sample_id: Tensor) -> None:
        if sample_id.dtype != torch.int64 or sample_id.ndim != 1:
            raise InvalidTypeError(
                f"sample_id must be an int64 tensor [rows], got {sample_id.dtype} {tuple(sample_id.shape)}"
            )
        self.ids, self.index, counts = torch.unique(sample_id, return_inverse=True, return_counts=True)
        self.rows = len(sample_id)
        self.records = len(self.ids)
        self._weights = 1.0 / counts.double()[self.index]

    def check_rows(self, rows: int) -> None:
        """Raise a ValueError unless the map is of a batch of ``rows``."""
        if rows != self.rows:
            raise InvalidValueError(
                f"sample_id has {self.rows} rows, the batch has {rows}: it names the record of every row"
            )

    def weighted(self, output_grads: Tensor) -> Tensor:
        """Divide every row of ``[rows, ...]`` by the number of rows that its record has."""
        weights = self._weights.to(output_grads.device, torch.promote_types(output_grads.dtype, torch.float32))
        weighted: Tensor = output_grads * weights.reshape(-1, *[1] * (output_grads.ndim - 1))
        return weighted


class Bookings:
    """The per-record gradients that one backward booked, by the model's parameter names.

    Args:
        record_map: the records of the rows; every row its own if ``None``.
        norms_only: keep no more than the norms of a parameter's only use; a second backward adds it up then.
    """

    def __init__(self, record_map: RecordMap | None = None, *, norms_only: bool = False) -> None:
        self.record_map = record_map
        self.rows: int | None = None
        self._norms_only = norms_only
        self._forms: dict[str, list[PerSampleGradient]] = {}
        self._left: dict[str, Tensor] = {}  # squared norms of what a second backward adds up

    def add(self, name: str, form: PerSampleGradient, *, alone: bool) -> None:
        """Book one use of a parameter; ``alone`` promises that it is the only one, so its norms are taken at once.

        What is booked was just computed and is in the cache then; small gradients wait for others.
        """
        form = self.of_records(form)
        if alone and self._norms_only:
            self._left[name] = form.squared_norms()
            return
        if alone and not is_small(form):
            take_norms(form)
        self._forms.setdefault(name, []).append(form)

    def of_records(self, form: PerSampleGradient) -> PerSampleGradient:
        """The gradients of records, where those of rows are given."""
        return form if self.record_map is None else form.by_record(self.record_map.index, self.record_map.records)

    @property
    def records(self) -> int:
        """Records that were booked."""
        return (self.rows or 0) if self.record_map is None else self.record_map.records

    @property
    def left(self) -> frozenset[str]:
        """Parameters that a second backward has to add up."""
        return frozenset(self._left)

    def check_same_norms(self, name: str, form: PerSampleGradient) -> None:
        """Raise a RuntimeError if a second backward made other gradients than those whose norms were taken."""
        first, second = self._left[name], form.squared_norms()
        same = (first - second).abs() <= _SAME * first
        if not bool((same | (~first.isfinite() & ~second.isfinite())).all()):
            raise StateError(
                f"the two backwards gave parameter {name!r} different gradients, so its norms do not bound its sum: "
                f"something in the model differs from run to run, such as dropout in a checkpoint without "
                f"preserve_rng_state; correct that, or use one backward"
            )

    def squared_norms(self, clipping: Clipping, scale: float, device: torch.device) -> dict[str, Tensor]:
        """Every record's squared norm ``[B]`` float64 in each clipping group that was reached; joins the uses."""
        small: dict[tuple[str, torch.dtype, torch.device], dict[str, Materialised]] = {}
        products: dict[tuple[str, float, torch.device], list[OuterProducts]] = {}
        squares: dict[str, list[Tensor]] = {}
        for name, forms in self._forms.items():
            self._forms[name] = [form] = [combined(forms)]
            group = clipping.group_of(name)
            if is_small(form):
                small.setdefault((group, form.grads.dtype, form.grads.device), {})[name] = form
            elif type(form) is OuterProducts:
                products.setdefault((group, form.rounding, form.g.device), []).append(form)
            else:
                squares.setdefault(group, []).append(form.squared_norms())
        for (group, _, _), of_kind in products.items():
            squares.setdefault(group, []).append(squared_norms_of_products(of_kind))
        for (group, _, _), together in small.items():
            whole, parts = side_by_side(list(together.values()))
            self._forms.update((name, [part]) for name, part in zip(together, parts))
            squares.setdefault(group, []).append(whole.squared_norms())
        for name, squared in self._left.items():
            squares.setdefault(clipping.group_of(name), []).append(squared)
        return {
            group: torch.stack([squared.to(device) for squared in found]).sum(0) * (scale * scale)
            for group, found in squares.items()
        }

    def clipped_sums(self, factors: "Factors") -> dict[str, Tensor]:
        """The sums over records of clipped gradients, by parameter; empties the bookings."""
        sums = {}
        # What was booked last may still be in the cache. Small ones come together, at the end: the interpreter's own
        # memory is in the cache then, and between large ones it is not.
        newest_first = list(self._forms)[::-1]
        for name in sorted(newest_first, key=lambda name: isinstance(self._forms[name][0], Part)):
            (form,) = self._forms.pop(name)
            sums[name] = factors.clipped_sum(name, form)
        return sums


class Factors:
    """The clipping factors of the records of one backward, times ``scale``.

    Args:
        parameters: the model's trainable parameters by name.
        clipping: the rule.
        norms: squared norms by clipping group, scaled.
        scale: what gradients as booked are multiplied by.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], clipping: Clipping, norms: Mapping[str, Tensor], scale: float
    ) -> None:
        self._parameters = parameters
        self._clipping = clipping
        self._norms = norms
        self._scale = scale
        self._by_dtype: dict[torch.dtype, dict[str, Tensor]] = {}
        self._at: dict[tuple[torch.dtype, str, torch.device], Tensor] = {}  # one tensor each, which Whole asks for

    def clipped_sum(self, name: str, form: PerSampleGradient) -> Tensor:
        """The sum over records of the clipped gradients of one parameter, in its shape."""
        parameter = self._parameters[name]
        place = parameter.dtype, self._clipping.group_of(name), parameter.device
        factors = self._at.get(place)
        if factors is None:
            wide = accumulation_dtype(parameter.dtype)
            if wide not in self._by_dtype:
                self._by_dtype[wide] = _scaled(self._clipping.group_factors(self._norms, wide), self._scale)
            factors = self._at[place] = self._by_dtype[wide][place[1]].to(place[2])
        total = form.weighted_sum(factors)
        return total if total.shape == parameter.shape else total.reshape(parameter.shape)


def _scaled(factors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Factors times ``scale``; in float64, and the sums with them, where a product with a gradient might overflow."""
    scaled = {group: one.double() * scale for group, one in factors.items()}
    if any(bool((one > LARGEST_IN_FLOAT32).any()) for one in scaled.values()):
        return scaled
    return {group: one.to(factors[group].dtype) for group, one in scaled.items()}
