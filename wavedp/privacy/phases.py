# SPDX-License-Identifier: Apache-2.0
"""What is accounted: a run as phases, each so many releases of one Poisson-subsampled Gaussian mechanism."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from wavedp.errors import InvalidTypeError, InvalidValueError
from wavedp.privacy.validation import check_integer, check_real

if TYPE_CHECKING:
    from dp_accounting import DpEvent

MIN_NOISE_MULTIPLIER = 0.05
MAX_NOISE_MULTIPLIER = 1e6
MIN_SAMPLE_RATE = 1e-12
MAX_STEPS = 10**8
TRUNCATED_MASS = 1e-15
_SMALLEST_DELTA_IN_UNCERTAIN_MASSES = 10


@dataclass(frozen=True)
class Phase:
    """``steps`` releases of a sum over a random batch, with Gaussian noise, under add-or-remove-one.

    Training is one phase; a histogram of labels, which reads every record once, is another with ``sample_rate=1``.
    All fields are public constants, none computed from the number of private records.

    Args:
        noise_multiplier: noise standard deviation over sensitivity, in [0, 1e6]; 0 is not private.
        sample_rate: probability in [1e-12, 1] of each record, alone, to join a batch (Poisson sampling).
        steps: number of releases, each with a fresh batch and fresh noise; at most 1e8.
        truncated_batch_size: a batch that comes out larger is cut to this size by a uniformly random choice
            (truncated Poisson sampling). Needs ``dataset_size_bound``.
        dataset_size_bound: an upper bound on the number of records, which limits how often that happens.

    Raises:
        TypeError, ValueError: a field of a wrong type or out of range, or one of the last two without the other.
    """

    noise_multiplier: float
    sample_rate: float = 1.0
    steps: int = 1
    truncated_batch_size: int | None = None
    dataset_size_bound: int | None = None

    def __post_init__(self) -> None:
        checked = {
            "noise_multiplier": check_real(
                "noise_multiplier", self.noise_multiplier, at_least=0.0, at_most=MAX_NOISE_MULTIPLIER
            ),
            "sample_rate": check_real("sample_rate", self.sample_rate, at_least=MIN_SAMPLE_RATE, at_most=1.0),
            "steps": check_integer("steps", self.steps, at_most=MAX_STEPS),
        }
        if (self.truncated_batch_size is None) != (self.dataset_size_bound is None):
            raise InvalidValueError(
                "truncated_batch_size and dataset_size_bound come together: how often a batch is cut depends on both"
            )
        if self.truncated_batch_size is not None:
            for name in ("truncated_batch_size", "dataset_size_bound"):
                checked[name] = check_integer(name, getattr(self, name), at_least=1)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def event(self) -> "DpEvent":
        """Return the phase in dp-accounting's terms.

        For a truncated phase the event stands for a data set of exactly ``dataset_size_bound`` records; what is
        accounted here holds for every smaller one too, see :meth:`cut_probability`.
        """
        import dp_accounting

        if self.truncated_batch_size is None:
            gaussian = dp_accounting.GaussianDpEvent(self.noise_multiplier)
            once: DpEvent = dp_accounting.PoissonSampledDpEvent(self.sample_rate, gaussian)
        else:
            once = dp_accounting.TruncatedSubsampledGaussianDpEvent(
                dataset_size=self.dataset_size_bound,
                sampling_probability=self.sample_rate,
                truncated_batch_size=self.truncated_batch_size,
                noise_multiplier=self.noise_multiplier,
            )
        return dp_accounting.SelfComposedDpEvent(once, self.steps)

    def too_little_noise(self) -> bool:
        """Whether epsilon is reported as infinite, as it is below 0.05, and below 0.1 where batches are cut."""
        return self.noise_multiplier < least_noise_multiplier(self)

    def cut_probability(self) -> float:
        """Return an upper bound on the probability that the other records alone fill a batch; 0 if none is cut.

        Where they do, a record that joins pushes another one out: the sum moves by up to 2 instead of 1, with
        probability at most ``sample_rate``. With probability tau, this one, a step is therefore no worse than a
        subsampled Gaussian of half the noise multiplier, and else an ordinary one (joint convexity; see
        arXiv 2508.15089). tau grows with the number of records and the first is the worse of the two, so tau of the
        bound serves all smaller data sets. The conditional sampling rate of a data set of exactly that size, which is
        smaller, would not: a smaller data set has a larger one.
        """
        if self.truncated_batch_size is None or self.dataset_size_bound is None:
            return 0.0
        return _binomial_tail(self.truncated_batch_size, self.dataset_size_bound - 1, self.sample_rate)


def least_noise_multiplier(phase: Phase) -> float:
    """Return the noise multiplier below which ``phase``, whatever its own, counts as not private."""
    return MIN_NOISE_MULTIPLIER * (2.0 if phase.cut_probability() > 0.0 else 1.0)


@functools.lru_cache(maxsize=256)
def _binomial_tail(at_least: int, trials: int, probability: float) -> float:
    """P(Binomial >= at_least), rounded up by more than scipy's relative error."""
    from scipy.stats import binom

    return min(1.0, float(binom.sf(at_least - 1, trials, probability)) * (1.0 + 1e-9))


def merged(phases: Iterable[Phase]) -> tuple[Phase, ...]:
    """Return phases that cost the same: none without steps, one per mechanism, in an order that depends on them alone.

    Raises:
        TypeError: not a :class:`Phase` among them.
    """
    if isinstance(phases, Phase):
        raise InvalidTypeError("phases must be a list of Phase objects, got one: put it into a list")
    steps: dict[Phase, int] = {}
    for phase in phases:
        if not isinstance(phase, Phase):
            raise InvalidTypeError(f"phases must be Phase objects, got {type(phase).__name__}: {phase!r}")
        mechanism = replace(phase, steps=1)
        if phase.cut_probability() == 0.0:
            mechanism = Phase(phase.noise_multiplier, phase.sample_rate)
        steps[mechanism] = steps.get(mechanism, 0) + phase.steps
    return tuple(
        replace(mechanism, steps=steps[mechanism])
        for mechanism in sorted(steps, key=lambda m: (m.noise_multiplier, m.sample_rate, m.cut_probability()))
        if steps[mechanism]
    )


def total_steps(phases: Iterable[Phase]) -> int:
    return sum(phase.steps for phase in phases)


def uncertain_mass(steps: int, mechanisms: int = 1) -> float:
    """Return a bound on the error of a composed tail.

    1e-15 is truncated and may wrap round. The convolution, a product of powers of Fourier transforms with ``steps``
    factors in all, was measured against extended precision: off by up to 1e-16 per step for one mechanism, 1.8e-16
    for several unlike ones. Twice that is set aside.
    """
    return 2.0 * TRUNCATED_MASS + (2e-16 if mechanisms == 1 else 4e-16) * steps


def smallest_delta(steps: int) -> float:
    """Return the smallest delta for which ``steps`` releases in all are accounted: below it no figure is reliable.

    It is 10 times the mass that the composition of one mechanism leaves uncertain: ``2e-14 + 2e-15 steps``.
    """
    return _SMALLEST_DELTA_IN_UNCERTAIN_MASSES * uncertain_mass(steps)


def check_delta(delta: object, steps: int) -> float:
    """Return ``delta`` as a float below 1 that can be accounted for ``steps`` releases; raises like ``check_real``."""
    number = check_real("delta", delta, above=0.0, below=1.0)
    if number < smallest_delta(steps):
        raise InvalidValueError(
            f"delta={number} is too small to be accounted for {steps} steps: the smallest that works is "
            f"{smallest_delta(steps):.2g}"
        )
    return number
