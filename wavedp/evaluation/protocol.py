# SPDX-License-Identifier: Apache-2.0
"""The classifier protocol of DPImageBench: train and choose on synthetic images, test once on real ones.

Source of the numbers: DPImageBench (arXiv 2503.14681), evaluation/evaluator.py and data/dataset_loader.py.
docs/evaluation.md lists where this protocol departs from it, and why.
"""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch

from wavedp.data import ImageDataset
from wavedp.errors import BadFileError, InvalidValueError
from wavedp.evaluation.fitting import LabelledImages, fit_classifier, predictions, remove_checkpoint
from wavedp.evaluation.recipes import ClassifierRecipe
from wavedp.storage import read_json, write_bytes, write_json

NUM_SYNTHETIC = 60_000
HELD_OUT = 5_000
"""Of 60,000: real images that the private model must not see, and synthetic ones that choose the epoch."""


@dataclass(frozen=True)
class ClassifierResult:
    """One classifier, trained with one seed, and its only test.

    Attributes:
        classifier: the architecture's name.
        seed: of its training.
        trained_on: "synthetic", or "real" for the ceiling.
        accuracy: share of the real test images named correctly. Computed from real images: not private.
        validation_accuracy: share of the validation images, which come from the training source, of the chosen epoch.
        epoch, epochs: the chosen one, and how many there were.
        num_train, num_validation, num_test: images.
        parameters: of the classifier.
        seconds: wall time of the part trained last, where a run was resumed.
        per_class: accuracy by label; None where the test set has no image of it.
    """

    classifier: str
    seed: int
    trained_on: str
    accuracy: float
    validation_accuracy: float
    epoch: int
    epochs: int
    num_train: int
    num_validation: int
    num_test: int
    parameters: int
    seconds: float
    per_class: tuple[float | None, ...]


def protocol_delta(num_records: int) -> float:
    """1 / (N ln N), the benchmark's delta: 1.666e-6 for the 55,000 images of the MNIST family.

    Raises:
        ValueError: for fewer than two records.
    """
    if num_records < 2:
        raise InvalidValueError(f"num_records must be >= 2, got {num_records}")
    return 1 / (num_records * math.log(num_records))


