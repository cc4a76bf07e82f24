# SPDX-License-Identifier: Apache-2.0
"""Feature networks: what is kept, what is refused, and Inception-v3's layers and names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from wavedp.evaluation import (
    ClassifierRecipe,
    LabelledImages,
    compare,
    load_feature_network,
    load_inception_features,
    train_feature_network,
)
from wavedp.evaluation.inception import InceptionPool3, load_inception

TINY = ClassifierRecipe("quick", epochs=1, batch_size=16, learning_rate=0.01, sizes={"width": 4, "num_features": 8})


def images(n: int, seed: int) -> LabelledImages:
    generator = torch.Generator().manual_seed(seed)
    return LabelledImages(
        torch.randint(0, 256, (n, 1, 8, 8), generator=generator, dtype=torch.uint8), torch.arange(n) % 2
    )


def test_a_feature_network_is_kept_and_loaded(tmp_path: Path) -> None:
    train, held_out = images(40, 0), images(8, 1)
    made = train_feature_network(train, held_out, num_classes=2, folder=tmp_path, recipe=TINY)
    again = load_feature_network(tmp_path)
    features = made.features(held_out.images, batch_size=3)
    assert features.shape == (8, 8)
    assert torch.equal(features, again.features(held_out.images, batch_size=3))
    assert torch.allclose(features, again.features(held_out.images), atol=1e-6)
    assert again.name == "the quick CNN trained on the real training split"
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o077 == 0
    with pytest.raises(ValueError, match="with other images"):
        train_feature_network(images(40, 5), held_out, num_classes=2, folder=tmp_path, recipe=TINY)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "recipe": {"architecture": "vgg", "sizes": {}}}))
    with pytest.raises(ValueError, match="holds no feature network"):
        load_feature_network(tmp_path)
    with pytest.raises(FileNotFoundError, match="give the features/ of an earlier evaluation"):
        load_feature_network(tmp_path / "nowhere")


def test_a_frechet_distance_is_called_what_it_is() -> None:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert compare("Inception-v3", x, x)["name"] == "FID"
    found = compare("the quick CNN", x, x + 1, num_neighbourhoods=20)
    assert found["name"] == "FD (features of the quick CNN)"
    assert found["frechet_distance"] == pytest.approx(4, abs=1e-4)
    assert (found["num_real"], found["num_neighbourhoods"]) == (50, 20)
    assert found["private"] is False


@pytest.fixture(scope="module")
def inception() -> InceptionPool3:
    torch.manual_seed(0)
    return InceptionPool3().eval()


def test_inception_has_the_layers_of_the_published_one(inception: InceptionPool3) -> None:
    assert sum(p.numel() for p in inception.parameters()) == 21_785_568  # Inception-v3 without its classifiers
    state = inception.state_dict()
    assert state["Mixed_6d.branch7x7dbl_4.conv.weight"].shape == (160, 160, 7, 1)
    assert state["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)
    assert state["Mixed_5b.branch_pool.bn.running_var"].shape == (32,)
    assert inception.Mixed_7c.maximum
    assert not inception.Mixed_7b.maximum


def test_weights_in_a_safetensors_file_are_used(inception: InceptionPool3, tmp_path: Path) -> None:
    file = tmp_path / "inception.safetensors"
    extra = {
        "fc.weight": torch.zeros(1008, 2048),
        "fc.bias": torch.zeros(1008),
        "AuxLogits.conv0.bn.bias": torch.ones(2),
    }
    state = {k: v for k, v in inception.state_dict().items() if not k.endswith("num_batches_tracked")}
    safetensors.torch.save_file({**state, **extra}, file)
    grey = images(1, 0).images
    network = load_inception_features(file)
    features = network.features(grey)
    assert features.shape == (1, 2048)
    with torch.no_grad():
        expected = inception(grey.repeat(1, 3, 1, 1) / 255)
    assert torch.allclose(features, expected, atol=1e-5)
    assert float(features.abs().max()) > 0
    del state["Mixed_5b.branch1x1.conv.weight"]
    safetensors.torch.save_file(state, file)
    with pytest.raises(ValueError, match=r"Mixed_5b\.branch1x1\.conv\.weight is missing \(1 missing, 0 others\)"):
        load_inception(file)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no Inception weights at"):
        load_inception(tmp_path / "none")
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="a pickle inside, which is never opened"):
        load_inception(tmp_path / "a.pth")
