# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from wavedp import superres
from wavedp.superres import Espcn, EspcnConfig, EspcnResolver


def random_model(**config: Any) -> Espcn:
    torch.manual_seed(0)
    model = Espcn(EspcnConfig(**{"scale": 2, "channels": 1, "width": 8, **config}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_untrained_network_is_bicubic(scale: int, channels: int) -> None:
    images = torch.rand(2, channels, 5, 7)
    model = Espcn(EspcnConfig(scale=scale, channels=channels, width=8))
    expected = F.interpolate(images, scale_factor=scale, mode="bicubic", align_corners=False)
    torch.testing.assert_close(model(images), expected)
    assert torch.equal(superres.load("espcn", pipeline=model)(images), model(images).clamp(0, 1))


def test_the_network_adds_sub_pixels_to_bicubic() -> None:
    """Three convolutions at the low resolution; channel c r^2 + r i + j becomes pixel (i, j) of channel c."""
    model, images = random_model(), torch.rand(2, 1, 5, 7)
    first, second, third = (layer for layer in model.layers if isinstance(layer, torch.nn.Conv2d))
    x = images - 0.5
    for layer, pad in ((first, 2), (second, 1), (third, 1)):
        x = F.conv2d(F.pad(x, (pad,) * 4, mode="replicate"), layer.weight, layer.bias)
        x = x if layer is third else x.relu()
    expected = F.interpolate(images, scale_factor=2, mode="bicubic", align_corners=False)
    for i in range(2):
        for j in range(2):
            expected[:, 0, i::2, j::2] += x[:, 2 * i + j]
    torch.testing.assert_close(model(images), expected)


def test_depth_and_width_shape_the_network() -> None:
    layers = [m for m in random_model(depth=4, width=10, channels=3, scale=4).layers if hasattr(m, "weight")]
    assert [tuple(layer.weight.shape) for layer in layers] == [
        (10, 3, 5, 5),
        (5, 10, 3, 3),
        (5, 5, 3, 3),
        (5, 5, 3, 3),
        (48, 5, 3, 3),
    ]


def test_save_and_load_are_bit_exact(tmp_path: Path) -> None:
    images = torch.rand(3, 1, 6, 5)
    resolver = EspcnResolver(random_model(depth=3), batch_size=2, training={"steps": 5})
    resolver.save_pretrained(tmp_path)
    again = superres.load("espcn", path=tmp_path)
    assert isinstance(again, EspcnResolver)
    assert again.model.config == resolver.model.config
    assert (again.batch_size, again.training) == (2, {"steps": 5})
    for name, value in resolver.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)
    assert torch.equal(again(images), resolver(images))
    for other in (
        superres.from_pretrained(tmp_path),
        superres.load("espcn", path=tmp_path / "model.safetensors"),
    ):
        assert torch.equal(other(images), resolver(images))


def test_a_dtype_is_taken_and_results_stay_float32() -> None:
    images, model = torch.rand(2, 1, 6, 6), random_model()
    full = EspcnResolver(model)(images)
    half = superres.load("espcn", pipeline=model, dtype=torch.bfloat16)
    result = half(images)
    assert next(half.model.parameters()).dtype == torch.bfloat16
    assert result.dtype == torch.float32
    assert 0 < (result - full).abs().max() < 0.05


def test_damaged_files_are_named(tmp_path: Path) -> None:
    EspcnResolver(random_model()).save_pretrained(tmp_path)
    weights, config_file = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, config = weights.read_bytes(), config_file.read_text()
    for damaged in (whole[:-7], whole[:200] + b"\x00" + whole[201:], b""):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors .* damaged"):
            superres.load("espcn", path=tmp_path)
    weights.write_bytes(whole)
    for key, value, message in (
        ("model", {"scale": 5}, "describes no espcn"),
        ("model", {"colour": 1}, "colour"),
    ):
        config_file.write_text(json.dumps({**json.loads(config), key: value}))
        with pytest.raises(ValueError, match=message):
            superres.load("espcn", path=tmp_path)
    config_file.write_text(json.dumps({**json.loads(config), "model": {"scale": 4, "width": 16}}))
    with pytest.raises(ValueError, match="are not those of the espcn in its config"):
        superres.load("espcn", path=tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        superres.load("espcn", path=tmp_path)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no built-in weights"):
        superres.load("espcn")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        superres.load("espcn", path=tmp_path)
    EspcnResolver(random_model()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="enlarges x2, not x4"):
        superres.load("espcn", path=tmp_path, scale=4)
    for wrong in ({"scale": 5}, {"channels": 2}, {"width": 7}, {"depth": 0}, {"first_kernel": 4}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            EspcnConfig(**wrong)


def test_gradients_reach_every_weight() -> None:
    model = random_model()
    model(torch.rand(2, 1, 6, 6)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
