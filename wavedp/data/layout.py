# SPDX-License-Identifier: Apache-2.0
"""Which class and split a file belongs to, by where it lies in a folder or an archive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

IMAGE_SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".webp",
    ".ppm",
    ".pgm",
    ".pbm",
    ".pnm",
)
_SPLIT_FOLDERS = {"train": "train", "test": "test", "val": "test", "valid": "test", "validation": "test"}


@dataclass(frozen=True)
class Place:
    """A file's class, and its split where the layout has splits."""

    class_name: str
    split: str | None


def place_files(files: Sequence[str], flat_name: str) -> list[Place | None]:
    """The place of each file, None for one that lies loose beside class folders.

    * If the only sub-folders are ``train`` and some of ``test``, ``val``, ``valid``, ``validation``, they
      are the splits, and the classes are inside them.
    * Otherwise every sub-folder is a class of that name, with all files below it, at any depth.
    * Without class folders, everything is one class called ``flat_name``.

    Args:
        files: paths relative to the root, with ``/``.
        flat_name: the class of a set without class folders.
    """
    top = {file.split("/")[0] for file in files if "/" in file}
    has_splits = "train" in top and len(top) > 1 and top <= set(_SPLIT_FOLDERS)
    depth = 1 if has_splits else 0
    has_classes = any(file.count("/") > depth for file in files)
    places: list[Place | None] = []
    for file in files:
        parts = file.split("/")
        split = _SPLIT_FOLDERS.get(parts[0]) if has_splits and len(parts) > 1 else None
        inner = parts[1:] if split else parts
        if has_classes and len(inner) > 1:
            places.append(Place(inner[0], split))
        elif has_classes or (has_splits and split is None):
            places.append(None)
        else:
            places.append(Place(flat_name, split))
    return places


def named_like_an_image(file: str) -> bool:
    """Whether the name's ending is that of an accepted format."""
    return file.lower().endswith(IMAGE_SUFFIXES)
