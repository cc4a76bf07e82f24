# SPDX-License-Identifier: Apache-2.0
"""Zip archives of images, read in place: nothing is ever extracted, so no member can escape anywhere.

The classes come from folders inside the archive, or from a tab-separated ``index.tsv`` beside or inside
it, with a header line and the columns ``file`` (the member), ``name`` or ``class``, and optionally
``split`` ("train" or "test"). A member is one record: a second line that names it is refused.
"""

from __future__ import annotations

import csv
import io
import threading
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from wavedp.data.catalog import PictureEntry
from wavedp.data.layout import named_like_an_image, place_files
from wavedp.data.picture_file import LISTED_BEFORE, MAX_FILE_BYTES, BadImageError, printable
from wavedp.errors import InvalidValueError, MissingFileError

MAX_INDEX_BYTES = 2**28
INDEX_NAME = "index.tsv"


def list_archive(archive: Path) -> tuple[list[PictureEntry], list[BadImageError]]:
    """What is in a zip archive of images.

    One folder that wraps everything else is looked through; names that begin with a dot and ``__MACOSX``
    are ignored. Without an index, files are placed by :func:`wavedp.data.layout.place_files`.

    Returns:
        The entries in the order of the index, or sorted by path, and what was refused.

    Raises:
        FileNotFoundError: if ``archive`` does not exist.
        ValueError: if it is not a zip file, is empty, or its index is malformed.
    """
    if not archive.is_file():
        raise MissingFileError(f"no such archive: {archive}")
    try:
        opened = zipfile.ZipFile(archive)
        visible = [info for info in opened.infolist() if _is_visible(info)]
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
        raise InvalidValueError(f"{archive} is not a readable zip archive ({error})") from error
    members = {info.filename: info for info in visible}
    read = _Members(opened, archive)
    beside = archive.with_name(INDEX_NAME)
    if beside.is_file():
        with beside.open("rb") as file:
            return _from_index(file.read(MAX_INDEX_BYTES + 1), str(beside), archive, members, read)
    if INDEX_NAME in members:
        return _from_index(read.one(members[INDEX_NAME]), f"{archive}/{INDEX_NAME}", archive, members, read)
    return _from_folders(archive, members, read)


class _Members:
    """Reads members; one at a time, since a ZipFile has one file position."""

    def __init__(self, opened: zipfile.ZipFile, archive: Path) -> None:
        self._opened = opened
        self._archive = archive
        self._lock = threading.Lock()

    def one(self, info: zipfile.ZipInfo) -> bytes:
        location = f"{self._archive}/{info.filename}"
        try:
            with self._lock, self._opened.open(info) as member:
                return member.read(MAX_FILE_BYTES + 1)
        except (
            zipfile.BadZipFile,
            zlib.error,
            OSError,
            EOFError,
            RuntimeError,
            NotImplementedError,
        ) as error:
            raise BadImageError(location, f"cannot be unpacked ({printable(str(error))})") from error

    def reader(self, info: zipfile.ZipInfo) -> Callable[[], bytes]:
        return lambda: self.one(info)


def _is_visible(info: zipfile.ZipInfo) -> bool:
    parts = PurePosixPath(info.filename).parts
    if info.is_dir() or not parts or parts[0] == "__MACOSX":
        return False
    return not any(part.startswith(".") for part in parts)


def _from_folders(
    archive: Path, members: dict[str, zipfile.ZipInfo], read: _Members
) -> tuple[list[PictureEntry], list[BadImageError]]:
    if not members:
        raise InvalidValueError(f"{archive} holds no files")
    names = sorted(members)
    files = list(names)
    while len({file.split("/")[0] for file in files}) == 1 and all(file.count("/") > 1 for file in files):
        files = [file.split("/", 1)[1] for file in files]
    entries, refused = [], []
    for name, file, place in zip(names, files, place_files(files, archive.stem), strict=True):
        location = f"{archive}/{name}"
        if place is not None:
            reader = read.reader(members[name])
            entries.append(PictureEntry(file, location, place.class_name, place.split, reader))
        elif named_like_an_image(file):
            refused.append(BadImageError(location, "lies beside the class folders, not in one"))
    return entries, refused


def _from_index(
    content: bytes, index: str, archive: Path, members: dict[str, zipfile.ZipInfo], read: _Members
) -> tuple[list[PictureEntry], list[BadImageError]]:
    if len(content) > MAX_INDEX_BYTES:
        raise InvalidValueError(f"{index} is larger than {MAX_INDEX_BYTES} bytes")
    try:
        rows = csv.DictReader(io.StringIO(content.decode("utf-8-sig")), delimiter="\t", quoting=csv.QUOTE_NONE)
        columns = rows.fieldnames or []
        class_column = next((column for column in ("name", "class") if column in columns), None)
        if "file" not in columns or class_column is None:
            raise InvalidValueError(f'{index} needs the columns "file" and "name" or "class", has {list(columns)}')
        entries, refused = [], []
        listed: set[str] = set()
        for line, row in enumerate(rows, start=2):
            file, class_name, split = row["file"], row[class_column], row.get("split")
            if not file or not class_name or split not in (None, "train", "test"):
                raise InvalidValueError(f"{index}, line {line}: expected a file, a class, and a split of train or test")
            location = f"{archive}/{file}"
            if file in listed:
                refused.append(BadImageError(location, f"{LISTED_BEFORE} ({index}, line {line})"))
            elif file in members:
                listed.add(file)
                reader = read.reader(members[file])
                entries.append(PictureEntry(file, location, class_name, split, reader))
            else:
                refused.append(BadImageError(location, f"named in {index}, but not in the archive"))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidValueError(f"{index} is not tab-separated UTF-8 text ({error})") from error
    if not entries and not refused:
        raise InvalidValueError(f"{index} lists no files")
    return entries, refused
