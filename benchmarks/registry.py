# SPDX-License-Identifier: Apache-2.0
"""What a benchmark case is, what its providers are compared with, and when a result is right."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]
Thunk = Callable[[], Any]

# Largest accepted difference from the float64 result, relative to its largest magnitude: a few roundings.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


class Progress(Protocol):
    """Says what is being done; what is kept stays to be read."""

    def __call__(self, what: str, *, keep: bool = False) -> None: ...


def silent(what: str, *, keep: bool = False) -> None:
    """Says nothing."""


class WrongResult(RuntimeError):
    """A provider's result differs from the reference, so it is not timed."""


@dataclass(frozen=True)
class Timed:
    """A call that is timed: a provider whose result was right, or a floor."""

    call: Thunk
    floor: str  # what it is compared with; a floor names itself
    bytes: int | None = None  # read and written by one call; None: not what bounds it
    passes: int | None = None  # over all elements, where providers differ in it
    peak_bytes: int | None = None  # memory at its peak, above what was there before the first call
    booked_bytes: int | None = None  # output gradients of the layers, which book-keeping keeps


class Benchmark(Protocol):
    """What run.py needs of a case: an op (:class:`Case`) or a training step (``steps.StepCase``)."""

    @property
    def name(self) -> str: ...

    @property
    def floors(self) -> tuple[str, ...]: ...

    @property
    def paired(self) -> bool:
        """Whether the ratio to the floor is the median of the ratios within each repeat."""
        ...

    @property
    def sizes(self) -> Mapping[str, Sequence[Any]]:
        """By "quick", "cpu" and "cuda"; each has a ``shape`` and a ``dtype``."""
        ...

    def providers(self, size: Any, device: torch.device) -> Mapping[str, Any]: ...

    def timed(
        self, size: Any, device: torch.device, *, quick: bool, progress: Progress = silent, only: str | None = None
    ) -> dict[str, Timed]:
        """The calls to time, each checked; ``only`` one provider, without the floors, if it is named.

        Raises:
            WrongResult: a provider computes something else than the reference.
        """
        ...


