# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from PIL import Image

from wavedp.data.resize import check_geometry, fit_picture, fit_pixels


def picture_of(array):
    return Image.fromarray(np.asarray(array, dtype=np.uint8))


def test_the_right_size_is_untouched():
    values = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert np.array_equal(fit_picture(picture_of(values), 8, 1)[0].numpy(), values)


def test_crop_keeps_the_centre_of_the_longer_side():
    wide = np.tile(np.arange(9, dtype=np.uint8), (4, 1))
    assert fit_picture(picture_of(wide), 4, 1)[0, 0].tolist() == [2, 3, 4, 5]
    tall = fit_picture(picture_of(wide.T), 4, 1)
    assert tall[0, :, 0].tolist() == [2, 3, 4, 5]


def test_pad_centres_the_image_on_the_background():
    wide = np.full((2, 4), 200, dtype=np.uint8)
    rows = fit_picture(picture_of(wide), 4, 1, fit="pad", background=7)[0, :, 0].tolist()
    assert rows == [7, 200, 200, 7]


def test_pad_keeps_a_sliver_visible():
    rows = fit_picture(picture_of(np.full((1, 1000), 255)), 8, 1, fit="pad")[0].float().mean(dim=1)
    assert rows.count_nonzero() == 1


def test_shrinking_does_not_alias():
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    small = fit_picture(picture_of(board), 8, 1).float()
    assert small.sub(127.5).abs().max() <= 2


def test_grey_is_bt601_luma_and_colour_repeats_grey():
    colour = np.zeros((4, 4, 3), dtype=np.uint8)
    colour[...] = (200, 100, 50)
    luma = (299 * 200 + 587 * 100 + 114 * 50) / 1000
    assert fit_picture(picture_of(colour), 4, 1).float().sub(luma).abs().max() <= 1
    grey = fit_picture(picture_of(np.full((4, 4), 9)), 4, 3)
    assert grey.shape == (3, 4, 4)
    assert grey.unique().tolist() == [9]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_shows_the_background(mode):
    clear = Image.new(mode, (4, 4), (255,) * (len(mode) - 1) + (0,))
    half = Image.new(mode, (4, 4), (255,) * (len(mode) - 1) + (128,))
    assert fit_picture(clear, 4, 3, background=40).unique().tolist() == [40]
    assert abs(int(fit_picture(half, 4, 1, background=0)[0, 0, 0]) - 128) <= 1


def test_a_transparent_palette_colour_shows_the_background():
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.info["transparency"] = 1
    assert fit_picture(palette, 4, 3, background=5).unique().tolist() == [5]


def test_sixteen_bits_keep_their_upper_byte():
    values = np.array([[0, 255], [256, 65535]], dtype=np.uint16)
    assert fit_picture(Image.fromarray(values), 2, 1)[0].tolist() == [[0, 0], [1, 255]]
    assert fit_picture(Image.fromarray(values.astype(np.int32)), 2, 1)[0].tolist() == [[0, 0], [1, 255]]


@pytest.mark.parametrize("array", [np.full((2, 2), 1 << 20, dtype=np.int32), np.ones((2, 2), dtype=np.float32)])
def test_pixels_without_a_range_are_refused(array):
    with pytest.raises(ValueError, match="no stated range"):
        fit_picture(Image.fromarray(array), 2, 1)


def test_tensors_follow_the_same_rule():
    images = torch.randint(0, 256, (3, 3, 10, 14), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    one = fit_picture(picture_of(images[1].permute(1, 2, 0).numpy()), 6, 1)
    assert torch.equal(fit_pixels(images, 6, 1)[1], one)
    assert fit_pixels(images[:0], 6, 1).shape == (0, 1, 6, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, "crop", 0), "image_size"),
        ((5000, 1, "crop", 0), "image_size"),
        ((32, 4, "crop", 0), "channels"),
        ((32, 1, "stretch", 0), "fit"),
        ((32, 1, "crop", 256), "background"),
    ],
)
def test_an_impossible_geometry_names_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_geometry(*arguments)
