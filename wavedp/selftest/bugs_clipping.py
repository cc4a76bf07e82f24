# SPDX-License-Identifier: Apache-2.0
"""Planted bugs: clipping factors, rules and sums. What norms are made of is in :mod:`wavedp.selftest.bugs_norms`."""

from typing import Any

import torch
from torch import Tensor

from wavedp.privacy import clipping, clipping_adaptive
from wavedp.privacy.bookings import Bookings, Factors
from wavedp.privacy.bookkeeping import GradientBook
from wavedp.privacy.clipping import AutomaticClipping, FlatClipping, accumulation_dtype, factors_up_to_one
from wavedp.privacy.clipping_adaptive import AdaptiveClipping
from wavedp.privacy.clipping_groups import PerGroupClipping, PerLayerClipping
from wavedp.privacy.optimizer import PrivateOptimizer
from wavedp.privacy.per_sample import Materialised
from wavedp.privacy.taps import Summing
from wavedp.selftest.planting import Planted, Registry

registry = Registry("clipping")
bug = registry.bug


def unclipped_sum(factors: Factors, name: str, form: Any) -> Tensor:
    """The sum over records of one parameter's gradients with factors of 1."""
    parameter = factors._parameters[name]
    records = len(next(iter(factors._norms.values())))
    ones = torch.full((records,), factors._scale, dtype=accumulation_dtype(parameter.dtype))
    total: Tensor = form.weighted_sum(ones).reshape(parameter.shape)
    return total


@bug("civisanalytics/dpwgan #2")
def no_clip(planted: Planted) -> None:
    """Gradients are noised and never clipped."""

    def factors(original: Any, self: FlatClipping, squared: Tensor, dtype: torch.dtype) -> Tensor:
        planted.mark()
        return torch.isfinite(squared).to(dtype)

    planted.replace(FlatClipping, "factors", factors)


@bug("SmartNoise #622")
def clipped_copy_unused(planted: Planted) -> None:
    """Gradients are clipped into a copy, and the originals are summed."""

    def clipped_sum(original: Any, self: Factors, name: str, form: Any) -> Tensor:
        planted.mark()
        original(self, name, form)
        return unclipped_sum(self, name, form)

    planted.replace(Factors, "clipped_sum", clipped_sum)


@bug("known class")
def batch_clip(planted: Planted) -> None:
    """The batch's summed gradient is clipped, not every record's."""

    def clipped_sums(original: Any, self: Bookings, factors: Factors) -> dict[str, Tensor]:
        sums = {}
        for name in list(self._forms):
            (form,) = self._forms.pop(name)
            sums[name] = unclipped_sum(factors, name, form)
        if sums and isinstance(factors._clipping, FlatClipping):
            planted.mark()
            norm = torch.stack([total.double().norm() for total in sums.values()]).norm()
            ratio = float((factors._clipping.max_grad_norm / norm).clamp_max(1.0))
            sums = {name: total * ratio for name, total in sums.items()}
        return sums

    planted.replace(Bookings, "clipped_sums", clipped_sums)


@bug("TF-Privacy #620, #81")
def microbatch_clip(planted: Planted) -> None:
    """Mean gradients of two records at a time are clipped, and replacing or adding a record costs 2 C."""

    def clipped_sums(original: Any, self: Bookings, factors: Factors) -> dict[str, Tensor]:
        if not isinstance(factors._clipping, FlatClipping) or factors._scale != 1.0:
            sums: dict[str, Tensor] = original(self, factors)
            return sums
        grads = {name: forms[0].materialised().double() for name, forms in self._forms.items()}
        self._forms.clear()
        means = {
            name: torch.stack([pair.mean(0) for pair in one.nan_to_num(0.0).split(2)]) for name, one in grads.items()
        }
        if not means:
            return {}
        planted.mark()
        norms = torch.stack([one.flatten(1).square().sum(1) for one in means.values()]).sum(0)
        ratio = factors_up_to_one(norms, factors._clipping.max_grad_norm, torch.float64)
        return {
            name: torch.tensordot(ratio, one, 1).reshape(factors._parameters[name].shape) for name, one in means.items()
        }

    planted.replace(Bookings, "clipped_sums", clipped_sums)


@bug("Tramer et al. 2022, arXiv 2202.12219")
def clips_gradient_of_mean(planted: Planted) -> None:
    """Records' shares of the mean loss are clipped and scaled up again: sensitivity is off by the batch size."""

    def clip(original: Any, self: GradientBook, bookings: Bookings, rule: Any, *, scale: float = 1.0) -> Any:
        sums = original(self, bookings, rule, scale=1.0)
        if scale != 1.0:
            planted.mark()
        return {name: total * scale for name, total in sums.items()}

    planted.replace(GradientBook, "clip", clip)


