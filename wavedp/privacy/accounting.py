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
_MAX_NOISE_MULTIPLIER = 1e6
_MAX_STEPS = 10**8


def gaussian_event(sample_rate: float, noise_multiplier: float, steps: int) -> "DpEvent":
    """Return the mechanism as dp-accounting sees it: ``steps`` compositions of a Poisson-sampled Gaussian."""
    import dp_accounting

    gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
    return dp_accounting.SelfComposedDpEvent(dp_accounting.PoissonSampledDpEvent(sample_rate, gaussian), steps)


def epsilon(*, sample_rate: float, noise_multiplier: float, steps: int, delta: float) -> float:
    """Return an upper bound on epsilon: pessimistic PLD, checked against the Renyi bound.

    Args:
        sample_rate: Poisson probability q in (0, 1].
        noise_multiplier: noise standard deviation over sensitivity, at least 0; 0 is not private, and below
            0.05 there is nothing worth computing: both give infinity.
        steps: compositions; 0 gives 0.
        delta: in (0, 1).

    Raises:
        TypeError, ValueError: an argument of a wrong type or out of range.
        RuntimeError: the two accountants contradict each other.
    """
    return _checked_epsilon(*_validated(sample_rate, noise_multiplier, steps, delta))


def epsilon_bounds(*, sample_rate: float, noise_multiplier: float, steps: int, delta: float) -> tuple[float, float]:
    """Return a lower and an upper bound on the mechanism's epsilon; arguments and errors of :func:`epsilon`.

    The lower bound's error grows with steps times grid, so its grid is refined down to 1e-5 as steps grow;
    beyond some thousands of steps it stays valid and becomes loose.
    """
    arguments = _validated(sample_rate, noise_multiplier, steps, delta)
    upper = _checked_epsilon(*arguments)
    if arguments[2] == 0 or not math.isfinite(upper):
        return upper, upper
    interval = min(max(0.01 * upper / arguments[2], _FINEST_INTERVAL), _FINE_INTERVAL)
    return min(_optimistic_epsilon(*arguments, interval), upper), upper


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

    Raises:
        ValueError: more than 1e8 steps stay within the target.
    """
    target = check_real("target_epsilon", target_epsilon, above=0.0)
    q, sigma, _, delta = _validated(sample_rate, noise_multiplier, 1, delta)

    def within(steps: int, interval: float) -> bool:
        return sigma > 0 and _pld_epsilon(q, sigma, steps, delta, interval) <= target

    coarse = _largest_true(lambda n: within(n, _COARSE_INTERVAL), 0, 1)
    while coarse and not within(coarse, _FINE_INTERVAL):
        coarse -= max(1, coarse // 1000)
    return _largest_true(lambda n: within(n, _FINE_INTERVAL), coarse, max(1, coarse // 1000))


def _validated(
    sample_rate: float, noise_multiplier: float, steps: int, delta: float
) -> tuple[float, float, int, float]:
    return (
        check_real("sample_rate", sample_rate, above=0.0, at_most=1.0),
        check_real("noise_multiplier", noise_multiplier, at_least=0.0, at_most=_MAX_NOISE_MULTIPLIER),
        check_integer("steps", steps, at_most=_MAX_STEPS),
        check_real("delta", delta, above=0.0, below=1.0),
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
    One step's spread is about ``q sqrt(exp(1 / sigma^2) - 1)``.
    """
    width = 10.0 / sigma + 0.5 / sigma**2
    spread = min(1.0 / sigma, q * math.sqrt(math.expm1(min(sigma**-2, 600.0))))
    fine = min(interval, max(0.1 * interval, 0.1 * spread))
    return max(fine, width / _MAX_POINTS_BUILT, 20.0 * math.sqrt(steps) * spread / _MAX_POINTS_COMPOSED)


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


@functools.lru_cache(maxsize=1024)
def _pld_epsilon(q: float, sigma: float, steps: int, delta: float, interval: float) -> float:
    if steps == 0:
        return 0.0
    if sigma < _MIN_NOISE_MULTIPLIER:
        return math.inf
    base = _single_step(q, sigma, _interval_for(q, sigma, steps, interval), True)
    return float(base.self_compose(steps).get_epsilon_for_delta(delta))


@functools.lru_cache(maxsize=256)
def _optimistic_epsilon(q: float, sigma: float, steps: int, delta: float, interval: float) -> float:
    base = _single_step(q, sigma, _interval_for(q, sigma, steps, interval), False)
    return float(base.self_compose(steps).get_epsilon_for_delta(delta))


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


def _largest_true(predicate: Callable[[int], bool], known: int, stride: int) -> int:
    """Return the largest n with ``predicate(n)``, which holds at ``known`` and, once false, stays so."""
    low = known
    while predicate(low + stride):
        low += stride
        stride *= 2
        if low > _MAX_STEPS:
            raise ValueError(f"more than {_MAX_STEPS} steps stay within the target epsilon")
    high = low + stride
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if predicate(middle) else (low, middle)
    return low
