# SPDX-License-Identifier: Apache-2.0
"""How each classifier of the protocol is trained, fixed before any image is seen."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from wavedp.errors import InvalidValueError

Family = Literal["mnist", "cifar"]


@dataclass(frozen=True)
class ClassifierRecipe:
    """One classifier and its budget.

    Attributes:
        architecture: a name of :func:`wavedp.evaluation.build_classifier`.
        sizes: keywords for it.
        epochs, batch_size: passes over the training images, and images a step.
        optimizer: "adam", or "sgd" with momentum 0.9.
        learning_rate: at the start ("step"), or the peak ("one-cycle").
        schedule: "step" multiplies the rate by 0.2 every ``decay_every`` epochs; "one-cycle" warms up over the first
            30 % of the steps and falls to nearly zero by a cosine.
        ema_decay: of the averaged weights, which are the ones validated and tested. At update t it is at most
            (1 + t) / (10 + t), so that the first weights are forgotten. 0 is no average.
        flip: mirror half of the training images left to right.
        shift: move training images by up to so many pixels, uniformly; what comes in is a copy of the edge.
        label_smoothing: share of the target spread over all classes.
    """

    architecture: str
    epochs: int
    batch_size: int
    learning_rate: float
    optimizer: Literal["adam", "sgd"] = "adam"
    weight_decay: float = 0.0
    schedule: Literal["step", "one-cycle"] = "step"
    decay_every: int = 20
    ema_decay: float = 0.9999
    flip: bool = False
    shift: int = 0
    label_smoothing: float = 0.0
    sizes: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2 or self.decay_every < 1:
            raise InvalidValueError(
                f"epochs and decay_every must be >= 1 and batch_size >= 2, got {self.epochs}, {self.decay_every} and "
                f"{self.batch_size}"
            )
        if not self.learning_rate > 0 or not 0 <= self.ema_decay < 1 or self.shift < 0:
            raise InvalidValueError(
                f"learning_rate must be > 0, ema_decay in [0, 1) and shift >= 0, got {self.learning_rate}, "
                f"{self.ema_decay} and {self.shift}"
            )
        if self.optimizer not in ("adam", "sgd") or self.schedule not in ("step", "one-cycle"):
            raise InvalidValueError(
                f'optimizer must be "adam" or "sgd" and schedule "step" or "one-cycle", got {self.optimizer!r} and '
                f"{self.schedule!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


QUICK = ClassifierRecipe(
    "quick",
    epochs=5,
    batch_size=64,
    learning_rate=2e-3,
    weight_decay=1e-4,
    schedule="one-cycle",
    ema_decay=0.99,
)
"""The recipe of ``--quick``: minutes on two cores for 55,000 images of 28 x 28. docs/evaluation.md has its accuracy."""


def dpimagebench_recipes(family: Family = "mnist") -> tuple[ClassifierRecipe, ...]:
    """ResNet, WideResNet and ResNeXt with DPImageBench's budgets (evaluation/evaluator.py, arXiv 2503.14681).

    Args:
        family: "mnist" for every set of the benchmark but CIFAR: ResNet-110, WRN-40-4 and ResNeXt-29 (8 x 64), Adam at
            0.01, times 0.2 every 20 of 50 epochs, batches of 256. "cifar": ResNet-164, WRN-28-10 and ResNeXt-29 (8
            groups, widening 10), SGD at 0.1 with weight decay 5e-4, times 0.2 every 60 of 200 epochs, batches of 126.
    """
    if family == "mnist":
        sizes: dict[str, dict[str, float]] = {"resnet": {"depth": 110}, "wideresnet": {}, "resnext": {}}
        return tuple(
            ClassifierRecipe(name, epochs=50, batch_size=256, learning_rate=0.01, sizes=sizes[name]) for name in sizes
        )
    if family != "cifar":
        raise InvalidValueError(f'family must be "mnist" or "cifar", got {family!r}')
    sizes = {
        "resnet": {"depth": 164},
        "wideresnet": {"depth": 28, "widen_factor": 10},
        "resnext": {"depth": 28, "widen_factor": 10},
    }
    return tuple(
        ClassifierRecipe(
            name, epochs=200, batch_size=126, learning_rate=0.1, optimizer="sgd", weight_decay=5e-4, decay_every=60,
            sizes=sizes[name],
        )
        for name in sizes
    )  # fmt: skip
