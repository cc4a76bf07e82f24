# SPDX-License-Identifier: Apache-2.0
"""Generations of checkpoints: three are kept, the newest intact one is loaded, and what was skipped is said."""

import json
from pathlib import Path

import pytest
import torch

from wavedp.storage import save_folder
from wavedp.training.checkpoints import load_newest, save_generation
from wavedp.training.loop import load_checkpoint, save_checkpoint


def save(folder: Path, n: int) -> Path:
    return save_generation(folder, {"n": n, "text": "é", "list": [1.5, None]}, {"a": torch.full((4,), float(n))})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for n in range(1, 6):
        save(tmp_path / "checkpoint", n)
    return tmp_path / "checkpoint"


def test_three_are_kept_and_the_newest_comes_back(folder: Path):
    assert sorted(path.name for path in folder.iterdir()) == ["00000003", "00000004", "00000005"]
    found = load_newest(folder)
    assert (found.path.name, found.skipped) == ("00000005", ())
    assert found.config == {"n": 5, "text": "é", "list": [1.5, None]}
    assert found.tensors["a"].tolist() == [5.0] * 4


def test_only_the_owner_may_read(folder: Path):
    assert folder.stat().st_mode & 0o777 == 0o700
    for path in folder.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def damage(path: Path, how: str) -> None:
    config, weights = path / "config.json", path / "model.safetensors"
    if how == "weights":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif how == "config":
        config.write_text(config.read_text().replace('"n": ', '"n": 1'))
    elif how == "no digest":
        config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "digest"}))
    elif how == "not JSON":
        config.write_text("{")
    else:
        (weights if how == "no weights" else config).unlink()


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("weights", "does not have the sha256"),
        ("config", "config.json does not match its digest"),
        ("no digest", "config.json does not match its digest"),
        ("not JSON", "is not valid JSON"),
        ("no weights", "is missing"),
        ("no config", "holds no config"),
    ],
)
def test_a_damaged_one_is_skipped_and_named(folder: Path, how: str, why: str):
    damage(folder / "00000005", how)
    found = load_newest(folder)
    assert (found.config["n"], found.tensors["a"].tolist()) == (4, [4.0] * 4)
    (sentence,) = found.skipped
    assert sentence.startswith("checkpoint 00000005 was skipped: ")
    assert why in sentence
    assert save(folder, 9).name == "00000006"  # the damaged one is not written over, and goes in its turn
    assert load_newest(folder).config["n"] == 9


def test_where_all_are_damaged_nothing_is_loaded(folder: Path):
    for path in folder.iterdir():
        damage(path, "weights")
    with pytest.raises(ValueError, match=r"no intact checkpoint; move it away .* 00000005 .* 00000004 .* 00000003 "):
        load_newest(folder)


def test_where_there_is_none(tmp_path: Path):
    assert load_newest(tmp_path / "nowhere") is None
    assert load_newest(tmp_path) is None


def test_one_from_before_generations_is_the_oldest(tmp_path: Path):
    save_folder(tmp_path, {"n": 1}, {"a": torch.zeros(1)})
    assert load_newest(tmp_path).config == {"n": 1}
    path = save(tmp_path, 2)
    assert load_newest(tmp_path).config["n"] == 2
    damage(path, "weights")
    found = load_newest(tmp_path)
    assert (found.config["n"], len(found.skipped)) == (1, 1)


def test_public_training_warns_of_what_it_skipped(tmp_path: Path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (3, 6):
        save_checkpoint(tmp_path, model, optimizer, step)
    damage(tmp_path / "00000002", "weights")
    with pytest.warns(RuntimeWarning, match="checkpoint 00000002 was skipped"):
        assert load_checkpoint(tmp_path, model, optimizer) == 3
