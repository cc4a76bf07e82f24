# SPDX-License-Identifier: Apache-2.0
"""Times every op beside its rivals and a plain copy of the same bytes; ``--help`` lists the cases.

A provider is checked on the benchmark's own inputs before it is timed; a wrong result ends the run.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
from measure import keep_freed_memory, time_in_turns
from registry import Case, Shape, all_cases, check

import wavedp

HERE = Path(__file__).parent
FLOOR = "copy_"


def main() -> int:
    suites = all_cases()
    names = [case.name for cases in suites.values() for case in cases]
    best = "cuda" if torch.cuda.is_available() else "cpu"
    with_defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=with_defaults)
    parser.add_argument("cases", nargs="*", metavar="case", default=[], help=f"of {', '.join(names)}; none: all")
    parser.add_argument("--device", default=best, help="cpu, cuda or cuda:N")
    parser.add_argument("--repeats", type=int, default=5, help="samples taken of each provider")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the CSV files")
    parser.add_argument("--quick", action="store_true", help="tiny inputs, to see that all runs; needs --out")
    args = parser.parse_args()
    if unknown := set(args.cases) - set(names):
        parser.error(f"unknown case {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    if args.quick and args.out == HERE / "results":
        parser.error("--quick times nothing worth keeping: name another folder with --out")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device")

    keep_freed_memory()
    for suite, cases in suites.items():
        for case in (case for case in cases if not args.cases or case.name in args.cases):
            rows = list(run_case(case, device, args.repeats, args.quick))
            write_rows(args.out / f"{suite}-{slug(device_name(device))}.csv", rows)
    return 0


def run_case(case: Case, device: torch.device, repeats: int, quick: bool) -> Iterator[dict[str, str]]:
    """One row for each provider, dtype and shape; the first row of each group is the copy, the floor."""
    dtypes = (torch.float32,) if quick or device.type == "cpu" else (torch.float32, torch.bfloat16)
    for shape in case.shapes["quick" if quick else device.type]:
        for dtype in dtypes:
            yield from run_shape(case, shape, dtype, device, repeats, quick)


def run_shape(
    case: Case, shape: Shape, dtype: torch.dtype, device: torch.device, repeats: int, quick: bool
) -> Iterator[dict[str, str]]:
    inputs = case.inputs(shape, dtype, device)
    expected = case.expected(*(x.double() for x in inputs))
    elements = sum(t.numel() for t in (*inputs, *expected))  # each input read once, each output written once
    source = torch.randn(elements // 2, device=device).to(dtype)
    functions = {FLOOR: functools.partial(torch.empty_like(source).copy_, source)}
    for name, provider in case.providers(device, dtype).items():
        if quick and name == "torch.compile":
            continue
        check(f"{case.name}, {name}", provider(*inputs), expected)
        functions[name] = functools.partial(provider, *inputs)
    del expected
    moved = elements * source.element_size()

    timings = time_in_turns(functions, device, repeats, sample_seconds=0.0 if quick else 0.1)
    for name, timing in timings.items():
        measured = {
            "case": case.name,
            "provider": name,
            "device": device_name(device),
            "dtype": str(dtype).removeprefix("torch."),
            "shape": "x".join(map(str, shape)),
            "bytes": moved,
            "repeats": repeats,
            "median_ms": f"{timing.median * 1e3:.4g}",
            "q20_ms": f"{timing.q20 * 1e3:.4g}",
            "q80_ms": f"{timing.q80 * 1e3:.4g}",
            "gb_per_s": f"{moved / timing.median / 1e9:.4g}",
            "copy_ratio": f"{timings[FLOOR].median / timing.median:.3f}",
            "threads": torch.get_num_threads() if device.type == "cpu" else "",
        }
        line = "{case:12} {dtype:8} {shape:13} {provider:13} {median_ms:>8} ms {copy_ratio:>7}x copy_"
        print(line.format(**measured), flush=True)
        yield {column: str(value) for column, value in {**measured, **versions()}.items()}


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Writes the rows, and keeps those of the file's cases that did not run this time."""
    ran = {row["case"] for row in rows}
    kept: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            kept = [row for row in csv.DictReader(file) if row["case"] not in ran]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(kept + rows)


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

    describe = ["git", "--no-optional-locks", "describe", "--always", "--dirty"]
    described = subprocess.run(describe, cwd=HERE, capture_output=True, text=True, check=False)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "wavedp": wavedp.__version__,
        "commit": described.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


if __name__ == "__main__":
    sys.exit(main())
