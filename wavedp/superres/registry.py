# SPDX-License-Identifier: Apache-2.0
"""The adapters by name: which there are, how to load one, how to read a saved one back."""

import importlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wavedp import storage
from wavedp.errors import BadFileError, InvalidTypeError, InvalidValueError, WavedpError
from wavedp.superres.base import FORMAT, BatchedSuperResolver, SuperResolver
from wavedp.superres.chain import Chain, Resized
from wavedp.superres.hub import INSTALL

MAX_STAGES = 16


@dataclass(frozen=True)
class Adapter:
    description: str
    module: str
    class_name: str
    packages: tuple[str, ...] = ()  # optional ones it needs

    def missing_packages(self) -> list[str]:
        return [package for package in self.packages if find_spec(package) is None]

    def load_class(self) -> type[BatchedSuperResolver]:
        found: type[BatchedSuperResolver] = getattr(importlib.import_module(self.module), self.class_name)
        return found


ADAPTERS = {
    "bicubic": Adapter(
        "bicubic interpolation, any integer scale, no weights", "wavedp.superres.interpolation", "Bicubic"
    ),
    "haar": Adapter(
        "inverse Haar transform with zero details, scale 2^L, no weights",
        "wavedp.superres.interpolation",
        "Haar",
    ),
    "espcn": Adapter(
        "small sub-pixel network of this project, x2, x3, x4 or x8, trained on your public images",
        "wavedp.superres.espcn",
        "EspcnResolver",
    ),
    "stable-diffusion-x4-upscaler": Adapter(
        "text-guided diffusion, x4 (stabilityai/stable-diffusion-x4-upscaler, openrail++)",
        "wavedp.superres.diffusion",
        "StableDiffusionUpscaler",
        ("diffusers", "transformers"),
    ),
    "ldm-4x": Adapter(
        "latent diffusion, x4 (CompVis/ldm-super-resolution-4x-openimages, apache-2.0)",
        "wavedp.superres.diffusion",
        "LatentDiffusionUpscaler",
        ("diffusers", "transformers"),
    ),
    "swin2sr": Adapter(
        "Swin transformer, deterministic, x2 or x4 (caidas/swin2SR-classical-sr-x4-64, apache-2.0)",
        "wavedp.superres.swin2sr",
        "Swin2sr",
        ("transformers",),
    ),
}


def available() -> tuple[str, ...]:
    """The names that `load` takes. Some need the ``[sr]`` extra, which `describe` says."""
    return tuple(ADAPTERS)


def describe(name: str) -> str:
    """One line on an adapter, with how to install what it lacks here."""
    adapter = _adapter(name)
    missing = adapter.missing_packages()
    lacks = f" [needs {', '.join(missing)}: {INSTALL}]" if missing else ""
    return f"{adapter.description}{lacks}"


def load(
    name: str,
    *,
    scale: int | None = None,
    path: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> BatchedSuperResolver:
    """The super-resolver ``name``.

    ``scale``: for bicubic and haar any (haar: a power of two), default 4; for swin2sr 2 or 4; for the others
    what their weights do, where asking for another raises. ``path``: hub id or local folder of the weights,
    or a folder written by ``save_pretrained``; the default is the public model named by `describe`; espcn has
    none. ``device``: default CPU. ``dtype``: of the weights and the arithmetic, default float32. ``options``:
    ``batch_size``, those of the adapter's class, and ``pipeline``, an already built model instead of
    ``path``.

    Raises ValueError for an unknown name or scale, ImportError naming the extra to install, FileNotFoundError
    for weights that are not there.
    """
    adapter = _adapter(name)
    saved = None if path is None else _saved_adapter(path)
    if saved is not None:
        config, tensors = saved
        if config.get("name") != name:
            raise InvalidValueError(f"{path} holds {config.get('name')!r}, not {name!r}")
        stored = config.get("options", {})
        if not isinstance(stored, dict) or {"scale", "path", "device", "dtype", "pipeline"} & set(stored):
            raise BadFileError(f"{path} has options that no {name} was saved with: {stored!r}")
        options = {**stored, **options}
        if name != "espcn":
            path, options = config.get("path"), {**tensors, **options}
            scale = config.get("scale") if scale is None else scale
    path = None if path is None else str(path)
    try:
        return adapter.load_class().load(scale=scale, path=path, device=device, dtype=dtype, **options)
    except TypeError as error:
        if isinstance(error, WavedpError):
            raise
        raise InvalidTypeError(
            f"{name} cannot be loaded with the options {', '.join(sorted(options))}: {error}"
        ) from error


def from_pretrained(
    folder: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> SuperResolver:
    """What ``save_pretrained`` wrote, chains included. ``options`` replace the saved ones of an adapter.

    Raises FileNotFoundError when ``folder`` holds none, ValueError when it is damaged or something else.
    """
    folder = Path(folder).expanduser()
    config = storage.load_folder(folder)[0]
    name = str(config.get("name"))
    if config.get("format") != FORMAT or name not in (*ADAPTERS, Chain.name, Resized.name):
        raise InvalidValueError(f"{folder} does not hold a super-resolver saved by wavedp")
    if name in ADAPTERS:
        return load(name, path=folder, device=device, dtype=dtype, **options)
    if options:
        raise InvalidValueError(
            f"{folder} holds a {name}, which takes no options; it was given {', '.join(sorted(options))}"
        )
    try:
        if name == Chain.name:
            if type(config["stages"]) is not int or not 0 <= config["stages"] <= MAX_STAGES:
                raise InvalidTypeError(f"stages is {config['stages']!r}")
            stages = [folder / str(i) for i in range(config["stages"])]
            return Chain([from_pretrained(stage, device=device, dtype=dtype) for stage in stages])
        sizes = tuple(config["from_size"]), tuple(config["to_size"])
    except (KeyError, TypeError) as error:
        raise InvalidValueError(f"{folder / storage.CONFIG_FILE} does not describe a {name}: {error}") from error
    return Resized(from_pretrained(folder / "resolver", device=device, dtype=dtype), *sizes)


def _adapter(name: str) -> Adapter:
    if name not in ADAPTERS:
        raise InvalidValueError(f"there is no super-resolver {name!r}; there are {', '.join(ADAPTERS)}")
    return ADAPTERS[name]


def _saved_adapter(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """What ``save_pretrained`` wrote into the folder ``path``, or into that of a file; None if it did not."""
    folder = Path(path).expanduser()
    folder = folder.parent if folder.is_file() else folder
    if not (folder / storage.CONFIG_FILE).is_file():
        return None
    config = storage.read_json(folder / storage.CONFIG_FILE)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        return None
    return storage.load_folder(folder)
