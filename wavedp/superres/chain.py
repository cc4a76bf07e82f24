# SPDX-License-Identifier: Apache-2.0
"""Super-resolvers one after the other, and the final resize to a size that no product of scales reaches."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from wavedp.errors import InvalidTypeError, InvalidValueError
from wavedp.superres.base import State, SuperResolver, check_images


class Chain(SuperResolver):
    """Applies ``stages`` in order; the scale is the product of theirs, 1 for no stage at all."""

    name = "chain"

    def __init__(self, stages: Sequence[SuperResolver]) -> None:
        self.stages = tuple(stages)
        self.scale = math.prod(stage.scale for stage in self.stages)

    def __call__(
        self,
        images: Tensor,
        *,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
        progress: bool = False,
        **options: Any,
    ) -> Tensor:
        """See `SuperResolver.__call__`. Options of a call belong to one model: give them where the stage is
        built.
        """
        if options:
            raise InvalidTypeError(
                f"a chain takes no option {', '.join(sorted(options))} when called; set it on the stage"
            )
        check_images(images)
        result = images.float().clamp(0, 1)
        for stage in self.stages:
            result = stage(result, generator=generator, batch_size=batch_size, progress=progress)
        return result

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        for stage in self.stages:
            stage.to(device, dtype)
        return self

    def state(self) -> State:
        return {"stages": len(self.stages)}, {}

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes each stage into ``folder/0``, ``folder/1``, ..., then the chain's own ``config.json``."""
        for i, stage in enumerate(self.stages):
            stage.save_pretrained(Path(folder) / str(i))
        super().save_pretrained(folder)

    def __repr__(self) -> str:
        return f"Chain([{', '.join(map(repr, self.stages))}])"


class Resized(SuperResolver):
    """A super-resolver followed by a resize from ``[.., .., *from_size]`` images to exactly ``to_size``.

    The resize is the mean over each pixel's area where it shrinks and bicubic where it enlarges. ``scale`` is
    the integer nearest to the whole factor; ``to_size`` is what comes out.
    """

    name = "resized"

    def __init__(self, resolver: SuperResolver, from_size: tuple[int, int], to_size: tuple[int, int]) -> None:
        self.resolver, self.from_size, self.to_size = resolver, from_size, to_size
        self.scale = max(1, round(to_size[0] / from_size[0]))

    def __call__(
        self,
        images: Tensor,
        *,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
        progress: bool = False,
        **options: Any,
    ) -> Tensor:
        """See `SuperResolver.__call__`; raises ValueError for images that are not of ``from_size``."""
        check_images(images)
        if tuple(images.shape[2:]) != self.from_size:
            raise InvalidValueError(
                f"made for images of {self.from_size}, not {tuple(images.shape[2:])}; call to_size for these"
            )
        result = self.resolver(images, generator=generator, batch_size=batch_size, progress=progress, **options)
        return resize(result, self.to_size)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        self.resolver.to(device, dtype)
        return self

    def state(self) -> State:
        return {"from_size": list(self.from_size), "to_size": list(self.to_size)}, {}

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the resolver into ``folder/resolver``, then ``config.json``."""
        self.resolver.save_pretrained(Path(folder) / "resolver")
        super().save_pretrained(folder)


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """``[B, C, h, w]`` to ``[B, C, *size]``: the area mean where it shrinks, else clamped bicubic."""
    if images.shape[0] == 0:
        return images.new_empty(*images.shape[:2], *size)
    if size[0] <= images.shape[2] and size[1] <= images.shape[3]:
        return F.interpolate(images, size=size, mode="area")
    return F.interpolate(images, size=size, mode="bicubic", align_corners=False).clamp(0, 1)
