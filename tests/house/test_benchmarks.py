# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, write what docs/benchmarks.md says, and refuse to time a wrong result."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from wavedp.benchmarks import measure, registry, report, run, table, transforms
from wavedp.benchmarks.cases import SUITES, wavelet
from wavedp.benchmarks.registry import Case, Provider, Size
from wavedp.cli import main
from wavedp.ops.backend import requested_backend

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
COLUMNS = (
    "case,provider,floor,device,threads,dtype,shape,bytes,repeats,calls,median_ms,q20_ms,q80_ms,gb_per_s,floor_ratio,"
    "python,torch,triton,ptwt,pytorch_wavelets,PyWavelets,wavedp,commit,date"
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


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CSV of a quick run of all cases."""
    out = tmp_path_factory.mktemp("results")
    done = script("run.py", "--quick", "--repeats", "3", "--out", str(out))
    assert done.returncode == 0, done.stderr
    (file,) = out.iterdir()
    return file


def test_a_quick_run_writes_a_row_for_each_provider(results: Path) -> None:
    header, *_ = results.read_text(encoding="utf-8").splitlines()
    assert header == COLUMNS
    assert results.name.startswith("wavelet-cpu-")
    rows = table.read([results])
    assert [name for (name,) in table.distinct(rows, "case")] == [case.name for case in SUITES["wavelet"]]
    for row in rows:
        assert 0 < float(row["q20_ms"]) <= float(row["median_ms"]) <= float(row["q80_ms"])
        rate = float(row["bytes"]) / float(row["median_ms"]) / 1e6
        assert float(row["gb_per_s"]) == pytest.approx(rate, rel=1e-2)
        (floor,) = (r for r in rows if (r["case"], r["provider"]) == (row["case"], row["floor"]))
        ratio = float(floor["median_ms"]) / float(row["median_ms"])
        assert float(row["floor_ratio"]) == pytest.approx(ratio, rel=1e-2, abs=1e-3)
        assert (row["repeats"], row["torch"]) == ("3", torch.__version__)


@pytest.mark.parametrize(("name", "bytes_per_pixel"), LARGE.items())
def test_a_case_moves_its_bytes_and_has_its_rivals(results: Path, name: str, bytes_per_pixel: float) -> None:
    here = {row["provider"]: row for row in table.read([results]) if row["case"] == name}
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
        (["scattering"], "unknown suite scattering; there is wavelet"),
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


def test_the_script_refuses_as_the_command_does() -> None:
    done = script("run.py", "--quick")
    assert done.returncode == 2
    assert "name another folder with --out" in done.stderr


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_the_floor_of_a_small_image_multiplies_it_by_itself(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    factors: list[tuple[Tensor, Tensor]] = []
    monkeypatch.setattr(torch, "mul", lambda *both: factors.append(both))
    floor = registry.make_floor("torch.mul", Size((1, 3, 32, 32), dtype), [torch.zeros(1)], moved=1)
    floor.call()
    ((x, y),) = factors
    assert x is y
    assert (x.shape, x.dtype) == ((1, 3, 32, 32), dtype)
    assert floor.bytes == 2 * 3 * 32 * 32 * dtype.itemsize


def test_the_floor_of_coarse_reads_as_many_bytes_as_the_input() -> None:
    image = torch.zeros(2, 3, 32, 64, dtype=torch.uint8)
    floor = registry.make_floor("sum", Size((2, 3, 32, 64), torch.uint8), [image], moved=10**6)
    source = floor.call.__self__  # type: ignore[attr-defined]
    assert (floor.bytes, source.nbytes, source.dtype) == (PIXELS, PIXELS, torch.float32)


def test_what_a_small_call_costs_is_shown_over_the_floor() -> None:
    rows = [row("small-op", "torch.mul", "torch.mul", 0.0014, 0.0014)]
    rows.append(row("small-op", "wavedp", "torch.mul", 0.0098, 0.0014))
    *_, heading, floor, ours = report.block(rows, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    end = heading.index("over torch.mul") + len("over torch.mul")
    assert floor[:end].endswith(" 0.0 us")
    assert ours[:end].endswith(" 8.4 us")


@pytest.mark.parametrize("name", ["F.conv2d", "ptwt", "pytorch_wavelets"])
def test_a_rivals_scales_are_views_and_come_back(name: str) -> None:
    size = Size((2, 3, 16, 24))
    found = transforms.transforms(2, size, CPU)
    if name not in found:
        pytest.skip(f"needs {name}, of the extra [bench]")
    transform = found[name]
    x = torch.randn(size.shape)
    want = found["eager"].forward(x)
    low, coarse, fine = transform.to_scales(transform.forward(x))
    for got, expected in zip([low, *coarse.unbind(1), *fine.unbind(1)], want):
        torch.testing.assert_close(got, expected)

    scales = [t.contiguous() for t in (low, coarse, fine)]
    packed = transform.from_scales(scales)
    torch.testing.assert_close(transform.inverse(packed), x)
    addresses = {t.untyped_storage().data_ptr() for t in tree_leaves(packed)}
    assert addresses == {t.untyped_storage().data_ptr() for t in scales}


def test_the_compiled_definition_is_a_rival_on_a_small_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    compared = {
        case.name: set(case.providers(case.sizes["cpu"][0], CPU))
        for case in SUITES["wavelet"]
        if case.name.startswith("small-")
    }
    with_rivals = {name for name, providers in compared.items() if "eager" in providers}
    assert len(with_rivals) == 6
    assert {name for name, providers in compared.items() if "torch.compile" in providers} == with_rivals


def right(x: Tensor) -> list[Tensor]:
    """cA, cH, cV, cD by PyWavelets' formulas."""
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    return [(a + b + c + d) / 2, (a + b - c - d) / 2, (a - b + c - d) / 2, (a - b - c + d) / 2]


def last_is_nan(bands: list[Tensor]) -> list[Tensor]:
    bands[3][-1, 0, 0, 0] = torch.nan
    return bands


def one_level(provider: Provider) -> Case:
    """The first case with one provider, the rival."""
    (case,) = run.chosen_cases("wavelet", ["wavedec2-L1"])["wavelet"]
    return dataclasses.replace(case, providers=lambda size, device: {"rival": provider})


def timed(case: Case) -> list[run.Row]:
    return run.run_size(case, case.sizes["quick"][0], CPU, repeats=2, sample_seconds=0.0, quick=True)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (lambda bands: [bands[0], bands[2], bands[1], bands[3]], "output 1 is off by"),
        (lambda bands: [band * (1 + 1e-5) for band in bands], "output 0 is off by"),
        (last_is_nan, "output 3 is off by nan"),
        (lambda bands: bands[:3], "3 outputs instead of 4"),
        (lambda bands: [band[..., :-1] for band in bands], "output 0 is .* instead of"),
        (lambda bands: [band.double() for band in bands], "output 0 is torch.float64 instead of torch.float32"),
    ],
    ids=["swapped", "inexact", "nan", "missing", "cropped", "dtype"],
)
def test_a_wrong_result_is_never_timed(wrong: Callable[[list[Tensor]], list[Tensor]], complaint: str) -> None:
    calls = []

    def call(x: Tensor) -> list[Tensor]:
        calls.append(x)
        return wrong(right(x))

    case = one_level(Provider(lambda inputs, out: lambda: call(inputs[0])))
    with pytest.raises(registry.WrongResult, match=f"wavedec2-L1, rival: {complaint}"):
        timed(case)
    assert len(calls) == 1


