# SPDX-License-Identifier: Apache-2.0
"""``wavedp evaluate --protocol dpimagebench``."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from wavedp.cli import arguments as shared
from wavedp.data import ImageDataset, open_dataset
from wavedp.errors import InvalidValueError
from wavedp.evaluation import (
    QUICK,
    ClassifierRecipe,
    FeatureNetwork,
    LabelledImages,
    compare,
    copying,
    dpimagebench_recipes,
    draw_neighbours,
    find_neighbours,
    label_source,
    load_feature_network,
    load_inception_features,
    protocol_delta,
    real_split,
    run_classifiers,
    summarise_results,
    synthetic_split,
    train_feature_network,
    write_results,
)
from wavedp.storage import write_json
from wavedp.training.results import folder_names
from wavedp.training.runs import RunFolder

IMAGE_SIZE = 28
NAMES = tuple(recipe.architecture for recipe in dpimagebench_recipes())
NOTE = "computed from real images without noise: NOT private; publish it only if those images may be published"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("protocol dpimagebench")
    group.add_argument("--quick", action="store_true", help="one small CNN instead of the three: minutes on a CPU")
    group.add_argument(
        "--reference",
        choices=("real",),
        help="train on the real training split instead of synthetic images: the ceiling",
    )
    group.add_argument("--classifiers", metavar="A,B,...", help=f"some of {','.join(NAMES)} (default: all)")
    group.add_argument(
        "--family",
        choices=("mnist", "cifar"),
        help="whose classifiers and budgets (default: mnist, used for all but CIFAR)",
    )
    group.add_argument("--no-distances", action="store_true", help="classifiers only")
    group.add_argument(
        "--features", type=Path, metavar="DIR", help="features/ of an earlier evaluation on the same real images"
    )
    group.add_argument("--inception", type=Path, metavar="FILE", help="Inception-v3 weights (safetensors): FID as well")


def refuse_options(arguments: argparse.Namespace) -> None:
    """Raises where an option of this protocol was given with another."""
    options = ("quick", "reference", "classifiers", "family", "no_distances", "features", "inception")
    given = ["--" + name.replace("_", "-") for name in options if getattr(arguments, name)]
    if given:
        raise InvalidValueError(f"{', '.join(given)}: only with --protocol dpimagebench")


def run(arguments: argparse.Namespace, device: torch.device) -> None:
    arguments.image_size = arguments.image_size or IMAGE_SIZE
    arguments.num_seeds = arguments.num_seeds or 1
    recipes = chosen_recipes(arguments)
    if (arguments.synthetic is None) == (arguments.reference is None):
        raise InvalidValueError("give either --synthetic or --reference real")
    geometry = {"image_size": arguments.image_size, "channels": arguments.channels}
    test_set = shared.open_data(arguments, split="test", **geometry)
    real, held_out = real_split(shared.open_data(arguments, split="train", **geometry))
    test = LabelledImages(test_set.images, test_set.labels)
    if arguments.reference is None:
        trained_on, labels = "synthetic", label_source(arguments.synthetic)
        train, validation = synthetic_split(open_synthetic(arguments, test_set))
    else:
        trained_on, labels = "real", "of the real training split"
        train, validation = real, held_out
    given = load_feature_network(arguments.features, device) if arguments.features else None
    inception = load_inception_features(arguments.inception, device) if arguments.inception else None
    folder = RunFolder(arguments.out, shared.settings(arguments), overwrite=True)
    common: dict[str, Any] = {"device": device, "progress": not arguments.no_progress}
    results = run_classifiers(
        recipes, range(arguments.seed, arguments.seed + arguments.num_seeds), train, validation, test,
        num_classes=len(test_set.classes), folder=folder / "classifiers", trained_on=trained_on, **common,
    )  # fmt: skip
    summary = summarise_results(results)
    metrics: dict[str, Any] = {
        "protocol": protocol_name(arguments),
        "private": False,
        "note": NOTE,
        "trained_on": trained_on,
        "labels": labels,
        "label_counts": torch.bincount(train.labels, minlength=len(test_set.classes)).tolist(),
        "image_size": arguments.image_size,
        "num_real_train": len(real),
        "delta_of_the_benchmark": protocol_delta(len(real)),
        "accuracy": summary,
        "classifiers": [asdict(result) for result in results],
    }
    write_results(folder / "metrics.csv", metrics["protocol"], results)
    write_json(folder / "metrics.json", metrics)
    if not arguments.no_distances:
        shown = test if arguments.reference else joined(train, validation)
        network = given or train_feature_network(
            real, held_out, num_classes=len(test_set.classes), folder=folder / "features",
            recipe=recipes[0] if arguments.quick else QUICK, **common,
        )  # fmt: skip
        of = "synthetic images" if arguments.reference is None else "real test images"
        metrics["distances"] = {"of": of, "to": "the real training split"} | distances(
            network, inception, folder, real, held_out, shown, test_set.classes, progress=common["progress"]
        )
        write_json(folder / "metrics.json", metrics)
    report(metrics, folder)


def protocol_name(arguments: argparse.Namespace) -> str:
    return "dpimagebench-quick" if arguments.quick else "dpimagebench"


def chosen_recipes(arguments: argparse.Namespace) -> list[ClassifierRecipe]:
    if arguments.quick:
        if arguments.classifiers or arguments.family:
            raise InvalidValueError("--quick is one classifier with one recipe; leave out --classifiers and --family")
        recipes = [QUICK]
    else:
        recipes = list(dpimagebench_recipes(arguments.family or "mnist"))
        names = shared.class_names(arguments.classifiers) or NAMES
        unknown = [name for name in names if name not in NAMES]
        if unknown:
            raise InvalidValueError(f"--classifiers: no {unknown[0]!r}; there are {', '.join(NAMES)}")
        recipes = [recipe for recipe in recipes if recipe.architecture in names]
    if arguments.epochs is None:
        return recipes
    return [replace(recipe, epochs=arguments.epochs) for recipe in recipes]


def open_synthetic(arguments: argparse.Namespace, test: ImageDataset) -> ImageDataset:
    """``--synthetic`` with the labels of the real data; a folder of 'wavedp sample' stands for its images/."""
    path: Path = arguments.synthetic
    source = path / "images" if (path / "images").is_dir() else path
    return open_dataset(
        source,
        image_size=test.image_size,
        channels=test.channels,
        split="all",
        classes=folder_names(test.classes),
    )


def joined(*parts: LabelledImages) -> LabelledImages:
    return LabelledImages(torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]))


def distances(
    network: FeatureNetwork,
    inception: FeatureNetwork | None,
    folder: RunFolder,
    real: LabelledImages,
    held_out: LabelledImages,
    shown: LabelledImages,
    classes: Sequence[str],
    *,
    progress: bool,
) -> dict[str, Any]:
    """Distances of ``shown`` from the real training split, and neighbours.png. ``shown`` are the synthetic images, or
    the real test images for the ceiling."""
    x, held, y = (network.features(part.images, progress=progress) for part in (real, held_out, shown))
    values: dict[str, Any] = {
        "feature_network_accuracy": network.accuracy,
        "in_trained_features": compare(network.name, x, y),
        **copying(x, held, y),
    }
    draw_neighbours(folder / "neighbours.png", find_neighbours(x, y, shown.labels), real.images, shown, classes)
    if inception is not None:
        vectors = [inception.features(part.images, batch_size=64, progress=progress) for part in (real, shown)]
        values["in_inception_features"] = compare(inception.name, *vectors)
    return values


def report(metrics: dict[str, Any], folder: RunFolder) -> None:
    accuracy = metrics["accuracy"]
    print(f"{metrics['protocol']}, trained on {metrics['trained_on']} images; labels {metrics['labels']}")
    print(
        f"accuracy: mean {accuracy['mean']:.4f}, standard deviation {accuracy['std']:.4f}, maximum "
        f"{accuracy['maximum']:.4f} over {accuracy['num_results']} (classifiers x seeds); best classifier of a seed "
        f"{accuracy['maximum_by_seed']:.4f}"
    )
    for name, of in accuracy["by_classifier"].items():
        print(f"  {name:10} {of['mean']:.4f} +- {of['std']:.4f}")
    found = metrics.get("distances", {})
    for name in ("in_trained_features", "in_inception_features"):
        if name in found:
            of = found[name]
            print(f"{of['name']}: {of['frechet_distance']:.3f} ({of['num_synthetic']} {found['of']})")
            print(
                f"  precision {of['precision']:.3f}, recall {of['recall']:.3f}, density {of['density']:.3f}, coverage "
                f"{of['coverage']:.3f} ({of['num_neighbourhoods']} of each)"
            )
    print(f"{NOTE}\nin {folder.path}: metrics.json, metrics.csv{', neighbours.png' if found else ''}")
