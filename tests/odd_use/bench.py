# SPDX-License-Identifier: Apache-2.0
"""A private step without noise on a small model, done in an odd way, beside what a loop over the records gives."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wavedp import PrivacyEngine
from wavedp.privacy import EngineOptimizer, PoissonSampler, PrivacySpec, PrivateOptimizer, clip_and_sum

RECORDS, EXPECTED, BOUND = 6, 8.0, 0.5

Sums = dict[str, Tensor]


class Net(nn.Module):
    """Two layers that are used, one that is not, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.second(torch.tanh(self.first(x))))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().double()


def inputs(records: int = RECORDS, seed: int = 1) -> Tensor:
    return torch.randn(records, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def losses_of(model: nn.Module, x: Tensor) -> Tensor:  # [B]
    return model(x).square().sum(1)


def clipped_by_loop(model: nn.Module, x: Tensor, bound: float = BOUND, scale: float = 1.0) -> Sums:
    """The definition: one backward for each record, on a copy; parameters without a gradient have zeros."""
    subject = copy.deepcopy(model)
    rows: dict[str, list[Tensor]] = {name: [] for name, p in subject.named_parameters() if p.requires_grad}
    for i in range(len(x)):
        subject.zero_grad()
        (losses_of(subject, x[i : i + 1]).sum() * scale).backward()
        for name, p in subject.named_parameters():
            if p.requires_grad:
                rows[name].append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
    return dict(zip(rows, clip_and_sum([torch.stack(grads) for grads in rows.values()], bound)))


def assert_close(got: Sums, expected: Sums) -> None:
    scale = torch.stack([value.norm() for value in expected.values()]).norm()
    for name, value in expected.items():
        assert (got[name] - value).norm() <= 1e-9 * scale, name


def specification(**changes: Any) -> PrivacySpec:
    fields: dict[str, Any] = {
        "sample_rate": 0.25,
        "steps": 20,
        "noise_multiplier": 0.0,
        "max_grad_norm": BOUND,
        "expected_batch_size": EXPECTED,
        "delta": 1e-3,
        "dataset_size_bound": 100,
    }
    return PrivacySpec(**{**fields, **changes})


@dataclass
class Bench:
    """A model made private, with a batch for it; ``loss.backward()`` and ``optimizer.step()`` as in any loop."""

    model: Net = field(default_factory=net)
    x: Tensor = field(default_factory=inputs)
    options: dict[str, Any] = field(default_factory=dict)  # of torch.optim.SGD
    settings: dict[str, Any] = field(default_factory=dict)  # of make_private_with_spec
    inner: torch.optim.Optimizer | None = None

    def __post_init__(self) -> None:
        if self.inner is None:
            self.inner = torch.optim.SGD(self.model.parameters(), lr=1.0, **self.options)
        self.engine = PrivacyEngine()
        _, made, _ = self.engine.make_private_with_spec(
            spec=specification(),
            module=self.model,
            optimizer=self.inner,
            data_loader=None,
            without_privacy=True,
            **self.settings,
        )
        self.optimizer: EngineOptimizer = made
        self.remember()

    @property
    def private(self) -> PrivateOptimizer:
        return self.optimizer.private

    def remember(self) -> None:
        self.before = {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def backward(self, **options: Any) -> Tensor:
        loss = losses_of(self.model, self.x).mean()
        loss.backward(**options)
        return loss

    def moved(self) -> Sums:
        """By how much the step moved the parameters, times the expected batch size: the clipped sums."""
        return {name: (self.before[name] - p.detach()) * EXPECTED for name, p in self.model.named_parameters()}

    def check_exact(self, x: Tensor | None = None) -> None:
        """The step was that of the clipped gradients of ``x`` at the weights before it, and no other weight moved."""
        reference = net()
        reference.load_state_dict(self.before)
        assert_close(self.moved(), clipped_by_loop(reference, self.x if x is None else x))
        assert torch.equal(self.model.frozen.weight, self.before["frozen.weight"])
        assert not self.private.pending


# With noise and a sampler: steps that count and batches that are drawn

SAMPLED_RECORDS = 40


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1.0)


def noisy(**changes: Any) -> PrivacySpec:
    return specification(**{"noise_multiplier": 1.0, "steps": 24, **changes})


def sampled(
    model: nn.Module, spec: PrivacySpec, records: int = SAMPLED_RECORDS, **options: Any
) -> tuple[PrivateOptimizer, PoissonSampler]:
    left = options["ledger"].remaining if "ledger" in options else None
    sampler = PoissonSampler.for_spec(spec, records, steps=left)
    return PrivateOptimizer(model, sgd(model), spec, sampler=sampler, **options), sampler
