# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from wavedp.data import open_dataset, render_silhouettes, to_unit_range
from wavedp.data.silhouette_pieces import smooth
from wavedp.data.silhouettes import SILHOUETTES


def test_the_seed_decides_everything():
    first, again, other = (render_silhouettes(30, 16, seed=s) for s in (7, 7, 8))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.images, other.images)


def test_classes_are_fashion_mnists_in_equal_shares():
    data = open_dataset("silhouettes", image_size=8, num_images=53)
    assert sorted(data.labels.bincount().tolist()) == [5] * 7 + [6] * 3
    assert data.classes == SILHOUETTES
    assert (data.classes[0], data.classes[7], data.classes[9]) == ("T-shirt/top", "Sneaker", "Ankle boot")


def test_classes_are_told_apart_by_their_outline():
    train, test = (render_silhouettes(800, 16, seed=s) for s in (1, 2))
    outlines = [(to_unit_range(part.images) > 0.05).float().flatten(1) for part in (train, test)]
    nearest = torch.cdist(outlines[1], outlines[0]).argmin(dim=1)
    hit = (train.labels[nearest] == test.labels).float()
    per_class = torch.stack([hit[test.labels == k].mean() for k in range(10)])
    assert hit.mean() > 0.7
    assert per_class.min() > 0.25  # shirts, coats and pullovers share their outline


@pytest.mark.parametrize("size", [8, 28, 64])
def test_the_longer_side_fills_a_black_picture(size):
    images = render_silhouettes(60, size, seed=3).images[:, 0]
    ink = images > 8
    spans = torch.stack([ink.any(dim=2).sum(dim=1), ink.any(dim=1).sum(dim=1)]).max(dim=0).values
    assert int(spans.min()) >= 0.9 * size - 1
    corners = torch.stack([images[:, 0, 0], images[:, -1, 0], images[:, 0, -1]])
    assert (corners == 0).float().mean() > 0.9
    assert images.float().std(dim=(1, 2)).min() > 5


def test_test_and_train_differ_and_colour_repeats_grey():
    train, test = (
        open_dataset("silhouettes", image_size=8, num_images=20, split=s, channels=3) for s in ("train", "test")
    )
    assert not torch.equal(train.images, test.images)
    assert torch.equal(train.images[:, 0], train.images[:, 2])


def test_corner_cutting_keeps_ends_and_halves_corners():
    line = np.asarray(smooth([(0, 0), (4, 0), (4, 4)], rounds=1))
    assert line.tolist() == [[0, 0], [3, 0], [4, 1], [4, 4]]
    square = smooth([(0, 0), (4, 0), (4, 4), (0, 4)], closed=True, rounds=1)
    assert square == [(1, 0), (3, 0), (4, 1), (4, 3), (3, 4), (1, 4), (0, 3), (0, 1)]


@pytest.mark.parametrize(("n", "size", "seed"), [(-1, 32, 0), (5, 7, 0), (5, 32, -1)])
def test_an_impossible_request_is_refused(n, size, seed):
    with pytest.raises(ValueError, match="need num_images"):
        render_silhouettes(n, size, seed=seed)
