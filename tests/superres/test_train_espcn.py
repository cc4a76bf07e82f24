# SPDX-License-Identifier: Apache-2.0
import math
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wavedp import superres
from wavedp.functional import coarse
from wavedp.superres import EspcnConfig
from wavedp.training import superres as training
from wavedp.training.loop import step_generator
from wavedp.training.superres import degrade, draw_patches, gaussian_blur, perturb, train_espcn

SMALL = {"batch_size": 16, "lr": 3e-3, "progress": False}


def shapes(count: int, seed: int, size: int = 32) -> Tensor:
    """Discs and half-planes with sharp edges: float32 [count, 1, size, size], 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(size).float(), torch.arange(size).float(), indexing="ij")
    draw = torch.rand(count, 4, 1, 1, generator=generator)
    disc = (y - draw[:, 0] * size) ** 2 + (x - draw[:, 1] * size) ** 2 < (draw[:, 2] * size / 2) ** 2
    angle = 2 * math.pi * draw[:, 3]
    plane = angle.cos() * (y - size / 2) + angle.sin() * (x - size / 2) > 0
    return (disc ^ plane).float().unsqueeze(1)


def test_the_haar_degradation_is_the_method_s_coarse_image() -> None:
    images = torch.rand(3, 3, 16, 24)
    torch.testing.assert_close(degrade(images, 4, "haar"), coarse(images, 2) / 4)
    torch.testing.assert_close(degrade(images, 4, "haar"), F.avg_pool2d(images, 4))


def test_the_bicubic_degradation_is_antialiased() -> None:
    images = torch.rand(2, 1, 12, 12)
    expected = F.interpolate(images, size=(4, 4), mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.equal(degrade(images, 3, "bicubic"), expected)


def test_training_beats_bicubic_on_images_it_has_not_seen() -> None:
    resolver, history = train_espcn(shapes(256, 0), scale=2, steps=100, log_every=10, **{**SMALL, "lr": 1e-2})
    held_out = shapes(64, 1)
    low = degrade(held_out, 2, "haar")
    bicubic = (superres.load("bicubic", scale=2)(low) - held_out).abs().mean()
    learned = (resolver(low) - held_out).abs().mean()
    assert learned < 0.85 * bicubic  # measured: 0.75
    assert [record.step for record in history] == [*range(0, 100, 10), 99]
    assert history[-1].loss < 0.85 * history[0].loss


def test_the_log_holds_the_loss_and_psnr_of_its_batch() -> None:
    images = shapes(32, 0)
    _, history = train_espcn(images, scale=2, steps=1, **SMALL)
    high = draw_patches(images, 16, 32, step_generator(0, 0))
    low = degrade(high, 2, "haar")
    error = F.interpolate(low, scale_factor=2, mode="bicubic", align_corners=False) - high
    assert history[0].loss == pytest.approx(float(error.abs().mean()), rel=1e-4)
    assert history[0].psnr == pytest.approx(-10 * math.log10(error.square().mean()), rel=1e-4)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    def weights(seed: int) -> Tensor:
        resolver, _ = train_espcn(shapes(32, 0), scale=2, steps=5, seed=seed, **SMALL)
        return torch.cat([p.detach().flatten() for p in resolver.model.parameters()])

    assert torch.equal(weights(0), weights(0))
    assert (weights(0) - weights(1)).abs().max() > 1e-3


class Photographs:
    """A data set of bytes with labels, and of more than one size."""

    def __init__(self, channels: int = 3) -> None:
        generator = torch.Generator().manual_seed(0)
        sizes = ((18, 26), (21, 16), (40, 17))
        self.images = [torch.randint(256, (channels, h, w), generator=generator, dtype=torch.uint8) for h, w in sizes]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], index


def test_patches_of_a_data_set_are_crops_of_its_images() -> None:
    data = Photographs()
    patches = draw_patches(data, 50, 16, torch.Generator().manual_seed(0))
    assert patches.shape == (50, 3, 16, 16)
    crops = {
        tuple(image[:, top : top + 16, left : left + 16].flatten().tolist())
        for image in data.images
        for top in range(image.shape[1] - 15)
        for left in range(image.shape[2] - 15)
    }
    drawn = [tuple((patch * 255).round().byte().flatten().tolist()) for patch in patches]
    assert set(drawn) <= crops
    assert len(set(drawn)) > 25


def test_trains_on_a_data_set_of_bytes_by_any_scale(tmp_path: Path) -> None:
    resolver, _ = train_espcn(
        Photographs(), scale=3, steps=2, degradation="bicubic", patch_size=15, out_dir=tmp_path, **SMALL
    )
    assert (resolver.scale, resolver.channels) == (3, 3)
    assert resolver.training["degradation"] == "bicubic"
    images = torch.rand(1, 3, 5, 5)
    assert torch.equal(superres.load("espcn", path=tmp_path / "espcn")(images), resolver(images))


def raise_interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [lambda: signal.raise_signal(signal.SIGINT), raise_interrupt])
def test_ctrl_c_leaves_a_usable_network_and_the_same_call_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: Callable[[], None]
) -> None:
    def train(out_dir: Path) -> Any:
        return train_espcn(shapes(32, 0), scale=2, steps=8, out_dir=out_dir, save_every=4, log_every=1, **SMALL)

    drawn = 0
    original = training.draw_patches

    def interrupted(*arguments: Any) -> Tensor:
        nonlocal drawn
        drawn += 1
        if drawn == 6:
            stop()
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "draw_patches", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "stopped")
    partial = superres.load("espcn", path=tmp_path / "stopped" / "espcn")
    images = torch.rand(1, 1, 8, 8)
    assert partial(images).shape == (1, 1, 16, 16)
    assert not torch.equal(partial(images), superres.load("bicubic", scale=2)(images))

    resumed, history = train(tmp_path / "stopped")
    whole, whole_history = train(tmp_path / "whole")
    assert history == whole_history
    assert torch.equal(resumed(images), whole(images))


def test_noise_on_the_input_makes_a_network_that_stands_it() -> None:
    held_out = shapes(64, 1)
    noisy = perturb(degrade(held_out, 2, "haar"), 0, 0.0, torch.Generator())
    noisy = (noisy + 0.2 * torch.randn(noisy.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)

    def error(input_noise_std: float) -> float:
        resolver, _ = train_espcn(shapes(256, 0), scale=2, steps=60, input_noise_std=input_noise_std, **SMALL)
        return float((resolver(noisy) - held_out).abs().mean())

    assert error(0.3) < 0.85 * error(0.0)


def test_perturbations_have_the_stated_strength() -> None:
    generator = torch.Generator().manual_seed(0)
    grey = torch.full((400, 1, 16, 16), 0.5)
    stds = (perturb(grey, 0, 0.1, generator) - grey).flatten(1).std(1)
    assert 0.09 < stds.max() < 0.12
    assert abs(stds.mean() - 0.05) < 0.006
    assert torch.equal(perturb(grey, 0, 0, generator), grey)
    point = torch.zeros(1, 2, 31, 31)
    point[:, :, 15, 15] = 1
    blurred = gaussian_blur(point, 2.0)
    distance = torch.arange(31.0) - 15
    torch.testing.assert_close(blurred.sum((2, 3)), torch.ones(1, 2))
    assert (blurred[0, 0].sum(0) * distance**2).sum() == pytest.approx(4, rel=0.05)
    assert (blurred[0, 1].sum(1) * distance**2).sum() == pytest.approx(4, rel=0.05)
    torch.testing.assert_close(gaussian_blur(grey, 3.0), grey)


def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    train_espcn(shapes(8, 0), scale=2, steps=2, batch_size=2)
    assert "espcn" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 3}, "power of two, not 3"),
        ({"degradation": "lanczos"}, "'haar', 'bicubic'"),
        ({"patch_size": 15}, "multiple of the scale 2, not 15"),
        ({"patch_size": 34}, "smaller than the patches of 34"),
        ({"scale": 64}, "too small for x64|one of"),
        ({"config": EspcnConfig(scale=4, channels=1)}, "config is for x4, but scale is 2"),
        ({"config": EspcnConfig(scale=2, channels=3)}, "config is for 3 channels, but the images have 1"),
        ({"input_noise_std": -1.0}, "input_noise_std and input_blur_std are >= 0"),
        ({"steps": 0}, "steps must be >= 1"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_espcn(shapes(4, 0), **{"scale": 2, "steps": 1, **SMALL, **options})


def test_refuses_images_that_are_none_or_out_of_range() -> None:
    with pytest.raises(ValueError, match="no images to train on"):
        train_espcn(torch.zeros(0, 1, 8, 8), scale=2, steps=1)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        train_espcn(shapes(4, 0) * 255, scale=2, steps=1, progress=False)


def luminance(image: np.ndarray) -> np.ndarray:
    """Y of BT.601 as MATLAB's rgb2ycbcr, 16 to 235, of an RGB image in [0, 1]."""
    return 16 + image @ np.array([65.481, 128.553, 24.966])


def test_bicubic_scores_its_published_psnr_on_set5(wavedp_data: Path) -> None:
    """33.97 dB at x2 on Y with a border of 2 pixels, as published with the pairs."""
    from PIL import Image

    archive = wavedp_data / "sr-set5-set14" / "images.zip"
    if not archive.is_file():
        pytest.skip("needs sr-set5-set14/images.zip in WAVEDP_DATA")
    scores = []
    with zipfile.ZipFile(archive) as files:
        for number in range(1, 6):
            low, high = (
                np.asarray(Image.open(files.open(f"Set5/image_SRF_2/img_{number:03}_SRF_2_{kind}.png")).convert("RGB"))
                / 255.0
                for kind in ("LR", "HR")
            )
            result = superres.load("bicubic", scale=2)(torch.from_numpy(low).permute(2, 0, 1).unsqueeze(0))
            bytes_out = (result[0].permute(1, 2, 0) * 255).round().numpy() / 255
            difference = (luminance(bytes_out) - luminance(high))[2:-2, 2:-2]
            scores.append(20 * np.log10(255) - 10 * np.log10((difference**2).mean()))
    assert np.mean(scores) == pytest.approx(33.97, abs=0.03)
