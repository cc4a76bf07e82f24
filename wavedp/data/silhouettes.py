# SPDX-License-Identifier: Apache-2.0
"""Public clothes-like pictures: painted outlines, for pre-training before private photographs of clothes.

Assumed of such photographs, from the published description of Fashion-MNIST alone: grey, the article bright
on black, seen from the front (shoes from the side, toe to the left), centred, its longer side filling the
picture. Everything else is drawn at random: proportions, brightness, cloth (plain, stripes, checks, knit,
print), folds, light from one side, a small turn and stretch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from wavedp.data.dataset import TensorImageDataset
from wavedp.data.resize import check_geometry
from wavedp.data.silhouette_pieces import Layer, Rng
from wavedp.data.silhouette_shapes import DRAWINGS
from wavedp.errors import InvalidValueError
from wavedp.extras import import_extra

SILHOUETTES = tuple(DRAWINGS)
_OVERSAMPLING = 4

# How often the cloth is not plain; leather and denim mostly are.
_PATTERNED = {"Trouser": 0.25, "Sandal": 0.1, "Sneaker": 0.15, "Bag": 0.3, "Ankle boot": 0.1}
_PATTERNED_OTHERS = 0.55

Plane = npt.NDArray[np.float32]


def render_silhouettes(num_images: int, image_size: int = 32, *, seed: int, channels: int = 1) -> TensorImageDataset:
    """Paints ``num_images`` articles, the ten classes in equal shares (to one image) and random order.

    Args:
        num_images: N.
        image_size: side in pixels, 8 or more.
        seed: the same seed, arguments and NumPy and Pillow versions give the same images.
        channels: 1, or 3 for the same value three times.

    Returns:
        uint8 ``[N, channels, image_size, image_size]``; classes in Fashion-MNIST's order.

    Raises:
        ValueError: for other sizes or a negative seed.
        ImportError: if Pillow is missing (``pip install 'wavedp[data]'``).
    """
    check_geometry(image_size, channels, "crop", 0)
    if num_images < 0 or image_size < 8 or seed < 0:
        raise InvalidValueError(
            f"need num_images >= 0, image_size >= 8, seed >= 0, got {num_images}, {image_size}, {seed}"
        )
    order = np.random.Generator(np.random.PCG64([seed, 0])).permutation(num_images) % len(DRAWINGS)
    images = torch.empty(num_images, 1, image_size, image_size, dtype=torch.uint8)
    for i, label in enumerate(order):
        rng = np.random.Generator(np.random.PCG64([seed, 1, i]))
        images[i, 0] = torch.from_numpy(_paint(SILHOUETTES[label], image_size, rng))
    return TensorImageDataset(
        images.expand(-1, channels, -1, -1).contiguous(),
        torch.from_numpy(order.astype(np.int64)),
        SILHOUETTES,
        name="silhouettes",
    )


def _paint(kind: str, image_size: int, rng: Rng) -> npt.NDArray[np.uint8]:
    size = image_size * _OVERSAMPLING
    tone, cloth = _draw(_fit(DRAWINGS[kind](rng), size, rng), size)
    shade = tone * _light(size, rng)
    if rng.random() < _PATTERNED.get(kind, _PATTERNED_OTHERS):
        shade *= _cloth_pattern(size, rng)
    shade *= rng.uniform(0.3, 0.95) ** rng.uniform(0.5, 1.5)
    picture = np.clip(shade, 0.06, 1) * cloth
    blocks = picture.reshape(image_size, _OVERSAMPLING, image_size, _OVERSAMPLING).mean(axis=(1, 3))
    grain = rng.normal(0, rng.uniform(0, 0.03), blocks.shape) * (blocks > 0.03)
    return np.asarray(np.round(np.clip(blocks + grain, 0, 1) * 255), dtype=np.uint8)


def _fit(layers: list[Layer], size: int, rng: Rng) -> list[Layer]:
    """The layers turned, stretched, centred and scaled until the longer side of the cloth fills the picture."""
    angle, slant = rng.normal(0, 0.03), rng.normal(0, 0.03)
    stretch = np.array([rng.uniform(0.92, 1.08), 1.0])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shear = np.array([[1.0, slant], [0.0, 1.0]])
    moved = [layer.points * stretch @ (turn @ shear).T for layer in layers]
    cloth = [(p, (layer.width or 0) / 2) for p, layer in zip(moved, layers, strict=True) if layer.is_cloth]
    low = np.min([p.min(axis=0) - half for p, half in cloth], axis=0)
    high = np.max([p.max(axis=0) + half for p, half in cloth], axis=0)
    scale = size * rng.uniform(0.95, 1.0) / (high - low).max()
    return [
        Layer(
            (points - (low + high) / 2) * scale + size / 2,
            layer.tone,
            None if layer.width is None else layer.width * scale,
            layer.is_cloth,
        )
        for points, layer in zip(moved, layers, strict=True)
    ]


def _draw(layers: list[Layer], size: int) -> tuple[Plane, Plane]:
    """Relative brightness and coverage, float32 ``[size, size]`` each."""
    Image = import_extra("PIL.Image", "data")
    ImageDraw = import_extra("PIL.ImageDraw", "data")
    tones, cover = Image.new("L", (size, size), 100), Image.new("L", (size, size))
    canvases = [(ImageDraw.Draw(tones), tones), (ImageDraw.Draw(cover), cover)]
    for layer in layers:
        corners = [(float(x), float(y)) for x, y in layer.points]
        for pen, canvas in canvases[: 2 if layer.is_cloth else 1]:
            ink = 255 if canvas is cover else round(float(np.clip(layer.tone, 0.1, 2.5)) * 100)
            if layer.width is None:
                pen.polygon(corners, fill=ink)
            else:
                pen.line(corners, fill=ink, width=max(1, round(layer.width)), joint="curve")
    relative, coverage = (np.asarray(canvas, dtype=np.float32) for canvas in (tones, cover))
    return np.asarray(relative / 100, dtype=np.float32), np.asarray(coverage / 255, dtype=np.float32)


def _cloth_pattern(size: int, rng: Rng) -> Plane:
    """Stripes, checks, knit or a print, as factors around 1, float32 ``[size, size]``."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    pattern = np.ones((size, size), dtype=np.float32)
    rows, columns = (np.sign(np.sin(2 * np.pi * rng.uniform(3, 12) * axis + rng.uniform(0, 6))) for axis in (y, x))
    kind = rng.random()
    if kind < 0.25:
        pattern += rng.uniform(0.1, 0.5) * rows
    elif kind < 0.37:
        pattern += rng.uniform(0.1, 0.4) * columns
    elif kind < 0.5:
        pattern += rng.uniform(0.08, 0.2) * (rows + columns)
    elif kind < 0.7:
        pattern += rng.uniform(0.05, 0.35) * _smooth_noise(size, 9, 9, rng)
    elif kind < 0.9:
        left, top = rng.uniform(0.33, 0.45), rng.uniform(0.2, 0.45)
        right, bottom = left + rng.uniform(0.1, 0.25), top + rng.uniform(0.05, 0.3)
        pattern[(x > left) & (x < right) & (y > top) & (y < bottom)] *= rng.choice([0.5, 1.6])
    else:
        pattern[y > rng.uniform(0.3, 0.7)] *= rng.uniform(0.5, 1.5)
    return pattern


def _light(size: int, rng: Rng) -> Plane:
    """Folds that run downwards and a gradient of light, as factors around 1, float32 ``[size, size]``."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size - 0.5
    folds = rng.uniform(0.02, 0.18) * _smooth_noise(size, 4, 8, rng)
    return np.asarray(1 + folds + rng.normal(0, 0.12) * x + rng.normal(0, 0.12) * y, dtype=np.float32)


def _smooth_noise(size: int, rows: int, columns: int, rng: Rng) -> Plane:
    Image = import_extra("PIL.Image", "data")
    coarse = Image.fromarray(rng.normal(0, 1, (rows, columns)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
