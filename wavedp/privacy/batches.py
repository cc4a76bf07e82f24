# SPDX-License-Identifier: Apache-2.0
"""Holds a run to the mechanism that is accounted: every drawn batch stepped, in order, once, whole."""

import torch
from torch import Tensor

from wavedp.errors import InvalidTypeError, InvalidValueError, StateError
from wavedp.privacy.sampling import PoissonSampler
from wavedp.privacy.spec import PrivacySpec


def check_sampler(sampler: PoissonSampler, spec: PrivacySpec, steps_left: int) -> None:
    """Raise a TypeError or ValueError unless ``sampler`` draws what ``spec`` accounts for, and has not drawn yet; a
    RuntimeError if it serves another run."""
    if type(sampler) is not PoissonSampler:
        raise InvalidTypeError(f"sampler must be a PoissonSampler, and no subclass of it, got {type(sampler).__name__}")
    if sampler.sample_rate != spec.sample_rate:
        raise InvalidValueError(f"the sampler draws at {sampler.sample_rate}, the accounting is for {spec.sample_rate}")
    if sampler.truncated_batch_size != spec.truncated_batch_size:
        raise InvalidValueError(
            f"the sampler cuts batches to {sampler.truncated_batch_size}, the accounting is for "
            f"{spec.truncated_batch_size}; build it by PoissonSampler.for_spec"
        )
    if sampler.num_records > spec.dataset_size_bound:
        raise InvalidValueError(f"the data set has more records than dataset_size_bound={spec.dataset_size_bound}")
    sampler.check_free()
    if sampler.drawn:
        raise InvalidValueError(f"the sampler already drew {sampler.drawn} batches; build a fresh one")
    if sampler.steps > steps_left:
        raise InvalidValueError(
            f"the sampler has {sampler.steps} steps, of which {steps_left} are left; build it with steps={steps_left}"
        )


