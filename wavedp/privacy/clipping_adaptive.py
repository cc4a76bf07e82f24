# SPDX-License-Identifier: Apache-2.0
"""Flat clipping whose bound follows a quantile of the records' norms, at a price that is accounted for.

Andrew et al. 2021 (arXiv 1905.03871). Every step also releases, with noise of its own, how many records of the
batch have a norm of at most C, and moves C towards the target quantile by what it released.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wavedp.errors import InvalidValueError, StateError
from wavedp.privacy.clipping import FLAT_GROUP, Clipping, FlatClipping, OneGroupClipping, finite_in_every_group
from wavedp.privacy.entropy import Entropy
from wavedp.privacy.noise import gaussian_noise, grid_step, round_to_grid
from wavedp.privacy.validation import check_integer, check_real

SMALLEST_BOUND, LARGEST_BOUND = 1e-9, 1e9
"""The range that C stays in."""

DEFAULT_COUNT_NOISE = 1.0 / 20.0
"""Default deviation of the count's noise, as a share of the expected batch size, as in the paper."""


def noise_multiplier_beside_count(noise_multiplier: float, count_noise_stddev: float) -> float:
    """Return the sum's noise multiplier ``z_delta`` when sum and count together are to cost what ``z`` costs.

    ``z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2)`` (Theorem 1 of the paper): one record moves the sum by at most one
    sensitivity and the votes by at most 1/2, so in units of their noise both together by
    ``sqrt(z_delta^-2 + (2 sigma_b)^-2) = 1 / z``, as in one Gaussian mechanism with multiplier z.

    Args:
        noise_multiplier: z, at least 0; 0 (no noise on the sum) gives 0.
        count_noise_stddev: ``sigma_b``, above z / 2.

    Raises:
        TypeError, ValueError: an argument of a wrong type or out of range.
    """
    z = check_real("noise_multiplier", noise_multiplier, at_least=0.0)
    sigma = check_real("count_noise_stddev", count_noise_stddev, above=0.0)
    if z >= 2.0 * sigma:
        raise InvalidValueError(
            f"count_noise_stddev={sigma:.6g} must be above noise_multiplier / 2 = {z / 2:.6g}: with less noise the "
            f"count alone costs more than the whole step may; a few times the noise multiplier is usual"
        )
    return z / math.sqrt(1.0 - (z / (2.0 * sigma)) ** 2)


