# SPDX-License-Identifier: Apache-2.0
"""Epsilon of the Poisson-subsampled Gaussian mechanism under add-or-remove-one, and its inverses.

The figure is a pessimistic privacy-loss distribution (PLD; Koskela et al. 2020; Doroshenko et al. 2022) by
``dp-accounting``, so an upper bound. An optimistic PLD bounds it from below, and Renyi accounting, which
shares no code with either, checks it: an upper bound that exceeds the Renyi one means a defect somewhere,
and raises. The central-limit ("GDP") accountant understates epsilon and is not offered.
"""

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from wavedp.privacy.validation import check_integer, check_real

if TYPE_CHECKING:
    from dp_accounting import DpEvent

_FINE_INTERVAL = 1e-4
_COARSE_INTERVAL = 1e-3
_FINEST_INTERVAL = 1e-5
_MAX_POINTS_BUILT = 1.5e6
_MAX_POINTS_COMPOSED = 2e7
_CROSS_CHECK_SLACK = 1e-3
_CALIBRATION_WINDOW = (0.994, 0.9985)
_MIN_NOISE_MULTIPLIER = 0.05
_MIN_SAMPLE_RATE = 1e-12
_MAX_NOISE_MULTIPLIER = 1e6
_MAX_STEPS = 10**8
_STEPS_RESOLVED = 10**4
_TRUNCATED_MASS = 1e-15
_SMALLEST_DELTA_IN_UNCERTAIN_MASSES = 10


def gaussian_event(sample_rate: float, noise_multiplier: float, steps: int) -> "DpEvent":
    """Return the mechanism as dp-accounting sees it: ``steps`` compositions of a Poisson-sampled Gaussian."""
    import dp_accounting

    gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
    return dp_accounting.SelfComposedDpEvent(dp_accounting.PoissonSampledDpEvent(sample_rate, gaussian), steps)


def epsilon(*, sample_rate: float, noise_multiplier: float, steps: int, delta: float) -> float:
    """Return an upper bound on epsilon: pessimistic PLD, checked against the Renyi bound.

    Args:
        sample_rate: Poisson probability q in [1e-12, 1].
        noise_multiplier: noise standard deviation over sensitivity, at least 0; 0 is not private, and below
            0.05 there is nothing worth computing: both give infinity.
        steps: compositions; 0 gives 0.
        delta: below 1, and at least :func:`smallest_delta`.

    Raises:
        TypeError, ValueError: an argument of a wrong type or out of range.
        RuntimeError: the two accountants contradict each other.
    """
    return _checked_epsilon(*_validated(sample_rate, noise_multiplier, steps, delta))


def epsilon_bounds(*, sample_rate: float, noise_multiplier: float, steps: int, delta: float) -> tuple[float, float]:
    """Return a lower and an upper bound on the mechanism's epsilon; arguments and errors of :func:`epsilon`.

    The lower bound's error grows with steps times grid, so its grid is refined down to 1e-5 as steps grow;
    beyond some thousands of steps it stays valid and becomes loose. The upper bound is taken at delta less
    what truncation and rounding can amount to, ``2e-15 + 2e-16 steps``, and the lower one at delta plus that.
    """
    arguments = _validated(sample_rate, noise_multiplier, steps, delta)
    upper = _checked_epsilon(*arguments)
    if arguments[2] == 0 or not math.isfinite(upper):
        return upper, upper
    per_step = upper / arguments[2]
    interval = min(max(0.01 * per_step, _FINEST_INTERVAL), _FINE_INTERVAL * max(1.0, per_step))
    return min(_optimistic_epsilon(*arguments, interval), upper), upper


def smallest_delta(steps: int) -> float:
    """Return the smallest delta for which ``steps`` compositions are accounted: below it no figure is reliable.

    It is 10 times the mass that composition leaves uncertain: ``2e-14 + 2e-15 steps``.
    """
    return _SMALLEST_DELTA_IN_UNCERTAIN_MASSES * _uncertain_mass(steps)


