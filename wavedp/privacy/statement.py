# SPDX-License-Identifier: Apache-2.0
"""The privacy statement of a run: what is guaranteed, by which mechanism, under which assumptions."""

import json
import math
import platform
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata

from wavedp.errors import StateError
from wavedp.privacy import strict
from wavedp.privacy.ledger import PrivacyLedger
from wavedp.privacy.noise import GRID_BITS, MAX_DEVIATION, grid_step
from wavedp.privacy.optimizer import PrivateOptimizer
from wavedp.privacy.spec import PrivacySpec

ASSUMPTIONS = (
    "sample_rate, expected_batch_size, dataset_size_bound and all other settings are public constants, not "
    "computed from the private data.",
    "Each record (with all its captions and copies) appears once in the data set; a person with k records is "
    "protected by the weaker guarantee for groups of k.",
    "Each loss depends on its own record and on the model alone, through its values too: detached in-batch "
    "negatives, attention over the wrong axis and denominators shared by the batch leave no gradient to see. "
    "check_records_independent on made-up records finds them.",
    "The optimizer held no state from private data when the run began, except from private steps of this run, and "
    "learning rates and other settings were not changed by losses or anything else computed from private data.",
    "That an attempt broke off, was resumed, or went back to a checkpoint did not depend on what its records were.",
    "Batches were made of the records whose indices were given, and of nothing else.",
    "Everything else that the published model is made of (tokenizer, pre-trained weights, "
    "super-resolution) was made from public data only.",
    "Only the parameters after each step, and what else is listed as charged, are released. Losses, gradient "
    "norms, validation scores, timings, batch sizes and the number of records are computed from private data without "
    "protection and are not covered.",
    "Settings were not tuned on the private data, or the runs that tuned them are charged separately.",
    "Randomness comes from the operating system's generator; the machine, its memory and its timing are trusted.",
    "What the model or its loss draws, such as dropout, comes from a generator whose seed nobody knows.",
)
"""What the guarantee rests on beyond what the code enforces."""

PUBLIC_LABELS = (
    "Labels and prompts used for sampling from the model are public or balanced, not counted from the private data."
)
COUNTED_LABELS = (
    "Labels used for sampling from the model are public, balanced, or drawn from the charged histogram; prompts are "
    "public. Nothing else about labels was counted from the private data."
)

JOINT_RUNS = (
    "The settings of every run in the ledger were fixed without looking at what earlier runs released: the ledger "
    "composes their mechanisms as one."
)

_TITLES = {
    "epsilon": "epsilon (upper bound)",
    "epsilon_lower": "epsilon (lower bound)",
    "epsilon_rdp": "epsilon (RDP cross-check)",
    "epsilon_charged": "epsilon of charged steps",
    "ledger_epsilon": "epsilon of the whole ledger",
    "ledger_delta": "delta of the whole ledger",
    "ledger_runs": "runs in the ledger",
    "clipping": "clipping rule",
    "extra_charge": "released beside the sum",
    "neighboring_relation": "neighbouring relation",
    "steps_charged": "attempts charged",
    "spec_fingerprint": "specification SHA-256",
}


