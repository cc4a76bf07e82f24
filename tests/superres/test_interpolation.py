# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from wavedp import superres
from wavedp.functional import coarse, waverec2


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("channels", [1, 3])
def test_bicubic_is_torch_s_without_antialias_clamped(scale: int, channels: int) -> None:
    images = (torch.rand(3, channels, 6, 9) > 0.5).float()  # steps overshoot, so that the clamp is seen
    size = (6 * scale, 9 * scale)
    expected = F.interpolate(images, size=size, mode="bicubic", align_corners=False, antialias=False)
    torch.testing.assert_close(superres.load("bicubic", scale=scale)(images), expected.clamp(0, 1))


@pytest.mark.parametrize("level", [0, 1, 2, 3, 5])
def test_haar_is_the_inverse_transform_with_zero_details_and_repeats_pixels(level: int) -> None:
    images = torch.rand(2, 3, 5, 6)
    result = superres.load("haar", scale=2**level)(images)
    details = [(torch.zeros(2, 3, 5 << i, 6 << i),) * 3 for i in range(level)]  # of the coarsest level first
    torch.testing.assert_close(result, waverec2([images * 2**level, *details]))
    assert torch.equal(result, images.repeat_interleave(2**level, 2).repeat_interleave(2**level, 3))


def test_haar_gives_back_the_coarse_image_it_was_made_from() -> None:
    images = torch.rand(2, 1, 16, 24)
    low = coarse(images, 3) / 8
    high = superres.load("haar", scale=8)(low)
    torch.testing.assert_close(coarse(high, 3) / 8, low)


@pytest.mark.parametrize("name", ["bicubic", "haar"])
def test_save_and_read_back(name: str, tmp_path: Path) -> None:
    superres.load(name, scale=8, batch_size=5).save_pretrained(tmp_path)
    again = superres.from_pretrained(tmp_path)
    assert (again.name, again.scale) == (name, 8)
    assert isinstance(again, superres.BatchedSuperResolver)
    assert again.batch_size == 5
    assert superres.load(name, path=tmp_path).scale == 8


def test_default_scale_and_refusals() -> None:
    assert superres.load("bicubic").scale == superres.load("haar").scale == 4
    with pytest.raises(ValueError, match="power of two, not 6"):
        superres.load("haar", scale=6)
    with pytest.raises(ValueError, match="positive integer, not 0"):
        superres.load("bicubic", scale=0)
    with pytest.raises(ValueError, match="no weights to read"):
        superres.load("bicubic", path="somewhere")
