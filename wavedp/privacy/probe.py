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
from torch.utils._pytree import tree_leaves

Place = tuple[str, str, int]
"""A layer's name, which of its uses of parameters it is, and the rank of what they are applied to."""

TAP = "TapBackward"
"""Name in the graph of the node behind a booked use; its ``place`` says which."""

# No generator that training uses is advanced, and no seed repeats the parts.
_RANDOM = random.SystemRandom()


class IndependenceProbe:
    """What has been verified so far, and what is due."""

    def __init__(self) -> None:
        self._verified: set[Place] = set()
        self._seen: set[Place] = set()
        self._passed: Counter[frozenset[str]] = Counter()

    def note(self, place: Place) -> None:
        """Record that a layer ran in a forward that may be differentiated."""
        self._seen.add(place)

    def due(self, *outputs: Tensor) -> bool:
        """Whether the graph of ``outputs`` has to be looked at: it is kept, or a backward keeps it, for that."""
        return any(len(tensor) > 1 for tensor in outputs) and (self.is_turn(*outputs) or bool(self.unverified()))

    def is_turn(self, *outputs: Tensor) -> bool:
        """Whether it is the 1st, 2nd, 4th, 8th, ... time for an output of this kind."""
        counts = [self._passed[_operations(tensor)] + 1 for tensor in outputs if len(tensor) > 1]
        return any(count & (count - 1) == 0 for count in counts)

    def is_verified(self, place: Place) -> bool:
        """Whether ``place`` was looked at in full."""
        return place in self._verified

    def unverified(self) -> set[Place]:
        """Return where a layer ran that was never looked at in full."""
        return self._seen - self._verified

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

    @staticmethod
    def seed(output: Tensor, part: Tensor) -> Tensor:
        """Return a cotangent of ``output`` ``[records, ...]`` for the records in ``part`` alone.

        Ones for a vector of losses; else values all different, since a sum over a normalised axis has no gradient.
        """
        mask = part.to(output.device, output.dtype)
        if output.ndim == 1:
            return mask
        values = torch.arange(1, output[0].numel() + 1, device=output.device, dtype=torch.float32).sin()
        return values.to(output.dtype).reshape(output.shape[1:]) * mask.reshape(-1, *[1] * (output.ndim - 1))


def rows_of_outputs(output: Any) -> tuple[list[Tensor], int]:
    """Return the differentiable tensors in ``output`` that have the first one's number of rows, and that number."""
    leaves = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.ndim and x.grad_fn is not None]
    rows = len(leaves[0]) if leaves else 0
    return [x for x in leaves if len(x) == rows], rows


def _operations(losses: Tensor) -> frozenset[str]:
    """Name the operations from the losses back to the first booked layers: what kind of loss it is."""
    names: set[str] = set()
    waiting: deque[Any] = deque([losses.grad_fn])
    met: set[Any] = set()
    while waiting:
        node = waiting.popleft()
        if node is None or node in met:
            continue
        met.add(node)
        if node.name() == TAP:
            names.add(f"{TAP}:{node.place[0]}")
        else:
            names.add(node.name())
            waiting.extend(parent for parent, _ in node.next_functions)
    return frozenset(names)
