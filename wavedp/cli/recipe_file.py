# SPDX-License-Identifier: Apache-2.0
"""Recipe files: the stages of a whole run, and the command line of each."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from wavedp.errors import BadFileError, MissingFileError

STAGE_COMMANDS = ("tokenizer", "pretrain", "espcn", "finetune", "sample", "upscale", "evaluate", "audit")
"""Commands that a stage may run."""
SET_BY_RUNNER = ("out", "device", "threads", "no-progress", "traceback")
LARGEST_FILE = 2**20
SOURCES = ("data", "public")
"""Images that a recipe's user names: the private ones, and public ones where the recipe asks for them."""


@dataclass(frozen=True)
class Stage:
    """One command of a recipe. ``options`` are its long options without dashes, ``name`` its folder's."""

    name: str
    command: str
    options: Mapping[str, Any]

    def arguments(
        self, out: Path, sources: Mapping[str, str], folders: Mapping[str, str] = MappingProxyType({})
    ) -> list[str]:
        """The command line, but for `SET_BY_RUNNER`; ``@data``, ``@public`` and ``@stage`` are filled in.

        ``sources`` says where the images of `SOURCES` are; ``folders`` names the folders of earlier stages inside
        ``out`` (default: as the stages are called).
        """
        line = [self.command]
        for option, value in self.options.items():
            if value is True:
                line.append(f"--{option}")
            elif isinstance(value, list):
                line += [f"--{option}", *(_text(item, out, sources, folders) for item in value)]
            elif value is not False:
                line.append(f"--{option}={_text(value, out, sources, folders)}")
        return line

    def references(self) -> Iterator[str]:
        """Names behind an @ in the values."""
        for value in self.options.values():
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, str) and item.startswith("@"):
                    yield item[1:].split("/", 1)[0]


@dataclass(frozen=True)
class Recipe:
    """What a recipe file says. ``stages`` run in this order."""

    summary: str
    stages: tuple[Stage, ...]

    def needs(self, source: str) -> bool:
        """Whether a stage reads the images of that name in `SOURCES`."""
        return any(source in stage.references() for stage in self.stages)


def read_recipe(path: Path) -> Recipe:
    """Reads a TOML file: a text ``summary``, and a table for each stage, in the order they run.

    The table's name is the stage's and names its command, unless its key ``command`` does; the other keys are the
    command's options. ``true`` sets a flag, a list is several values, ``"@data"`` stands for the private data,
    ``"@public"`` for public images of the user's, and ``"@stage"`` or ``"@stage/file"`` for the folder of an earlier
    stage.

    Raises:
        MissingFileError: there is no such file.
        BadFileError: it is no TOML, or says something else.
    """
    return recipe_from(str(path), read_toml(path, "recipe"))


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The content of a TOML file that is a ``what``, such as a recipe; raises as `read_recipe` does."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    if not path.is_file():
        raise MissingFileError(f"no such {what}: {path}")
    if path.stat().st_size > LARGEST_FILE:
        raise BadFileError(f"{path} is larger than {LARGEST_FILE} bytes: that is no {what}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadFileError(f"{path} is not a {what} in TOML: {error}") from error


def recipe_from(where: str, content: Mapping[str, Any]) -> Recipe:
    """The recipe that the content of a file says; ``where`` is what messages call it."""
    tables = dict(content)
    summary = summary_of(where, tables)
    stages: list[Stage] = []
    for name, table in tables.items():
        stages.append(_stage(where, name, table, [stage.name for stage in stages]))
    if not stages:
        raise BadFileError(f"{where} has no stage; its tables are stages, such as [tokenizer]")
    return Recipe(summary, tuple(stages))


def summary_of(where: str, content: dict[str, Any]) -> str:
    """Takes ``summary`` out of the content of a file."""
    summary = content.pop("summary", "")
    if not isinstance(summary, str):
        raise BadFileError(f"{where}: summary must be a text, not {summary!r}")
    return summary


def _stage(where: str, name: str, table: Any, earlier: list[str]) -> Stage:
    if not isinstance(table, dict):
        raise BadFileError(f"{where}: {name} must be a table of options, [{name}], not {table!r}")
    if name in SOURCES:
        raise BadFileError(
            f"{where}: [{name}] cannot name a stage: @{name} stands for the images of --{name}; give the stage "
            "another name, and its command by command="
        )
    if not name.replace("-", "").replace("_", "").isalnum():
        raise BadFileError(f"{where}: [{name}] cannot name a stage, whose folder it is: use letters, digits, - and _")
    options = dict(table)
    command = options.pop("command", name)
    if command not in STAGE_COMMANDS:
        raise BadFileError(
            f"{where}: [{name}] runs {command!r}, which is none of {', '.join(STAGE_COMMANDS)}; name one by command="
        )
    for option, value in options.items():
        if option in SET_BY_RUNNER:
            raise BadFileError(f"{where}: [{name}] sets {option}, which the run sets for all stages")
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, (str, int, float)) for item in items):
            raise BadFileError(f"{where}: [{name}] {option} must be a text, a number, true, false or a list of them")
    stage = Stage(name, command, options)
    for reference in stage.references():
        if reference not in SOURCES and reference not in earlier:
            raise BadFileError(
                f"{where}: [{name}] refers to @{reference}, which is no stage before it and not @data or @public"
            )
    return stage


def _text(value: Any, out: Path, sources: Mapping[str, str], folders: Mapping[str, str]) -> str:
    if not isinstance(value, str) or not value.startswith("@"):
        return str(value)
    stage, _, inside = value[1:].partition("/")
    if stage in SOURCES:
        return sources[stage]
    folder = out / folders.get(stage, stage)
    return str(folder / inside if inside else folder)
