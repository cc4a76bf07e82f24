# SPDX-License-Identifier: Apache-2.0
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from wavedp import superres

SD = "stable-diffusion-x4-upscaler"
NAMES = ("bicubic", "haar", "espcn", SD, "ldm-4x", "swin2sr")
HUB_NAMES = NAMES[3:]


def test_names_and_descriptions() -> None:
    assert superres.available() == NAMES
    descriptions = [superres.describe(name) for name in NAMES]
    assert len(set(descriptions)) == len(NAMES)
    assert all(0 < len(line) < 100 and "\n" not in line for line in descriptions)
    with pytest.raises(ValueError, match="no super-resolver 'lanczos'; there are bicubic, haar"):
        superres.describe("lanczos")
    with pytest.raises(ValueError, match="no super-resolver 'lanczos'"):
        superres.load("lanczos")


def test_describe_says_how_to_install_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("wavedp.superres.registry.find_spec", lambda name: None if name == "diffusers" else found(name))
    assert superres.describe("ldm-4x").endswith("[needs diffusers: pip install 'wavedp[sr]']")
    assert "pip" not in superres.describe("haar")


@pytest.mark.parametrize("name", HUB_NAMES)
def test_a_missing_extra_is_an_import_error_that_names_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs (diffusers|transformers): pip install 'wavedp\[sr\]'"):
        superres.load(name)


@pytest.mark.parametrize(
    ("name", "path", "wanted"),
    [
        (SD, None, "stabilityai/stable-diffusion-x4-upscaler"),
        ("ldm-4x", None, "CompVis/ldm-super-resolution-4x-openimages"),
        ("swin2sr", None, "caidas/swin2SR-classical-sr-x4-64"),
        ("swin2sr", "nobody/nothing", "nobody/nothing"),
    ],
)
def test_a_model_that_is_not_there_offline_says_what_to_download(
    name: str, path: str | None, wanted: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"hf download {wanted} --local-dir FOLDER"):
        superres.load(name, path=path)


@pytest.mark.parametrize("name", HUB_NAMES)
def test_a_folder_that_is_not_there_or_holds_no_model(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        superres.load(name, path=tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="must hold the whole model"):
        superres.load(name, path=tmp_path)


def test_pickled_weights_are_refused(swin2sr_folder: Any, tmp_path: Path) -> None:
    from transformers import Swin2SRForImageSuperResolution

    model = Swin2SRForImageSuperResolution.from_pretrained(swin2sr_folder(2))
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="safetensors"):
        superres.load("swin2sr", path=tmp_path)


def test_a_folder_of_another_adapter_is_refused(tmp_path: Path) -> None:
    superres.load("haar").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds 'haar', not 'bicubic'"):
        superres.load("bicubic", path=tmp_path)
    with pytest.raises(ValueError, match="holds 'haar', not 'espcn'"):
        superres.load("espcn", path=tmp_path)


def test_from_pretrained_refuses_what_it_did_not_write(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        superres.from_pretrained(tmp_path)
    superres.load("haar").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "format": "other"}))
    with pytest.raises(ValueError, match="does not hold a super-resolver"):
        superres.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        superres.from_pretrained(tmp_path)


def test_importing_the_package_loads_no_optional_dependency() -> None:
    program = (
        "import sys, wavedp.superres as s; s.load('haar'); [s.describe(name) for name in s.available()]; "
        "print([m for m in ('diffusers', 'transformers', 'PIL') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
