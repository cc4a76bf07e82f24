# SPDX-License-Identifier: Apache-2.0
"""NumPy archives of images and labels, as generators leave them: ``np.savez("gen.npz", x=images, y=labels)``.

Images are the array ``x`` or ``images``: 8-bit, or floating point in [0, 1], of shape ``[N, S, S]``,
``[N, C, S, S]`` or ``[N, S, S, C]`` with C = 1 or 3. Labels are ``y`` or ``labels``: integers ``[N]``, or one-hot
``[N, K]``; without them all images are of one class. Arrays of Python objects are refused, which are pickles.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wavedp.data.catalog import Split, in_split
from wavedp.data.dataset import TensorImageDataset
from wavedp.data.resize import Fit, check_geometry, fit_pixels
from wavedp.errors import BadFileError, InvalidValueError

MAX_BYTES = 2**34
"""Of an unpacked array."""


class NpzError(BadFileError):
    """A file that is not a NumPy archive of images as above."""


def load_npz(
    source: Path,
    *,
    image_size: int,
    channels: int = 1,
    split: Split = "train",
    fit: Fit = "crop",
    background: int = 0,
    classes: Sequence[str] | None = None,
) -> TensorImageDataset:
    """The images of a NumPy archive, at the asked size by the rule of :mod:`wavedp.data.resize`.

    It has no split of its own: :func:`wavedp.data.catalog.in_split` divides it by the images' bytes.

    Args:
        classes: names; else "0", "1", ...

    Raises:
        NpzError: naming the file and what is wrong.
        ValueError: for more labels than classes.
    """
    check_geometry(image_size, channels, fit, background)
    arrays = _read(source, {"x", "images", "y", "labels"})
    pixels = arrays.get("x", arrays.get("images"))
    if pixels is None:
        raise NpzError(f"{source} has no array 'x' or 'images'; it has {sorted(arrays)} of those that are read")
    images = _pixels(pixels, source)
    given = arrays.get("y", arrays.get("labels"))
    labels = torch.zeros(len(images), dtype=torch.int64) if given is None else _labels(given, len(images), source)
    if split != "all":
        chosen = torch.tensor([in_split(image.numpy().tobytes(), None, split) for image in images], dtype=torch.bool)
        images, labels = images[chosen], labels[chosen]
    names = list(classes) if classes is not None else [str(k) for k in range(int(labels.max()) + 1)]
    resized = fit_pixels(images, image_size, channels, fit=fit, background=background)
    return TensorImageDataset(resized, labels, names, name=f"{source.name}/{split}")


def _read(source: Path, wanted: set[str]) -> dict[str, np.ndarray]:
    """The wanted arrays; what a header claims is compared with what the archive says before it is allocated."""
    found = {}
    try:
        with zipfile.ZipFile(source) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if name not in wanted or name in found:
                    continue
                if member.file_size > MAX_BYTES:
                    raise NpzError(
                        f"{source}: the array {name!r} unpacks to {member.file_size} bytes, over {MAX_BYTES}"
                    )
                with archive.open(member) as stream:
                    version = np.lib.format.read_magic(stream)
                    header = (
                        np.lib.format.read_array_header_1_0(stream)
                        if version == (1, 0)
                        else np.lib.format.read_array_header_2_0(stream)
                    )
                    shape, fortran, dtype = header
                    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
                    if dtype.hasobject or fortran or size > member.file_size:
                        what = (
                            "Python objects" if dtype.hasobject else "columns first" if fortran else "more than it has"
                        )
                        raise NpzError(f"{source}: the array {name!r} ({dtype}, {list(shape)}) claims {what}")
                    content = stream.read(size)
                if len(content) != size:
                    raise NpzError(f"{source}: the array {name!r} has {len(content)} bytes of {size}")
                found[name] = np.frombuffer(bytearray(content), dtype=dtype).reshape(shape)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError, OSError) as error:
        if isinstance(error, NpzError) or (isinstance(error, OSError) and not source.is_file()):
            raise
        raise NpzError(f"{source} is not a readable NumPy archive ({error})") from error
    return found


def _pixels(array: np.ndarray, source: Path) -> Tensor:
    """uint8 ``[N, C, S, S]``."""
    if array.ndim == 3:
        array = array[:, None]
    if array.ndim == 4 and array.shape[1] not in (1, 3) and array.shape[3] in (1, 3):
        array = np.moveaxis(array, 3, 1)
    if array.ndim != 4 or array.shape[1] not in (1, 3) or 0 in array.shape:
        raise NpzError(
            f"{source}: images of shape {list(array.shape)}; [N, S, S], [N, C, S, S] or [N, S, S, C] are read"
        )
    if array.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(array))
    if array.dtype.kind != "f":
        raise NpzError(f"{source}: images of dtype {array.dtype}; 8-bit and floating-point ones in [0, 1] are read")
    low, high = float(array.min()), float(array.max())
    if not -1e-3 <= low <= high <= 1 + 1e-3:
        raise NpzError(f"{source}: floating-point images must lie in [0, 1], they span {low:g}..{high:g}")
    return torch.from_numpy((np.clip(array, 0, 1) * 255).round().astype(np.uint8))


def _labels(array: np.ndarray, number: int, source: Path) -> Tensor:
    if array.ndim == 2 and len(array) == number:
        array = array.argmax(axis=1)
    if array.shape != (number,) or array.dtype.kind not in "iu" or (number and int(array.min()) < 0):
        raise NpzError(
            f"{source}: labels must be integers >= 0 of shape [{number}], or one-hot; they are {array.dtype} "
            f"{list(array.shape)}"
        )
    if number and int(array.max()) >= 2**31:
        raise InvalidValueError(f"{source}: a label is {int(array.max())}")
    return torch.from_numpy(array.astype(np.int64))
