# SPDX-License-Identifier: Apache-2.0
"""Per-record clipping: from gradient norms to factors, and the bound they give.

Every record's gradient is scaled by a factor made from its norm, and the scaled gradients are summed. The rules
here take one norm over all trainable parameters; those with several are in
:mod:`wavedp.privacy.clipping_groups`, the one that moves its bound in :mod:`wavedp.privacy.clipping_adaptive`.
Nothing here divides by a batch size.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wavedp.errors import InvalidTypeError, InvalidValueError
from wavedp.functional import clip_and_sum as clip_and_sum
from wavedp.privacy.entropy import Entropy
from wavedp.privacy.rounding import SUM_ROUNDING_ALLOWANCE
from wavedp.privacy.validation import check_real

FLAT_GROUP = ""
"""The only group of the rules that take one norm over all parameters."""

LARGEST_FACTOR = 2.0**64
"""What :class:`NormalisedClipping` scales a record up by at most."""

_ROUND_DOWN = {torch.float32: 1.0 - 2.0**-22, torch.float64: 1.0 - 2.0**-50}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which gradients of ``dtype`` are summed: float32, or float64 for float64."""
    if not dtype.is_floating_point:
        raise InvalidTypeError(f"gradients must be real floating point, got {dtype}")
    return torch.promote_types(dtype, torch.float32)


