# SPDX-License-Identifier: Apache-2.0
"""`wavedp account`: the three questions, their table, plot and JSON, and mistakes in one sentence."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from wavedp.cli import EXIT_ERROR, main
from wavedp.cli.account import table_steps
from wavedp.privacy.accounting import Phase, composed_epsilon, composed_epsilon_bounds, epsilon, epsilon_rdp

SMALL = ["--sample-rate", "0.05", "--delta", "1e-4"]


def account(*arguments: object) -> int:
    return main(["account", *map(str, arguments)])


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert account(*arguments, "--json") == 0
    return dict(json.loads(capsys.readouterr().out))


def test_json_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, *SMALL, "--noise-multiplier", 1.5, "--steps", 100)
    mechanism = {"sample_rate": 0.05, "noise_multiplier": 1.5, "delta": 1e-4}
    assert found["question"] == "epsilon"
    assert {name: found[name] for name in mechanism} == mechanism
    assert (found["steps"], found["epochs"]) == (100, 5.0)
    assert found["epsilon"] == epsilon(steps=100, **mechanism)
    assert [(row["epoch"], row["steps"]) for row in found["table"]] == [(i, 20 * i) for i in range(1, 6)]
    for row in found["table"]:
        assert row["epsilon"] == epsilon(steps=row["steps"], **mechanism)
        assert row["epsilon_rdp"] == epsilon_rdp(steps=row["steps"], **mechanism)
        assert 0.97 * row["epsilon"] < row["epsilon_lower_bound"] <= row["epsilon"]
    for name in ("epsilon", "epsilon_lower_bound", "epsilon_rdp"):
        assert found["table"][-1][name] == found[name]


def test_a_person_reads_the_answer_and_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert account(*SMALL, "--epsilon", 1.0, "--steps", 60, "--rows", 3) == 0
    lines = capsys.readouterr().out.splitlines()
    (marked,) = [line for line in lines if line.endswith("<- the answer")]
    assert marked.startswith("noise multiplier ")
    heading = next(i for i, line in enumerate(lines) if line.split()[:2] == ["epoch", "steps"])
    assert lines[heading].split() == ["epoch", "steps", "epsilon", ">=", "epsilon", "RDP"]
    rows = [line.split() for line in lines[heading + 1 :]]
    assert [row[:2] for row in rows] == [["1", "20"], ["2", "40"], ["3", "60"]]
    assert len({len(line) for line in lines[heading:]}) == 1
    assert 0.99 <= float(rows[-1][3]) <= 1.0


def test_a_label_histogram_is_charged(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, *SMALL, "--epsilon", 1.0, "--noise-multiplier", 2.0, "--label-noise", 15, "--rows", 2)
    parts = [Phase(2.0, 0.05, found["steps"]), Phase(15.0)]
    assert found["epsilon"] == composed_epsilon(parts, 1e-4) <= 1.0
    assert composed_epsilon([Phase(2.0, 0.05, found["steps"] + 1), Phase(15.0)], 1e-4) > 1.0
    assert found["epsilon_of_label_histogram"] == composed_epsilon(parts[1:], 1e-4)
    alone = answer(capsys, *SMALL, "--epsilon", 1.0, "--noise-multiplier", 2.0, "--rows", 2)
    assert alone["steps"] > found["steps"]


def test_batches_by_size_and_truncated(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--expected-batch-size", 50, "--dataset-size-bound", 1000, "--delta", "1e-4"]
    question = [*size, "--noise-multiplier", 1.5, "--steps", 40, "--rows", 1]
    plain = answer(capsys, *question)
    cut = answer(capsys, *question, "--truncated-batch-size", 80)
    assert plain["sample_rate"] == 0.05
    assert plain["epsilon"] == composed_epsilon([Phase(1.5, 0.05, 40)], 1e-4)
    assert (cut["epsilon_lower_bound"], cut["epsilon"]) == composed_epsilon_bounds(
        [Phase(1.5, 0.05, 40, 80, 1000)], 1e-4
    )
    assert cut["epsilon"] > plain["epsilon"]


def test_prv_beside_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("opacus")
    found = answer(capsys, *SMALL, "--noise-multiplier", 1.5, "--steps", 40, "--prv", "--rows", 2)
    for row in (found, *found["table"]):
        assert row["epsilon"] < row["epsilon_prv"] < row["epsilon"] + 0.012
    assert account(*SMALL, "--noise-multiplier", 1.5, "--steps", 40, "--prv", "--rows", 2) == 0
    assert "PRV" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_plot_shows_every_curve(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / f"epsilon.{suffix}"
    found = answer(capsys, *SMALL, "--epsilon", 1.0, "--steps", 40, "--rows", 2, "--plot", file)
    assert found["plot"] == str(file)
    assert [row["steps"] for row in found["table"]] == [20, 40]
    if suffix == "png":
        with Image.open(file) as picture:
            colours = picture.convert("RGB").getcolors(maxcolors=1 << 20)
        assert colours is not None
        shown = {colour for _, colour in colours}
        assert {(0x1F, 0x5F, 0xA8), (0x99, 0x99, 0x99), (0xB2, 0x18, 0x2B)} <= shown
    else:
        assert file.read_text(encoding="utf-8").lstrip().startswith("<?xml")


def test_not_even_one_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = ["--sample-rate", 0.5, "--delta", "1e-5", "--epsilon", 0.01, "--noise-multiplier", 0.5]
    assert account(*question) == 0
    assert "Not even one step" in capsys.readouterr().out
    found = answer(capsys, *question)
    assert (found["steps"], found["epsilon"], found["table"]) == (0, 0.0, [])
    assert account(*question, "--plot", tmp_path / "a.png") == EXIT_ERROR
    assert "nothing to draw" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("steps", "rate", "rows", "expected"),
    [
        (1000, 0.01, 10, [100 * i for i in range(1, 11)]),
        (1010, 0.01, 5, [300, 600, 900, 1010]),
        (610, 0.01, 3, [300, 610]),
        (250, 0.01, 10, [100, 200, 250]),
        (40, 0.01, 10, [10, 20, 30, 40]),
        (2, 0.01, 10, [1, 2]),
        (1, 1.0, 10, [1]),
        (7, 1.0, 3, [3, 6, 7]),
        (1000, 0.01, 1, [1000]),
        (0, 0.01, 10, []),
    ],
)
def test_rows_are_whole_epochs_and_end_with_the_last_step(
    steps: int, rate: float, rows: int, expected: list[int]
) -> None:
    assert table_steps(steps, rate, rows) == expected
    assert len(expected) <= rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*SMALL, "--steps", 5], "exactly two"),
        ([*SMALL, "--steps", 5, "--noise-multiplier", 1, "--epsilon", 1], "exactly two"),
        ([*SMALL, "--steps", 5, "--noise-multiplier", 0.01], "no finite epsilon; raise it"),
        ([*SMALL, "--steps", 5, "--noise-multiplier", 1, "--truncated-batch-size", 9], "needs --dataset-size-bound"),
        ([*SMALL, "--steps", 5, "--noise-multiplier", 1, "--dataset-size-bound", 20_000], "must be below 1 /"),
        ([*SMALL, "--steps", 5, "--noise-multiplier", 1, "--plot", "a.jpg"], ".png, .pdf, .svg"),
        ([*SMALL, "--steps", 5, "--noise-multiplier", 1, "--plot", "nowhere/a.png"], "no folder nowhere"),
        ([*SMALL, "--steps", 5, "--noise-multiplier", 1, "--prv", "--label-noise", 5], "--prv knows neither"),
        ([*SMALL, "--epsilon", 0.5, "--noise-multiplier", 1, "--label-noise", 2], "other phases alone have epsilon"),
        (
            ["--expected-batch-size", 50, "--dataset-size-bound", 20, *SMALL[2:], "--steps", 5, "--epsilon", 1],
            "larger than --dataset-size-bound",
        ),
        (["--expected-batch-size", 50, *SMALL[2:], "--steps", 5, "--epsilon", 1], "needs --dataset-size-bound"),
        (["--sample-rate", 1, "--delta", "1e-16", "--steps", 5, "--noise-multiplier", 5], "too small to be accounted"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert account(*arguments) == EXIT_ERROR
    error = capsys.readouterr().err
    assert error.startswith("wavedp account: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_without_matplotlib_the_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert account(*SMALL, "--steps", 5, "--noise-multiplier", 1, "--plot", "a.png") == EXIT_ERROR
    assert "pip install 'wavedp[account]'" in capsys.readouterr().err
