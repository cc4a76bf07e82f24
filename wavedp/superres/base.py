# SPDX-License-Identifier: Apache-2.0
"""What every super-resolution adapter is: images in [0, 1] in, larger images in [0, 1] out.

`SuperResolver` is the interface, `BatchedSuperResolver` the common work around one model: checks, batches,
padding to the sizes the model accepts, grey images through a colour model, seeds per image, and the crop
afterwards.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from wavedp import storage
from wavedp.errors import InvalidTypeError, InvalidValueError, StateError

FORMAT = "wavedp.superres"
RANGE_TOLERANCE = 1e-4  # rounding of an inverse transform; clamped, while anything further out is refused

State = tuple[dict[str, Any], dict[str, Tensor]]


class SuperResolver(ABC):
    """Enlarges images by an integer: ``[B, C, h, w]`` to ``[B, C, h * scale, w * scale]``, C = 1 or 3."""

    name: str
    scale: int

    @abstractmethod
    def __call__(
        self,
        images: Tensor,  # [B, C, h, w], floating point, in [0, 1]
        *,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
        progress: bool = False,
        **options: Any,
    ) -> Tensor:
        """Returns float32 ``[B, C, h * scale, w * scale]`` in [0, 1] on the device of ``images``.

        ``generator`` decides every random draw of a sampling model (without it: torch's global generator);
        deterministic models ignore it. ``batch_size`` images go through the model at once. Raises ValueError
        for a wrong dtype, shape, range or a NaN.
        """

    @abstractmethod
    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Moves the model, in place; returns self."""

    @abstractmethod
    def state(self) -> State:
        """What `save_pretrained` writes: (JSON-able configuration, tensors)."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``config.json`` and ``model.safetensors``, for `wavedp.superres.from_pretrained`."""
        config, tensors = self.state()
        header = {"format": FORMAT, "name": self.name, "scale": self.scale}
        storage.save_folder(Path(folder), {**header, **config}, tensors)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r}, scale={self.scale})"


