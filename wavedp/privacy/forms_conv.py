# SPDX-License-Identifier: Apache-2.0
"""Per-record gradients of a convolution's weight, as outer products of patches that are cut out when needed.

With x the padded input and patch_l(x) what the kernel covers at place l, the gradient of one group's weight is
``dW_b = sum_l g_bl patch_l(x_b)^T``: a Linear layer whose tokens are the places
(Rochette et al. 2020).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from wavedp.privacy.clipping import accumulation_dtype
from wavedp.privacy.per_sample import OuterProducts, places_of_records

_PATCH_ELEMENTS = 1 << 24
"""Patches of so many elements are cut out at once: 64 MiB in float32."""

_MAX_RECORDS_IN_FLOAT32 = 64
_MAX_ROWS_IN_FLOAT32 = 8192
"""What the weighted sum adds up in float32 before it goes on in float64, as ``scaled_weight_grad`` does."""


@dataclass(frozen=True)
class Geometry:
    """What a convolution of 1 to 3 axes does, with zeros as padding."""

    weight_shape: tuple[int, ...]  # [outputs, inputs / groups, *kernel]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def patches(self, x: Tensor) -> Tensor:
        """Return ``[B, groups, places, kernel * inputs / groups]`` of ``[B, inputs, *axes]``."""
        x = F.pad(x, tuple(chain.from_iterable((p, p) for p in reversed(self.padding))))
        # Channels last: a patch is cut out in runs of all its channels, several times faster than number by number.
        x = x.unflatten(1, (self.groups, self.weight_shape[1])).movedim(2, -1).contiguous()
        for axis, (size, step, spread) in enumerate(zip(self.weight_shape[2:], self.stride, self.dilation), start=2):
            x = x.unfold(axis, (size - 1) * spread + 1, step)[..., ::spread]
        axes = len(self.stride)  # [B, groups, *places, inputs, *kernel]
        return x.movedim(2 + axes, -1).flatten(2 + axes).flatten(2, 1 + axes)

    def weights(self, products: Tensor) -> Tensor:
        """Return ``[B, *weight]`` of ``[B, groups, outputs / groups, kernel * inputs / groups]``."""
        outputs, inputs, *kernel = self.weight_shape
        return products.reshape(-1, outputs, *kernel, inputs).movedim(-1, 2)

    def output_rows(self, g: Tensor) -> Tensor:
        """Return ``[B, groups, places, outputs / groups]`` of ``[B, outputs, *places]``."""
        grouped: Tensor = g.flatten(2).unflatten(1, (self.groups, -1))
        return grouped.mT


class Convolution:
    """The weight of a convolution: record b's gradient is never built, and patches only for a few records at once.

    Args:
        inputs: ``[rows, inputs, *axes]``.
        output_grads: ``[rows, outputs, *places]``.
        geometry: the layer's.
        record: ``[rows]`` int64, the record of each row; row b is record b if ``None``.
        records: how many there are then.
    """

    def __init__(
        self,
        inputs: Tensor,
        output_grads: Tensor,
        geometry: Geometry,
        record: Tensor | None = None,
        records: int | None = None,
    ) -> None:
        self.x = inputs
        self.g = output_grads
        self.geometry = geometry
        self._record = record
        self._records = len(inputs) if records is None else records
        self._dtype = accumulation_dtype(torch.promote_types(inputs.dtype, output_grads.dtype))
        self._squared: Tensor | None = None

    def squared_norms(self) -> Tensor:
        if self._squared is None:
            parts = [self._norms(a, g) for a, g in self._rows()]
            self._squared = torch.cat(parts) if parts else self.g.new_zeros(0, dtype=torch.float64)
        return self._squared

    def weighted_sum(self, factors: Tensor) -> Tensor:
        if self._record is not None:
            factors = factors[self._record]
        x, g = self.x, self.g
        kept = factors != 0
        if not bool(kept.all()):
            x, g, factors = x[kept], g[kept], factors[kept]
        places = max(1, g[:1, 0].numel())
        size = max(1, min(_MAX_RECORDS_IN_FLOAT32, _MAX_ROWS_IN_FLOAT32 // places))
        blocks = [self._weight_grad(*block) for block in zip(x.split(size), g.split(size), factors.split(size))]
        if len(blocks) == 1:
            return blocks[0]
        total = torch.zeros(self.geometry.weight_shape, dtype=torch.float64, device=g.device)
        for block in blocks:
            total += block
        return total.to(self._dtype)

    def materialised(self) -> Tensor:
        shape = self.geometry.weight_shape
        parts = [self.geometry.weights(g.mT.to(self._dtype) @ a.to(self._dtype)) for a, g in self._rows()]
        return torch.cat(parts) if parts else self.g.new_zeros(0, *shape, dtype=self._dtype)

    def by_record(self, record: Tensor, records: int) -> "Convolution":
        return Convolution(self.x, self.g, self.geometry, record, records)

    def _weight_grad(self, x: Tensor, g: Tensor, factors: Tensor) -> Tensor:
        geometry = self.geometry
        if 0 in (*x.shape, *g.shape):
            return torch.zeros(geometry.weight_shape, dtype=self._dtype, device=g.device)
        scaled = g.to(self._dtype) * factors.to(self._dtype).reshape(-1, *[1] * (g.ndim - 1))
        _, total, _ = torch.ops.aten.convolution_backward(
            scaled,
            x.to(self._dtype),
            x.new_empty(1, dtype=self._dtype).expand(geometry.weight_shape),  # only its shape is read
            None,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            False,
            (0,) * len(geometry.stride),
            geometry.groups,
            (False, True, False),
        )
        weight_grad: Tensor = total
        return weight_grad

    def _rows(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Patches and output gradients ``[records, groups, rows, width]``, of a few records at a time."""
        each = max(1, self.g[:1, 0].numel() * self.geometry.groups * math.prod(self.geometry.weight_shape[1:]))
        if self._record is None:
            size = max(1, _PATCH_ELEMENTS // each)
            for x, g in zip(self.x.split(size), self.g.split(size)):
                yield self.geometry.patches(x), self.geometry.output_rows(g)
            return
        index, missing = places_of_records(self._record, self._records)
        size = max(1, _PATCH_ELEMENTS // (each * max(1, index.shape[1])))
        for rows, empty in zip(index.split(size), missing.split(size)):
            a = self.geometry.patches(self.x[rows.flatten()])
            g = self.geometry.output_rows(self.g[rows.flatten()])
            yield tuple(_side_by_side(part, empty) for part in (a, g))  # type: ignore[misc]

    def _norms(self, a: Tensor, g: Tensor) -> Tensor:
        squared = OuterProducts(a.flatten(0, 1), g.flatten(0, 1)).squared_norms()
        total: Tensor = squared.unflatten(0, a.shape[:2]).sum(1)
        return total


def _side_by_side(x: Tensor, missing: Tensor) -> Tensor:
    """``[records * K, groups, rows, width]`` as ``[records, groups, K * rows, width]``, missing ones zero."""
    x = x.unflatten(0, missing.shape).masked_fill(missing[:, :, None, None, None], 0)
    return x.transpose(1, 2).flatten(2, 3)
