# SPDX-License-Identifier: Apache-2.0
"""Per-record gradients of a parameter whose rows are used apart, as the projections of an attention layer."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from wavedp.privacy.per_sample import PerSampleGradient, combined


class RowBlocks:
    """A form for each of several blocks of rows of one parameter; the gradient is zero in its other rows."""

    def __init__(self, blocks: Mapping[tuple[int, int], PerSampleGradient], num_rows: int) -> None:
        self.blocks = dict(sorted(blocks.items()))  # (first row, row after the last) -> that block's gradients
        self.num_rows = num_rows

    def squared_norms(self) -> Tensor:
        return torch.stack([form.squared_norms() for form in self.blocks.values()]).sum(0)

    def weighted_sum(self, factors: Tensor) -> Tensor:
        sums = {rows: form.weighted_sum(factors) for rows, form in self.blocks.items()}
        return self._assembled(sums, axis=0)

    def materialised(self) -> Tensor:
        return self._assembled({rows: form.materialised() for rows, form in self.blocks.items()}, axis=1)

    def by_record(self, record: Tensor, records: int) -> "RowBlocks":
        return RowBlocks({rows: f.by_record(record, records) for rows, f in self.blocks.items()}, self.num_rows)

    @staticmethod
    def joined(forms: Sequence["RowBlocks"]) -> "RowBlocks | None":
        """The sum of several uses, or ``None`` where their blocks overlap without being the same."""
        uses: dict[tuple[int, int], list[PerSampleGradient]] = {}
        for form in forms:
            for rows, block in form.blocks.items():
                uses.setdefault(rows, []).append(block)
        edges = sorted(uses)
        if any(after[0] < before[1] for before, after in pairwise(edges)):
            return None
        return RowBlocks({rows: combined(blocks) for rows, blocks in uses.items()}, forms[0].num_rows)

    def _assembled(self, parts: dict[tuple[int, int], Tensor], axis: int) -> Tensor:
        like = next(iter(parts.values()))
        shape = (*like.shape[:axis], self.num_rows, *like.shape[axis + 1 :])
        total = like.new_zeros(shape)
        for (first, last), part in parts.items():
            total.narrow(axis, first, last - first).copy_(part)
        return total
