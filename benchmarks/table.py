# SPDX-License-Identifier: Apache-2.0
"""Prints a Markdown table of benchmark results: ``python benchmarks/table.py benchmarks/results/*.csv``.

A cell reads ``median (20% to 80% quantile) ms, rate relative to copying the same bytes``.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

Row = dict[str, str]


def read(paths: Iterable[Path]) -> list[Row]:
    """The rows of all files, in order."""
    rows = []
    for path in paths:
        with path.open(newline="", encoding="utf-8") as file:
            rows += list(csv.DictReader(file))
    return rows


def distinct(rows: Sequence[Row], *columns: str) -> list[tuple[str, ...]]:
    """The values of ``columns``, each once, in order of appearance."""
    return list(dict.fromkeys(tuple(row[column] for column in columns) for row in rows))


def markdown(rows: Sequence[Row]) -> str:
    """One table for each device, a row for each case, shape and dtype, a column for each provider."""
    lines = []
    for (device,) in distinct(rows, "device"):
        here = [row for row in rows if row["device"] == device]
        providers = [provider for (provider,) in distinct(here, "provider")]
        lines += [f"**{device}**", ""]
        lines += [f"| case | input | {' | '.join(providers)} |", "|---" * (2 + len(providers)) + "|"]
        for key in distinct(here, "case", "shape", "dtype"):
            same = [row for row in here if (row["case"], row["shape"], row["dtype"]) == key]
            cells = {row["provider"]: cell(row) for row in same}
            case, shape, dtype = key
            lines += [f"| {case} | {shape} {dtype} | {' | '.join(cells.get(p, '') for p in providers)} |"]
        lines += [""]
    return "\n".join(lines)


def cell(row: Row) -> str:
    return f"{row['median_ms']} ({row['q20_ms']} to {row['q80_ms']}) ms, {float(row['copy_ratio']):.2f}x"


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"usage: {sys.argv[0]} CSV ...")
    print(markdown(read(map(Path, sys.argv[1:]))))
