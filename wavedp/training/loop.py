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
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from wavedp.errors import InvalidValueError, StateError
from wavedp.privacy.validation import check_integer, check_real
from wavedp.training.average import WeightAverage
from wavedp.training.checkpoints import load_newest, save_generation
from wavedp.training.interrupt import DeferredInterrupt
from wavedp.training.runs import CsvLog

Losses = dict[str, Tensor]
PRECISIONS = ("float32", "bfloat16")
SCHEDULES = ("constant", "cosine")


class Opponent(Protocol):
    """A second network trained in turn with the model, as a discriminator is: each step the model first, then it."""

    module: nn.Module
    optimizer: torch.optim.Optimizer  # over the module's parameters; its learning rate stays as it is
    column: str  # of log.csv, for its loss

    def begin(self, step: int) -> None:
        """Called before the model's losses of ``step`` are asked for."""

    def loss(self) -> Tensor | None:
        """Its own loss on what the model's step left; None: it rests in this step."""


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
    precision: str = "float32"  # "bfloat16": the forward pass under autocast; weights and optimizer stay float32

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise InvalidValueError(f"precision must be one of {PRECISIONS}, got {self.precision!r}")
        for name in ("steps", "batch_size", "save_every", "log_every"):
            check_integer(name, getattr(self, name), at_least=1)
        check_real("learning_rate", self.learning_rate, above=0.0)
        check_real("ema_decay", self.ema_decay, at_least=0.0, below=1.0)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def rate(self, step: int) -> float:
        """Learning rate of ``step``, counted from 0."""
        return self.learning_rate * scheduled("cosine", step, self.steps, self.warmup_steps)


def scheduled(schedule: str, step: int, steps: int, warmup_steps: int) -> float:
    """The factor of the learning rate in ``step`` of ``steps``, counted from 0: it warms up linearly, and one of
    SCHEDULES falls from 1 to 0 over the steps."""
    warmup = min(1.0, (step + 1) / max(1, warmup_steps))
    return warmup if schedule == "constant" else warmup * 0.5 * (1 + math.cos(math.pi * step / steps))


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
    opponent: Opponent | None = None,
) -> None:
    """Trains ``model`` in place for ``config.steps`` steps.

    ``batch_losses(generator)`` draws a batch and returns scalars, of which ``"loss"`` is minimised. Writes
    ``log.csv`` and ``checkpoint/`` in ``folder``; continues from that checkpoint if it is there. On Ctrl-C the step in
    hand is finished and the checkpoint written before KeyboardInterrupt goes on. An ``opponent`` is trained, logged,
    saved and resumed with the model.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    average = WeightAverage(model, config.ema_decay) if config.ema_decay > 0 else None
    start = load_checkpoint(folder / "checkpoint", model, optimizer, opponent, average)
    if start >= config.steps:
        if average is not None:
            average.copy_to(model)
        model.eval()
        return
    from tqdm import tqdm

    model.train()
    if opponent is not None:
        opponent.module.train()
    log: CsvLog | None = None
    outside = torch.get_rng_state()
    bar = tqdm(total=config.steps, initial=start, desc=title, unit="step", disable=not progress, dynamic_ncols=True)
    try:
        with bar, DeferredInterrupt() as interrupt:
            for step in range(start, config.steps):
                losses = train_step(model, optimizer, batch_losses, config, step, opponent)
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
                    save_checkpoint(folder / "checkpoint", model, optimizer, step + 1, opponent, average)
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
    opponent: Opponent | None = None,
) -> Losses:
    for group in optimizer.param_groups:
        group["lr"] = config.rate(step)
    generator = step_generator(config.seed, step)
    # Dropout and code revival draw from the global generator, which must not repeat the batch's draws.
    torch.manual_seed(generator.initial_seed() ^ 0x5DEE_CE66)
    autocast = torch.autocast(
        next(model.parameters()).device.type, dtype=torch.bfloat16, enabled=config.precision == "bfloat16"
    )
    if opponent is not None:
        opponent.begin(step)
    with autocast:
        losses = batch_losses(generator)
    _descend(losses["loss"], model, optimizer, config, f"the loss is not finite at step {step}")
    if opponent is not None:
        with autocast:
            own = opponent.loss()
        losses[opponent.column] = losses["loss"].new_zeros(()) if own is None else own
        if own is not None:
            what = f"the {opponent.column}'s loss is not finite at step {step}"
            _descend(own, opponent.module, opponent.optimizer, config, what)
    return {k: v.detach() for k, v in losses.items()}


def _descend(
    loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainingConfig, complaint: str
) -> None:
    if not torch.isfinite(loss):
        raise StateError(f"{complaint}; lower the learning rate or look at the data")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), config.gradient_norm)
    optimizer.step()


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    opponent: Opponent | None = None,
    average: WeightAverage | None = None,
) -> None:
    """Weights, optimizer state and the number of finished steps, as the next generation in ``folder``."""
    config: dict[str, Any] = {"step": step}
    tensors: dict[str, Tensor] = {}
    for prefix, module, own in _trained(model, optimizer, opponent):
        tensors |= {f"{prefix}model.{k}": v for k, v in module.state_dict().items()}
        config[f"{prefix}optimizer"], states = optimizer_tensors(own)
        tensors |= {f"{prefix}optimizer.{k}": v for k, v in states.items()}
    if average is not None:
        tensors |= {f"average.{k}": v for k, v in average.values.items()}
    save_generation(folder, config, tensors)


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    opponent: Opponent | None = None,
    average: WeightAverage | None = None,
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
        if opponent is None and "opponent.optimizer" in config:
            raise InvalidValueError("it has a discriminator, and none is asked for")
        for prefix, module, own in _trained(model, optimizer, opponent):
            module.load_state_dict(_under(f"{prefix}model.", tensors))
            restore_optimizer(own, config[f"{prefix}optimizer"], _under(f"{prefix}optimizer.", tensors))
        if average is not None:
            average.restore(_under("average.", tensors))
        return int(config["step"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise InvalidValueError(
            f"the checkpoint in {folder} does not fit this model ({error}); use another folder"
        ) from error


def _trained(
    model: nn.Module, optimizer: torch.optim.Optimizer, opponent: Opponent | None
) -> list[tuple[str, nn.Module, torch.optim.Optimizer]]:
    """What a checkpoint holds: (prefix of its names, network, its optimizer)."""
    return [("", model, optimizer), *([("opponent.", opponent.module, opponent.optimizer)] if opponent else [])]


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


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
