# SPDX-License-Identifier: Apache-2.0
"""Argument checks shared by the privacy code: a number that is out of range never gets further than here."""

import math
from numbers import Integral, Real

from wavedp.errors import InvalidTypeError, InvalidValueError


def check_real(
    name: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> float:
    """Return ``value`` as a finite float inside the given bounds.

    Raises:
        TypeError: ``value`` is not a real number (``bool`` does not count as one).
        ValueError: it is NaN, infinite, or outside a bound.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidTypeError(f"{name} must be a real number, got {type(value).__name__}: {value!r}")
    try:
        number = float(value)
    except OverflowError:
        raise InvalidValueError(f"{name} must be finite, got a number beyond 1.8e308") from None
    bounds = [
        (above is None or number > above, f"> {above}"),
        (at_least is None or number >= at_least, f">= {at_least}"),
        (below is None or number < below, f"< {below}"),
        (at_most is None or number <= at_most, f"<= {at_most}"),
    ]
    if not math.isfinite(number):
        raise InvalidValueError(f"{name} must be finite, got {number!r}")
    for holds, bound in bounds:
        if not holds:
            raise InvalidValueError(f"{name} must be {bound}, got {number!r}")
    return number


def check_integer(name: str, value: object, *, at_least: int = 0, at_most: int | None = None) -> int:
    """Return ``value`` as an int inside the given bounds; raises like :func:`check_real`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InvalidTypeError(f"{name} must be an integer, got {type(value).__name__}: {value!r}")
    number = int(value)
    if number < at_least:
        raise InvalidValueError(f"{name} must be >= {at_least}, got {number}")
    if at_most is not None and number > at_most:
        raise InvalidValueError(f"{name} must be <= {at_most}, got {number}")
    return number
