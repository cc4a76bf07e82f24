# SPDX-License-Identifier: Apache-2.0
"""Canaries through the private step itself: its sampler, clipping, sum, noise and optimizer; nothing of its data."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from wavedp.audit.bounds import Floats
from wavedp.audit.canaries import GradientCanaries
from wavedp.errors import InvalidValueError
from wavedp.optim import DPAdam
from wavedp.privacy import PoissonSampler, PrivacySpec, PrivateOptimizer, physical_batches
from wavedp.privacy.clipping import OneGroupClipping
from wavedp.privacy.clipping_adaptive import AdaptiveClipping

OVERSHOOT = 8.0
"""Norm of a canary's gradient over the clipping bound: a step that does not clip shows at once."""
_PHYSICAL_BATCH = 256


@dataclass(frozen=True)
class CanaryScores:
    """What was seen of the canaries of one or more runs; arrays ``[n]``.

    ``scores`` are sums over the steps of the noisy mean along a canary's direction, times the expected batch size and
    over the clipping bound: what a member is expected to have is its ``participations``, and the noise deviation is
    noise multiplier times the square root of ``steps``.
    """

    scores: Floats
    participations: npt.NDArray[np.int64]
    members: npt.NDArray[np.bool_]
    steps: int

    @staticmethod
    def joined(parts: "list[CanaryScores]") -> "CanaryScores":
        """Put the canaries of runs of one mechanism together."""
        return CanaryScores(
            np.concatenate([part.scores for part in parts]),
            np.concatenate([part.participations for part in parts]),
            np.concatenate([part.members for part in parts]),
            parts[0].steps,
        )


def auditable(spec: PrivacySpec, steps: int) -> PrivacySpec:
    """Return the mechanism that an audit of ``steps`` training steps runs: the same without a label histogram.

    Raises:
        ValueError: a clipping rule without one fixed bound over all parameters, or no noise.
    """
    rule = spec.clipping
    if not isinstance(rule, OneGroupClipping) or isinstance(rule, AdaptiveClipping):
        raise InvalidValueError(
            f"the audit knows rules with one fixed bound over all parameters (flat, automatic, normalised), not: "
            f"{rule.describe()}"
        )
    if spec.noise_multiplier == 0.0:
        raise InvalidValueError("noise_multiplier is 0: there is no guarantee to audit")
    return replace(spec, steps=steps, label_noise_multiplier=None)


def check_count(spec: PrivacySpec, canaries: int) -> None:
    """Raise a ValueError unless a data set of so many canaries is one that ``spec`` speaks of, and never cut."""
    if canaries > spec.dataset_size_bound:
        raise InvalidValueError(
            f"{canaries} canaries are more than the run's bound of {spec.dataset_size_bound} records"
        )
    if spec.truncated_batch_size is not None and canaries > spec.truncated_batch_size:
        raise InvalidValueError(
            f"batches of {canaries} canaries could be cut to {spec.truncated_batch_size}, and the measured noise would "
            f"not be the mechanism's: use at most {spec.truncated_batch_size} canaries"
        )


def score_canaries(
    model: nn.Module,
    spec: PrivacySpec,
    canaries: int,
    *,
    progress: Callable[[int], object] | None = None,
    insecure_seed: int | None = None,
) -> CanaryScores:
    """Train ``model`` privately for ``spec.steps`` steps on canaries that are records by fair coins; score them all.

    Each step is that of :class:`~wavedp.privacy.PrivateOptimizer` with :class:`~wavedp.optim.DPAdam`, whose first
    moment, public after every step, tells the noisy mean: ``m_t = beta m_{t-1} + (1 - beta) mean_t``. No ledger is
    charged, since no record is anyone's. The model's parameters change.

    Args:
        progress: called with 1 after every step.
        insecure_seed: for tests: the same coins, coordinates, batches and noise.
    """
    spec = auditable(spec, spec.steps)
    check_count(spec, canaries)
    generator = np.random.default_rng(secrets.randbits(128) if insecure_seed is None else insecure_seed)
    made_up = GradientCanaries(model, canaries, norm=OVERSHOOT * spec.max_grad_norm, generator=generator)
    members = generator.random(canaries) < 0.5
    numbers = torch.from_numpy(np.flatnonzero(members))
    model.train()
    model.zero_grad(set_to_none=True)
    optimizer = DPAdam([p for p in model.parameters() if p.requires_grad])
    (beta, _) = optimizer.param_groups[0]["betas"]
    sampler = PoissonSampler.for_spec(spec, len(numbers), insecure_seed=insecure_seed)
    participations = np.zeros(canaries, dtype=np.int64)
    moments = np.zeros(canaries)
    total = np.zeros(canaries)
    with PrivateOptimizer(model, optimizer, spec, sampler=sampler, insecure_seed=insecure_seed) as private:
        for indices in sampler:
            total += moments
            for chunk in physical_batches(indices, _PHYSICAL_BATCH):
                private.backward(made_up.losses(numbers[chunk]), records=chunk)
            private.step()
            participations[numbers[indices].numpy()] += 1
            moments = made_up.read(optimizer, "exp_avg")
            if progress is not None:
                progress(1)
        private.check_regular()
    # The sum over t of mean_t is m_T / (1 - beta) and all moments before it; the loss falls along the gradient's sign.
    scores = (total + moments / (1.0 - beta)) * spec.expected_batch_size / spec.max_grad_norm
    return CanaryScores(scores, participations, members, spec.steps)