@dataclass(frozen=True, kw_only=True)
class PrivacyStatement:
    """A run's guarantee. Build it with :meth:`from_run`, which refuses runs that have none.

    ``epsilon`` is the upper bound for all planned steps and releases: it holds for a run that stopped early, for
    whatever reason. ``epsilon_charged`` counts the charged steps in place of the planned ones, and holds if the
    decision to stop did not depend on the private data. ``charged`` lists what epsilon consists of. ``extra_charge``
    says what a step releases beyond the sum, which epsilon covers as well; ``sensitivity`` and ``noise_stddev`` are
    those of the first step. ``ledger_epsilon`` and ``ledger_delta`` are the guarantee of all ``ledger_runs`` runs that
    the ledger records, this one among them, taken together; ``None`` without a ledger.
    """

    mechanism: str
    unit: str
    neighboring_relation: str
    epsilon: float
    epsilon_lower: float
    epsilon_rdp: float
    epsilon_charged: float
    delta: float
    accountant: str
    sampler: str
    sample_rate: float
    steps_planned: int
    steps_charged: int
    noise_multiplier: float
    max_grad_norm: float
    clipping: str
    extra_charge: str | None
    sensitivity: float
    noise_stddev: float
    expected_batch_size: float
    noise_mode: str
    dataset_size_bound: int
    ledger_head: str | None
    ledger_runs: int | None
    ledger_epsilon: float | None
    ledger_delta: float | None
    spec_fingerprint: str
    charged: tuple[str, ...]
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...]
    versions: dict[str, str]

    @classmethod
    def from_run(cls, private: PrivateOptimizer, *, assumptions: Sequence[str] = ()) -> "PrivacyStatement":
        """State the guarantee of the run that ``private`` drove.

        Args:
            private: the optimizer, built with ``sampler=``, between two steps.
            assumptions: sentences to add to :data:`ASSUMPTIONS`.

        Raises:
            RuntimeError: noise or sampling came from a seed, there is no noise, a batch is pending, nothing
                was charged, there was no sampler, batches were left out, or the model was written to from
                outside of private steps.
        """
        _refuse_unfit(private)
        spec = private.spec
        lower, upper = spec.epsilon_bounds()
        spent = private.privacy_spent()["epsilon_charged"]
        if not math.isfinite(upper) or spent is None:
            raise StateError(f"epsilon is {upper}: this run has no privacy guarantee to state")
        ledger = private.ledger
        ledger_epsilon, ledger_delta = (None, None) if ledger is None else ledger.spent()
        return cls(
            mechanism="DP-SGD: sum of clipped per-record gradients of a Poisson sample, plus noise",
            unit=spec.unit,
            neighboring_relation=spec.neighboring_relation,
            epsilon=upper,
            epsilon_lower=lower,
            epsilon_rdp=spec.epsilon_rdp(),
            epsilon_charged=float(spent),
            delta=spec.delta,
            accountant=f"pessimistic PLD, dp-accounting {metadata.version('dp-accounting')}",
            sampler=_sampler(spec),
            sample_rate=spec.sample_rate,
            steps_planned=spec.steps,
            steps_charged=private.steps_charged,
            noise_multiplier=spec.noise_multiplier,
            max_grad_norm=spec.max_grad_norm,
            clipping=spec.clipping.describe(),
            extra_charge=spec.clipping.extra_charge(spec.noise_multiplier),
            sensitivity=spec.sensitivity,
            noise_stddev=spec.noise_stddev,
            expected_batch_size=spec.expected_batch_size,
            noise_mode=_noise_mode(spec),
            dataset_size_bound=spec.dataset_size_bound,
            ledger_head=None if ledger is None else ledger.head,
            ledger_runs=None if ledger is None else len(ledger.runs),
            ledger_epsilon=ledger_epsilon,
            ledger_delta=ledger_delta,
            spec_fingerprint=spec.fingerprint(),
            charged=(*charged_by(spec), *_shared_budget(ledger)),
            assumptions=(
                *ASSUMPTIONS,
                COUNTED_LABELS if spec.releases else PUBLIC_LABELS,
                *(
                    [JOINT_RUNS]
                    if ledger is not None and ledger.budget and ledger.budget.composition == "joint"
                    else []
                ),
                *assumptions,
            ),
            warnings=_warnings(private),
            versions=_versions(),
        )

    def to_json(self) -> str:
        """Return the statement as indented JSON."""
        return json.dumps(asdict(self), indent=2)

    def to_text(self) -> str:
        """Return the statement for people to read: one aligned line per field, then the sentences."""
        width = max(len(title) for title in _TITLES.values())
        lines = ["Privacy statement", ""]
        for name, value in asdict(self).items():
            if isinstance(value, tuple):
                continue
            if isinstance(value, dict):
                value = ", ".join(f"{key} {version}" for key, version in value.items())
            shown = f"{value:.6g}" if isinstance(value, float) else "none" if value is None else str(value)
            lines.append(f"{_TITLES.get(name, name.replace('_', ' ')):<{width}}  {shown}")
        sections = {"Charged": self.charged, "Assumptions": self.assumptions, "Warnings": self.warnings}
        for title, sentences in sections.items():
            lines += ["", title]
            lines += [
                textwrap.fill(sentence, width=100, initial_indent="  - ", subsequent_indent="    ")
                for sentence in sentences or ("none",)
            ]
        return "\n".join(lines) + "\n"


