# SPDX-License-Identifier: Apache-2.0
"""Trains one classifier and keeps the weights of its best epoch by validation. There is no argument for test images."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavedp.errors import InvalidValueError, StateError
from wavedp.evaluation.classifiers import Classifier, build_classifier
from wavedp.evaluation.recipes import ClassifierRecipe
from wavedp.training.augmentation import mirror_and_move
from wavedp.training.checkpoints import load_newest, save_generation
from wavedp.training.interrupt import DeferredInterrupt
from wavedp.training.loop import optimizer_tensors, restore_optimizer

State = dict[str, Tensor]


@dataclass(frozen=True)
class LabelledImages:
    """8-bit images and their labels.

    Attributes:
        images: uint8 ``[N, C, S, S]``.
        labels: int64 ``[N]``.

    Raises:
        ValueError: for other shapes or dtypes, or no image.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4 or not len(self.images):
            raise InvalidValueError(
                f"images must be uint8 [N, C, S, S], N >= 1, got {self.images.dtype} {list(self.images.shape)}"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise InvalidValueError(
                f"labels must be int64 [{len(self.images)}], got {self.labels.dtype} {list(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        """SHA-256 of pixels and labels, so that a resumed run notices other images."""
        digest = hashlib.sha256(json.dumps(list(self.images.shape)).encode())
        digest.update(self.images.contiguous().numpy().tobytes())
        digest.update(self.labels.contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class FittedClassifier:
    """A trained classifier in evaluation mode: the averaged weights of the epoch that validation chose.

    Attributes:
        model: the classifier.
        epoch: the chosen epoch, from 1.
        validation_accuracy: its share of validation images named correctly.
        history: validation accuracy after every epoch.
    """

    model: Classifier
    epoch: int
    validation_accuracy: float
    history: tuple[float, ...]


def fit_classifier(
    recipe: ClassifierRecipe,
    train: LabelledImages,
    validation: LabelledImages,
    *,
    num_classes: int,
    seed: int,
    folder: Path | None = None,
    device: torch.device | str = "cpu",
    title: str = "classifier",
    progress: bool = False,
) -> FittedClassifier:
    """Trains as the recipe says; the epoch with the best validation accuracy is kept, the later one of equals.

    With ``folder``, every epoch leaves a checkpoint there, and a run that was killed goes on after its last whole
    epoch; on a CPU with the weights that an uninterrupted one would have had.

    Args:
        recipe: architecture and budget.
        train: what it learns from.
        validation: what chooses the epoch.
        num_classes: number of labels.
        seed: weights, order, augmentation and dropout.
        folder: for checkpoints; None keeps none.
        device: torch device.
        title: what the progress bar is called.
        progress: show a bar.

    Raises:
        ValueError: for sets of different geometry, labels out of range, or a checkpoint of other images or settings.
        RuntimeError: when the loss is not finite.
    """
    device = torch.device(device)
    _check(train, validation, num_classes)
    with _own_random_numbers(device):
        torch.manual_seed(_mixed(seed, 0))
        model = build_classifier(recipe.architecture, train.images.shape[1], num_classes, **recipe.sizes).to(device)
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        fit = _Fit(recipe, model, train, validation, seed, device)
        if folder is not None:
            fit.resume(folder)
        fit.run(folder, title, progress)
    model.load_state_dict(fit.best)
    model.eval()
    return FittedClassifier(model, fit.best_epoch, fit.history[fit.best_epoch - 1], tuple(fit.history))


def remove_checkpoint(folder: Path) -> None:
    """Deletes the checkpoints of a classifier whose result is on disk."""
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)


def predictions(model: Classifier, images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """The classes, int64 ``[N]`` on the CPU, that a classifier in evaluation mode gives 8-bit images."""
    with torch.no_grad():
        return torch.cat([model(scaled(part.to(device))).argmax(dim=1).cpu() for part in images.split(512)])


def accuracy(model: Classifier, data: LabelledImages, device: torch.device | str = "cpu") -> float:
    """The share of images that a classifier in evaluation mode names correctly."""
    return float((predictions(model, data.images, device) == data.labels).double().mean())


def scaled(images: Tensor) -> Tensor:
    """8-bit images as float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


class _Fit:
    """The state of one training: everything that a checkpoint holds."""

    def __init__(
        self,
        recipe: ClassifierRecipe,
        model: Classifier,
        train: LabelledImages,
        validation: LabelledImages,
        seed: int,
        device: torch.device,
    ) -> None:
        self.recipe, self.model, self.seed, self.device = recipe, model, seed, device
        self.train, self.validation = train, validation
        self.steps_per_epoch = math.ceil(len(train) / recipe.batch_size)
        self.optimizer = _optimizer(recipe, model)
        self.average: State = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.best: State = {}
        self.best_epoch = 0
        self.history: list[float] = []

    def run(self, folder: Path | None, title: str, progress: bool) -> None:
        from tqdm import tqdm

        done = len(self.history)
        total = self.recipe.epochs * self.steps_per_epoch
        with (
            tqdm(
                total=total, initial=done * self.steps_per_epoch, desc=title, unit="step", disable=not progress
            ) as bar,
            DeferredInterrupt() as interrupt,
        ):
            for epoch in range(done, self.recipe.epochs):
                for step in self.epoch(epoch):
                    bar.update()
                    if interrupt.requested and step + 1 < self.steps_per_epoch:
                        return  # the interrupt is raised; the epoch in hand is repeated when the run goes on
                self.validate()
                bar.set_postfix({"validation": f"{self.history[-1]:.4f}"}, refresh=False)
                if folder is not None:
                    self.save(folder)
                if interrupt.requested:
                    return

    def epoch(self, epoch: int) -> Iterator[int]:
        """One pass over the training images; order and augmentation depend on (seed, epoch) alone."""
        torch.manual_seed(_mixed(self.seed, epoch + 1))  # dropout
        generator = torch.Generator().manual_seed(_mixed(self.seed, epoch + 1) ^ 0x5DEECE66)
        order = torch.randperm(len(self.train), generator=generator)
        self.model.train()
        for k, batch in enumerate(order.split(self.recipe.batch_size)):
            step = epoch * self.steps_per_epoch + k
            for group in self.optimizer.param_groups:
                group["lr"] = _rate(self.recipe, step, self.steps_per_epoch)
            if len(batch) > 1:  # batch norm has no variance of one
                self.step(self.train.images[batch], self.train.labels[batch], step, generator)
            yield k

    def step(self, images: Tensor, labels: Tensor, step: int, generator: torch.Generator) -> None:
        moved = mirror_and_move(images, generator, shift=self.recipe.shift, flip=self.recipe.flip)
        shown = scaled(moved.to(self.device))
        logits = self.model(shown.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits, labels.to(self.device), label_smoothing=self.recipe.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        decay = min(self.recipe.ema_decay, (2 + step) / (11 + step))
        with torch.no_grad():
            parameters = [p.detach() for p in self.model.parameters()]
            torch._foreach_lerp_(list(self.average.values()), parameters, 1 - decay)

    def validate(self) -> None:
        """Measures the averaged weights, with the normalisation statistics of the moment."""
        state = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        averaged = {**state, **{name: value.clone() for name, value in self.average.items()}}
        if not all(bool(value.isfinite().all()) for value in averaged.values()):
            raise StateError(
                f"the weights of {self.recipe.architecture} are not finite after epoch {len(self.history) + 1}: lower "
                "the learning rate or look at the images"
            )
        self.model.load_state_dict(averaged)
        self.model.eval()
        self.history.append(accuracy(self.model, self.validation, self.device))
        self.model.load_state_dict(state)
        if self.best_epoch == 0 or self.history[-1] >= self.history[self.best_epoch - 1]:
            self.best, self.best_epoch = averaged, len(self.history)

    def save(self, folder: Path) -> None:
        scalars, states = optimizer_tensors(self.optimizer)
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        tensors |= {f"optimizer.{name}": value for name, value in states.items()}
        config = {**self.identity(), "history": self.history, "best_epoch": self.best_epoch, "optimizer": scalars}
        save_generation(folder / "checkpoint", config, tensors)

    def resume(self, folder: Path) -> None:
        found = load_newest(folder / "checkpoint")
        if found is None:
            return
        changed = [key for key, value in self.identity().items() if found.config.get(key) != value]
        if changed:
            raise InvalidValueError(
                f"{folder} holds a classifier that was trained with other settings or images ({', '.join(changed)} "
                "differ); use another folder"
            )

        def part(prefix: str) -> State:
            cut = len(prefix) + 1
            return {k[cut:]: v.to(self.device) for k, v in found.tensors.items() if k.startswith(prefix + ".")}

        self.model.load_state_dict(part("model"))
        self.average = {name: part("average")[name] for name in self.average}
        self.best = part("best")
        restore_optimizer(self.optimizer, found.config["optimizer"], part("optimizer"))
        self.history = [float(value) for value in found.config["history"]]
        self.best_epoch = int(found.config["best_epoch"])

    def identity(self) -> dict[str, Any]:
        return json.loads(  # type: ignore[no-any-return]
            json.dumps(
                {
                    "recipe": self.recipe.to_dict(),
                    "seed": self.seed,
                    "training_images": self.train.fingerprint(),
                    "validation_images": self.validation.fingerprint(),
                }
            )
        )


def _optimizer(recipe: ClassifierRecipe, model: nn.Module) -> torch.optim.Optimizer:
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(), lr=recipe.learning_rate, momentum=0.9, weight_decay=recipe.weight_decay
        )
    return torch.optim.Adam(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)


def _rate(recipe: ClassifierRecipe, step: int, steps_per_epoch: int) -> float:
    """Learning rate of ``step``, counted from 0."""
    if recipe.schedule == "step":
        return recipe.learning_rate * 0.2 ** (step // steps_per_epoch // recipe.decay_every)
    total = recipe.epochs * steps_per_epoch
    warmup = 0.3 * total
    if step < warmup:
        return recipe.learning_rate * (0.04 + 0.96 * (step + 1) / (warmup + 1))
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (step + 1 - warmup) / (total - warmup + 1)))


@contextmanager
def _own_random_numbers(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _mixed(seed: int, epoch: int) -> int:
    return (seed * 1_000_003 + epoch) & 0x7FFF_FFFF


def _check(train: LabelledImages, validation: LabelledImages, num_classes: int) -> None:
    if train.images.shape[1:] != validation.images.shape[1:]:
        raise InvalidValueError(
            f"training images are {list(train.images.shape[1:])}, validation images {list(validation.images.shape[1:])}"
        )
    for which, part in (("training", train), ("validation", validation)):
        low, high = int(part.labels.min()), int(part.labels.max())
        if low < 0 or high >= num_classes:
            raise InvalidValueError(f"{which} labels span {low}..{high}, not 0..{num_classes - 1}")
    if len(train) < 2 or min(train.images.shape[-2:]) < 8:
        raise InvalidValueError(
            f"a classifier needs two training images or more of 8 pixels or more, got {list(train.images.shape)}"
        )
