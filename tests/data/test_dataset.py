# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from wavedp.data import TensorImageDataset, to_unit_range


def make_set(n=6):
    images = torch.arange(n * 3 * 4 * 4, dtype=torch.int64).remainder(256).to(torch.uint8).view(n, 3, 4, 4)
    return TensorImageDataset(images, torch.arange(n) % 2, ["even", "odd"], name="made")


def test_items_are_images_with_integer_labels():
    data = make_set()
    image, label = data[3]
    assert len(data) == 6
    assert torch.equal(image, data.images[3])
    assert (type(label), label) == (int, 1)
    assert torch.equal(data[-1][0], data.images[5])
    assert (data.image_size, data.channels, data.classes, data.name) == (4, 3, ("even", "odd"), "made")
    for index in (6, -7):
        with pytest.raises(IndexError, match="'made', which has 6"):
            data[index]


def test_iteration_ends():
    assert [label for _, label in make_set(3)] == [0, 1, 0]


def test_a_subset_keeps_order_and_nests():
    data = make_set()
    part = data.subset([5, 0, 3])
    assert torch.equal(part.images, data.images[[5, 0, 3]])
    assert part.labels.tolist() == [1, 0, 1]
    assert torch.equal(part.subset(torch.tensor([2]))[0][0], data.images[3])
    assert len(data.subset([])) == 0
    assert data.subset([]).images.shape == (0, 3, 4, 4)


def test_a_mask_is_not_an_index():
    with pytest.raises(TypeError, match="integers"):
        make_set().stack(torch.tensor([True, False, True, False, True, False]))


def test_works_in_a_data_loader():
    loader = torch.utils.data.DataLoader(make_set(), batch_size=4)
    shapes = [(tuple(images.shape), labels.tolist()) for images, labels in loader]
    assert shapes == [((4, 3, 4, 4), [0, 1, 0, 1]), ((2, 3, 4, 4), [0, 1])]


def test_unit_range_ends_at_zero_and_one():
    scaled = to_unit_range(torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert torch.equal(scaled, torch.tensor([0.0, 0.2, 1.0]))
    with pytest.raises(TypeError, match="uint8"):
        to_unit_range(torch.zeros(2))


@pytest.mark.parametrize(
    ("images", "labels", "classes", "message"),
    [
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64), ["a"], "uint8"),
        (torch.zeros(2, 1, 4, 5, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), ["a"], "S, S"),
        (torch.zeros(2, 2, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), ["a"], "1 or 3"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), ["a"], "2 images and 3"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), ["a"], "0..1, but there are 1"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2), ["a"], "int64"),
        (torch.zeros(0, 1, 4, 4, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), [], "no classes"),
        (torch.zeros(0, 1, 4, 4, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), ["a", "b", "a"], "distinct"),
    ],
)
def test_a_malformed_set_is_refused(images, labels, classes, message):
    with pytest.raises(ValueError, match=message):
        TensorImageDataset(images, labels, classes)
