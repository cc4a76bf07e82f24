# SPDX-License-Identifier: Apache-2.0
"""What a case of noise is, and when noise is right: by its moments, and where the key is known, by its digits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from wavedp.benchmarks.registry import Progress, Thunk, Timed, WrongResult, silent

SIGMAS = 6.0  # of each moment: 2e-9 that right noise is refused
DIGITS = 2e-6  # largest difference from the definition under the same key, in deviations: 5 units in the last place
CHUNK = 1 << 22  # elements that are checked at a time, in float64

# A sweep goes over all elements once; its number is how many words, of an element's size, it reads and writes for each.
Sweeps = tuple[int, ...]
FILL, IN_PLACE, TWO_TO_ONE = 1, 2, 3  # x = number; x = f(x) or y = f(x); x = f(x, y)


def normal_sweeps(device: torch.device) -> Sweeps:
    """``Tensor.normal_`` on a CPU writes uniform numbers, then goes over them again."""
    return (FILL, IN_PLACE) if device.type == "cpu" else (FILL,)


@dataclass(frozen=True)
class NoiseProvider:
    """One way to compute a case. ``prepare`` makes the call that is timed, ``check`` raises WrongResult.

    ``check(label)`` makes a call of its own on the same inputs; tensors may be shared between providers, so that
    they are as good as new only within it.
    """

    prepare: Callable[[], Thunk]
    check: Callable[[str], None]
    sweeps: Sweeps | None  # None: not known


@dataclass(frozen=True)
class NoiseCase:
    """An operation on noise; unlike other cases, providers differ in the bytes that they move."""

    name: str
    floor: str  # the provider that others are compared with
    make: Callable[[Any, torch.device], Mapping[str, NoiseProvider]]
    sizes: Mapping[str, Sequence[Any]]  # by "quick", "cpu" and "cuda"
    paired: ClassVar[bool] = True

    @property
    def floors(self) -> tuple[str, ...]:
        return (self.floor,)

    def providers(self, size: Any, device: torch.device) -> Mapping[str, NoiseProvider]:
        return self.make(size, device)

    def timed(
        self, size: Any, device: torch.device, *, quick: bool, progress: Progress = silent, only: str | None = None
    ) -> dict[str, Timed]:
        """See ``registry.Benchmark``. Bytes and passes are each provider's own."""
        torch.compiler.reset()
        found = {}
        for name, provider in self.make(size, device).items():
            if only not in (None, name) or (quick and "torch.compile" in name):
                continue
            progress(f"check {name}")
            provider.check(f"{self.name}, {name}")
            call = provider.prepare()
            call()
            words = provider.sweeps
            moved = None if words is None else sum(words) * math.prod(size.shape) * size.dtype.itemsize
            found[name] = Timed(call, self.floor, moved, passes=None if words is None else len(words))
        return found


@dataclass
class Moments:
    """Sums over noise in units of its deviation, and over its product with what it was added to."""

    count: int = 0
    first: float = 0.0
    second: float = 0.0
    fourth: float = 0.0
    product: float = 0.0
    square: float = 0.0  # of what it was added to

    def add(self, noise: Tensor, total: Tensor | None = None) -> None:
        for start in range(0, noise.numel(), CHUNK):
            x = noise.view(-1)[start : start + CHUNK].double()
            self.count += x.numel()
            squares = x * x
            self.first += x.sum().item()
            self.second += squares.sum().item()
            self.fourth += (squares * squares).sum().item()
            if total is not None:
                y = total.reshape(-1)[start : start + CHUNK].double()
                self.product += (x * y).sum().item()
                self.square += (y * y).sum().item()

    def check(self, label: str, grid: float = 0.0) -> None:
        """Raises WrongResult unless the moments are those of independent standard normals, rounded to ``grid``."""
        n = self.count
        bounds = {
            "mean": (self.first / n, 0.0, 1 / n),
            "variance": (self.second / n, 1.0 + grid * grid / 12, 2 / n),
            "fourth moment": (self.fourth / n, 3.0, 96 / n),
            "share of the sum": (self.product / self.square if self.square else 0.0, 0.0, 1 / (self.square or 1.0)),
        }
        for name, (got, wanted, variance) in bounds.items():
            allowed = SIGMAS * math.sqrt(variance) + grid * grid
            if not abs(got - wanted) <= allowed:  # also true for NaN
                raise WrongResult(f"{label}: the noise's {name} is {got:.7g}, not {wanted:.7g} within {allowed:.2g}")


def check_digits(label: str, got: Tensor, wanted: Tensor, allowed: float = DIGITS) -> None:
    """Raises WrongResult unless ``got`` is the noise that the definition makes under the same key."""
    error = (got.double() - wanted.double()).abs().max().item()
    if not error <= allowed:
        raise WrongResult(f"{label}: the noise is off by {error:.3g} from the definition's, more than {allowed:.3g}")
