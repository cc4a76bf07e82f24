# SPDX-License-Identifier: Apache-2.0
"""Files that survive a crash: JSON and safetensors, written whole or not at all, read back only if intact.

A file is written under a temporary name, flushed to the device, and renamed; the folder is flushed too. A reader
therefore sees the old file or the new one. Tensors are stored as safetensors, never as pickles, and a folder of
model weights carries the weights' sha256 in its config, since a flipped bit in raw weights goes unnoticed otherwise.
"""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from wavedp.errors import BadFileError, InvalidValueError, MissingFileError
from wavedp.weights_file import read_tensors

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
LOCK_FILE = ".lock"
MAX_JSON_BYTES = 2**26


def write_bytes(path: Path, content: bytes, *, private: bool = False) -> None:
    """Replaces ``path`` by ``content`` in one step; on OSError (disk full, no permission) the old file is kept.

    ``private`` makes a file that its owner alone may read.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        _write_new(temporary, content, 0o600 if private else 0o666)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    sync_folder(path.parent)


def _write_new(path: Path, content: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Creates ``folder`` and what is missing above it, durably."""
    missing = [path for path in (folder, *folder.parents) if not path.is_dir()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def alone(folder: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Keeps other processes that ask for the same from ``folder``, which is made if it is missing.

    Where one is there already, ``waiting`` is called and its end awaited; a process that is killed has left.
    """
    import fcntl

    make_folder(folder)
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is not None:
                waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any, *, private: bool = False) -> None:
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode(), private=private)


def read_json(path: Path) -> Any:
    """Raises FileNotFoundError, or ValueError naming the file when it is not JSON."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
        if len(content) > MAX_JSON_BYTES:
            raise InvalidValueError(f"larger than {MAX_JSON_BYTES} bytes")
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadFileError(f"{path} is not valid JSON ({error}); it was damaged or is not a wavedp file") from error


def save_folder(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, private: bool = False
) -> None:
    """Writes ``model.safetensors``, then ``config.json`` holding ``config`` and the weights' sha256.

    The weights are named by their own hash until the config points at them, so that a crash between the two writes
    leaves the previous pair readable.
    """
    content = safetensors.torch.save({k: v.detach().contiguous().cpu() for k, v in tensors.items()})
    digest = hashlib.sha256(content).hexdigest()
    previous = _weights_file(folder)
    weights = WEIGHTS_FILE if previous is None else f"model-{digest[:16]}.safetensors"
    write_bytes(folder / weights, content, private=private)
    write_json(folder / CONFIG_FILE, {**config, "weights": weights, "sha256": digest}, private=private)
    if previous not in (None, weights):
        (folder / str(previous)).unlink(missing_ok=True)


def _weights_file(folder: Path) -> str | None:
    """The weights that the folder's config names, None where there is no config of ours."""
    try:
        config = read_json(folder / CONFIG_FILE)
    except (FileNotFoundError, ValueError):
        return None
    weights = config.get("weights") if isinstance(config, dict) else None
    return Path(weights).name if isinstance(weights, str) else None


def weights_digest(folder: Path) -> str:
    """The sha256 of the weights that `save_folder` wrote into ``folder``, as `load_folder` checks it."""
    config = read_json(folder / CONFIG_FILE)
    digest = config.get("sha256") if isinstance(config, dict) else None
    if not isinstance(digest, str):
        raise BadFileError(f"{folder / CONFIG_FILE} names no weights file; it was not written by wavedp")
    return digest


def load_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads what `save_folder` wrote: (config without the storage fields, tensors on the CPU).

    Raises FileNotFoundError when the folder holds no config, ValueError when a file is damaged.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise MissingFileError(f"{folder} holds no {CONFIG_FILE}; give the folder that a wavedp run or model wrote")
    config = read_json(folder / CONFIG_FILE)
    if not isinstance(config, dict) or not isinstance(config.get("weights"), str):
        raise BadFileError(f"{folder / CONFIG_FILE} names no weights file; it was not written by wavedp")
    name = config.pop("weights")
    if not name or Path(name).name != name or "\0" in name or "\\" in name or ":" in name:
        raise BadFileError(f"{folder / CONFIG_FILE} names the weights {name!r}, which is no plain file name")
    weights = folder / name
    expected = config.pop("sha256", None)
    if not weights.is_file():
        raise MissingFileError(f"{weights} is missing; copy the folder again")
    content = weights.read_bytes()
    if hashlib.sha256(content).hexdigest() != expected:
        raise BadFileError(f"{weights} does not have the sha256 in its config; the file was damaged: copy it again")
    return config, read_tensors(content, weights)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file from elsewhere, on the CPU, its header judged first.

    Raises FileNotFoundError, or BadFileError for anything but such a file.
    """
    if not path.is_file():
        raise MissingFileError(f"{path} is missing; give a safetensors file")
    return read_tensors(path.read_bytes(), path)


def load_weights(model: torch.nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copies ``tensors`` into ``model``; raises ValueError naming ``source`` when names or shapes differ."""
    try:
        model.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise BadFileError(f"{source} does not fit its own configuration: {error}") from error
    for key, value in tensors.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise BadFileError(f"{source} has values in {key} that are not finite: its training diverged; take another")
