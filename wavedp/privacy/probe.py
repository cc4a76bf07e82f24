# SPDX-License-Identifier: Apache-2.0
"""When to look for gradients between records, and which parts of the batch to look at.

Only losses whose graph is kept can be differentiated again in parts, so what is due is decided before the
backward: at the 1st, 2nd, 4th, 8th, ... backward of every kind of loss. A layer is looked at in full the first
time it gets a gradient. This is a detector and not a proof: a path between records that opens and closes
between two looks, or that carries values and no gradients, is not seen.
"""

import random
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

Place = tuple[str, int]
"""A layer's name and the rank of its input."""

TAP = "_TapBackward"
"""Name in the graph of the node behind a booked layer; its ``layer`` is the layer's name."""

# No generator that training uses is advanced, and no seed repeats the parts.
_RANDOM = random.SystemRandom()


class IndependenceProbe:
    """What has been verified so far, and what is due."""

    def __init__(self) -> None:
        self._verified: set[Place] = set()
        self._seen: set[Place] = set()
        self._passed: Counter[tuple[str, ...]] = Counter()

    def note(self, place: Place) -> None:
        """Record that a layer ran in a forward that may be differentiated."""
        self._seen.add(place)

    def due(self, losses: Tensor) -> bool:
        """Whether the backward of ``losses`` has to keep the graph and be followed by a look."""
        count = self._passed[_operations(losses)] + 1
        return len(losses) > 1 and (count & (count - 1) == 0 or not self._seen <= self._verified)

    def unverified(self, places: set[Place]) -> set[Place]:
        """Return those of ``places`` that were never looked at in full."""
        return places - self._verified

    def passed(self, losses: Tensor, places: set[Place]) -> None:
        """Record that a backward of ``losses`` went well; ``places`` were looked at in full during it."""
        self._verified |= places
        if len(losses) > 1:
            self._passed[_operations(losses)] += 1

    def parts(self, records: int, full: bool) -> Iterator[Tensor]:  # each [records] bool
        """Yield parts of a batch, each with its complement.

        Records are numbered at random. In full, the parts are the records whose number has bit k set, and not
        set, for every k, so that any two records are told apart; else it is the halves by bit 0 alone.
        """
        numbers = torch.tensor(_RANDOM.sample(range(records), records), device="cpu")
        for bit in range((records - 1).bit_length() if full else 1):
            odd = (numbers >> bit) & 1 == 1
            yield odd
            yield ~odd


def _operations(losses: Tensor) -> tuple[str, ...]:
    """Name the operations from the losses back to the first booked layers: what kind of loss it is."""
    names: list[str] = []
    waiting: deque[Any] = deque([losses.grad_fn])
    met: set[Any] = set()
    while waiting:
        node = waiting.popleft()
        if node is None or node in met:
            continue
        met.add(node)
        if node.name() == TAP:
            names.append(f"{TAP}:{node.layer}")
        else:
            names.append(node.name())
            waiting.extend(parent for parent, _ in node.next_functions)
    return tuple(names)
