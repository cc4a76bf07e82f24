# SPDX-License-Identifier: Apache-2.0
"""The tests of the noise's law pass right noise, and find every planted fault with the test that is meant to."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from wavedp.privacy import noise_law
from wavedp.privacy import noise_law_statistics as statistics
from wavedp.privacy.noise_law import LawTest, NoiseSource, check_noise_law, public_source

DRAWS = 1_000_000
GRID = 2.0**-12


def numpy_source(seed: int = 0) -> NoiseSource:
    """Right noise of float64 that shares nothing with this package."""

    def generator(key: int, step: int, offset: int) -> np.random.Generator:
        return np.random.default_rng([seed, key, step, offset])

    def draw(count: int, key: int, step: int, offset: int) -> Tensor:
        return torch.from_numpy(generator(key, step, offset).standard_normal(count))

    def add(total: Tensor, key: int, step: int) -> Tensor:
        noise = generator(key, step, 2**63).standard_normal(total.shape)
        return torch.round((total.double() + torch.from_numpy(noise)) / GRID) * GRID

    return NoiseSource(draw, add, GRID)


RIGHT = numpy_source()


def drawn(change: Callable[[Tensor], Tensor]) -> NoiseSource:
    return dataclasses.replace(RIGHT, draw=lambda *place: change(RIGHT.draw(*place)), add=None)


def box_muller(bits: int, gap: int) -> NoiseSource:
    """Normals of a radius of ``bits`` bits, the two of a pair ``gap`` apart."""

    def draw(count: int, key: int, step: int, offset: int) -> Tensor:
        random = np.random.default_rng([key, step, offset])
        pairs = -(-count // (2 * gap)) * gap
        u = (random.integers(0, 2**bits, pairs) + 1.0) * 2.0**-bits
        angle = 2 * math.pi * random.random(pairs)
        radius = np.sqrt(-2 * np.log(u))
        both = np.stack([radius * np.cos(angle), radius * np.sin(angle)]).reshape(2, -1, gap)
        return torch.from_numpy(both.transpose(1, 0, 2).reshape(-1)[:count].astype(np.float32))

    return NoiseSource(draw)


def torch_source() -> NoiseSource:
    def draw(count: int, key: int, step: int, offset: int) -> Tensor:
        seed = int(np.random.default_rng([key, step, offset]).integers(2**31))
        return torch.randn(count, generator=torch.Generator().manual_seed(seed))

    return NoiseSource(draw)


def shared_radius(x: Tensor) -> Tensor:
    """Neighbours whose squares go together, though they are uncorrelated."""
    size = torch.sqrt(torch.tensor(2.0 / 3.0)) * (1 + 0.5 * (torch.rand(x.numel() // 2) - 0.5)).repeat_interleave(2)
    return x * size * 1.2113


def places(change: Callable[[int, int, int], tuple[int, int, int]]) -> NoiseSource:
    return dataclasses.replace(RIGHT, draw=lambda count, *place: RIGHT.draw(count, *change(*place)), add=None)


def added(add: Callable[[Tensor, Tensor], Tensor]) -> NoiseSource:
    """``add`` of the sum and right noise."""

    def plant(total: Tensor, key: int, step: int) -> Tensor:
        return add(total.double(), RIGHT.draw(total.numel(), key, step, 2**63))

    return dataclasses.replace(RIGHT, add=plant)


def leaky(total: Tensor, noise: Tensor) -> Tensor:
    """On the grid, but the noise moves by two steps at a time: the sum's parity stays."""
    return torch.round(noise / (2 * GRID)) * 2 * GRID + torch.round(total / GRID) * GRID


