# SPDX-License-Identifier: Apache-2.0
"""The geometry of the scales, against the published sizes and against PyWavelets."""

import pytest
import pywt
import torch

from wavedp.models.spectra import SpectralLayout, image_to_maps, image_to_tokens, tokens_to_image


def test_sit4_at_256_px_has_the_published_maps_and_patches():
    # arXiv 2412.09607, SIT-4: maps 32, 32, 64, 128 with patches 2, 2, 4, 8 and 256 tokens a scale.
    layout = SpectralLayout(image_size=256, channels=3, levels=3, grid=16)
    scales = range(layout.num_scales)
    assert [layout.map_size(s) for s in scales] == [32, 32, 64, 128]
    assert [layout.map_channels(s) for s in scales] == [3, 9, 9, 9]
    assert [layout.patch_size(s) for s in scales] == [2, 2, 4, 8]
    assert [layout.token_dim(s) for s in scales] == [12, 36, 144, 576]
    assert [layout.resolution(k) for k in (1, 2, 3, 4)] == [32, 64, 128, 256]
    assert layout.tokens_per_scale == 256


def test_every_coefficient_belongs_to_one_token():
    layout = SpectralLayout(image_size=64, channels=3, levels=4, grid=2)
    total = sum(layout.tokens_per_scale * layout.token_dim(s) for s in range(layout.num_scales))
    assert total == 3 * 64 * 64


def test_maps_equal_pywavelets():
    layout = SpectralLayout(image_size=16, channels=2, levels=2, grid=2)
    x = torch.rand(3, 2, 16, 16, dtype=torch.float64)
    approximation, second, first = pywt.wavedec2(x.numpy(), "haar", level=2)
    maps = image_to_maps(x, layout)
    torch.testing.assert_close(maps[0], torch.from_numpy(approximation))
    for got, bands in ((maps[1], second), (maps[2], first)):
        torch.testing.assert_close(got, torch.cat([torch.from_numpy(b) for b in bands], dim=1))


@pytest.mark.parametrize("num_scales", [1, 2, 3])
def test_a_coarse_image_has_the_coefficients_of_the_full_one(num_scales: int):
    layout = SpectralLayout(image_size=32, channels=1, levels=2, grid=4)
    x = torch.rand(2, 1, 32, 32, dtype=torch.float64)
    maps, tokens = image_to_maps(x, layout), image_to_tokens(x, layout)
    coarse = tokens_to_image(tokens[:num_scales], layout)
    assert coarse.shape[-1] == layout.resolution(num_scales)
    block = 32 // coarse.shape[-1]
    torch.testing.assert_close(coarse, torch.nn.functional.avg_pool2d(x, block))  # LL / 2^l is the block mean
    for got, want in zip(image_to_maps(coarse, layout), maps[:num_scales], strict=True):
        torch.testing.assert_close(got, want)
    for got, want in zip(image_to_tokens(coarse, layout), tokens[:num_scales], strict=True):
        torch.testing.assert_close(got, want)


def test_a_token_is_a_normalised_patch_of_its_map():
    layout = SpectralLayout(image_size=16, channels=3, levels=2, grid=2)
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    counts = [layout.map_channels(s) for s in range(layout.num_scales)]
    mean = [torch.randn(count, dtype=torch.float64) for count in counts]
    std = [torch.rand(count, dtype=torch.float64) + 0.5 for count in counts]
    tokens = image_to_tokens(x, layout, mean, std)
    for s, coefficients in enumerate(image_to_maps(x, layout)):
        p = layout.patch_size(s)
        assert tokens[s].shape == (2, 4, layout.token_dim(s))
        patch = (coefficients[1, :, p:, :p] - mean[s][:, None, None]) / std[s][:, None, None]
        torch.testing.assert_close(tokens[s][1, 2], patch.flatten())  # token 2 is row 1, column 0
    torch.testing.assert_close(tokens_to_image(tokens, layout, mean, std), x)
    assert image_to_tokens(x.half(), layout, mean, std)[0].dtype == torch.float64


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"image_size": 30, "levels": 2}, "multiple of grid"),
        ({"image_size": 32, "grid": 5}, "multiple of grid"),
        ({"image_size": 0}, "image_size must be a positive integer"),
        ({"levels": True}, "levels must be a positive integer"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        SpectralLayout(**{"image_size": 32, "channels": 1, "levels": 2, "grid": 4, **sizes})


def test_a_resolution_between_the_scales_is_refused():
    layout = SpectralLayout(image_size=32, channels=1, levels=2, grid=4)
    with pytest.raises(ValueError, match=r"24 pixels a side.*\[8, 16, 32\]"):
        image_to_maps(torch.rand(1, 1, 24, 24), layout)
    with pytest.raises(ValueError, match=r"\[B, 1, r, r\]"):
        image_to_maps(torch.rand(1, 3, 32, 32), layout)
    with pytest.raises(ValueError, match="20 tokens"):
        layout.scales_of_length(20)