class BatchTracker:
    """Follows the logical batches of one run, against the sampler that draws them if there is one.

    Args:
        sampler: a fresh sampler; without it, order and completeness cannot be checked.
        record_bound: indices are below it.
    """

    def __init__(self, sampler: PoissonSampler | None, record_bound: int) -> None:
        self._sampler = sampler
        self._record_bound = record_bound if sampler is None else sampler.num_records
        self._finished = 0  # of the drawn batches, those stepped or dropped
        self._booked: set[int] = set()
        self._announced: frozenset[int] | None = None
        self._members: tuple[int, frozenset[int]] = (0, frozenset())
        self._failed = False
        self._dropped = False
        self._stepped_after_drop = False
        self.pending = False

    def check_turn(self) -> None:
        """Raise unless the batch that was drawn last is the one to work on.

        Raises:
            RuntimeError: a backward failed in it, nothing was drawn, or a batch before it was left out.
        """
        if self._failed:
            raise StateError(
                "backward() failed in this batch, so what it booked may be incomplete: call discard(); after a "
                "discarded batch, further steps get no privacy statement"
            )
        if self._sampler is None:
            return
        waiting = self._sampler.drawn - self._finished
        if waiting < 1:
            raise StateError("the sampler drew no batch since the last step(): take the next one from iter(sampler)")
        if waiting > 1 or self._sampler.last_batch is None:
            raise StateError(
                f"{waiting} batches were drawn and not stepped. Call step() for every batch before the next is "
                f"drawn, for empty ones too: no continue, no list(sampler), no loader that prefetches. discard() "
                f"gives the waiting batches up; further steps then get no privacy statement"
            )

    def check_records(self, rows: int | None, records: Tensor | None) -> frozenset[int]:
        """Return the indices of a micro-batch of ``rows`` records, after checking that they may be added to the batch.

        Raises:
            TypeError: ``records`` is missing though there is a sampler, or is not an int64 tensor.
            ValueError: the number differs, or an index is out of range, was not drawn, or comes twice.
        """
        if records is None:
            if self._sampler is not None:
                raise InvalidTypeError(
                    "pass records=, the micro-batch's indices: they are checked against the drawn batch"
                )
            return frozenset()
        if not isinstance(records, Tensor) or records.dtype != torch.int64:
            kind = records.dtype if isinstance(records, Tensor) else type(records).__name__
            raise InvalidTypeError(f"records must be an int64 tensor of record indices, got {kind}")
        if rows is not None and tuple(records.shape) != (rows,):
            raise InvalidValueError(f"records has shape {tuple(records.shape)}, losses are of {rows} records")
        indices = frozenset(records.flatten().tolist())
        if len(indices) != records.numel() or indices & self._booked:
            raise InvalidValueError("a record comes twice in one logical batch and would contribute twice the bound")
        if indices and not 0 <= min(indices) <= max(indices) < self._record_bound:
            raise InvalidValueError(f"records holds indices outside of [0, {self._record_bound})")
        if self._sampler is not None and not indices <= self._drawn_members():
            raise InvalidValueError("records holds indices that are not in the batch that the sampler drew last")
        return indices

    @property
    def announced(self) -> bool:
        """Whether it was said which records are next."""
        return self._announced is not None

    def announce(self, records: Tensor) -> None:
        """Note the indices of the micro-batch that the next plain backward, which cannot name them, is about.

        Raises:
            TypeError, ValueError: as :meth:`check_records`.
        """
        self._announced = self.check_records(None, records)

    def check_count(self, records: int) -> frozenset[int]:
        """Return the announced indices for a backward of ``records`` records, which uses them up.

        Without a sampler and without an announcement, one backward per logical batch is taken.

        Raises:
            RuntimeError: none or another number were announced, or a backward of this batch went before.
        """
        if self._announced is None:
            if self._sampler is None and not self.pending:
                return frozenset()
            raise StateError(
                "a second backward of the same records would let each contribute twice the bound. Sum losses before "
                "one backward; set sample_id where a record has several rows; take micro-batches from the loader "
                "(physical_batch_size), or name their records by announce(records) before each backward"
            )
        if records != len(self._announced):
            raise StateError(
                f"a backward of {records} records, where {len(self._announced)} are next: the loss has to be about all "
                f"records that the loader yielded, one row each unless sample_id says otherwise"
            )
        indices, self._announced = self._announced, None
        return indices

    def check_complete(self) -> None:
        """Raise a RuntimeError unless the records booked are exactly the batch that was drawn."""
        if self._sampler is None:
            return
        members = self._drawn_members()
        if self._booked != members:
            raise StateError(
                f"{len(members - self._booked)} of the {len(members)} records of the drawn batch were not passed to "
                f"backward(): pass the missing micro-batches, or discard() the batch"
            )

    def add(self, indices: frozenset[int]) -> None:
        """Note records whose clipped gradients were added."""
        self._booked |= indices
        if self._announced is not None and self._announced & indices:
            self._announced = None

    def fail(self) -> None:
        """Note that a backward failed; :meth:`drop` is all that remains for the batch."""
        self._failed = True

    def stepped(self) -> None:
        """Note that the batch was released."""
        self._stepped_after_drop |= self._dropped
        self._finish()

    def drop(self) -> None:
        """Give up what was begun, and every drawn batch that was not stepped."""
        waiting = self._sampler is not None and self._sampler.drawn > self._finished
        self._dropped |= waiting or self.pending
        self._finish()

    def irregularity(self) -> str | None:
        """Return why the run was not the accounted mechanism, or ``None``; a cut off end is no reason."""
        if self._sampler is None:
            return "batches were not checked: pass sampler= to PrivateOptimizer, and iterate over that sampler"
        if self._stepped_after_drop:
            return (
                "steps were taken after a batch was discarded or failed: leaving batches out is not the "
                "mechanism that is accounted"
            )
        waiting = self._sampler.drawn - self._finished
        if waiting > 1:
            return f"{waiting} batches were drawn and not stepped; every batch must be, empty ones included"
        return None

    def _finish(self) -> None:
        self._booked.clear()
        self._announced = None
        self._failed = False
        self.pending = False
        if self._sampler is not None:
            self._finished = self._sampler.drawn

    def _drawn_members(self) -> frozenset[int]:
        assert self._sampler is not None
        if self._members[0] != self._sampler.drawn:
            batch = self._sampler.last_batch
            self._members = (self._sampler.drawn, frozenset() if batch is None else frozenset(batch.tolist()))
        return self._members[1]
