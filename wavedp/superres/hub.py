# SPDX-License-Identifier: Apache-2.0
"""Finding public models: optional packages, hub ids and local folders, safetensors only."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wavedp.errors import InvalidValueError, MissingFileError, MissingPackageError

INSTALL = "pip install 'wavedp[sr]'"


def import_extra(package: str, needed_by: str) -> Any:
    """Imports an optional package; raises ImportError saying how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingPackageError(f"{needed_by} needs {package}: {INSTALL} ({error})") from error


def fetch(from_pretrained: Callable[..., Any], path: str, *, needed_by: str, **options: Any) -> Any:
    """``from_pretrained(path, use_safetensors=True, **options)`` for a hub id or a local folder.

    Raises FileNotFoundError saying which folder or download is missing. A repository that holds pickled
    weights only is refused, since unpickling runs its code.
    """
    if _is_folder_name(path) and not Path(path).expanduser().is_dir():
        raise MissingFileError(f"{needed_by}: the folder {path!r} does not exist")
    local = Path(path).expanduser()
    source = str(local) if local.is_dir() else path
    try:
        return from_pretrained(source, use_safetensors=True, **options)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if local.is_dir():
            advice = "the folder must hold the whole model, as save_pretrained writes it, in safetensors"
        else:
            advice = (
                f"with a network run 'hf download {path} --local-dir FOLDER', then pass path='FOLDER'; "
                "the weights must be safetensors"
            )
        raise MissingFileError(f"{needed_by}: cannot load {path!r} ({reason}); {advice}") from error


def _is_folder_name(path: str) -> bool:
    """A hub id is ``name`` or ``owner/name``; anything else can only be a folder."""
    return path.startswith(("/", ".", "~")) or path.count("/") > 1 or "\\" in path


def location(path: str | None, needed_by: str) -> str:
    """What a saved configuration says of a model: its hub id, or its folder's absolute path."""
    if path is None:
        raise InvalidValueError(
            f"{needed_by} was built from pipeline=, so there is no hub id or folder to write down; save the "
            "model with its own save_pretrained and load it with path="
        )
    local = Path(path).expanduser()
    return str(local.resolve()) if local.is_dir() else path
