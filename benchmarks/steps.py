# SPDX-License-Identifier: Apache-2.0
"""A benchmark case that is a whole training step, and when a private step is right.

Every trainer gets its own copy of one model, of one optimizer and the same batch. Before it is timed it takes one step
without noise, and the gradient that its optimizer saw is compared with a loop over the records in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from wavedp.benchmarks import memory
from wavedp.benchmarks.registry import Progress, Shape, Timed, WrongResult, silent

Batch = tuple[Tensor, ...]
Step = Callable[[Batch], object]

FLOOR = "non-private"

# Largest accepted error of one parameter's gradient, relative to its norm. In float32 it is that of norms added up in
# float32 over millions of entries; in bfloat16 mostly that of activations, which no trainer is to blame for.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Mechanism:
    """What a private step does to the records' gradients: flat clipping, Gaussian noise, a mean."""

    expected_batch_size: int  # what the noisy sum is divided by
    max_grad_norm: float = 1.0
    noise_multiplier: float = 1.0  # 0: the step is checked


@dataclass(frozen=True)
class Workload:
    """A model and a batch for it."""

    shape: Shape  # [B, T]
    model: Callable[[], nn.Module]  # whose forward takes the batch and returns losses [B], one a record
    batch: Callable[[], Batch]
    dtype: torch.dtype = torch.float32  # of the arithmetic; parameters are float32


@dataclass(frozen=True)
class Trainer:
    """One way to take steps with a model and an optimizer.

    ``prepare(model, optimizer, mechanism)`` may change the model's layers, and returns the step that is timed.
    """

    prepare: Callable[[nn.Module, torch.optim.Optimizer, Mechanism], Step]
    private: bool = True
    may_refuse: bool = True  # a library that raises on a model is left out, with its reason