def test_an_output_that_is_not_written_is_a_wrong_result() -> None:
    def prepare(inputs: tuple[Tensor, ...], out: list[Tensor]) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            bands = right(inputs[0])
            for existing, band in zip(out[:3], bands):
                existing.copy_(band)
            return bands

        return call

    with pytest.raises(registry.WrongResult, match="output 3 is off by nan"):
        timed(one_level(Provider(prepare, floor="copy_", writes_out=True)))


def test_a_right_result_is_timed() -> None:
    rows = timed(one_level(Provider(lambda inputs, out: lambda: right(inputs[0]))))
    assert [row["provider"] for row in rows] == ["copy_", "clone", "rival"]


def test_the_tolerance_is_of_the_largest_magnitude() -> None:
    want = [torch.tensor([[100.0, 1e-3]], dtype=torch.float64)]
    registry.check("small", [torch.tensor([[100.0, 1.1e-3]])], want, torch.float32)
    with pytest.raises(registry.WrongResult, match=r"output 0 is off by 0\.0003, more than 0\.0002"):
        registry.check("large", [torch.tensor([[100.0, 1.3e-3]])], want, torch.float32)


def turns_of_three(repeats: int) -> list[str]:
    """The calls of each repeat, as letters."""
    order: list[str] = []
    timings = measure.time_in_turns(
        {name: lambda name=name: order.append(name) for name in "abc"}, CPU, repeats=repeats, sample_seconds=0.0
    )
    assert {timing.calls for timing in timings.values()} == {1}
    return ["".join(order[i : i + 6]) for i in range(len(order) - 6 * repeats, len(order), 6)]


