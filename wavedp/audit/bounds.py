# SPDX-License-Identifier: Apache-2.0
"""Lower confidence bounds on epsilon from the scores of canaries that were in or out by a fair coin.

Three statistics of the same scores, from the sharpest to the one that assumes least:

:func:`noise_bound` takes the mechanism to be a Poisson-sampled Gaussian and measures its rate and its noise;
:func:`guessing_bound` takes canaries to be independent of each other, and counts right and wrong guesses;
:func:`one_run_bound` takes nothing beyond the fair coins.

All are one-sided, and their direction, thresholds and numbers of guesses are arguments, to be fixed before the scores
are seen: the larger of two bounds, each of 95 %, holds with less than that.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from wavedp.errors import InvalidValueError
from wavedp.privacy import accounting
from wavedp.privacy.validation import check_integer, check_real

Floats = npt.NDArray[np.float64]
Side = Literal["in", "out"]

LEAST_NOISE = 0.05
"""Noise multipliers below it have no finite epsilon in :mod:`wavedp.privacy.accounting`; a bound stops there."""
LARGEST_T = 2000.0
"""Above it, where SciPy's noncentral t ends, :func:`signal_lower` takes a limit that is a little looser."""
RATE_SHARE = 0.2
"""The part of the error probability of :func:`noise_bound` that goes to the sampling rate."""


@dataclass(frozen=True)
class Bound:
    """``epsilon`` is at most the mechanism's own, with at least the probability ``confidence``."""

    method: str
    epsilon: float
    confidence: float
    measured: dict[str, Any] = field(default_factory=dict)


def binomial_lower(successes: int, trials: int, confidence: float) -> float:
    """Return the one-sided Clopper-Pearson lower limit of a probability."""
    from scipy import stats

    return 0.0 if successes == 0 else float(stats.beta.ppf(1.0 - confidence, successes, trials - successes + 1))


def binomial_upper(successes: int, trials: int, confidence: float) -> float:
    """Return the one-sided Clopper-Pearson upper limit of a probability."""
    return 1.0 - binomial_lower(trials - successes, trials, confidence)


def signal_lower(
    scores: Floats,  # [n]
    participations: npt.NDArray[np.int64],  # [n], steps that each canary took part in
    confidence: float,
) -> float:
    """Return a lower limit of a / s in ``score = a * participations + c + noise``, the noise normal of deviation s.

    The slope's t statistic is noncentral t with n - 2 degrees of freedom and noncentrality ``a / s sqrt(Sxx)``, where
    ``Sxx`` is the participations' sum of squares about their mean: the limit is exact. With participations of 0 and
    T it is the two-sample test of a canary's presence.

    Raises:
        ValueError: fewer than 4 scores, or all with the same participations.
    """
    from scipy import optimize, stats

    x = participations - participations.mean()
    spread = float(x @ x)
    if len(scores) < 4 or spread == 0.0:
        raise InvalidValueError(
            "the z bound needs at least 4 scores, of canaries that took part unequally often: add some"
        )
    slope = float(x @ scores) / spread
    residual = scores - scores.mean() - slope * x
    variance = float(residual @ residual) / (len(scores) - 2)
    if variance == 0.0:
        return math.inf if slope > 0.0 else 0.0
    t = slope / math.sqrt(variance / spread)
    freedom = len(scores) - 2
    if t <= float(stats.t.ppf(confidence, freedom)):
        return 0.0  # no signal, at this confidence
    if t > LARGEST_T:
        # t = (centre + Z) / sqrt(V / freedom): with half of the error probability each, Z is at most its own limit and
        # V at least its own.
        half = 0.5 * (1.0 - confidence)
        low, high = stats.chi2.ppf(half, freedom), stats.norm.isf(half)
        return float(t * math.sqrt(low / freedom) - high) / math.sqrt(spread)
    # P(T >= t) grows with the noncentrality from below 1 - confidence, and is about 1/2 at t.
    limit = optimize.brentq(lambda centre: stats.nct.sf(t, freedom, centre) - (1.0 - confidence), 0.0, 1.01 * t + 1.0)
    return float(limit) / math.sqrt(spread)


def noise_limits(
    scores: Floats,  # [n], sums over the steps
    participations: npt.NDArray[np.int64],  # [n]
    members: npt.NDArray[np.bool_],  # [n], which canaries were records
    *,
    steps: int,
    confidence: float,
    full_batches: bool = False,
) -> tuple[float, float]:
    """Return what the noise multiplier is at most, and the sampling rate at least, together with ``confidence``.

    With noise of deviation s in a score, which has that of ``steps`` steps, and a signal a per participation, the
    noise multiplier is ``s / (a sqrt(steps))``; :func:`signal_lower` bounds it from above. The rate is bounded from
    below by Clopper and Pearson, on ``steps`` draws for each member.

    Args:
        full_batches: every record is in every batch, by design: all of the error probability goes to the noise.
    """
    check_confidence(confidence)
    steps = check_integer("steps", steps, at_least=1)
    share = 0.0 if full_batches else RATE_SHARE * (1.0 - confidence)
    joined, trials = int(participations[members].sum()), int(members.sum()) * steps
    rate = joined / max(trials, 1) if full_batches else binomial_lower(joined, trials, 1.0 - share)
    signal = signal_lower(scores, participations, confidence + share)
    return (1.0 / (signal * math.sqrt(steps)) if signal > 0.0 else math.inf), rate