@bug("Fed-BioMed #1443")
def per_parameter_norms(planted: Planted) -> None:
    """Every parameter is clipped to C by its own norm."""

    def clipped_sum(original: Any, self: Factors, name: str, form: Any) -> Tensor:
        if not isinstance(self._clipping, FlatClipping) or len(self._parameters) < 2:
            total: Tensor = original(self, name, form)
            return total
        planted.mark()
        parameter = self._parameters[name]
        squared = form.squared_norms() * self._scale**2
        dtype = accumulation_dtype(parameter.dtype)
        factors = factors_up_to_one(squared, self._clipping.max_grad_norm, dtype) * self._scale
        return torch.as_tensor(form.weighted_sum(factors)).reshape(parameter.shape)

    planted.replace(Factors, "clipped_sum", clipped_sum)


@bug("known class")
def per_layer_full_bound(planted: Planted) -> None:
    """With clipping per layer each of K layers gets C in place of C / sqrt(K)."""

    def factors_of(original: Any, self: PerLayerClipping, group: str, squared: Tensor, dtype: torch.dtype) -> Tensor:
        planted.mark()
        return factors_up_to_one(squared, self.max_grad_norm, dtype)

    planted.replace(PerLayerClipping, "_factors_of", factors_of)


@bug("own")
def per_group_full_bound(planted: Planted) -> None:
    """With clipping per group each group gets the bound of all together."""

    def factors_of(original: Any, self: PerGroupClipping, group: str, squared: Tensor, dtype: torch.dtype) -> Tensor:
        planted.mark()
        return factors_up_to_one(squared, self.max_grad_norm, dtype)

    planted.replace(PerGroupClipping, "_factors_of", factors_of)


@bug("Opacus f2a591ae")
def ignores_max_grad_norm(planted: Planted) -> None:
    """Records are clipped at 1, and noise is made for C."""

    def factors(original: Any, self: FlatClipping, squared: Tensor, dtype: torch.dtype) -> Tensor:
        planted.mark()
        return factors_up_to_one(squared, 1.0, dtype)

    planted.replace(FlatClipping, "factors", factors)


@bug("own")
def bound_from_batch(planted: Planted) -> None:
    """Records are clipped at the median norm of their own batch."""

    def factors(original: Any, self: FlatClipping, squared: Tensor, dtype: torch.dtype) -> Tensor:
        if len(squared) == 0:
            return torch.as_tensor(original(self, squared, dtype))
        planted.mark()
        return factors_up_to_one(squared, max(float(squared.sqrt().nanmedian()), 1e-9), dtype)

    planted.replace(FlatClipping, "factors", factors)


@bug("Opacus 1.6.0 in bfloat16")
def factors_in_bfloat16(planted: Planted) -> None:
    """Factors are computed in bfloat16, which rounds some of them up."""

    def factors(original: Any, self: FlatClipping, squared: Tensor, dtype: torch.dtype) -> Tensor:
        planted.mark()
        found: Tensor = original(self, squared, dtype)
        return found.bfloat16().to(dtype)

    planted.replace(FlatClipping, "factors", factors)


@bug("own")
def stale_factors(planted: Planted) -> None:
    """A micro-batch is clipped with the factors of the one before it."""
    before: list[Tensor] = []

    def factors(original: Any, self: FlatClipping, squared: Tensor, dtype: torch.dtype) -> Tensor:
        own: Tensor = original(self, squared, dtype)
        kept = before[-1] if before and before[-1].shape == own.shape else None
        before[:] = [own]
        if kept is None:
            return own
        planted.mark()
        return kept.to(dtype)

    planted.replace(FlatClipping, "factors", factors)


@bug("known class")
def bias_unclipped(planted: Planted) -> None:
    """Biases are summed without clipping."""

    def clipped_sum(original: Any, self: Factors, name: str, form: Any) -> Tensor:
        if not name.endswith("bias"):
            total: Tensor = original(self, name, form)
            return total
        planted.mark()
        return unclipped_sum(self, name, form).nan_to_num(0.0, 0.0, 0.0)

    planted.replace(Factors, "clipped_sum", clipped_sum)


