# SPDX-License-Identifier: Apache-2.0
"""Trains a small classifier on synthetic images only and tests it on real ones.

Writes metrics.json with the accuracy, its values by class and the confusion matrix, for every seed, and the same
for a classifier trained on the real training split (the ceiling) unless --no-ceiling is given. The figures are
computed from real test images: they are NOT private.
"""

import argparse
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch
from torch import Tensor

from wavedp.cli import arguments as shared
from wavedp.data import ImageDataset, open_dataset, to_unit_range
from wavedp.storage import write_json
from wavedp.training.evaluation import evaluate_synthetic
from wavedp.training.results import folder_names
from wavedp.training.runs import RunFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--synthetic",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder written by 'wavedp sample', or its images/",
    )
    shared.add_data(
        parser, "real images to test on (its test split) and to train the ceiling on (its train split)", split=False
    )
    parser.add_argument("--epochs", type=shared.positive_int, default=15, help="epochs of each classifier")
    parser.add_argument("--num-seeds", type=shared.positive_int, default=3, help="classifiers trained; mean and spread")
    parser.add_argument("--no-ceiling", action="store_true", help="do not train on the real training split")
    shared.add_run(parser)


def run(arguments: argparse.Namespace) -> None:
    device = shared.prepare_device(arguments)
    size, channels = arguments.image_size, arguments.channels
    test = shared.open_data(arguments, image_size=size, channels=channels, split="test")
    source = arguments.synthetic / "images" if (arguments.synthetic / "images").is_dir() else arguments.synthetic
    names = folder_names(test.classes)
    synthetic = open_dataset(source, image_size=size, channels=channels, split="all", classes=names)
    folder = RunFolder(arguments.out, shared.settings(arguments), overwrite=True)
    metrics: dict[str, Any] = {"private": False, "image_size": size}
    metrics["synthetic"] = accuracy_over_seeds(synthetic, test, arguments, device)
    if not arguments.no_ceiling:
        train = shared.open_data(arguments, image_size=size, channels=channels, split="train")
        metrics["real_ceiling"] = accuracy_over_seeds(train, test, arguments, device)
    write_json(folder / "metrics.json", metrics)
    for name in ("synthetic", "real_ceiling"):
        if name in metrics:
            print(f"{name}: accuracy {metrics[name]['accuracy']:.4f} +- {metrics[name]['std']:.4f}")


def accuracy_over_seeds(
    train: ImageDataset, test: ImageDataset, arguments: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    return summarise(
        pixels(train), train.labels, pixels(test), test.labels, test.classes,
        epochs=arguments.epochs, seeds=range(arguments.seed, arguments.seed + arguments.num_seeds), device=device,
    )  # fmt: skip


def pixels(dataset: ImageDataset) -> Tensor:
    return to_unit_range(dataset.stack(torch.arange(len(dataset))))


def summarise(
    train_images: Tensor,
    train_labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    classes: tuple[str, ...],
    *,
    epochs: int,
    seeds: range,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Mean and spread of the accuracy over classifier seeds, with every run's own figures."""
    runs = [
        evaluate_synthetic(
            train_images,
            train_labels,
            test_images,
            test_labels,
            classes=classes,
            epochs=epochs,
            seed=s,
            device=device,
        )
        for s in seeds
    ]
    accuracies = [run["accuracy"] for run in runs]
    return {"accuracy": mean(accuracies), "std": pstdev(accuracies), "runs": runs}
