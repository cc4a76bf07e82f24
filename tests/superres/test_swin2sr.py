# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from wavedp import superres

Folder = Callable[[int], Path]
Spy = Callable[[Any, str], list[dict[str, Any]]]


def built(folder: Path) -> Any:
    from transformers import Swin2SRForImageSuperResolution

    return Swin2SRForImageSuperResolution.from_pretrained(folder).eval()


@pytest.mark.parametrize("scale", [2, 4])
def test_sizes_that_the_window_does_not_divide_are_padded_and_cropped(
    swin2sr_folder: Folder, spy: Spy, scale: int
) -> None:
    from transformers import Swin2SRForImageSuperResolution

    calls = spy(Swin2SRForImageSuperResolution, "forward")
    images = torch.rand(2, 3, 30, 34)
    result = superres.load("swin2sr", path=swin2sr_folder(scale))(images)
    assert result.shape == (2, 3, 30 * scale, 34 * scale)
    handed = calls[0]["pixel_values"]
    assert torch.equal(handed, F.pad(images, (0, 6, 0, 2), mode="reflect"))
    with torch.no_grad():
        expected = built(swin2sr_folder(scale))(pixel_values=handed).reconstruction
    expected = expected[:, :, : 30 * scale, : 34 * scale].clamp(0, 1)
    torch.testing.assert_close(result, expected)
    assert result.std() > 0.01  # the clamp leaves something to compare


def test_range_handed_over_is_0_to_1(swin2sr_folder: Folder, spy: Spy) -> None:
    from transformers import Swin2SRForImageSuperResolution

    calls = spy(Swin2SRForImageSuperResolution, "forward")
    images = torch.linspace(0, 1, 3 * 8 * 16).view(1, 3, 8, 16)
    superres.load("swin2sr", path=swin2sr_folder(2))(images)
    assert torch.equal(calls[0]["pixel_values"], images)


def test_an_image_does_not_depend_on_its_batch(swin2sr_folder: Folder) -> None:
    resolver = superres.load("swin2sr", path=swin2sr_folder(2))
    images = torch.rand(3, 3, 8, 8)
    torch.testing.assert_close(resolver(images), resolver(images, batch_size=1), atol=1e-5, rtol=0)


def test_an_image_smaller_than_the_window(swin2sr_folder: Folder) -> None:
    assert superres.load("swin2sr", path=swin2sr_folder(2))(torch.rand(1, 3, 2, 3)).shape == (1, 3, 4, 6)


def test_grey_is_repeated_and_averaged(swin2sr_folder: Folder) -> None:
    resolver = superres.load("swin2sr", path=swin2sr_folder(2))
    grey = torch.rand(2, 1, 8, 8)
    expected = resolver(grey.expand(-1, 3, -1, -1)).mean(1, keepdim=True)
    torch.testing.assert_close(resolver(grey), expected)


def test_save_keeps_the_path_and_not_the_weights(swin2sr_folder: Folder, tmp_path: Path) -> None:
    images = torch.rand(1, 3, 8, 8)
    resolver = superres.load("swin2sr", path=swin2sr_folder(4), batch_size=2)
    resolver.save_pretrained(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 2000
    again = superres.from_pretrained(tmp_path)
    assert again.scale == 4
    assert torch.equal(again(images), resolver(images))


def test_takes_a_built_model_and_a_dtype(swin2sr_folder: Folder, tmp_path: Path) -> None:
    model = built(swin2sr_folder(2))
    images = torch.rand(1, 3, 8, 8)
    resolver = superres.load("swin2sr", pipeline=model)
    assert torch.equal(resolver(images), superres.load("swin2sr", path=swin2sr_folder(2))(images))
    with pytest.raises(ValueError, match="no hub id or folder"):
        resolver.save_pretrained(tmp_path)
    half = superres.load("swin2sr", path=swin2sr_folder(2), dtype=torch.bfloat16)(images)
    assert half.dtype == torch.float32
    assert 0 < (half - resolver(images)).abs().max() < 0.1


def test_refusals(swin2sr_folder: Folder) -> None:
    with pytest.raises(ValueError, match="enlarges x2, not x4"):
        superres.load("swin2sr", path=swin2sr_folder(2), scale=4)
    with pytest.raises(ValueError, match="x2 or x4, not x3"):
        superres.load("swin2sr", scale=3)
    with pytest.raises(ValueError, match="not both"):
        superres.load("swin2sr", path=swin2sr_folder(2), pipeline=built(swin2sr_folder(2)))
    restoring = built(swin2sr_folder(2))
    restoring.config.upscale = 1
    with pytest.raises(ValueError, match="at the same size"):
        superres.load("swin2sr", pipeline=restoring)
