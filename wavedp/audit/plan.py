# SPDX-License-Identifier: Apache-2.0
"""Which guesses will be made, decided by the claimed mechanism alone, before there are any scores.

Under the claim, a canary's score in units of its noise is ``K / (noise_multiplier sqrt(steps)) + N(0, 1)``, where K is
binomial (steps, sample_rate) for a member and 0 for the others. A plan that does not fit the real mechanism makes a
bound weaker, never wrong.
"""

import math
from dataclasses import dataclass

import numpy as np

from wavedp.audit.bounds import Floats, Side, binomial_lower, binomial_upper, one_run_epsilon
from wavedp.privacy.spec import PrivacySpec

_SHARES = (0.005, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)  # of the canaries that are guessed


@dataclass(frozen=True)
class GuessingPlan:
    """One guess for each canary, see :func:`~wavedp.audit.guessing_bound`, and the numbers of the one-run audit."""

    side: Side
    threshold: float  # in units of a score's noise
    highest: int
    lowest: int


class ClaimedScores:
    """The law of a canary's score under a specification."""

    def __init__(self, spec: PrivacySpec) -> None:
        from scipy import stats

        count = np.arange(spec.steps + 1)
        mass = stats.binom.pmf(count, spec.steps, spec.sample_rate)
        likely = mass > 1e-12
        self._mass = mass[likely]
        self._means = count[likely] / (max(spec.noise_multiplier, 1e-3) * math.sqrt(spec.steps))

    def above(self, threshold: Floats, *, member: bool) -> Floats:
        """Return P(score > threshold), for each threshold."""
        from scipy import stats

        if not member:
            return np.asarray(stats.norm.sf(threshold))
        return np.asarray(stats.norm.sf(threshold[:, None] - self._means) @ self._mass)

    def density(self, scores: Floats, *, member: bool) -> Floats:
        """Return the density at each score."""
        from scipy import stats

        if not member:
            return np.asarray(stats.norm.pdf(scores))
        return np.asarray(stats.norm.pdf(scores[:, None] - self._means) @ self._mass)

    def grid(self) -> Floats:
        """Return scores that cover both laws."""
        return np.linspace(-6.0, float(self._means.max()) + 6.0, 400)


def plan_guesses(spec: PrivacySpec, canaries: int, confidence: float) -> GuessingPlan:
    """Return the guesses whose bounds would be largest if counts came out as the claim expects."""
    law = ClaimedScores(spec)
    grid = law.grid()
    above_in, above_out = law.above(grid, member=True), law.above(grid, member=False)
    side, threshold = _best_threshold(grid, above_in, above_out, canaries // 2, spec.delta, confidence)
    highest, lowest = _best_numbers(above_in, above_out, canaries, spec.delta, confidence)
    return GuessingPlan(side, threshold, highest, lowest)


def _best_threshold(
    grid: Floats, above_in: Floats, above_out: Floats, each: int, delta: float, confidence: float
) -> tuple[Side, float]:
    half = 0.5 * (1.0 + confidence)
    best: tuple[float, Side, float] = (-math.inf, "in", float(grid[len(grid) // 2]))
    sides: tuple[tuple[Side, Floats, Floats], ...] = (
        ("in", above_in, above_out),
        ("out", 1.0 - above_out, 1.0 - above_in),
    )
    for side, right, wrong in sides:
        for threshold, hit, mistake in zip(grid, right, wrong):
            true_rate = binomial_lower(round(each * hit), each, half)
            false_rate = binomial_upper(round(each * mistake), each, half)
            found = math.log((true_rate - delta) / false_rate) if true_rate > delta else -math.inf
            best = max(best, (found, side, float(threshold)))
    return best[1], best[2]


def _best_numbers(
    above_in: Floats, above_out: Floats, canaries: int, delta: float, confidence: float
) -> tuple[int, int]:
    above = 0.5 * (above_in + above_out)  # falls along the grid
    best = (0.0, canaries // 20, canaries // 20)
    for share in _SHARES:
        for top in (0.0, 0.5, 1.0):
            highest = int(share * canaries * top)
            lowest = int(share * canaries * (1.0 - top))
            # Of the scores above the threshold that leaves so many, how many are members; and likewise below.
            right = canaries * 0.5 * float(np.interp(highest / canaries, above[::-1], above_in[::-1]))
            below = 0.5 * float(np.interp(lowest / canaries, 1.0 - above, 1.0 - above_out))
            correct = int(right if highest else 0.0) + int(canaries * below if lowest else 0.0)
            correct = min(correct, highest + lowest)
            found = one_run_epsilon(canaries, highest + lowest, correct, delta, confidence)
            best = max(best, (found, highest, lowest))
    return best[1], best[2]
