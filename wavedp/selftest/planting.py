# SPDX-License-Identifier: Apache-2.0
"""Plants a bug into the installed package for the length of a ``with`` block, and takes it out again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from wavedp.privacy import pld, renyi, strict

_MISSING = object()
_CACHES = (
    pld.checked_epsilon,
    pld.upper_epsilon,
    pld.lower_epsilon,
    renyi.rdp_epsilon,
    renyi._subsampled_gaussian,
    strict.law_epsilon,
)


class Planted:
    """The replaced parts of the package. Bugs call :meth:`mark` where their faulty code runs."""

    def __init__(self) -> None:
        self.runs = 0
        """How often faulty code ran."""
        self._undo: list[tuple[Any, str, Any]] = []

    def mark(self) -> None:
        self.runs += 1

    def replace(self, owner: Any, name: str, faulty: Callable[..., Any]) -> None:
        """Put ``faulty(original, *arguments)`` in place of a function, method, class method or property."""
        inside = vars(owner).get(name, _MISSING)
        original: Any = getattr(owner, name) if inside is _MISSING else inside
        replacement: Any
        if isinstance(original, property):
            getter = original.fget
            replacement = property(lambda self: faulty(getter, self))
        elif isinstance(original, classmethod):
            of_class = original.__func__
            replacement = classmethod(lambda cls, *args, **kwargs: faulty(of_class, cls, *args, **kwargs))
        else:

            def replacement(*args: Any, **kwargs: Any) -> Any:
                return faulty(original, *args, **kwargs)

        self._undo.append((owner, name, inside))
        setattr(owner, name, replacement)

    def undo(self) -> None:
        for owner, name, before in reversed(self._undo):
            if before is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        self._undo.clear()


@dataclass(frozen=True)
class Bug:
    """A known kind of privacy bug."""

    name: str
    kind: str
    """Which part of the mechanism it breaks."""
    source: str
    """Where it was seen, or who showed it."""
    what: str
    """What the code does with it, in a sentence."""
    plant: Callable[[Planted], None]

    @contextmanager
    def planted(self) -> Iterator[Planted]:
        """Have it in the package for the length of the block. Not for use beside other threads."""
        planted = Planted()
        forget_figures = self.kind == "accounting"
        try:
            if forget_figures:
                _clear_caches()
            self.plant(planted)
            yield planted
        finally:
            planted.undo()
            if forget_figures:
                _clear_caches()


def _clear_caches() -> None:
    for cached in _CACHES:
        cached.cache_clear()


class Registry:
    """The bugs of one module; :meth:`bug` is the decorator that adds one."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.bugs: list[Bug] = []

    def bug(self, source: str) -> Callable[[Callable[[Planted], None]], Callable[[Planted], None]]:
        def add(plant: Callable[[Planted], None]) -> Callable[[Planted], None]:
            what = " ".join((plant.__doc__ or "").split())
            self.bugs.append(Bug(plant.__name__, self.kind, source, what, plant))
            return plant

        return add
