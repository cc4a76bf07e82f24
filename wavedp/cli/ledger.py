# SPDX-License-Identifier: Apache-2.0
"""Checks a privacy ledger's chain and shows what its runs were charged. The file may be in use; nothing is changed.

Given a second file, checks that one of the two continues the other: of copies that were continued apart, neither
holds all that was spent. Exits with 2 if a ledger is damaged or forked.

  wavedp ledger faces.jsonl
  wavedp ledger faces.jsonl --copy /backup/faces.jsonl
"""

import argparse
import json
from pathlib import Path
from typing import Any

from wavedp.privacy import check_not_forked, read_ledger


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ledger", type=Path, metavar="FILE", help="ledger.jsonl of a run, or one that runs share")
    parser.add_argument("--copy", type=Path, metavar="FILE", help="an older or newer copy of the same ledger")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--traceback", action="store_true", help="show the Python traceback of an error")


def run(arguments: argparse.Namespace) -> None:
    contents = read_ledger(arguments.ledger)
    common = None if arguments.copy is None else check_not_forked(arguments.ledger, arguments.copy)
    epsilon, delta = contents.spent()
    runs: list[dict[str, Any]] = [
        {
            "run": name,
            "steps_charged": run.charged,
            "steps_planned": run.spec.steps,
            "released": sorted(run.released),
            "epsilon": run.spec.epsilon(),
            "delta": run.spec.delta,
        }
        for name, run in contents.runs.items()
    ]
    if arguments.json:
        budget = None if contents.budget is None else contents.budget.to_dict()
        print(json.dumps({"epsilon": epsilon, "delta": delta, "budget": budget, "runs": runs}, indent=2))
        return
    for each in runs:
        print(
            f"{each['run'] or 'single run'}: {each['steps_charged']} of {each['steps_planned']} steps charged; epsilon "
            f"{each['epsilon']:.6g} at delta {each['delta']:.6g} for all of them"
            + "".join(f"; released once: {name}" for name in each["released"])
        )
    print(f"all runs together: epsilon {epsilon:.6g} at delta {delta:.6g}")
    if contents.budget is not None:
        b = contents.budget
        print(f"budget: epsilon {b.epsilon:.6g} at delta {b.delta:.6g}, {b.composition} composition")
    if common is not None:
        print(f"the first {common} lines are the same in {arguments.copy}, and one file continues the other")
