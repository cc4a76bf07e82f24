# SPDX-License-Identifier: Apache-2.0
"""A wrong result is never timed, and timing takes turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from wavedp.benchmarks import measure, registry, run
from wavedp.benchmarks.registry import Case, Provider, Size

PIXELS = 2 * 3 * 32 * 64
CPU = torch.device("cpu")


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
