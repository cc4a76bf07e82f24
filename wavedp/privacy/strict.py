# SPDX-License-Identifier: Apache-2.0
"""What strict noise costs beyond an exact Gaussian: rounding to integers, and how its law differs from the ideal one.

Strict noise releases ``rint(sum / grid) + rint(std / grid * normal)``, an integer in each of d coordinates, where the
normals are float64 and made from finitely many bits. With the clipped sum's sensitivity S and the grid at most
``2^-bits std``:

1. Rounding moves each coordinate of the sum by at most half a grid step, for either of two neighbours, so that the
   integers have the l2 sensitivity ``(S + grid sqrt(d)) / grid``. The noise is made that much larger:
   :func:`rounded_sensitivity`.
2. With exact normals the release would be ``rint`` of an exact Gaussian mechanism on integers, so post-processing of
   what accountants know. The real normals have another law. Whoever sees both numbers of a pair, the cosine's and the
   sine's, sees their radius, and radii lie ``2^-bits_of_radius / (u r)`` apart: for rare u no less than the grid.
   Pairs with such u are charged to delta. The others' laws are ``(e, d)``-close to the ideal ones, and epsilon grows
   by ``2 e``: :func:`law_epsilon`.

``docs/privacy.md`` has the derivation.
"""

import functools
import itertools
import math

from wavedp.errors import InvalidValueError
from wavedp.functional import MAX_STRICT_DEVIATION, STRICT_ANGLE_BITS, STRICT_NORMAL_ERROR, STRICT_RADIUS_BITS
from wavedp.privacy.validation import check_real

MECHANISM_SHARE = 0.9
"""Share of delta at which the ideal mechanism is accounted."""
LAW_SHARE = 0.04
"""Share of delta for the law of the noise, in four parts."""
MOST_LAW_EPSILON = 0.05
"""The largest e, with which all shares and their factors stay below delta."""

_ROUNDING_COST = 2.0**-6
_FINEST_BITS = 24
COARSEST_BITS = 8
_LARGEST_RATIO = 0.5
# Densities, and u, in a cell and the frame around it that displacement reaches are within this factor of each other
# (grid <= 2^-8, displacement <= grid / 9, radius <= 11); and the frame's area is within it of 4 displacement / grid.
_SPREAD = 1.125
_LABEL_PAIRS = 1 << 16  # set aside for the label histogram

MOST_CLASSES = _LABEL_PAIRS
"""Classes that a label histogram of strict noise may have."""


def grid_bits(noise_multiplier: float, trainable_parameters: int) -> int:
    """Return b of the grid ``2^-b std``, rounded down to a power of two: the coarsest whose rounding adds at most 1/64
    to the sensitivity, within 8 and 24. A coarse grid costs sensitivity, a fine one shows more of the noise's law.

    Args:
        noise_multiplier: of the sum, at least 0.
        trainable_parameters: d, at least 1.
    """
    cost = max(noise_multiplier, 2.0**-10) * math.sqrt(trainable_parameters) / _ROUNDING_COST
    return min(max(math.ceil(math.log2(cost)), COARSEST_BITS), _FINEST_BITS)


def rounded_sensitivity(sensitivity: float, noise_multiplier: float, trainable_parameters: int) -> float:
    """Return the l2 sensitivity S' of the sum rounded to the grid of noise of deviation ``noise_multiplier * S'``.

    ``S' = S + grid sqrt(d)`` with ``grid <= 2^-b z S'`` gives ``S' <= S / (1 - 2^-b z sqrt(d))``.

    Raises:
        ValueError: there are so many parameters, or so much noise, that rounding costs more than half.
    """
    bits = grid_bits(noise_multiplier, trainable_parameters)
    rounding = math.ldexp(noise_multiplier * math.sqrt(trainable_parameters), -bits)
    if rounding > 0.5:
        raise InvalidValueError(
            f"strict noise on {trainable_parameters} parameters with noise multiplier {noise_multiplier:.6g} would "
            f"round more than half of the sensitivity away: use noise_mode='standard', or train fewer parameters"
        )
    return sensitivity / (1.0 - rounding)


def grid_of(std: float, bits: int) -> float:
    """Return the grid of noise of deviation ``std``: ``2^-bits std``, rounded down to a power of two."""
    std = check_real("std", std, above=0.0)
    return math.ldexp(1.0, math.frexp(std)[1] - 1 - bits)


