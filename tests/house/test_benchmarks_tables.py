# SPDX-License-Identifier: Apache-2.0
"""The tables, the pictures and the text that results become."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from wavedp.benchmarks import report, table
from wavedp.benchmarks.cases import SUITES

ASCII = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.mark.parametrize("suite", SUITES)
def test_results_become_a_table_and_a_picture(
    results: Mapping[str, Path], script: Callable[..., Any], tmp_path: Path, suite: str
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n\n{table.BEGINNINGS[suite]}\nstale\n{table.END}\n\nafter\n", encoding="utf-8")
    done = script("table.py", "--write", str(readme), *map(str, results.values()))
    assert done.returncode == 0, done.stderr
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("\n\nafter\n")
    assert "stale" not in text
    cases = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert cases == [case.name.removeprefix("small-") for case in SUITES[suite] if case.sizes["quick"]]

    pytest.importorskip("matplotlib", reason="needs matplotlib, of the extra [bench]")
    done = script("plot.py", str(results[suite]))
    assert done.returncode == 0, done.stderr
    assert results[suite].with_suffix(".png").read_bytes().startswith(b"\x89PNG")


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


@pytest.mark.parametrize("page", ["README.md", "docs/private_training.md", "docs/noise.md", "docs/models.md"])
def test_a_page_has_the_tables_of_the_results(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    made = table.tables(sorted((BENCHMARKS / "results").glob("*.csv")))
    assert table.written(text, made) == text, f"run benchmarks/table.py --write {page} benchmarks/results/*.csv"


def test_a_readme_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="markers"):
        table.replaced(f"{table.BEGIN} only", "table")
    with pytest.raises(ValueError, match=r"none of the markers .*benchmarks dp"):
        table.written("no table here", {})


def test_every_suite_has_its_own_place(tmp_path: Path) -> None:
    files = [tmp_path / "dp-cpu-x.csv", tmp_path / "wavelet-cpu-x.csv"]
    files[0].write_text("", encoding="utf-8")
    files[1].write_text("", encoding="utf-8")
    assert table.tables(files) == dict.fromkeys(SUITES, table.UNMEASURED)
    both = "".join(f"{begin}\n{table.END}\n" for begin in table.BEGINNINGS.values())
    text = table.written(both, {"wavelet": "W", "dp": "D", "noise": "N", "sampling": "S"})
    assert text.index(table.BEGIN) < text.index("\nW\n") < text.index(table.BEGINNINGS["dp"]) < text.index("\nD\n")
    assert text.index("\nD\n") < text.index(table.BEGINNINGS["noise"]) < text.index("\nN\n")
    assert table.written(f"{table.BEGIN}\n{table.END}", {"wavelet": "W", "dp": "D"}).count("D") == 0


def step(case: str, provider: str, ratio: float, peak: int | str = "") -> dict[str, str]:
    return {**row(case, provider, "non-private", 10 / ratio, 10), "peak_bytes": str(peak), "booked_bytes": "3000000"}


def test_the_table_of_steps_shows_what_they_cost() -> None:
    rows = [
        step("gpt", "non-private", 1, 2_000_000),
        step("gpt", "wavedp", 0.8, 4_400_000),
        step("gpt", "Opacus ew", 0.5),
        step("pipeline", "non-private", 1),
        step("pipeline", "wavedp", 0.5),
        row("ghost_norm", "sum", "sum", 1, 1),
        row("ghost_norm", "mm of all records", "sum", 3, 1),
        row("ghost_norm", "wavedp", "sum", 2, 1),
        row("ghost_norm", "one", "sum", 9, 1),
        row("ghost_norm", "other", "sum", 8, 1),
    ]
    text = table.private_markdown(rows)
    assert "| model | batch | non-private | `wavedp` | `Opacus ew` | output gradients |" in text
    assert "| `gpt` | 8x3x4x4 float32 | 10.0 ms, 2 MB | **1.25**, 4 MB | 2.00 | 3 MB |" in text
    assert "| `pipeline` | 8x3x4x4 float32 | 10.0 ms | **2.00** | raises | 3 MB |" in text
    assert "| `ghost_norm` | 8x3x4x4 float32 | 1 `sum` | **2** (0.50) | 8 (4.0) other |" in text
    assert table.function_cell({"median_ms": "9", "floor_ratio": "0.0123"}) == "**9** (0.012)"


def test_a_step_is_shown_with_its_cost_and_memory() -> None:
    rows = [{**step("gpt", "non-private", 1, 2_000_000), "bytes": ""}]
    rows.append({**step("gpt", "wavedp", 0.8, 4_400_000), "bytes": ""})
    _, title, _, heading, floor, ours = "\n".join(report.block(rows, ASCII)).split("\n")
    assert title == "gpt   8x3x4x4 float32, 3.0 MB of output gradients"
    assert heading.split()[3:8] == ["times", "as", "long", "peak", "memory"]
    assert floor.split()[7:11] == ["1.00", "2.0", "MB", "1.00x"]
    assert ours.split()[7:11] == ["1.25", "4.4", "MB", "0.80x"]


def test_what_a_small_call_costs_is_shown_over_the_floor() -> None:
    rows = [row("small-op", "torch.mul", "torch.mul", 0.0014, 0.0014)]
    rows.append(row("small-op", "wavedp", "torch.mul", 0.0098, 0.0014))
    *_, heading, floor, ours = report.block(rows, ASCII)
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
    assert report.bar(ratio, ASCII) == drawn


@pytest.mark.parametrize(
    ("milliseconds", "shown"), [("0.0123", "12.3 us"), ("3.456", "3.46 ms"), ("99.96", "100 ms"), ("1234", "1234 ms")]
)
def test_times_are_shown_in_a_unit_that_suits_them(milliseconds: str, shown: str) -> None:
    assert report.human_time(milliseconds) == shown
