# SPDX-License-Identifier: Apache-2.0
"""Epsilon of the Poisson-subsampled Gaussian mechanism under add-or-remove-one, alone or composed, and its inverses.

The figure is a pessimistic privacy-loss distribution (PLD; Koskela et al. 2020; Doroshenko et al. 2022) by
``dp-accounting``, so an upper bound. An optimistic PLD bounds it from below, and Renyi accounting, which
shares no code with either, checks it: an upper bound that exceeds the Renyi one means a defect somewhere,
and raises. The central-limit ("GDP") accountant understates epsilon and is not offered.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from wavedp.errors import InvalidValueError, StateError
from wavedp.extras import import_extra
from wavedp.privacy import pld
from wavedp.privacy.calibration import noise_multiplier_for, steps_for
from wavedp.privacy.phases import Phase, check_delta, merged, smallest_delta, total_steps
from wavedp.privacy.renyi import rdp_epsilon
from wavedp.privacy.validation import check_integer, check_real

if TYPE_CHECKING:
    from dp_accounting import DpEvent

__all__ = [
    "Phase",
    "composed_epsilon",
    "composed_epsilon_bounds",
    "composed_epsilon_prv",
    "composed_epsilon_rdp",
    "composed_event",
    "epsilon",
    "epsilon_bounds",
    "epsilon_prv",
    "epsilon_rdp",
    "epsilon_table",
    "gaussian_event",
    "noise_multiplier_for",
    "smallest_delta",
    "steps_for",
]


def gaussian_event(sample_rate: float, noise_multiplier: float, steps: int) -> "DpEvent":
    """Return the mechanism as dp-accounting sees it: ``steps`` compositions of a Poisson-sampled Gaussian."""
    return Phase(noise_multiplier, sample_rate, steps).event()


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
    return composed_epsilon([Phase(noise_multiplier, sample_rate, steps)], delta)


def epsilon_bounds(*, sample_rate: float, noise_multiplier: float, steps: int, delta: float) -> tuple[float, float]:
    """Return a lower and an upper bound on the mechanism's epsilon; arguments and errors of :func:`epsilon`.

    The lower bound's error grows with steps times grid, so its grid is refined down to 1e-5 as steps grow;
    beyond some thousands of steps it stays valid and becomes loose. The upper bound is taken at delta less
    what truncation and rounding can amount to, ``2e-15 + 2e-16 steps``, and the lower one at delta plus that.
    """
    return composed_epsilon_bounds([Phase(noise_multiplier, sample_rate, steps)], delta)


def epsilon_rdp(*, sample_rate: float, noise_multiplier: float, steps: int, delta: float) -> float:
    """Return the Renyi upper bound on epsilon (dp-accounting, default orders); see :func:`epsilon`."""
    return composed_epsilon_rdp([Phase(noise_multiplier, sample_rate, steps)], delta)


def epsilon_prv(
    *, sample_rate: float, noise_multiplier: float, steps: int, delta: float, eps_error: float = 0.01
) -> float:
    """Return epsilon by Opacus' PRV accountant, for comparison; see :func:`composed_epsilon_prv`."""
    return composed_epsilon_prv([Phase(noise_multiplier, sample_rate, steps)], delta, eps_error=eps_error)


def composed_epsilon(phases: Iterable[Phase], delta: float) -> float:
    """Return an upper bound on epsilon of all phases together, in any order; none gives 0.

    Pessimistic PLD, checked against the Renyi bound. The mechanisms are fixed in advance; steps may be left out,
    whatever earlier releases showed. Phases of one mechanism cost what one phase with all their steps costs. For one
    mechanism delta is reduced as in :func:`epsilon_bounds`, for several by ``2e-15 + 4e-16 steps``, all steps
    together. A noise multiplier below 0.05 (below 0.1 where batches are cut) gives infinity.

    Raises:
        TypeError, ValueError: not phases, or delta outside [``smallest_delta(all steps)``, 1).
        RuntimeError: the two accountants contradict each other.
    """
    return pld.checked_epsilon(*_question(phases, delta))


def composed_epsilon_bounds(phases: Iterable[Phase], delta: float) -> tuple[float, float]:
    """Return a lower and an upper bound on epsilon of all phases together; see :func:`composed_epsilon`.

    With truncated batches the lower bound is that of the same phases untruncated: the guarantee covers every data
    set up to ``dataset_size_bound``, also those so small that no batch is ever cut.
    """
    question, delta = _question(phases, delta)
    upper = pld.checked_epsilon(question, delta)
    if not question or not math.isfinite(upper):
        return upper, upper
    interval = pld.lower_interval(upper, total_steps(question))
    return min(pld.lower_epsilon(question, delta, interval), upper), upper


