# SPDX-License-Identifier: Apache-2.0
"""Planted bugs: figures that are too small for what was released."""

import math
from dataclasses import replace
from typing import Any

from wavedp.privacy import accounting, pld, spec, strict
from wavedp.privacy.optimizer import PrivateOptimizer
from wavedp.privacy.phases import Phase
from wavedp.privacy.spec import PrivacySpec
from wavedp.selftest.exact import gaussian_epsilon
from wavedp.selftest.planting import Planted, Registry

registry = Registry("accounting")
bug = registry.bug


def training_phase(planted: Planted, change: Any) -> None:
    """Let ``change(phase)`` be what a run's steps are charged as."""

    def phases(original: Any, self: PrivacySpec, *arguments: Any) -> tuple[Phase, ...]:
        planted.mark()
        first, *others = original(self, *arguments)
        return (change(first), *others)

    planted.replace(PrivacySpec, "phases", phases)


@bug("Opacus' GDP accountant; jax_privacy's epsilon_from_gdp")
def central_limit_accountant(planted: Planted) -> None:
    """Epsilon is that of a Gaussian by the central limit theorem, which is no bound."""

    def epsilon(original: Any, phases: tuple[Phase, ...], delta: float) -> float:
        planted.mark()
        if any(phase.noise_multiplier == 0.0 for phase in phases):
            return math.inf
        mean = sum(phase.sample_rate**2 * phase.steps * math.expm1(1.0 / phase.noise_multiplier**2) for phase in phases)
        return gaussian_epsilon(math.sqrt(mean), delta)

    planted.replace(pld, "checked_epsilon", epsilon)


@bug("own")
def optimistic_rounding(planted: Planted) -> None:
    """Privacy losses are rounded down."""

    def composed(original: Any, phases: Any, interval: float, pessimistic: bool) -> Any:
        planted.mark()
        return original(phases, interval, False)

    planted.replace(pld, "_composed", composed)


@bug("own")
def epochs_charged_as_steps(planted: Planted) -> None:
    """Epochs are charged in place of steps."""
    training_phase(planted, lambda phase: replace(phase, steps=math.ceil(phase.steps * phase.sample_rate)))


@bug("known class")
def composition_without_last_step(planted: Planted) -> None:
    """One step of the run is not in the composition."""
    training_phase(planted, lambda phase: replace(phase, steps=max(0, phase.steps - 1)))


@bug("own")
def amplified_twice(planted: Planted) -> None:
    """Amplification by sampling is counted twice."""
    training_phase(planted, lambda phase: replace(phase, sample_rate=phase.sample_rate**2))


@bug("TF-Privacy #620")
def sensitivity_halved(planted: Planted) -> None:
    """The noise is accounted for half the sensitivity that a record has."""
    training_phase(planted, lambda phase: replace(phase, noise_multiplier=2.0 * phase.noise_multiplier))


@bug("own")
def truncation_free(planted: Planted) -> None:
    """Truncated batches, where a record pushes another one out, are charged as if nothing was cut."""
    training_phase(planted, lambda phase: replace(phase, truncated_batch_size=None, dataset_size_bound=None))


@bug("diffprivlib #104")
def label_counts_free(planted: Planted) -> None:
    """The label histogram shares the budget of the steps and is not charged."""

    def phases(original: Any, self: PrivacySpec) -> tuple[Phase, ...]:
        planted.mark()
        return ()

    planted.replace(PrivacySpec, "_label_phases", phases)


@bug("own")
def another_delta(planted: Planted) -> None:
    """Epsilon is stated for one delta and computed at another, ten times larger."""

    def composed(original: Any, phases: Any, delta: float) -> float:
        planted.mark()
        return float(original(phases, min(10.0 * delta, 0.5)))

    planted.replace(accounting, "composed_epsilon", composed)


@bug("own")
def calibrated_above_target(planted: Planted) -> None:
    """The noise found for a target epsilon misses it by some percent."""

    def found(original: Any, **arguments: Any) -> float:
        planted.mark()
        return 0.97 * float(original(**arguments))

    planted.replace(accounting, "noise_multiplier_for", found)


@bug("own")
def strict_law_free(planted: Planted) -> None:
    """What strict noise differs from a Gaussian is not charged."""

    def law(original: Any, **arguments: Any) -> float:
        planted.mark()
        return 0.0

    planted.replace(strict, "law_epsilon", law)


@bug("class of SmartNoise #621, #624")
def odometer_since_resume(planted: Planted) -> None:
    """What is reported as spent leaves out what was spent before the run was resumed."""

    def spent(original: Any, self: PrivateOptimizer) -> Any:
        planted.mark()
        found = original(self)
        private = found["epsilon_charged"] is not None
        return {**found, "epsilon_charged": self._spec.epsilon(steps=self._started) if private else None}

    planted.replace(PrivateOptimizer, "privacy_spent", spent)


@bug("own")
def delta_above_one_record(planted: Planted) -> None:
    """A delta is accepted at which a mechanism passes that publishes a record."""

    def check(original: Any, name: str, value: Any, **bounds: Any) -> Any:
        found = original(name, value, **bounds)
        if name != "delta":
            return found
        planted.mark()
        return _Negligible(found)

    planted.replace(spec, "check_real", check)


class _Negligible(float):
    """A delta that is small beside whatever it is compared with."""

    def __mul__(self, other: Any) -> float:
        return 0.0


@bug("own")
def no_noise_no_refusal(planted: Planted) -> None:
    """A run without noise reports an epsilon."""

    def epsilon(original: Any, self: PrivacySpec, **options: Any) -> float:
        if self.noise_multiplier > 0.0:
            return float(original(self, **options))
        planted.mark()
        return 1.0

    planted.replace(PrivacySpec, "epsilon", epsilon)
