# SPDX-License-Identifier: Apache-2.0
"""The formulas of the bounds, against brute force and against laws whose quantiles are known."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from wavedp.audit import bounds, guessing_bound, noise_bound, one_run_bound, one_run_p_value
from wavedp.audit.bounds import binomial_lower, binomial_upper, one_run_epsilon, signal_lower
from wavedp.privacy import epsilon_bounds


def exact_p_value(m: int, r: int, v: int, win: Fraction, delta: Fraction) -> Fraction:
    """Theorem 5.2 of arXiv 2305.08846 in whole numbers, every i tried."""
    mass = [math.comb(r, w) * win**w * (1 - win) ** (r - w) for w in range(r + 1)]
    beyond = sum(mass[v:], Fraction(0))
    windows = [Fraction(sum(mass[max(0, v - i) : v], Fraction(0)), i) for i in range(1, m + 1)]
    return min(Fraction(1), beyond + 2 * m * delta * max(windows))


@pytest.mark.parametrize(("odds", "delta"), [*itertools.product((1, 3, 20), (Fraction(0), Fraction(1, 1000)))])
def test_the_one_run_p_value_is_the_theorems(odds: int, delta: Fraction) -> None:
    for m, r in ((1, 1), (5, 5), (12, 7), (40, 40)):
        for v in range(r + 1):
            wanted = exact_p_value(m, r, v, Fraction(odds, odds + 1), delta)
            found = one_run_p_value(m, r, v, math.log(odds), float(delta))
            if v == 0:
                assert found == 1.0  # nothing is always reached; the theorem's windows are empty
            else:
                assert found == pytest.approx(float(wanted), rel=1e-9)


def test_a_leak_of_delta_is_within_the_one_run_p_value() -> None:
    """A mechanism that tells every canary's coin with probability delta, and nothing otherwise."""
    m, delta = 6, 0.05
    counts = np.zeros(m + 1)
    for told in range(m + 1):  # the rest are guessed by coins
        chance = stats.binom.pmf(told, m, delta)
        counts[told:] += chance * stats.binom.pmf(np.arange(m - told + 1), m - told, 0.5)
    for v in range(1, m + 1):
        assert counts[v:].sum() <= one_run_p_value(m, m, v, 0.0, delta) + 1e-12


def test_the_one_run_epsilon_inverts_the_p_value() -> None:
    # All of r right, without delta: (e / (1 + e))^r = 1 - confidence.
    for r in (10, 100, 1000):
        wanted = 0.05 ** (1 / r)
        assert one_run_epsilon(2000, r, r, 0.0, 0.95) == pytest.approx(math.log(wanted / (1 - wanted)), abs=2e-4)
    assert one_run_epsilon(100, 4, 4, 0.0, 0.95) == 0.0  # by chance one time in 16
    assert one_run_epsilon(100, 50, 25, 1e-5, 0.95) == 0.0
    assert one_run_epsilon(1000, 100, 99, 1e-3, 0.95) < one_run_epsilon(1000, 100, 99, 1e-5, 0.95)


def test_the_one_run_p_value_grows_with_epsilon() -> None:
    """The bisection needs it where the p-value is small."""
    for m, r, v in ((1000, 150, 143), (1000, 1000, 700), (10**5, 3000, 2900), (50, 20, 19)):
        values = [one_run_p_value(m, r, v, epsilon, 1e-5) for epsilon in np.linspace(0.0, 8.0, 200)]
        below = [value for value in values if value < 0.2]
        assert below == sorted(below)


def test_limits_of_a_probability_are_clopper_and_pearsons() -> None:
    for successes, trials in ((0, 10), (3, 10), (10, 10), (497, 1000)):
        exact = stats.binomtest(successes, trials)
        assert binomial_lower(successes, trials, 0.95) == pytest.approx(
            exact.proportion_ci(0.90, "exact").low, abs=1e-12
        )
        assert binomial_upper(successes, trials, 0.95) == pytest.approx(
            exact.proportion_ci(0.90, "exact").high, abs=1e-12
        )


