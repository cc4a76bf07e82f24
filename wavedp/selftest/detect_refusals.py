# SPDX-License-Identifier: Apache-2.0
"""What has to be refused is refused: records, batches, layers, steps and statements that break the mechanism."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wavedp.privacy import (
    PoissonSampler,
    PrivacySpec,
    PrivacyStatement,
    PrivateOptimizer,
)
from wavedp.selftest.alarms import require, require_refusal
from wavedp.selftest.cases import Recorder, specification

_RECORDS = 6


class Run:
    """A private run of a small Linear layer over six records, each of which is in every batch."""

    def __init__(self, *, steps: int = 4, seed: int | None = None, plain: bool = False, **changes: Any) -> None:
        self.spec = specification(sample_rate=1.0, steps=steps, **changes)
        self.model: nn.Module = nn.Linear(2, 1)
        self.recorder = Recorder(self.model.parameters())
        self.sampler = PoissonSampler.for_spec(self.spec, _RECORDS)
        self.batches = iter(self.sampler)
        self.private = PrivateOptimizer(
            self.model,
            self.recorder,
            self.spec,
            sampler=self.sampler,
            insecure_seed=seed,
            loss_reduction="mean" if plain else None,
        )

    def losses(self, records: Tensor) -> Tensor:
        return torch.as_tensor(self.model(torch.ones(len(records), 2)).square().sum(1))

    def draw(self) -> Tensor:
        return next(self.batches)

    def step(self) -> None:
        batch = self.draw()
        self.private.backward(self.losses(batch), records=batch)
        self.private.step()


@contextmanager
def running(**options: Any) -> Iterator[Run]:
    run = Run(**options)
    with run.private:
        yield run


def detect(seed: int) -> None:
    torch.manual_seed(seed)
    for check in (records, batches, plain_backwards, steps, statements, layers, written_buffers, specifications):
        check()


def records() -> None:
    spec = specification(sample_rate=2.0**-40)
    sampler = PoissonSampler.for_spec(spec, _RECORDS)
    model = nn.Linear(2, 1)
    with PrivateOptimizer(model, Recorder(model.parameters()), spec, sampler=sampler) as private:
        next(iter(sampler))
        require_refusal(
            "a record that was not drawn",
            lambda: private.backward(model(torch.ones(1, 2)).sum(1), records=torch.tensor([3])),
        )
    with running() as run:
        batch = run.draw()
        twice = torch.cat([batch[:1], batch[:1]])
        backward = run.private.backward
        require_refusal("a record twice in one micro-batch", lambda: backward(run.losses(twice), records=twice))
        require_refusal("a record that is not in the data set", lambda: backward(run.losses(twice), records=twice + 90))
        backward(run.losses(batch[:4]), records=batch[:4])
        require_refusal(
            "a record in two micro-batches of a batch", lambda: backward(run.losses(batch[:2]), records=batch[:2])
        )
        require_refusal("a batch without some of its records", run.private.step)
        backward(run.losses(batch[4:]), records=batch[4:])
        run.private.step()


def batches() -> None:
    with running() as run:
        require_refusal("a step before a batch was drawn", run.private.step)
        run.draw()
        run.draw()
        require_refusal("a step after a batch was passed over", run.private.step)
        reason = run.private.irregularity()
        require(reason is not None, "a run that passed over a batch counts as regular")

    class Another(PoissonSampler):
        pass

    spec = specification()
    model = nn.Linear(2, 1)
    used = PoissonSampler.for_spec(spec, _RECORDS)
    next(iter(used))
    for what, sampler in {
        "a sampler of another rate": PoissonSampler(_RECORDS, 0.3, 20),
        "a sampler of a subclass": Another(_RECORDS, 0.1, 20),
        "a sampler of more steps": PoissonSampler(_RECORDS, 0.1, 21),
        "a sampler that cuts batches": PoissonSampler(_RECORDS, 0.1, 20, truncated_batch_size=3),
        "a sampler that has drawn": used,
    }.items():
        require_refusal(
            what,
            lambda s=sampler: PrivateOptimizer(model, Recorder(model.parameters()), spec, sampler=s),  # type: ignore[misc]
        )
    require_refusal("a data set beyond its bound", lambda: PoissonSampler.for_spec(spec, 10_001))


def plain_backwards() -> None:
    with running(plain=True) as run:
        batch = run.draw()

        def backward() -> None:
            torch.autograd.backward(run.losses(batch).mean())

        run.private.announce(batch)
        backward()
        require_refusal("a second backward of the same batch", backward)


def steps() -> None:
    with running() as run:
        batch = run.draw()
        run.private.backward(run.losses(batch), records=batch)
        require_refusal("a closure", lambda: run.private.step(lambda: None))
        require_refusal("a step of the wrapped optimizer", run.recorder.step)
        run.private.step()
        require_refusal("a second step of a batch", run.private.step)
        require(len(run.recorder.seen) == 1, f"one batch made {len(run.recorder.seen)} steps")
    with running(steps=2) as run:
        for _ in range(2):
            run.step()
        require_refusal("a step beyond the plan", run.private.step)
    model = nn.Linear(2, 1)
    with PrivateOptimizer(model, Recorder(model.parameters()), specification(steps=2)) as private:
        private.step()
        private.step()
        require_refusal("a step beyond the plan", private.step)


def statements() -> None:
    def state(run: Run) -> Callable[[], Any]:
        return lambda: PrivacyStatement.from_run(run.private)

    with running(noise_multiplier=20.0) as run:
        require_refusal("a statement before any step", state(run))
        run.step()
        statement = PrivacyStatement.from_run(run.private)
        require(
            statement.steps_charged == 1
            and statement.noise_multiplier == 20.0
            and statement.sample_rate == 1.0
            and math.isclose(statement.epsilon, run.spec.epsilon(), rel_tol=1e-12),
            "a statement is not about its run",
        )
        run.draw()
        run.private.discard()
        run.step()
        require_refusal("a statement after a batch was left out", state(run))
    with running(seed=3, noise_multiplier=20.0) as run:
        run.step()
        require_refusal("a statement of noise from a seed", state(run))
    model = nn.Linear(2, 1)
    with PrivateOptimizer(model, Recorder(model.parameters()), specification()) as private:
        private.step()
        require_refusal("a statement without a sampler", lambda: PrivacyStatement.from_run(private))


class Centred(nn.Module):
    """Subtracts the batch's mean: what batch statistics and in-batch negatives do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return torch.as_tensor(h - h.mean(0))


