# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, write what docs/benchmarks.md says, and refuse wrong arguments."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from wavedp.benchmarks import run, table
from wavedp.benchmarks.cases import SUITES
from wavedp.cli import main

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
COLUMNS = (
    "case,provider,floor,device,threads,dtype,shape,bytes,passes,repeats,calls,median_ms,q20_ms,q80_ms,gb_per_s,floor_ratio,"
    "peak_bytes,booked_bytes,"
    "python,torch,triton,ptwt,pytorch_wavelets,PyWavelets,opacus,fastDP,transformers,wavedp,commit,date"
)
LARGE = {  # case: bytes of a pixel that are read and written
    "wavedec2-L1": 8,
    "wavedec2-L3": 8,
    "wavedec2-L5": 8,
    "waverec2-L1": 8,
    "waverec2-L3": 8,
    "wavedec2_backward-L1": 8,
    "wavedec2_backward-L3": 8,
    "waverec2_backward-L3": 8,
    "coarse-L3": 4 + 4 / 64,
    "coarse_uint8-L3": 1 + 4 / 64,
    "wavelet_tokens-L3": 8,
    "wavelet_untokens-L3": 8,
}
PIXELS = 2 * 3 * 32 * 64
CPU = torch.device("cpu")
Results = Mapping[str, Path]
Script = Callable[..., Any]  # of conftest.py


def quick_cases(suite: str) -> list[str]:
    """Those that have a quick size; of one model a small one is enough."""
    return [case.name for case in SUITES[suite] if case.sizes["quick"]]


