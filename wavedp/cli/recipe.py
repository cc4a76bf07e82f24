# SPDX-License-Identifier: Apache-2.0
"""Runs every stage of a recipe, such as those in configs/: one command from public and private images to a result.

Each stage is a command of this package with the options that the recipe gives it, in a folder of its own inside --out.
Finished stages are not run again: the same command continues where it was stopped or killed. A public one whose folder
is gone is, and what was made from a model that was replaced by another since is not taken for finished; it then refuses
to go on. A private stage is never run a second time by itself. summary.json tells how long each stage took, what the
private one guarantees and what the evaluation found.
"""

import argparse
import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

from wavedp.cli import arguments as shared
from wavedp.cli.recipe_file import Recipe, read_recipe
from wavedp.cli.recipe_stages import (
    SUMMARY_FILE,
    add_sources,
    check_sources,
    command_line,
    digests,
    is_current,
    parse,
    read_summary,
    reads_of,
    run_stage,
)
from wavedp.errors import InvalidValueError
from wavedp.storage import make_folder, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="FILE", help="recipe, a TOML file")
    add_sources(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")
    shared.add_run(parser)


def run(arguments: argparse.Namespace) -> None:
    recipe = read_recipe(arguments.recipe)
    check_sources(recipe, arguments, str(arguments.recipe))
    lines = {stage.name: command_line(stage, arguments.out, arguments) for stage in recipe.stages}
    parsed = {name: parse(line, arguments.recipe) for name, line in lines.items()}  # all, before the first is run
    if arguments.dry_run:
        for line in lines.values():
            print("wavedp", *line)
        return
    shared.prepare_device(arguments)
    make_folder(arguments.out)
    print(recipe.summary)
    summary = open_summary(arguments.out, recipe, lines, digests(recipe.stages, arguments))
    save = partial(write_json, arguments.out / SUMMARY_FILE, summary)
    for number, stage in enumerate(recipe.stages, start=1):
        name, record, folder = stage.name, summary["stages"][stage.name], arguments.out / stage.name
        if "finished" in record and is_current(parsed[name], folder):
            print(f"{number}/{len(lines)} {name}: finished before")
            continue
        print(f"{number}/{len(lines)} {name}", flush=True)
        record.pop("finished", None)
        forget_readers(name, recipe, arguments.out, summary["stages"])
        run_stage(parsed[name], folder, record, save)
    print_summary(summary)


def open_summary(out: Path, recipe: Recipe, lines: dict[str, list[str]], settings: dict[str, str]) -> dict[str, Any]:
    """What is known of earlier attempts. A stage that something else decides now, or that reads one of which this is
    true, has not finished. ``settings`` are the stages' digests."""
    stages: dict[str, Any] = {}
    known = read_summary(out, "recipe").get("stages", {})
    former = former_digests(lines)
    for name in lines:
        before = known.get(name, {})
        same = before.get("settings") in (settings[name], former[name])
        stages[name] = {**(before if same else {}), "settings": settings[name]}
    return {"command": "recipe", "summary": recipe.summary, "stages": stages}


def forget_readers(name: str, recipe: Recipe, out: Path, stages: dict[str, Any]) -> None:
    """What was made from a stage that is run again has not finished, unless its folder says by digests from what.

    Raises:
        InvalidValueError: a private stage has finished and does not say it. Whether its model is of what the stage will
            make cannot be known, and another private run spends another budget.
    """
    for reader in recipe.stages:
        if name not in reader.references() or "finished" not in stages[reader.name] or reads_of(out / reader.name):
            continue
        if reader.command == "finetune":
            raise InvalidValueError(
                f"{out / reader.name} is a finished private stage that does not say from which models, and {name} has "
                "to be run again: use another --out, which spends another budget, or put the former folder back"
            )
        del stages[reader.name]["finished"]


def former_digests(lines: dict[str, list[str]]) -> dict[str, str]:
    """The digests that summaries had before they were independent of --out: of the lines of all stages so far."""
    digest, found = hashlib.sha256(), {}
    for name, line in lines.items():
        decisive = [part for part in line if not part.startswith(("--threads", "--device", "--no-progress"))]
        digest.update(json.dumps(decisive).encode())
        found[name] = digest.hexdigest()
    return found


def print_summary(summary: dict[str, Any]) -> None:
    width = max(len(name) for name in summary["stages"])
    for name, entry in summary["stages"].items():
        print(f"{name:{width}} {entry['seconds']:9.1f} s, {entry['cpu_seconds']:9.1f} s of CPU time")
    total = sum(entry["seconds"] for entry in summary["stages"].values())
    print(f"{'in all':{width}} {total:9.1f} s")
