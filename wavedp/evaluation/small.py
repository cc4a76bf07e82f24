# SPDX-License-Identifier: Apache-2.0
"""Utility of synthetic images: train a small classifier on them, test it on real images it never saw.

The last epoch's weights are the ones tested: nothing is selected on the test set. The figure is computed
from private test images and is therefore **not private**: publish it only if that split may be published.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavedp.errors import InvalidValueError

MAX_SIDE = 32
"""Larger images are area-averaged to this side first: the classifier's cost does not grow with them."""


class SmallClassifier(nn.Module):
    """Three batch-normalised convolutions, 4 x 4 pooling, dropout and one linear layer.

    Args:
        channels: C of the images.
        num_classes: number of outputs.
        image_size: side of the images; above 16 pixels the first layer has stride 2.
        width: channels of the first layer; the later ones have two and four times as many.
    """

    def __init__(self, channels: int, num_classes: int, image_size: int, width: int = 16) -> None:
        super().__init__()
        first_stride = 2 if image_size > 16 else 1
        self.features = nn.Sequential(
            _convolution(channels, width, 5, first_stride),
            _convolution(width, 2 * width, 3, 1),
            nn.MaxPool2d(2),
            _convolution(2 * width, 4 * width, 3, 1),
            nn.AdaptiveAvgPool2d(4),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.25), nn.Linear(64 * width, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, num_classes]`` of standardised images ``[N, C, S, S]``."""
        logits: Tensor = self.head(self.features(images))
        return logits


def classifier_accuracy(
    train_images: Tensor,
    train_labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    *,
    num_classes: int,
    epochs: int = 10,
    seed: int = 0,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    learning_rate: float = 4e-3,
    augment: bool = True,
) -> float:
    """The share of test images that a classifier trained on the training images names correctly.

    Args:
        train_images, test_images: float ``[N, C, S, S]`` in [0, 1], S >= 8, the same C and S in both.
        train_labels, test_labels: int64 ``[N]`` in 0..num_classes - 1.
        epochs, batch_size, learning_rate: the budget, fixed before; Adam under a one-cycle schedule.
        seed: weights, order, dropout and augmentation; on a CPU the result repeats exactly.
        augment: rotate (10 degrees), scale (10 %) and shift (8 % of the side) training images at random.

    Returns:
        Accuracy in [0, 1].

    Raises:
        ValueError: for shapes, labels or a budget that do not fit the above.
    """
    predicted = _fit_and_predict(
        train_images,
        train_labels,
        test_images,
        test_labels,
        num_classes=num_classes,
        epochs=epochs,
        seed=seed,
        device=torch.device(device),
        batch_size=batch_size,
        learning_rate=learning_rate,
        augment=augment,
    )
    return float((predicted == test_labels.cpu()).double().mean())


def evaluate_synthetic(
    train_images: Tensor,
    train_labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    *,
    classes: Sequence[str],
    epochs: int = 10,
    seed: int = 0,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    learning_rate: float = 4e-3,
    augment: bool = True,
) -> dict[str, Any]:
    """As :func:`classifier_accuracy`, with the errors by class.

    Returns:
        A dictionary that JSON can hold: ``accuracy``; ``per_class_accuracy`` (class name to a share, None
        where the test set has no image of it); ``confusion`` (row: true class, column: predicted class,
        counts); ``num_train``, ``num_test``, ``epochs``, ``seed``; and ``private`` = False.

    Raises:
        ValueError: as :func:`classifier_accuracy`.
    """
    n = len(classes)
    predicted = _fit_and_predict(
        train_images,
        train_labels,
        test_images,
        test_labels,
        num_classes=n,
        epochs=epochs,
        seed=seed,
        device=torch.device(device),
        batch_size=batch_size,
        learning_rate=learning_rate,
        augment=augment,
    )
    confusion = torch.bincount(test_labels.cpu() * n + predicted, minlength=n * n).view(n, n)
    totals = confusion.sum(dim=1).tolist()
    hits = confusion.diagonal().tolist()
    shares = [hit / total if total else None for hit, total in zip(hits, totals, strict=True)]
    return {
        "accuracy": sum(hits) / len(test_labels),
        "per_class_accuracy": dict(zip(classes, shares, strict=True)),
        "confusion": confusion.tolist(),
        "num_train": len(train_labels),
        "num_test": len(test_labels),
        "epochs": epochs,
        "seed": seed,
        "private": False,
    }


def _fit_and_predict(
    train_images: Tensor,
    train_labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    *,
    num_classes: int,
    epochs: int,
    seed: int,
    device: torch.device,
    batch_size: int,
    learning_rate: float,
    augment: bool,
) -> Tensor:
    """Predicted classes of the test images, int64 ``[N]`` on the CPU."""
    _check("training", train_images, train_labels, num_classes)
    _check("test", test_images, test_labels, num_classes)
    if train_images.shape[1:] != test_images.shape[1:]:
        raise InvalidValueError(
            f"training images are {list(train_images.shape[1:])}, test images {list(test_images.shape[1:])}"
        )
    if epochs < 1 or batch_size < 2:
        raise InvalidValueError(f"epochs must be >= 1 and batch_size >= 2, got {epochs} and {batch_size}")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        images, tests = (_bounded(part.to(device)) for part in (train_images, test_images))
        std, mean = torch.std_mean(images, dim=(0, 2, 3), keepdim=True)
        images, tests = ((part - mean) / std.clamp_min(1e-4) for part in (images, tests))
        labels = train_labels.to(device)
        model = SmallClassifier(images.shape[1], num_classes, images.shape[-1]).to(device)
        black = (-mean / std.clamp_min(1e-4)).to(device)
        steps = epochs * math.ceil(len(images) / batch_size)
        optimizer = torch.optim.Adam(model.parameters(), weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=steps)
        model.train()
        for _ in range(epochs):
            for batch in torch.randperm(len(images)).split(batch_size):
                shown = images[batch.to(device)]
                logits = model(_jitter(shown, black) if augment else shown)
                loss = F.cross_entropy(logits, labels[batch.to(device)], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        model.eval()
        with torch.no_grad():
            return torch.cat([model(part).argmax(dim=1) for part in tests.split(512)]).cpu()


def _convolution(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def _check(which: str, images: Tensor, labels: Tensor, num_classes: int) -> None:
    if images.dim() != 4 or not images.is_floating_point() or min(images.shape[-2:]) < 8:
        raise InvalidValueError(
            f"{which} images must be float [N, C, S, S] with S >= 8, got {images.dtype} {list(images.shape)}"
        )
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64 or not len(labels):
        raise InvalidValueError(
            f"{which} labels must be int64 [{len(images)}], N >= 1, got {labels.dtype} {list(labels.shape)}"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise InvalidValueError(f"{which} labels span {low}..{high}, not 0..{num_classes - 1}")
    if not 0 <= float(images.min()) <= float(images.max()) <= 1:
        raise InvalidValueError(f"{which} images must lie in [0, 1], they span {images.min():g}..{images.max():g}")


def _bounded(images: Tensor) -> Tensor:
    images = images.to(torch.float32)
    return F.adaptive_avg_pool2d(images, MAX_SIDE) if images.shape[-1] > MAX_SIDE else images


def _jitter(images: Tensor, black: Tensor) -> Tensor:
    """Each image rotated, scaled and shifted a little; what comes from outside is black ``[1, C, 1, 1]``."""
    n = len(images)
    low_to_high = torch.rand(4, n, device=images.device) * 2 - 1
    angle, scale = low_to_high[0] * math.pi / 18, 1 + 0.1 * low_to_high[1]
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = [cos, -sin, 0.16 * low_to_high[2], sin, cos, 0.16 * low_to_high[3]]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(n, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images - black, grid, align_corners=False) + black
