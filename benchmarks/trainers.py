# SPDX-License-Identifier: Apache-2.0
"""Who takes a private training step: this package, Opacus, torch.func, fastDP; and the step without privacy.

All get the same model, whose forward returns one loss a record, the same torch optimizer, and whole batches.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from wavedp.benchmarks.steps import FLOOR, Batch, Mechanism, Step, Trainer
from wavedp.privacy import PrivacyEngine

QUIET = (
    "Full backward hook is firing when gradients are computed with respect to module outputs",  # Opacus, of embeddings
    "There is a performance drop because we have not yet implemented the batching rule",  # torch.func on a CPU
)


def quiet(step: Step) -> Step:
    """``step`` without the warnings that a rival gives at every call."""

    @functools.wraps(step)
    def call(batch: Batch) -> None:
        with warnings.catch_warnings():
            for message in QUIET:
                warnings.filterwarnings("ignore", message)
            step(batch)

    return call


def trainers(device: torch.device) -> dict[str, Trainer]:
    """Those that are installed, this package first."""
    found = {"wavedp": Trainer(ours, may_refuse=False), FLOOR: Trainer(plain, private=False, may_refuse=False)}
    if importlib.util.find_spec("opacus"):
        found |= {"Opacus hooks": Trainer(opacus_hooks), "Opacus ew": Trainer(opacus_ew)}
        found["Opacus ghost"] = Trainer(opacus_ghost)
    found["torch.func"] = Trainer(torch_func)
    if importlib.util.find_spec("fastDP"):
        found["fastDP MixOpt"] = Trainer(fastdp)
    return found


def ours(model: nn.Module, optimizer: torch.optim.Optimizer, mechanism: Mechanism) -> Step:
    """The ordinary loop under the engine; what only a run has, a loader and a ledger, is left out as for the others."""
    _, private, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=None,
        sample_rate=0.01,
        noise_multiplier=mechanism.noise_multiplier,
        max_grad_norm=mechanism.max_grad_norm,
        expected_batch_size=mechanism.expected_batch_size,
        without_privacy=mechanism.noise_multiplier == 0,
    )

    def step(batch: Batch) -> None:
        model(*batch).mean().backward()
        private.step()
        private.zero_grad()

    return step


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, mechanism: Mechanism) -> Step:
    """A step on the mean loss, without clipping and noise."""

    def step(batch: Batch) -> None:
        model(*batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def opacus_hooks(model: nn.Module, optimizer: torch.optim.Optimizer, mechanism: Mechanism) -> Step:
    return opacus(model, optimizer, mechanism, "GradSampleModule")


def opacus_ew(model: nn.Module, optimizer: torch.optim.Optimizer, mechanism: Mechanism) -> Step:
    return opacus(model, optimizer, mechanism, "GradSampleModuleExpandedWeights")


def opacus(model: nn.Module, optimizer: torch.optim.Optimizer, mechanism: Mechanism, wrapper: str) -> Step:
    """Per-sample gradients of every layer, by hooks or by expanded weights."""
    wrapped = getattr(importlib.import_module("opacus.grad_sample"), wrapper)(model, loss_reduction="mean")
    private = opacus_optimizer("DPOptimizer", optimizer, mechanism)

    def step(batch: Batch) -> None:
        wrapped(*batch).mean().backward()
        private.step()
        private.zero_grad(set_to_none=True)

    return quiet(step)


def opacus_ghost(model: nn.Module, optimizer: torch.optim.Optimizer, mechanism: Mechanism) -> Step:
    """Two backwards: one for the norms, one of the losses times their factors."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):  # its norm sampler takes .view() of the ids, which an expanded one refuses
            module.register_forward_pre_hook(lambda module, ids: tuple(x.contiguous() for x in ids))
    sampler = importlib.import_module("opacus.grad_sample").GradSampleModuleFastGradientClipping
    loss_of = importlib.import_module("opacus.utils.fast_gradient_clipping_utils").DPTensorFastGradientClipping
    wrapped = sampler(model, loss_reduction="mean", max_grad_norm=mechanism.max_grad_norm, use_ghost_clipping=True)
    private = opacus_optimizer("DPOptimizerFastGradientClipping", optimizer, mechanism)

    def step(batch: Batch) -> None:
        loss_of(wrapped, private, wrapped(*batch), "mean").backward()
        private.step()
        private.zero_grad(set_to_none=True)

    return quiet(step)


def opacus_optimizer(kind: str, optimizer: torch.optim.Optimizer, mechanism: Mechanism) -> Any:
    return getattr(importlib.import_module("opacus.optimizers"), kind)(
        optimizer,
        noise_multiplier=mechanism.noise_multiplier,
        max_grad_norm=mechanism.max_grad_norm,
        expected_batch_size=mechanism.expected_batch_size,
        loss_reduction="mean",
    )


def torch_func(model: nn.Module, optimizer: torch.optim.Optimizer, mechanism: Mechanism) -> Step:
    """``vmap(grad)``, clipped and noised in plain torch."""
    parameters = dict(model.named_parameters())

    def loss(values: dict[str, Tensor], *record: Tensor) -> Tensor:
        losses: Tensor = functional_call(model, values, tuple(x[None] for x in record))
        return losses.sum()

    def step(batch: Batch) -> None:
        values = {name: parameter.detach() for name, parameter in parameters.items()}
        grads = vmap(grad(loss), in_dims=(None, *(0 for _ in batch)))(values, *batch)
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]).norm(dim=0)
        factors = (mechanism.max_grad_norm / norms).clamp(max=1)
        std = mechanism.noise_multiplier * mechanism.max_grad_norm
        for name, parameter in parameters.items():
            total = torch.tensordot(factors, grads[name], dims=1)
            if std:
                total += std * torch.randn_like(total)
            parameter.grad = total / len(norms)
        optimizer.step()
        optimizer.zero_grad()

    return quiet(step)


def fastdp(model: nn.Module, optimizer: torch.optim.Optimizer, mechanism: Mechanism) -> Step:
    """Book-keeping in plain torch: Gram matrices or per-sample gradients, whichever is smaller."""
    with contextlib.redirect_stdout(io.StringIO()):
        engine = importlib.import_module("fastDP").PrivacyEngine(
            model,
            batch_size=mechanism.expected_batch_size,
            sample_size=100 * mechanism.expected_batch_size,
            num_steps=1000,
            max_grad_norm=mechanism.max_grad_norm,
            noise_multiplier=mechanism.noise_multiplier,
            clipping_mode="MixOpt",
            clipping_fn="Abadi",
            clipping_style="all-layer",
            loss_reduction="mean",
        )
    engine.attach(optimizer)
    return plain(model, optimizer, mechanism)
