# SPDX-License-Identifier: Apache-2.0
"""Pictures for people: labelled grids of images, curves of a training log, dots of a comparison."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from wavedp.errors import InvalidValueError
from wavedp.extras import import_extra

if TYPE_CHECKING:
    from PIL import Image, ImageFont

Row = tuple[str, Tensor]
"""A label and its images: float ``[n, C, h, w]`` in [0, 1], C = 1 or 3."""

_GAP = 3
_MARGIN = 10
_PAPER = (255, 255, 255)
_INK = (20, 20, 20)


def save_grid(
    path: str | os.PathLike[str],
    rows: Sequence[Row],
    *,
    cell: int = 64,
    title: str | None = None,
    column_labels: Sequence[str] | None = None,
) -> None:
    """Writes rows of images as one picture, each row with its label on the left.

    An image whose side is not ``cell`` is scaled to it: smaller ones by repeating pixels, so that a coarse
    image shows its pixels as squares; larger ones by averaging.

    Args:
        path: the file; the format follows its suffix (``.png``).
        rows: label and images of each row, top to bottom; rows may differ in length and image size.
        cell: side of every image in the picture, pixels.
        title: a line above the grid.
        column_labels: one text per column, for example the class names.

    Raises:
        ValueError: for no rows, or images of another shape, dtype or range.
        ImportError: if Pillow is missing (``pip install 'wavedp[data]'``).
    """
    Image = import_extra("PIL.Image", "data")
    ImageDraw = import_extra("PIL.ImageDraw", "data")
    ImageFont = import_extra("PIL.ImageFont", "data")
    columns = _check_rows(rows, cell, column_labels)
    font, title_font = (ImageFont.load_default(size) for size in (13, 16))
    labels = [_wrap(label, font, 170) for label, _ in rows]
    left = _MARGIN + max(_text_width(line, font) for lines in labels for line in lines) + _MARGIN
    top = _MARGIN + (26 if title else 0) + (20 if column_labels else 0)
    pitch = cell + _GAP
    width = max(left + columns * pitch, _text_width(title or "", title_font) + _MARGIN) + _MARGIN
    sheet = Image.new("RGB", (width, top + len(rows) * pitch + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((_MARGIN, _MARGIN), title, fill=_INK, font=title_font)
    for column, text in enumerate(column_labels or ()):
        text = _shorten(text, font, pitch)
        draw.text((left + column * pitch + cell / 2, top - 12), text, fill=_INK, font=font, anchor="mm")
    for row, (lines, (_, images)) in enumerate(zip(labels, rows, strict=True)):
        y = top + row * pitch
        middle = y + cell / 2 - 8 * (len(lines) - 1)
        for k, line in enumerate(lines):
            draw.text((_MARGIN, middle + 16 * k), line, fill=_INK, font=font, anchor="lm")
        for column, image in enumerate(images):
            sheet.paste(_picture(image, cell), (left + column * pitch, y))
    sheet.save(path)


def save_curves(
    path: str | os.PathLike[str],
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str | None = None,
    x_label: str = "step",
    y_label: str = "loss",
    log_y: bool = False,
) -> None:
    """Writes a line plot; its legend names every series, also a single one.

    Args:
        path: the file; the format follows its suffix.
        series: name -> (x values, y values) of each line.
        title, x_label, y_label: texts.
        log_y: a logarithmic y axis.

    Raises:
        ValueError: for no series, or x and y of different length.
        ImportError: if matplotlib is missing (``pip install 'wavedp[demo]'``).
    """
    canvas = import_extra("matplotlib.backends.backend_agg", "demo")
    Figure = import_extra("matplotlib.figure", "demo").Figure
    if not series:
        raise InvalidValueError("save_curves needs at least one series")
    for name, (xs, ys) in series.items():
        if len(xs) != len(ys):
            raise InvalidValueError(f"series {name!r} has {len(xs)} x values and {len(ys)} y values")
    figure = Figure(figsize=(6.4, 4.0), dpi=120, layout="constrained")
    canvas.FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, (xs, ys) in series.items():
        axes.plot(list(xs), list(ys), label=name, linewidth=1.2, marker="o" if len(xs) < 3 else "")
    axes.set(xlabel=x_label, ylabel=y_label, title=title or "")
    if log_y:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path)


def save_dots(
    path: str | os.PathLike[str],
    points: Mapping[str, tuple[float, float]],
    *,
    title: str | None = None,
    x_label: str = "",
) -> None:
    """Writes a dot plot, a line for each point, top to bottom; a dashed line goes through the first.

    Args:
        path: the file; the format follows its suffix.
        points: name -> (value, deviation); a deviation of 0 is not drawn.
        title, x_label: texts.

    Raises:
        ValueError: for no points.
        ImportError: if matplotlib is missing (``pip install 'wavedp[demo]'``).
    """
    canvas = import_extra("matplotlib.backends.backend_agg", "demo")
    Figure = import_extra("matplotlib.figure", "demo").Figure
    if not points:
        raise InvalidValueError("save_dots needs at least one point")
    figure = Figure(figsize=(7.2, 1.3 + 0.3 * len(points)), dpi=120, layout="constrained")
    canvas.FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(points))
    values, deviations = zip(*points.values(), strict=True)
    axes.axvline(values[0], color="#999999", linestyle="--", linewidth=1)
    axes.errorbar(values, places, xerr=deviations if any(deviations) else None, fmt="o", markersize=5, capsize=2)
    for place, value in zip(places, values, strict=True):  # right of the frame
        axes.text(1.01, place, f"{value:#.4g}", transform=axes.get_yaxis_transform(), va="center", fontsize=9)
    axes.set_yticks(places, [textwrap.fill(name, 36) for name in points])
    axes.set_ylim(len(points) - 0.5, -0.5)
    axes.grid(alpha=0.3)
    figure.suptitle(title or "", fontsize=11)  # over the names too, which may leave the axes little room
    figure.supxlabel(x_label, fontsize=10)
    figure.savefig(path)


def _check_rows(rows: Sequence[Row], cell: int, column_labels: Sequence[str] | None) -> int:
    """The number of columns."""
    if not rows:
        raise InvalidValueError("save_grid needs at least one row")
    if cell < 4:
        raise InvalidValueError(f"cell must be at least 4 pixels, got {cell}")
    for label, images in rows:
        if images.dim() != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
            raise InvalidValueError(
                f"row {label!r}: images must be float [n, 1 or 3, h, w], got {images.dtype} {list(images.shape)}"
            )
        if images.numel() and not -1e-3 <= float(images.min()) <= float(images.max()) <= 1 + 1e-3:
            raise InvalidValueError(
                f"row {label!r}: images must lie in [0, 1], they span {images.min():g}..{images.max():g}"
            )
    columns = max(len(images) for _, images in rows)
    if column_labels is not None and len(column_labels) > columns:
        raise InvalidValueError(f"{len(column_labels)} column labels for {columns} columns")
    return columns


def _picture(image: Tensor, cell: int) -> Image.Image:
    from PIL import Image

    image = image.detach().float().cpu()[None]
    if max(image.shape[-2:]) > cell:
        image = F.interpolate(image, size=(cell, cell), mode="area")
    elif image.shape[-2:] != (cell, cell):
        image = F.interpolate(image, size=(cell, cell), mode="nearest-exact")
    pixels = (image[0].clamp(0, 1) * 255).round().byte().expand(3, -1, -1).permute(1, 2, 0)
    return Image.fromarray(pixels.contiguous().numpy())


def _text_width(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    return int(font.getlength(text) + 1)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, limit: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _text_width(longer, font) > limit:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, limit: int) -> str:
    if _text_width(text, font) <= limit:
        return text
    while text and _text_width(text + "…", font) > limit:
        text = text[:-1]
    return text + "…"
