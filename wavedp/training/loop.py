# SPDX-License-Identifier: Apache-2.0
"""The loop of the public stages: progress bar, CSV log, checkpoints, exact resume, a clean stop on Ctrl-C.

Every step draws its batch and its augmentation from a generator seeded by (seed, step), so a resumed run continues
with the batches that an uninterrupted one would have seen.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wavedp.errors import InvalidValueError, StateError
from wavedp.privacy.validation import check_integer, check_real
from wavedp.training.checkpoints import load_newest, save_generation
from wavedp.training.interrupt import DeferredInterrupt
from wavedp.training.runs import CsvLog

Losses = dict[str, Tensor]


@dataclass(frozen=True)
class TrainingConfig:
    """Hyper-parameters of a public stage. The learning rate warms up linearly, then falls to zero by a cosine."""

    steps: int
    batch_size: int = 64  # images
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_steps: int = 50
    gradient_norm: float = 1.0  # clip of the whole gradient; stability only, no privacy
    seed: int = 0
    save_every: int = 500  # steps
    log_every: int = 25  # steps
    ema_decay: float = 0.0  # of an average of the weights that becomes the model; 0: the last weights
    autocast: str = "float32"  # arithmetic of the forward; "bfloat16": products in it, where torch.autocast says so

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every", "log_every"):
            check_integer(name, getattr(self, name), at_least=1)
        check_real("learning_rate", self.learning_rate, above=0.0)
        check_real("ema_decay", self.ema_decay, at_least=0.0, below=1.0)
        if self.autocast not in ("float32", "bfloat16"):
            raise InvalidValueError(f"autocast must be float32 or bfloat16, got {self.autocast!r}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def rate(self, step: int) -> float:
        """Learning rate of ``step``, counted from 0."""
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return self.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def step_generator(seed: int, step: int) -> torch.Generator:
    """The generator of one step; different steps and seeds give unrelated streams for practical purposes."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) & 0x7FFF_FFFF)


def fit(
    model: nn.Module,
    batch_losses: Callable[[torch.Generator], Losses],
    config: TrainingConfig,
    folder: Path,
    *,
    title: str,
    progress: bool = True,
) -> None:
    """Trains ``model`` in place for ``config.steps`` steps.

    ``batch_losses(generator)`` draws a batch and returns scalars, of which ``"loss"`` is minimised. Writes
    ``log.csv`` and ``checkpoint/`` in ``folder``; continues from that checkpoint if it is there. On Ctrl-C the step in
    hand is finished and the checkpoint written before KeyboardInterrupt goes on.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    average = WeightAverage(model, config.ema_decay) if config.ema_decay > 0 else None
    start = load_checkpoint(folder / "checkpoint", model, optimizer, average)
    if start >= config.steps:
        if average is not None:
            average.copy_to(model)
        model.eval()
        return
    from tqdm import tqdm

    model.train()
    log: CsvLog | None = None
    outside = torch.get_rng_state()
    bar = tqdm(total=config.steps, initial=start, desc=title, unit="step", disable=not progress, dynamic_ncols=True)
    try:
        with bar, DeferredInterrupt() as interrupt:
            for step in range(start, config.steps):
                losses = train_step(model, optimizer, batch_losses, config, step)
                if average is not None:
                    average.update(model, step)
                last = step + 1 == config.steps or interrupt.requested
                if step % config.log_every == 0 or last:
                    values = {k: float(v) for k, v in losses.items()}
                    log = log or CsvLog(folder / "log.csv", ("step", "learning_rate", *values), resume_before=start)
                    log.append(step=step, learning_rate=config.rate(step), **values)
                    bar.set_postfix({k: f"{v:.4f}" for k, v in values.items()}, refresh=False)
                bar.update()
                if (step + 1) % config.save_every == 0 or last:
                    save_checkpoint(folder / "checkpoint", model, optimizer, step + 1, average)
                if last:  # not what was requested meanwhile, with nothing saved
                    break
    finally:
        if average is not None:
            average.copy_to(model)
        model.eval()
        torch.set_rng_state(outside)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch_losses: Callable[[torch.Generator], Losses],
    config: TrainingConfig,
    step: int,
) -> Losses:
    for group in optimizer.param_groups:
        group["lr"] = config.rate(step)
    generator = step_generator(config.seed, step)
    # Dropout and code revival draw from the global generator, which must not repeat the batch's draws.
    torch.manual_seed(generator.initial_seed() ^ 0x5DEE_CE66)
    device = next(model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=config.autocast == "bfloat16"):
        losses = batch_losses(generator)
    if not torch.isfinite(losses["loss"]):
        raise StateError(f"the loss is not finite at step {step}; lower the learning rate or look at the data")
    optimizer.zero_grad(set_to_none=True)
    losses["loss"].backward()
    nn.utils.clip_grad_norm_(model.parameters(), config.gradient_norm)
    optimizer.step()
    return {k: v.detach() for k, v in losses.items()}


class WeightAverage:
    """An exponential average of a model's parameters. The first steps count less, as min(decay, (1 + t) / (10 + t)),
    so that the start is forgotten; buffers are not averaged."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """After ``step``, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, p in model.named_parameters():
            self.values[name].lerp_(p, 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            p.copy_(self.values[name])

    def restore(self, values: dict[str, Tensor]) -> None:
        if set(values) != set(self.values):
            raise InvalidValueError("it holds no average of these weights; ema_decay was 0, or the model another")
        for name, value in values.items():
            self.values[name].copy_(value)


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, average: WeightAverage | None = None
) -> None:
    """Weights, optimizer state and the number of finished steps, as the next generation in ``folder``."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    scalars, states = optimizer_tensors(optimizer)
    tensors |= {f"optimizer.{k}": v for k, v in states.items()}
    if average is not None:
        tensors |= {f"average.{k}": v for k, v in average.values.items()}
    save_generation(folder, {"step": step, "optimizer": scalars}, tensors)


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage | None = None
) -> int:
    """Restores `save_checkpoint`; returns the number of finished steps, 0 when there is no checkpoint.

    Warns of generations that were damaged and skipped.
    """
    found = load_newest(folder)
    if found is None:
        return 0
    for sentence in found.skipped:
        warnings.warn(sentence, RuntimeWarning, stacklevel=2)
    config, tensors = found.config, found.tensors
    try:
        model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        states = {k[10:]: v for k, v in tensors.items() if k.startswith("optimizer.")}
        restore_optimizer(optimizer, config["optimizer"], states)
        if average is not None:
            average.restore({k[8:]: v for k, v in tensors.items() if k.startswith("average.")})
        return int(config["step"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise InvalidValueError(
            f"the checkpoint in {folder} does not fit this model ({error}); use another folder"
        ) from error


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An optimizer's state as (JSON scalars, tensors), keyed ``<parameter index>.<name>``."""
    scalars: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                scalars[f"{index}.{name}"] = value
    return scalars, tensors


def restore_optimizer(optimizer: torch.optim.Optimizer, scalars: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Puts back what `optimizer_tensors` took; hyper-parameters stay as the optimizer was built."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**scalars, **tensors}.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
