# SPDX-License-Identifier: Apache-2.0
"""The one immutable object from which sampling, clipping, noise and accounting are all made."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from wavedp.errors import InvalidTypeError, InvalidValueError
from wavedp.privacy import accounting, strict
from wavedp.privacy.accounting import Phase
from wavedp.privacy.clipping import Clipping, check_max_grad_norm
from wavedp.privacy.clipping_rules import ClippingRule
from wavedp.privacy.sampling import membership_threshold
from wavedp.privacy.validation import check_integer, check_real

if TYPE_CHECKING:
    from dp_accounting import DpEvent

NEIGHBORING_RELATIONS = ("add_or_remove_one",)
NOISE_MODES = ("standard", "strict")
LABEL_HISTOGRAM = "label_histogram"

_LATER_FIELDS = frozenset({"noise_mode", "trainable_parameters", "truncated_batch_size", "label_noise_multiplier"})
"""Written only where they are not at their defaults: ledgers, checkpoints and fingerprints from before stay valid."""


@dataclass(frozen=True, kw_only=True)
class PrivacySpec:
    """Differentially private training: the Poisson-subsampled Gaussian mechanism, composed ``steps`` times, and, if it
    is asked for, one release of how many records each class has.

    Every field is a public constant. None may be computed from the private data, and in particular
    ``sample_rate``, ``expected_batch_size`` and ``dataset_size_bound`` may not come from its length.

    Attributes:
        sample_rate: probability q in [2^-64, 1] with which each record joins each batch.
        steps: batches in the whole run, at least 1.
        noise_multiplier: noise standard deviation over sensitivity, at least 0 (0 is not private).
        max_grad_norm: l2 bound C on one record's contribution, over all parameters, in [1e-9, 1e9]; where it
            starts, if ``clipping_rule`` moves it.
        expected_batch_size: what the noisy sum is divided by, above 0.
        delta: in (0, 1 / dataset_size_bound).
        neighboring_relation: ``"add_or_remove_one"`` is the only relation supported.
        unit: what one record is.
        dataset_size_bound: a public upper bound N on the number of records, at least 1.
        clipping_rule: how contributions are bounded: a name or a mapping, see :meth:`ClippingRule.parse
            <wavedp.privacy.ClippingRule.parse>`; kept as a :class:`~wavedp.privacy.ClippingRule`.
        noise_mode: ``"standard"``, or ``"strict"``: noise in integers whose rounding and law are charged
            (:mod:`wavedp.privacy.strict`); not with adaptive clipping.
        trainable_parameters: scalars that are trained; needed for ``"strict"``, and compared with the model.
        truncated_batch_size: at most so many records make a batch, a random choice of them if more were drawn.
        label_noise_multiplier: deviation of the noise on each count of a label histogram, which a run may release
            once; ``None``: there is none.

    Raises:
        TypeError, ValueError: a field of a wrong type or out of range.
    """

    sample_rate: float
    steps: int
    noise_multiplier: float
    max_grad_norm: float
    expected_batch_size: float
    delta: float
    dataset_size_bound: int
    neighboring_relation: str = "add_or_remove_one"
    unit: str = "image"
    clipping_rule: ClippingRule | str | Mapping[str, Any] = "flat"
    noise_mode: str = "standard"
    trainable_parameters: int | None = None
    truncated_batch_size: int | None = None
    label_noise_multiplier: float | None = None

    def __post_init__(self) -> None:
        bound = check_integer("dataset_size_bound", self.dataset_size_bound, at_least=1)
        checked = {
            "sample_rate": check_real("sample_rate", self.sample_rate, above=0.0, at_most=1.0),
            "steps": check_integer("steps", self.steps, at_least=1, at_most=10**8),
            "noise_multiplier": check_real("noise_multiplier", self.noise_multiplier, at_least=0.0, at_most=1e6),
            "max_grad_norm": check_max_grad_norm(self.max_grad_norm),
            "expected_batch_size": check_real("expected_batch_size", self.expected_batch_size, above=0.0),
            "delta": check_real("delta", self.delta, above=0.0, below=1.0),
            "dataset_size_bound": bound,
            "clipping_rule": ClippingRule.parse(self.clipping_rule),
        }
        for name in ("trainable_parameters", "truncated_batch_size"):
            if getattr(self, name) is not None:
                checked[name] = check_integer(name, getattr(self, name), at_least=1)
        if self.label_noise_multiplier is not None:
            checked["label_noise_multiplier"] = check_real(
                "label_noise_multiplier", self.label_noise_multiplier, above=0.0, at_most=1e6
            )
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if membership_threshold(self.sample_rate) == 0:
            raise InvalidValueError(f"sample_rate={self.sample_rate} is below 2^-64: no record would ever be drawn")
        if self.delta * bound >= 1.0:
            raise InvalidValueError(
                f"delta={self.delta} must be below 1/dataset_size_bound = {1.0 / bound}: at 1/N a mechanism "
                f"that publishes one record at random would pass"
            )
        if self.neighboring_relation not in NEIGHBORING_RELATIONS:
            raise InvalidValueError(
                f"neighboring_relation={self.neighboring_relation!r} is not supported; choose one of "
                f"{NEIGHBORING_RELATIONS} (replacing a record costs more and needs its own accounting)"
            )
        if not isinstance(self.unit, str) or not self.unit.strip():
            raise InvalidValueError(f"unit must say what one record is, got {self.unit!r}")
        self._check_mode()
        self.clipping.sum_noise_multiplier(self.noise_multiplier)  # raises if a step cannot be charged as that
        self.stddev_with(self.clipping)  # raises if rounding cannot be

    def _check_mode(self) -> None:
        if self.noise_mode not in NOISE_MODES:
            raise InvalidValueError(f"noise_mode={self.noise_mode!r} is not known; choose one of {NOISE_MODES}")
        if self.noise_mode == "standard":
            if self.trainable_parameters is not None:
                raise InvalidValueError("trainable_parameters is for noise_mode='strict'; leave it out")
            return
        if self.trainable_parameters is None:
            raise InvalidValueError("noise_mode='strict' needs trainable_parameters: rounding costs by their number")
        if self.label_noise_multiplier is not None and self.label_noise_multiplier > 2.0**strict.COARSEST_BITS:
            raise InvalidValueError(
                f"label_noise_multiplier must be at most {2**strict.COARSEST_BITS} with strict noise"
            )
        if ClippingRule.parse(self.clipping_rule).name == "adaptive":
            raise InvalidValueError(
                "noise_mode='strict' does not cover the counts of clipping_rule 'adaptive': choose another"
            )

    @classmethod
    def for_target_epsilon(cls, target_epsilon: float, **values: Any) -> "PrivacySpec":
        """Return the specification whose :meth:`epsilon` lands within 1 % below ``target_epsilon``.

        Args:
            target_epsilon: what all steps, and the label histogram if there is one, may cost together.
            values: the fields, without ``noise_multiplier``.

        Raises:
            TypeError, ValueError: as the constructor; or no noise multiplier meets the target.
        """
        if "noise_multiplier" in values:
            raise InvalidTypeError("for_target_epsilon finds noise_multiplier: leave it out")
        return cls(noise_multiplier=0.0, **values).calibrated(target_epsilon)

    def calibrated(self, target_epsilon: float) -> "PrivacySpec":
        """Return the same specification with the noise multiplier of :meth:`for_target_epsilon`."""

        def found(target: float, delta: float) -> "PrivacySpec":
            multiplier = accounting.noise_multiplier_for(
                target_epsilon=target,
                sample_rate=self.sample_rate,
                steps=self.steps,
                delta=delta,
                truncated_batch_size=self.truncated_batch_size,
                dataset_size_bound=None if self.truncated_batch_size is None else self.dataset_size_bound,
                other_phases=self._label_phases(),
            )
            return replace(self, noise_multiplier=multiplier)

        if self.noise_mode == "standard":
            return found(target_epsilon, self.delta)
        # The law's cost depends on the grid, which depends a little on the noise.
        law = 0.0
        for _ in range(8):
            if 2.0 * law >= target_epsilon:
                break
            candidate = found(target_epsilon - 2.0 * law, strict.MECHANISM_SHARE * self.delta)
            reached = candidate.epsilon()
            if 0.99 * target_epsilon <= reached <= target_epsilon:
                return candidate
            if not math.isfinite(reached):
                break
            law = candidate.law_epsilon()
        raise InvalidValueError(
            f"noise_mode='strict' reaches no epsilon of {target_epsilon} with {self.trainable_parameters} parameters "
            f"and {self.steps} steps: train fewer parameters, take fewer steps, or use noise_mode='standard'"
        )

    @property
    def clipping(self) -> Clipping:
        """The rule that bounds every record's contribution, as it is when the run begins."""
        rule = ClippingRule.parse(self.clipping_rule)
        return rule.make(max_grad_norm=self.max_grad_norm, expected_batch_size=self.expected_batch_size)

    @property
    def sensitivity(self) -> float:
        """The l2 sensitivity of the clipped sum: ``max_grad_norm`` plus the float32 summation allowance, and for strict
        noise plus that of its rounding to integers."""
        return self._rounded(self.clipping)

    @property
    def noise_stddev(self) -> float:
        """The standard deviation of the noise added to the clipped sum, per coordinate.

        With adaptive clipping, that of the first step; later ones follow the bound of :meth:`Clipping.session
        <wavedp.privacy.Clipping.session>`.
        """
        return self.stddev_with(self.clipping)

    def stddev_with(self, clipping: Clipping) -> float:
        """Return :attr:`noise_stddev` while the clipping is that of a session under way."""
        return clipping.sum_noise_multiplier(self.noise_multiplier) * self._rounded(clipping)

    def grid_of(self, std: float) -> float | None:
        """Return the public grid for noise of deviation ``std``; ``None``: that of standard noise.

        For whole numbers with noise of deviation at most 256 it is at most 1, so that they are not rounded.
        """
        if self.noise_mode == "standard" or std == 0.0:
            return None
        assert self.trainable_parameters is not None
        return strict.grid_of(std, strict.grid_bits(self.noise_multiplier, self.trainable_parameters))

    @property
    def label_grid(self) -> float | None:
        """The public grid of the label histogram's counts, as :meth:`grid_of`."""
        return None if self.label_noise_multiplier is None else self.grid_of(self.label_noise_multiplier)

    @property
    def releases(self) -> tuple[str, ...]:
        """Names of what is released once, beside the steps."""
        return () if self.label_noise_multiplier is None else (LABEL_HISTOGRAM,)

    def phases(self, steps: int | None = None) -> tuple[Phase, ...]:
        """Return all that is charged: the steps (all, or the first ``steps``) and the label histogram if there is one.

        A step's sum and, with adaptive clipping, its count together are one Gaussian mechanism.
        """
        training = Phase(
            noise_multiplier=self.noise_multiplier,
            sample_rate=self.sample_rate,
            steps=self.steps if steps is None else check_integer("steps", steps, at_most=self.steps),
            truncated_batch_size=self.truncated_batch_size,
            dataset_size_bound=None if self.truncated_batch_size is None else self.dataset_size_bound,
        )
        return (training, *self._label_phases())

    def event(self) -> "DpEvent":
        """Return the whole run as a dp-accounting event, without what strict noise costs beyond an exact Gaussian."""
        return accounting.composed_event(self.phases())

    def epsilon(self, *, steps: int | None = None, delta: float | None = None) -> float:
        """Return the upper bound on epsilon for all phases; infinity without noise.

        Args:
            steps: count so many steps instead of all.
            delta: in place of :attr:`delta`.
        """
        delta = self.delta if delta is None else delta
        phases = self.phases(steps)
        if self.noise_mode == "standard":
            return accounting.composed_epsilon(phases, delta)
        upper = accounting.composed_epsilon(phases, strict.MECHANISM_SHARE * delta)
        return upper + 2.0 * self.law_epsilon(upper, steps=steps, delta=delta)

    def law_epsilon(
        self, mechanism_epsilon: float | None = None, *, steps: int | None = None, delta: float | None = None
    ) -> float:
        """Return e of :mod:`wavedp.privacy.strict`, of which epsilon holds two: 0 for standard noise.

        Infinity where it would be above 0.05: the noise is of too many coordinates for its grid.

        Args:
            mechanism_epsilon: epsilon of exact Gaussians at 0.9 ``delta``, if it is known.
            steps, delta: as for :meth:`epsilon`.
        """
        if self.noise_mode == "standard":
            return 0.0
        assert self.trainable_parameters is not None
        delta = self.delta if delta is None else delta
        if mechanism_epsilon is None:
            mechanism_epsilon = accounting.composed_epsilon(self.phases(steps), strict.MECHANISM_SHARE * delta)
        if not math.isfinite(mechanism_epsilon):
            return math.inf
        steps = self.steps if steps is None else steps
        if steps + len(self.releases) == 0:
            return 0.0
        multipliers = [self.noise_multiplier, *(phase.noise_multiplier for phase in self._label_phases())]
        moved = 1.0 if self.truncated_batch_size is None else 2.0  # a record pushes another one out of a full batch
        return strict.law_epsilon(
            pairs=strict.pairs_of(self.trainable_parameters, steps),
            releases=steps + len(self.releases),
            shift=moved / min(multipliers),
            bits=strict.grid_bits(self.noise_multiplier, self.trainable_parameters),
            delta=delta,
            epsilon=mechanism_epsilon,
        )

    def epsilon_bounds(self) -> tuple[float, float]:
        """Return a lower and an upper bound on epsilon for all phases."""
        if self.noise_mode == "standard":
            return accounting.composed_epsilon_bounds(self.phases(), self.delta)
        upper = self.epsilon()
        if not math.isfinite(upper):
            return upper, upper
        # Were the real mechanism better by more than this, the ideal one would be better than its own lower bound.
        lower, _ = accounting.composed_epsilon_bounds(self.phases(), min(1.25 * self.delta, 0.5))
        return max(0.0, lower - 2.0 * self.law_epsilon()), upper

    def epsilon_rdp(self) -> float:
        """Return the Renyi upper bound on epsilon, the independent cross-check."""
        share = 1.0 if self.noise_mode == "standard" else strict.MECHANISM_SHARE
        return accounting.composed_epsilon_rdp(self.phases(), share * self.delta) + 2.0 * self.law_epsilon()

    def with_steps(self, steps: int) -> "PrivacySpec":
        """Return the same mechanism composed ``steps`` times."""
        return replace(self, steps=steps)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        values = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in _LATER_FIELDS or getattr(self, field.name) != field.default
        }
        return {**values, "clipping_rule": ClippingRule.parse(self.clipping_rule).to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PrivacySpec":
        """Build a specification from :meth:`to_dict`.

        Raises:
            ValueError: a field is missing or unknown.
        """
        names = {field.name for field in fields(cls)}
        missing, unknown = sorted(names - set(values) - _LATER_FIELDS), sorted(set(values) - names)
        if missing or unknown:
            raise InvalidValueError(f"not a PrivacySpec: missing {missing}, unknown {unknown}")
        return cls(**values)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the fields, in hexadecimal."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def _label_phases(self) -> tuple[Phase, ...]:
        # One record more or less moves one count by 1.
        return () if self.label_noise_multiplier is None else (Phase(noise_multiplier=self.label_noise_multiplier),)

    def _rounded(self, clipping: Clipping) -> float:
        if self.noise_mode == "standard" or self.noise_multiplier == 0.0:
            return clipping.sensitivity()
        assert self.trainable_parameters is not None
        return strict.rounded_sensitivity(clipping.sensitivity(), self.noise_multiplier, self.trainable_parameters)
