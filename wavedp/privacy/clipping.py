# SPDX-License-Identifier: Apache-2.0
"""Flat per-record clipping: from gradient norms to factors, the bound they give, and the plain definition.

Every record's gradient, taken over all trainable parameters at once, is scaled by ``min(1, C / norm)``
(Abadi et al. 2016) and the scaled gradients are summed. Nothing here divides by a batch size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from wavedp.privacy.validation import check_real

SUM_ROUNDING_ALLOWANCE = 2.0**-13
"""Share of C by which rounding may move a clipped sum when a record is added or removed.

Sums over records are float64, where n records of norm C move by less than ``n^2 2^-53 C``: 1e-4 C for a million
aligned ones. What is left is the rounding inside the record, see
:data:`wavedp.privacy.per_sample.NORM_ROUNDING`.
"""

_ROUND_DOWN = {torch.float32: 1.0 - 2.0**-22, torch.float64: 1.0 - 2.0**-50}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which gradients of ``dtype`` are summed: float32, or float64 for float64."""
    if not dtype.is_floating_point:
        raise TypeError(f"gradients must be real floating point, got {dtype}")
    return torch.promote_types(dtype, torch.float32)


class Clipping(Protocol):
    def group_of(self, name: str) -> str: ...
    def group_factors(self, squared_norms: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]: ...
    def sensitivity(self) -> float: ...


@dataclass(frozen=True)
class FlatClipping:
    """Clip each record's whole gradient to the l2 norm ``max_grad_norm``.

    Formal guarantee: for finite or non-finite per-record gradients, the sum that these factors produce
    changes by at most :meth:`sensitivity` in l2 norm when one record is added or removed.
    """

    max_grad_norm: float

    def __post_init__(self) -> None:
        checked = check_real("max_grad_norm", self.max_grad_norm, at_least=1e-9, at_most=1e9)
        object.__setattr__(self, "max_grad_norm", checked)

    def factors(
        self,
        squared_norms: Tensor,  # [B] float64
        dtype: torch.dtype,  # of the sum: float32 or float64
    ) -> Tensor:  # [B] of dtype
        """Return ``min(1, C / norm)`` rounded down, 1 where the norm is 0, and 0 where it is not finite.

        A factor of exactly 0 means that the record is left out by selection: multiplying a non-finite
        gradient by it would give NaN. Factors too small for a normal number of ``dtype`` become 0 as well.
        """
        ratio = self.max_grad_norm / squared_norms.double().sqrt() * _ROUND_DOWN[dtype]
        # C / 0 is infinite and stays unclipped; C / inf is 0; NaN fails both comparisons and ends as 0.
        factors = torch.where(ratio >= 1.0, torch.ones_like(ratio), ratio)
        return torch.where(factors >= torch.finfo(dtype).tiny, factors, torch.zeros_like(factors)).to(dtype)

    def group_of(self, name: str) -> str:
        return ""

    def group_factors(self, squared_norms: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        return {"": self.factors(squared_norms[""], dtype)} if squared_norms else {}

    def session(self, entropy: object) -> "FlatClipping":
        return self

    def observe(self, squared_norms: Mapping[str, Tensor]) -> None: ...

    def end_step(self) -> None: ...

    def sensitivity(self) -> float:
        """Return the l2 sensitivity of the sum under add-or-remove-one, rounding included."""
        return self.max_grad_norm * (1.0 + SUM_ROUNDING_ALLOWANCE)


def clip_and_sum(
    grad_samples: Sequence[Tensor],  # each [B, *parameter_shape]
    max_grad_norm: float,
) -> list[Tensor]:  # each parameter_shape, float32 or float64
    """Clip materialised per-record gradients to ``max_grad_norm`` over all tensors, and sum them.

    This is the definition that the book-keeping path computes without materialising anything. A record with
    a non-finite gradient contributes exactly zero and leaves the others unchanged. Sums are taken in float64
    and then rounded; half precision gives float32.

    Raises:
        ValueError: no tensors, a tensor without a record axis, or tensors that disagree on B.
        TypeError: gradients that are not real floating point.
    """
    if not grad_samples:
        raise ValueError("grad_samples is empty: give one tensor [B, *parameter_shape] per parameter")
    if any(grad.ndim == 0 for grad in grad_samples):
        raise ValueError("every tensor of grad_samples needs the record axis first, got a 0-d tensor")
    sizes = {grad.shape[0] for grad in grad_samples}
    if len(sizes) != 1:
        raise ValueError(f"grad_samples disagree on the number of records: {sorted(sizes)}")
    clipping = FlatClipping(max_grad_norm)
    sums = []
    with torch.no_grad():
        squared_norms = torch.stack([_squared_norms(grad) for grad in grad_samples]).sum(0)
        for grad in grad_samples:
            dtype = accumulation_dtype(grad.dtype)
            factors = clipping.factors(squared_norms, dtype)
            sums.append(weighted_record_sum(grad, factors).to(dtype))
    return sums


def weighted_record_sum(grads: Tensor, factors: Tensor) -> Tensor:
    """Sum ``grads`` ``[B, ...]`` over records in float64, each times its factor; 0 leaves a record out."""
    factors = factors.double().reshape(-1, *[1] * (grads.ndim - 1))
    return torch.where(factors > 0, grads.double() * factors, factors.new_zeros(())).sum(0)


def _squared_norms(grad: Tensor) -> Tensor:
    return grad.reshape(grad.shape[0], math.prod(grad.shape[1:])).double().square().sum(1)
