# SPDX-License-Identifier: Apache-2.0
"""Bounds on epsilon by privacy-loss distributions (PLD; Koskela et al. 2020; Doroshenko et al. 2022).

``dp-accounting`` rounds one step's privacy loss to a grid, up or down; here grids are chosen, unlike steps are
composed, and what that truncates and rounds is set aside from delta.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wavedp.errors import StateError
from wavedp.privacy.phases import TRUNCATED_MASS, Phase, total_steps, uncertain_mass
from wavedp.privacy.renyi import rdp_epsilon

if TYPE_CHECKING:
    import numpy as np

FINE_INTERVAL = 1e-4
COARSE_INTERVAL = 1e-3
_FINEST_INTERVAL = 1e-5
_MAX_POINTS_BUILT = 1.5e6
_MAX_POINTS_COMPOSED = 2e7
_CROSS_CHECK_SLACK = 1e-3


@functools.lru_cache(maxsize=256)
def checked_epsilon(phases: tuple[Phase, ...], delta: float) -> float:
    """Return the upper bound on epsilon of merged ``phases``, once the Renyi bound has not contradicted it.

    Raises:
        RuntimeError: the two contradict each other: one of them is wrong.
    """
    upper = upper_epsilon(phases, delta, FINE_INTERVAL)
    limit = rdp_epsilon(phases, delta) * (1.0 + _CROSS_CHECK_SLACK)
    if upper > limit:
        # Many steps of small loss round up; a finer grid separates that from a defect.
        upper = upper_epsilon(phases, delta, FINE_INTERVAL / 10)
    if math.isnan(upper) or upper > limit:
        raise StateError(
            f"accountants disagree at {', '.join(map(str, phases))}, delta={delta}: PLD gives epsilon {upper}, "
            f"Renyi {limit}; no epsilon is reported"
        )
    return upper


@functools.lru_cache(maxsize=1024)
def upper_epsilon(phases: tuple[Phase, ...], delta: float, interval: float) -> float:
    """Return a pessimistic epsilon of merged ``phases`` on a grid of about ``interval``, without a cross-check."""
    if not phases:
        return 0.0
    if any(phase.too_little_noise() for phase in phases):
        return math.inf
    composed = _composed(phases, _interval_for(phases, interval), True)
    return max(float(pmf.get_epsilon_for_delta(delta - _set_aside(phases))) for pmf in composed)


@functools.lru_cache(maxsize=256)
def lower_epsilon(phases: tuple[Phase, ...], delta: float, interval: float) -> float:
    """Return an optimistic epsilon of merged ``phases``, none with too little noise.

    Truncated phases count as not truncated: the guarantee covers data sets so small that no batch is ever cut.
    """
    plain = tuple(Phase(phase.noise_multiplier, phase.sample_rate, phase.steps) for phase in phases)
    composed = _composed(plain, _interval_for(plain, interval), False)
    allowed = min(delta + _set_aside(phases), 1.0)
    return max(float(pmf.get_epsilon_for_delta(allowed)) for pmf in composed)


def lower_interval(upper: float, steps: int) -> float:
    """Return the grid for an optimistic bound beside ``upper``: its error grows with steps times grid."""
    per_step = upper / steps
    return min(max(0.01 * per_step, _FINEST_INTERVAL), FINE_INTERVAL * max(1.0, per_step))


def _set_aside(phases: tuple[Phase, ...]) -> float:
    return uncertain_mass(total_steps(phases), len(phases))


def _interval_for(phases: Sequence[Phase], interval: float) -> float:
    """Fit ``interval`` to the mechanisms; a pessimistic bound stays one on any grid.

    A step whose loss spreads over less than a grid cell needs a finer grid, and a wide range a coarser one.
    One step's spread is about ``q sqrt(exp(1 / sigma^2) - 1)``; below sigma = 0.2 its largest loss, about
    ``1 / (2 sigma^2)``, sets the scale.
    """
    wanted, least, spreads = math.inf, 0.0, []
    for phase in phases:
        spread = _spread(phase.sample_rate, phase.noise_multiplier)
        fine = min(interval, max(0.1 * interval, 0.1 * spread))
        coarse = 0.05 * interval / phase.noise_multiplier**2
        wanted = min(wanted, max(fine, coarse))
        cut, narrowest = phase.cut_probability(), phase.noise_multiplier
        if cut > 0.0:
            narrowest *= 0.5
            filled = _spread(phase.sample_rate, narrowest)
            spread = math.sqrt((1.0 - cut) * spread**2 + cut * filled**2)
        least = max(least, (10.0 / narrowest + 0.5 / narrowest**2) / _MAX_POINTS_BUILT)
        spreads.append(math.sqrt(phase.steps) * spread)
    return max(wanted, least, 20.0 * math.hypot(*spreads) / _MAX_POINTS_COMPOSED)


def _spread(q: float, sigma: float) -> float:
    return min(1.0 / sigma, q * math.sqrt(math.expm1(min(sigma**-2, 600.0))))


@dataclass(frozen=True)
class _Part:
    """One step's loss distribution on the grid, as often as it is composed."""

    pmf: Any  # dense, dp_accounting.pld.pld_pmf.DensePLDPmf
    steps: int


