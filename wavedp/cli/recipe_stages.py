# SPDX-License-Identifier: Apache-2.0
"""The stages of a recipe as commands of this package: their command lines, what decides their results, and running one
with its time taken."""

import argparse
import contextlib
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from wavedp.cli import arguments as shared
from wavedp.cli.finetune import check_options
from wavedp.cli.pretrain import model_folder
from wavedp.cli.recipe_file import SOURCES, Recipe, Stage
from wavedp.data import NAMED_SOURCES
from wavedp.errors import BadFileError, InvalidValueError
from wavedp.storage import CONFIG_FILE, read_json, weights_digest
from wavedp.training.runs import RUN_FILE

SUMMARY_FILE = "summary.json"
RESULTS = {"finetune": "privacy.json", "evaluate": "metrics.json"}
"""What a stage's command writes that the record of the stage repeats."""


def add_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="SOURCE", help="the sensitive images, @data in the recipe")
    parser.add_argument("--public", metavar="SOURCE", help="public images, @public in the recipe")


def sources(arguments: argparse.Namespace) -> dict[str, str]:
    """Where the images are that a recipe calls by name."""
    return {name: getattr(arguments, name) or "" for name in SOURCES}


def check_sources(recipe: Recipe, arguments: argparse.Namespace, what: str, needed: Sequence[str] = SOURCES) -> None:
    """Raises InvalidValueError where ``what``, such as a recipe's file, needs images that were not named, where a name
    is empty, and where the public images hold the sensitive ones."""
    for name, kind in (("data", "sensitive"), ("public", "public")):
        given = getattr(arguments, name)
        if given == "":
            raise InvalidValueError(f"--{name} is empty: give a path, or one of {', '.join(NAMED_SOURCES)}")
        if name in needed and given is None and recipe.needs(name):
            raise InvalidValueError(f"{what} needs {kind} images: give --{name} SOURCE")
    data, public = arguments.data, arguments.public
    if data is not None and public is not None and is_within(data, public):
        raise InvalidValueError(
            f"--public {public} holds the sensitive images, --data {data}: public stages would train on them without "
            "noise; give other images"
        )


def is_within(source: str, other: str) -> bool:
    """Whether a source of images is ``other``, by whatever path, or lies in that folder."""
    if source in NAMED_SOURCES or other in NAMED_SOURCES:
        return source == other
    path, folder = (Path(os.path.realpath(name)) for name in (source, other))
    return folder in (path, *path.parents)


def command_line(
    stage: Stage, out: Path, arguments: argparse.Namespace, folders: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    """The whole command line of a stage whose folder, and those of earlier ones, are in ``out``; see
    `Stage.arguments`."""
    line = stage.arguments(out, sources(arguments), folders)
    line += [f"--out={out / folders.get(stage.name, stage.name)}", f"--device={arguments.device}"]
    line += _seed(stage, arguments)
    if arguments.threads:
        line.append(f"--threads={arguments.threads}")
    return line + ["--no-progress"] * arguments.no_progress


def _seed(stage: Stage, arguments: argparse.Namespace) -> list[str]:
    return [] if "seed" in stage.options else [f"--seed={arguments.seed}"]


def digests(stages: Iterable[Stage], arguments: argparse.Namespace) -> dict[str, str]:
    """By the name of each stage, the SHA-256 of what decides its result: its command line without folders and threads,
    in which a reference to an earlier stage is that stage's digest."""
    found: dict[str, str] = {}
    for stage in stages:
        decisive = {k: v for k, v in sorted(stage.options.items()) if k.replace("-", "_") not in shared.WITHOUT_EFFECT}
        line = replace(stage, options=decisive).arguments(Path("@"), sources(arguments), found)
        # with its name: of two stages that say the same, neither stands for the other, as a private one is random
        content = json.dumps([stage.name, *line, *_seed(stage, arguments)])
        found[stage.name] = hashlib.sha256(content.encode()).hexdigest()
    return found


def parse(line: list[str], where: object) -> argparse.Namespace:
    """What the command makes of its line; raises InvalidValueError with its complaint, and ``where`` before it. The
    constants of a private stage are looked at too."""
    from wavedp.cli import build_parser

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed = build_parser().parse_args(line)
        if parsed.command == "finetune":
            check_options(parsed)
    except SystemExit as error:
        raise InvalidValueError(f"{where}: {said.getvalue().strip()}") from error
    except (TypeError, ValueError) as error:
        raise InvalidValueError(f"{where}: {error}") from error
    return parsed


def reads_of(folder: Path) -> dict[str, Any] | None:
    """The digests of the models that a stage was made from, by their option; None where its folder does not say."""
    file = folder / RUN_FILE
    run = read_json(file) if file.is_file() else None
    reads = run.get("reads") if isinstance(run, dict) else None
    return reads if isinstance(reads, dict) else None


def is_current(parsed: argparse.Namespace, folder: Path) -> bool:
    """Whether a finished stage need not be run again: its folder is there, and the models that it was made from were
    not replaced. A private stage whose folder is gone stays finished: another run would spend another budget."""
    if not (folder / RUN_FILE).is_file():
        is_private: bool = parsed.command == "finetune"
        return is_private
    for name, digest in (reads_of(folder) or {}).items():
        place = getattr(parsed, name, None)
        model = None if place is None else model_folder(place)
        if model is not None and (model / CONFIG_FILE).is_file() and weights_digest(model) != digest:
            return False
    return True


def run_stage(parsed: argparse.Namespace, folder: Path, record: dict[str, Any], save: Callable[[], None]) -> None:
    """Runs a stage, and records ``attempts``, whether it is ``finished``, its ``result``, and its ``seconds`` and
    ``cpu_seconds`` over all attempts that were not killed. ``save`` writes ``record``."""
    record["attempts"] = record.get("attempts", 0) + 1
    save()
    begun, used = time.monotonic(), time.process_time()
    try:
        parsed.run(parsed)
        record["finished"] = True
    finally:
        record["seconds"] = round(record.get("seconds", 0) + time.monotonic() - begun, 1)
        record["cpu_seconds"] = round(record.get("cpu_seconds", 0) + time.process_time() - used, 1)
        result = folder / RESULTS.get(parsed.command, "")
        if record.get("finished") and result.is_file():
            record["result"] = read_json(result)
        save()


def read_summary(folder: Path, command: str) -> dict[str, Any]:
    """The summary that an earlier attempt of ``command`` left in ``folder``, {} if there was none.

    Raises BadFileError where it is no summary, and InvalidValueError where another command wrote it.
    """
    path = folder / SUMMARY_FILE
    if not path.is_file():
        return {}
    summary = read_json(path)
    if not isinstance(summary, dict) or not all(isinstance(summary.get(key, {}), dict) for key in ("stages", "rows")):
        raise BadFileError(f"{path} is no summary of a run: it was damaged; use another folder")
    writer = summary.get("command", "recipe")  # which did not always say so
    if writer != command:
        raise InvalidValueError(f"{folder} belongs to a run of 'wavedp {writer}'; use another folder")
    return summary