def epsilon_rdp(*, sample_rate: float, noise_multiplier: float, steps: int, delta: float) -> float:
    """Return the Renyi upper bound on epsilon (dp-accounting, default orders); see :func:`epsilon`."""
    return _rdp_epsilon(*_validated(sample_rate, noise_multiplier, steps, delta))


def noise_multiplier_for(*, target_epsilon: float, sample_rate: float, steps: int, delta: float) -> float:
    """Return a noise multiplier whose :func:`epsilon` is within 1 % below ``target_epsilon``, never above.

    Searches on a coarse grid and verifies on the fine one.

    Raises:
        ValueError: no noise multiplier between 0.05 and 1e6 has such an epsilon.
    """
    target = check_real("target_epsilon", target_epsilon, above=0.0)
    q, _, steps, delta = _validated(sample_rate, 1.0, steps, delta)
    if steps == 0:
        raise ValueError("steps must be >= 1: no noise multiplier makes zero steps cost something")

    def cost(noise_multiplier: float, interval: float) -> float:
        return _pld_epsilon(q, noise_multiplier, steps, delta, interval)

    def search(interval: float) -> float:
        low, high = _bracket_by_rdp(target, q, steps, delta)
        while cost(low, interval) <= target:
            high, low = low, low * 0.8
            if low < _MIN_NOISE_MULTIPLIER:
                raise ValueError(
                    f"target_epsilon={target} is so loose for sample_rate={q}, steps={steps}, delta={delta} "
                    f"that a noise multiplier of {_MIN_NOISE_MULTIPLIER} already meets it: lower the target"
                )
        return _solve_decreasing(lambda s: cost(s, interval), low, high, target)

    guess = search(_COARSE_INTERVAL)
    if not 0.99 * target <= cost(guess, _FINE_INTERVAL) <= target:
        guess = search(_FINE_INTERVAL)
    reached = _checked_epsilon(q, guess, steps, delta)
    if not 0.99 * target <= reached <= target:
        raise RuntimeError(f"calibration to epsilon {target} ended at {reached} with noise multiplier {guess}")
    return guess


