# SPDX-License-Identifier: Apache-2.0
"""Models come back bit for bit, and only as what they are."""

from pathlib import Path

import pytest
import torch

from wavedp.models import (
    AutoregressiveConfig,
    AutoregressiveTransformer,
    SpectralTokenizer,
    SpectralTokenizerConfig,
    load_autoregressive,
    load_model,
    load_tokenizer,
    save_model,
)
from wavedp.storage import read_json, write_json


@pytest.fixture
def tokenizer() -> SpectralTokenizer:
    return SpectralTokenizer(SpectralTokenizerConfig(image_size=8, levels=1, grid=2, width=8, heads=2))


@pytest.fixture
def model() -> AutoregressiveTransformer:
    return AutoregressiveTransformer(
        AutoregressiveConfig(2, 4, 1, 5, 5, width=8, depth=1, heads=2, class_names=("a", "b"))
    )


def test_models_round_trip_bit_for_bit(tmp_path: Path, tokenizer: SpectralTokenizer, model: AutoregressiveTransformer):
    for original, load in ((tokenizer, load_tokenizer), (model, load_autoregressive)):
        save_model(original, tmp_path / "m")
        loaded = load(tmp_path / "m")
        assert loaded.config == original.config
        assert not loaded.training
        for name, value in original.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name


def test_one_kind_is_not_taken_for_the_other(
    tmp_path: Path, tokenizer: SpectralTokenizer, model: AutoregressiveTransformer
):
    save_model(tokenizer, tmp_path / "tokenizer")
    save_model(model, tmp_path / "model")
    with pytest.raises(ValueError, match="holds a tokenizer"):
        load_autoregressive(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="holds an autoregressive"):
        load_tokenizer(tmp_path / "model")


def test_foreign_configurations_are_refused(tmp_path: Path, tokenizer: SpectralTokenizer):
    save_model(tokenizer, tmp_path)
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", {**config, "kind": "pickle"})
    with pytest.raises(ValueError, match="holds 'pickle'"):
        load_model(tmp_path)
    write_json(tmp_path / "config.json", {**config, "model": {**config["model"], "surprise": 1}})
    with pytest.raises(ValueError, match="does not describe a spectral_tokenizer"):
        load_model(tmp_path)
    write_json(tmp_path / "config.json", {**config, "model": {**config["model"], "width": 16}})
    with pytest.raises(ValueError, match="does not fit its own configuration"):
        load_model(tmp_path)