def pairs_of(trainable_parameters: int, steps: int) -> int:
    """Return a bound on the pairs of normals that ``steps`` steps are made from, the label histogram's included."""
    # A step's last group of 16 pairs may be used in part.
    return steps * ((trainable_parameters + 1) // 2 + 16) + _LABEL_PAIRS


@functools.lru_cache(maxsize=256)
def law_epsilon(*, pairs: int, releases: int, shift: float, bits: int, delta: float, epsilon: float) -> float:
    """Return e, by twice which epsilon grows; infinity if it is above 0.05: there are too many pairs for the grid.

    Args:
        pairs: of normals in the whole run, at least 1.
        releases: steps, and the histogram.
        shift: by how many standard deviations one record may move a release, in l2.
        bits: the grid is at least ``2^-(bits + 1)`` standard deviations.
        delta: of the whole guarantee, in (0, 1); :data:`LAW_SHARE` of it is used.
        epsilon: of the ideal mechanism at :data:`MECHANISM_SHARE` of delta.
    """
    quarter = 0.25 * LAW_SHARE * check_real("delta", delta, above=0.0, below=1.0)
    grid = math.ldexp(1.0, -(bits + 1))
    # A pair is left to delta if its u is below the threshold: in the real noise, in the ideal one, or in the ideal one
    # seen from a neighbour, which is at most `shift` nearer to the threshold's radius.
    radius = shift + math.sqrt(2.0 * math.log(releases / quarter))
    if shift > 0.5 * radius:  # where it would matter how the shift is spread over pairs
        return math.inf
    threshold = min(quarter / (pairs * _SPREAD), math.exp(-0.5 * radius**2) / _SPREAD)
    log_inverse = (epsilon + MOST_LAW_EPSILON + math.log(2.0)) - math.log(quarter)  # of d: d (1 + exp(epsilon + e))
    largest = law_ratio(threshold, grid) if threshold > 0.0 else math.inf
    if largest > _LARGEST_RATIO:
        return math.inf
    # The ratio falls as u grows, up to 1/2: in each interval that of its lower end bounds it.
    edges = [threshold]
    while edges[-1] < 0.5:
        edges.append(min(edges[-1] * 2.0**0.25, 0.5))
    intervals = [(b - a, law_ratio(a, grid)) for a, b in itertools.pairwise(edges)]
    # Above 1/2 that of the upper end does.
    intervals += [(2.0**-k, law_ratio(1.0 - 2.0**-k, grid)) for k in range(2, 53)]
    intervals.append((2.0**-52, law_ratio(1.0, grid)))
    # Laws without their tails are larger by the mass of those.
    rescaled = 4.0 * threshold * _SPREAD
    best = math.inf
    for quarter_octaves in range(4, 120):
        order = 1.0 + 2.0 ** (quarter_octaves / 4.0)
        excess = sum(weight * _excess(order, ratio + rescaled) for weight, ratio in intervals) * (1.0 + rescaled)
        best = min(best, (pairs * excess + log_inverse) / (order - 1.0))
    found = best + 2.0 * pairs * threshold * _SPREAD
    return found if found <= MOST_LAW_EPSILON else math.inf


def law_ratio(u: float, grid: float) -> float:
    """Return by how much, relative to itself, the mass of a pair's cell at ``r = sqrt(-2 ln u)`` may be off.

    ``displacement`` is how far computed normals lie from exact ones of continuous words, at most: arithmetic, half a
    step of the radius's and half a step of the angle's words. Mass that it moves across the four sides of a cell of
    side ``grid``, all in standard deviations, is little more than ``4 displacement / grid`` of the cell's.
    """
    # A side of the central cells is half a grid step from the centre.
    radius = max(math.sqrt(max(-2.0 * math.log(u), 0.0)), 0.5 * grid)
    of_radius = 2.0 ** -(STRICT_RADIUS_BITS + 1) / (u * radius) * _SPREAD
    of_angle = math.pi * 2.0**-STRICT_ANGLE_BITS * MAX_STRICT_DEVIATION
    return 4.0 * _SPREAD**2 * (STRICT_NORMAL_ERROR + of_radius + of_angle) / grid


def _excess(order: float, ratio: float) -> float:
    """Return a bound on ``(1 + x)^a - 1 - a x`` and ``(1 - x)^(1 - a) - 1 - (a - 1) x`` for ``|x| <= ratio < 1``."""
    exponent = -order * math.log1p(-ratio)
    if exponent > 600.0:
        return math.inf
    if exponent < 1e-3:  # where the difference would lose its digits
        return 0.5 * order * (order + 1.0) * ratio**2 * (1.0 + 2.0 * exponent)
    return math.expm1(exponent) - order * ratio