def steps_for(*, target_epsilon: float, sample_rate: float, noise_multiplier: float, delta: float) -> int:
    """Return the largest number of steps whose :func:`epsilon` is at most ``target_epsilon`` (0 if none).

    Above 10,000 steps the result may fall short by one in 10,000, to save time.

    Raises:
        ValueError: 1e8 steps stay within the target.
    """
    target = check_real("target_epsilon", target_epsilon, above=0.0)
    q, sigma, _, delta = _validated(sample_rate, noise_multiplier, 1, delta)

    if sigma == 0.0:
        return 0

    def cost(steps: int) -> float:
        return _pld_epsilon(q, sigma, steps, delta, _FINE_INTERVAL)

    if cost(1) > target:
        return 0
    low, high = 1, _steps_by_rdp(target, q, sigma, delta)
    while cost(high) <= target:
        if high == _MAX_STEPS:
            raise ValueError(f"{_MAX_STEPS} steps stay within the target epsilon")
        # Epsilon grows at least with the square root of steps.
        growth = min(2.0, 1.001 * (target / cost(high)) ** 2) if cost(high) > 0 else 2.0
        low, high = high, min(math.ceil(growth * high) + 1, _MAX_STEPS)
    return _last_within(cost, low, high, target, tolerance=low // _STEPS_RESOLVED)


def _uncertain_mass(steps: int) -> float:
    """Return a bound on the error of a composed tail: 1e-15 is truncated, and the convolution, the power ``steps``
    of a Fourier transform, was measured to be off by up to 1e-16 per step."""
    return 2.0 * _TRUNCATED_MASS + 2e-16 * steps


def _validated(
    sample_rate: float, noise_multiplier: float, steps: int, delta: float
) -> tuple[float, float, int, float]:
    steps = check_integer("steps", steps, at_most=_MAX_STEPS)
    delta = check_real("delta", delta, above=0.0, below=1.0)
    if delta < smallest_delta(steps):
        raise ValueError(
            f"delta={delta} is too small to be accounted for {steps} steps: the smallest that works is "
            f"{smallest_delta(steps):.2g}"
        )
    return (
        check_real("sample_rate", sample_rate, at_least=_MIN_SAMPLE_RATE, at_most=1.0),
        check_real("noise_multiplier", noise_multiplier, at_least=0.0, at_most=_MAX_NOISE_MULTIPLIER),
        steps,
        delta,
    )


@functools.lru_cache(maxsize=256)
def _checked_epsilon(q: float, sigma: float, steps: int, delta: float) -> float:
    upper = _pld_epsilon(q, sigma, steps, delta, _FINE_INTERVAL)
    limit = _rdp_epsilon(q, sigma, steps, delta) * (1.0 + _CROSS_CHECK_SLACK)
    if upper > limit:
        # Many steps of small loss round up; a finer grid separates that from a defect.
        upper = _pld_epsilon(q, sigma, steps, delta, _FINE_INTERVAL / 10)
    if math.isnan(upper) or upper > limit:
        raise RuntimeError(
            f"accountants disagree at sample_rate={q}, noise_multiplier={sigma}, steps={steps}, "
            f"delta={delta}: PLD gives epsilon {upper}, Renyi {limit}; no epsilon is reported"
        )
    return upper


def _interval_for(q: float, sigma: float, steps: int, interval: float) -> float:
    """Fit ``interval`` to the mechanism; a pessimistic bound stays one on any grid.

    A step whose loss spreads over less than a grid cell needs a finer grid, and a wide range a coarser one.
    One step's spread is about ``q sqrt(exp(1 / sigma^2) - 1)``; below sigma = 0.2 its largest loss, about
    ``1 / (2 sigma^2)``, sets the scale.
    """
    width = 10.0 / sigma + 0.5 / sigma**2
    spread = min(1.0 / sigma, q * math.sqrt(math.expm1(min(sigma**-2, 600.0))))
    fine = min(interval, max(0.1 * interval, 0.1 * spread))
    coarse = 0.05 * interval / sigma**2
    return max(fine, coarse, width / _MAX_POINTS_BUILT, 20.0 * math.sqrt(steps) * spread / _MAX_POINTS_COMPOSED)


@functools.lru_cache(maxsize=8)
def _single_step(q: float, sigma: float, interval: float, pessimistic: bool) -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        sigma,
        sampling_prob=q,
        value_discretization_interval=interval,
        pessimistic_estimate=pessimistic,
        use_connect_dots=pessimistic,
    )


def _composed(base: Any, steps: int) -> Any:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    if steps > 1:
        add = None if base._symmetric else _prepared(base._pmf_add, steps)
        base = PrivacyLossDistribution(_prepared(base._pmf_remove, steps), add)
    return base.self_compose(steps, tail_mass_truncation=_TRUNCATED_MASS)


def _prepared(pmf: Any, steps: int) -> Any:
    """Return the same distribution in the form that composes fast.

    A sparse one raises its size to the power of ``steps``, which takes minutes for millions. The Chernoff bounds
    that truncate the result try orders ``1/n`` to ``20/n`` on n points; with n at least the deviation of the
    result, in grid cells, they are tight, so zeros are appended.
    """
    import numpy as np
    from dp_accounting.pld.pld_pmf import DensePLDPmf, SparsePLDPmf

    dense = pmf.to_dense_pmf() if isinstance(pmf, SparsePLDPmf) else pmf
    cells = np.arange(dense.size)
    mean = dense._probs @ cells
    deviation = math.sqrt(steps * (dense._probs @ (cells - mean) ** 2))
    zeros = np.zeros(max(0, math.ceil(deviation) - dense.size))
    return DensePLDPmf(
        dense._discretization,
        dense._lower_loss,
        np.append(dense._probs, zeros),
        dense._infinity_mass,
        dense._pessimistic_estimate,
    )


@functools.lru_cache(maxsize=1024)
def _pld_epsilon(q: float, sigma: float, steps: int, delta: float, interval: float) -> float:
    if steps == 0:
        return 0.0
    if sigma < _MIN_NOISE_MULTIPLIER:
        return math.inf
    base = _single_step(q, sigma, _interval_for(q, sigma, steps, interval), True)
    return float(_composed(base, steps).get_epsilon_for_delta(delta - _uncertain_mass(steps)))


