# SPDX-License-Identifier: Apache-2.0
"""Image classifiers for 28 and 32 px: three of the literature, and a small one that a CPU trains in minutes.

Each is a body and one linear layer; :meth:`Classifier.embed` gives the features between the two. Convolutions start as
normals of variance 2 / (outputs x kernel area) [He et al. 2015, arXiv 1502.01852].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from wavedp.errors import InvalidValueError


class Classifier(nn.Module):
    """A body ``[N, C, S, S] -> [N, D]`` and a linear head.

    Attributes:
        num_features: D, the size of the penultimate layer.
    """

    def __init__(self, body: nn.Module, num_features: int, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = body
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(num_features, num_classes)
        self.num_features = num_features
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def embed(self, images: Tensor) -> Tensor:
        """Penultimate features ``[N, D]`` of images ``[N, C, S, S]`` in [-1, 1]."""
        features: Tensor = self.body(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, num_classes]`` of images ``[N, C, S, S]`` in [-1, 1]."""
        logits: Tensor = self.head(self.dropout(self.embed(images)))
        return logits


def quick_cnn(channels: int, num_classes: int, *, width: int = 32, num_features: int = 128) -> Classifier:
    """Three convolutions (5 x 5 with stride 2, then two of 3 x 3, a 2 x 2 maximum after each), 3 x 3 averages and a
    dense layer of ``num_features``."""
    body = nn.Sequential(
        *_convolution(channels, width, 5, stride=2),
        *_convolution(width, 2 * width, 3),
        nn.MaxPool2d(2),
        *_convolution(2 * width, 4 * width, 3),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(36 * width, num_features, bias=False),
        nn.BatchNorm1d(num_features),
        nn.ReLU(inplace=True),
    )
    return Classifier(body, num_features, num_classes, dropout=0.2)


def resnet(channels: int, num_classes: int, *, depth: int = 110) -> Classifier:
    """Residual network of basic blocks, 16-32-64 channels [He et al. 2016, arXiv 1512.03385, section 4.2].

    Raises:
        ValueError: unless depth = 6 n + 2.
    """
    blocks = _blocks(depth, 6, 2)
    layers: list[nn.Module] = [*_convolution(channels, 16, 3)]
    inputs = 16
    for outputs, stride in ((16, 1), (32, 2), (64, 2)):
        for k in range(blocks):
            layers.append(_Residual(_basic(inputs, outputs, stride if k == 0 else 1), inputs, outputs, stride, k == 0))
            inputs = outputs
    return Classifier(nn.Sequential(*layers, *_average()), inputs, num_classes)


def resnext(
    channels: int, num_classes: int, *, depth: int = 29, cardinality: int = 8, widen_factor: int = 4
) -> Classifier:
    """Aggregated residual network [Xie et al. 2017, arXiv 1611.05431, section 5.3]: 8 groups of 64 by default.

    Raises:
        ValueError: for a depth below 11; layers beyond 9 n + 2 are not made.
    """
    blocks = _blocks(depth - (depth - 2) % 9, 9, 2)
    layers: list[nn.Module] = [*_convolution(channels, 64, 3)]
    inputs = 64
    for stage, stride in enumerate((1, 2, 2)):
        outputs = 64 * widen_factor * 2**stage
        inner = cardinality * outputs // widen_factor
        for k in range(blocks):
            path = nn.Sequential(
                *_convolution(inputs, inner, 1),
                *_convolution(inner, inner, 3, stride=stride if k == 0 else 1, groups=cardinality),
                *_normalised(inner, outputs, 1),
            )
            layers.append(_Residual(path, inputs, outputs, stride, k == 0))
            inputs = outputs
    return Classifier(nn.Sequential(*layers, *_average()), inputs, num_classes)


def wide_resnet(
    channels: int, num_classes: int, *, depth: int = 40, widen_factor: int = 4, dropout: float = 0.3
) -> Classifier:
    """Wide residual network with dropout in its blocks [Zagoruyko and Komodakis 2016, arXiv 1605.07146].

    Raises:
        ValueError: unless depth = 6 n + 4.
    """
    blocks = _blocks(depth, 6, 4)
    layers: list[nn.Module] = [nn.Conv2d(channels, 16, 3, padding=1, bias=False)]
    inputs = 16
    for stage, stride in enumerate((1, 2, 2)):
        outputs = 16 * widen_factor * 2**stage
        for k in range(blocks):
            layers.append(_PreActivated(inputs, outputs, stride if k == 0 else 1, dropout))
            inputs = outputs
    layers += [nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), *_average()]
    return Classifier(nn.Sequential(*layers), inputs, num_classes)


ARCHITECTURES: dict[str, Callable[..., Classifier]] = {
    "quick": quick_cnn,
    "resnet": resnet,
    "wideresnet": wide_resnet,
    "resnext": resnext,
}


def build_classifier(architecture: str, channels: int, num_classes: int, **sizes: float) -> Classifier:
    """An untrained classifier by name: ``quick``, ``resnet``, ``wideresnet`` or ``resnext``.

    Args:
        architecture: the name.
        channels: C of the images.
        num_classes: number of outputs.
        sizes: keywords of the function of that name above.

    Raises:
        ValueError: for another name.
    """
    if architecture not in ARCHITECTURES:
        raise InvalidValueError(f"no classifier is called {architecture!r}; there are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[architecture](channels, num_classes, **sizes)


class _Residual(nn.Module):
    """relu(path(x) + x), with a 1 x 1 convolution on x where the path changes its shape."""

    def __init__(self, path: nn.Module, inputs: int, outputs: int, stride: int, first: bool) -> None:
        super().__init__()
        self.path = path
        changes = first and (stride != 1 or inputs != outputs)
        self.shortcut = _normalised(inputs, outputs, 1, stride=stride) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.path(x) + self.shortcut(x))


class _PreActivated(nn.Module):
    """The block of a wide residual network: normalise and rectify before each convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.path = nn.Sequential(
            *_convolution(inputs, outputs, 3, stride=stride),
            nn.Dropout(dropout),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        )
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.before(x)
        out: Tensor = self.path(active) + (x if self.shortcut is None else self.shortcut(active))
        return out


def _average() -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _basic(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        *_convolution(inputs, outputs, 3, stride=stride),
        *_normalised(outputs, outputs, 3),
    )


def _convolution(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    layers = _normalised(inputs, outputs, kernel, stride=stride, groups=groups)
    return nn.Sequential(*layers, nn.ReLU(inplace=True))


def _normalised(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution and batch norm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    )


def _blocks(depth: int, per_block: int, others: int) -> int:
    """Blocks of each of the three stages."""
    blocks, left = divmod(depth - others, per_block)
    if left or blocks < 1:
        raise InvalidValueError(f"depth must be {per_block} n + {others} with n >= 1, got {depth}")
    return math.floor(blocks)
