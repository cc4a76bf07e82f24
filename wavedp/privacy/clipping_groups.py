# SPDX-License-Identifier: Apache-2.0
"""Clipping by groups of parameters, each with a norm, a bound and a factor of its own.

Bounds ``C_k`` of K groups make a record's contribution at most ``sqrt(sum_k C_k^2)`` (McMahan et al. 2018).
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from wavedp.errors import InvalidValueError
from wavedp.privacy.clipping import Clipping, check_max_grad_norm, factors_up_to_one
from wavedp.privacy.rounding import SUM_ROUNDING_ALLOWANCE


@dataclass(frozen=True)
class PerGroupClipping(Clipping):
    """Clip each record's gradient to a bound of its own in every group of parameters.

    Formal guarantee: that of :class:`~wavedp.privacy.Clipping`, with ``C = sqrt(sum_k C_k^2)``.

    Args:
        bounds: from pattern to bound. A pattern is a regular expression for the beginning of a parameter's name
            up to a dot or the end: ``blocks.1`` takes ``blocks.1.weight`` and not ``blocks.10.weight``, ``.*bias``
            every bias, ``.*`` everything. Every parameter must be in exactly one group.

    Raises:
        TypeError: a bound that is not a number.
        ValueError: no patterns, one that is no regular expression, or a bound outside [1e-9, 1e9].
    """

    bounds: Mapping[str, float] | tuple[tuple[str, float], ...]  # kept as sorted pairs

    def __post_init__(self) -> None:
        pairs = sorted(dict(self.bounds).items())
        if not pairs:
            raise InvalidValueError("bounds is empty: give one bound per group of parameters, {pattern: bound}")
        for pattern, _ in pairs:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InvalidValueError(f"bounds: {pattern!r} is not a regular expression: {error}") from error
        checked = tuple((pattern, check_max_grad_norm(bound, f"bounds[{pattern!r}]")) for pattern, bound in pairs)
        object.__setattr__(self, "bounds", checked)

    @property
    def max_grad_norm(self) -> float:
        """The bound on a record's whole contribution, ``sqrt(sum_k C_k^2)``."""
        return math.sqrt(math.fsum(bound * bound for bound in dict(self.bounds).values()))

    def group_of(self, name: str) -> str:
        groups = [pattern for pattern in dict(self.bounds) if re.match(rf"(?:{pattern})(?:\.|$)", name)]
        if not groups:
            raise InvalidValueError(
                f"parameter {name!r} is in no clipping group of {list(dict(self.bounds))}: add a pattern for it, or "
                f"freeze the parameter"
            )
        if len(groups) > 1:
            raise InvalidValueError(
                f"parameter {name!r} is in {len(groups)} clipping groups, {groups}: make the patterns exclude each "
                f"other"
            )
        return groups[0]

    def for_parameters(self, names: Iterable[str]) -> Clipping:
        taken = {self.group_of(name) for name in names}
        unused = [pattern for pattern in dict(self.bounds) if pattern not in taken]
        if unused:
            raise InvalidValueError(
                f"clipping groups {unused} take no trainable parameter, and would only add noise: correct or remove "
                f"the patterns"
            )
        return self

    def sensitivity(self) -> float:
        return self.max_grad_norm * (1.0 + SUM_ROUNDING_ALLOWANCE)

    def describe(self) -> str:
        bounds = ", ".join(f"{pattern!r}: {bound:.6g}" for pattern, bound in dict(self.bounds).items())
        return (
            f"per group: factor min(1, C_k / norm_k) over the parameters of group k, bounds C_k {{{bounds}}}, together "
            f"C = {self.max_grad_norm:.6g}"
        )

    def _factors_of(self, group: str, squared_norms: Tensor, dtype: torch.dtype) -> Tensor:
        bounds = dict(self.bounds)
        if group not in bounds:
            raise InvalidValueError(f"no clipping group {group!r}; there are {list(bounds)}")
        return factors_up_to_one(squared_norms, bounds[group], dtype)


@dataclass(frozen=True)
class PerLayerClipping(Clipping):
    """Clip each record's gradient to ``C / sqrt(K)`` in every one of the model's K layers.

    A layer is what owns a parameter: the name up to its last dot (``""`` for parameters of the model itself). The
    rule knows K once :meth:`for_parameters` has told it the parameters.

    Formal guarantee: that of :class:`~wavedp.privacy.Clipping`, with ``C = max_grad_norm`` for every K.
    """

    max_grad_norm: float
    layers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_grad_norm", check_max_grad_norm(self.max_grad_norm))
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))

    def group_of(self, name: str) -> str:
        layer = name.rpartition(".")[0]
        if self.layers is not None and layer not in self.layers:
            raise InvalidValueError(
                f"parameter {name!r} is in no layer that this clipping was made for: {list(self.layers)}"
            )
        return layer

    def for_parameters(self, names: Iterable[str]) -> Clipping:
        layers = tuple(self.group_of(name) for name in names)
        if not layers:
            raise InvalidValueError("there are no trainable parameters to clip the gradients of")
        return PerLayerClipping(self.max_grad_norm, layers)

    def sensitivity(self) -> float:
        return self.max_grad_norm * (1.0 + SUM_ROUNDING_ALLOWANCE)

    def describe(self) -> str:
        return (
            f"per layer: factor min(1, C_k / norm_k) over the parameters of layer k, C_k = C / sqrt(K) for K layers, "
            f"C = {self.max_grad_norm:.6g}"
        )

    def _factors_of(self, group: str, squared_norms: Tensor, dtype: torch.dtype) -> Tensor:
        if self.layers is None:
            raise InvalidValueError(
                "the number of layers is not known yet: call for_parameters(names) and use what it returns"
            )
        if group not in self.layers:
            raise InvalidValueError(f"no layer {group!r}; there are {list(self.layers)}")
        return factors_up_to_one(squared_norms, self.max_grad_norm / math.sqrt(len(self.layers)), dtype)
