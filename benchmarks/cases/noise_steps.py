# SPDX-License-Identifier: Apache-2.0
"""Who takes an optimizer step from clipped sums: noise, mean, moments, parameters.

All work on the same tensors, so that a case of 50 million parameters needs about 1.5 GB however many there are.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import wavedp
from wavedp.benchmarks.cases.noise_checks import (
    FILL,
    IN_PLACE,
    TWO_TO_ONE,
    Moments,
    NoiseProvider,
    Sweeps,
    check_digits,
    normal_sweeps,
)
from wavedp.benchmarks.registry import Shape, Thunk, WrongResult
from wavedp.functional import grid_step
from wavedp.ops import use_backend
from wavedp.optim import DPSGD, DPAdamW

LR, DECAY, BETAS, EPS, MOMENTUM = 1e-3, 1e-2, (0.9, 0.999), 1e-8, 0.9
STD, DENOMINATOR = 1.5, 256.0
PREFIX = 1 << 14  # elements of the first tensor that are compared with the definition
STEP_TOLERANCE = 1e-5  # of the parameter's change, from its gradient in float64

# Words of one sweep: reads of parameter, sum and moments, writes of parameter and moments.
ADAM_STEP, SGD_STEP = 7, 5
# p.mul_, m.lerp_, v.mul_, v.addcmul_, sqrt, a division, add_, p.addcdiv_; and b.mul_, b.add_, p.add_ (torch/optim).
PLAIN_ADAM = (IN_PLACE, TWO_TO_ONE, IN_PLACE, TWO_TO_ONE, IN_PLACE, IN_PLACE, IN_PLACE, 4)
PLAIN_SGD = (IN_PLACE, TWO_TO_ONE, TWO_TO_ONE)


@dataclass(frozen=True)
class Parameters:
    """The shapes of a model's parameters."""

    shapes: tuple[Shape, ...]
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> Shape:
        return (sum(math.prod(shape) for shape in self.shapes),)


def transformer(vocabulary: int, width: int, depth: int) -> Parameters:
    """A GPT: its embedding, and for each block two normalisations, attention and MLP, with biases."""
    matrices = ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))
    block = [(width,)] * 4 + [shape for rows, columns in matrices for shape in ((rows, columns), (rows,))]
    return Parameters(((vocabulary, width), *(block * depth), (width,), (width,)))


@dataclass
class Tensors:
    """What all providers of a case read and write; made when first needed."""

    size: Parameters
    device: torch.device
    made: dict[str, list[Tensor]] = field(default_factory=dict)

    def get(self, name: str) -> list[Tensor]:
        if name not in self.made:
            random = torch.Generator(self.device).manual_seed(len(name))
            self.made[name] = [torch.empty(shape, device=self.device) for shape in self.size.shapes]
            for tensor in self.made[name]:
                if name in ("sums", "start"):
                    tensor.normal_(0.0, 1.0 if name == "sums" else 0.02, generator=random)
        return self.made[name]

    def params(self) -> list[Tensor]:
        """The parameters for one provider, with gradients of its own; Opacus passes over those that require none."""
        return [param.detach().requires_grad_() for param in self.get("params")]

    def renew(self) -> None:
        """Parameters as they were at the start, moments zero."""
        for param, start in zip(self.get("params"), self.get("start")):
            param.copy_(start)
        for name in ("first", "second", "average"):
            for moment in self.made.get(name, []):
                moment.zero_()


