# SPDX-License-Identifier: Apache-2.0
"""The inverses of epsilon: the noise multiplier, or the number of steps, that a target epsilon allows."""

import math
from collections.abc import Callable, Iterable

from wavedp.errors import InvalidValueError, StateError
from wavedp.privacy.phases import (
    MAX_NOISE_MULTIPLIER,
    MAX_STEPS,
    Phase,
    check_delta,
    least_noise_multiplier,
    merged,
    total_steps,
)
from wavedp.privacy.pld import COARSE_INTERVAL, FINE_INTERVAL, checked_epsilon, upper_epsilon
from wavedp.privacy.renyi import rdp_epsilon
from wavedp.privacy.validation import check_real

_WINDOW = (0.994, 0.9985)
_STEPS_RESOLVED = 10**4


def noise_multiplier_for(
    *,
    target_epsilon: float,
    sample_rate: float,
    steps: int,
    delta: float,
    truncated_batch_size: int | None = None,
    dataset_size_bound: int | None = None,
    other_phases: Iterable[Phase] = (),
) -> float:
    """Return a noise multiplier for which epsilon is within 1 % below ``target_epsilon``, never above.

    epsilon is that of the phase described together with ``other_phases``, which stay as they are
    (:func:`~wavedp.privacy.accounting.composed_epsilon`). Searches on a coarse grid and verifies on the fine one.

    Raises:
        ValueError: no noise multiplier between 0.05 (0.1 where batches are cut) and 1e6 has such an epsilon, or the
            other phases alone reach the target.
    """
    target = check_real("target_epsilon", target_epsilon, above=0.0)
    phase = Phase(1.0, sample_rate, steps, truncated_batch_size, dataset_size_bound)
    others = merged(other_phases)
    delta = check_delta(delta, phase.steps + total_steps(others))
    if phase.steps == 0:
        raise InvalidValueError("steps must be >= 1: no noise multiplier makes zero steps cost something")
    least = least_noise_multiplier(phase)

    def at(noise_multiplier: float) -> tuple[Phase, ...]:
        return _with(phase, others, noise_multiplier=noise_multiplier)

    def cost(noise_multiplier: float, interval: float) -> float:
        return upper_epsilon(at(noise_multiplier), delta, interval)

    def search(interval: float) -> float:
        # Renyi bounds are cheap and near, but with other phases may be above the target whatever the noise.
        low, high = _bracket(
            (lambda s: cost(s, interval)) if others else (lambda s: rdp_epsilon(at(s), delta)), target, least
        )
        while cost(low, interval) <= target:
            high, low = low, low * 0.8
            if low < least:
                raise InvalidValueError(
                    f"target_epsilon={target} is so loose for sample_rate={phase.sample_rate}, steps={phase.steps}, "
                    f"delta={delta} that a noise multiplier of {least} already meets it: lower the target"
                )
        return _solve_decreasing(lambda s: cost(s, interval), low, high, target)

    guess = None
    if _room(others, delta, target, COARSE_INTERVAL):
        guess = search(COARSE_INTERVAL)
    elif not _room(others, delta, target, FINE_INTERVAL):
        raise InvalidValueError(_no_room(others, delta, target))
    if guess is None or not 0.99 * target <= cost(guess, FINE_INTERVAL) <= target:
        guess = search(FINE_INTERVAL)
    reached = checked_epsilon(at(guess), delta)
    if not 0.99 * target <= reached <= target:
        raise StateError(f"calibration to epsilon {target} ended at {reached} with noise multiplier {guess}")
    return guess


def steps_for(
    *,
    target_epsilon: float,
    sample_rate: float,
    noise_multiplier: float,
    delta: float,
    truncated_batch_size: int | None = None,
    dataset_size_bound: int | None = None,
    other_phases: Iterable[Phase] = (),
) -> int:
    """Return the largest number of steps for which epsilon, with ``other_phases``, is at most ``target_epsilon``.

    0 if not even one is. Above 10,000 steps the result may fall short by one in 10,000, to save time.

    Raises:
        ValueError: 1e8 steps stay within the target, or the other phases alone exceed it.
    """
    target = check_real("target_epsilon", target_epsilon, above=0.0)
    phase = Phase(noise_multiplier, sample_rate, 1, truncated_batch_size, dataset_size_bound)
    others = merged(other_phases)
    delta = check_delta(delta, 1 + total_steps(others))
    if upper_epsilon(others, delta, FINE_INTERVAL) > target:
        raise InvalidValueError(_no_room(others, delta, target))
    if phase.noise_multiplier == 0.0:
        return 0

    def cost(steps: int) -> float:
        return upper_epsilon(_with(phase, others, steps=steps), delta, FINE_INTERVAL)

    if cost(1) > target:
        return 0
    low, high = 1, _steps_by_rdp(target, phase, others, delta)
    while cost(high) <= target:
        if high == MAX_STEPS:
            raise InvalidValueError(f"{MAX_STEPS} steps stay within the target epsilon")
        # Epsilon of equal steps grows at least with their square root.
        ratio = target / cost(high) if cost(high) > 0 else 2.0
        growth = 2.0 if others else min(2.0, 1.001 * ratio**2)
        low, high = high, min(math.ceil(growth * high) + 1, MAX_STEPS)
    return _last_within(cost, low, high, target, tolerance=low // _STEPS_RESOLVED)


def _with(
    phase: Phase, others: tuple[Phase, ...], *, noise_multiplier: float | None = None, steps: int | None = None
) -> tuple[Phase, ...]:
    varied = Phase(
        phase.noise_multiplier if noise_multiplier is None else noise_multiplier,
        phase.sample_rate,
        phase.steps if steps is None else steps,
        phase.truncated_batch_size,
        phase.dataset_size_bound,
    )
    return merged((varied, *others))


def _room(others: tuple[Phase, ...], delta: float, target: float, interval: float) -> bool:
    """Whether the other phases leave enough for the search to end within its window."""
    return upper_epsilon(others, delta, interval) < _WINDOW[0] * target


def _no_room(others: tuple[Phase, ...], delta: float, target: float) -> str:
    alone = upper_epsilon(others, delta, FINE_INTERVAL)
    return (
        f"the other phases alone have epsilon {alone:.6g} of target_epsilon={target}: raise the target, or their noise"
    )


def _bracket(cost: Callable[[float], float], target: float, least: float) -> tuple[float, float]:
    """Return noise multipliers around the one at which ``cost``, or something near it, meets ``target``."""
    high = 1.0
    while cost(high) > target:
        high *= 2.0
        if high > MAX_NOISE_MULTIPLIER:
            raise InvalidValueError(f"target_epsilon={target} needs a noise multiplier above {MAX_NOISE_MULTIPLIER}")
    low = high
    while low > least and cost(low) <= target:
        high, low = low, max(low / 1.5, least)
    return low, high


def _steps_by_rdp(target: float, phase: Phase, others: tuple[Phase, ...], delta: float) -> int:
    """Return a number of steps at or a little below that at which the cheap Renyi bound meets ``target``."""

    def cost(steps: int) -> float:
        return rdp_epsilon(_with(phase, others, steps=steps), delta)

    low, high = 1, 2
    while high < MAX_STEPS and cost(high) <= target:
        low, high = high, min(2 * high, MAX_STEPS)
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= target else (low, middle)
    return low


def _solve_decreasing(cost: Callable[[float], float], low: float, high: float, target: float) -> float:
    """Find s with ``cost(s)`` just under ``target``; ``cost`` falls, ``cost(low) > target >= cost(high)``."""
    floor, ceiling = (factor * target for factor in _WINDOW)
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
