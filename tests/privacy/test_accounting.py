# SPDX-License-Identifier: Apache-2.0
"""Epsilon against known values and bounds, its edges, and the two inverses."""

import math
import subprocess
import sys
import time

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import log_ndtr

from wavedp.privacy import accounting, pld

REFERENCE = {"sample_rate": 0.01, "noise_multiplier": 1.0, "steps": 1000, "delta": 1e-5}


def test_reference_point() -> None:
    assert accounting.epsilon(**REFERENCE) == pytest.approx(1.8282, abs=1e-4)
    assert accounting.epsilon_rdp(**REFERENCE) == pytest.approx(2.1014, abs=1e-4)
    # The proven lower bound on this point at the 1e-5 grid.
    reference = (accounting.Phase(1.0, 0.01, 1000),)
    assert pld.lower_epsilon(reference, 1e-5, 1e-5) == pytest.approx(1.8232, abs=1e-4)


def test_renyi_reference_point() -> None:
    value = accounting.epsilon_rdp(sample_rate=0.04, noise_multiplier=1.5, steps=2250, delta=1e-5)
    assert value == pytest.approx(7.3293, abs=1e-4)


@pytest.mark.parametrize(("sigma", "expected"), [(1.0, 4.3772), (2.0, 1.9930)])
def test_single_full_batch_step_is_the_analytic_gaussian(sigma: float, expected: float) -> None:
    """q = 1, T = 1: delta(eps) = Phi(1/2s - eps s) - e^eps Phi(-1/2s - eps s) (Balle and Wang 2018)."""
    value = accounting.epsilon(sample_rate=1.0, noise_multiplier=sigma, steps=1, delta=1e-5)

    def phi(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2.0))

    half = 0.5 / sigma
    delta = phi(half - value * sigma) - math.exp(value) * phi(-half - value * sigma)
    assert value == pytest.approx(expected, abs=1e-3)
    assert delta == pytest.approx(1e-5, rel=1e-3)


def test_bounds_enclose() -> None:
    lower, upper = accounting.epsilon_bounds(sample_rate=0.05, noise_multiplier=1.2, steps=100, delta=1e-4)
    assert 0.97 * upper < lower <= upper
    assert upper == accounting.epsilon(sample_rate=0.05, noise_multiplier=1.2, steps=100, delta=1e-4)


def test_edges() -> None:
    assert accounting.epsilon(**{**REFERENCE, "steps": 0}) == 0.0
    assert accounting.epsilon(**{**REFERENCE, "noise_multiplier": 0.0}) == math.inf
    assert accounting.epsilon_bounds(**{**REFERENCE, "noise_multiplier": 0.0}) == (math.inf, math.inf)
    assert accounting.epsilon_rdp(**{**REFERENCE, "noise_multiplier": 0.0}) == math.inf
    assert accounting.epsilon(**{**REFERENCE, "noise_multiplier": 0.0, "steps": 0}) == 0.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sample_rate", 0.0),
        ("sample_rate", 1.1),
        ("sample_rate", math.nan),
        ("noise_multiplier", -1.0),
        ("noise_multiplier", math.inf),
        ("steps", -1),
        ("delta", 0.0),
        ("delta", 1.0),
    ],
)
def test_out_of_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        accounting.epsilon(**{**REFERENCE, name: value})


@pytest.mark.parametrize(("name", "value"), [("steps", 2.5), ("steps", True), ("delta", "1e-5")])
def test_wrong_types_are_refused(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=name):
        accounting.epsilon(**{**REFERENCE, name: value})


def test_monotone() -> None:
    base = accounting.epsilon(sample_rate=0.02, noise_multiplier=1.0, steps=200, delta=1e-5)
    assert accounting.epsilon(sample_rate=0.02, noise_multiplier=1.1, steps=200, delta=1e-5) < base
    assert accounting.epsilon(sample_rate=0.03, noise_multiplier=1.0, steps=200, delta=1e-5) > base
    assert accounting.epsilon(sample_rate=0.02, noise_multiplier=1.0, steps=220, delta=1e-5) > base
    assert accounting.epsilon(sample_rate=0.02, noise_multiplier=1.0, steps=200, delta=1e-6) > base


def test_contradicting_accountants_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pld, "rdp_epsilon", lambda *_: 0.05)
    with pytest.raises(RuntimeError, match="accountants disagree"):
        accounting.epsilon(sample_rate=0.02, noise_multiplier=3.987, steps=200, delta=1e-5)


@pytest.mark.parametrize(
    ("target", "sample_rate", "steps", "delta"),
    [
        (10.0, 0.04, 2250, 1e-4),
        (1.0, 0.01, 1000, 1e-5),
        (8.0, 0.25, 300, 1e-4),
        (0.1, 1e-3, 10_000, 1e-6),
        (3.0, 1.0, 50, 1e-5),
        (0.5, 0.01, 1, 1e-5),
    ],
)
def test_calibration_lands_within_one_percent_below(
    target: float, sample_rate: float, steps: int, delta: float
) -> None:
    sigma = accounting.noise_multiplier_for(target_epsilon=target, sample_rate=sample_rate, steps=steps, delta=delta)
    reached = accounting.epsilon(sample_rate=sample_rate, noise_multiplier=sigma, steps=steps, delta=delta)
    assert 0.99 * target <= reached <= target


