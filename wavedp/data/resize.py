# SPDX-License-Identifier: Apache-2.0
"""The one rule by which an image of any size and mode becomes ``[C, S, S]`` 8-bit pixels.

* ``fit="crop"`` (default): the largest centred square is kept, starting at ``(side - shorter) // 2``,
  and scaled to S x S: the shorter side fits, what sticks out on the longer side is lost.
* ``fit="pad"``: the longer side is scaled to S, the shorter to the nearest pixel in proportion (at
  least 1), and the rest is filled evenly with ``background``.
* Scaling is Pillow's bicubic, which widens its kernel when it shrinks (so it does not alias).
* Colour to grey is ITU-R BT.601 luma, L = (299 R + 587 G + 114 B) / 1000 in the encoded values, as
  Pillow computes it; grey to colour repeats the value in R, G and B.
* Transparency is composited on ``background`` (0..255, the same in every channel; 0 is black) before
  scaling. 16-bit samples (0..65535) keep their upper byte; floating-point images and wider integers
  are refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from wavedp.errors import InvalidTypeError, InvalidValueError
from wavedp.extras import import_extra

if TYPE_CHECKING:
    from PIL import Image

Fit = Literal["crop", "pad"]


def check_geometry(image_size: int, channels: int, fit: str, background: int) -> None:
    """Refuses a request no rule covers, before any file is read.

    Raises:
        ValueError: naming the argument and what it may be.
    """
    for name, number in (("image_size", image_size), ("channels", channels), ("background", background)):
        if isinstance(number, bool) or not isinstance(number, int):
            raise InvalidTypeError(f"{name} must be an integer, got {number!r}")
    if not 1 <= image_size <= 4096:
        raise InvalidValueError(f"image_size must be 1..4096 pixels, got {image_size}")
    if channels not in (1, 3):
        raise InvalidValueError(f"channels must be 1 (grey) or 3 (RGB), got {channels}")
    if fit not in ("crop", "pad"):
        raise InvalidValueError(f'fit must be "crop" or "pad", got {fit!r}')
    if not 0 <= background <= 255:
        raise InvalidValueError(f"background must be 0..255, got {background}")


def fit_picture(
    picture: Image.Image, image_size: int, channels: int, *, fit: Fit = "crop", background: int = 0
) -> Tensor:
    """A decoded Pillow image by the rule above: uint8 ``[channels, image_size, image_size]``.

    Raises:
        ValueError: for pixels without a stated range: floating-point, or integers beyond 16 bits.
    """
    from PIL import Image

    flat = _to_mode(picture, "L" if channels == 1 else "RGB", background)
    width, height = flat.size
    if fit == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        flat = _scale(flat.crop((left, top, left + side, top + side)), image_size, image_size)
    else:
        side = max(width, height)
        scaled = _scale(flat, *(max(1, round(length * image_size / side)) for length in (width, height)))
        flat = Image.new(flat.mode, (image_size, image_size), (background,) * channels)
        flat.paste(scaled, ((image_size - scaled.width) // 2, (image_size - scaled.height) // 2))
    pixels = torch.from_numpy(np.array(flat, dtype=np.uint8))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()


def fit_pixels(images: Tensor, image_size: int, channels: int, *, fit: Fit = "crop", background: int = 0) -> Tensor:
    """The same rule for tensors: uint8 ``[N, C, H, W]`` to ``[N, channels, image_size, image_size]``.

    Raises:
        ImportError: if there is something to do and Pillow is missing (``pip install 'wavedp[data]'``).
    """
    n, c, height, width = images.shape
    if (c, height, width) == (channels, image_size, image_size):
        return images
    Image = import_extra("PIL.Image", "data")
    out = torch.empty(n, channels, image_size, image_size, dtype=torch.uint8)
    for i, image in enumerate(images):
        array = image[0].numpy() if c == 1 else image.permute(1, 2, 0).numpy()
        picture = Image.fromarray(np.ascontiguousarray(array))
        out[i] = fit_picture(picture, image_size, channels, fit=fit, background=background)
    return out


def _scale(picture: Image.Image, width: int, height: int) -> Image.Image:
    from PIL import Image

    if picture.size == (width, height):
        return picture
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def _to_mode(picture: Image.Image, mode: str, background: int) -> Image.Image:
    from PIL import Image

    if picture.mode == "F":
        raise InvalidValueError("floating-point pixels have no stated range; save them with 8 or 16 bits")
    if picture.mode.startswith("I"):
        samples = np.asarray(picture).astype(np.int64)
        if samples.min() < 0 or samples.max() >= 2**16:
            raise InvalidValueError("pixels beyond 0..65535 have no stated range; save them with 8 or 16 bits")
        picture = Image.fromarray((samples >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        ink = picture.convert("RGBA")
        page = Image.new("RGBA", ink.size, (background, background, background, 255))
        picture = Image.alpha_composite(page, ink).convert("RGB")
    return picture if picture.mode == mode else picture.convert("RGB").convert(mode)
