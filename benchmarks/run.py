# SPDX-License-Identifier: Apache-2.0
"""Times every op beside its rivals and a plain copy of the same bytes.

A provider is checked on the benchmark's own inputs before it is timed; a wrong result ends the run.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import wavedp
from wavedp.benchmarks.cases import SUITES
from wavedp.benchmarks.measure import keep_freed_memory, paired_ratio, release_memory, time_in_turns
from wavedp.benchmarks.registry import Benchmark
from wavedp.benchmarks.report import Progress, block

HERE = Path(__file__).resolve().parent
RIVALS = ("ptwt", "pytorch_wavelets", "PyWavelets", "opacus", "fastDP", "transformers")
Row = dict[str, str]


def add_arguments(parser: argparse.ArgumentParser, out: Path | None = None) -> None:
    """``out`` is where results are kept if nothing is said; None: only shown."""
    parser.add_argument("suite", nargs="?", metavar="suite", help=f"of {', '.join(SUITES)}; none: all")
    parser.add_argument(
        "cases",
        nargs="*",
        metavar="case",
        help="a name as in 'wavedec2-L3', or what it begins with, as 'wavedec2'; none: all",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a CUDA device if there is one)")
    parser.add_argument("--repeats", type=int, default=7, help="samples taken of each provider")
    parser.add_argument("--sample-ms", type=float, default=30.0, help="length of a sample, of one call at least")
    parser.add_argument("--quick", action="store_true", help="tiny inputs and no torch.compile, to see that all runs")
    parser.add_argument("--out", type=Path, default=out, metavar="DIR", help="folder for a CSV file for each suite")
    parser.add_argument("--list", action="store_true", help="list the cases and stop")


def run(arguments: argparse.Namespace) -> None:
    """What both ``wavedp bench`` and ``benchmarks/run.py`` do.

    Raises:
        ValueError: an argument is wrong.
        WrongResult: a provider computes something else than the reference.
    """
    chosen = chosen_cases(arguments.suite, arguments.cases)
    if arguments.list:
        for suite, cases in chosen.items():
            print(f"{suite}: {' '.join(case.name for case in cases)}")
        return
    if arguments.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, not {arguments.repeats}")
    if not arguments.sample_ms > 0:
        raise ValueError(f"--sample-ms must be more than 0, not {arguments.sample_ms}")
    if arguments.quick and arguments.out is not None and arguments.out.resolve() == HERE / "results":
        raise ValueError("--quick times nothing worth keeping: name another folder with --out")
    device = chosen_device(arguments.device)

    keep_freed_memory()
    torch.backends.cudnn.allow_tf32 = False  # rivals convolve in float32 proper: TF32 fails the check
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    commit = versions()["commit"] or wavedp.__version__
    print(f"{device_name(device)}{threads}, torch {torch.__version__}, wavedp {commit}")
    sample_seconds = 0.0 if arguments.quick else arguments.sample_ms / 1e3
    for suite, cases in chosen.items():
        for case in cases:
            rows = []
            for size in case.sizes["quick" if arguments.quick else device.type]:
                rows += run_size(case, size, device, arguments.repeats, sample_seconds, quick=arguments.quick)
            if arguments.out is not None and rows:
                write_rows(arguments.out / f"{suite}-{slug(device_name(device))}.csv", rows)


def chosen_device(name: str | None) -> torch.device:
    """The device to time; one of several CUDA devices becomes the current one, on whose stream time is taken.

    Raises:
        ValueError: it is neither a CPU nor a CUDA device, or there is none such.
    """
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, not {device}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA device")
    if device.type == "cuda" and device.index is not None:
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"--device {device} is not there; the last is cuda:{torch.cuda.device_count() - 1}")
        torch.cuda.set_device(device)
    return device


def chosen_cases(suite: str | None, names: Sequence[str]) -> dict[str, list[Benchmark]]:
    if suite is not None and suite not in SUITES:
        raise ValueError(f"unknown suite {suite}; there is {', '.join(SUITES)}")
    suites = {suite: SUITES[suite]} if suite is not None else SUITES
    known = [case.name for cases in suites.values() for case in cases]
    for name in names:
        if not any(matches(name, case) for case in known):
            raise ValueError(f"unknown case {name}; there are {', '.join(known)}")
    return {
        suite: [case for case in cases if not names or any(matches(name, case.name) for name in names)]
        for suite, cases in suites.items()
    }


def matches(name: str, case: str) -> bool:
    """``wavedec2-L3`` is itself, and one of ``wavedec2``."""
    return case == name or case.startswith(f"{name}-")


def run_size(
    case: Benchmark, size: Any, device: torch.device, repeats: int, sample_seconds: float, *, quick: bool
) -> list[Row]:
    """One row for each floor and each provider, printed as a block."""
    shape, dtype = "x".join(map(str, size.shape)), str(size.dtype).removeprefix("torch.")
    progress = Progress(f"{case.name} {shape} {dtype}")
    release_memory()
    found = case.timed(size, device, quick=quick, progress=progress)
    timings = time_in_turns({name: t.call for name, t in found.items()}, device, repeats, sample_seconds, progress)
    progress.close()
    rows = []
    order = {floor: i for i, floor in enumerate(case.floors)}
    for name in sorted(timings, key=lambda name: (order[found[name].floor], order.get(name, len(order)))):
        timed, timing = found[name], timings[name]
        floor = timings[timed.floor]
        ratio = paired_ratio(floor, timing) if case.paired else floor.median / timing.median
        measured = {
            "case": case.name,
            "provider": name,
            "floor": timed.floor,
            "device": device_name(device),
            "threads": torch.get_num_threads() if device.type == "cpu" else "",
            "dtype": dtype,
            "shape": shape,
            "bytes": filled(timed.bytes),
            "passes": filled(timed.passes),
            "repeats": repeats,
            "calls": timing.calls,
            "median_ms": f"{timing.median * 1e3:.4g}",
            "q20_ms": f"{timing.q20 * 1e3:.4g}",
            "q80_ms": f"{timing.q80 * 1e3:.4g}",
            "gb_per_s": "" if timed.bytes is None else f"{timed.bytes / timing.median / 1e9:.4g}",
            "floor_ratio": f"{ratio:.3f}" if ratio >= 0.1 else f"{ratio:.3g}",
            "peak_bytes": filled(timed.peak_bytes),
            "booked_bytes": filled(timed.booked_bytes),
        }
        rows.append({column: str(value) for column, value in {**measured, **versions()}.items()})
    for line in block(rows, sys.stdout):
        print(line, flush=True)
    return rows


def filled(count: int | None) -> str:
    return "" if count is None else str(count)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Writes the rows, and keeps those of the file's cases that did not run this time.

    The columns are those of ``rows``: kept rows lose others and are empty where they lack one. The file is replaced
    as a whole, so that a run that fails here leaves the results that there were.
    """
    ran = {row["case"] for row in rows}
    kept: list[Row] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            kept = [row for row in csv.DictReader(file) if row.get("case") not in ran]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *rows])
    os.replace(unfinished, path)


def device_name(device: torch.device) -> str:
    """The CUDA device's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"CPU {found[1] if found else platform.machine()}"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@functools.cache
def versions() -> dict[str, str]:
    """What the figures depend on; an absent package and a tree without git are left empty."""

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return ""

    commit = ""
    if (HERE.parent / ".git").exists():
        describe = ["git", "--no-optional-locks", "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        **{name: version(name) for name in RIVALS},
        "wavedp": wavedp.__version__,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_arguments(parser, HERE / "results")
    try:
        run(parser.parse_args())
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
