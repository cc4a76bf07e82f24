# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from wavedp.data import open_dataset, render_glyphs, to_unit_range
from wavedp.data.glyph_shapes import FIELD_SIZE, FONT_FILES, STROKE_FONTS, outline_fields, stroke_fields


def nearest_centroid_accuracy(train, test):
    points = to_unit_range(train.images).flatten(1)
    centroids = torch.stack([points[train.labels == k].mean(dim=0) for k in range(len(train.classes))])
    nearest = torch.cdist(to_unit_range(test.images).flatten(1), centroids).argmin(dim=1)
    return float((nearest == test.labels).double().mean())


def test_the_seed_decides_everything():
    first, again, other = (render_glyphs(40, 32, seed=s) for s in (7, 7, 8))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.images, other.images)


def test_one_image_is_drawn_like_many():
    assert render_glyphs(1, 32, seed=3).images.float().mean() > 10
    assert len(render_glyphs(0, 32, seed=3)) == 0


def test_classes_come_in_equal_shares_and_mixed_order():
    labels = render_glyphs(105, 8, seed=0).labels
    assert sorted(labels.bincount().tolist()) == [10] * 5 + [11] * 5
    assert not torch.equal(labels, labels.sort().values)


def test_other_seeds_show_the_same_digits():
    # A label that did not match its picture, or a missing-glyph box, would pull this towards 10 %.
    train, test = (render_glyphs(1000, 16, seed=s) for s in (1, 2))
    assert nearest_centroid_accuracy(train, test) > 0.75  # 0.82 to 0.85 measured


def test_the_ink_fills_the_height_of_the_picture():
    images = render_glyphs(200, 32, seed=5).images[:, 0]
    rows = (images > 64).any(dim=2)
    height = 32 - rows.int().argmax(dim=1) - rows.flip(1).int().argmax(dim=1)
    assert int(height.min()) >= 27
    assert int(images.flatten(1).max(dim=1).values.min()) > 128
    assert int(images[:, :, 0].max()) == 0  # the width stays in proportion


@pytest.mark.parametrize("size", [8, 28, 64])
def test_any_size_shows_the_same_drawing(size):
    drawn = render_glyphs(30, size, seed=9).images.float()
    reference = render_glyphs(30, 32, seed=9).images.float()
    small = torch.nn.functional.adaptive_avg_pool2d(drawn, 4)
    assert (small - torch.nn.functional.adaptive_avg_pool2d(reference, 4)).abs().mean() < 12


def test_letters_and_colour_are_drawn():
    data = open_dataset("glyphs", image_size=24, channels=3, num_images=8, classes=list("AbXy"))
    assert data.classes == ("A", "b", "X", "y")
    assert torch.equal(data.images[:, 0], data.images[:, 2])


def test_test_glyphs_differ_from_train_glyphs():
    train, test = (open_dataset("glyphs", image_size=16, num_images=50, split=s) for s in ("train", "test"))
    assert not torch.equal(train.images, test.images)


@pytest.mark.parametrize("fields", [outline_fields, stroke_fields], ids=["outlines", "strokes"])
def test_every_font_has_ten_different_digits(fields):
    stack = fields("0123456789")
    assert stack.shape == (
        len(FONT_FILES if fields is outline_fields else STROKE_FONTS),
        10,
        FIELD_SIZE,
        FIELD_SIZE,
    )
    ink = stack > (0 if fields is outline_fields else -2)
    for font in ink:
        for i, a in enumerate(font):
            assert all((a & b).sum() < 0.95 * (a | b).sum() for b in font[:i])
    assert not ink[..., 0, :].any()
    assert not ink[..., :, 0].any()


@pytest.mark.parametrize("classes", ["", "0é", "00", "0 1"])
def test_unusable_characters_are_refused(classes):
    with pytest.raises(ValueError, match="distinct ASCII"):
        render_glyphs(10, 32, seed=0, classes=classes)
