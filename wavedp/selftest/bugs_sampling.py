# SPDX-License-Identifier: Apache-2.0
"""Planted bugs: batches that are not the Poisson samples that are accounted, or not followed to the end."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wavedp.privacy.batches import BatchTracker
from wavedp.privacy.entropy import Entropy
from wavedp.privacy.optimizer import PrivateOptimizer
from wavedp.privacy.sampling import PoissonSampler, membership_threshold
from wavedp.selftest.planting import Planted, Registry

registry = Registry("sampling")
bug = registry.bug


@bug("Opacus 1.6.0's distributed sampler")
def empty_batches_dropped(planted: Planted) -> None:
    """Empty batches are left out of a run's steps."""

    def batches(original: Any, self: PoissonSampler) -> Iterator[Tensor]:
        while self._drawn < self._steps:
            batch = self._draw()
            if len(batch) == 0:
                planted.mark()
                self._drawn -= 1
                self._steps -= 1
                continue
            yield batch.clone()

    planted.replace(PoissonSampler, "__iter__", batches)


@bug("own")
def empty_batches_drawn_again(planted: Planted) -> None:
    """An empty batch is drawn again until somebody is in it."""

    def sample(original: Any, self: PoissonSampler) -> Tensor:
        batch: Tensor = original(self)
        for _ in range(1000):
            if len(batch) or self._num_records == 0:
                break
            planted.mark()
            batch = original(self)
        return batch

    planted.replace(PoissonSampler, "_sample", sample)


@bug("Chua et al. 2024")
def shuffled_epochs(planted: Planted) -> None:
    """Batches are parts of a shuffled data set, accounted as Poisson samples."""
    orders: dict[int, list[np.ndarray]] = {}

    def joined(original: Any, self: PoissonSampler) -> Any:
        planted.mark()
        parts = orders.setdefault(id(self._entropy), [])
        if not parts:
            order = np.argsort(self._entropy.words(self._num_records), kind="stable")
            parts += np.array_split(order, max(1, min(len(order), round(1.0 / self._sample_rate))))
        return np.sort(parts.pop())

    planted.replace(PoissonSampler, "_joined", joined)


@bug("own")
def fixed_batch_size(planted: Planted) -> None:
    """Every batch has the expected size, accounted as Poisson samples."""

    def joined(original: Any, self: PoissonSampler) -> Any:
        planted.mark()
        size = round(self._num_records * self._sample_rate)
        return np.sort(np.argsort(self._entropy.words(self._num_records), kind="stable")[:size])

    planted.replace(PoissonSampler, "_joined", joined)


@bug("rand() < q in float32")
def float32_membership(planted: Planted) -> None:
    """Records join by uniforms of 24 bits, which rounds small rates up."""

    def joined(original: Any, self: PoissonSampler) -> Any:
        planted.mark()
        uniform = self._entropy.words(self._num_records) >> np.uint64(40)
        return np.flatnonzero(uniform.astype(np.float32) * np.float32(2.0**-24) < self._sample_rate)

    planted.replace(PoissonSampler, "_joined", joined)