def noise_bound(
    scores: Floats,  # [n], sums over the steps
    participations: npt.NDArray[np.int64],  # [n]
    members: npt.NDArray[np.bool_],  # [n], which canaries were records
    *,
    steps: int,
    delta: float,
    confidence: float,
    full_batches: bool = False,
) -> Bound:
    """The z bound: the lower end of :func:`wavedp.privacy.accounting.epsilon_bounds` at :func:`noise_limits`.

    For full batches that is the Gaussian mechanism's epsilon. Assumes that noise is normal, independent between
    canaries and of one deviation, and that records join batches independently; not how much noise there is, how often
    they join, or that gradients are clipped.
    """
    noise, rate = noise_limits(
        scores, participations, members, steps=steps, confidence=confidence, full_batches=full_batches
    )
    measured = {"noise_multiplier_at_most": noise, "sample_rate_at_least": rate}
    if math.isinf(noise) or rate < 1e-12:
        return Bound("z-test", 0.0, confidence, measured)
    lower, _ = accounting.epsilon_bounds(
        sample_rate=rate, noise_multiplier=min(max(noise, LEAST_NOISE), 1e6), steps=steps, delta=delta
    )
    return Bound("z-test", lower, confidence, measured)


def guessing_bound(
    scores: Floats,  # [n]
    members: npt.NDArray[np.bool_],  # [n]
    *,
    side: Side,
    threshold: float,
    delta: float,
    confidence: float,
) -> Bound:
    """Clopper and Pearson's bound from one guess for each canary, which took its score alone.

    Differential privacy bounds P_in(S) by ``exp(epsilon) P_out(S) + delta`` for every set S of scores, and the same
    with in and out exchanged. S is ``score > threshold`` for the side "in", and ``score < threshold``, with in and
    out exchanged, for the side "out"; so epsilon is at least ``log((P(S) - delta) / P'(S))``, with limits for both.

    Assumes that the scores of different canaries are independent.
    """
    check_confidence(confidence)
    guessed = scores > threshold if side == "in" else scores < threshold
    right, wrong = (members, ~members) if side == "in" else (~members, members)
    half = 0.5 * (1.0 + confidence)  # of each of the two limits
    hits, mistakes = int((guessed & right).sum()), int((guessed & wrong).sum())
    true_rate = binomial_lower(hits, int(right.sum()), half)
    false_rate = binomial_upper(mistakes, int(wrong.sum()), half)
    epsilon = math.log((true_rate - delta) / false_rate) if true_rate > delta + false_rate else 0.0
    measured = {
        "guess": side,
        "threshold": threshold,
        "right": hits,
        "of": int(right.sum()),
        "wrong": mistakes,
        "of_others": int(wrong.sum()),
    }
    return Bound("guesses", epsilon, confidence, measured)


def one_run_p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Return how probable at least ``correct`` right guesses are, at most, if the mechanism is (epsilon, delta)-DP.

    Theorem 5.2 of Steinke, Nasr and Jagielski (2023, arXiv 2305.08846): m canaries are in or out by independent fair
    coins, and of the output some r are guessed. Then, with W binomial of r trials with probability
    ``exp(epsilon) / (1 + exp(epsilon))``,

        P(correct >= v) <= P(W >= v) + 2 m delta max_{1 <= i <= m} P(v - i <= W < v) / i
    """
    from scipy import special, stats

    canaries = check_integer("canaries", canaries, at_least=1)
    guesses = check_integer("guesses", guesses, at_most=canaries)
    correct = check_integer("correct", correct, at_most=guesses)
    win = float(special.expit(epsilon))
    beyond = float(stats.binom.sf(correct - 1, guesses, win))
    if delta == 0.0 or correct == 0:
        return beyond
    # P(v - i <= W < v) for i = 1 ... v; from v on, it does not grow with i.
    windows = np.cumsum(stats.binom.pmf(np.arange(correct - 1, -1, -1), guesses, win))
    return min(1.0, beyond + 2.0 * canaries * delta * float((windows / np.arange(1, correct + 1)).max()))


def one_run_epsilon(canaries: int, guesses: int, correct: int, delta: float, confidence: float) -> float:
    """Return the epsilon up to which :func:`one_run_p_value` is at most ``1 - confidence``; 0 if nowhere."""

    def rejected(epsilon: float) -> bool:
        return one_run_p_value(canaries, guesses, correct, epsilon, delta) <= 1.0 - confidence

    if guesses == 0 or not rejected(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while rejected(high):  # ends: at a large epsilon all guesses are right by chance
        low, high = high, 2.0 * high
    while high - low > 1e-4:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if rejected(middle) else (low, middle)
    return low


def one_run_bound(
    scores: Floats,  # [m]
    members: npt.NDArray[np.bool_],  # [m]
    *,
    highest: int,
    lowest: int,
    delta: float,
    confidence: float,
) -> Bound:
    """The one-run bound: of m canaries, the ``highest`` largest scores are guessed in, the ``lowest`` smallest out.

    Takes nothing but the fair coins: the scores may depend on each other in any way. Scores of several runs with
    canaries of their own may be put together, since each record is in one run alone.
    """
    check_confidence(confidence)
    highest, lowest = check_integer("highest", highest), check_integer("lowest", lowest)
    if highest + lowest > len(scores):
        raise InvalidValueError(f"{highest + lowest} guesses about {len(scores)} canaries: a canary is guessed once")
    order = np.argsort(scores, kind="stable")
    correct = int(members[order[len(order) - highest :]].sum()) + int((~members[order[:lowest]]).sum())
    guesses = highest + lowest
    epsilon = one_run_epsilon(len(scores), guesses, correct, delta, confidence)
    return Bound("one run", epsilon, confidence, {"guesses": guesses, "right": correct, "canaries": len(scores)})


def check_confidence(confidence: object) -> float:
    """Return a confidence in [0.5, 1); raises like :func:`~wavedp.privacy.validation.check_real`."""
    return check_real("confidence", confidence, at_least=0.5, below=1.0)
