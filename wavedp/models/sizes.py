# SPDX-License-Identifier: Apache-2.0
"""Bounds on what a configuration may ask for, so that one from a hostile file costs nothing before it is refused."""

import math
from numbers import Real
from typing import Any

from torch import Tensor

from wavedp.errors import InvalidTypeError, InvalidValueError

MOST = {
    "image_size": 2**15,
    "channels": 2**10,
    "levels": 15,
    "grid": 2**10,
    "width": 2**16,
    "heads": 2**10,
    "decoder_width": 2**16,
    "decoder_heads": 2**10,
    "depth": 2**10,
    "encoder_depth": 2**10,
    "decoder_depth": 2**10,
    "num_scales": 16,
}
"""The largest value of a size; `DEFAULT_MOST` for one that is not here."""
DEFAULT_MOST = 2**24


def check_sizes(config: object, *names: str) -> None:
    """Raises InvalidValueError unless the fields are integers from 1 to their bound."""
    for name in names:
        value, most = getattr(config, name), MOST.get(name, DEFAULT_MOST)
        if type(value) is not int or value < 1:
            raise InvalidValueError(f"{name} must be a positive integer, got {value!r}")
        if value > most:
            raise InvalidValueError(f"{name} must be at most {most}, got a number of {value.bit_length()} bits")


def check_real(name: str, value: Any, *, above: float | None = None, at_least: float = 0.0, below: float) -> None:
    """Raises InvalidTypeError unless ``value`` is a number, InvalidValueError unless it is in the range."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidTypeError(f"{name} must be a number, got {value!r}")
    low, bracket = (at_least, "[") if above is None else (above, "(")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not low <= number < below or number == above:
        raise InvalidValueError(f"{name} must lie in {bracket}{low:g}, {below:g}), got {number!r}")


def described(x: Any) -> str:
    """What ``x`` is, for a message."""
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