@dataclass(frozen=True)
class AdaptiveClipping(OneGroupClipping):
    """Clip each record's whole gradient to C, which starts at ``max_grad_norm`` and follows a quantile.

    The rule itself clips at the initial C; :meth:`session` makes the object that moves it.

    Attributes:
        max_grad_norm: the initial C, in [1e-9, 1e9].
        expected_batch_size: the public number that the noised votes are divided by, above 0.
        target_quantile: share of the records whose norm should be at most C, in [0, 1].
        learning_rate: eta, above 0.
        count_noise_stddev: ``sigma_b``, above half the noise multiplier; ``expected_batch_size / 20`` if ``None``.
    """

    expected_batch_size: float
    target_quantile: float = 0.5
    learning_rate: float = 0.2
    count_noise_stddev: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        size = check_real("expected_batch_size", self.expected_batch_size, above=0.0)
        noise = DEFAULT_COUNT_NOISE * size if self.count_noise_stddev is None else self.count_noise_stddev
        checked = {
            "expected_batch_size": size,
            "target_quantile": check_real("target_quantile", self.target_quantile, at_least=0.0, at_most=1.0),
            "learning_rate": check_real("learning_rate", self.learning_rate, above=0.0, at_most=10.0),
            "count_noise_stddev": check_real("count_noise_stddev", noise, above=0.0),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def factors(self, squared_norms: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``min(1, C / norm)`` for the initial C, as :meth:`FlatClipping.factors`."""
        return FlatClipping(self.max_grad_norm).factors(squared_norms, dtype)

    def sum_noise_multiplier(self, noise_multiplier: float) -> float:
        return noise_multiplier_beside_count(noise_multiplier, self._count_noise)

    def session(self, entropy: Entropy) -> "AdaptiveSession":
        return AdaptiveSession(self, entropy)

    def describe(self) -> str:
        return (
            f"adaptive: factor min(1, C / norm) over all parameters; C starts at {self.max_grad_norm:.6g} and is "
            f"multiplied after every step by exp(-{self.learning_rate:.6g} (noised fraction of norms <= C - "
            f"{self.target_quantile:.6g}))"
        )

    def extra_charge(self, noise_multiplier: float) -> str | None:
        return (
            f"every step also releases the count of norms <= C, as votes of +-1/2 with noise of deviation "
            f"{self._count_noise:.6g}; epsilon covers both, because the sum's own noise multiplier is "
            f"{self.sum_noise_multiplier(noise_multiplier):.6g} in place of {noise_multiplier:.6g}; C is public"
        )

    @property
    def _count_noise(self) -> float:
        assert self.count_noise_stddev is not None  # filled by __post_init__
        return self.count_noise_stddev


class AdaptiveSession(Clipping):
    """The moving bound of one run: :meth:`observe` every micro-batch, :meth:`end_step` every logical batch.

    Every record votes +1/2 if its norm is at most C, -1/2 if it is larger, and 0, like its contribution, if it is
    not finite, so that one record moves the sum of votes by at most 1/2. The release is
    ``fraction = 1/2 + (votes + N(0, sigma_b^2)) / expected_batch_size``, rounded to a public grid before the division;
    the realised batch size appears nowhere, and an empty batch is no exception. Then
    ``C <- C exp(-learning_rate (fraction - target_quantile))``, within [1e-9, 1e9].

    C is made from noised releases alone and is public. It is the same for all micro-batches of a logical batch. A
    batch that is not released must be forgotten by :meth:`drop_step`, or its records would vote twice. A norm that
    equals C to the last bits may vote otherwise beside other records, where their number changes its rounding: a
    floating-point caveat, as for the sums.
    """

    def __init__(self, rule: AdaptiveClipping, entropy: Entropy) -> None:
        self.rule = rule
        self._entropy = entropy
        self._clipping = FlatClipping(rule.max_grad_norm)
        self._steps = 0
        self._votes = 0.0
        self._observed = False

    @property
    def max_grad_norm(self) -> float:
        """The current C."""
        return self._clipping.max_grad_norm

    def group_of(self, name: str) -> str:
        return FLAT_GROUP

    def sensitivity(self) -> float:
        return self._clipping.sensitivity()

    def describe(self) -> str:
        return self.rule.describe()

    def sum_noise_multiplier(self, noise_multiplier: float) -> float:
        return self.rule.sum_noise_multiplier(noise_multiplier)

    def extra_charge(self, noise_multiplier: float) -> str | None:
        return self.rule.extra_charge(noise_multiplier)

    def observe(self, squared_norms: Mapping[str, Tensor]) -> None:
        if set(squared_norms) - {FLAT_GROUP}:
            raise InvalidValueError(f"adaptive clipping has one group, {FLAT_GROUP!r}; got {sorted(squared_norms)}")
        self._observed = True
        finite = finite_in_every_group(squared_norms)
        if finite is not None:
            below = squared_norms[FLAT_GROUP].double().sqrt() <= self.max_grad_norm
            votes = torch.where(below, 0.5, -0.5).double() * finite
            self._votes += float(votes.sum())  # exact: halves, far below 2^52

    def end_step(self) -> None:
        sigma = self.rule._count_noise
        noise = gaussian_noise((1,), sigma, dtype=torch.float64, entropy=self._entropy)
        released = round_to_grid(noise + self._votes, grid_step(sigma)).item()
        self.drop_step()
        fraction = 0.5 + released / self.rule.expected_batch_size
        # In logarithms, so that no fraction overflows.
        step = -self.rule.learning_rate * (fraction - self.rule.target_quantile)
        log_bound = math.log(self.max_grad_norm) + step
        log_bound = min(max(log_bound, math.log(SMALLEST_BOUND)), math.log(LARGEST_BOUND))
        self._clipping = FlatClipping(min(max(math.exp(log_bound), SMALLEST_BOUND), LARGEST_BOUND))
        self._steps += 1

    def drop_step(self) -> None:
        self._votes = 0.0
        self._observed = False

    def state_dict(self) -> dict[str, Any]:
        """Return the current C and the steps that moved it, never votes."""
        return {"max_grad_norm": self.max_grad_norm, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._observed:
            raise StateError("a logical batch is under way: call end_step() or drop_step() first")
        if not isinstance(state, Mapping) or set(state) != {"max_grad_norm", "steps"}:
            raise InvalidValueError(
                "not the state_dict of adaptive clipping, which has the keys max_grad_norm and steps"
            )
        clipping, steps = FlatClipping(state["max_grad_norm"]), check_integer("steps", state["steps"])
        self._clipping, self._steps = clipping, steps

    def _factors_of(self, group: str, squared_norms: Tensor, dtype: torch.dtype) -> Tensor:
        return self._clipping._factors_of(group, squared_norms, dtype)
