# SPDX-License-Identifier: Apache-2.0
"""From a list of named image files to a data set that cannot fail halfway through an epoch.

Every file is decoded once, when the set is opened, and only its pixels at the final size are kept. A set
too large for memory is kept in an unnamed temporary file that the system maps and frees by itself.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from wavedp.data.dataset import TensorImageDataset
from wavedp.data.picture_file import BadImageError, decode_picture, printable
from wavedp.data.resize import Fit
from wavedp.errors import InvalidValueError

Split = Literal["train", "test", "all"]

MEMORY_LIMIT = 2**31
"""Bytes of decoded pixels that are kept in memory; more goes to a temporary file."""

_TEST_SHARE = 5  # one image in five


@dataclass(frozen=True)
class PictureEntry:
    """One image file of a set.

    Attributes:
        file: its path inside the set, with ``/``; it decides the split where the source has none.
        location: what a message calls it.
        class_name: the class it belongs to.
        split: "train" or "test" where the source says so, else None.
        read: gives the file's bytes, or raises `BadImageError`.
    """

    file: str
    location: str
    class_name: str
    split: str | None
    read: Callable[[], bytes]


def in_split(key: str | bytes, own: str | None, split: Split) -> bool:
    """Whether an image belongs to ``split``.

    Where the source has no split of its own (``own`` is None), an image is in "test" when the first eight
    bytes of the SHA-256 of its key are a multiple of five: about one in five, and independent of which
    other images there are, so the key must be the image's own: its path, or its content, never its position.
    """
    if split == "all":
        return True
    if own is None:
        content = key if isinstance(key, bytes) else key.encode("utf-8", "surrogateescape")
        digest = hashlib.sha256(content).digest()
        own = "test" if int.from_bytes(digest[:8], "big") % _TEST_SHARE == 0 else "train"
    return own == split


def load_catalog(
    entries: Sequence[PictureEntry],
    *,
    name: str,
    image_size: int,
    channels: int,
    split: Split,
    fit: Fit = "crop",
    background: int = 0,
    skip_bad: bool = False,
    classes: Sequence[str] | None = None,
    refused: Sequence[BadImageError] = (),
    memory_limit: int = MEMORY_LIMIT,
) -> TensorImageDataset:
    """Decodes the entries of one split.

    Args:
        entries: all the files of the source.
        classes: the order of the classes; None sorts the names found.
        refused: what was already refused while listing; raised or counted with the rest.
        skip_bad: leave bad files out and list them in ``skipped``, instead of raising for the first.
        memory_limit: bytes of pixels above which a temporary file holds them.

    Raises:
        BadImageError: for the first bad file, unless ``skip_bad``.
        ValueError: if nothing is left, an entry's class is not in ``classes``, or a class has two places there.
        OSError: if the temporary file does not fit on its disk.
    """
    skipped = [(printable(error.file), error.reason) for error in refused]
    if refused and not skip_bad:
        raise _with_remedy(refused[0])
    order = sorted({entry.class_name for entry in entries}) if classes is None else list(classes)
    label_of = {class_name: label for label, class_name in enumerate(order)}
    chosen = [entry for entry in entries if in_split(entry.file, entry.split, split)]
    for entry in chosen:
        if entry.class_name not in label_of:
            raise InvalidValueError(f"{printable(entry.location)}: class {entry.class_name!r} is not among {order}")

    images = _allocate((len(chosen), channels, image_size, image_size), memory_limit)
    labels: list[int] = []
    decode = _decoder(image_size, channels, fit, background)
    for entry, result in zip(chosen, _ahead(decode, chosen), strict=True):
        if isinstance(result, BadImageError):
            if not skip_bad:
                raise _with_remedy(result) from result
            skipped.append((printable(result.file), result.reason))
        else:
            images[len(labels)] = result
            labels.append(label_of[entry.class_name])
    if not labels:
        raise InvalidValueError(f"{name}: no readable image in split {split!r} ({len(skipped)} files skipped)")
    return TensorImageDataset(
        images[: len(labels)],
        torch.tensor(labels, dtype=torch.int64),
        [printable(class_name) for class_name in order],
        name=f"{name}/{split}",
        skipped=skipped,
    )


def _with_remedy(error: BadImageError) -> BadImageError:
    return BadImageError(error.file, f"{error.reason}; skip_bad=True (--skip-bad) leaves such files out")


def _decoder(
    image_size: int, channels: int, fit: Fit, background: int
) -> Callable[[PictureEntry], Tensor | BadImageError]:
    def decode(entry: PictureEntry) -> Tensor | BadImageError:
        try:
            content = entry.read()
            return decode_picture(content, entry.location, image_size, channels, fit=fit, background=background)
        except BadImageError as error:
            return error

    return decode


def _ahead(
    decode: Callable[[PictureEntry], Tensor | BadImageError], entries: Sequence[PictureEntry]
) -> Iterator[Tensor | BadImageError]:
    """The results in order, decoded by a few threads (Pillow frees the lock) and never far ahead of use."""
    workers = min(8, os.cpu_count() or 1)
    remaining = iter(entries)
    with ThreadPoolExecutor(workers) as pool:
        while batch := list(islice(remaining, 16 * workers)):
            yield from pool.map(decode, batch)


def _allocate(shape: tuple[int, ...], memory_limit: int) -> Tensor:
    size = math.prod(shape)
    if size <= memory_limit:
        return torch.empty(shape, dtype=torch.uint8)
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(
            f"the decoded images need {size} bytes and {folder} has {free} free; "
            "ask for a smaller image_size, or set TMPDIR to a larger disk"
        )
    with tempfile.NamedTemporaryFile(prefix="wavedp-images-") as file:
        # The mapping outlives the name: the file vanishes from the folder now, its blocks when unmapped.
        return torch.from_file(file.name, shared=True, size=size, dtype=torch.uint8).view(shape)
