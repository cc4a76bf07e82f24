# SPDX-License-Identifier: Apache-2.0
"""Makes the tables of results: ``python benchmarks/table.py [--write README.md ...] benchmarks/results/*.csv``.

A table stands between the markers of its suite in a file; without ``--write`` all are printed. Figures are medians.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from wavedp.benchmarks.report import short

Row = dict[str, str]
BEGIN, END = "<!-- benchmarks: made by benchmarks/table.py -->", "<!-- end of benchmarks -->"
BEGINNINGS = {  # by suite
    "wavelet": BEGIN,
    "dp": "<!-- benchmarks dp: made by benchmarks/table.py -->",
    "noise": "<!-- benchmarks noise: made by benchmarks/table.py -->",
    "sampling": "<!-- benchmarks sampling: made by benchmarks/table.py -->",
}
UNMEASURED = "Nothing is measured yet: `make bench` fills this in."
COMPILED, CONVOLUTION = "torch.compile", "F.conv2d"
OURS, OURS_OUT = "wavedp", "wavedp, out="
SMALL_FLOOR, STEP_FLOOR = "torch.mul", "non-private"
LEGEND = (
    "Milliseconds, medians. In brackets, for `wavedp`: the rate relative to the floor on its left, 1.00 moves bytes as "
    "fast as that does; for others: how many times longer they take than `wavedp` with fresh results."
)

STEP_LEGEND = (
    f"Training steps: how many times as long a step takes as `{STEP_FLOOR}`, the median of the ratios within a repeat, "
    "and memory at the peak above the idle process. The last column is what book-keeping holds: the gradients of the "
    "layers' outputs. Functions: milliseconds, and as in the README's table the rate relative to the floor, or how "
    "many times longer than `wavedp`."
)

NOISE_LEGEND = (
    "Medians. Passes are sweeps over all elements, MB what they read and write, by formula; the last column is how "
    "many times as long as the case's first line it takes, the median of the ratios within a repeat."
)

SAMPLING_LEGEND = (
    "Images a second, by medians; in brackets how many times as many as with all scales by the same provider. On a CPU "
    "`no cache` is left out at batch 1,024."
)


def read(paths: Iterable[Path]) -> list[Row]:
    """The rows of all files, in order."""
    rows: list[Row] = []
    for path in paths:
        with path.open(newline="", encoding="utf-8") as file:
            rows += csv.DictReader(file)
    return rows


def distinct(rows: Sequence[Row], *columns: str) -> list[tuple[str, ...]]:
    """The values of ``columns``, each once, in order of appearance."""
    return list(dict.fromkeys(tuple(row[column] for column in columns) for row in rows))


def markdown(rows: Sequence[Row]) -> str:
    """For each device a table of the large inputs and one of the small image."""
    if not rows:
        return UNMEASURED
    lines = [LEGEND]
    for device, threads in distinct(rows, "device", "threads"):
        here = [row for row in rows if (row["device"], row["threads"]) == (device, threads)]
        lines += ["", f"**{device}**, {about(here)}:", ""]
        large, small = ([row for row in here if (row["floor"] == SMALL_FLOOR) == wanted] for wanted in (False, True))
        if large:
            lines += large_table(large)
        if large and small:
            lines += [""]
        if small:
            lines += small_table(small)
    return "\n".join(lines)


def about(rows: Sequence[Row]) -> str:
    first = rows[0]
    threads = [f"{first['threads']} threads"] if first["threads"] else []
    return ", ".join([*threads, f"torch {first['torch']}", first["date"]])


def large_table(rows: Sequence[Row]) -> list[str]:
    """A line for each case and input: floors, this package, the compiled definition, and the best of the rest."""
    lines = [
        "| op | image | floor | `wavedp`, `out=` | floor | `wavedp`, fresh results | `torch.compile` | "
        "`F.conv2d` | best other |",
        "|---" * 9 + "|",
    ]
    for case, shape, dtype in distinct(rows, "case", "shape", "dtype"):
        names = {row["provider"] for row in rows if (row["case"], row["shape"], row["dtype"]) == (case, shape, dtype)}
        if "eager" not in names:  # no rivals: the CSV has it
            continue
        by_name = {
            (row["provider"], row["floor"]): row
            for row in rows
            if (row["case"], row["shape"], row["dtype"]) == (case, shape, dtype)
        }
        floors = [row for (name, floor), row in by_name.items() if name == floor]
        given = {name: row for (name, floor), row in by_name.items() if name != floor}
        into = floor_of(floors, given.get(OURS_OUT))
        fresh = floor_of(floors, given.get(OURS))
        ours = given.get(OURS)
        known = {OURS, OURS_OUT, COMPILED, CONVOLUTION, "eager"} | {
            name for name in given if name.startswith(("wavedp ", "copy_"))
        }
        others = [row for name, row in given.items() if name not in known]
        best = min(others, key=milliseconds, default=None)
        cells = [
            f"`{case}`",
            f"{shape} {dtype}",
            floor_cell(into),
            our_cell(given.get(OURS_OUT)),
            floor_cell(fresh),
            our_cell(ours),
            rival_cell(given.get(COMPILED), ours),
            rival_cell(given.get(CONVOLUTION), ours),
            rival_cell(best, ours) + (f" {best['provider']}" if best else ""),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def small_table(rows: Sequence[Row]) -> list[str]:
    """Microseconds of a call on one small image, beside one multiplication of it."""
    lines = [
        f"| one image, {rows[0]['shape']} | `torch.mul`, us | `wavedp`, us | over `torch.mul`, us | best other, us |",
        "|---" * 5 + "|",
    ]
    for (case,) in distinct(rows, "case"):
        here = {row["provider"]: row for row in rows if row["case"] == case}
        floor, ours = here[SMALL_FLOOR], here.get(OURS)
        others = [row for name, row in here.items() if not name.startswith(OURS) and name != SMALL_FLOOR]
        best = min(others, key=milliseconds, default=None)
        cells = [
            f"`{case.removeprefix('small-')}`",
            f"{milliseconds(floor) * 1e3:.1f}",
            f"{milliseconds(ours) * 1e3:.1f}" if ours else "",
            f"{(milliseconds(ours) - milliseconds(floor)) * 1e3:.1f}" if ours else "",
            f"{milliseconds(best) * 1e3:.1f} {best['provider']}" if best else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def milliseconds(row: Row) -> float:
    return float(row["median_ms"])


def floor_of(floors: Sequence[Row], provider: Row | None) -> Row | None:
    return next((row for row in floors if provider and row["provider"] == provider["floor"]), None)


def floor_cell(row: Row | None) -> str:
    return f"{row['median_ms']} `{row['provider']}`" if row else ""


def our_cell(row: Row | None) -> str:
    return f"**{row['median_ms']}** ({float(row['floor_ratio']):.2f})" if row else ""


def rival_cell(row: Row | None, ours: Row | None) -> str:
    if row is None:
        return ""
    return row["median_ms"] + (f" ({milliseconds(row) / milliseconds(ours):.1f})" if ours else "")


def private_markdown(rows: Sequence[Row]) -> str:
    """For each device a table of training steps and one of the functions."""
    if not rows:
        return UNMEASURED
    lines = [STEP_LEGEND]
    for device, threads in distinct(rows, "device", "threads"):
        here = [row for row in rows if (row["device"], row["threads"]) == (device, threads)]
        steps, functions = ([row for row in here if (row["floor"] == STEP_FLOOR) == kind] for kind in (True, False))
        lines += ["", f"**{device}**, {about(here)}:", ""]
        if steps:
            lines += step_table(steps)
        if steps and functions:
            lines += [""]
        if functions:
            lines += function_table(functions)
    return "\n".join(lines)


def step_table(rows: Sequence[Row]) -> list[str]:
    """A line for each model, a column for each trainer."""
    trainers = [name for (name,) in distinct(rows, "provider") if name != STEP_FLOOR]
    lines = [
        f"| model | batch | {STEP_FLOOR} | {' | '.join(f'`{name}`' for name in trainers)} | output gradients |",
        "|---" * (len(trainers) + 4) + "|",
    ]
    for case, shape, dtype in distinct(rows, "case", "shape", "dtype"):
        key = (case, shape, dtype)
        here = {row["provider"]: row for row in rows if (row["case"], row["shape"], row["dtype"]) == key}
        floor = here[STEP_FLOOR]
        cells = [f"`{case}`", f"{shape} {dtype}", f"{floor['median_ms']} ms{megabytes(floor['peak_bytes'])}"]
        cells += [step_cell(here.get(name)) for name in trainers]
        cells += [megabytes(floor["booked_bytes"]).removeprefix(", ")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def step_cell(row: Row | None) -> str:
    if row is None:
        return "raises"
    times = f"{1 / float(row['floor_ratio']):.2f}"
    return (f"**{times}**" if row["provider"] == OURS else times) + megabytes(row["peak_bytes"])


def megabytes(count: str) -> str:
    return f", {int(count) / 1e6:.0f} MB" if count else ""


def function_table(rows: Sequence[Row]) -> list[str]:
    """A line for each function and input: the floor, this package, and the best of the rest."""
    lines = ["| function | input | floor, ms | `wavedp`, ms | best other, ms |", "|---" * 5 + "|"]
    for case, shape, dtype in distinct(rows, "case", "shape", "dtype"):
        key = (case, shape, dtype)
        here = [row for row in rows if (row["case"], row["shape"], row["dtype"]) == key]
        ours = next((row for row in here if row["provider"] == OURS), None)
        floor = next(row for row in here if row["provider"] == row["floor"])
        others = [row for row in here if row not in (ours, floor) and not row["provider"].startswith("mm of")]
        best = min(others, key=milliseconds, default=None)
        cells = [f"`{case}`", f"{shape} {dtype}", floor_cell(floor), function_cell(ours)]
        cells += [rival_cell(best, ours) + (f" {best['provider']}" if best else "")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def function_cell(row: Row | None) -> str:
    """Small ratios too: norms compute more than they read."""
    return f"**{row['median_ms']}** ({short(float(row['floor_ratio']))})" if row else ""


def noise_markdown(rows: Sequence[Row]) -> str:
    """For each device a table with a line for each provider."""
    if not rows:
        return UNMEASURED
    lines = [NOISE_LEGEND]
    for device, threads in distinct(rows, "device", "threads"):
        here = [row for row in rows if (row["device"], row["threads"]) == (device, threads)]
        lines += ["", f"**{device}**, {about(here)}:", ""]
        lines += ["| case | provider | passes | MB | ms | ns an element | times as long |", "|---" * 7 + "|"]
        for case, shape, dtype in distinct(here, "case", "shape", "dtype"):
            first = f"`{case}` {shape} {dtype}"
            for row in (row for row in here if (row["case"], row["shape"], row["dtype"]) == (case, shape, dtype)):
                lines.append(f"| {' | '.join([first, *noise_cells(row)])} |")
                first = ""
    return "\n".join(lines)


def noise_cells(row: Row) -> list[str]:
    elements = math.prod(map(int, row["shape"].split("x")))
    times = f"{1 / float(row['floor_ratio']):.2f}"
    return [
        f"**`{row['provider']}`**" if row["provider"].startswith(OURS) else f"`{row['provider']}`",
        row["passes"],
        f"{int(row['bytes']) / 1e6:.0f}" if row["bytes"] else "",
        row["median_ms"],
        f"{milliseconds(row) * 1e6 / elements:.2f}",
        f"**{times}**" if row["provider"] == OURS else times,
    ]


def sampling_markdown(rows: Sequence[Row]) -> str:
    """For each device a table with a line for each model and number of scales at each batch size."""
    if not rows:
        return UNMEASURED
    lines = [SAMPLING_LEGEND]
    for device, threads in distinct(rows, "device", "threads"):
        here = [row for row in rows if (row["device"], row["threads"]) == (device, threads)]
        names = [name for (name,) in distinct(here, "provider")]
        lines += ["", f"**{device}**, {about(here)}:", ""]
        lines += [f"| case | batch | {' | '.join(f'`{name}`' for name in names)} |", "|---" * (len(names) + 2) + "|"]
        whole: dict[tuple[str, ...], float] = {}  # images a second with all scales: those of the model's last case
        for row in here:
            model = row["case"].rpartition("-scales-")[0]
            whole[model, row["shape"], row["dtype"], row["provider"]] = images_per_second(row)
        for case, shape, dtype in distinct(here, "case", "shape", "dtype"):
            by_name = {r["provider"]: r for r in here if (r["case"], r["shape"], r["dtype"]) == (case, shape, dtype)}
            model = case.rpartition("-scales-")[0]
            cells = [
                sampling_cell(by_name[name], whole[model, shape, dtype, name]) if name in by_name else ""
                for name in names
            ]
            lines.append(f"| `{case}` | {shape}{'' if dtype == 'float32' else f' {dtype}'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def images_per_second(row: Row) -> float:
    return int(row["shape"]) / milliseconds(row) * 1e3


def sampling_cell(row: Row, whole: float) -> str:
    rate = images_per_second(row)
    shown = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
    shown = f"**{shown}**" if row["provider"] == OURS else shown
    return shown if rate == whole else f"{shown} ({rate / whole:.1f})"


def replaced(text: str, table: str, suite: str = "wavelet") -> str:
    """``text`` with what stands between the markers of ``suite`` replaced.

    Raises:
        ValueError: a marker is missing.
    """
    before, begin, rest = text.partition(BEGINNINGS[suite])
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the markers {BEGINNINGS[suite]} and {END} are not both there")
    return f"{before}{begin}\n\n{table}\n\n{END}{after}"


def tables(paths: Iterable[Path]) -> dict[str, str]:
    """Every suite's table, of those of the files that are its own, ``<suite>-<device>.csv``."""
    paths = list(paths)
    makers = {"wavelet": markdown, "dp": private_markdown, "noise": noise_markdown, "sampling": sampling_markdown}
    return {
        suite: make(read(path for path in paths if path.name.partition("-")[0] == suite))
        for suite, make in makers.items()
    }


def written(text: str, made: Mapping[str, str]) -> str:
    """``text`` with the table of each suite whose marker it has.

    Raises:
        ValueError: it has none.
    """
    suites = [suite for suite, begin in BEGINNINGS.items() if begin in text]
    if not suites:
        raise ValueError(f"none of the markers {', '.join(BEGINNINGS.values())} is there")
    for suite in suites:
        text = replaced(text, made[suite], suite)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, metavar="CSV")
    parser.add_argument(
        "--write", action="append", default=[], type=Path, metavar="FILE", help="write between the markers in this file"
    )
    arguments = parser.parse_args()
    made = tables(arguments.results)
    for file in arguments.write:
        file.write_text(written(file.read_text(encoding="utf-8"), made), encoding="utf-8")
    if not arguments.write:
        print("\n\n".join(made.values()))


if __name__ == "__main__":
    main()