@dataclass(frozen=True)
class Size:
    """One input on which a case is run."""

    shape: Shape  # of the image, or what the case says
    dtype: torch.dtype = torch.float32
    ours_only: bool = False  # this package and the floors, without the rivals


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    ``prepare(inputs, out)`` is called once and returns the call that is timed: layouts, modules and graphs are made
    there. ``out`` are existing tensors for the results; whether a provider writes them is its ``writes_out``.
    """

    prepare: Callable[[Sequence[Tensor], Sequence[Tensor]], Thunk]
    unpack: Callable[[Any], Iterable[Tensor]] = list  # what a call returns -> the outputs, flat; not timed
    floor: str = "clone"
    writes_out: bool = False


@dataclass(frozen=True)
class Case:
    """One operation and those that compute it.

    ``expected`` is called with the size and the inputs in float64, and decides what is right. Each input is read once
    and each output written once: these are the bytes that the operation must move.
    """

    name: str
    inputs: Callable[[Size, torch.device], tuple[Tensor, ...]]
    expected: Callable[..., Sequence[Tensor]]
    providers: Callable[[Size, torch.device], Mapping[str, Provider]]
    sizes: Mapping[str, Sequence[Size]]  # by "quick", "cpu" and "cuda"
    floors: tuple[str, ...] = ("copy_", "clone")
    results: Callable[[torch.dtype], torch.dtype] = field(default=lambda dtype: result_dtype(dtype))
    tolerance: float | None = None  # where sums of many terms need more than TOLERANCE
    paired: ClassVar[bool] = False

    def timed(
        self,
        size: Size,
        device: torch.device,
        *,
        quick: bool,
        progress: Progress = silent,
        only: str | None = None,
    ) -> dict[str, Timed]:
        """See :class:`Benchmark`. Without ``quick``, what torch.compile makes is timed too."""
        inputs = self.inputs(size, device)
        expected = self.expected(size, *(x.double() for x in inputs))
        results = self.results(size.dtype)
        moved = sum(x.nbytes for x in inputs) + sum(x.numel() for x in expected) * results.itemsize
        torch.compiler.reset()
        providers = self.providers(size, device)
        if only is not None:
            providers = {only: providers[only]}
        out = poisoned(expected, results) if any(provider.writes_out for provider in providers.values()) else []
        found = {}
        for name, provider in providers.items():
            if quick and "torch.compile" in name:
                continue
            progress(f"check {name}")
            call = provider.prepare(inputs, out)
            result = call()
            got = out if provider.writes_out else provider.unpack(result)
            check(f"{self.name}, {name}", got, expected, results, self.tolerance)
            del result
            for tensor in out:
                tensor.fill_(torch.nan)
            found[name] = Timed(call, provider.floor, moved)
        if only is None:
            for name in self.floors:
                found[name] = make_floor(name, size, inputs, moved)
                found[name].call()
        return found


def make_floor(name: str, size: Size, inputs: Sequence[Tensor], moved: int) -> Timed:
    """A floor for an operation that moves ``moved`` bytes; its own tensors are made here, as float32.

    ``sum`` reads as many bytes as the inputs have, ``torch.mul`` multiplies an image of ``size`` by itself: with a
    number as the other factor it takes more than twice as long on a small image. ``mm`` is the product a^T b of the
    first two inputs, whose last axes are those of the result; ``mm of all records`` is the same beside ``sum``, for
    what computes more than it reads.
    """
    device = inputs[0].device
    read = sum(t.nbytes for t in inputs)

    def values(count: int) -> Tensor:
        return torch.randn(max(1, count // 4), device=device)

    if name == "copy_":
        source = values(moved // 2)
        return Timed(functools.partial(torch.empty_like(source).copy_, source), name, moved)
    if name == "clone":
        return Timed(values(moved // 2).clone, name, moved)
    if name == "sum":
        return Timed(values(read).sum, name, read)
    if name == "copy_ of the input":
        source = values(read)
        return Timed(functools.partial(torch.empty_like(source).copy_, source), "sum", 2 * read)
    if name == "torch.mul":
        image = torch.ones(size.shape, dtype=size.dtype, device=device)
        return Timed(functools.partial(torch.mul, image, image), name, 2 * image.nbytes)
    if name in ("mm", "mm of all records"):
        a, b = (t.flatten(0, -2) for t in inputs[:2])
        return Timed(functools.partial(torch.mm, a.mT, b), "mm" if name == "mm" else "sum", moved)
    raise ValueError(f"unknown floor {name!r}")


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """Results have the dtype of the image; those of bytes are float32."""
    return torch.float32 if dtype == torch.uint8 else dtype


def poisoned(expected: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Existing tensors for results, full of NaN, so that one that is not written is seen."""
    return [torch.full_like(t, torch.nan, dtype=dtype) for t in expected]


def check(
    label: str,
    outputs: Iterable[Tensor],
    expected: Sequence[Tensor],
    dtype: torch.dtype,
    tolerance: float | None = None,
) -> None:
    """Raises WrongResult unless ``outputs`` have ``dtype`` and equal ``expected``, in float64, up to rounding."""
    outputs = list(outputs)
    if len(outputs) != len(expected):
        raise WrongResult(f"{label}: {len(outputs)} outputs instead of {len(expected)}")
    for i, (got, want) in enumerate(zip(outputs, expected)):
        if got.shape != want.shape:
            raise WrongResult(f"{label}: output {i} is {list(got.shape)} instead of {list(want.shape)}")
        if got.dtype != dtype:
            raise WrongResult(f"{label}: output {i} is {got.dtype} instead of {dtype}")
        allowed = (TOLERANCE[dtype] if tolerance is None else tolerance) * want.abs().max().item()
        by_image = [(a.to(b) - b).abs().max() for a, b in zip(got.detach(), want)]  # whole batches take memory
        error = torch.stack(by_image).max().item()
        if not error <= allowed:  # also true for NaN
            raise WrongResult(f"{label}: output {i} is off by {error:.3g}, more than {allowed:.3g}")
