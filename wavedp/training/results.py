# SPDX-License-Identifier: Apache-2.0
"""What a command leaves in its run folder for people and for the next command: image folders, loss curves, tables."""

import csv
import io
import re
import shutil
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wavedp.storage import write_bytes
from wavedp.training.pictures import save_curves
from wavedp.training.runs import read_log


def save_images(folder: Path, images: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    """Replaces ``folder`` by [n, C, H, W] images in [0, 1] as ``<class>/<number>.png``, numbered over the whole set.

    A class name becomes a folder name with every character that is not a letter, a digit, ``-``, ``_``, ``.`` or a
    space replaced by ``_``; should two names then coincide, or one be empty, the label's number is put in front.
    """
    from PIL import Image

    names = folder_names(classes)
    shutil.rmtree(folder, ignore_errors=True)
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    for number, (picture, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
        grey = picture.shape[-1] == 1
        Image.fromarray(picture[..., 0] if grey else picture).save(folder / names[label] / f"{number:06d}.png")


def folder_names(classes: Sequence[str]) -> list[str]:
    """One safe, distinct folder name for each class."""
    # 60 characters: a name of a file system has at most 255 bytes, and a character up to four
    names = [re.sub(r"[^\w\-. ]", "_", name)[:60].strip(". ") for name in classes]
    if len({name.casefold() for name in names}) < len(names) or not all(names):
        names = [f"{label}_{name}" for label, name in enumerate(names)]
    return names


def save_log(path: Path, log: Path, columns: Sequence[str], *, title: str | None = None) -> None:
    """Plots columns of a CSV log over its steps, if matplotlib is installed; the log itself is there either way."""
    if find_spec("matplotlib") is None:
        return
    rows = read_log(log)
    steps = [float(row["step"]) for row in rows]
    save_curves(path, {c: (steps, [float(row[c]) for row in rows]) for c in columns}, title=title)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replaces a CSV file by ``rows``, which have the keys of the first."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())
