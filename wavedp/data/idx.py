# SPDX-License-Identifier: Apache-2.0
"""IDX files, the format of the MNIST family (http://yann.lecun.com/exdb/mnist), plain or gzipped.

A file is ``00 00 <type> <rank>``, then ``rank`` big-endian 32-bit sizes, then the values in C order. Images
are of type 08 (8-bit unsigned) and rank 3 ``[N, rows, columns]``, labels of type 08 and rank 1.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from wavedp.data.catalog import Split, in_split
from wavedp.data.dataset import TensorImageDataset
from wavedp.data.resize import Fit, check_geometry, fit_pixels
from wavedp.errors import BadFileError, InvalidValueError, MissingFileError

MAX_VALUES = 2**33
_GZIP_MAGIC = b"\x1f\x8b"
_UNSIGNED_BYTE = 0x08
_STEMS = {"train": "train", "test": "t10k"}


class IdxError(BadFileError):
    """A file that is not a complete IDX file of the wanted kind."""


def read_idx(path: Path, rank: int) -> Tensor:
    """Reads an IDX file of 8-bit values, gzipped if its content says so.

    Never more than the header's sizes ask for is unpacked, whatever the gzip stream would give.

    Args:
        path: the file.
        rank: the number of dimensions it must have.

    Returns:
        uint8 of the header's shape.

    Raises:
        FileNotFoundError: if there is no such file.
        IdxError: for a wrong magic number, type or rank; more than 2^33 values; or fewer or more bytes
            than the header announces. The message has the file and both numbers.
    """
    if not path.is_file():
        raise MissingFileError(f"no such IDX file: {path}")
    with path.open("rb") as raw:
        zipped = raw.read(2) == _GZIP_MAGIC
        raw.seek(0)
        try:
            if zipped:
                with gzip.GzipFile(fileobj=raw) as stream:
                    return _parse(stream, path, rank, None)
            return _parse(raw, path, rank, path.stat().st_size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise IdxError(f"{path}: damaged or truncated gzip stream ({error})") from error


def read_idx_pair(images_file: Path, labels_file: Path) -> tuple[Tensor, Tensor]:
    """Images uint8 ``[N, 1, rows, columns]`` and labels int64 ``[N]``.

    Raises:
        IdxError: if either file is bad, their counts differ, or the images have no pixels.
    """
    images = _read_images(images_file)
    labels = read_idx(labels_file, 1)
    if len(images) != len(labels):
        raise IdxError(f"{images_file} has {len(images)} images, but {labels_file} has {len(labels)} labels")
    return images, labels.to(torch.int64)


def load_idx(
    source: Path,
    *,
    image_size: int,
    channels: int = 1,
    split: Split = "train",
    fit: Fit = "crop",
    background: int = 0,
    classes: Sequence[str] | None = None,
) -> TensorImageDataset:
    """A folder with the four files of the MNIST family, or one IDX file of images.

    In a folder, ``split`` chooses ``train-images-idx3-ubyte`` or ``t10k-images-idx3-ubyte`` and the labels
    beside it, each with or without ``.gz`` ("all" is both); a folder with the training pair alone, and a
    single file, are divided by :func:`wavedp.data.catalog.in_split` with the image's bytes as its key.
    A single file's labels are looked for under its own name with "images" and "idx3" replaced; without
    such a file all images are of one class.

    Args:
        classes: names; else the lines of ``classes.txt`` beside the files; else "0", "1", ...

    Raises:
        FileNotFoundError: if the files are missing.
        IdxError: if one is bad.
        ValueError: for more labels than classes, a repeated class, or an unknown geometry or split.
    """
    check_geometry(image_size, channels, fit, background)
    if split not in ("train", "test", "all"):
        raise InvalidValueError(f'split must be "train", "test" or "all", got {split!r}')
    images, labels = _read_folder(source, split) if source.is_dir() else _read_single(source, split)
    folder = source if source.is_dir() else source.parent
    order = list(classes) if classes is not None else _class_names(folder, labels)
    resized = fit_pixels(images, image_size, channels, fit=fit, background=background)
    return TensorImageDataset(resized, labels, order, name=f"{source.name}/{split}")


def find_idx(folder: Path, which: str, kind: str) -> Path | None:
    """The file of ``which`` ("train" or "test") and ``kind`` ("images" or "labels") in a folder, or None."""
    rank = 3 if kind == "images" else 1
    for dash in ("-", "."):
        for ending in ("", ".gz"):
            path = folder / f"{_STEMS[which]}-{kind}{dash}idx{rank}-ubyte{ending}"
            if path.is_file():
                return path
    return None


def _parse(stream: BinaryIO | gzip.GzipFile, path: Path, rank: int, file_size: int | None) -> Tensor:
    header = stream.read(4)
    if len(header) < 4:
        raise IdxError(f"{path}: an IDX header has 4 bytes before the sizes, the file has {len(header)}")
    if header[:2] != b"\0\0":
        raise IdxError(f"{path}: not an IDX file (it starts with {header.hex(' ')}, not 00 00)")
    if header[2] != _UNSIGNED_BYTE:
        raise IdxError(f"{path}: values of type 0x{header[2]:02x}; only 0x08 (8-bit unsigned) is read")
    if header[3] != rank:
        raise IdxError(f"{path}: {header[3]} dimensions, expected {rank}")
    sizes_bytes = stream.read(4 * rank)
    if len(sizes_bytes) < 4 * rank:
        raise IdxError(f"{path}: the header has {4 + len(sizes_bytes)} bytes, expected {4 + 4 * rank}")
    sizes = [int.from_bytes(sizes_bytes[4 * k : 4 * k + 4], "big") for k in range(rank)]
    expected = math.prod(sizes)
    if expected > MAX_VALUES:
        raise IdxError(f"{path}: the header claims {sizes} values, more than {MAX_VALUES} in all")
    if file_size is not None and file_size != 4 + 4 * rank + expected:
        raise IdxError(f"{path}: {file_size - 4 - 4 * rank} bytes of values, but the header {sizes} needs {expected}")
    values = _read_exactly(stream, expected, path, sizes)
    if stream.read(1):
        raise IdxError(f"{path}: more bytes than the {expected} that the header {sizes} needs")
    return torch.from_numpy(np.frombuffer(values, dtype=np.uint8)).view(sizes)


def _read_exactly(stream: BinaryIO | gzip.GzipFile, expected: int, path: Path, sizes: list[int]) -> bytearray:
    """In pieces, so that a false header costs no more memory than the file really holds."""
    values = bytearray()
    while len(values) < expected:
        piece = stream.read(min(2**24, expected - len(values)))
        if not piece:
            raise IdxError(f"{path}: {len(values)} bytes of values, but the header {sizes} needs {expected}")
        values += piece
    return values


def _read_images(path: Path) -> Tensor:
    images = read_idx(path, 3)
    if 0 in images.shape:
        raise IdxError(f"{path}: no pixels, the header says {list(images.shape)}")
    return images[:, None]


def _read_folder(folder: Path, split: Split) -> tuple[Tensor, Tensor]:
    has_test = find_idx(folder, "test", "images") is not None
    pairs = []
    for which in ("train", "test"):
        if which == "test" and not has_test:
            continue
        if has_test and split not in ("all", which):
            continue
        images_file, labels_file = (find_idx(folder, which, kind) for kind in ("images", "labels"))
        if images_file is None or labels_file is None:
            stem = _STEMS[which]
            raise MissingFileError(f"{folder} needs {stem}-images-idx3-ubyte[.gz] and {stem}-labels-idx1-ubyte[.gz]")
        pairs.append(read_idx_pair(images_file, labels_file))
    images, labels = (torch.cat(part) for part in zip(*pairs, strict=True))
    return (images, labels) if has_test else _divide(images, labels, split)


def _read_single(path: Path, split: Split) -> tuple[Tensor, Tensor]:
    labels_file = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    if labels_file != path and labels_file.is_file():
        return _divide(*read_idx_pair(path, labels_file), split)
    images = _read_images(path)
    return _divide(images, torch.zeros(len(images), dtype=torch.int64), split)


def _divide(images: Tensor, labels: Tensor, split: Split) -> tuple[Tensor, Tensor]:
    if split == "all":
        return images, labels
    chosen = torch.tensor([in_split(image.numpy().tobytes(), None, split) for image in images], dtype=torch.bool)
    return images[chosen], labels[chosen]


def _class_names(folder: Path, labels: Tensor) -> list[str]:
    listed = folder / "classes.txt"
    if listed.is_file():
        return [line.strip() for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [str(k) for k in range(int(labels.max()) + 1 if labels.numel() else 1)]
