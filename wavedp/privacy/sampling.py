# SPDX-License-Identifier: Apache-2.0
"""Poisson sampling: at every step each record joins the batch independently with the public sample rate.

Truncated (arXiv 2508.15089): of a batch that comes out larger than a public bound, a uniformly random choice stays.
"""

from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wavedp.errors import InvalidTypeError, InvalidValueError, StateError
from wavedp.privacy.entropy import Entropy
from wavedp.privacy.validation import check_integer, check_real

if TYPE_CHECKING:
    from wavedp.privacy.spec import PrivacySpec

_CHUNK = 1 << 20
_WORD_RANGE = 1 << 64


def membership_threshold(sample_rate: float) -> int:
    """Return ``floor(sample_rate * 2^64)``, exactly: a record is in when its 64-bit word is below it.

    The realised rate is below ``sample_rate`` by less than 2^-64; comparing a float32 uniform would round
    it up to a multiple of 2^-24, which at a rate of 1e-7 is 19 % more than what is accounted.
    """
    sample_rate = check_real("sample_rate", sample_rate, above=0.0, at_most=1.0)
    return int(Fraction(sample_rate) * _WORD_RANGE)


class PoissonSampler:
    """Yields ``steps`` batches of record indices, each an independent Poisson sample.

    A batch is an int64 tensor of distinct indices in increasing order, and may be empty: an empty batch is
    a step like any other and must be stepped and charged. The sampler draws each of its steps once;
    iterating again goes on where it stopped. Nothing of its state can be saved or copied: a resumed run samples
    afresh, and so does every other run, since two that step the same batches cost more than the sum of both.

    The one :class:`~wavedp.privacy.PrivateOptimizer` built with the sampler accepts the batch drawn last and no
    other, so iteration cannot run ahead (no ``list(sampler)``, no prefetching loader); :meth:`ahead` tells a loader
    what to prepare.

    Args:
        num_records: records in the private data set. It is used for nothing but drawing the indices.
        sample_rate: the public probability q in (0, 1], from the :class:`~wavedp.privacy.PrivacySpec`;
            never computed from ``num_records``, which is a property of the private data.
        steps: number of batches.
        truncated_batch_size: records at most in a batch, a public constant; ``None``: as many as come.
        insecure_seed: for debugging: batches become reproducible and the run gets no privacy statement.

    Raises:
        TypeError, ValueError: an argument of a wrong type or out of range.
    """

    def __init__(
        self,
        num_records: int,
        sample_rate: float,
        steps: int,
        *,
        truncated_batch_size: int | None = None,
        insecure_seed: int | None = None,
    ) -> None:
        self._num_records = check_integer("num_records", num_records)
        self._sample_rate = check_real("sample_rate", sample_rate, above=0.0, at_most=1.0)
        self._steps = check_integer("steps", steps)
        self._truncated_batch_size = truncated_batch_size
        if truncated_batch_size is not None:
            self._truncated_batch_size = check_integer("truncated_batch_size", truncated_batch_size, at_least=1)
        self._threshold = membership_threshold(self._sample_rate)
        self._entropy = Entropy(insecure_seed, "sampling")
        self._drawn = 0
        self._ahead: deque[Tensor] = deque()
        self._last_batch: Tensor | None = None
        self._serves = False

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise InvalidTypeError("a PoissonSampler cannot be copied or pickled: build one for every run")

    @classmethod
    def for_spec(
        cls,
        spec: "PrivacySpec",
        num_records: int,
        *,
        steps: int | None = None,
        insecure_seed: int | None = None,
    ) -> "PoissonSampler":
        """Build the sampler that ``spec`` accounts for; ``steps`` is what is left of it in a resumed run.

        Raises:
            ValueError: there are more records than the public bound for which delta was chosen, or more
                steps than the specification has.
        """
        if num_records > spec.dataset_size_bound:
            raise InvalidValueError(
                f"the data set has more records than dataset_size_bound={spec.dataset_size_bound}; delta was "
                f"chosen for that bound: raise the bound, and lower delta below its inverse"
            )
        steps = spec.steps if steps is None else check_integer("steps", steps, at_most=spec.steps)
        return cls(
            num_records,
            spec.sample_rate,
            steps,
            truncated_batch_size=spec.truncated_batch_size,
            insecure_seed=insecure_seed,
        )

    @property
    def num_records(self) -> int:
        """Records in the private data set."""
        return self._num_records

    @property
    def sample_rate(self) -> float:
        """The probability with which each record joins each batch."""
        return self._sample_rate

    @property
    def truncated_batch_size(self) -> int | None:
        """Records at most in a batch; ``None``: as many as come."""
        return self._truncated_batch_size

    @property
    def steps(self) -> int:
        """Batches in all, drawn and to be drawn."""
        return self._steps

    @property
    def insecure(self) -> bool:
        """Whether the batches can be reproduced from a seed."""
        return self._entropy.insecure

    @property
    def drawn(self) -> int:
        """Batches drawn so far."""
        return self._drawn

    @property
    def last_batch(self) -> Tensor | None:
        """A copy of the batch drawn last, ``None`` before the first."""
        return None if self._last_batch is None else self._last_batch.clone()

    def ahead(self, number: int) -> Tensor:
        """Return batch ``number``, counted from 0, before iteration reaches it, so that its data can be prepared.

        It counts as drawn when iteration reaches it, and is the same batch then.

        Raises:
            IndexError: the batch was drawn already, or there is none of that number.
        """
        if not self._drawn <= number < self._steps:
            raise IndexError(f"batch {number} is not ahead: {self._drawn} of {self._steps} are drawn")
        while len(self._ahead) <= number - self._drawn:
            self._ahead.append(self._sample())
        return self._ahead[number - self._drawn].clone()

    def serve(self) -> None:
        """Note that a run is built on the batches of this sampler.

        Raises:
            RuntimeError: another one is.
        """
        self.check_free()
        self._serves = True

    def check_free(self) -> None:
        """Raise a RuntimeError if a run is built on the batches of this sampler."""
        if self._serves:
            raise StateError(
                "the sampler serves another PrivateOptimizer: two that step the same batches cost more than both "
                "together are charged; build a sampler for each"
            )

    def end_after(self, left: int) -> None:
        """Draw at most ``left`` more batches."""
        self._steps = min(self._steps, self._drawn + check_integer("left", left))

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Tensor]:
        while self._drawn < self._steps:
            yield self._draw().clone()

    def _draw(self) -> Tensor:
        self._drawn += 1
        self._last_batch = None  # An interrupt in the draw leaves a batch that nothing can be booked for.
        self._last_batch = self._ahead.popleft() if self._ahead else self._sample()
        return self._last_batch

    def _sample(self) -> Tensor:
        members = self._joined()
        most = self._truncated_batch_size
        if most is None or members.size <= most:
            return torch.from_numpy(members)
        while True:
            # The records with the smallest words; all choices are alike as long as no two words are.
            words = self._entropy.words(members.size)
            if np.unique(words).size == words.size:
                chosen = np.argpartition(words, most - 1)[:most]
                return torch.from_numpy(members[np.sort(chosen)])

    def _joined(self) -> npt.NDArray[np.int64]:
        if self._threshold == _WORD_RANGE:
            return np.arange(self._num_records, dtype=np.int64)
        threshold = np.uint64(self._threshold)
        members = [
            start + np.flatnonzero(self._entropy.words(min(_CHUNK, self._num_records - start)) < threshold)
            for start in range(0, self._num_records, _CHUNK)
        ]
        return np.concatenate([np.empty(0, dtype=np.int64), *members])


def physical_batches(indices: Tensor, size: int) -> Iterator[Tensor]:
    """Split one logical batch into chunks of at most ``size`` records; an empty batch gives no chunk."""
    if not isinstance(indices, Tensor):
        raise InvalidTypeError(f"indices must be a tensor, as a sampler yields it, got {type(indices).__name__}")
    size = check_integer("size", size, at_least=1)
    for start in range(0, indices.numel(), size):
        yield indices[start : start + size]
