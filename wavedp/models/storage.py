# SPDX-License-Identifier: Apache-2.0
"""Saving and loading the models: a folder with config.json and model.safetensors."""

from pathlib import Path
from typing import Any

import torch

from wavedp.errors import BadFileError, InvalidValueError
from wavedp.models.autoregressive import AutoregressiveTransformer
from wavedp.models.autoregressive_config import AutoregressiveConfig
from wavedp.models.spectral_tokenizer import SpectralTokenizer
from wavedp.models.tokenizer_config import SpectralTokenizerConfig
from wavedp.storage import load_folder, load_weights, save_folder

Model = SpectralTokenizer | AutoregressiveTransformer

_KINDS: dict[str, tuple[Any, Any]] = {
    "spectral_tokenizer": (SpectralTokenizer, SpectralTokenizerConfig),
    "autoregressive_transformer": (AutoregressiveTransformer, AutoregressiveConfig),
}


def save_model(model: Model, folder: Path | str) -> None:
    """Writes config.json and the weights as safetensors into ``folder``, replacing what was there atomically."""
    kind = next(name for name, (cls, _) in _KINDS.items() if isinstance(model, cls))
    save_folder(Path(folder), {"kind": kind, "model": model.config.to_dict()}, model.state_dict())


def load_model(folder: Path | str, device: torch.device | str = "cpu") -> Model:
    """Loads what `save_model` wrote, in evaluation mode. Raises FileNotFoundError or ValueError naming the file."""
    config, tensors = load_folder(Path(folder))
    if not isinstance(config.get("kind"), str) or config["kind"] not in _KINDS:
        raise InvalidValueError(f"{folder} holds {config.get('kind')!r}, not one of {sorted(_KINDS)}")
    model_class, config_class = _KINDS[config["kind"]]
    try:
        settings = config_class(**config["model"])
        with torch.device("meta"):  # sizes without memory
            wanted = {name: value.shape for name, value in model_class(settings).state_dict().items()}
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise BadFileError(f"the configuration in {folder} does not describe a {config['kind']}: {error}") from error
    differ = {name for name in {*wanted, *tensors} if name not in tensors or wanted.get(name) != tensors[name].shape}
    if differ:
        raise BadFileError(
            f"{folder} does not fit its own configuration: {len(differ)} tensors are missing, too many or of another "
            f"shape, such as {min(differ)}; copy the folder again"
        )
    model = model_class(settings)
    load_weights(model, tensors, Path(folder))
    loaded: Model = model.to(device).eval()
    return loaded


def load_tokenizer(folder: Path | str, device: torch.device | str = "cpu") -> SpectralTokenizer:
    """`load_model`, and a ValueError if the folder holds another kind of model."""
    model = load_model(folder, device)
    if not isinstance(model, SpectralTokenizer):
        raise InvalidValueError(f"{folder} holds an autoregressive transformer where a tokenizer was asked for")
    return model


def load_autoregressive(folder: Path | str, device: torch.device | str = "cpu") -> AutoregressiveTransformer:
    """`load_model`, and a ValueError if the folder holds another kind of model."""
    model = load_model(folder, device)
    if not isinstance(model, AutoregressiveTransformer):
        raise InvalidValueError(f"{folder} holds a tokenizer where an autoregressive transformer was asked for")
    return model