def layers() -> None:
    def attach(model: nn.Module) -> PrivateOptimizer:
        return PrivateOptimizer(model, Recorder(model.parameters()), specification())

    require_refusal("batch normalisation", lambda: attach(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))))
    model = Centred()
    with attach(model) as private:
        require_refusal(
            "losses that depend on other records",
            lambda: private.backward(model(torch.randn(4, 2)).square().sum(1), records=torch.arange(4)),
        )
    model = Centred()
    with attach(model) as private:

        def aside() -> None:
            losses = model.layer(torch.randn(4, 2)).square().sum(1) + model.layer.weight.sum()
            private.backward(losses, records=torch.arange(4))

        require_refusal("a parameter used where it is not booked", aside)


class Counting(nn.Module):
    """Keeps a running mean of its inputs in a saved buffer."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.lerp_(x.detach().mean(0), 0.1)
        return torch.as_tensor(self.layer(x))


def written_buffers() -> None:
    model = Counting()
    with PrivateOptimizer(model, Recorder(model.parameters()), specification()) as private:

        def step() -> None:
            private.backward(model(torch.randn(4, 2)).square().sum(1), records=torch.arange(4))
            private.step()

        require_refusal("statistics of the records in a saved buffer", step)


def specifications() -> None:
    require_refusal("a delta above 1 / (number of records)", lambda: specification(delta=2e-4))
    require_refusal("a delta of 1 / (number of records)", lambda: specification(delta=1e-4))
    for name, value in {
        "sample_rate": 1.5,
        "noise_multiplier": math.nan,
        "max_grad_norm": 0.0,
        "steps": 0,
        "expected_batch_size": 0.0,
        "neighboring_relation": "replace_one",
    }.items():
        require_refusal(f"{name}={value}", lambda n=name, v=value: specification(**{n: v}))  # type: ignore[misc]
    silent = specification(noise_multiplier=0.0)
    require_refusal("a run without noise", lambda: _attach(silent))
    require(silent.epsilon() == math.inf, f"a run without noise has epsilon {silent.epsilon():.3g}")


def _attach(spec: PrivacySpec) -> None:
    model = nn.Linear(2, 1)
    PrivateOptimizer(model, Recorder(model.parameters()), spec)
