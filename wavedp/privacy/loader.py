# SPDX-License-Identifier: Apache-2.0
"""A data loader whose batches are those that a Poisson sampler draws."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from wavedp.errors import InvalidValueError, StateError
from wavedp.privacy.optimizer import PrivateOptimizer
from wavedp.privacy.sampling import PoissonSampler, physical_batches
from wavedp.privacy.validation import check_integer


class PrivateLoader(Iterable[Any]):
    """Yields the data of every batch that the sampler of ``private`` draws, in physical batches.

    One iteration yields as many logical batches as an epoch has in expectation, ``round(1 / sample_rate)``, or those
    that are left; the next goes on from there. An empty batch is not yielded: its step, noise alone, is taken on the
    way. Workers prepare the batches that come next. Where something else drew from the sampler meanwhile, a second
    loader or the loop itself, an iteration that stands inside a batch raises, and what was prepared is dropped.

    Args:
        source: its data set, ``collate_fn`` and workers are used; its batches, order and sampler are not.
        private: an optimizer with a sampler.
        physical_batch_size: records at most in what is yielded; ``None`` yields whole logical batches.

    Raises:
        ValueError: the data set is iterable-style, or of another size than the sampler draws from.
    """

    def __init__(
        self, source: DataLoader[Any], private: PrivateOptimizer, physical_batch_size: int | None = None
    ) -> None:
        if private.sampler is None:
            raise InvalidValueError("the optimizer has no sampler")
        if source.batch_size is None and not hasattr(source.batch_sampler, "__iter__"):
            raise InvalidValueError(
                "the loader yields single records: give it a batch_size, so that it makes batches of them"
            )
        if isinstance(source.dataset, IterableDataset):
            raise InvalidValueError("an IterableDataset has no records to draw from: use a map-style data set")
        self.dataset = source.dataset
        self.sampler: PoissonSampler = private.sampler
        if len(source.dataset) != self.sampler.num_records:  # type: ignore[arg-type]
            raise InvalidValueError("the sampler draws from another number of records than the data set has")
        most = (
            self.sampler.num_records if self.sampler.truncated_batch_size is None else self.sampler.truncated_batch_size
        )
        size = max(most, 1) if physical_batch_size is None else physical_batch_size
        self.physical_batch_size = check_integer("physical_batch_size", size, at_least=1)
        self.at_end_of_batch = True
        """Whether what was yielded last ends a logical batch."""
        self._private = private
        self._planned: dict[int, list[Tensor]] = {}
        self.sent: deque[Tensor] = deque()
        """Physical batches whose data were asked for, in the order in which they come."""
        self._epoch = max(1, round(1.0 / self.sampler.sample_rate))
        settings = {name: getattr(source, name) for name in _KEPT}
        self._source: DataLoader[Any] = DataLoader(source.dataset, batch_sampler=_Chunks(self), **settings)
        self._fetched: Iterator[Any] | None = None

    def __len__(self) -> int:
        return self._epoch

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.sampler)
        for _ in range(self._epoch):
            number = self.sampler.drawn
            if number >= self.sampler.steps:
                return
            chunks = self.plan(number)
            next(batches)
            if not chunks:
                self._private.step()
            try:
                yield from self._data(chunks)
            finally:
                del self._planned[number]

    def _data(self, chunks: list[Tensor]) -> Iterator[Any]:
        left, drawn = len(chunks), self.sampler.drawn
        try:
            for chunk in chunks:
                if self.sampler.drawn != drawn:
                    raise StateError(
                        "another batch was drawn while this iteration of the loader stood inside one: call discard(), "
                        "and iterate over the loader anew"
                    )
                data = self._fetch(chunk)
                left -= 1
                self._private.announce(chunk)
                self.at_end_of_batch = left == 0
                yield data
        finally:
            if left:  # left in the middle: what is prepared belongs to this batch
                self._fetched = None

    def _fetch(self, chunk: Tensor) -> Any:
        """The data of ``chunk``, which are prepared next, unless the batches that they were prepared for are gone."""
        if self._fetched is not None:
            data = next(self._fetched)
            if self.sent.popleft() is chunk:
                return data
        self.sent.clear()
        self._fetched = iter(self._source)
        data = next(self._fetched)
        assert self.sent.popleft() is chunk
        return data

    def plan(self, number: int) -> list[Tensor]:
        """The physical batches of a logical one that was not drawn yet."""
        if number not in self._planned:
            self._planned[number] = list(physical_batches(self.sampler.ahead(number), self.physical_batch_size))
        return self._planned[number]


_KEPT = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "generator",
)


class _Chunks:
    """The indices of all physical batches, in order, as a DataLoader asks for them."""

    def __init__(self, loader: PrivateLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[list[int]]:
        sampler = self._loader.sampler
        number = sampler.drawn - 1  # the first is asked for when its batch has been drawn
        while number < sampler.steps:
            for chunk in self._loader.plan(number):
                self._loader.sent.append(chunk)
                yield chunk.tolist()
            # Batches between that were drawn since were empty.
            number = max(number + 1, sampler.drawn - 1)