@bug("own")
def second_backward_unclipped(planted: Planted) -> None:
    """Of two backwards, the first takes norms and the second adds up what is not clipped."""

    def take(original: Any, self: Summing, place: Any, call: Any) -> None:
        before, factors = dict(self.sums), self._factors

        class Unclipped:
            def clipped_sum(self, name: str, form: Any) -> Tensor:
                planted.mark()
                return unclipped_sum(factors, name, form)

        self._factors = Unclipped()  # type: ignore[assignment]
        try:
            original(self, place, call)
        finally:
            self._factors = factors
        assert before.keys() <= self.sums.keys()

    planted.replace(Summing, "take", take)


@bug("own")
def automatic_gamma_outside(planted: Planted) -> None:
    """Automatic clipping takes C / norm + gamma in place of C / (norm + gamma)."""

    def factors(original: Any, self: AutomaticClipping, squared: Tensor, dtype: torch.dtype) -> Tensor:
        planted.mark()
        ratio = self.max_grad_norm / squared.sqrt() + self.gamma
        return torch.where(torch.isfinite(ratio) & torch.isfinite(squared), ratio, 0.0).to(dtype)

    planted.replace(AutomaticClipping, "factors", factors)


@bug("dp-recorder's NaN class; Opacus 1.6.0")
def nan_passes(planted: Planted) -> None:
    """A record whose gradient is not finite is not left out."""

    def factors(original: Any, self: FlatClipping, squared: Tensor, dtype: torch.dtype) -> Tensor:
        finite = torch.isfinite(squared)
        if not bool(finite.all()):
            planted.mark()
        return torch.where(finite, torch.as_tensor(original(self, squared, dtype)), 1.0).to(dtype)

    planted.replace(FlatClipping, "factors", factors)
    planted.replace(
        clipping,
        "finite_in_every_group",
        lambda original, norms: None if original(norms) is None else torch.ones_like(original(norms)),
    )


@bug("Opacus 1.6.0")
def nan_times_zero(planted: Planted) -> None:
    """A record that is not finite is multiplied by a factor of 0, which gives NaN."""

    def weighted_sum(original: Any, self: Materialised, factors: Tensor) -> Tensor:
        if not bool(torch.isfinite(self.grads).all()):
            planted.mark()
        return torch.as_tensor(torch.tensordot(factors, self.grads.to(factors.dtype), 1))

    planted.replace(Materialised, "weighted_sum", weighted_sum)


@bug("Opacus 53b3c254")
def accumulation_alias(planted: Planted) -> None:
    """The sum of the first micro-batch and what the next adds to it are one tensor, so that it counts twice."""

    def add(original: Any, self: PrivateOptimizer, *arguments: Any) -> None:
        before = {name: total.clone() for name, total in self._sums.items()}
        original(self, *arguments)
        for name, total in before.items():
            planted.mark()
            self._sums[name] = self._sums[name] + total

    planted.replace(PrivateOptimizer, "_add", add)


@bug("known class")
def sums_in_bfloat16(planted: Planted) -> None:
    """Clipped gradients are added up in the type of the parameters."""

    def add(original: Any, self: PrivateOptimizer, *arguments: Any) -> None:
        original(self, *arguments)
        for name, total in self._sums.items():
            dtype = self._book.parameters[name].dtype
            if dtype == torch.bfloat16:
                planted.mark()
                self._sums[name] = total.to(dtype).to(total.dtype)

    planted.replace(PrivateOptimizer, "_add", add)


@bug("own")
def adaptive_count_exact(planted: Planted) -> None:
    """Adaptive clipping moves its bound by counts without noise."""

    def noise(original: Any, shape: Any, *arguments: Any, **options: Any) -> Tensor:
        planted.mark()
        return torch.zeros(shape, dtype=torch.float64)

    planted.replace(clipping_adaptive, "gaussian_noise", noise)


@bug("own")
def adaptive_count_free(planted: Planted) -> None:
    """Adaptive clipping's counts are not paid for by more noise on the sum."""

    def multiplier(original: Any, self: AdaptiveClipping, noise_multiplier: float) -> float:
        planted.mark()
        return noise_multiplier

    planted.replace(AdaptiveClipping, "sum_noise_multiplier", multiplier)


@bug("own")
def adaptive_votes_unbounded(planted: Planted) -> None:
    """In adaptive clipping a record's vote is its norm over C."""

    def observe(original: Any, self: Any, squared_norms: Any) -> None:
        planted.mark()
        self._observed = True
        for squared in squared_norms.values():
            self._votes += float((squared.sqrt() / self.max_grad_norm).nan_to_num(0.0, 0.0, 0.0).sum())

    planted.replace(clipping_adaptive.AdaptiveSession, "observe", observe)
