# SPDX-License-Identifier: Apache-2.0
import hashlib

import pytest
import torch

from wavedp.data import load_digits_dataset, native_digits


def test_the_split_is_stratified_and_covers_every_scan_once():
    train, test, everything = (load_digits_dataset(8, split=s) for s in ("train", "test", "all"))
    assert (len(train), len(test), len(everything)) == (1437, 360, 1797)
    counts = everything.labels.bincount()
    assert (test.labels.bincount() - counts * 360 / 1797).abs().max() < 1
    together = torch.cat([train.images, test.images]).flatten(1).tolist()
    assert sorted(together) == sorted(everything.images.flatten(1).tolist())


def test_the_split_never_changes():
    labels = load_digits_dataset(8, split="test").labels
    digest = hashlib.sha256(bytes(labels.tolist())).hexdigest()
    assert digest[:16] == "b889473a8ed7a24b"


def test_size_eight_is_the_scan_itself():
    scans, labels = native_digits()
    data = load_digits_dataset(8, split="all")
    assert int(scans.max()) == 16
    assert torch.equal(data.images, (scans.float() * 255 / 16).round().byte())
    assert torch.equal(data.labels, labels)


@pytest.mark.parametrize("size", [16, 32, 64])
def test_the_coarse_image_of_an_enlarged_scan_is_the_scan(size):
    small = load_digits_dataset(8, split="test").images.float()
    large = load_digits_dataset(size, split="test").images.float()
    error = (torch.nn.functional.avg_pool2d(large, size // 8) - small).abs()
    assert error.mean() < 1.2  # of 255; bicubic interpolation alone is off by 11
    assert error.max() < 16


def test_any_size_and_colour():
    assert load_digits_dataset(28, split="test").images.shape == (360, 1, 28, 28)
    colour = load_digits_dataset(32, 3, split="test").images
    assert torch.equal(colour[:, 2:], load_digits_dataset(32, split="test").images)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match='"train", "test" or "all"'):
        load_digits_dataset(8, split="val")
