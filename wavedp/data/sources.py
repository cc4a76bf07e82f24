# SPDX-License-Identifier: Apache-2.0
"""`open_dataset`: every source behind one call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from wavedp.data.archive import list_archive
from wavedp.data.catalog import MEMORY_LIMIT, Split, load_catalog
from wavedp.data.dataset import ImageDataset, check_distinct
from wavedp.data.digits import load_digits_dataset
from wavedp.data.folder import list_folder
from wavedp.data.glyphs import DIGITS, render_glyphs
from wavedp.data.idx import find_idx, load_idx
from wavedp.data.npz import load_npz
from wavedp.data.resize import Fit, check_geometry
from wavedp.data.silhouettes import render_silhouettes
from wavedp.errors import InvalidValueError, MissingFileError

NAMED_SOURCES = ("digits", "glyphs", "silhouettes")


def open_dataset(
    source: str | os.PathLike[str],
    *,
    image_size: int,
    channels: int = 1,
    split: Split = "train",
    fit: Fit = "crop",
    background: int = 0,
    skip_bad: bool = False,
    classes: Sequence[str] | None = None,
    num_images: int = 10_000,
    seed: int = 0,
    memory_limit: int = MEMORY_LIMIT,
) -> ImageDataset:
    """Opens a data set; after that, no file of it is read again.

    Args:
        source: ``"digits"`` (scikit-learn's, real), ``"glyphs"`` (drawn from fonts), ``"silhouettes"``
            (painted clothes), or a path: a folder with the IDX files of the MNIST family, one IDX file of
            images, a ``.npz`` of images and labels,
            a ``.zip`` of images, a folder with ``images.zip`` and ``index.tsv``, or an image
            folder. A path named like a built-in source is reached as ``./digits``.
        image_size: side of the square images, pixels; :mod:`wavedp.data.resize` has the rule.
        channels: 1 (grey) or 3 (RGB).
        split: ``"train"``, ``"test"`` or ``"all"``. A source without a split of its own gives about one
            image in five to "test", by a hash of its path, or of its bytes for IDX
            (:func:`wavedp.data.catalog.in_split`).
        fit: ``"crop"`` or ``"pad"``.
        background: 0..255, under transparent pixels and in the margins of ``"pad"``.
        skip_bad: leave bad image files out and count them in ``skipped``, instead of raising.
        classes: class names in the order of the labels: required names for IDX, the order for folders
            and archives (default sorted), the characters for glyphs. Distinct.
        num_images, seed: how many glyphs or silhouettes, and which; "test" and "train" are drawn from
            different seeds.
        memory_limit: bytes of pixels kept in memory; more goes to a temporary file.

    Raises:
        FileNotFoundError: if there is nothing at ``source``.
        ValueError: for a bad file (`BadImageError`, `IdxError`; both name it), an empty source, or an
            argument out of range.
        ImportError: if a package is missing; the message names the extra to install.
    """
    check_geometry(image_size, channels, fit, background)
    if split not in ("train", "test", "all"):
        raise InvalidValueError(f'split must be "train", "test" or "all", got {split!r}')
    if classes is not None:
        check_distinct(classes)
    if source == "digits":
        return load_digits_dataset(image_size, channels, split=split, fit=fit, background=background)
    chosen_seed = seed ^ 2**31 if split == "test" else seed  # torch uses the low 32 bits
    if source == "silhouettes":
        return render_silhouettes(num_images, image_size, seed=chosen_seed, channels=channels)
    if source == "glyphs":
        characters = DIGITS if classes is None else classes
        if any(len(character) != 1 for character in characters):
            raise InvalidValueError(f"the classes of glyphs are single characters, got {list(characters)}")
        return render_glyphs(num_images, image_size, seed=chosen_seed, classes="".join(characters), channels=channels)

    path = Path(source)
    if not path.exists():
        raise MissingFileError(f"no such data set: {path} (a path, or one of {', '.join(NAMED_SOURCES)})")
    is_idx_folder = path.is_dir() and any(find_idx(path, which, "images") for which in ("train", "test"))
    if path.is_file() and path.suffix.lower() == ".npz":
        return load_npz(
            path,
            image_size=image_size,
            channels=channels,
            split=split,
            fit=fit,
            background=background,
            classes=classes,
        )
    if is_idx_folder or (path.is_file() and path.suffix.lower() != ".zip"):
        return load_idx(
            path,
            image_size=image_size,
            channels=channels,
            split=split,
            fit=fit,
            background=background,
            classes=classes,
        )
    packed = path / "images.zip" if path.is_dir() else path
    is_archive = packed.is_file() and (path.is_file() or (path / "index.tsv").is_file())
    entries, refused = list_archive(packed) if is_archive else list_folder(path)
    return load_catalog(
        entries,
        name=path.resolve().name,
        image_size=image_size,
        channels=channels,
        split=split,
        fit=fit,
        background=background,
        skip_bad=skip_bad,
        classes=classes,
        refused=refused,
        memory_limit=memory_limit,
    )