@pytest.mark.parametrize("suite", SUITES)
def test_a_quick_run_writes_a_row_for_each_provider(results: Results, suite: str) -> None:
    file = results[suite]
    header, *_ = file.read_text(encoding="utf-8").splitlines()
    assert header == COLUMNS
    assert file.name.startswith(f"{suite}-cpu-")
    rows = table.read([file])
    assert [name for (name,) in table.distinct(rows, "case")] == quick_cases(suite)
    for row in rows:
        assert 0 < float(row["q20_ms"]) <= float(row["median_ms"]) <= float(row["q80_ms"])
        (floor,) = (r for r in rows if (r["case"], r["provider"]) == (row["case"], row["floor"]))
        assert (row["repeats"], row["torch"]) == ("3", torch.__version__)
        if (
            row["floor"] == "non-private" or suite == "sampling"
        ):  # a step is not bounded by bytes, and its ratio is taken in each repeat
            assert (row["bytes"], row["gb_per_s"]) == ("", "")
            assert float(row["floor_ratio"]) > 0
            continue
        rate = float(row["bytes"]) / float(row["median_ms"]) / 1e6
        assert float(row["gb_per_s"]) == pytest.approx(rate, rel=1e-2)
        if suite == "noise":  # ratios are taken in each repeat here too
            assert float(row["floor_ratio"]) > 0
            assert int(row["passes"]) >= 1
            continue
        assert row["passes"] == ""
        ratio = float(floor["median_ms"]) / float(row["median_ms"])
        assert float(row["floor_ratio"]) == pytest.approx(ratio, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize(("name", "bytes_per_pixel"), LARGE.items())
def test_a_case_moves_its_bytes_and_has_its_rivals(results: Results, name: str, bytes_per_pixel: float) -> None:
    here = {row["provider"]: row for row in table.read([results["wavelet"]]) if row["case"] == name}
    assert {int(row["bytes"]) for key, row in here.items() if key not in ("sum", "copy_ of the input")} == {
        round(PIXELS * bytes_per_pixel)
    }
    wanted = {"wavedp", "eager"}
    if "backward" not in name:
        wanted |= {"wavedp, out="}
    if "coarse" in name:
        wanted |= {"avg_pool2d"}
    else:
        wanted |= {"F.conv2d"}
        wanted |= {rival for rival in ("ptwt", "pytorch_wavelets") if importlib.util.find_spec(rival)}
    assert wanted <= set(here)
    floors = {"sum"} if "coarse" in name else {"clone"} if "backward" in name else {"copy_", "clone"}
    assert {row["floor"] for row in here.values()} == floors
    if "coarse" in name:
        image = PIXELS * round(bytes_per_pixel)
        assert (int(here["sum"]["bytes"]), int(here["copy_ of the input"]["bytes"])) == (image, 2 * image)


def test_each_public_function_is_timed_on_a_small_image() -> None:
    small = {case.name.removeprefix("small-").split("-")[0] for case in SUITES["wavelet"] if "small" in case.name}
    assert small >= {"dwt2", "idwt2", "wavedec2", "waverec2", "coarse", "wavelet_tokens", "wavelet_untokens"}


def test_the_command_prints_a_block_and_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "wavelet", "coarse-L3", "--quick", "--repeats", "2", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "coarse-L3   2x3x32x64 float32, 49.9 kB to move" in shown
    assert [line.split("  ")[2] for line in shown.splitlines() if line.startswith("    ") and "│" in line][:2] == [
        "sum",
        "copy_ of the input",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["scattering"], "unknown suite scattering; there is wavelet, dp, noise"),
        (["wavelet", "dwt3"], "unknown case dwt3; there are wavedec2-L1, wavedec2-L3"),
        (["--repeats", "0"], "--repeats must be at least 1, not 0"),
        (["--sample-ms", "nan"], "--sample-ms must be more than 0, not nan"),
        (["--device", "meta"], "--device must be cpu or cuda, not meta"),
        (["--quick", "--out", str(BENCHMARKS / "results")], "--quick times nothing worth keeping"),
    ],
)
def test_a_wrong_argument_is_refused(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert complaint in capsys.readouterr().err


def test_the_script_refuses_as_the_command_does(script: Script) -> None:
    done = script("run.py", "--quick")
    assert done.returncode == 2
    assert "name another folder with --out" in done.stderr


def test_a_suite_without_a_size_for_the_device_keeps_nothing(tmp_path: Path) -> None:
    assert main(["bench", "dp", "gpt-768", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_name_stands_for_every_level() -> None:
    chosen = run.chosen_cases("wavelet", ["waverec2", "coarse-L3"])
    assert [case.name for case in chosen["wavelet"]] == ["waverec2-L1", "waverec2-L3", "coarse-L3"]
    assert run.chosen_cases(None, []) == SUITES


def test_a_later_run_keeps_the_rows_of_other_cases(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    run.write_rows(path, [{"case": "a", "median_ms": "1"}])
    run.write_rows(path, [{"case": "b", "median_ms": "2"}])
    run.write_rows(path, [{"case": "a", "median_ms": "3"}])
    assert path.read_text().split() == ["case,median_ms", "b,2", "a,3"]


def test_columns_that_changed_leave_the_kept_rows(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    run.write_rows(path, [{"case": "a", "gone": "x", "median_ms": "1"}])
    run.write_rows(path, [{"case": "b", "median_ms": "2", "new": "y"}])
    assert path.read_text().split() == ["case,median_ms,new", "a,1,", "b,2,y"]
    assert list(tmp_path.iterdir()) == [path]


def test_results_survive_a_failure_to_write_them(tmp_path: Path) -> None:
    class Unprintable:
        def __str__(self) -> str:
            raise OSError("no space left")

    path = tmp_path / "results.csv"
    run.write_rows(path, [{"case": "a", "median_ms": "1"}])
    with pytest.raises(OSError, match="no space left"):
        run.write_rows(path, [{"case": "b", "median_ms": Unprintable()}])  # type: ignore[dict-item]
    assert path.read_text().split() == ["case,median_ms", "a,1"]


def test_the_device_that_is_asked_for_becomes_current(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert run.chosen_device(None) == run.chosen_device("cuda") == torch.device("cuda")
    assert run.chosen_device("cpu") == CPU
    assert current == []
    assert run.chosen_device("cuda:1") == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")]
    with pytest.raises(ValueError, match="--device cuda:2 is not there; the last is cuda:1"):
        run.chosen_device("cuda:2")
    assert len(current) == 1
