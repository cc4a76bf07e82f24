# SPDX-License-Identifier: Apache-2.0
"""The epsilons that accounting is measured by, against numerical integration that shares nothing with them."""

import math

import numpy as np
import pytest

from wavedp.selftest.detect_accounting import GOLDEN, GOLDEN_BOUNDS
from wavedp.selftest.exact import gaussian_delta, gaussian_epsilon, sampled_gaussian_epsilon

X = np.linspace(-60.0, 61.0, 2_000_001)


def density(mean: float, deviation: float) -> np.ndarray:
    return np.exp(-0.5 * ((X - mean) / deviation) ** 2) / (deviation * math.sqrt(2 * math.pi))


def hockey_stick(p: np.ndarray, q: np.ndarray, epsilon: float) -> float:
    return float(np.maximum(p - math.exp(epsilon) * q, 0.0).sum() * (X[1] - X[0]))


@pytest.mark.parametrize("shift", [0.1, 0.5, 2.0])
def test_gaussian(shift: float) -> None:
    for epsilon in (0.0, 0.5, 3.0):
        assert gaussian_delta(shift, epsilon) == pytest.approx(
            hockey_stick(density(shift, 1.0), density(0.0, 1.0), epsilon), rel=1e-5, abs=1e-12
        )
    assert gaussian_delta(shift, gaussian_epsilon(shift, 1e-5)) == pytest.approx(1e-5, rel=1e-9)
    assert gaussian_epsilon(0.0, 1e-5) == 0.0


@pytest.mark.parametrize(("rate", "multiplier"), [(1.0, 2.0), (0.5, 1.0), (0.2, 1.5), (0.01, 0.7)])
def test_one_sampled_release(rate: float, multiplier: float) -> None:
    without = density(0.0, multiplier)
    mixture = (1 - rate) * without + rate * density(1.0, multiplier)
    epsilon = sampled_gaussian_epsilon(rate, multiplier, 1e-5)
    delta = max(hockey_stick(mixture, without, epsilon), hockey_stick(without, mixture, epsilon))
    assert delta == pytest.approx(1e-5, rel=1e-4)


def test_composed_sampled_releases() -> None:
    """The losses of one release as a histogram, composed by a Fourier transform: off by rounding either way."""
    rate, multiplier, steps = GOLDEN["sample_rate"], GOLDEN["noise_multiplier"], int(GOLDEN["steps"])
    without = density(0.0, multiplier)
    mixture = (1 - rate) * without + rate * density(1.0, multiplier)
    grid, size = 1e-4, 1 << 18
    deltas = []
    for p, q in ((mixture, without), (without, mixture)):
        kept = (p > 0.0) & (q > 0.0)
        cells = np.rint(np.log(p[kept] / q[kept]) / grid).astype(np.int64) % size
        once = np.bincount(cells, weights=p[kept] * (X[1] - X[0]), minlength=size)
        composed = np.fft.irfft(np.fft.rfft(once) ** steps, size)
        losses = np.where(np.arange(size) < size // 2, np.arange(size), np.arange(size) - size) * grid

        def delta_at(epsilon: float, composed: np.ndarray = composed, losses: np.ndarray = losses) -> float:
            above = losses > epsilon
            return float((composed[above] * -np.expm1(epsilon - losses[above])).sum())

        deltas.append(delta_at)
    low, high = 0.0, 5.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if max(delta(middle) for delta in deltas) > 1e-5 else (low, middle)
    assert GOLDEN_BOUNDS[0] <= high <= GOLDEN_BOUNDS[1]
