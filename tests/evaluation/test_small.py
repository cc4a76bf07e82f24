# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch

from wavedp.data import load_digits_dataset, to_unit_range
from wavedp.evaluation.small import classifier_accuracy, evaluate_synthetic


def bars(n, seed, size=8, channels=1):
    """Class 0: a horizontal bar at a random height; class 1: a vertical one."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    images = torch.rand(n, channels, size, size, generator=generator) * 0.3
    places = torch.randint(1, size - 1, (n,), generator=generator)
    for image, label, place in zip(images, labels, places, strict=True):
        if label == 0:
            image[:, place] = 1
        else:
            image[:, :, place] = 1
    return images, labels


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (12, 3), (28, 1), (48, 3)])
def test_a_learnable_set_is_learned_at_any_size(size, channels):
    train, test = (bars(200, seed, size, channels) for seed in (0, 1))
    assert classifier_accuracy(*train, *test, num_classes=2, epochs=4) > 0.95


def test_random_labels_teach_nothing():
    images, _ = bars(200, 0)
    labels = torch.randint(0, 2, (200,), generator=torch.Generator().manual_seed(3))
    test = bars(400, 1)
    assert 0.2 < classifier_accuracy(images, labels, *test, num_classes=2, epochs=2) < 0.8


def test_the_seed_decides_the_result_and_nothing_leaks_into_the_global_generator():
    train, test = bars(60, 0), bars(60, 1)
    torch.manual_seed(5)
    expected_next = torch.rand(3)
    torch.manual_seed(5)
    reports = [evaluate_synthetic(*train, *test, classes=["row", "column"], epochs=1, seed=4) for _ in range(2)]
    assert torch.equal(torch.rand(3), expected_next)
    assert reports[0] == reports[1]


def test_the_report_adds_up():
    train, test = bars(100, 0), bars(50, 1)
    test = (test[0], torch.zeros(50, dtype=torch.int64))  # half of the truth is now false
    report = evaluate_synthetic(*train, *test, classes=["row", "column", "never"], epochs=4)
    assert report == json.loads(json.dumps(report))
    assert sum(map(sum, report["confusion"])) == report["num_test"] == 50
    assert report["confusion"][1:] == [[0, 0, 0], [0, 0, 0]]
    assert report["accuracy"] == report["confusion"][0][0] / 50
    assert report["accuracy"] == pytest.approx(0.5, abs=0.1)
    assert report["per_class_accuracy"] == {"row": report["accuracy"], "column": None, "never": None}
    assert report["private"] is False
    accuracy = classifier_accuracy(*train, *test, num_classes=3, epochs=4)
    assert accuracy == report["accuracy"]


def test_real_digits_reach_the_ceiling():
    train, test = (load_digits_dataset(8, split=s) for s in ("train", "test"))
    accuracy = classifier_accuracy(
        to_unit_range(train.images),
        train.labels,
        to_unit_range(test.images),
        test.labels,
        num_classes=10,
        epochs=5,
    )
    assert accuracy >= 0.96


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"train_images": t["train_images"] * 255}, r"must lie in \[0, 1\]"),
        (lambda t: t | {"train_images": (t["train_images"] * 255).byte()}, "must be float"),
        (lambda t: t | {"test_images": t["test_images"][..., :6, :6]}, "S >= 8"),
        (lambda t: t | {"test_images": t["test_images"].expand(-1, 3, -1, -1)}, r"\[1, 8, 8\], test images \[3"),
        (lambda t: t | {"train_labels": t["train_labels"] + 1}, r"span 1\.\.2"),
        (lambda t: t | {"train_labels": t["train_labels"].float()}, "int64"),
        (lambda t: t | {"train_labels": t["train_labels"][:3]}, "int64"),
        (lambda t: t | {"epochs": 0}, "epochs"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    (train_images, train_labels), (test_images, test_labels) = bars(10, 0), bars(10, 1)
    arguments = {
        "train_images": train_images,
        "train_labels": train_labels,
        "test_images": test_images,
        "test_labels": test_labels,
        "num_classes": 2,
    }
    with pytest.raises(ValueError, match=message):
        classifier_accuracy(**change(arguments))
