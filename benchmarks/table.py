# SPDX-License-Identifier: Apache-2.0
"""Makes the README's table of results: ``python benchmarks/table.py [--readme README.md] benchmarks/results/*.csv``.

Without ``--readme`` it is printed. All figures are medians.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

Row = dict[str, str]
BEGIN, END = "<!-- benchmarks: made by benchmarks/table.py -->", "<!-- end of benchmarks -->"
UNMEASURED = "Nothing is measured yet: `make bench` fills this in."
COMPILED, CONVOLUTION = "torch.compile", "F.conv2d"
OURS, OURS_OUT = "wavedp", "wavedp, out="
SMALL_FLOOR = "torch.mul"
LEGEND = (
    "Milliseconds, medians. In brackets, for `wavedp`: the rate relative to the floor on its left, 1.00 moves bytes as "
    "fast as that does; for others: how many times longer they take than `wavedp` with fresh results."
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
        about = [f"{threads} threads"] if threads else []
        about += [f"torch {here[0]['torch']}", here[0]["date"]]
        lines += ["", f"**{device}**, {', '.join(about)}:", ""]
        large, small = ([row for row in here if (row["floor"] == SMALL_FLOOR) == wanted] for wanted in (False, True))
        if large:
            lines += large_table(large)
        if large and small:
            lines += [""]
        if small:
            lines += small_table(small)
    return "\n".join(lines)


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


def replaced(text: str, table: str) -> str:
    """``text`` with what stands between the markers replaced.

    Raises:
        ValueError: a marker is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the markers {BEGIN} and {END} are not both there")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, metavar="CSV")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="write the table between the markers in this file")
    arguments = parser.parse_args()
    table = markdown(read(arguments.results))
    if arguments.readme is None:
        print(table)
    else:
        text = arguments.readme.read_text(encoding="utf-8")
        arguments.readme.write_text(replaced(text, table), encoding="utf-8")


if __name__ == "__main__":
    main()