@dataclass(frozen=True)
class Rule:
    """AdamW or SGD with momentum, on tensors that are shared."""

    private: type[wavedp.optim.PrivateStep]
    plain: Callable[..., torch.optim.Optimizer]
    settings: Mapping[str, Any]
    sweeps: Sweeps  # of the plain loop
    step: int  # words of the fused step
    moments: tuple[str, ...]  # names in the state, as "first" and "second" of Tensors

    def with_state(self, optimizer: torch.optim.Optimizer, tensors: Tensors, **more: str) -> None:
        """The state of a run: Adam's count, and moments that are shared."""
        names = dict(zip(self.moments, ("first", "second"))) | more
        for i, param in enumerate(params_of(optimizer)):
            state = optimizer.state[param]
            if self.step == ADAM_STEP:
                state["step"] = torch.tensor(0.0)
            state.update({name: tensors.get(source)[i] for name, source in names.items()})

    def gradient(self, first: Tensor) -> Tensor:
        """The gradient that the first moment shows after one step from zero, in float64."""
        return first.double() / (1 - BETAS[0]) if self.step == ADAM_STEP else first.double()

    def change(self, param: Tensor, gradient: Tensor) -> Tensor:
        """The change of the parameter in the first step (Loshchilov and Hutter, arXiv 1711.05101)."""
        if self.step == ADAM_STEP:
            return -LR * (DECAY * param.double() + gradient / (gradient.abs() + EPS))
        return -LR * gradient


ADAM = Rule(
    DPAdamW,
    torch.optim.AdamW,
    {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY},
    PLAIN_ADAM,
    ADAM_STEP,
    ("exp_avg", "exp_avg_sq"),
)
SGD = Rule(DPSGD, torch.optim.SGD, {"lr": LR, "momentum": MOMENTUM}, PLAIN_SGD, SGD_STEP, ("momentum_buffer",))
Prepare = Callable[[], Thunk]


@torch.no_grad()
def check_step(rule: Rule, tensors: Tensors, prepare: Prepare, label: str, std: float, grid: float = 0.0) -> None:
    """One step from the start: its noise by its moments, and the parameters by the rule on that noise."""
    call = prepare()
    tensors.renew()
    call()
    moments = Moments()
    groups = zip(*(tensors.get(name) for name in ("start", "params", "sums", "first")))
    for start, param, total, first in groups:
        gradient = rule.gradient(first)
        noise = gradient * DENOMINATOR - total
        if std:
            moments.add(noise / std, total)
        elif not noise.abs().max().item() <= 1e-5:  # roundings of numbers up to 6
            raise WrongResult(f"{label}: a step without noise is off by {noise.abs().max().item():.3g}")
        wanted = rule.change(start, gradient)
        error = (param.double() - start.double() - wanted).abs().max().item()
        allowed = STEP_TOLERANCE * LR + 2**-22 * start.abs().max().item()
        if not error <= allowed:
            raise WrongResult(f"{label}: a parameter is off by {error:.3g}, more than {allowed:.3g}")
    if std:
        moments.check(label, grid / std)


def steps_of(rule: Rule, size: Parameters, device: torch.device) -> dict[str, NoiseProvider]:
    tensors = Tensors(size, device)
    found: dict[str, NoiseProvider] = {}

    def add(name: str, prepare: Prepare, sweeps: Sweeps | None, std: float = STD) -> None:
        found[name] = NoiseProvider(prepare, lambda label: check_step(rule, tensors, prepare, label, std), sweeps)

    def add_ours(name: str, std: float, words: int, more: Mapping[str, str], **options: Any) -> None:
        settings, mode = split(options)

        def prepare(key: wavedp.NoiseKey | None = None) -> Thunk:
            optimizer = rule.private(tensors.params(), **rule.settings, **settings)
            rule.with_state(optimizer, tensors, **more)
            sums = tensors.get("sums")
            return lambda: optimizer.step(sums=sums, std=std, denominator=DENOMINATOR, key=key, **mode)

        def check(label: str) -> None:
            if std:
                check_known_key(rule, tensors, prepare, label, mode)
            check_step(rule, tensors, prepare, label, std, grid_step(std) if std else 0.0)

        found[name] = NoiseProvider(prepare, check, (words,))

    made = normal_sweeps(device)
    noised = (FILL, *made, TWO_TO_ONE, IN_PLACE)  # Opacus: zeros, normals, their sum with the gradient, a division
    add(plain_name(rule), lambda: plain_step(rule, tensors, True), (rule.step,), std=0.0)
    add_ours("wavedp", STD, rule.step, {})
    add_ours("wavedp, std=0", 0.0, rule.step, {})
    add_ours("wavedp, strict", STD, rule.step, {}, noise_mode="strict")
    add_ours("wavedp, with an average", STD, rule.step + 2, {"average": "average"}, ema_decay=0.999)
    add("plain torch", lambda: noised_step(rule, tensors), (*made, TWO_TO_ONE, rule.step))
    if importlib.util.find_spec("opacus"):
        plain = rule.sweeps if device.type == "cpu" else None  # on a GPU torch takes them for many tensors at once
        add("Opacus", lambda: opacus_step(rule, tensors, False), None if plain is None else (*noised, *plain))
        add("Opacus, fused", lambda: opacus_step(rule, tensors, True), (*noised, rule.step))
    return found