FAULTS = {
    "a mean of 1 %": (drawn(lambda x: x + 0.01), "mean"),
    "a deviation 0.5 % low": (drawn(lambda x: x * 0.995), "variance"),
    "uniform": (drawn(lambda x: (torch.rand(x.shape, dtype=x.dtype) - 0.5) * 12**0.5), "Kolmogorov"),
    "Laplace": (drawn(lambda x: torch.from_numpy(np.random.default_rng(1).laplace(0, 0.5**0.5, len(x)))), "beyond 5"),
    "cut at 4": (drawn(lambda x: x.clamp(-4.0, 4.0)), "beyond 4"),
    "bfloat16": (drawn(lambda x: x.bfloat16().float()), "equal values"),
    "float16": (drawn(lambda x: x.half().float()), "equal values"),
    "torch's normal_": (torch_source(), "gaps of 2^-24 in the tail, pairs 8"),
    "a radius of 24 bits": (box_muller(24, 16), "gaps of 2^-24 in the tail, pairs 16"),
    "neighbours that go together": (drawn(lambda x: (x + 0.01 * x.roll(1)) / 1.00005), "correlation, lag 1"),
    "pairs of one angle": (drawn(lambda x: x.view(-1, 2, 16)[:, :1].repeat(1, 2, 1).flatten()), "correlation, lag 16"),
    "neighbours of one size": (drawn(shared_radius), "correlation of squares, lag 1"),
    "a stream that repeats": (drawn(lambda x: x[: 2**15].repeat(-(-len(x) // 2**15))[: len(x)]), "lags to 2^19"),
    "the key unused": (places(lambda key, step, offset: (0, step, offset)), "between keys"),
    "the step unused": (places(lambda key, step, offset: (key, 0, offset)), "between steps"),
    "a step of 16 bits": (places(lambda key, step, offset: (key, step % 2**16, offset)), "between steps"),
    "an offset of 32 bits": (places(lambda key, step, offset: (key, step, offset % 2**32)), "between offsets"),
    "step and offset added": (places(lambda key, step, offset: (key, 0, step + offset)), "keys, steps and offsets"),
    "no grid": (added(lambda total, noise: total + noise), "off the grid"),
    "noise alone on the grid": (added(lambda total, noise: total + torch.round(noise / GRID) * GRID), "off the grid"),
    "a grid of twice the step": (
        added(lambda total, noise: torch.round((total + noise) / (2 * GRID)) * 2 * GRID), "residues, sum 0",
    ),
    "the sum's parity kept": (added(leaky), "residues between sums"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str) -> None:
    source, by = FAULTS[name]
    failed = [test.name for test in check_noise_law(source, DRAWS) if not test.passed]
    assert any(by in found for found in failed), failed


def test_a_chunk_that_comes_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise_law, "CHUNK", 1 << 18)

    def draw(count: int, key: int, step: int, offset: int) -> Tensor:
        return RIGHT.draw(count, key, step, 0 if offset == 3 << 18 else offset)

    failed = [test.name for test in check_noise_law(NoiseSource(draw), DRAWS) if not test.passed]
    assert failed == ["largest correlation of 4 chunks"]


def test_a_radius_of_32_bits_is_found_by_more_draws() -> None:
    """Those of one million reach 5 sigma as a pair twice."""
    failed = [test.name for test in check_noise_law(box_muller(32, 16), 20_000_000) if not test.passed]
    assert failed == ["gaps of 2^-32 in the tail, pairs 16 apart"]


@pytest.mark.parametrize("seed", range(8))
def test_right_noise_passes(seed: int) -> None:
    tests = check_noise_law(numpy_source(seed), DRAWS)
    assert [test.name for test in tests if not test.passed] == []
    assert sum(test.false_alarm for test in tests) == pytest.approx(noise_law.FALSE_ALARM)
    assert min(test.p_value for test in tests) > 1e-5  # 35 tests


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_noise_of_this_package_passes(dtype: torch.dtype) -> None:
    tests = check_noise_law(public_source(dtype=dtype), 3 * DRAWS)
    assert [test for test in tests if not test.passed] == []
    assert len(tests) == 32


def test_a_seed_makes_the_same_numbers_again() -> None:
    first, again, other = (public_source(seed=seed).draw(100, 3, 1, 7) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    fresh = public_source()
    assert torch.equal(fresh.draw(100, 3, 1, 7), fresh.draw(200, 3, 1, 7)[:100])
    assert not torch.equal(fresh.draw(100, 3, 1, 7), public_source().draw(100, 3, 1, 7))


def test_p_values_are_those_of_scipy() -> None:
    assert statistics.both_sides(-5.4) == pytest.approx(2 * stats.norm.sf(5.4), rel=1e-9)
    for count, mean in ((0, 0.2), (3, 57.3), (90, 57.3), (6379, 6334.2)):
        both = 2 * min(stats.poisson.cdf(count, mean), stats.poisson.sf(count - 1, mean))
        assert statistics.poisson(count, mean) == pytest.approx(min(1.0, both), rel=1e-6)
    counts = np.array([1010, 955, 1023, 1012])
    chi, freedom, p = statistics.chi_square(counts, np.full(4, 1000.0), 3)
    assert (chi, freedom) == pytest.approx((stats.chisquare(counts, np.full(4, 1000.0), sum_check=False)[0], 3))
    assert p == pytest.approx(stats.chi2.sf(chi, 3), rel=1e-9)


def test_the_distance_of_the_histogram_is_that_of_the_draws() -> None:
    x = RIGHT.draw(200_000, 1, 0, 0) * 1.01
    law = statistics.Distribution((4.0,))
    law.add(x[:150_000])
    law.add(x[150_000:])
    found = {name: (measured, p) for name, measured, _, p in law.results(0.0)}
    exact = stats.kstest(x.numpy(), "norm").statistic
    assert exact - 2.5e-5 <= found["Kolmogorov-Smirnov distance"][0] <= exact
    assert found["variance"][0] == pytest.approx((x * x).mean().item(), rel=1e-12)
    below = stats.chi2.cdf((x * x).sum().item(), len(x))
    assert found["variance"][1] == pytest.approx(2 * min(below, 1 - below), rel=1e-3)
    assert found["draws beyond 4 sigma"][0] == int((x.abs() > 4).sum())


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 2.0**-23), (torch.bfloat16, 2.0**-7)])
def test_equal_values_are_expected_as_often_as_they_come(dtype: torch.dtype, eps: float) -> None:
    x = RIGHT.draw(1 << 16, 2, 0, 0).to(dtype).double()
    pairs, expected, p = statistics.equal_values(x, dtype, 0.0)
    assert expected == pytest.approx((1 << 31) * statistics.collision_chance(eps, 0.0))
    assert pairs == pytest.approx(expected, abs=6 * math.sqrt(expected) + 0.02 * expected)
    assert p > 1e-9 or dtype == torch.bfloat16


def test_too_few_draws_are_refused() -> None:
    with pytest.raises(ValueError, match="draws must be >= 1000000"):
        check_noise_law(RIGHT, 999_999)
    with pytest.raises(ValueError, match="false_alarm must be < 1"):
        check_noise_law(RIGHT, DRAWS, false_alarm=1.0)


def test_a_test_fails_below_its_share_of_the_false_alarms() -> None:
    assert LawTest("mean", 0.0, 0.0, 1e-8, 1e-8).passed
    assert not LawTest("mean", 0.0, 0.0, 0.99e-8, 1e-8).passed
    assert not LawTest("mean", 0.0, 0.0, math.nan, 1e-8).passed
