# SPDX-License-Identifier: Apache-2.0
"""Images mirrored and moved by a few pixels, and a data set that shows every image in several such versions."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from wavedp.data import ImageDataset
from wavedp.data.dataset import Indices, as_indices
from wavedp.errors import InvalidTypeError, InvalidValueError
from wavedp.privacy.validation import check_integer


def mirror_and_move(
    images: Tensor,  # [N, C, S, S]
    generator: torch.Generator,
    *,
    shift: int,
    flip: bool,
) -> Tensor:
    """Each image mirrored or not if ``flip``, and moved each way by up to ``shift`` whole pixels, its edge repeated."""
    if flip:
        mirrored = torch.rand(len(images), generator=generator, dtype=torch.float32) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    if shift:
        side = images.shape[-1]
        moves = torch.randint(-shift, shift + 1, (2, len(images), 1), generator=generator)
        rows, columns = (torch.arange(side) + moves).clamp(0, side - 1)  # [N, S] each
        index = (rows[:, :, None] * side + columns[:, None, :]).flatten(1)[:, None].expand(-1, images.shape[1], -1)
        images = images.flatten(2).gather(2, index).view(images.shape)
    return images


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Versions of an image, of which the first is the image itself and the others come from `mirror_and_move`."""

    augmentations: int = 1  # versions of each image; 1 is the image alone
    augmentation_shift: int = 2  # pixels
    augmentation_flip: bool = False
    augmentation_seed: int = 0  # with an image's pixels it decides what its versions are

    def __post_init__(self) -> None:
        check_integer("augmentations", self.augmentations, at_least=1)
        check_integer("augmentation_shift", self.augmentation_shift)
        check_integer("augmentation_seed", self.augmentation_seed)
        if not isinstance(self.augmentation_flip, bool):
            raise InvalidTypeError(f"augmentation_flip must be True or False, got {self.augmentation_flip!r}")
        if self.augmentations == 1 and self.augmentation_flip:
            raise InvalidValueError(
                "augmentation_flip mirrors versions beyond the image itself: set augmentations to 2 or more"
            )
        if self.augmentations > 1 and not self.augmentation_shift and not self.augmentation_flip:
            raise InvalidValueError(
                f"augmentations={self.augmentations} with no shift and no flip are copies of one image: set "
                "augmentation_shift or augmentation_flip"
            )

    def check_image_size(self, side: int) -> None:
        """Raises ValueError where ``augmentation_shift`` would move images of that many pixels out of their frame."""
        if self.augmentations > 1 and self.augmentation_shift >= side:
            raise InvalidValueError(
                f"augmentation_shift={self.augmentation_shift} would move images of {side} pixels out of their frame"
            )


class ImageVersions(ImageDataset):
    """The versions of every image of a data set, next to each other.

    What an image's versions are depends on the seed and on its pixels, and not on its index: where one record is added
    or removed, all others keep theirs, so that what the sum of clipped gradients changes by is that one record's. It
    does not depend on how the images are read either.

    Raises ValueError as `Augmentation.check_image_size`.
    """

    def __init__(self, images: ImageDataset, augmentation: Augmentation) -> None:
        augmentation.check_image_size(images.image_size)
        versions = augmentation.augmentations
        super().__init__(
            images.labels.repeat_interleave(versions),
            classes=images.classes,
            image_size=images.image_size,
            channels=images.channels,
            name=images.name,
            skipped=images.skipped,
        )
        self._source = images
        self._augmentation = augmentation

    def stack(self, indices: Indices) -> Tensor:
        index, versions = as_indices(indices), self._augmentation.augmentations
        chosen, place = torch.unique(index // versions, return_inverse=True)
        images = self._source.stack(chosen)  # [n, C, S, S]
        shown = images[:, None].repeat(1, versions, 1, 1, 1)
        if versions > 1:
            for image, others in zip(images, shown[:, 1:]):
                others.copy_(self._others(image))
        return shown[place, index % versions]

    def _others(self, image: Tensor) -> Tensor:
        """The versions beyond the first of ``[C, S, S]``: ``[versions - 1, C, S, S]``."""
        settings = self._augmentation
        seed = f"{settings.augmentation_seed} ".encode()
        digest = hashlib.sha256(seed + image.contiguous().numpy().tobytes()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))  # it takes 32 bits
        copies = image.expand(settings.augmentations - 1, *image.shape)
        return mirror_and_move(copies, generator, shift=settings.augmentation_shift, flip=settings.augmentation_flip)
