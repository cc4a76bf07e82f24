# SPDX-License-Identifier: Apache-2.0
"""Image folders: one sub-folder per class, or one flat folder as a single class."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from wavedp.data.catalog import PictureEntry
from wavedp.data.layout import named_like_an_image, place_files
from wavedp.data.picture_file import LISTED_BEFORE, MAX_FILE_BYTES, BadImageError, printable
from wavedp.errors import InvalidValueError, MissingFileError, NotAFolderError


def list_folder(root: Path) -> tuple[list[PictureEntry], list[BadImageError]]:
    """What is in an image folder, placed by :func:`wavedp.data.layout.place_files`.

    Names that begin with a dot are ignored, and so are loose files beside class folders unless they are
    named like images, which is refused. Links to files are followed only inside ``root``, and refused where
    the file they lead to is listed itself or by an earlier link: one image is one record. Links to folders,
    and files that are not regular (sockets, pipes, devices), are refused.

    Returns:
        The entries sorted by path, and what was refused.

    Raises:
        FileNotFoundError: if ``root`` does not exist.
        NotADirectoryError: if it is a file.
        PermissionError: if a folder in it cannot be listed.
        ValueError: if it holds no file.
    """
    if not root.exists():
        raise MissingFileError(f"no such image folder: {root}")
    if not root.is_dir():
        raise NotAFolderError(f"{root} is a file, not an image folder")
    refused: list[BadImageError] = []
    paths = sorted(_walk(root, refused))
    files = ["/".join(path.relative_to(root).parts) for path in paths]
    entries = []
    true_root = root.resolve()
    places = place_files(files, true_root.name or "images")
    targets = [_target(path) for path in paths]
    first: dict[Path, Path] = {}  # target: the path that is its record; a file's own name goes before links to it
    for path, target, place in sorted(zip(paths, targets, places, strict=True), key=lambda item: item[0].is_symlink()):
        if target is not None and place is not None:
            first.setdefault(target, path)
    for path, file, target, place in zip(paths, files, targets, places, strict=True):
        if place is None:
            if named_like_an_image(file):
                refused.append(BadImageError(str(path), "lies beside the class folders, not in one"))
        elif target is None or not target.is_relative_to(true_root):
            refused.append(BadImageError(str(path), "a link that leads out of the image folder"))
        elif first[target] != path:
            reason = f"{LISTED_BEFORE} (the same file as {printable(str(first[target]))})"
            refused.append(BadImageError(str(path), reason))
        else:
            entries.append(PictureEntry(file, str(path), place.class_name, place.split, _reader(path)))
    if not entries and not refused:
        raise InvalidValueError(f"{root} holds no files: expected images, or one sub-folder of images per class")
    return entries, refused


def _walk(root: Path, refused: list[BadImageError]) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error

    for folder, subfolders, files in os.walk(root, onerror=fail):
        here = Path(folder)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in subfolders:
            if (here / name).is_symlink():
                refused.append(BadImageError(str(here / name), "a link to a folder is not followed"))
        yield from (here / name for name in files if not name.startswith("."))


def _target(path: Path) -> Path | None:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # links that lead in a circle
        return None


def _reader(path: Path) -> Callable[[], bytes]:
    def read() -> bytes:
        try:
            # Without O_NONBLOCK, opening a pipe would wait for its writer.
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
            with open(descriptor, "rb") as file:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise BadImageError(str(path), "not a regular file")
                return file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise BadImageError(str(path), f"cannot be read ({error.strerror})") from error

    return read