def composed_epsilon_rdp(phases: Iterable[Phase], delta: float) -> float:
    """Return the Renyi upper bound on epsilon of all phases together; see :func:`composed_epsilon`."""
    return rdp_epsilon(*_question(phases, delta))


def composed_epsilon_prv(phases: Iterable[Phase], delta: float, *, eps_error: float = 0.01) -> float:
    """Return epsilon of all phases by Opacus' PRV accountant (Gopi et al. 2021), for comparison only.

    It is that accountant's upper end, ``eps_error`` and what its ``delta_error`` of delta / 1000 amounts to above its
    estimate. Small noise multipliers with many steps take it up to a minute and gigabytes.

    Raises:
        ImportError: Opacus is not installed: ``pip install 'wavedp[account]'``.
        ValueError: truncated batches, which it does not know, a sample rate of 1 or a noise multiplier below 0.05.
        RuntimeError: it finds no epsilon, which happens near 0 and for the smallest deltas.
    """
    eps_error = check_real("eps_error", eps_error, above=0.0, at_most=1.0)
    question, delta = _question(phases, delta)
    for phase in question:
        if phase.cut_probability() > 0.0:
            raise InvalidValueError("the PRV accountant does not know truncated Poisson sampling")
        if phase.sample_rate == 1.0:
            raise InvalidValueError("the PRV accountant does not know releases from all records (sample_rate=1)")
        if phase.too_little_noise():
            raise InvalidValueError(f"noise_multiplier={phase.noise_multiplier} is too small for the PRV accountant")
    accountant = import_extra("opacus.accountants", "account").PRVAccountant()
    if not question:
        return 0.0
    accountant.history = [(phase.noise_multiplier, phase.sample_rate, phase.steps) for phase in question]
    try:
        return max(0.0, float(accountant.get_epsilon(delta, eps_error=eps_error)))
    except (ValueError, RuntimeError) as error:
        raise StateError(f"the PRV accountant finds no epsilon here: {error}") from error


def composed_event(phases: Iterable[Phase]) -> "DpEvent":
    """Return the phases as a dp-accounting event, for another accountant to compute.

    One phase gives its own event, several a ``ComposedDpEvent`` of theirs in the order given. See
    :meth:`Phase.event` for what a truncated one stands for.
    """
    import dp_accounting

    events = [phase.event() for phase in phases]
    return events[0] if len(events) == 1 else dp_accounting.ComposedDpEvent(events)


def epsilon_table(
    phase: Phase, delta: float, steps: Sequence[int], *, other_phases: Iterable[Phase] = ()
) -> list[dict[str, Any]]:
    """Return one row for each of ``steps``: what epsilon is once ``phase`` has run so far, after ``other_phases``.

    ``delta`` must allow the largest of ``steps``. A row has ``steps``, ``epsilon_lower_bound``, ``epsilon`` and
    ``epsilon_rdp``. Lower bounds are on the grid of the largest count, which is valid for all and built once.
    """
    others = tuple(other_phases)
    counts = [check_integer("steps", count) for count in steps]
    questions = [_question([replace(phase, steps=count), *others], delta) for count in counts]
    uppers = [pld.checked_epsilon(*question) for question in questions]
    rows = []
    if counts:
        at = max(range(len(counts)), key=counts.__getitem__)
        last, finite = questions[at][0], math.isfinite(uppers[at])
        interval = pld.lower_interval(uppers[at], max(total_steps(last), 1)) if finite else pld.COARSE_INTERVAL
        for count, question, upper in zip(counts, questions, uppers):
            lower = pld.lower_epsilon(*question, interval) if question[0] and math.isfinite(upper) else upper
            rows.append(
                {
                    "steps": count,
                    "epsilon_lower_bound": min(lower, upper),
                    "epsilon": upper,
                    "epsilon_rdp": rdp_epsilon(*question),
                }
            )
    return rows


def _question(phases: Iterable[Phase], delta: float) -> tuple[tuple[Phase, ...], float]:
    """Return what the accountants are asked: merged phases and a delta that can be accounted for them."""
    question = merged(phases)
    return question, check_delta(delta, total_steps(question))
