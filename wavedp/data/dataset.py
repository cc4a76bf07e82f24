# SPDX-License-Identifier: Apache-2.0
"""What every data set of wavedp is: labelled 8-bit images of one size, addressed by index."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from wavedp.errors import InvalidTypeError, InvalidValueError

Indices = Tensor | Sequence[int]


def to_unit_range(images: Tensor) -> Tensor:
    """8-bit images as float32 in [0, 1]: ``images / 255``.

    Raises:
        TypeError: if ``images`` is not uint8.
    """
    if images.dtype != torch.uint8:
        raise InvalidTypeError(f"to_unit_range expects uint8 images, got {images.dtype}")
    return images.to(torch.float32) / 255


def check_distinct(classes: Sequence[str]) -> None:
    """Raises ValueError if a class name is repeated: a name must mean one label."""
    repeated = [class_name for class_name, times in Counter(classes).items() if times > 1]
    if repeated:
        raise InvalidValueError(f"class names must be distinct, {repeated} are repeated in {list(classes)}")


class ImageDataset(Dataset[tuple[Tensor, int]], ABC):
    """A map-style data set whose item ``i`` is ``(uint8 image [C, H, W], label)``, H = W = ``image_size``.

    Attributes:
        classes: the name of each class, distinct; a label is an index into it.
        labels: int64 ``[N]``.
        image_size: side of the square images in pixels.
        channels: 1 (grey) or 3 (RGB).
        name: where the images come from, for messages and records.
        skipped: ``(file, reason)`` of every file left out while opening; empty for most sources.
    """

    def __init__(
        self,
        labels: Tensor,
        *,
        classes: Sequence[str],
        image_size: int,
        channels: int,
        name: str,
        skipped: Sequence[tuple[str, str]] = (),
    ) -> None:
        if labels.dim() != 1 or labels.dtype != torch.int64:
            raise InvalidValueError(f"labels of {name!r} must be int64 [N], got {labels.dtype} {list(labels.shape)}")
        if not classes:
            raise InvalidValueError(f"{name!r} has no classes")
        check_distinct(classes)
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
            raise InvalidValueError(
                f"labels of {name!r} span {int(labels.min())}..{int(labels.max())}, "
                f"but there are {len(classes)} classes"
            )
        if channels not in (1, 3):
            raise InvalidValueError(f"channels must be 1 or 3, got {channels}")
        self.labels = labels
        self.classes = tuple(classes)
        self.image_size = image_size
        self.channels = channels
        self.name = name
        self.skipped = list(skipped)

    def __len__(self) -> int:
        return self.labels.numel()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"image {index} of {self.name!r}, which has {len(self)}")
        return self.stack([position])[0], int(self.labels[position])

    @property
    def images(self) -> Tensor:
        """All the images, uint8 ``[N, C, H, W]``."""
        return self.stack(torch.arange(len(self)))

    @abstractmethod
    def stack(self, indices: Indices) -> Tensor:
        """The images at ``indices`` (int64 ``[n]``, or integers): uint8 ``[n, C, H, W]``."""

    def subset(self, indices: Indices) -> ImageDataset:
        """A view of the images at ``indices``, in that order; no pixel is copied until it is read."""
        return _View(self, as_indices(indices))

    def __repr__(self) -> str:
        shape = [self.channels, self.image_size, self.image_size]
        return f"<{self.name}: {len(self)} images {shape}, {len(self.classes)} classes>"


class TensorImageDataset(ImageDataset):
    """A data set held in one tensor.

    Args:
        images: uint8 ``[N, C, S, S]`` with C = 1 or 3.
        labels: int64 ``[N]``.
        classes: the name of each class.
        name: where the images come from.
        skipped: files left out while opening.

    Raises:
        ValueError: on any other shape, dtype or label range.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        classes: Sequence[str],
        *,
        name: str = "tensor",
        skipped: Sequence[tuple[str, str]] = (),
    ) -> None:
        if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
            raise InvalidTypeError("images and labels must be tensors, uint8 [N, C, S, S] and int64 [N]")
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[2] != images.shape[3]:
            raise InvalidValueError(f"images must be uint8 [N, C, S, S], got {images.dtype} {list(images.shape)}")
        if images.shape[0] != labels.shape[0]:
            raise InvalidValueError(f"{name!r} has {images.shape[0]} images and {labels.shape[0]} labels")
        super().__init__(
            labels,
            classes=classes,
            image_size=images.shape[2],
            channels=images.shape[1],
            name=name,
            skipped=skipped,
        )
        self._images = images

    @property
    def images(self) -> Tensor:
        return self._images

    def stack(self, indices: Indices) -> Tensor:
        return self._images[as_indices(indices)]


class _View(ImageDataset):
    def __init__(self, parent: ImageDataset, indices: Tensor) -> None:
        super().__init__(
            parent.labels[indices],
            classes=parent.classes,
            image_size=parent.image_size,
            channels=parent.channels,
            name=parent.name,
            skipped=parent.skipped,
        )
        self._parent = parent
        self._indices = indices

    def stack(self, indices: Indices) -> Tensor:
        return self._parent.stack(self._indices[as_indices(indices)])


def as_indices(indices: Indices) -> Tensor:
    """int64 ``[n]``; raises TypeError where they are no integers."""
    index = torch.as_tensor(indices)
    if index.numel() == 0:
        return torch.empty(0, dtype=torch.int64)
    if index.dim() != 1 or index.dtype.is_floating_point or index.dtype == torch.bool:
        raise InvalidTypeError(f"indices must be integers [n], got {index.dtype} {list(index.shape)}")
    return index.to(torch.int64)