class Clipping(ABC):
    """A rule that bounds every record's contribution to a sum of gradients, and the run's use of it.

    Parameters fall into groups, each with a norm and a factor per record. A rule is immutable. What a run keeps
    is in the object that :meth:`session` returns, which is a ``Clipping`` as well; rules without state return
    themselves, and the last five methods do nothing for them.

    Formal guarantee: for finite or non-finite per-record gradients, the sum that the factors of one logical
    batch produce changes by at most :meth:`sensitivity` in l2 norm when one record is added or removed, up to
    what :data:`~wavedp.privacy.rounding.SUM_ROUNDING_ALLOWANCE` says of rounding.
    """

    @abstractmethod
    def group_of(self, name: str) -> str:
        """Return the group that the parameter ``name`` belongs to.

        Raises:
            ValueError: the rule has no group for it, or more than one.
        """

    @abstractmethod
    def sensitivity(self) -> float:
        """Return the l2 sensitivity of the sum under add-or-remove-one, rounding included."""

    @abstractmethod
    def describe(self) -> str:
        """Return the rule and its parameters in words, for the privacy statement."""

    @abstractmethod
    def _factors_of(self, group: str, squared_norms: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the factors ``[B]`` of one group, 0 where its own norm is not finite."""

    def group_factors(
        self,
        squared_norms: Mapping[str, Tensor],  # per group, [B] float64
        dtype: torch.dtype,  # of the sum: float32 or float64
    ) -> dict[str, Tensor]:  # per group, [B] of dtype
        """Return one factor per record and group, rounded down.

        A factor of exactly 0 means that the record is left out by selection: multiplying a non-finite gradient by
        it would give NaN. A record whose norm is not finite in any group gets 0 in all. A factor too small for a
        normal number of ``dtype`` becomes 0.

        Raises:
            TypeError: a ``dtype`` other than float32 and float64.
            ValueError: a group that the rule does not have, or norms that are not one vector per group, all of one
                length.
        """
        check_factor_dtype(dtype)
        finite = finite_in_every_group(squared_norms)
        if finite is None:
            return {}
        factors = {}
        for group, squared in squared_norms.items():
            own = self._factors_of(group, squared.double(), dtype)
            factors[group] = torch.where(finite.to(own.device), own, torch.zeros_like(own))
        return factors

    def for_parameters(self, names: Iterable[str]) -> "Clipping":
        """Return the rule for a model with the trainable parameters ``names``, each in exactly one group.

        Raises:
            ValueError: a parameter that no group takes, or several do; a group that takes none.
        """
        for name in names:
            self.group_of(name)
        return self

    def sum_noise_multiplier(self, noise_multiplier: float) -> float:
        """Return the noise deviation of the sum over its sensitivity, when a whole step is accounted as
        ``noise_multiplier``: the same, unless a step releases more than the sum."""
        return noise_multiplier

    def extra_charge(self, noise_multiplier: float) -> str | None:
        """Return in words what a step releases beyond the sum and how it is charged; ``None`` if nothing."""
        return None

    def session(self, entropy: Entropy) -> "Clipping":
        """Return the object that one run clips with; ``entropy`` makes the noise of what it releases."""
        return self

    def observe(self, squared_norms: Mapping[str, Tensor]) -> None:
        """Take note of a micro-batch, with the norms that :meth:`group_factors` got, once and before the next."""
        return

    def end_step(self) -> None:
        """Release what was noted of this logical batch, with noise, and move the bound for the next."""
        return

    def drop_step(self) -> None:
        """Forget what was noted of this logical batch, which is not released."""
        return

    def state_dict(self) -> dict[str, Any]:
        """Return the state between two logical batches as JSON-ready public values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ValueError: ``state`` is not from this rule's :meth:`state_dict`.
            RuntimeError: a logical batch is under way.
        """
        if state:
            raise InvalidValueError(f"{type(self).__name__} has no state, got one with the keys {sorted(state)}")


@dataclass(frozen=True)
class OneGroupClipping(Clipping):
    """What the rules share that take one norm over all parameters and bound it by ``max_grad_norm``."""

    max_grad_norm: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_grad_norm", check_max_grad_norm(self.max_grad_norm))

    @abstractmethod
    def factors(
        self,
        squared_norms: Tensor,  # [B] float64
        dtype: torch.dtype,  # of the sum: float32 or float64
    ) -> Tensor:  # [B] of dtype
        """Return one factor per record, rounded down; 0 where the norm is not finite."""

    def group_of(self, name: str) -> str:
        return FLAT_GROUP

    def sensitivity(self) -> float:
        return self.max_grad_norm * (1.0 + SUM_ROUNDING_ALLOWANCE)

    def _factors_of(self, group: str, squared_norms: Tensor, dtype: torch.dtype) -> Tensor:
        if group != FLAT_GROUP:
            raise InvalidValueError(f"{type(self).__name__} has one group, {FLAT_GROUP!r}, and not {group!r}")
        return self.factors(squared_norms, dtype)


@dataclass(frozen=True)
class FlatClipping(OneGroupClipping):
    """Clip each record's whole gradient to the l2 norm ``max_grad_norm`` (Abadi et al. 2016).

    Formal guarantee: that of :class:`Clipping`, with a contribution of ``min(norm, C)`` per record.
    """

    def factors(self, squared_norms: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``min(1, C / norm)`` rounded down, 1 where the norm is 0, and 0 where it is not finite.

        A factor of exactly 0 means that the record is left out by selection: multiplying a non-finite
        gradient by it would give NaN. Factors too small for a normal number of ``dtype`` become 0 as well.
        """
        return factors_up_to_one(squared_norms, self.max_grad_norm, dtype)

    def describe(self) -> str:
        return f"flat: factor min(1, C / norm) over all parameters, C = {self.max_grad_norm:.6g}"


@dataclass(frozen=True)
class AutomaticClipping(OneGroupClipping):
    """Scale each record's whole gradient to a norm below ``max_grad_norm``: AUTO-S of Bu et al. 2023.

    The factor is ``C / (norm + gamma)`` (arXiv 2206.07136), also for small norms, which are scaled up:
    the contribution ``C norm / (norm + gamma)`` grows with the norm and stays below C. A zero norm gives ``C / gamma``
    and contributes zero. C and the learning rate have one effect, their product.
    """

    gamma: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "gamma", check_real("gamma", self.gamma, at_least=1e-9, at_most=1e9))

    def factors(self, squared_norms: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``C / (norm + gamma)`` rounded down, and 0 where the norm is not finite."""
        ratio = self.max_grad_norm / (squared_norms.double().sqrt() + self.gamma)
        return _rounded_down(ratio, dtype)

    def describe(self) -> str:
        return (
            f"automatic (AUTO-S): factor C / (norm + gamma) over all parameters, C = {self.max_grad_norm:.6g}, "
            f"gamma = {self.gamma:.6g}"
        )


@dataclass(frozen=True)
class NormalisedClipping(OneGroupClipping):
    """Scale each record's whole gradient to the norm ``max_grad_norm`` (Das et al. 2021, arXiv 2106.07094).

    The factor is ``C / norm``, at most :data:`LARGEST_FACTOR`: a norm below ``2^-64 C`` is rounding and is not
    blown up to C. A zero norm gives the factor 0: the record is left out, and contributes zero either way.
    """

    def factors(self, squared_norms: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``min(2^64, C / norm)`` rounded down, and 0 where the norm is 0 or not finite."""
        norms = squared_norms.double().sqrt()
        ratio = (self.max_grad_norm / norms).clamp_max(LARGEST_FACTOR)
        return _rounded_down(torch.where(norms > 0.0, ratio, torch.zeros_like(ratio)), dtype)

    def describe(self) -> str:
        return f"normalised: factor C / norm over all parameters, C = {self.max_grad_norm:.6g}"


def check_max_grad_norm(value: object, name: str = "max_grad_norm") -> float:
    """Return a bound on a norm, in [1e-9, 1e9]; raises like :func:`~wavedp.privacy.validation.check_real`."""
    return check_real(name, value, at_least=1e-9, at_most=1e9)


def check_factor_dtype(dtype: torch.dtype) -> None:
    """Raise a TypeError unless ``dtype`` is one in which sums are taken."""
    if dtype not in _ROUND_DOWN:
        raise InvalidTypeError(f"factors are float32 or float64, as the sums they make; got {dtype}")


def factors_up_to_one(squared_norms: Tensor, bound: float, dtype: torch.dtype) -> Tensor:
    """Return ``min(1, bound / norm)`` rounded down, 1 where the norm is 0, and 0 where it is not finite."""
    check_factor_dtype(dtype)
    ratio = bound / squared_norms.double().sqrt() * _ROUND_DOWN[dtype]
    # C / 0 is infinite and stays unclipped; C / inf is 0; NaN fails both comparisons and ends as 0.
    return _without_tiny(torch.where(ratio >= 1.0, torch.ones_like(ratio), ratio), dtype)


def finite_in_every_group(squared_norms: Mapping[str, Tensor]) -> Tensor | None:
    """Return ``[B]`` bool, whether a record's norm is finite in every group; ``None`` without groups.

    Raises:
        ValueError: norms that are not one vector per group, all of one length.
    """
    shapes = {tuple(squared.shape) for squared in squared_norms.values()}
    if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
        raise InvalidValueError(
            f"squared norms must be one vector [B] per group, all of one length; got {sorted(shapes)}"
        )
    finite: Tensor | None = None
    for squared in squared_norms.values():
        own = torch.isfinite(squared)
        finite = own if finite is None else finite & own.to(finite.device)
    return finite


def _rounded_down(ratio: Tensor, dtype: torch.dtype) -> Tensor:
    check_factor_dtype(dtype)
    return _without_tiny(ratio * _ROUND_DOWN[dtype], dtype)


def _without_tiny(factors: Tensor, dtype: torch.dtype) -> Tensor:
    """Put 0 for NaN and for what is no normal number of ``dtype``: a subnormal one can round up by half."""
    return torch.where(factors >= torch.finfo(dtype).tiny, factors, torch.zeros_like(factors)).to(dtype)