def split(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the optimizer, and those of its step."""
    mode = {name: value for name, value in options.items() if name == "noise_mode"}
    return {name: value for name, value in options.items() if name not in mode}, mode


def check_known_key(
    rule: Rule,
    tensors: Tensors,
    prepare: Callable[[wavedp.NoiseKey], Thunk],
    label: str,
    mode: Mapping[str, Any],
) -> None:
    """Under a key that the definition has too, the first numbers are its."""
    key = wavedp.NoiseKey.insecure(0)
    call = prepare(key)
    tensors.renew()
    call()
    total, first = tensors.get("sums")[0].view(-1)[:PREFIX], tensors.get("first")[0].view(-1)[:PREFIX]
    options = {"mode": mode["noise_mode"]} if mode else {}
    with use_backend("reference"):
        wanted = wavedp.noisy_mean(total, STD, divisor=DENOMINATOR, key=key, **options)
    # A normal that rounds to the other side is a grid step away.
    check_digits(label, rule.gradient(first), wanted, (1.01 * grid_step(STD) + 1e-5) / DENOMINATOR)


def plain_name(rule: Rule) -> str:
    return f"{rule.plain.__name__}, no noise"


def plain_step(rule: Rule, tensors: Tensors, fused: bool) -> Thunk:
    """torch's optimizer on the mean, without noise."""
    optimizer = torch_optimizer(rule, tensors, fused)
    for param, grad, total in zip(params_of(optimizer), tensors.get("means"), tensors.get("sums")):
        param.grad = torch.div(total, DENOMINATOR, out=grad)

    def call() -> None:
        optimizer.step()

    return call


def torch_optimizer(rule: Rule, tensors: Tensors, fused: bool) -> torch.optim.Optimizer:
    optimizer = rule.plain(tensors.params(), **rule.settings, **({"fused": True} if fused else {}))
    rule.with_state(optimizer, tensors)
    return optimizer


def params_of(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def noised_step(rule: Rule, tensors: Tensors) -> Thunk:
    """In plain torch, in as few sweeps as it takes: noise of the mean, the mean added to it, the fused step."""
    optimizer = torch_optimizer(rule, tensors, True)
    params, grads, sums = params_of(optimizer), tensors.get("noisy"), tensors.get("sums")

    def call() -> None:
        for param, grad, total in zip(params, grads, sums):
            param.grad = grad.normal_(0.0, STD / DENOMINATOR).add_(total, alpha=1 / DENOMINATOR)
        optimizer.step()

    return call


def opacus_step(rule: Rule, tensors: Tensors, fused: bool) -> Thunk:
    """The parts of ``DPOptimizer.step`` that follow clipping, on sums that are given."""
    optimizer = importlib.import_module("opacus.optimizers").DPOptimizer(
        torch_optimizer(rule, tensors, fused),
        noise_multiplier=STD,
        max_grad_norm=1.0,
        expected_batch_size=int(DENOMINATOR),
        loss_reduction="mean",
    )
    params = params_of(optimizer)
    nothing = torch.empty(1, 0, device=tensors.device)

    def call() -> None:
        for param, total in zip(params, tensors.get("sums")):
            param.grad_sample, param.summed_grad = nothing, total
        optimizer.add_noise()
        optimizer.scale_grad()
        optimizer.original_optimizer.step()
        for param, total in zip(params, tensors.get("sums")):
            param.grad = param.grad_sample = param.summed_grad = None
            vars(total).pop("_processed")  # what add_noise marked: the next call gives it anew

    return call
