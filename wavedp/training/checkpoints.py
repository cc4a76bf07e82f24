# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in generations: a new one appears whole or not at all, and the newest that is intact is loaded.

A generation is a folder ``00000007`` of weights and a config, written and synced under another name and then renamed.
The weights' SHA-256 is in the config, and the config's own too. The last three are kept, so that a disk that damages
the newest costs the steps since the one before. Folders are for their owner alone.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from wavedp.errors import InvalidValueError
from wavedp.storage import CONFIG_FILE, load_folder, make_folder, save_folder, sync_folder

KEPT = 3
"""Generations in a folder."""

_DRAFT, _OLD = ".draft-", ".old-"


@dataclass(frozen=True)
class Checkpoint:
    """What :func:`load_newest` found, and one sentence for each newer generation that it could not read."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]  # on the CPU
    skipped: tuple[str, ...]


def save_generation(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Writes the next generation, durably, then removes those beyond the last three; returns its folder.

    One process at a time may write into ``folder``. On OSError (disk full, no permission) the generations that were
    there are still there.
    """
    make_folder(folder)
    os.chmod(folder, 0o700)
    _remove_unfinished(folder)
    known = _generations(folder)
    draft = folder / f"{_DRAFT}{secrets.token_hex(8)}"
    path = folder / f"{int(known[0].name) + 1 if known else 1:08d}"
    try:
        draft.mkdir(mode=0o700)
        save_folder(draft, {**config, "digest": _digest(config)}, tensors, private=True)
        os.rename(draft, path)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    sync_folder(folder)
    for old in known[KEPT - 1 :]:
        with contextlib.suppress(OSError):  # the next call tries again
            os.rename(old, folder / f"{_OLD}{old.name}")
    _remove_unfinished(folder)
    return path


def load_newest(folder: Path) -> Checkpoint | None:
    """Reads the newest generation that is intact; None where there is none at all.

    Raises ValueError, naming every one, when there are some and all are damaged.
    """
    skipped: list[str] = []
    for path in _candidates(folder):
        try:
            config, tensors = load_folder(path)
            if config.pop("digest", None) != _digest(config) and path != folder:
                raise InvalidValueError(f"{path / CONFIG_FILE} does not match its digest; it was damaged")
        except (OSError, ValueError) as error:
            skipped.append(f"checkpoint {path.name} was skipped: {error}")
        else:
            return Checkpoint(path, config, tensors, tuple(skipped))
    if skipped:
        raise InvalidValueError(
            f"{folder} holds no intact checkpoint; move it away to start again without one: {'; '.join(skipped)}"
        )
    return None


def _candidates(folder: Path) -> Iterator[Path]:
    yield from _generations(folder)
    if (folder / CONFIG_FILE).is_file():  # by a version without generations
        yield folder


def _generations(folder: Path) -> list[Path]:
    """Folders of generations, newest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.name.isascii() and path.name.isdecimal()]
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def _remove_unfinished(folder: Path) -> None:
    """What a killed process left half written or half removed."""
    for path in folder.iterdir():
        if path.name.startswith((_DRAFT, _OLD)):
            shutil.rmtree(path, ignore_errors=True)


def _digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
