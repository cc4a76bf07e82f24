# SPDX-License-Identifier: Apache-2.0
"""Enlarging without a model: bicubic interpolation, and the inverse Haar transform with zero details."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from wavedp.errors import InvalidValueError
from wavedp.functional import waverec2
from wavedp.superres.base import BatchedSuperResolver, State, check_positive

DEFAULT_SCALE = 4


class Bicubic(BatchedSuperResolver):
    """``torch.nn.functional.interpolate(mode="bicubic", antialias=False)``, clamped to [0, 1]; any integer
    scale.
    """

    name = "bicubic"

    def __init__(self, scale: int = DEFAULT_SCALE, *, batch_size: int = 256, **placement: Any) -> None:
        super().__init__(scale, batch_size=batch_size, **placement)

    @classmethod
    def load(cls, *, scale: int | None, path: str | None, **options: Any) -> Self:
        return cls(_weightless(cls.name, scale, path), **options)

    def _upscale(self, images: Tensor, generators: list[torch.Generator], condition: dict[str, Any]) -> Tensor:
        return F.interpolate(images, scale_factor=float(self.scale), mode="bicubic", align_corners=False)

    def state(self) -> State:
        return {"options": {"batch_size": self.batch_size}}, {}


class Haar(BatchedSuperResolver):
    """The image whose level-L approximation is the input and whose details are zero, scale = 2^L.

    A coarse image in [0, 1] is LL / 2^L, so the transform is inverted from LL = 2^L times the input; each
    pixel becomes a block of its own value.
    """

    name = "haar"

    def __init__(self, scale: int = DEFAULT_SCALE, *, batch_size: int = 256, **placement: Any) -> None:
        super().__init__(scale, batch_size=batch_size, **placement)
        if scale & (scale - 1):
            raise InvalidValueError(f"the scale of 'haar' is a power of two, not {scale}")
        self.level = scale.bit_length() - 1

    @classmethod
    def load(cls, *, scale: int | None, path: str | None, **options: Any) -> Self:
        return cls(_weightless(cls.name, scale, path), **options)

    def _upscale(self, images: Tensor, generators: list[torch.Generator], condition: dict[str, Any]) -> Tensor:
        return waverec2([images * self.scale, *[(None, None, None)] * self.level])

    def state(self) -> State:
        return {"options": {"batch_size": self.batch_size}}, {}


def _weightless(name: str, scale: int | None, path: str | None) -> int:
    if path is not None:
        raise InvalidValueError(f"{name!r} has no weights to read; leave path={path!r} out")
    return DEFAULT_SCALE if scale is None else check_positive("scale", scale)