def test_rivals_take_turns_and_none_always_follows_the_same() -> None:
    turns = turns_of_three(repeats=20)
    assert all(sorted(turn[::2]) == ["a", "b", "c"] for turn in turns)
    neighbours = {turn[i : i + 2] for turn in [turn[::2] for turn in turns] for i in (0, 1)}
    assert neighbours == {"ab", "ac", "ba", "bc", "ca", "cb"}
    assert turns == turns_of_three(repeats=20)


def test_an_untimed_call_goes_before_each_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(turn[::2] == turn[1::2] for turn in turns_of_three(repeats=4))
    seen: list[int] = []  # calls made before each sample
    calls: list[None] = []
    taken = measure.sample

    def sample(*arguments: object) -> float:
        seen.append(len(calls))
        return taken(*arguments)

    monkeypatch.setattr(measure, "sample", sample)
    measure.time_in_turns({"a": lambda: calls.append(None)}, CPU, repeats=3, sample_seconds=0.0)
    assert [after - before for before, after in zip(seen[-3:], [*seen[-2:], len(calls)])] == [2, 2, 1]


def test_a_fast_function_is_called_often_and_a_slow_one_once() -> None:
    def seconds(duration: float) -> Callable[[], None]:
        def wait() -> None:
            began = measure.time.perf_counter()
            while measure.time.perf_counter() - began < duration:
                pass

        return wait

    assert measure.calls_for(seconds(0.02), CPU, sample_seconds=0.001) == 1
    assert 5 <= measure.calls_for(seconds(1e-4), CPU, sample_seconds=0.005) <= 50


def test_quantiles_are_those_of_the_samples() -> None:
    timing = measure.summary([0.5, 0.1, 0.3, 0.2, 0.4, 0.6])
    assert (timing.q20, timing.median, timing.q80) == pytest.approx((0.2, 0.35, 0.5))


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


def test_pytorch_wavelets_finds_what_setuptools_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pkg_resources", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with transforms.stand_in_for_pkg_resources():
        import pkg_resources

        with pkg_resources.resource_stream("wavedp.data", "__init__.py") as stream:
            assert stream.read().startswith(b"# SPDX")
    assert "pkg_resources" not in sys.modules


def test_the_real_pkg_resources_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    real = types.ModuleType("pkg_resources")
    monkeypatch.setitem(sys.modules, "pkg_resources", real)
    with transforms.stand_in_for_pkg_resources():
        assert sys.modules["pkg_resources"] is real
    assert sys.modules["pkg_resources"] is real


def test_on_a_gpu_each_implementation_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wavelet, "available_backends", lambda: ("reference", "triton", "cuda"))
    asked: list[str] = []

    def by_backend(name: str, call: object) -> object:
        asked.append(name)
        return call

    monkeypatch.setattr(wavelet, "by_backend", by_backend)
    found = wavelet.written(lambda inputs, out: lambda: None, torch.device("cuda"))
    assert list(found) == ["wavedp, out=", "wavedp triton, out=", "wavedp cuda, out="]
    for provider in found.values():
        provider.prepare([], [])
        assert provider.writes_out
    assert asked == ["auto", "triton", "cuda"]


def test_a_backend_is_asked_for_inside_the_call() -> None:
    assert transforms.by_backend("reference", requested_backend)() == "reference"
    assert transforms.by_backend("auto", requested_backend)() == "auto"


def test_threads_of_pywavelets_share_the_batch() -> None:
    pytest.importorskip("pywt", reason="needs PyWavelets, of the extra [bench]")
    x = torch.randn(5, 2, 8, 12, dtype=torch.float64)
    transform = transforms.pywavelets(2, threads=2)
    bands = transform.unpack(transform.forward(x))
    for got, want in zip(bands, transforms.eager(2, Size((5, 2, 8, 12))).forward(x)):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(transform.image(transform.inverse(transform.pack(bands))), x)
