# SPDX-License-Identifier: Apache-2.0
"""The clipping rules by name, with their parameters as JSON-ready public constants."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wavedp.errors import InvalidTypeError, InvalidValueError
from wavedp.privacy.clipping import AutomaticClipping, Clipping, FlatClipping, NormalisedClipping
from wavedp.privacy.clipping_adaptive import AdaptiveClipping
from wavedp.privacy.clipping_groups import PerGroupClipping, PerLayerClipping

_REQUIRED = object()

_DEFAULTS: dict[str, dict[str, Any]] = {
    "flat": {},
    "per_layer": {},
    "per_group": {"bounds": _REQUIRED},
    "automatic": {"gamma": 0.01},
    "normalised": {},
    "adaptive": {"target_quantile": 0.5, "learning_rate": 0.2, "count_noise_stddev": None},
}

RULES = tuple(_DEFAULTS)
"""Names that :meth:`ClippingRule.parse` knows."""


@dataclass(frozen=True)
class ClippingRule:
    """A clipping rule's name and its parameters besides the bound; build it with :meth:`parse`."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, value: "ClippingRule | str | Mapping[str, Any]") -> "ClippingRule":
        """Read a rule's name, or a mapping with ``name`` and any of its parameters; fill in the rest.

        ==============  ==============================================================================
        name            parameters
        ==============  ==============================================================================
        ``flat``        none
        ``per_layer``   none; every layer gets ``max_grad_norm / sqrt(layers)``
        ``per_group``   ``bounds``, pattern to bound; ``max_grad_norm`` must be the l2 norm of the bounds
        ``automatic``   ``gamma`` (0.01)
        ``normalised``  none
        ``adaptive``    ``target_quantile`` (0.5), ``learning_rate`` (0.2), ``count_noise_stddev``
                        (``None``: ``expected_batch_size / 20``); ``max_grad_norm`` is where C starts
        ==============  ==============================================================================

        Raises:
            TypeError: ``value`` is of another type, or a parameter is.
            ValueError: an unknown name, an unknown or missing parameter, or one out of range.
        """
        if isinstance(value, ClippingRule):
            value = value.to_dict()
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping):
            raise InvalidTypeError(f"clipping_rule must be a name or a mapping with 'name', got {type(value).__name__}")
        given = dict(value)
        name = given.pop("name", None)
        if name not in _DEFAULTS:
            raise InvalidValueError(f"clipping_rule {name!r} is not known; choose one of {', '.join(RULES)}")
        defaults = _DEFAULTS[name]
        unknown = sorted(set(given) - set(defaults))
        if unknown:
            raise InvalidValueError(f"clipping_rule {name!r} has no parameters {unknown}; it has {sorted(defaults)}")
        options = {**defaults, **given}
        missing = [key for key, option in options.items() if option is _REQUIRED]
        if missing:
            raise InvalidValueError(f"clipping_rule {name!r} needs the parameters {missing}")
        made = cls(name, tuple(options.items()))._unscaled()
        # What the rule made of them: checked, floats, sorted. None stays, so that it can follow the batch size.
        return cls(name, tuple((key, o if o is None else getattr(made, key)) for key, o in sorted(options.items())))

    def make(self, *, max_grad_norm: float, expected_batch_size: float) -> Clipping:
        """Return the clipping with the bound ``max_grad_norm``.

        Raises:
            TypeError, ValueError: a bound out of range; for ``per_group``, one that is not that of its groups.
        """
        options = dict(self.options)
        if self.name == "flat":
            return FlatClipping(max_grad_norm)
        if self.name == "per_layer":
            return PerLayerClipping(max_grad_norm)
        if self.name == "automatic":
            return AutomaticClipping(max_grad_norm, **options)
        if self.name == "normalised":
            return NormalisedClipping(max_grad_norm)
        if self.name == "adaptive":
            return AdaptiveClipping(max_grad_norm, expected_batch_size, **options)
        groups = PerGroupClipping(**options)
        if not math.isclose(groups.max_grad_norm, max_grad_norm, rel_tol=1e-9):
            raise InvalidValueError(
                f"max_grad_norm={max_grad_norm!r} must be the l2 norm of the bounds of clipping_rule 'per_group', "
                f"math.hypot(*bounds.values()) = {groups.max_grad_norm!r}"
            )
        return groups

    def to_dict(self) -> dict[str, Any]:
        """Return ``name`` and all parameters as JSON-ready values, as :meth:`parse` reads them."""
        return {"name": self.name, **{key: dict(o) if isinstance(o, tuple) else o for key, o in self.options}}

    def _unscaled(self) -> Clipping:
        if self.name == "per_group":
            return PerGroupClipping(dict(self.options)["bounds"])
        return self.make(max_grad_norm=1.0, expected_batch_size=1.0)
