# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, write what docs/benchmarks.md says, and refuse to time a wrong result."""

from __future__ import annotations

import csv
import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
COLUMNS = (
    "case,provider,device,dtype,shape,bytes,repeats,median_ms,q20_ms,q80_ms,gb_per_s,copy_ratio,threads,"
    "python,torch,triton,wavedp,commit,date"
)
CASES = ["dwt2", "idwt2", "wavedec2-L3", "waverec2-L3", "coarse-L3"]
PIXELS = 2 * 3 * 32 * 48


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CSV of a quick run of all cases."""
    out = tmp_path_factory.mktemp("results")
    done = script("run.py", "--quick", "--repeats", "3", "--out", str(out))
    assert done.returncode == 0, done.stderr
    (file,) = out.iterdir()
    return file


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The modules of benchmarks/, which are scripts side by side and not a package."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(BENCHMARKS)
    import measure
    import registry
    import run
    from cases import wavelet

    yield SimpleNamespace(measure=measure, registry=registry, run=run, wavelet=wavelet)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


def test_a_quick_run_writes_a_row_for_each_provider(results: Path) -> None:
    header, *_ = results.read_text(encoding="utf-8").splitlines()
    assert header == COLUMNS
    assert results.name.startswith("wavelet-cpu-")
    rows = list(csv.DictReader(results.open(newline="", encoding="utf-8")))
    assert list(dict.fromkeys(row["case"] for row in rows)) == CASES
    for case in CASES:
        here = [row for row in rows if row["case"] == case]
        assert (here[0]["provider"], here[0]["copy_ratio"]) == ("copy_", "1.000")
        assert {"copy_", "reference"} <= {row["provider"] for row in here}
        moved = PIXELS * 4 + (PIXELS // 64 if case == "coarse-L3" else PIXELS) * 4
        assert {int(row["bytes"]) for row in here} == {moved}
    for row in rows:
        assert 0 < float(row["q20_ms"]) <= float(row["median_ms"]) <= float(row["q80_ms"])
        rate = float(row["bytes"]) / float(row["median_ms"]) / 1e6
        assert float(row["gb_per_s"]) == pytest.approx(rate, rel=1e-2)
        assert (row["repeats"], row["torch"]) == ("3", torch.__version__)


def test_results_become_a_table_and_a_picture(results: Path) -> None:
    done = script("table.py", str(results))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[2].startswith("| case | input | copy_ |")
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[4 : 4 + len(CASES)]] == CASES

    pytest.importorskip("matplotlib", reason="needs matplotlib, of the extra [demo]")
    done = script("plot.py", str(results))
    assert done.returncode == 0, done.stderr
    assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_case_is_refused() -> None:
    done = script("run.py", "dwt3")
    assert done.returncode == 2
    assert "unknown case dwt3; there are dwt2, idwt2" in done.stderr


def test_a_later_run_keeps_the_rows_of_other_cases(tmp_path: Path, benchmarks: SimpleNamespace) -> None:
    path = tmp_path / "results.csv"
    benchmarks.run.write_rows(path, [{"case": "a", "median_ms": "1"}])
    benchmarks.run.write_rows(path, [{"case": "b", "median_ms": "2"}])
    benchmarks.run.write_rows(path, [{"case": "a", "median_ms": "3"}])
    assert path.read_text().split() == ["case,median_ms", "b,2", "a,3"]


def right(x: Tensor) -> list[Tensor]:
    """cA, cH, cV, cD by PyWavelets' formulas."""
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    return [(a + b + c + d) / 2, (a + b - c - d) / 2, (a - b + c - d) / 2, (a - b - c + d) / 2]


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (lambda bands: [bands[0], bands[2], bands[1], bands[3]], "output 1 is off by"),
        (lambda bands: [band * (1 + 1e-5) for band in bands], "output 0 is off by"),
        (lambda bands: [*bands[:3], bands[3] * float("nan")], "output 3 is off by nan"),
        (lambda bands: bands[:3], "3 outputs instead of 4"),
        (lambda bands: [band[..., :-1] for band in bands], "output 0 is .* instead of"),
    ],
    ids=["swapped", "inexact", "nan", "missing", "cropped"],
)
def test_a_wrong_result_is_never_timed(
    benchmarks: SimpleNamespace, wrong: Callable[[list[Tensor]], list[Tensor]], complaint: str
) -> None:
    calls = []

    def provider(x: Tensor) -> list[Tensor]:
        calls.append(x)
        return wrong(right(x))

    dwt2 = benchmarks.wavelet.CASES[0]
    case = dataclasses.replace(dwt2, providers=lambda device, dtype: {"rival": provider})
    with pytest.raises(benchmarks.registry.WrongResult, match=f"dwt2, rival: {complaint}"):
        list(benchmarks.run.run_case(case, torch.device("cpu"), repeats=2, quick=True))
    assert len(calls) == 1


def test_a_right_result_is_timed(benchmarks: SimpleNamespace) -> None:
    case = dataclasses.replace(benchmarks.wavelet.CASES[0], providers=lambda device, dtype: {"rival": right})
    rows = list(benchmarks.run.run_case(case, torch.device("cpu"), repeats=2, quick=True))
    assert [row["provider"] for row in rows] == ["copy_", "rival"]


def test_quantiles_are_those_of_the_samples(benchmarks: SimpleNamespace) -> None:
    timing = benchmarks.measure.summary([0.5, 0.1, 0.3, 0.2, 0.4, 0.6])
    assert (timing.q20, timing.median, timing.q80) == pytest.approx((0.2, 0.35, 0.5))