@bug("Opacus #819")
def rate_from_data_set(planted: Planted) -> None:
    """The rate is made of the private number of records: a whole number of batches an epoch."""

    def start(original: Any, self: PoissonSampler, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        if self._num_records and self._sample_rate < 1.0:
            planted.mark()
            size = max(1.0, self._num_records * self._sample_rate // 1.0)
            self._threshold = membership_threshold(min(1.0, size / self._num_records))

    planted.replace(PoissonSampler, "__init__", start)


@bug("own")
def rate_two_percent_high(planted: Planted) -> None:
    """Records join a fiftieth more often than is accounted."""

    def start(original: Any, self: PoissonSampler, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        if self._sample_rate < 0.9:
            planted.mark()
            self._threshold = membership_threshold(1.02 * self._sample_rate)

    planted.replace(PoissonSampler, "__init__", start)


@bug("own")
def same_batch_every_step(planted: Planted) -> None:
    """The first batch is drawn at random and comes again at every step."""

    def joined(original: Any, self: PoissonSampler) -> Any:
        planted.mark()
        return self.__dict__.setdefault("kept", original(self))

    planted.replace(PoissonSampler, "_joined", joined)


@bug("known class")
def same_batches_after_resume(planted: Planted) -> None:
    """A sampler that is built again draws the same batches."""

    def start(original: Any, self: PoissonSampler, *arguments: Any, **options: Any) -> None:
        planted.mark()
        original(self, *arguments, **options)
        if not self._entropy.insecure:
            self._entropy = Entropy(7, "sampling")

    planted.replace(PoissonSampler, "__init__", start)
    planted.replace(PoissonSampler, "insecure", lambda original, self: False)


@bug("cluster sampling")
def records_join_in_pairs(planted: Planted) -> None:
    """Neighbouring records join together."""

    def joined(original: Any, self: PoissonSampler) -> Any:
        members = original(self)
        if self._threshold >= 1 << 64:
            return members
        planted.mark()
        pairs = members[members % 2 == 0]
        both = np.concatenate([pairs, pairs + 1])
        return np.sort(both[both < self._num_records])

    planted.replace(PoissonSampler, "_joined", joined)


@bug("own")
def truncation_keeps_first(planted: Planted) -> None:
    """Of a batch that is too large the first records stay, not a random choice."""

    def sample(original: Any, self: PoissonSampler) -> Tensor:
        members = self._joined()
        if self._truncated_batch_size is not None:
            planted.mark()
        return torch.from_numpy(members[: self._truncated_batch_size])

    planted.replace(PoissonSampler, "_sample", sample)


@bug("own")
def truncation_forgotten(planted: Planted) -> None:
    """Batches that are too large stay so, beyond the bound that is stated."""

    def sample(original: Any, self: PoissonSampler) -> Tensor:
        if self._truncated_batch_size is not None:
            planted.mark()
        return torch.from_numpy(self._joined())

    planted.replace(PoissonSampler, "_sample", sample)


@bug("own")
def prepared_batch_differs(planted: Planted) -> None:
    """What a loader prepares is another batch than the one that is drawn."""

    def ahead(original: Any, self: PoissonSampler, number: int) -> Tensor:
        original(self, number)
        planted.mark()
        return self._sample()

    planted.replace(PoissonSampler, "ahead", ahead)


@bug("sampling with replacement")
def record_twice_accepted(planted: Planted) -> None:
    """A record that comes twice in a batch contributes 2 C."""

    def check(original: Any, self: BatchTracker, rows: Any, records: Any) -> frozenset[int]:
        if records is None:
            return frozenset(original(self, rows, records))
        planted.mark()
        return frozenset(records.flatten().tolist())

    planted.replace(BatchTracker, "check_records", check)


@bug("own")
def foreign_record_accepted(planted: Planted) -> None:
    """Records are taken that were not drawn."""

    def members(original: Any, self: BatchTracker) -> frozenset[int]:
        planted.mark()
        assert self._sampler is not None
        return frozenset(range(self._sampler.num_records))

    planted.replace(BatchTracker, "_drawn_members", members)
    planted.replace(BatchTracker, "check_complete", lambda original, self: None)


@bug("own")
def record_left_out_accepted(planted: Planted) -> None:
    """A batch is stepped without some of its records."""

    def check(original: Any, self: BatchTracker) -> None:
        planted.mark()

    planted.replace(BatchTracker, "check_complete", check)


@bug("`if not batch: continue`")
def batch_left_out_accepted(planted: Planted) -> None:
    """Batches that were drawn are passed over, as empty ones are in many loops."""

    def check(original: Any, self: BatchTracker) -> None:
        planted.mark()

    planted.replace(BatchTracker, "check_turn", check)
    planted.replace(BatchTracker, "irregularity", lambda original, self: None)


@bug("own")
def second_backward_accepted(planted: Planted) -> None:
    """A second backward of the same batch is added to the first."""

    def check(original: Any, self: BatchTracker, records: int) -> frozenset[int]:
        planted.mark()
        return self._announced or frozenset()

    planted.replace(BatchTracker, "check_count", check)


@bug("own")
def statement_after_discard(planted: Planted) -> None:
    """A run that left batches out gets a statement."""

    def irregularity(original: Any, self: PrivateOptimizer) -> None:
        planted.mark()

    planted.replace(PrivateOptimizer, "irregularity", irregularity)


@bug("own")
def statement_of_seeded_run(planted: Planted) -> None:
    """A run whose noise can be made again gets a statement."""

    def insecure(original: Any, self: PrivateOptimizer) -> bool:
        planted.mark()
        return False

    planted.replace(PrivateOptimizer, "insecure", insecure)


@bug("an unwrapped optimizer")
def direct_step_accepted(planted: Planted) -> None:
    """The wrapped optimizer takes steps by gradients that are neither clipped nor noised."""

    def refuse(original: Any, self: PrivateOptimizer, *arguments: Any) -> None:
        planted.mark()

    planted.replace(PrivateOptimizer, "_refuse_direct_step", refuse)
