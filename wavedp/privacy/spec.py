# SPDX-License-Identifier: Apache-2.0
"""The one immutable object from which sampling, clipping, noise and accounting are all made."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from wavedp.privacy import accounting
from wavedp.privacy.clipping import Clipping, check_max_grad_norm
from wavedp.privacy.clipping_rules import ClippingRule
from wavedp.privacy.sampling import membership_threshold
from wavedp.privacy.validation import check_integer, check_real

if TYPE_CHECKING:
    from dp_accounting import DpEvent

NEIGHBORING_RELATIONS = ("add_or_remove_one",)


@dataclass(frozen=True, kw_only=True)
class PrivacySpec:
    """Differentially private training: the Poisson-subsampled Gaussian mechanism, composed ``steps`` times.

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
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if membership_threshold(self.sample_rate) == 0:
            raise ValueError(f"sample_rate={self.sample_rate} is below 2^-64: no record would ever be drawn")
        if self.delta * bound >= 1.0:
            raise ValueError(
                f"delta={self.delta} must be below 1/dataset_size_bound = {1.0 / bound}: at 1/N a mechanism "
                f"that publishes one record at random would pass"
            )
        if self.neighboring_relation not in NEIGHBORING_RELATIONS:
            raise ValueError(
                f"neighboring_relation={self.neighboring_relation!r} is not supported; choose one of "
                f"{NEIGHBORING_RELATIONS} (replacing a record costs more and needs its own accounting)"
            )
        if not isinstance(self.unit, str) or not self.unit.strip():
            raise ValueError(f"unit must say what one record is, got {self.unit!r}")
        self.clipping.sum_noise_multiplier(self.noise_multiplier)  # raises if a step cannot be charged as that

    @classmethod
    def for_target_epsilon(
        cls,
        target_epsilon: float,
        *,
        sample_rate: float,
        steps: int,
        max_grad_norm: float,
        expected_batch_size: float,
        delta: float,
        dataset_size_bound: int,
        neighboring_relation: str = "add_or_remove_one",
        unit: str = "image",
        clipping_rule: ClippingRule | str | Mapping[str, Any] = "flat",
    ) -> "PrivacySpec":
        """Return the specification whose :meth:`epsilon` lands within 1 % below ``target_epsilon``.

        Raises:
            TypeError, ValueError: as the constructor; or no noise multiplier meets the target.
        """
        unnoised = cls(
            sample_rate=sample_rate,
            steps=steps,
            noise_multiplier=0.0,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
            delta=delta,
            dataset_size_bound=dataset_size_bound,
            neighboring_relation=neighboring_relation,
            unit=unit,
            clipping_rule=clipping_rule,
        )
        noise_multiplier = accounting.noise_multiplier_for(
            target_epsilon=target_epsilon,
            sample_rate=unnoised.sample_rate,
            steps=unnoised.steps,
            delta=unnoised.delta,
        )
        return replace(unnoised, noise_multiplier=noise_multiplier)

    @property
    def clipping(self) -> Clipping:
        """The rule that bounds every record's contribution, as it is when the run begins."""
        rule = ClippingRule.parse(self.clipping_rule)
        return rule.make(max_grad_norm=self.max_grad_norm, expected_batch_size=self.expected_batch_size)

    @property
    def sensitivity(self) -> float:
        """The l2 sensitivity of the clipped sum: ``max_grad_norm`` plus the float32 summation allowance."""
        return self.clipping.sensitivity()

    @property
    def noise_stddev(self) -> float:
        """The standard deviation of the noise added to the clipped sum, per coordinate.

        With adaptive clipping, that of the first step; later ones follow the bound of :meth:`Clipping.session
        <wavedp.privacy.Clipping.session>`.
        """
        return self.clipping.sum_noise_multiplier(self.noise_multiplier) * self.sensitivity

    def event(self) -> "DpEvent":
        """Return the whole run as a dp-accounting event.

        A step's sum and, with adaptive clipping, its count together are one Gaussian mechanism.
        """
        return accounting.gaussian_event(self.sample_rate, self.noise_multiplier, self.steps)

    def epsilon(self) -> float:
        """Return the upper bound on epsilon for all ``steps``; infinity without noise."""
        return accounting.epsilon(**self._mechanism())

    def epsilon_bounds(self) -> tuple[float, float]:
        """Return a lower and an upper bound on epsilon for all ``steps``."""
        return accounting.epsilon_bounds(**self._mechanism())

    def epsilon_rdp(self) -> float:
        """Return the Renyi upper bound on epsilon, the independent cross-check."""
        return accounting.epsilon_rdp(**self._mechanism())

    def with_steps(self, steps: int) -> "PrivacySpec":
        """Return the same mechanism composed ``steps`` times."""
        return replace(self, steps=steps)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "clipping_rule": ClippingRule.parse(self.clipping_rule).to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PrivacySpec":
        """Build a specification from :meth:`to_dict`.

        Raises:
            ValueError: a field is missing or unknown.
        """
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise ValueError(
                f"not a PrivacySpec: missing {sorted(names - set(values))}, unknown {sorted(set(values) - names)}"
            )
        return cls(**values)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the fields, in hexadecimal."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def _mechanism(self) -> dict[str, Any]:
        return {
            "sample_rate": self.sample_rate,
            "noise_multiplier": self.noise_multiplier,
            "steps": self.steps,
            "delta": self.delta,
        }
