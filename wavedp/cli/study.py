# SPDX-License-Identifier: Apache-2.0
"""Runs a study and compares its rows, each a recipe with something changed (configs/fashion-mnist-study.toml is one).

PRIVACY: the private stage of every row is a private run on the same images, and spends a budget OF ITS OWN. What
all of them release together costs the composition of their budgets: private_runs.json names every one before it starts,
and summary.json adds them up. The figures are computed from real images without noise and are NOT private, and a row
that is chosen by looking at them is not covered by that row's epsilon, nor by the sum.

Every row is the recipe with overrides. Stages that agree between rows, with all that they read, are run once, in
stages/<stage>-<digest> inside --out. The command lines of all rows are read before anything is run. Finished stages and
rows are not run again: the same command continues where it was stopped or killed. Several processes may run rows of one
study in one --out, each with --rows of its own: a stage is run by one of them, and the others wait for it. A row
measured on images of --public stays in the results where they are not named again, and leaves them where others are.

Writes results.csv (a row for each row of the study: epsilon, parameters, loss on the images that the private stage held
out, accuracy of the evaluation; seconds and attempts of every stage), summary.json and results.png after every row. A
private stage that was killed has lost the steps since its last checkpoint; its privacy.txt says how many.
"""

import argparse
import secrets
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from wavedp.cli import arguments as shared
from wavedp.cli.recipe_file import SOURCES
from wavedp.cli.recipe_stages import (
    SUMMARY_FILE,
    add_sources,
    check_sources,
    command_line,
    digests,
    parse,
    read_summary,
    run_stage,
    sources,
)
from wavedp.cli.study_file import Row, read_study
from wavedp.cli.study_results import (
    FIGURES,
    Parsed,
    draw,
    last_of,
    measure,
    planned_cost,
    source_of_held_out,
    spent,
    table,
)
from wavedp.errors import BadFileError
from wavedp.storage import alone, read_json, write_json
from wavedp.training.results import write_rows
from wavedp.training.runs import RunFolder

