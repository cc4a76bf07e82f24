# SPDX-License-Identifier: Apache-2.0
"""The instruction set of the C++ library, which is the best that the processor has unless one is asked for."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from wavedp.errors import InvalidValueError
from wavedp.ops.backend import use_backend

INSTRUCTIONS = ("baseline", "avx2", "avx512", "amx")


@contextmanager
def use_instructions(name: str) -> Iterator[None]:
    """Asks for the C++ library on one instruction set inside a ``with`` block; in the whole process, for tests.

    Args:
        name: ``"baseline"`` (SSE2 or NEON), ``"avx2"``, ``"avx512"``, or ``"amx"``: the matrix tiles where they gain,
            in norms and clipped sums of float32, and AVX-512 elsewhere.

    Raises:
        ValueError: unknown name, or the processor does not have it.
        RuntimeError: the library is not installed.
    """
    with use_backend("native"):
        library: Any = importlib.import_module("wavedp._csrc")
        before = library.isa()
        try:
            library.set_isa(name)
        except (TypeError, ValueError) as error:
            raise InvalidValueError(str(error)) from None
        try:
            yield
        finally:
            library.set_isa(before)