def test_the_signal_is_bounded_by_the_noncentral_t() -> None:
    generator = np.random.default_rng(0)
    took_part = np.repeat([0, 5], 40)
    scores = 0.3 * took_part + 7.0 + generator.normal(size=80)
    found = signal_lower(scores, took_part, 0.95)
    t = stats.ttest_ind(scores[40:], scores[:40]).statistic  # the slope's t is the two-sample one
    assert stats.nct.sf(t, 78, found * math.sqrt(80 * 2.5**2)) == pytest.approx(0.05, rel=1e-6)
    assert found < 0.3
    assert signal_lower(-scores, took_part, 0.95) == 0.0  # the other direction was not asked for
    assert signal_lower(3.0 * took_part, took_part, 0.95) == math.inf
    with pytest.raises(ValueError, match="unequally often"):
        signal_lower(scores, np.ones(80, dtype=np.int64), 0.95)


def test_a_very_strong_signal_has_a_limit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The looser limit, beside the exact one where both are there."""
    generator = np.random.default_rng(0)
    took_part = np.repeat([0, 1], 200)
    scores = 40.0 * took_part + generator.normal(size=400)
    exact = signal_lower(scores, took_part, 0.95)
    monkeypatch.setattr(bounds, "LARGEST_T", 100.0)
    looser = signal_lower(scores, took_part, 0.95)
    assert 0.97 * exact < looser < exact
    monkeypatch.undo()
    assert 1e6 < signal_lower(took_part + 1e-7 * generator.normal(size=400), took_part, 0.95) < 1e8


def test_a_noise_bound_is_the_accountants_at_the_measured_limits() -> None:
    generator = np.random.default_rng(1)
    members = np.arange(400) < 200
    took_part = np.where(members, generator.binomial(10, 0.3, 400), 0)
    scores = took_part + generator.normal(scale=5.0, size=400)
    found = noise_bound(scores, took_part, members, steps=10, delta=1e-5, confidence=0.95)
    rate, noise = found.measured["sample_rate_at_least"], found.measured["noise_multiplier_at_most"]
    assert 0.25 < rate < took_part[members].mean() / 10
    assert 5.0 / math.sqrt(10) < noise < 2.1
    assert found.epsilon == epsilon_bounds(sample_rate=rate, noise_multiplier=noise, steps=10, delta=1e-5)[0]
    assert noise_bound(-scores, took_part, members, steps=10, delta=1e-5, confidence=0.95).epsilon == 0.0


def test_guesses_give_the_logarithm_of_their_limits() -> None:
    members = np.arange(1000) < 500
    scores = np.zeros(1000)
    scores[:400], scores[500:510] = 2.0, 2.0  # 400 of 500 above, and 10 of 500
    right, wrong = binomial_lower(400, 500, 0.975), binomial_upper(10, 500, 0.975)
    found = guessing_bound(scores, members, side="in", threshold=1.0, delta=1e-3, confidence=0.95)
    assert found.epsilon == pytest.approx(math.log((right - 1e-3) / wrong))
    other = guessing_bound(-scores, ~members, side="out", threshold=-1.0, delta=1e-3, confidence=0.95)
    assert other.epsilon == pytest.approx(found.epsilon)
    assert guessing_bound(-scores, members, side="in", threshold=-1.0, delta=1e-3, confidence=0.95).epsilon == 0.0


def test_the_one_run_bound_guesses_the_extremes() -> None:
    members = np.arange(100) >= 50
    scores = np.arange(100.0)
    scores[[0, 99]] = scores[[99, 0]]  # one wrong guess on each side
    found = one_run_bound(scores, members, highest=20, lowest=30, delta=1e-5, confidence=0.95)
    assert found.measured == {"guesses": 50, "right": 48, "canaries": 100}
    assert found.epsilon == one_run_epsilon(100, 50, 48, 1e-5, 0.95) > 1.5
    with pytest.raises(ValueError, match="guessed once"):
        one_run_bound(scores, members, highest=60, lowest=60, delta=1e-5, confidence=0.95)


@pytest.mark.parametrize("confidence", [0.0, 0.3, 1.0, 95, math.nan])
def test_a_confidence_that_is_none_is_refused(confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence"):
        one_run_bound(np.zeros(4), np.ones(4, dtype=bool), highest=1, lowest=1, delta=0.1, confidence=confidence)