STAGES = "stages"
STAGE_FILE = "stage.json"
PRIVATE_RUNS_FILE = "private_runs.json"
"""Every private stage that ever began, with what it may cost; nothing is taken out."""
TIMES = ("seconds", "cpu_seconds", "attempts")
"""What is told of each stage of a row; see `run_stage`."""
NOTE = (
    "NOT private: computed from real images without noise. The private stage of every row spends a budget of its own; "
    "'spent' adds up all of them. Choosing a row by these figures is covered by no epsilon."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", type=Path, metavar="FILE", help="study, a TOML file")
    add_sources(parser)
    parser.add_argument("--rows", metavar="A,B,...", help="names of the rows to run (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")
    shared.add_run(parser)


@dataclass(frozen=True)
class Plan:
    """How a row is run. ``sources``: the images that it reads, by their name in `SOURCES`. By stage: ``folders``, its
    folder's name; ``lines``, its command line; ``parsed``, what the command makes of that."""

    row: Row
    sources: dict[str, str]
    folders: dict[str, str]
    lines: dict[str, list[str]]
    parsed: dict[str, argparse.Namespace]


def run(arguments: argparse.Namespace) -> None:
    study = read_study(arguments.study)
    chosen = study.chosen(arguments.rows)
    for row in study.rows:  # of rows not chosen the private images too: the base's held-out ones measure public models
        needed = SOURCES if row in chosen else ("data",)
        check_sources(row.recipe, arguments, f"{arguments.study}: row {row.name!r}", needed)
    base = planned(Row("all", "", study.base), arguments).parsed
    plans = [planned(row, arguments) for row in study.rows]  # all, before the first is run
    for plan in plans:
        check_measurable(plan, base, arguments.study)
    if arguments.dry_run:
        show([plan for plan in plans if plan.row in chosen])
        return
    device = shared.prepare_device(arguments)
    read_summary(arguments.out, "study")  # of a recipe: refused before it is touched
    RunFolder(arguments.out, shared.settings(arguments), overwrite=True)
    print(f"{study.summary}\n{NOTE}")
    try:
        for number, plan in enumerate(plans, start=1):
            if plan.row not in chosen:
                continue
            print(f"row {number}/{len(plans)}: {plan.row.name}", flush=True)
            run_row(plan, base, device, arguments.out)
            write_results(plans, arguments, study.summary)
    finally:
        rows = write_results(plans, arguments, study.summary)
        total = read_summary(arguments.out, "study")["spent"]
        print(
            f"{table(rows)}\n{NOTE}\n{total['private_runs']} private runs in {arguments.out}: together epsilon "
            f"{total['epsilon']:.6g} at delta {total['delta']:.6g}"
        )


def planned(row: Row, arguments: argparse.Namespace) -> Plan:
    folders = stage_folders(row, arguments)
    out = arguments.out / STAGES
    lines = {stage.name: command_line(stage, out, arguments, folders) for stage in row.recipe.stages}
    parsed = {name: parse(line, f"{arguments.study}: row {row.name!r}, {name}") for name, line in lines.items()}
    read = {name: source for name, source in sources(arguments).items() if row.recipe.needs(name)}
    return Plan(row, read, folders, lines, parsed)


def stage_folders(row: Row, arguments: argparse.Namespace) -> dict[str, str]:
    """By stage, the name of its folder."""
    return {name: f"{name}-{digest[:12]}" for name, digest in digests(row.recipe.stages, arguments).items()}


def check_measurable(plan: Plan, base: Parsed, file: Path) -> None:
    """Raises BadFileError for a row of which nothing would be known in the end."""
    if source_of_held_out(plan.parsed, base) is None and last_of("evaluate", plan.parsed) is None:
        raise BadFileError(
            f"{file}: row {plan.row.name!r} has nothing to compare: give the private stage a hold-out, or the recipe a "
            "stage evaluate"
        )


def show(plans: Sequence[Plan]) -> None:
    """The commands, each once."""
    shown: set[str] = set()
    private: set[str] = set()
    for plan in plans:
        print(f"# {plan.row.name}" + (f": {plan.row.note}" if plan.row.note else ""))
        for name, folder in plan.folders.items():
            print(f"# {folder}, as above" if folder in shown else shlex.join(["wavedp", *plan.lines[name]]))
            shown.add(folder)
            if plan.parsed[name].command == "finetune":
                private.add(folder)
    print(f"# {len(plans)} rows, {len(shown)} stages; {len(private)} are private runs, each with its own budget")


def run_row(plan: Plan, base: Parsed, device: torch.device, out: Path) -> None:
    """Runs what is not finished of a row, measures it, and keeps the figures in summary.json."""
    records: dict[str, dict[str, Any]] = {}
    for number, stage in enumerate(plan.row.recipe.stages, start=1):
        folder = plan.folders[stage.name]
        title, place = f"  {number}/{len(plan.folders)} {folder}", out / STAGES / folder
        reads = {name: records[name]["run"] for name in sorted({*stage.references()} & {*records})}
        with alone(place, partial(print, f"{title}: waiting for the process that runs it", flush=True)):
            records[stage.name] = record = read_record(place)
            if record.get("reads", reads) != reads:
                raise BadFileError(
                    f"{place} was made from a run of another stage that is gone; remove it to make it anew"
                )
            finished = "finished" in record
            print(title + (": finished before" if finished else ""), flush=True)
            if not finished:
                run_recorded(plan.parsed[stage.name], place, record | {"reads": reads}, out)
                record.update(read_record(place))
    runs = {name: record["run"] for name, record in records.items()}
    known = read_summary(out, "study").get("rows", {}).get(plan.row.name, {})
    current = known.get("runs") == runs and known["figures"].keys() == {*FIGURES}
    figures = known["figures"] if current else measure(plan.parsed, base, device)
    times = {name: {key: record[key] for key in TIMES} for name, record in records.items()}
    about = {"note": plan.row.note, "sources": plan.sources, "stages": plan.folders}
    row = {**about, "runs": runs, "figures": figures, "times": times}
    with alone(out):
        summary = read_summary(out, "study")
        rows = {**summary.get("rows", {}), plan.row.name: row}
        write_json(out / SUMMARY_FILE, {"command": "study", **summary, "rows": rows})


def run_recorded(parsed: argparse.Namespace, place: Path, record: dict[str, Any], out: Path) -> None:
    """Runs a stage. A private one that begins is put down with what it may cost before anything else happens."""
    if "run" not in record:
        record["run"] = secrets.token_hex(8)  # of two runs of the same stage, after the first was removed
        if parsed.command == "finetune":
            cost = {"stage": place.name, "run": record["run"], **planned_cost(parsed)}
            with alone(out):
                write_json(out / PRIVATE_RUNS_FILE, [*private_runs(out), cost])
    run_stage(parsed, place, record, partial(write_json, place / STAGE_FILE, record))


def private_runs(out: Path) -> list[dict[str, Any]]:
    """What `PRIVATE_RUNS_FILE` holds."""
    file = out / PRIVATE_RUNS_FILE
    runs = read_json(file) if file.is_file() else []
    if not isinstance(runs, list) or not all(isinstance(run, dict) and {"epsilon", "delta"} <= {*run} for run in runs):
        raise BadFileError(f"{file} is no record of private runs: it was damaged; use another folder")
    return runs


def read_record(folder: Path) -> dict[str, Any]:
    """What is known of a stage."""
    file = folder / STAGE_FILE
    record = read_json(file) if file.is_file() else {}
    if not isinstance(record, dict):
        raise BadFileError(f"{file} is no record of a stage: it was damaged; remove it to run the stage again")
    return record


def write_results(plans: Sequence[Plan], arguments: argparse.Namespace, summary_text: str) -> list[dict[str, Any]]:
    """Writes results.csv, results.png and summary.json from the rows measured so far, which are returned. Rows of other
    studies in the same folder stay in summary.json."""
    out = arguments.out
    with alone(out):
        found = read_summary(out, "study").get("rows", {})
        names = [plan.row.name for plan in plans if is_of(plan.row, arguments, found.get(plan.row.name))]
        known = {name: found[name] for name in names}
        total = spent(private_runs(out))
        about = {"command": "study", "private": False, "note": NOTE, "summary": summary_text, "spent": total}
        write_json(out / SUMMARY_FILE, {**about, "rows": {**found, **known}})
        stages = list(dict.fromkeys(name for plan in plans for name in plan.folders))
        rows = [as_row(name, row, stages) for name, row in known.items()]
        if rows:
            write_rows(out / "results.csv", rows)
            draw(out / "results.png", rows)
    return rows


def is_of(row: Row, arguments: argparse.Namespace, measured: dict[str, Any] | None) -> bool:
    """Whether ``row`` is what was ``measured``, on the images of then where the command line names none."""
    if measured is None:
        return False
    then = measured.get("sources", {})
    meant = {name: then.get(name) if getattr(arguments, name) is None else getattr(arguments, name) for name in SOURCES}
    folders: dict[str, str] = measured["stages"]
    return folders == stage_folders(row, argparse.Namespace(**{**vars(arguments), **meant}))


def as_row(name: str, row: dict[str, Any], stages: Sequence[str]) -> dict[str, Any]:
    """A row of results.csv; a stage that it does not have took no time."""
    times = row["times"]
    seconds = {f"{stage}_{key}": times[stage][key] if stage in times else None for stage in stages for key in TIMES}
    total = {key: round(sum(time[key] for time in times.values()), 1) for key in ("seconds", "cpu_seconds")}
    figures = {key: row["figures"].get(key) for key in FIGURES}  # a row of an earlier version has fewer
    return {"row": name, **figures, **total, **seconds, "private": False}
