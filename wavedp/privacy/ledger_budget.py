# SPDX-License-Identifier: Apache-2.0
"""One budget for all runs on a data set: what they cost together, and whether another one fits in."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from wavedp.errors import InvalidValueError
from wavedp.privacy import accounting
from wavedp.privacy.phases import smallest_delta, total_steps
from wavedp.privacy.spec import NEIGHBORING_RELATIONS, PrivacySpec
from wavedp.privacy.validation import check_real

COMPOSITIONS = ("adaptive", "joint")

_ROUNDING = 1.0 + 1e-12  # of sums of decimal fractions: three thirds of a delta fit into it


@dataclass(frozen=True, kw_only=True)
class PrivacyBudget:
    """What all runs on one data set may spend together. All fields are public constants.

    Every run counts with all its planned steps and releases, from its first step on, whether or not it takes them.

    Attributes:
        epsilon, delta: of the guarantee that holds for all runs taken together.
        composition: how their costs are put together. ``"adaptive"`` adds up the runs' own epsilons and deltas, which
            is valid also where settings of a later run were chosen by what earlier ones released (Rogers, Roth,
            Ullman, Vadhan: "Privacy odometers and filters", 2016). ``"joint"`` composes the mechanisms of all runs
            as if they were one, at ``delta``: less, and valid only if the settings of every run were fixed without
            looking at what earlier ones released. Runs with strict noise are added to the others in both.
        unit, neighboring_relation: what the guarantee is about; the runs' own must be the same.

    Raises:
        TypeError, ValueError: a field of a wrong type or out of range.
    """

    epsilon: float
    delta: float
    composition: str = "adaptive"
    unit: str = "image"
    neighboring_relation: str = "add_or_remove_one"

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilon", check_real("budget epsilon", self.epsilon, above=0.0))
        object.__setattr__(self, "delta", check_real("budget delta", self.delta, above=0.0, below=1.0))
        if self.composition not in COMPOSITIONS:
            raise InvalidValueError(f"composition={self.composition!r} is not known; choose one of {COMPOSITIONS}")
        if not isinstance(self.unit, str) or not self.unit.strip():
            raise InvalidValueError(f"unit must say what one record is, got {self.unit!r}")
        if self.neighboring_relation not in NEIGHBORING_RELATIONS:
            raise InvalidValueError(
                f"neighboring_relation={self.neighboring_relation!r} is not supported; choose one of "
                f"{NEIGHBORING_RELATIONS}"
            )

    def spent(self, specs: Iterable[PrivacySpec]) -> tuple[float, float]:
        """Return the epsilon and the delta of runs of ``specs`` together; (0, 0) for none, infinite without noise.

        With ``"joint"``, delta is the budget's as soon as there is a run.
        """
        specs = list(specs)
        joint = [s for s in specs if self.composition == "joint" and s.noise_mode == "standard"]
        alone = [s for s in specs if s not in joint]
        epsilon, delta = (math.fsum(s.epsilon() for s in alone), math.fsum(s.delta for s in alone))
        if not joint:
            return epsilon, delta
        left = self.delta - delta
        phases = [phase for s in joint for phase in s.phases()]
        if left < smallest_delta(total_steps(phases)):
            return math.inf, self.delta
        return epsilon + accounting.composed_epsilon(phases, left), self.delta

    def covers(self, specs: Iterable[PrivacySpec]) -> bool:
        """Return whether runs of ``specs`` together stay within the budget."""
        epsilon, delta = self.spent(specs)
        return epsilon <= self.epsilon * _ROUNDING and delta <= self.delta * _ROUNDING

    def unlike(self, spec: PrivacySpec) -> list[str]:
        """Return the fields in which a run's guarantee is about something else than the budget's."""
        return [name for name in ("unit", "neighboring_relation") if getattr(spec, name) != getattr(self, name)]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PrivacyBudget":
        """Build a budget from :meth:`to_dict`; raises TypeError or ValueError where a field is amiss."""
        return cls(**values)
