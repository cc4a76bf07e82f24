# SPDX-License-Identifier: Apache-2.0
"""Checks of what noise is made with, and the public step that noisy sums are rounded to."""

import math
from numbers import Integral, Real
from typing import Any

import torch

from wavedp.errors import InvalidTypeError, InvalidValueError
from wavedp.ops.noise import NARROW, STRICT, WIDE

GRID_BITS = 12
"""The grid step is the noise's standard deviation times 2^-12, rounded down to a power of two."""

STRICT_GRID_BITS = 20
"""The same for strict noise: 2^-20."""

_MOST_STRICT_BITS = 40  # the noise then stays below 2^45 steps
_GRID_RANGE = 2.0**-1000, 2.0**1000
_MODES = {"standard": GRID_BITS, "strict": STRICT_GRID_BITS}


def grid_step(std: float, mode: str = "standard") -> float:
    """Return the public rounding step for noise of deviation ``std``: ``2^(floor(log2 std) - 12)``, or -20 for strict.

    Raises:
        TypeError: ``std`` is no number.
        ValueError: ``std`` is not positive or has no such step in ``[2^-1000, 2^1000]``, or ``mode`` is unknown.
    """
    std = real_of("grid_step", "std", std, positive=True)
    step = math.ldexp(1.0, math.frexp(std)[1] - 1 - _bits_of("grid_step", mode))
    if not _GRID_RANGE[0] <= step <= _GRID_RANGE[1]:
        raise InvalidValueError(f"grid_step takes a std whose grid is in [2^-1000, 2^1000], not {std!r}")
    return step


def kind_of(op: str, dtype: torch.dtype, mode: Any) -> int:
    """The kind of the normals for sums of ``dtype``."""
    _bits_of(op, mode)
    if mode == "strict":
        return STRICT
    return WIDE if dtype == torch.float64 else NARROW


def grid_of(op: str, std: float, grid: Any, mode: Any) -> float:
    """The step given, or the public one; 0 without noise unless it is given."""
    strict = _bits_of(op, mode) == STRICT_GRID_BITS
    if grid is None:
        return grid_step(std, mode) if std > 0.0 else 0.0
    step = real_of(op, "grid", grid)
    if step != 0.0 and (math.frexp(step)[0] != 0.5 or not _GRID_RANGE[0] <= step <= _GRID_RANGE[1]):
        raise InvalidValueError(f"{op} takes a power of two as grid, or 0 for none, not {grid!r}")
    if strict and std > 0.0 and not step <= std < math.ldexp(step, _MOST_STRICT_BITS):
        raise InvalidValueError(
            f"{op}: strict noise is made of integers and takes a grid from std * 2^-{_MOST_STRICT_BITS} to std, not "
            f"{grid!r} for a std of {std!r}; leave grid out for std * 2^-{STRICT_GRID_BITS}"
        )
    return step


def check_wide_enough(op: str, dtype: Any) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise InvalidValueError(f"{op}: noise is drawn in float32 or float64, got {dtype}; round once, after adding it")


def real_of(op: str, name: str, value: Any, *, positive: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidTypeError(f"{op} takes a real number as {name}, not {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < 0.0 or (positive and number == 0.0):
        raise InvalidValueError(f"{op} takes a finite {name} {'> 0' if positive else '>= 0'}, not {number!r}")
    return number


def integer_of(op: str, name: str, value: Any, *, most: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InvalidTypeError(f"{op} takes an integer as {name}, not {value!r}")
    number = int(value)
    if number < 0 or (most is not None and number > most):
        limit = "" if most is None else f" and at most {most}"
        raise InvalidValueError(f"{op} takes a {name} of at least 0{limit}, not {number}")
    return number


def _bits_of(op: str, mode: Any) -> int:
    bits = _MODES.get(mode) if isinstance(mode, str) else None
    if bits is None:
        raise InvalidValueError(f"{op} takes the mode 'standard' or 'strict', not {mode!r}")
    return bits
