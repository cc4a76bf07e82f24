# SPDX-License-Identifier: Apache-2.0
"""What a benchmark case is, what its providers are compared with, and when a result is right."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]
Thunk = Callable[[], Any]

# Largest accepted difference from the float64 result, relative to its largest magnitude: a few roundings.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


class WrongResult(RuntimeError):
    """A provider's result differs from the reference, so it is not timed."""


@dataclass(frozen=True)
class Size:
    """One input on which a case is run."""

    shape: Shape  # of the image
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


@dataclass(frozen=True)
class Floor:
    """What no provider can be expected to beat by much."""

    call: Thunk
    bytes: int  # read and written by one call
    compared_with: str  # a floor that others are compared with names itself


def make_floor(name: str, size: Size, inputs: Sequence[Tensor], moved: int) -> Floor:
    """A floor for an operation that moves ``moved`` bytes; its own tensors are made here, as float32.

    ``sum`` reads as many bytes as the inputs have, ``torch.mul`` multiplies an image of ``size`` by itself: with a
    number as the other factor it takes more than twice as long on a small image.
    """
    device = inputs[0].device
    read = sum(t.nbytes for t in inputs)

    def values(count: int) -> Tensor:
        return torch.randn(max(1, count // 4), device=device)

    if name == "copy_":
        source = values(moved // 2)
        return Floor(functools.partial(torch.empty_like(source).copy_, source), moved, name)
    if name == "clone":
        return Floor(values(moved // 2).clone, moved, name)
    if name == "sum":
        return Floor(values(read).sum, read, name)
    if name == "copy_ of the input":
        source = values(read)
        return Floor(functools.partial(torch.empty_like(source).copy_, source), 2 * read, "sum")
    if name == "torch.mul":
        image = torch.ones(size.shape, dtype=size.dtype, device=device)
        return Floor(functools.partial(torch.mul, image, image), 2 * image.nbytes, name)
    raise ValueError(f"unknown floor {name!r}")


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """Results have the dtype of the image; those of bytes are float32."""
    return torch.float32 if dtype == torch.uint8 else dtype


def poisoned(expected: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Existing tensors for results, full of NaN, so that one that is not written is seen."""
    return [torch.full_like(t, torch.nan, dtype=dtype) for t in expected]


def check(label: str, outputs: Iterable[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Raises WrongResult unless ``outputs`` have ``dtype`` and equal ``expected``, in float64, up to rounding."""
    outputs = list(outputs)
    if len(outputs) != len(expected):
        raise WrongResult(f"{label}: {len(outputs)} outputs instead of {len(expected)}")
    for i, (got, want) in enumerate(zip(outputs, expected)):
        if got.shape != want.shape:
            raise WrongResult(f"{label}: output {i} is {list(got.shape)} instead of {list(want.shape)}")
        if got.dtype != dtype:
            raise WrongResult(f"{label}: output {i} is {got.dtype} instead of {dtype}")
        tolerance = TOLERANCE[dtype] * want.abs().max().item()
        by_image = [(a.to(b) - b).abs().max() for a, b in zip(got.detach(), want)]  # whole batches take memory
        error = torch.stack(by_image).max().item()
        if not error <= tolerance:  # also true for NaN
            raise WrongResult(f"{label}: output {i} is off by {error:.3g}, more than {tolerance:.3g}")
