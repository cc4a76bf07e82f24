# SPDX-License-Identifier: Apache-2.0
"""Study files: a recipe, and rows that change something of it."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wavedp.cli.recipe_file import Recipe, read_toml, recipe_from, summary_of
from wavedp.errors import BadFileError, InvalidValueError


@dataclass(frozen=True)
class Row:
    """One line of a study: a name, a note for the reader, and the recipe with the row's overrides."""

    name: str
    note: str
    recipe: Recipe


@dataclass(frozen=True)
class Study:
    """What a study file says. ``base``: the recipe with the overrides of all rows, and of no single one."""

    summary: str
    base: Recipe
    rows: tuple[Row, ...]

    def chosen(self, names: str | None) -> tuple[Row, ...]:
        """The rows that ``names`` lists, separated by commas, in the file's order; None chooses all."""
        if names is None:
            return self.rows
        wanted = [name.strip() for name in names.split(",")]
        there = [row.name for row in self.rows]
        for name in wanted:
            if name not in there:
                raise InvalidValueError(f"--rows: the study has no row {name!r}; there are {', '.join(there)}")
        return tuple(row for row in self.rows if row.name in wanted)


def read_study(path: Path) -> Study:
    """Reads a TOML file: a text ``summary``; ``recipe``, the path of a recipe relative to this file; a table ``all`` of
    overrides for every row; and a list ``row`` of tables with a ``name``, perhaps a ``note``, and overrides.

    Overrides are tables of options by stage: a value sets or replaces the option, ``false`` removes it, and a stage
    that is ``false`` is left out.

    Raises:
        MissingFileError: the file or its recipe is not there.
        BadFileError: one of them is no TOML or says something else, or an override has nothing that it changes.
    """
    content = read_toml(path, "study")
    summary = summary_of(str(path), content)
    recipe = _text(str(path), "recipe", content.pop("recipe", None))
    tables = read_toml(path.parent / recipe, "recipe")
    recipe_from(str(path.parent / recipe), tables)  # what is wrong with the recipe itself is said of it
    base = overridden(f"{path}: all", tables, content.pop("all", {}))
    rows = content.pop("row", None)
    if content:
        raise BadFileError(f"{path}: {next(iter(content))!r} is none of summary, recipe, all, row")
    if not isinstance(rows, list) or not rows:
        raise BadFileError(f"{path} has no rows: a study needs tables [[row]]")
    found: list[Row] = []
    for row in rows:
        found.append(_row(path, row, base, [other.name for other in found]))
    return Study(summary, recipe_from(f"{path}: all", base), tuple(found))


def _row(path: Path, row: Any, base: Mapping[str, Any], earlier: list[str]) -> Row:
    if not isinstance(row, dict):
        raise BadFileError(f"{path}: a row must be a table, [[row]], not {row!r}")
    overrides = dict(row)
    name = _text(str(path), "name of a row", overrides.pop("name", None))
    if name != name.strip() or "," in name or not name.isprintable():
        raise BadFileError(f"{path}: a row cannot be called {name!r}: no comma, no space at an end, one line")
    if name in earlier:
        raise BadFileError(f"{path}: two rows are called {name!r}")
    where = f"{path}: row {name!r}"
    note = overrides.pop("note", "")
    if not isinstance(note, str):
        raise BadFileError(f"{where}: note must be a text, not {note!r}")
    return Row(name, note, recipe_from(where, overridden(where, base, overrides)))


def overridden(where: str, tables: Mapping[str, Any], overrides: Any) -> dict[str, Any]:
    """The content of a recipe file, changed by ``overrides``; ``where`` is what messages call them."""
    if not isinstance(overrides, dict):
        raise BadFileError(f"{where} must be a table of overrides by stage, not {overrides!r}")
    changed = deepcopy(dict(tables))
    stages = [name for name in changed if name != "summary"]
    for stage, options in overrides.items():
        if stage not in stages:
            raise BadFileError(f"{where}: the recipe has no stage {stage!r}; there are {', '.join(stages)}")
        if options is False:
            del changed[stage]
            continue
        if not isinstance(options, dict):
            raise BadFileError(f"{where}: {stage} must be a table of options, or false to leave it out")
        for option, value in options.items():
            if value is not False:
                changed[stage][option] = value
            elif changed[stage].pop(option, None) is None:
                raise BadFileError(f"{where}: [{stage}] has no {option} that could be removed")
    return changed


def _text(where: str, key: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise BadFileError(f"{where}: {key} must be a text{'' if value is None else f', not {value!r}'}")
    return value
