# SPDX-License-Identifier: Apache-2.0
"""What a benchmark case is, and the list of all cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Function = Callable[..., Sequence[Tensor]]
Shape = tuple[int, ...]


class WrongResult(RuntimeError):
    """A provider's result differs from the reference, so it is not timed."""


# Largest accepted difference from the float64 result, relative to its largest magnitude: a few roundings.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Case:
    """One operation and the rivals that compute it.

    Every provider maps the inputs to the same flat sequence of tensors as ``expected``, which is called with
    float64 inputs and decides what is right.
    """

    name: str
    inputs: Callable[[Shape, torch.dtype, torch.device], tuple[Tensor, ...]]
    expected: Function
    providers: Callable[[torch.device, torch.dtype], Mapping[str, Function]]
    shapes: Mapping[str, Sequence[Shape]]  # by "quick", "cpu" and "cuda"


def check(label: str, outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Raises WrongResult unless ``outputs`` equal ``expected``, which is in float64, up to rounding."""
    if len(outputs) != len(expected):
        raise WrongResult(f"{label}: {len(outputs)} outputs instead of {len(expected)}")
    for i, (got, want) in enumerate(zip(outputs, expected)):
        if got.shape != want.shape:
            raise WrongResult(f"{label}: output {i} is {list(got.shape)} instead of {list(want.shape)}")
        tolerance = TOLERANCE[got.dtype] * want.abs().max().item()
        error = (got.to(want) - want).abs().max().item()
        if not error <= tolerance:  # also true for NaN
            raise WrongResult(f"{label}: output {i} is off by {error:.3g}, more than {tolerance:.3g}")


def all_cases() -> dict[str, list[Case]]:
    """Every case by the stem of the file in cases/ that defines it, which also names its CSV."""
    from cases import wavelet

    return {"wavelet": wavelet.CASES}
