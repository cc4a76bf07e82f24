# SPDX-License-Identifier: Apache-2.0
"""Runs every stage of a recipe, such as those in configs/: one command from public and private images to a result.

Each stage is a command of this package with the options that the recipe gives it, in a folder of its own inside --out.
Finished stages are not run again: the same command continues where it was stopped or killed. summary.json tells how
long each stage took, what the private one guarantees and what the evaluation found.
"""

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

from wavedp.cli import arguments as shared
from wavedp.cli.recipe_file import Recipe, Stage, read_recipe
from wavedp.errors import InvalidValueError
from wavedp.storage import make_folder, read_json, write_json

SUMMARY_FILE = "summary.json"
RESULTS = {"finetune": "privacy.json", "evaluate": "metrics.json"}
"""What a stage's command writes that the summary repeats."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="FILE", help="recipe, a TOML file")
    parser.add_argument("--data", metavar="SOURCE", help="the sensitive images, @data in the recipe")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")
    shared.add_run(parser)


def run(arguments: argparse.Namespace) -> None:
    recipe = read_recipe(arguments.recipe)
    if recipe.needs_data and arguments.data is None:
        raise InvalidValueError(f"{arguments.recipe} needs sensitive images: give --data SOURCE")
    lines = {stage.name: command_line(stage, arguments) for stage in recipe.stages}
    parsed = {name: parse(line, arguments.recipe) for name, line in lines.items()}  # all, before the first is run
    if arguments.dry_run:
        for line in lines.values():
            print("wavedp", *line)
        return
    shared.prepare_device(arguments)
    make_folder(arguments.out)
    print(recipe.summary)
    summary = open_summary(arguments.out / SUMMARY_FILE, recipe, lines)
    for number, stage in enumerate(recipe.stages, start=1):
        if "finished" in summary["stages"][stage.name]:
            print(f"{number}/{len(lines)} {stage.name}: finished before")
            continue
        print(f"{number}/{len(lines)} {stage.name}", flush=True)
        run_stage(stage, parsed[stage.name], summary, arguments.out)
    print_summary(summary)


def command_line(stage: Stage, arguments: argparse.Namespace) -> list[str]:
    line = stage.arguments(arguments.out, arguments.data or "")
    line += [f"--out={arguments.out / stage.name}", f"--device={arguments.device}"]
    if "seed" not in stage.options:
        line.append(f"--seed={arguments.seed}")
    if arguments.threads:
        line.append(f"--threads={arguments.threads}")
    return line + ["--no-progress"] * arguments.no_progress


def parse(line: list[str], file: Path) -> argparse.Namespace:
    from wavedp.cli import build_parser

    try:
        return build_parser().parse_args(line)
    except SystemExit as error:
        raise InvalidValueError(f"{file}: the stage 'wavedp {line[0]}' has an option that is refused, above") from error


def open_summary(path: Path, recipe: Recipe, lines: dict[str, list[str]]) -> dict[str, Any]:
    """What is known of earlier attempts. A stage whose command line, or that of one before it, is another one now
    has not finished."""
    stages: dict[str, Any] = {}
    known = read_json(path).get("stages", {}) if path.is_file() else {}
    digest = hashlib.sha256()
    for name, line in lines.items():
        digest.update(json.dumps(decisive(line)).encode())
        before = known.get(name, {})
        stages[name] = before if before.get("settings") == digest.hexdigest() else {"settings": digest.hexdigest()}
    return {"summary": recipe.summary, "stages": stages}


def decisive(line: list[str]) -> list[str]:
    """Without what does not decide a result."""
    return [part for part in line if not part.startswith(("--threads", "--device", "--no-progress"))]


def run_stage(stage: Stage, parsed: argparse.Namespace, summary: dict[str, Any], out: Path) -> None:
    entry = summary["stages"][stage.name]
    begun, used = time.monotonic(), time.process_time()
    try:
        parsed.run(parsed)
        entry["finished"] = True
    finally:
        entry["seconds"] = round(entry.get("seconds", 0) + time.monotonic() - begun, 1)
        entry["cpu_seconds"] = round(entry.get("cpu_seconds", 0) + time.process_time() - used, 1)
        result = out / stage.name / RESULTS.get(stage.command, "")
        if entry.get("finished") and result.is_file():
            entry["result"] = read_json(result)
        write_json(out / SUMMARY_FILE, summary)


def print_summary(summary: dict[str, Any]) -> None:
    width = max(len(name) for name in summary["stages"])
    for name, entry in summary["stages"].items():
        print(f"{name:{width}} {entry['seconds']:9.1f} s, {entry['cpu_seconds']:9.1f} s of CPU time")
    total = sum(entry["seconds"] for entry in summary["stages"].values())
    print(f"{'in all':{width}} {total:9.1f} s")
