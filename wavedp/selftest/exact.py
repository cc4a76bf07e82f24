# SPDX-License-Identifier: Apache-2.0
"""Epsilons known without an accountant: closed forms, and figures that two methods agree on."""

import math
from collections.abc import Callable


def gaussian_delta(shift: float, epsilon: float) -> float:
    """Delta of a Gaussian mechanism whose neighbours lie ``shift`` deviations apart (Balle and Wang 2018)."""
    if shift == 0.0:
        return 0.0
    return _above(epsilon / shift - shift / 2.0) - math.exp(epsilon) * _above(epsilon / shift + shift / 2.0)


def gaussian_epsilon(shift: float, delta: float) -> float:
    """The inverse of :func:`gaussian_delta`."""
    return _falling_root(lambda epsilon: gaussian_delta(shift, epsilon) - delta)


def sampled_gaussian_epsilon(sample_rate: float, noise_multiplier: float, delta: float) -> float:
    """Epsilon of one Poisson-sampled Gaussian release under add-or-remove-one, exactly.

    With the record the release is ``(1 - q) N(0, z^2) + q N(1, z^2)``, without it ``N(0, z^2)``; both orders count.
    """
    q, z = sample_rate, noise_multiplier

    def removed(epsilon: float) -> float:
        # Where the mixture is more than exp(epsilon) times the other: above x.
        x = z * z * math.log((math.exp(epsilon) - (1.0 - q)) / q) + 0.5
        return (1.0 - q) * _above(x / z) + q * _above((x - 1.0) / z) - math.exp(epsilon) * _above(x / z)

    def added(epsilon: float) -> float:
        share = math.exp(-epsilon) - (1.0 - q)
        if share <= 0.0:
            return 0.0
        x = z * z * math.log(share / q) + 0.5  # below it the mixture is less than exp(-epsilon) times the other
        below = _above(-x / z)
        return below - math.exp(epsilon) * ((1.0 - q) * below + q * _above(-(x - 1.0) / z))

    return _falling_root(lambda epsilon: max(removed(epsilon), added(epsilon)) - delta)


def _above(x: float) -> float:
    return 0.5 * math.erfc(x / math.sqrt(2.0))


def _falling_root(f: Callable[[float], float]) -> float:
    """Where ``f`` falls through 0, from 0 on; 0 if it is not positive there."""
    low, high = 0.0, 1.0
    if f(low) <= 0.0:
        return 0.0
    while f(high) > 0.0:
        low, high = high, 2.0 * high
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if f(middle) > 0.0 else (low, middle)
    return high