def make_optimizer(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The same for all, torch's fastest: the less the step itself costs, the more what is added to it shows."""
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


@dataclass(frozen=True)
class StepCase:
    """One training step and those that take it; the floor is the step without privacy."""

    name: str
    trainers: Callable[[torch.device], Mapping[str, Trainer]]
    sizes: Mapping[str, Sequence[Workload]]
    floors: ClassVar[tuple[str, ...]] = (FLOOR,)
    paired: ClassVar[bool] = True

    def providers(self, size: Workload, device: torch.device) -> Mapping[str, Trainer]:
        return self.trainers(device)

    def timed(
        self,
        size: Workload,
        device: torch.device,
        *,
        quick: bool,
        progress: Progress = silent,
        only: str | None = None,
    ) -> dict[str, Timed]:
        """See ``registry.Benchmark``. With ``quick``, memory is not measured."""
        model, batch = make_model(size, device), make_batch(size, device)
        progress("expected gradients")
        checks = {False: mean_gradient(model, batch), True: clipped_mean(model, batch)}
        booked = booked_bytes(model, batch)
        found = {}
        for name, trainer in self.trainers(device).items():
            if only not in (None, name):
                continue
            progress(f"check {name}")
            max_grad_norm, expected = checks[trainer.private]
            try:
                got = step_gradient(trainer, model, batch, Mechanism(len(batch[0]), max_grad_norm, 0.0))
            except Exception as error:
                if not trainer.may_refuse:
                    raise
                reason = str(error).partition("\n")[0]
                progress(f"{name} is left out: {type(error).__name__}: {reason:.80}", keep=True)
                continue
            check_gradient(f"{self.name}, {name}", got, expected, TOLERANCE[size.dtype])
            del got
            progress(f"memory of {name}")
            step = take_steps(trainer, copy.deepcopy(model), batch)
            peak = None if quick else memory.peak_bytes(self.name, name, size.shape, device, step)
            # Two calls here and one that counts calls: then each sample, after an untimed call, is of an odd step. What
            # a trainer does at steps 1, 2, 4, 8, ... alone, as this package looks for mixed records, is not sampled.
            step()
            step()
            found[name] = Timed(step, FLOOR, peak_bytes=peak, booked_bytes=booked)
        return found


def make_model(size: Workload, device: torch.device) -> nn.Module:
    """The same weights each time; the caller's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return size.model().to(device).train()


def make_batch(size: Workload, device: torch.device) -> Batch:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return tuple(x.to(device) for x in size.batch())


def take_steps(trainer: Trainer, model: nn.Module, batch: Batch) -> Callable[[], object]:
    """What is timed: a private step of ``model`` with noise."""
    optimizer = make_optimizer(list(model.parameters()))
    return partial(trainer.prepare(model, optimizer, Mechanism(len(batch[0]))), batch)


def step_gradient(trainer: Trainer, model: nn.Module, batch: Batch, mechanism: Mechanism) -> list[Tensor]:
    """What the optimizer gets for each parameter in one step of a copy of ``model``."""
    model = copy.deepcopy(model)
    parameters = list(model.parameters())
    optimizer = make_optimizer(parameters)
    step = trainer.prepare(model, optimizer, mechanism)
    seen: list[Tensor] = []

    def see(*_: object) -> None:
        seen.extend(torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in parameters)

    handle = optimizer.register_step_pre_hook(see)
    step(batch)
    handle.remove()
    return seen


def mean_gradient(model: nn.Module, batch: Batch) -> tuple[float, list[Tensor]]:
    """The gradient of the mean loss in float64; no bound."""
    model, batch = in_float64(model), widened(batch)
    return 0.0, gradients(model, model(*batch).mean())


def clipped_mean(model: nn.Module, batch: Batch) -> tuple[float, list[Tensor]]:
    """A bound that clips half of the records, and the mean of the clipped gradients: record by record, in float64."""
    model, batch = in_float64(model), widened(batch)
    records = [tuple(x[i : i + 1] for x in batch) for i in range(len(batch[0]))]
    norms = []
    for record in records:
        squares = [grad.square().sum() for grad in gradients(model, model(*record).sum())]
        norms.append(torch.stack(squares).sum().sqrt().item())
    bound = sorted(norms)[len(norms) // 2]
    total = [torch.zeros_like(p) for p in model.parameters()]
    for record, norm in zip(records, norms):
        factor = min(1.0, bound / norm) if norm else 1.0
        for sum_, grad in zip(total, gradients(model, model(*record).sum())):
            sum_.add_(grad, alpha=factor / len(records))
    return bound, total


def in_float64(model: nn.Module) -> nn.Module:
    """A copy that computes the same function: no autocast, and no epsilon that depends on the dtype."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if hasattr(module, "autocast"):
            setattr(module, "autocast", None)  # noqa: B010 - a model's own attribute, unknown to nn.Module's types
        if isinstance(module, nn.RMSNorm) and module.eps is None:
            module.eps = torch.finfo(torch.float32).eps
    return model


def widened(batch: Batch) -> Batch:
    """Ids stay what they are."""
    return tuple(x.double() if x.is_floating_point() else x for x in batch)


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if grad is None else grad for p, grad in zip(parameters, found)]


def check_gradient(label: str, got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Raises WrongResult unless every parameter's gradient is the expected one, up to ``tolerance`` of its norm."""
    if len(got) != len(expected):
        raise WrongResult(f"{label}: the optimizer saw {len(got)} gradients instead of {len(expected)}")
    for i, (a, b) in enumerate(zip(got, expected)):
        if a.shape != b.shape:
            raise WrongResult(f"{label}: gradient {i} is {list(a.shape)} instead of {list(b.shape)}")
        error, allowed = (a.double() - b).norm().item(), tolerance * b.norm().item()
        if not error <= allowed:  # also true for NaN
            raise WrongResult(f"{label}: gradient {i} is off by {error:.3g}, more than {allowed:.3g}")


def booked_bytes(model: nn.Module, batch: Batch) -> int:
    """The output gradients of all layers with parameters: what book-keeping holds beyond a plain step."""
    total = 0

    def count(module: nn.Module, arguments: object, output: Tensor) -> None:
        nonlocal total
        total += output.nbytes

    layers = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    handles = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        model(*batch)
    for handle in handles:
        handle.remove()
    return total
