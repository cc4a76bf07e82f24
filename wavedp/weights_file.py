# SPDX-License-Identifier: Apache-2.0
"""Weights from a file that may be hostile: the header of a safetensors file is judged before anything is allocated.

The format (https://github.com/huggingface/safetensors#format): eight bytes with the header's length, little-endian, a
JSON header of names, dtypes, shapes and byte ranges, then the bytes. The library that reads it takes any names and as
many tensors as there are; a header of 63 MB of empty ones keeps it busy for 14 s and 2 GB. Here a header has at most
16 MiB and 100,000 tensors, names are of plain characters and come once, and the ranges are the tensors' sizes and cover
the file without gap or overlap. A pickle is never opened, whatever its name.
"""

import json
import math
import re
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from wavedp.errors import BadFileError, InvalidValueError

MAX_HEADER_BYTES = 2**24
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 64
NAME = re.compile(r"[A-Za-z0-9_.\-]{1,256}\Z")
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

_PICKLES = {
    b"PK\x03\x04": "a zip archive, as torch.save writes them, with a pickle inside",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"\x1f\x8b": "a gzip archive",
    b"\x93NUMPY": "a NumPy file",
    b"GGUF": "a GGUF file",
    b"\x89HDF": "an HDF5 file",
}


def read_tensors(content: bytes, file: object) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Args:
        content: the whole file.
        file: its name, for the error.

    Raises:
        BadFileError: for anything that is not such a file within the limits above.
    """
    check_header(content, file)
    try:
        return safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise _bad(file, f"cannot be read: {error}") from error


def check_header(content: bytes, file: object) -> None:
    """Raises unless ``content`` begins with a header that describes exactly the bytes after it."""
    for magic, what in _PICKLES.items():
        # A header of 640 bytes has a length that begins as a pickle does; what follows a length is an opening brace.
        if content.startswith(magic) and content[8:9] != b"{":
            raise _bad(file, f"it is {what}, which is never opened: it could run code")
    if len(content) < 8:
        raise _bad(file, f"it has {len(content)} bytes, and the length of its header alone takes 8")
    length = int.from_bytes(content[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise _bad(file, f"it claims a header of {length} bytes; at most {MAX_HEADER_BYTES} are read")
    if length > len(content) - 8:
        raise _bad(file, f"it claims a header of {length} bytes and has {len(content) - 8} after the length")
    entries = content.count(b'"data_offsets"', 8, 8 + length)
    if entries > MAX_TENSORS:  # before a parser makes objects of them
        raise _bad(file, f"it claims {entries} tensors; at most {MAX_TENSORS} are read")
    try:
        header = json.loads(content[8 : 8 + length].decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _bad(file, f"its header is not readable JSON ({_in_short(error)})") from None
    if not isinstance(header, dict):
        raise _bad(file, f"its header is a JSON {type(header).__name__}, not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad(file, "its __metadata__ is not an object of texts")
    if len(header) > MAX_TENSORS:
        raise _bad(file, f"it claims {len(header)} tensors; at most {MAX_TENSORS} are read")
    ranges = sorted(_range_of(name, entry, file) for name, entry in header.items())
    reached = 0
    for begin, end, name in ranges:
        if begin != reached:
            how = "overlaps the one before it" if begin < reached else f"leaves a gap after byte {reached}"
            raise _bad(file, f"the tensor {name!r} begins at byte {begin}: it {how}")
        reached = end
    if reached != len(content) - 8 - length:
        raise _bad(file, f"its tensors take {reached} bytes, and {len(content) - 8 - length} are there")


def _range_of(name: str, entry: Any, file: object) -> tuple[int, int, str]:
    if not NAME.match(name):
        raise _bad(file, f"the name {_in_short(ascii(name))} has other characters than A-Z a-z 0-9 _ . - or over 256")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _bad(file, f"the entry of {name!r} is not an object of dtype, shape and data_offsets")
    item = ITEM_BYTES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if item is None:
        raise _bad(file, f"the tensor {name!r} is of dtype {_in_short(ascii(entry['dtype']))}, which is not read")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise _bad(file, f"the tensor {name!r} has a shape that is no list of up to {MAX_DIMENSIONS} sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _bad(file, f"the tensor {name!r} has data_offsets that are not two positions")
    begin, end = offsets
    if end - begin != math.prod(shape) * item:
        raise _bad(file, f"the tensor {name!r} has a range of {end - begin} bytes, which is not what its shape takes")
    return begin, end, name


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise InvalidValueError(f"the name {name!a} comes twice")
        found[name] = value
    return found


def _in_short(what: object) -> str:
    text = str(what)
    return text if len(text) <= 80 else text[:77] + "..."


def _bad(file: object, reason: str) -> BadFileError:
    return BadFileError(f"{file} is not a safe weights file: {reason}; get the safetensors file from its source again")
