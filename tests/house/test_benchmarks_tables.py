# SPDX-License-Identifier: Apache-2.0
"""The tables, the pictures and the text that results become."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from wavedp.benchmarks import report, table
from wavedp.benchmarks.cases import SUITES

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


def test_results_become_a_table_and_a_picture(results: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n\n{table.BEGIN}\nold\n{table.END}\n\nafter\n", encoding="utf-8")
    done = script("table.py", "--readme", str(readme), str(results))
    assert done.returncode == 0, done.stderr
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("\n\nafter\n")
    assert "old" not in text
    cases = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert cases == [case.name.removeprefix("small-") for case in SUITES["wavelet"]]

    pytest.importorskip("matplotlib", reason="needs matplotlib, of the extra [bench]")
    done = script("plot.py", str(results))
    assert done.returncode == 0, done.stderr
    assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def row(case: str, provider: str, floor: str, milliseconds: float, floor_milliseconds: float) -> dict[str, str]:
    same = {"device": "D", "threads": "2", "shape": "8x3x4x4", "dtype": "float32", "torch": "2", "date": "today"}
    ratio = f"{floor_milliseconds / milliseconds:.3f}"
    times = {"median_ms": str(milliseconds), "q20_ms": str(milliseconds), "q80_ms": str(milliseconds)}
    return {**same, **times, "case": case, "provider": provider, "floor": floor, "floor_ratio": ratio, "bytes": "96"}


def test_the_table_names_the_best_rival() -> None:
    rows = [
        row("op", "copy_", "copy_", 4, 4),
        row("op", "wavedp, out=", "copy_", 2, 4),
        row("op", "clone", "clone", 5, 5),
        row("op", "wavedp", "clone", 2.5, 5),
        row("op", "torch.compile", "clone", 10, 5),
        row("op", "eager", "clone", 20, 5),
        row("op", "ptwt", "clone", 50, 5),
        row("op", "pytorch_wavelets", "clone", 40, 5),
        row("small-op", "torch.mul", "torch.mul", 0.002, 0.002),
        row("small-op", "wavedp", "torch.mul", 0.01, 0.002),
        row("small-op", "ptwt", "torch.mul", 0.4, 0.002),
    ]
    text = table.markdown(rows)
    assert (
        "| `op` | 8x3x4x4 float32 | 4 `copy_` | **2** (2.00) | 5 `clone` | **2.5** (2.00) | 10 (4.0) |  "
        "| 40 (16.0) pytorch_wavelets |"
    ) in text
    assert "| `op` | 2.0 | 10.0 | 8.0 | 400.0 ptwt |" in text


def test_the_readme_has_the_table_of_the_results() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    made = table.markdown(table.read(sorted((BENCHMARKS / "results").glob("*.csv"))))
    assert table.replaced(readme, made) == readme, "run benchmarks/table.py --readme README.md benchmarks/results/*.csv"


def test_a_readme_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="markers"):
        table.replaced(f"{table.BEGIN} only", "table")


def test_what_a_small_call_costs_is_shown_over_the_floor() -> None:
    rows = [row("small-op", "torch.mul", "torch.mul", 0.0014, 0.0014)]
    rows.append(row("small-op", "wavedp", "torch.mul", 0.0098, 0.0014))
    *_, heading, floor, ours = report.block(rows, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    end = heading.index("over torch.mul") + len("over torch.mul")
    assert floor[:end].endswith(" 0.0 us")
    assert ours[:end].endswith(" 8.4 us")


@pytest.mark.parametrize(
    ("ratio", "drawn"),
    [
        (0.5, "########        |"),
        (1.0, "################|"),
        (1.5, "################|########"),
        (9.0, "#" * 16 + "|" + "#" * 16),
    ],
)
def test_the_bar_is_the_fraction_of_the_floor(ratio: float, drawn: str) -> None:
    assert report.bar(ratio, io.TextIOWrapper(io.BytesIO(), encoding="ascii")) == drawn


@pytest.mark.parametrize(
    ("milliseconds", "shown"), [("0.0123", "12.3 us"), ("3.456", "3.46 ms"), ("99.96", "100 ms"), ("1234", "1234 ms")]
)
def test_times_are_shown_in_a_unit_that_suits_them(milliseconds: str, shown: str) -> None:
    assert report.human_time(milliseconds) == shown