class BatchedSuperResolver(SuperResolver):
    """A `SuperResolver` around one model: a subclass defines `_upscale` and what the model accepts."""

    channels: int | None = None  # what the model takes: 1, 3, or None for either
    size_multiple: int = 1  # height and width the model takes are multiples of this
    stochastic: bool = False  # draws random numbers

    def __init__(
        self,
        scale: int,
        *,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.scale = check_positive("scale", scale)
        self.batch_size = check_positive("batch_size", batch_size)
        self.device = torch.device(device or "cpu")
        self.dtype = dtype or torch.float32

    @classmethod
    @abstractmethod
    def load(
        cls,
        *,
        scale: int | None,
        path: str | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        **options: Any,
    ) -> Self:
        """Builds the resolver for `wavedp.superres.load`; ``options`` are the constructor's."""

    @abstractmethod
    def _upscale(
        self,
        images: Tensor,  # [n, channels, H, W] in [0, 1], padded, of this model's device and dtype
        generators: list[torch.Generator],  # one per image, empty unless `stochastic`
        condition: dict[str, Any],  # the rows of what `_condition` returned that belong to these images
    ) -> Tensor:
        """Returns ``[n, channels, H * scale, W * scale]`` in about [0, 1]."""

    def _condition(self, count: int, **options: Any) -> dict[str, Any]:
        """Turns the options of one call on ``count`` images into sequences of one entry per image."""
        if options:
            raise InvalidTypeError(f"{self.name} takes no option {', '.join(sorted(options))} when called")
        return {}

    def __call__(
        self,
        images: Tensor,
        *,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
        progress: bool = False,
        **options: Any,
    ) -> Tensor:
        check_images(images)
        step = self.batch_size if batch_size is None else check_positive("batch_size", batch_size)
        count, channels, height, width = images.shape
        condition = self._condition(count, **options)
        generators = generators_per_image(count, generator) if self.stochastic else []
        starts: Any = range(0, count, step)
        if progress:
            from tqdm.auto import tqdm

            starts = tqdm(starts, desc=self.name, unit="batch")
        result = torch.empty(count, channels, height * self.scale, width * self.scale, device=images.device)
        with torch.no_grad():
            for start in starts:
                rows = slice(start, start + step)
                batch_condition = {key: values[rows] for key, values in condition.items()}
                result[rows] = self._upscale_any(images[rows], generators[rows], batch_condition)
        return result

    def _upscale_any(self, images: Tensor, generators: list[torch.Generator], condition: dict[str, Any]) -> Tensor:
        count, channels, height, width = images.shape
        x = images.to(self.device, torch.float32).clamp(0, 1)
        if self.channels == 3 and channels == 1:
            x = x.expand(-1, 3, -1, -1)
        elif self.channels == 1 and channels == 3:
            x = x.reshape(count * 3, 1, height, width)
        x = pad_to_multiple(x, self.size_multiple)
        y = self._upscale(x.to(self.dtype), generators, condition).float()
        expected = (*x.shape[:2], x.shape[2] * self.scale, x.shape[3] * self.scale)
        if tuple(y.shape) != expected:
            raise StateError(f"{self.name} made {tuple(y.shape)} of {tuple(x.shape)}; x{self.scale} is {expected}")
        if not bool(torch.isfinite(y).all()):
            raise StateError(f"{self.name} made NaN or infinite values in {self.dtype}; try dtype=torch.float32")
        y = y[:, :, : height * self.scale, : width * self.scale].clamp(0, 1)
        if self.channels == 3 and channels == 1:
            y = y.mean(1, keepdim=True)
        return y.reshape(count, channels, height * self.scale, width * self.scale)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        self.device = self.device if device is None else torch.device(device)
        self.dtype = dtype or self.dtype
        return self


def check_images(images: Tensor) -> None:
    """TypeError unless a Tensor, ValueError unless floating ``[B, 1 or 3, h, w]``, finite, in [0, 1]."""
    if not isinstance(images, Tensor):
        raise InvalidTypeError(f"images are a torch.Tensor, not {type(images).__name__}")
    if not images.is_floating_point():
        raise InvalidValueError(f"images are floating point in [0, 1], not {images.dtype}; divide bytes by 255 first")
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape[2:]:
        raise InvalidValueError(f"images are [B, C, h, w] with C = 1 or 3 and h, w >= 1, not {list(images.shape)}")
    if images.numel() == 0:
        return
    if not bool(torch.isfinite(images).all()):
        raise InvalidValueError("images hold NaN or infinite values")
    low, high = images.min().item(), images.max().item()
    if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        raise InvalidValueError(
            f"images are in [0, 1], but these span [{low:.4g}, {high:.4g}]; rescale or clamp them first"
        )


def check_positive(what: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidValueError(f"{what} is a positive integer, not {value!r}")
    return value


def check_scale(name: str, wanted: int | None, actual: int) -> int:
    """Returns ``actual``; raises ValueError when another scale was asked for."""
    if wanted is not None and wanted != actual:
        raise InvalidValueError(
            f"this {name} enlarges x{actual}, not x{wanted}; wavedp.superres.to_size chains to a wanted size"
        )
    return actual


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Pads ``[B, C, h, w]`` at the bottom and right, by reflection or, where that is too small, the edge."""
    height, width = images.shape[2:]
    bottom, right = -height % multiple, -width % multiple
    if not bottom and not right:
        return images
    mode = "reflect" if bottom < height and right < width else "replicate"
    return F.pad(images, (0, right, 0, bottom), mode=mode)


def generators_per_image(count: int, generator: torch.Generator | None) -> list[torch.Generator]:
    """One generator per image, seeded from ``generator``.

    They are CPU generators, so that an image's noise depends neither on the batching nor on the device.
    """
    device = generator.device if generator is not None else torch.device("cpu")
    seeds = torch.randint(2**63 - 1, (count,), generator=generator, device=device)
    return [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
