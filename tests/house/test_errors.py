# SPDX-License-Identifier: Apache-2.0
"""wavedp/ refuses in one family of errors, wavedp/errors.py, whose members are the builtins they stand for."""

from __future__ import annotations

import ast
import inspect
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

import wavedp
from wavedp import errors

ROOT = Path(__file__).parents[2]
STANDS_FOR = {
    "InvalidValueError": ValueError,
    "BadFileError": ValueError,
    "InvalidTypeError": TypeError,
    "StateError": RuntimeError,
    "MissingFileError": FileNotFoundError,
    "NotAFolderError": NotADirectoryError,
    "MissingPackageError": ImportError,
}
REPLACED = {error.__name__ for error in STANDS_FOR.values()} | {"Exception"}


def builtins_raised(source: str) -> Iterator[int]:
    """Lines that raise an error outside the family where a member of it says the same."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and ast.unparse(node.exc.func) in REPLACED:
            yield node.lineno


def test_every_refusal_is_of_the_family() -> None:
    found = {
        f"{file.relative_to(ROOT)}:{line}"
        for file in sorted((ROOT / "wavedp").rglob("*.py"))
        for line in builtins_raised(file.read_text(encoding="utf-8"))
    }
    assert not found


@pytest.mark.parametrize("source", ["raise ValueError('x')", "def f():\n    raise TypeError('x') from None"])
def test_a_planted_builtin_is_found(source: str) -> None:
    assert list(builtins_raised(source))


@pytest.mark.parametrize("source", ["raise InvalidValueError('x')", "raise IndexError('x')", "raise"])
def test_the_family_and_protocols_pass(source: str) -> None:
    assert not list(builtins_raised(source))


def test_the_family_is_what_the_module_has() -> None:
    classes = {name: one for name, one in vars(errors).items() if inspect.isclass(one)}
    assert set(classes) == {*STANDS_FOR, "WavedpError"}
    assert wavedp.WavedpError is errors.WavedpError


@pytest.mark.parametrize("name", STANDS_FOR)
def test_a_member_is_caught_as_the_family_and_as_the_builtin(name: str) -> None:
    error = getattr(errors, name)("no such thing: give another")
    assert isinstance(error, errors.WavedpError)
    assert isinstance(error, STANDS_FOR[name])
    assert str(error) == "no such thing: give another"
    again = pickle.loads(pickle.dumps(error))  # as a worker process hands it on
    assert type(again) is type(error)
    assert str(again) == str(error)
