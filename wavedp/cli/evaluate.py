# SPDX-License-Identifier: Apache-2.0
"""Trains classifiers on synthetic images only and tests them on real ones. The figures are computed from real test
images: they are NOT private.

--protocol small (default): a small network at 32 px; metrics.json has the accuracy, its values by class and the
confusion matrix, for every seed, and the same for the real training split (the ceiling) unless --no-ceiling is given.

--protocol dpimagebench: ResNet, WideResNet and ResNeXt at 28 px, each chosen on synthetic validation images and tested
once; with --quick one small network for a CPU. Also Frechet distance, precision and recall, density and coverage, and
the nearest real training images of samples. Writes metrics.json, metrics.csv and neighbours.png; repeated after an
interruption, it goes on. docs/evaluation.md has the definitions.

  wavedp evaluate --protocol dpimagebench --quick --synthetic runs/samples --data fashion/ --out runs/quick
  wavedp evaluate --protocol dpimagebench --quick --reference real --data fashion/ --out runs/ceiling
  wavedp evaluate --protocol dpimagebench --device cuda --num-seeds 3 --synthetic a.npz --data fashion/ --out runs/full
"""

import argparse
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch
from torch import Tensor

from wavedp.cli import arguments as shared
from wavedp.cli import evaluate_dpimagebench as dpimagebench
from wavedp.data import ImageDataset, to_unit_range
from wavedp.errors import InvalidValueError
from wavedp.evaluation.small import evaluate_synthetic
from wavedp.storage import write_json
from wavedp.training.runs import RunFolder

SMALL_EPOCHS, SMALL_SEEDS, SMALL_SIZE = 15, 3, 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--synthetic",
        type=Path,
        metavar="DIR",
        help="folder written by 'wavedp sample', or any image folder, IDX files, .zip or .npz",
    )
    parser.add_argument("--protocol", choices=("small", "dpimagebench"), default="small", help="what is measured")
    shared.add_data(
        parser, "real images to test on (its test split) and to train the ceiling on (its train split)", split=False
    )
    parser.set_defaults(image_size=None)  # by the protocol
    parser.add_argument(
        "--epochs",
        type=shared.positive_int,
        help=f"epochs of each classifier (default: {SMALL_EPOCHS}, or the recipe's)",
    )
    parser.add_argument(
        "--num-seeds",
        type=shared.positive_int,
        help=f"seeds of each classifier; mean and spread (default: {SMALL_SEEDS}, or 1 of dpimagebench)",
    )
    parser.add_argument("--no-ceiling", action="store_true", help="small: do not train on the real training split")
    dpimagebench.add_arguments(parser)
    shared.add_run(parser)


def run(arguments: argparse.Namespace) -> None:
    device = shared.prepare_device(arguments)
    if arguments.protocol == "dpimagebench":
        dpimagebench.run(arguments, device)
        return
    dpimagebench.refuse_options(arguments)
    if arguments.synthetic is None:
        raise InvalidValueError("give --synthetic, the folder of synthetic images")
    arguments.image_size = arguments.image_size or SMALL_SIZE
    arguments.epochs = arguments.epochs or SMALL_EPOCHS
    arguments.num_seeds = arguments.num_seeds or SMALL_SEEDS
    size, channels = arguments.image_size, arguments.channels
    test = shared.open_data(arguments, image_size=size, channels=channels, split="test")
    synthetic = dpimagebench.open_synthetic(arguments, test)
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
