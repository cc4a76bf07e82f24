# SPDX-License-Identifier: Apache-2.0
"""The outlines behind the public glyphs, as signed distance fields on a common grid.

Two families: filled outlines of the TrueType fonts that matplotlib ships (DejaVu, STIX, Computer
Modern), and the single-stroke fonts digitised by A. V. Hershey in 1967 (the Hershey-Fonts package). A
distance field makes the pen's thickness one number: ink is where the distance is above a threshold.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wavedp.errors import InvalidValueError
from wavedp.extras import import_extra

FIELD_SIZE = 96
"""Side of a distance field in pixels; the glyph is centred and fits the middle `GLYPH_SIZE` of it."""
GLYPH_SIZE = 64
_OVERSAMPLING = 2
_REACH = 24

FONT_FILES = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Oblique.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSerif-Italic.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
    "STIXGeneralBolIta.ttf",
    "STIXGeneralItalic.ttf",
    "cmb10.ttf",
    "cmr10.ttf",
    "cmss10.ttf",
    "cmti10.ttf",
    "cmtt10.ttf",
)
STROKE_FONTS = ("futural", "rowmans", "scripts", "scriptc", "timesr", "timesi", "futuram")

Field = npt.NDArray[np.float32]


@cache
def outline_fields(characters: str) -> Field:
    """Distance fields of ``characters`` in every font of `FONT_FILES`.

    Returns:
        float32 ``[fonts, characters, FIELD_SIZE, FIELD_SIZE]``: the distance to the outline in pixels of
        the field, positive inside.

    Raises:
        ValueError: if a font lacks one of the characters.
        ImportError: if matplotlib or Pillow is missing (``pip install 'wavedp[demo]'``).
    """
    folder = Path(import_extra("matplotlib", "demo").get_data_path()) / "fonts" / "ttf"
    return np.stack([_font_fields(folder / file, characters) for file in FONT_FILES])


@cache
def stroke_fields(characters: str) -> Field:
    """Distance fields of ``characters`` in every single-stroke font of `STROKE_FONTS`.

    Returns:
        float32 ``[fonts, characters, FIELD_SIZE, FIELD_SIZE]``: minus the distance to the pen's path.

    Raises:
        ValueError: if a font draws nothing for one of the characters.
        ImportError: if Hershey-Fonts is missing (``pip install 'wavedp[demo]'``).
    """
    fonts = import_extra("HersheyFonts", "demo").HersheyFonts()
    fields = []
    for name in STROKE_FONTS:
        fonts.load_default_font(name)
        for character in characters:
            strokes = [list(stroke) for stroke in fonts.strokes_for_text(character)]
            segments = [(*a, *b) for stroke in strokes for a, b in pairwise(stroke)]
            if not segments:
                raise InvalidValueError(f"the Hershey font {name!r} has no strokes for {character!r}")
            fields.append(_stroke_field(np.asarray(segments, dtype=np.float64)))
    return np.stack(fields).reshape(len(STROKE_FONTS), len(characters), FIELD_SIZE, FIELD_SIZE)


def _font_fields(file: Path, characters: str) -> Field:
    Image = import_extra("PIL.Image", "demo")
    ImageDraw = import_extra("PIL.ImageDraw", "demo")
    ImageFont = import_extra("PIL.ImageFont", "demo")
    known = import_extra("matplotlib.ft2font", "demo").FT2Font(str(file)).get_charmap()
    missing = [c for c in characters if ord(c) not in known]
    if missing:
        raise InvalidValueError(f"{file.name} has no glyph for {missing}")
    size = FIELD_SIZE * _OVERSAMPLING
    font = ImageFont.truetype(str(file), size)
    fields = []
    for character in characters:
        left, top, right, bottom = font.getbbox(character)
        page = Image.new("L", (int(right - left), int(bottom - top)))
        ImageDraw.Draw(page).text((-left, -top), character, fill=255, font=font)
        scale = GLYPH_SIZE * _OVERSAMPLING / max(page.size)
        width, height = (max(1, round(side * scale)) for side in page.size)
        canvas = Image.new("L", (size, size))
        canvas.paste(page.resize((width, height)), ((size - width) // 2, (size - height) // 2))
        distance = _signed_distance(np.asarray(canvas) >= 128) / _OVERSAMPLING
        blocks = distance.reshape(FIELD_SIZE, _OVERSAMPLING, FIELD_SIZE, _OVERSAMPLING)
        fields.append(blocks.mean(axis=(1, 3)))
    return np.stack(fields)


def _signed_distance(inside: npt.NDArray[np.bool_]) -> Field:
    outward, inward = _squared_distance(inside), _squared_distance(~inside)
    return (np.sqrt(inward) - np.sqrt(outward)).astype(np.float32)


def _squared_distance(target: npt.NDArray[np.bool_]) -> Field:
    """Squared distance of every pixel to the nearest true one, up to `_REACH` pixels along each axis.

    d(i, j) = min_k min_l (i - k)^2 + (j - l)^2 = min_l [(j - l)^2 + min_k (i - k)^2]
    """
    squared = np.where(target, np.float32(0), np.float32(2 * _REACH**2))
    for axis in (0, 1):
        lines = np.moveaxis(squared, axis, 0)
        nearest = lines.copy()
        for step in range(1, _REACH + 1):
            np.minimum(nearest[step:], lines[:-step] + step**2, out=nearest[step:])
            np.minimum(nearest[:-step], lines[step:] + step**2, out=nearest[:-step])
        squared = np.moveaxis(nearest, 0, axis)
    return squared


def _stroke_field(segments: npt.NDArray[np.float64]) -> Field:
    ends = segments.reshape(-1, 2)
    low, high = ends.min(axis=0), ends.max(axis=0)
    scale = GLYPH_SIZE / (high - low).max()
    a, b = ((ends[k::2] - (low + high) / 2) * scale + FIELD_SIZE / 2 for k in (0, 1))
    centres = np.arange(FIELD_SIZE) + 0.5
    pixels = np.stack(np.meshgrid(centres, centres, indexing="xy"), axis=-1)[:, :, None]  # [y, x, 1, 2]
    along = b - a
    length = np.maximum((along**2).sum(axis=-1), 1e-12)
    t = np.clip(((pixels - a) * along).sum(axis=-1) / length, 0, 1)
    distance = np.linalg.norm(pixels - (a + t[..., None] * along), axis=-1).min(axis=-1)
    return np.asarray(-distance, dtype=np.float32)