def _composed(phases: Sequence[Phase], interval: float, pessimistic: bool) -> list[Any]:
    """Return the loss distributions of all phases together: of removing a record and, where it differs, of adding."""
    parts = [(_single_step(phase, interval, pessimistic), phase.steps) for phase in phases]
    if len(parts) == 1:
        ((directions, steps),) = parts
        return [_self_composed(pmf, steps) for pmf in directions]
    # A symmetric mechanism has one distribution for both directions.
    different = max(len(directions) for directions, _ in parts)
    return [
        _convolved([_Part(_dense(directions[min(i, len(directions) - 1)]), steps) for directions, steps in parts])
        for i in range(different)
    ]


@functools.lru_cache(maxsize=8)
def _single_step(phase: Phase, interval: float, pessimistic: bool) -> tuple[Any, ...]:
    """Return one step's loss distributions: of removing a record and, unless that is the same, of adding one."""
    plain = _subsampled_gaussian(phase.sample_rate, phase.noise_multiplier, interval, pessimistic)
    cut = phase.cut_probability()
    if cut == 0.0:
        return plain
    filled = _subsampled_gaussian(phase.sample_rate, 0.5 * phase.noise_multiplier, interval, pessimistic)
    return tuple(worse.compute_mixture(usual, cut) for worse, usual in zip(filled, plain))


@functools.lru_cache(maxsize=8)
def _subsampled_gaussian(q: float, sigma: float, interval: float, pessimistic: bool) -> tuple[Any, ...]:
    from dp_accounting.pld import privacy_loss_distribution

    made = privacy_loss_distribution.from_gaussian_mechanism(
        sigma,
        sampling_prob=q,
        value_discretization_interval=interval,
        pessimistic_estimate=pessimistic,
        use_connect_dots=pessimistic,
    )
    return (made._pmf_remove,) if made._symmetric else (made._pmf_remove, made._pmf_add)


def _dense(pmf: Any) -> Any:
    return pmf.to_dense_pmf()


def _self_composed(pmf: Any, steps: int) -> Any:
    """Return the distribution composed ``steps`` times, without the tails' last ``TRUNCATED_MASS``.

    A sparse one raises its size to the power of ``steps``, which takes minutes for millions. The Chernoff bounds
    that truncate the result try orders ``1/n`` to ``20/n`` on n points; with n at least the deviation of the
    result, in grid cells, they are tight, so zeros are appended.
    """
    import numpy as np
    from dp_accounting.pld.pld_pmf import DensePLDPmf

    if steps == 1:
        return pmf.self_compose(1, tail_mass_truncation=TRUNCATED_MASS)
    dense = _dense(pmf)
    zeros = np.zeros(max(0, math.ceil(math.sqrt(steps) * _deviation(dense._probs)) - dense.size))
    padded = DensePLDPmf(
        dense._discretization,
        dense._lower_loss,
        np.append(dense._probs, zeros),
        dense._infinity_mass,
        dense._pessimistic_estimate,
    )
    return padded.self_compose(steps, tail_mass_truncation=TRUNCATED_MASS)


def _convolved(parts: Sequence[_Part]) -> Any:
    """Return the distribution of the sum of unlike steps' losses, all on one grid.

    One inverse Fourier transform of the product of powers. What lies outside the window, at most
    ``TRUNCATED_MASS``, counts as infinite loss, and once more where the transform wraps it round.
    """
    import numpy as np
    from dp_accounting.pld.pld_pmf import DensePLDPmf
    from scipy import fft

    low, high = _window(parts)
    longest = max(part.pmf.size for part in parts)
    length = fft.next_fast_len(max(high - low + 1, longest), real=True)
    transform = np.ones(length // 2 + 1, dtype=np.complex128)
    for part in parts:
        transform *= fft.rfft(part.pmf._probs, length) ** part.steps
    probs = np.roll(fft.irfft(transform, length), -low)[: high - low + 1]
    finite = sum(part.steps * math.log1p(-part.pmf._infinity_mass) for part in parts)
    first = parts[0].pmf
    return DensePLDPmf(
        first._discretization,
        sum(part.steps * part.pmf._lower_loss for part in parts) + low,
        probs,
        TRUNCATED_MASS - math.expm1(finite),
        first._pessimistic_estimate,
    )


def _window(parts: Sequence[_Part]) -> tuple[int, int]:
    """Return the first and last cell between which all but ``TRUNCATED_MASS`` of the sum lies (Chernoff's bound).

    For a Gaussian of deviation D the best order is ``sqrt(2 log(2 / mass)) / D``; orders around it serve skewed sums.
    """
    import numpy as np
    from scipy.special import logsumexp

    allowed = math.log(2.0 / TRUNCATED_MASS)
    deviation = max(math.hypot(*(math.sqrt(part.steps) * _deviation(part.pmf._probs) for part in parts)), 1.0)
    low, high = 0, sum(part.steps * (part.pmf.size - 1) for part in parts)
    for order in np.geomspace(0.05, 4.0, 20) * math.sqrt(2.0 * allowed) / deviation:
        above = below = allowed
        for part in parts:
            cells = np.arange(part.pmf.size)
            above += part.steps * logsumexp(cells * order, b=part.pmf._probs)
            below += part.steps * logsumexp(cells * -order, b=part.pmf._probs)
        high = min(high, math.ceil(above / order))
        low = max(low, math.floor(-below / order))
    return low, max(low, high)


def _deviation(probs: "np.ndarray[Any, Any]") -> float:
    """Return the standard deviation in cells."""
    import numpy as np

    cells = np.arange(len(probs))
    mean = probs @ cells
    return math.sqrt(probs @ (cells - mean) ** 2)