def _refuse_unfit(private: PrivateOptimizer) -> None:
    spec = private.spec
    if private.insecure:
        raise StateError("insecure_seed was used: noise or batches can be reproduced, so there is no guarantee")
    if spec.noise_multiplier == 0.0:
        raise StateError("not private: noise_multiplier is 0")
    if private.pending:
        raise StateError("a batch is pending: call step() or discard() before asking for the statement")
    if private.steps_charged == 0:
        raise StateError("no step was charged: there is no private training to make a statement about")
    private.check_regular()


def charged_by(spec: PrivacySpec) -> tuple[str, ...]:
    """Return one sentence, with its parameters, for everything that epsilon consists of."""
    batches = f"Poisson samples at rate {spec.sample_rate:.6g}"
    if spec.truncated_batch_size is not None:
        batches += (
            f", cut to {spec.truncated_batch_size} records (accounted for every data set of at most "
            f"{spec.dataset_size_bound})"
        )
    found = [
        f"{spec.steps} steps: sums of clipped gradients of {batches}; Gaussian noise of multiplier "
        f"{spec.noise_multiplier:.6g}, sensitivity {spec.sensitivity:.6g}."
    ]
    extra = spec.clipping.extra_charge(spec.noise_multiplier)
    if extra is not None:
        found.append(f"Within those steps: {extra}.")
    if spec.label_noise_multiplier is not None:
        found.append(
            f"1 label histogram: the number of records of each class; Gaussian noise of multiplier "
            f"{spec.label_noise_multiplier:.6g}, sensitivity 1. Charged whether or not it was drawn."
        )
    if spec.noise_mode == "strict":
        rounding = spec.sensitivity / spec.clipping.sensitivity() - 1.0
        found.append(
            f"Strict noise on {spec.trainable_parameters} parameters: rounding to integers, {100 * rounding:.3g} % of "
            f"the sensitivity above; the law of the noise, 2 * {spec.law_epsilon():.3g} of epsilon and "
            f"{1.0 - strict.MECHANISM_SHARE:.2g} of delta."
        )
    return tuple(found)


def _shared_budget(ledger: PrivacyLedger | None) -> tuple[str, ...]:
    """What all runs of a shared ledger cost, each with all its planned steps and releases."""
    if ledger is None or ledger.budget is None:
        return ()
    budget, (epsilon, delta) = ledger.budget, ledger.spent()
    how = "added up" if budget.composition == "adaptive" else "composed as one"
    return (
        f"With all {len(ledger.runs)} runs that the ledger records, {how}: epsilon {epsilon:.6g} of "
        f"{budget.epsilon:.6g} at delta {delta:.6g} of {budget.delta:.6g}.",
    )


def _sampler(spec: PrivacySpec) -> str:
    sampler = "Poisson: each record independently at every step, by 64-bit words of system entropy"
    if spec.truncated_batch_size is None:
        return sampler
    return f"truncated {sampler}; of more than {spec.truncated_batch_size}, a uniformly random choice"


def _noise_mode(spec: PrivacySpec) -> str:
    grid = spec.grid_of(spec.noise_stddev)
    if grid is not None:
        return (
            f"strict: ChaCha20 keyed by the operating system, integers in units of {grid:.6g} made from float64 "
            f"normals; their rounding and law are charged"
        )
    return (
        f"standard: ChaCha20 keyed by the operating system, Box-Muller with a 64-bit radius (tail to "
        f"{MAX_DEVIATION:.2f} sigma), noisy sum rounded to multiples of {grid_step(spec.noise_stddev):.6g} "
        f"(2^-{GRID_BITS} sigma and below); a hardening against floating-point attacks, not a proof"
    )


def _warnings(private: PrivateOptimizer) -> tuple[str, ...]:
    found = []
    if private.ledger is None:
        found.append("No ledger was used: if an earlier attempt of this run was lost, it is not charged here.")
    elif not set(private.spec.releases) <= set(private.ledger.released):
        found.append(
            f"The ledger records no release of {', '.join(private.spec.releases)}: what was released without it is "
            f"charged once here, however often it was."
        )
    if private.steps_charged < private.spec.steps:
        found.append(
            f"The run stopped after {private.steps_charged} of {private.spec.steps} steps; epsilon is for all of them."
        )
    return tuple(found)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("wavedp", "torch", "numpy", "dp-accounting"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"  # wavedp in a bare checkout
    return versions
