# SPDX-License-Identifier: Apache-2.0
"""What a detector says: nothing, or an alarm. Tests of chance have a stated level."""

from collections.abc import Callable
from typing import Any

LEVEL = 1e-8
"""Chance of one statistical test to fail where the code is right."""


class Alarm(Exception):
    """A detector saw what private training must not do."""


def require(holds: bool, what: str) -> None:
    """Raise an :class:`Alarm` saying ``what`` unless the condition holds."""
    if not holds:
        raise Alarm(what)


def require_likely(p_value: float, what: str, level: float = LEVEL) -> None:
    """Raise an :class:`Alarm` where right code gives something so unlikely with a chance of at most ``level``."""
    if not p_value >= level:
        raise Alarm(f"{what} (p = {p_value:.1g})")


def require_close(measured: float, expected: float, relative: float, what: str) -> None:
    if not abs(measured - expected) <= relative * abs(expected):
        raise Alarm(f"{what} is {measured:.6g}, not {expected:.6g}")


def require_refusal(
    what: str, call: Callable[[], Any], kinds: tuple[type[Exception], ...] = (RuntimeError, ValueError, TypeError)
) -> None:
    """Raise an :class:`Alarm` unless ``call`` raises one of ``kinds``."""
    try:
        call()
    except kinds:
        return
    raise Alarm(f"{what} was accepted")