def real_split(train: ImageDataset) -> tuple[LabelledImages, LabelledImages]:
    """The real training set as (what the private model may see, what is held out): the last 5,000 of 60,000 in file
    order are held out, and the last twelfth of a smaller set.

    ``wavedp finetune --hold-out 5000`` leaves the same images out.

    Raises:
        ValueError: for fewer than 24 images.
    """
    held = min(HELD_OUT, len(train) // 12)
    if held < 2:
        raise InvalidValueError(f"{train.name} has {len(train)} images; the protocol needs at least 24")
    images = train.images
    return (
        LabelledImages(images[: len(train) - held], train.labels[: len(train) - held]),
        LabelledImages(images[len(train) - held :], train.labels[len(train) - held :]),
    )


def synthetic_split(synthetic: ImageDataset, *, seed: int = 0) -> tuple[LabelledImages, LabelledImages]:
    """Synthetic images as (training, validation), 55,000 and 5,000: drawn with ``seed`` without regard to their order,
    11 to 1 where there are fewer than 60,000.

    Raises:
        ValueError: for fewer than 24 images.
    """
    order = torch.randperm(len(synthetic), generator=torch.Generator().manual_seed(seed))[:NUM_SYNTHETIC]
    held = len(order) // 12
    if held < 2:
        raise InvalidValueError(f"{synthetic.name} has {len(synthetic)} images; the protocol needs at least 24")
    train, validation = order[: len(order) - held], order[len(order) - held :]
    return (
        LabelledImages(synthetic.stack(train), synthetic.labels[train]),
        LabelledImages(synthetic.stack(validation), synthetic.labels[validation]),
    )


def run_classifiers(
    recipes: Sequence[ClassifierRecipe],
    seeds: Sequence[int],
    train: LabelledImages,
    validation: LabelledImages,
    test: LabelledImages,
    *,
    num_classes: int,
    folder: Path,
    trained_on: str = "synthetic",
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> list[ClassifierResult]:
    """Trains every recipe with every seed and tests each once; what ``folder`` already has is not repeated.

    Args:
        recipes, seeds: the classifiers.
        train, validation: synthetic images: what they learn from, and what chooses their epoch.
        test: real images; seen after a classifier is finished, and by nothing that chooses.
        num_classes: number of labels.
        folder: gets ``<architecture>-<seed>/`` with checkpoints while one is trained, and its result.json.
        trained_on: what to call the source of ``train``.
        device: torch device.
        progress: show a bar for each classifier.

    Raises:
        ValueError: for sets that do not fit together, or results in ``folder`` of other images or settings.
    """
    if test.images.shape[1:] != train.images.shape[1:]:
        raise InvalidValueError(
            f"training images are {list(train.images.shape[1:])}, test images {list(test.images.shape[1:])}"
        )
    prints = {"train": train.fingerprint(), "validation": validation.fingerprint(), "test": test.fingerprint()}
    results = []
    for recipe in recipes:
        for seed in seeds:
            place = folder / f"{recipe.architecture}-{seed}"
            identity = {"recipe": recipe.to_dict(), "seed": seed, "images": prints}
            result = _finished(place, identity)
            if result is None:
                started = time.monotonic()
                fit = fit_classifier(
                    recipe, train, validation, num_classes=num_classes, seed=seed, folder=place, device=device,
                    title=place.name, progress=progress,
                )  # fmt: skip
                hits = (predictions(fit.model, test.images, device) == test.labels).double()
                result = ClassifierResult(
                    classifier=recipe.architecture,
                    seed=seed,
                    trained_on=trained_on,
                    accuracy=float(hits.mean()),
                    validation_accuracy=fit.validation_accuracy,
                    epoch=fit.epoch,
                    epochs=recipe.epochs,
                    num_train=len(train),
                    num_validation=len(validation),
                    num_test=len(test),
                    parameters=sum(p.numel() for p in fit.model.parameters()),
                    seconds=round(time.monotonic() - started, 1),
                    per_class=tuple(
                        float(hits[of].mean()) if bool((of := test.labels == label).any()) else None
                        for label in range(num_classes)
                    ),
                )
                content = {"private": False, **identity, "history": fit.history, "result": asdict(result)}
                write_json(place / "result.json", content)
                remove_checkpoint(place)
            results.append(result)
    return results


def summarise_results(results: Sequence[ClassifierResult]) -> dict[str, Any]:
    """Mean, standard deviation (divisor n) and maximum over all classifiers and seeds, and what lies between.

    ``maximum_by_seed`` is the mean over the seeds of the best classifier's accuracy: with one seed what the published
    tables give. The maximum is chosen by test accuracy, so it is biased upwards.
    """
    if not results:
        raise InvalidValueError("there are no results to summarise")
    values = [result.accuracy for result in results]
    seeds = sorted({result.seed for result in results})
    names = list(dict.fromkeys(result.classifier for result in results))
    by_classifier = {name: [r.accuracy for r in results if r.classifier == name] for name in names}
    return {
        "mean": mean(values),
        "std": pstdev(values),
        "maximum": max(values),
        "maximum_by_seed": mean(max(r.accuracy for r in results if r.seed == seed) for seed in seeds),
        "by_classifier": {
            name: {"mean": mean(of), "std": pstdev(of), "maximum": max(of)} for name, of in by_classifier.items()
        },
        "num_results": len(values),
    }


def write_results(path: Path, protocol: str, results: Sequence[ClassifierResult]) -> None:
    """One CSV row for each classifier and seed; accuracies are shares."""
    columns = ["protocol", *(field.name for field in fields(ClassifierResult) if field.name != "per_class"), "private"]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    for result in results:
        writer.writerow({"protocol": protocol, **asdict(result), "private": False})
    write_bytes(path, text.getvalue().encode())


def label_source(folder: Path) -> str:
    """How the labels of a folder of 'wavedp sample', or of its images/, were chosen; "unknown" for other folders."""
    try:
        settings = read_json((folder.parent if folder.name == "images" else folder) / "run.json")
    except (OSError, ValueError):
        return "unknown"
    if not isinstance(settings, dict) or settings.get("command") != "sample" or "labels" not in settings:
        return "unknown"
    labels = settings["labels"]
    if labels is None:
        return "balanced: the classes in turn"
    return "drawn from the released label histogram" if labels == "histogram" else f"chosen: {labels}, in turn"


def _finished(folder: Path, identity: dict[str, Any]) -> ClassifierResult | None:
    file = folder / "result.json"
    if not file.exists():
        return None
    stored = read_json(file)
    try:
        changed = [key for key, value in identity.items() if stored[key] != value]
        if changed:
            raise InvalidValueError(f"{file} is of other {' and '.join(changed)}; use another folder")
        return ClassifierResult(**{**stored["result"], "per_class": tuple(stored["result"]["per_class"])})
    except (KeyError, TypeError) as error:
        raise BadFileError(f"{file} is no result of a classifier ({error!r}); remove it to train again") from error