@functools.lru_cache(maxsize=256)
def _optimistic_epsilon(q: float, sigma: float, steps: int, delta: float, interval: float) -> float:
    base = _single_step(q, sigma, _interval_for(q, sigma, steps, interval), False)
    return float(_composed(base, steps).get_epsilon_for_delta(min(delta + _uncertain_mass(steps), 1.0)))


@functools.lru_cache(maxsize=1024)
def _rdp_epsilon(q: float, sigma: float, steps: int, delta: float) -> float:
    from dp_accounting.rdp import RdpAccountant

    if steps == 0:
        return 0.0
    if sigma < _MIN_NOISE_MULTIPLIER:
        return math.inf
    with _quiet_accountant():
        return float(RdpAccountant().compose(gaussian_event(q, sigma, steps)).get_epsilon(delta))


@contextlib.contextmanager
def _quiet_accountant() -> Iterator[None]:
    """Silence the lines on Renyi orders that dp-accounting leaves out, which only loosens the bound."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _bracket_by_rdp(target: float, q: float, steps: int, delta: float) -> tuple[float, float]:
    """Return noise multipliers around the one at which the cheap Renyi bound meets ``target``."""
    high = 1.0
    while _rdp_epsilon(q, high, steps, delta) > target:
        high *= 2.0
        if high > _MAX_NOISE_MULTIPLIER:
            raise ValueError(f"target_epsilon={target} needs a noise multiplier above {_MAX_NOISE_MULTIPLIER}")
    low = high
    while low > _MIN_NOISE_MULTIPLIER and _rdp_epsilon(q, low, steps, delta) <= target:
        high, low = low, max(low / 1.5, _MIN_NOISE_MULTIPLIER)
    return low, high


def _steps_by_rdp(target: float, q: float, sigma: float, delta: float) -> int:
    """Return a number of steps at or a little below that at which the cheap Renyi bound meets ``target``."""
    low, high = 1, 2
    while high < _MAX_STEPS and _rdp_epsilon(q, sigma, high, delta) <= target:
        low, high = high, min(2 * high, _MAX_STEPS)
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        low, high = (middle, high) if _rdp_epsilon(q, sigma, middle, delta) <= target else (low, middle)
    return low


def _solve_decreasing(cost: Callable[[float], float], low: float, high: float, target: float) -> float:
    """Find s with ``cost(s)`` just under ``target``; ``cost`` falls, ``cost(low) > target >= cost(high)``."""
    floor, ceiling = (factor * target for factor in _CALIBRATION_WINDOW)
    for iteration in range(60):
        at_low, at_high = cost(low), cost(high)
        if floor <= at_high <= target:
            return high
        fraction = 0.5
        if iteration % 3 != 2 and math.isfinite(at_low) and at_high > 0:
            # Secant on log-log axes, where epsilon is close to a straight line.
            fraction = math.log(at_low / (0.5 * (floor + ceiling))) / math.log(at_low / at_high)
        middle = low * (high / low) ** min(max(fraction, 0.02), 0.98)
        if cost(middle) > ceiling:
            low = middle
        else:
            high = middle
    return high


def _last_within(cost: Callable[[int], float], low: int, high: int, target: float, tolerance: int) -> int:
    """Return an n with ``cost(n) <= target < cost(n + tolerance)``; ``cost(low) <= target < cost(high)`` grows."""
    iteration = 0
    while high - low > max(1, tolerance):
        at_low, at_high = cost(low), cost(high)
        middle = (low + high) // 2
        if iteration % 3 != 2 and at_low > 0 and math.isfinite(at_high):
            # Interpolate on log-log axes, then go a little beyond, so that the nearer end moves as well.
            fraction = math.log(target / at_low) / math.log(at_high / at_low)
            guess = low * (high / low) ** fraction
            margin = max(1, tolerance // 2)
            middle = round(guess) + (margin if 2 * guess < low + high else -margin)
        middle = min(max(middle, low + 1), high - 1)
        low, high = (middle, high) if cost(middle) <= target else (low, middle)
        iteration += 1
    return low
