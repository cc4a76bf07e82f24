# SPDX-License-Identifier: Apache-2.0
"""A whole audit: plan, runs on canaries, three bounds of one confidence together, and the verdict beside the claim."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from torch import nn

from wavedp.audit.bounds import Bound, check_confidence, guessing_bound, noise_bound, one_run_bound
from wavedp.audit.mechanism import CanaryScores, auditable, check_count, score_canaries
from wavedp.audit.plan import GuessingPlan, plan_guesses
from wavedp.errors import InvalidValueError
from wavedp.privacy import PrivacySpec
from wavedp.privacy.validation import check_integer

_ASSUMES = {
    "z-test": "noise is normal, records join independently; how much and how often is measured",
    "guesses": "the scores of canaries are independent of each other",
    "one run": "nothing but the coins that decide which canaries are records",
}
DATA = "The canaries are made up: the run's data were not opened, and nothing was charged to its ledger."


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """What an audit found.

    ``bounds`` hold together with the probability ``confidence``, each with its own. ``claimed`` is the upper bound of
    the mechanism that was run, ``steps`` steps of it; ``claimed_by_run`` that of the run's statement, if there is one.
    """

    bounds: tuple[Bound, ...]
    confidence: float
    delta: float
    claimed: float
    claimed_at_least: float  # the lower end of what the accountant knows of the same mechanism
    claimed_by_run: float | None
    steps: int
    steps_of_run: int
    sample_rate: float
    noise_multiplier: float
    canaries: int
    repeats: int
    seconds: float

    @property
    def epsilon(self) -> float:
        """The largest of the lower bounds."""
        return max(bound.epsilon for bound in self.bounds)

    @property
    def violation(self) -> bool:
        """Whether a lower bound is above what is claimed."""
        claims = [self.claimed, *([] if self.claimed_by_run is None else [self.claimed_by_run])]
        return self.epsilon > min(claims)

    def to_json(self) -> str:
        """Return everything as indented JSON; an infinite number is ``null``."""
        values = {**asdict(self), "epsilon_at_least": self.epsilon, "violation": self.violation, "data": DATA}
        return json.dumps(_finite(values), indent=2, allow_nan=False)

    def to_text(self) -> str:
        """Return the table for people to read."""
        runs = f"{self.repeats} run" + ("s" if self.repeats > 1 else "")
        lines = [
            f"Audit of {self.steps} of the run's {self.steps_of_run} steps: {runs} of {self.canaries} canaries, "
            f"{self.seconds:.0f} s",
            DATA,
            "",
            f"sample rate {self.sample_rate:.6g}, noise multiplier {self.noise_multiplier:.6g}, delta {self.delta:g}",
            "",
            f"{'':10} {'epsilon >=':>10} {'of claim':>9} {'confidence':>11}   assumes",
        ]
        for bound in self.bounds:
            share = f"{100 * bound.epsilon / self.claimed:.0f} %" if self.claimed > 0 else "-"
            lines.append(
                f"{bound.method:10} {bound.epsilon:10.3f} {share:>9} {100 * bound.confidence:9.2f} %   "
                f"{_ASSUMES[bound.method]}"
            )
        lines.append(f"{'together':10} {self.epsilon:10.3f} {'':>9} {100 * self.confidence:9.2f} %")
        lines += ["", f"claimed for these steps: epsilon <= {self.claimed:.4f} (and >= {self.claimed_at_least:.4f})"]
        if self.claimed_by_run is not None:
            lines.append(f"claimed by the run:      epsilon <= {self.claimed_by_run:.4f}")
        for bound in self.bounds:
            lines.append(
                f"{bound.method}: " + ", ".join(f"{k.replace('_', ' ')} {_show(v)}" for k, v in bound.measured.items())
            )
        lines += ["", self.verdict()]
        return "\n".join(lines)

    def verdict(self) -> str:
        """Return in a sentence what the bounds say about the claim."""
        if self.violation:
            return (
                f"VIOLATION: epsilon is at least {self.epsilon:.4f}, more than claimed, unless a chance of at most "
                f"{100 * (1 - self.confidence):.2g} % came in; repeat with --confidence 0.9999 to exclude that"
            )
        return f"No violation: the audit shows at least {self.epsilon:.4f} and cannot show that there is no more."


def audit_mechanism(
    model: nn.Module,
    spec: PrivacySpec,
    *,
    canaries: int = 1000,
    repeats: int = 1,
    steps: int | None = None,
    confidence: float = 0.95,
    claimed_by_run: float | None = None,
    progress: Callable[[int], object] | None = None,
    insecure_seed: int | None = None,
) -> tuple[AuditReport, CanaryScores, GuessingPlan]:
    """Audit the training steps of ``spec`` on ``model``, whose parameters change.

    Args:
        canaries: in each run; about half of them are records.
        repeats: runs, each with new canaries and coins.
        steps: of each run; those of ``spec`` if ``None``. The claim is that of so many steps.
        confidence: of all bounds together; each takes a third of the error probability.
        progress: called with 1 after every step.
        insecure_seed: for tests: everything is reproducible.

    Raises:
        TypeError, ValueError: an argument out of range, or a mechanism or model that the audit does not know.
    """
    check_confidence(confidence)
    canaries = check_integer("canaries", canaries, at_least=10)
    repeats = check_integer("repeats", repeats, at_least=1)
    audited = auditable(spec, check_integer("steps", spec.steps if steps is None else steps, at_least=1))
    if audited.steps > spec.steps:
        raise InvalidValueError(f"{audited.steps} steps are more than the run's {spec.steps}")
    check_count(audited, canaries)
    since = time.monotonic()
    each = 1.0 - (1.0 - confidence) / 3.0
    plan = plan_guesses(audited, repeats * canaries, each)
    parts = []
    for number in range(repeats):
        seed = None if insecure_seed is None else insecure_seed + number
        parts.append(score_canaries(model, audited, canaries, progress=progress, insecure_seed=seed))
    found = CanaryScores.joined(parts)
    scores, members = found.scores, found.members
    unit = audited.noise_multiplier * math.sqrt(audited.steps)  # of thresholds, in scores
    bounds = (
        noise_bound(
            scores,
            found.participations,
            members,
            steps=audited.steps,
            delta=audited.delta,
            confidence=each,
            full_batches=audited.sample_rate == 1.0,
        ),
        guessing_bound(
            scores, members, side=plan.side, threshold=plan.threshold * unit, delta=audited.delta, confidence=each
        ),
        one_run_bound(scores, members, highest=plan.highest, lowest=plan.lowest, delta=audited.delta, confidence=each),
    )
    lower, upper = audited.epsilon_bounds()
    report = AuditReport(
        bounds=bounds,
        confidence=confidence,
        delta=audited.delta,
        claimed=upper,
        claimed_at_least=lower,
        claimed_by_run=claimed_by_run,
        steps=audited.steps,
        steps_of_run=spec.steps,
        sample_rate=audited.sample_rate,
        noise_multiplier=audited.noise_multiplier,
        canaries=canaries,
        repeats=repeats,
        seconds=time.monotonic() - since,
    )
    return report, found, plan


def _show(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
