# SPDX-License-Identifier: Apache-2.0
"""Public digits drawn from fonts: what the models are pre-trained on before they meet private images.

Nothing here is fitted to a private image. What is assumed comes from the published description of such
scans alone (NIST forms; the UCI digits): white ink on black, one upright digit that fills the height of
its box, its width in proportion, a pen of moderate thickness. Everything else varies at random:

font or pen path -> pen thickness -> rotation, shear, stretch -> smooth elastic warp -> scaling of the
ink's bounding box to the picture -> soft edge and slight blur -> brightness of the ink.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from wavedp.data.dataset import TensorImageDataset
from wavedp.data.glyph_shapes import FIELD_SIZE, outline_fields, stroke_fields
from wavedp.data.resize import check_geometry
from wavedp.errors import InvalidValueError

DIGITS = "0123456789"
_STROKE_SHARE = 0.6
_MAX_WIDTH = 0.8
_CHUNK = 256

_Uniform = Callable[[float, float], Tensor]  # (low, high) -> float32 [n]


def render_glyphs(
    num_images: int,
    image_size: int = 32,
    *,
    seed: int,
    classes: str = DIGITS,
    channels: int = 1,
) -> TensorImageDataset:
    """Draws ``num_images`` glyphs, the classes in equal shares (to one image) and random order.

    Args:
        num_images: N.
        image_size: side in pixels, 8 or more.
        seed: the same seed (its low 32 bits), arguments and torch version give the same images.
        classes: one class per character, ASCII letters and digits.
        channels: 1, or 3 for the same value three times.

    Returns:
        uint8 ``[N, channels, image_size, image_size]``.

    Raises:
        ValueError: for other sizes, or characters that are repeated or not ASCII letters and digits.
        ImportError: if matplotlib, Pillow or Hershey-Fonts is missing (``pip install 'wavedp[demo]'``).
    """
    check_geometry(image_size, channels, "crop", 0)
    if num_images < 0 or image_size < 8:
        raise InvalidValueError(f"need num_images >= 0 and image_size >= 8, got {num_images} and {image_size}")
    if not (classes.isascii() and classes.isalnum()) or len(set(classes)) != len(classes):
        raise InvalidValueError(f"classes must be distinct ASCII letters and digits, got {classes!r}")
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_images) % len(classes)
    labels = labels[torch.randperm(num_images, generator=generator)]
    images = torch.empty(num_images, 1, image_size, image_size, dtype=torch.uint8)
    for start in range(0, num_images, _CHUNK):
        part = slice(start, start + _CHUNK)
        images[part] = _draw(labels[part], classes, image_size, generator)
    return TensorImageDataset(images.expand(-1, channels, -1, -1).contiguous(), labels, classes, name="glyphs")


def _draw(labels: Tensor, classes: str, image_size: int, generator: torch.Generator) -> Tensor:
    n = len(labels)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, generator=generator) * (high - low) + low

    fields, reach = _pick(labels, classes, uniform)

    # The warp is drawn once and looked at twice: a first pass finds the ink's bounding box, the second
    # draws that box to fill the picture.
    warp = _elastic(n, generator) * _each(uniform(0.0, 0.09))
    bend = _affine(uniform)
    first = _look_up(fields, torch.eye(2).expand(n, 2, 2), torch.zeros(n, 2), bend, warp, FIELD_SIZE)
    low, high = _bounds(first > -_each(reach))

    fill = uniform(0.92, 1.0)
    width = ((high - low)[:, 0] / (high - low)[:, 1]).clamp(max=_MAX_WIDTH)
    width = (width * uniform(0.85, 1.2)).clamp(max=_MAX_WIDTH)
    extent = torch.stack([width * fill, fill], dim=1)  # share of the picture's width and height
    zoom = (high - low) / 2 / extent
    slack = torch.stack([uniform(-0.06, 0.06), uniform(-1, 1) * (1 - fill)], dim=1)
    shift = (low + high) / 2 - slack * zoom
    size = 2 * image_size
    drawn = _look_up(fields, torch.diag_embed(zoom), shift, bend, warp, size)

    # The edge is a ramp of one to three samples, before the 2 x 2 averaging.
    slope = size / (zoom[:, 1] * FIELD_SIZE) * uniform(0.35, 1.0)
    ink = (0.5 + (drawn + _each(reach)) * _each(slope)).clamp(0, 1)
    ink = F.avg_pool2d(ink, 2)
    soft = F.avg_pool2d(F.pad(ink, (1, 1, 1, 1)), 3, stride=1)
    blur = _each(uniform(0.0, 0.6))
    ink = (ink * (1 - blur) + soft * blur) * _each(uniform(0.85, 1.0))
    return (ink * 255).round().to(torch.uint8)


def _pick(labels: Tensor, classes: str, uniform: _Uniform) -> tuple[Tensor, Tensor]:
    """A random shape of each label: distance fields ``[n, 1, FIELD_SIZE, FIELD_SIZE]``, and how far
    (``[n]``, field pixels) the ink reaches beyond the zero line."""
    outlines, strokes = (torch.from_numpy(f(classes)) for f in (outline_fields, stroke_fields))
    is_stroke = uniform(0, 1) < _STROKE_SHARE
    choice = uniform(0, 1)
    outline = outlines[(choice * len(outlines)).long(), labels]
    stroke = strokes[(choice * len(strokes)).long(), labels]
    fields = torch.where(is_stroke[:, None, None], stroke, outline)[:, None]
    return fields, torch.where(is_stroke, uniform(2.5, 7.0), uniform(-0.5, 3.5))


def _affine(uniform: _Uniform) -> Tensor:
    """Rotation by up to 12 degrees after a slant of up to 0.3: ``[n, 2, 2]``."""
    angle, slant = uniform(-math.pi / 15, math.pi / 15), uniform(-0.3, 0.3)
    cos, sin = angle.cos(), angle.sin()
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    rotation = torch.stack([cos, -sin, sin, cos], dim=1).view(-1, 2, 2)
    return torch.stack([one, slant, zero, one], dim=1).view(-1, 2, 2) @ rotation


def _elastic(n: int, generator: torch.Generator) -> Tensor:
    """Smooth displacements ``[n, 2, 24, 24]`` of about unit size, interpolated from 5 x 5 normals."""
    coarse = torch.randn(n, 2, 5, 5, generator=generator)
    return F.interpolate(coarse, size=(24, 24), mode="bicubic", align_corners=True)


def _look_up(fields: Tensor, zoom: Tensor, shift: Tensor, bend: Tensor, warp: Tensor, size: int) -> Tensor:
    """The fields as ``size`` x ``size`` pictures: p shows ``bend (q + warp(q))``, q = zoom p + shift."""
    n = len(fields)
    view = F.affine_grid(torch.cat([zoom, shift[:, :, None]], dim=2), [n, 1, size, size], align_corners=False)
    moved = F.grid_sample(warp, view, padding_mode="border", align_corners=True)
    places = (view + moved.permute(0, 2, 3, 1)).view(n, -1, 2) @ bend.mT
    return F.grid_sample(fields, places.view(n, size, size, 2), padding_mode="border", align_corners=False)


def _bounds(ink: Tensor) -> tuple[Tensor, Tensor]:
    """Corners (x, y) in [-1, 1] of the box around the true pixels of ``[n, 1, S, S]``: two ``[n, 2]``."""
    size = ink.shape[-1]
    low, high = [], []
    for along in (2, 3):  # any() over y leaves x
        hit = ink.any(dim=along).flatten(1).to(torch.int64)
        low.append(hit.argmax(dim=1))
        high.append(size - hit.flip(1).argmax(dim=1))
    return torch.stack(low, dim=1) * 2 / size - 1, torch.stack(high, dim=1) * 2 / size - 1


def _each(values: Tensor) -> Tensor:
    return values[:, None, None, None]