def test_calibration_refuses_what_it_cannot_meet() -> None:
    with pytest.raises(ValueError, match="so loose"):
        accounting.noise_multiplier_for(target_epsilon=1000.0, sample_rate=1e-4, steps=1, delta=1e-3)
    with pytest.raises(ValueError, match="target_epsilon"):
        accounting.noise_multiplier_for(target_epsilon=0.0, sample_rate=0.1, steps=1, delta=1e-3)
    with pytest.raises(ValueError, match="steps"):
        accounting.noise_multiplier_for(target_epsilon=1.0, sample_rate=0.1, steps=0, delta=1e-3)


def test_steps_for_is_the_last_step_within() -> None:
    arguments = {"sample_rate": 0.05, "noise_multiplier": 1.0, "delta": 1e-4}
    steps = accounting.steps_for(target_epsilon=3.0, **arguments)
    assert accounting.epsilon(steps=steps, **arguments) <= 3.0 < accounting.epsilon(steps=steps + 1, **arguments)


def test_steps_for_can_be_none() -> None:
    arguments = {"target_epsilon": 0.01, "sample_rate": 0.5, "delta": 1e-5}
    assert accounting.steps_for(noise_multiplier=0.5, **arguments) == 0
    assert accounting.steps_for(noise_multiplier=0.0, **arguments) == 0


def test_import_leaves_dp_accounting_alone() -> None:
    """It takes over a second to import, which a model user should not pay."""
    code = (
        "import sys, wavedp.privacy as p; p.PrivateOptimizer, p.PrivacyStatement, p.epsilon;"
        "assert 'dp_accounting' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_steps_for_large_counts_is_fast_and_never_above() -> None:
    arguments = {"sample_rate": 0.01, "noise_multiplier": 20.0, "delta": 1e-5}
    start = time.process_time()
    steps = accounting.steps_for(target_epsilon=8.0, **arguments)
    assert time.process_time() - start < 20.0
    assert accounting.epsilon(steps=steps, **arguments) <= 8.0
    assert accounting.epsilon(steps=steps + steps // 5000, **arguments) > 8.0


@pytest.mark.parametrize(("noise_multiplier", "fine"), [(0.05, 1463.9992), (0.1, 354.1961)])
def test_small_noise_is_fast_and_hardly_looser_than_on_the_finest_grid(noise_multiplier: float, fine: float) -> None:
    arguments = {"sample_rate": 0.01, "noise_multiplier": noise_multiplier, "steps": 100, "delta": 1e-5}
    start = time.process_time()
    value = accounting.epsilon(**arguments)
    assert time.process_time() - start < 12.0
    assert value == pytest.approx(fine, rel=1e-5)
    assert value <= accounting.epsilon_rdp(**arguments)


@pytest.mark.parametrize(("steps", "sigma"), [(1, 1.0), (25, 5.0), (1000, 20.0), (1, 0.3)])
@pytest.mark.parametrize("delta", [1e-5, 1e-8, 1e-10, 1e-12])
def test_bounds_enclose_the_exact_value_at_small_delta(steps: int, sigma: float, delta: float) -> None:
    """q = 1: exact by Balle and Wang (2018) with mu = sqrt(steps) / sigma; log_ndtr keeps the tails."""
    delta = max(delta, accounting.smallest_delta(steps))
    mu = math.sqrt(steps) / sigma

    def log_delta(epsilon: float) -> float:
        above, below = log_ndtr(mu / 2 - epsilon / mu), epsilon + log_ndtr(-mu / 2 - epsilon / mu)
        return float(above + np.log1p(-np.exp(below - above)))

    exact = brentq(lambda epsilon: log_delta(epsilon) - math.log(delta), 1e-3, 200.0, xtol=1e-12)
    lower, upper = accounting.epsilon_bounds(sample_rate=1.0, noise_multiplier=sigma, steps=steps, delta=delta)
    assert lower <= exact <= upper
    assert upper <= 1.02 * exact


@pytest.mark.parametrize("steps", [1, 1000, 10**6])
def test_smallest_delta_works_and_less_is_refused(steps: int) -> None:
    arguments = {"sample_rate": 0.01, "noise_multiplier": 1 + 0.1 * math.sqrt(steps), "steps": steps}
    smallest = accounting.smallest_delta(steps)
    lower, upper = accounting.epsilon_bounds(delta=smallest, **arguments)
    assert 0.0 <= lower <= upper < math.inf
    with pytest.raises(ValueError, match=f"too small .* the smallest that works is {smallest:.2g}"):
        accounting.epsilon(delta=0.9 * smallest, **arguments)


def test_a_vanishing_sample_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="sample_rate"):
        accounting.epsilon(**{**REFERENCE, "sample_rate": 5e-324})
    assert 0.0 <= accounting.epsilon(**{**REFERENCE, "sample_rate": 1e-12}) < 1e-2
