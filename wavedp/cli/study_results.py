# SPDX-License-Identifier: Apache-2.0
"""What is measured of a row of a study, and how it is shown. NOT private: it is computed from real images."""

import argparse
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from wavedp.cli import arguments as shared
from wavedp.cli.finetune import lora, privacy_spec, public_model
from wavedp.cli.pretrain import model_folder
from wavedp.data import ImageDataset
from wavedp.models import AutoregressiveTransformer, SpectralTokenizer, load_autoregressive, load_tokenizer
from wavedp.storage import read_json
from wavedp.training.pictures import save_dots
from wavedp.training.public import tokenize
from wavedp.training.trainable import choose_trainable

FIGURES = (
    "epsilon",
    "delta",
    "noise_multiplier",
    "parameters",
    "trained_parameters",
    "tokens",
    "held_out_images",
    "nats_per_token",
    "nats_per_image",
    "nats_given_class",
    "accuracy_mean",
    "accuracy_std",
    "accuracy_max",
    "frechet_distance",
)
"""The columns of a row, None where it has no such figure; seconds of its stages follow."""

Parsed = Mapping[str, argparse.Namespace]
"""What the command lines of a recipe's stages say, by stage."""


def last_of(command: str, stages: Parsed) -> argparse.Namespace | None:
    """What the last stage of a command was asked for."""
    found = [parsed for parsed in stages.values() if parsed.command == command]
    return found[-1] if found else None


def source_of_held_out(stages: Parsed, base: Parsed) -> argparse.Namespace | None:
    """The stage whose --hold-out a row is measured on: its own private one, else the recipe's, so that a public model
    is measured on the same images; else its public one. None where no image is held out."""
    found = last_of("finetune", stages) or last_of("finetune", base) or last_of("pretrain", stages)
    return None if found is None or found.hold_out is None else found


def measure(stages: Parsed, base: Parsed, device: torch.device) -> dict[str, Any]:
    """The `FIGURES` of a row whose stages are finished."""
    figures: dict[str, Any] = dict.fromkeys(FIGURES)
    private, public = last_of("finetune", stages), last_of("pretrain", stages)
    final = private or public
    if final is not None:
        model = load_autoregressive(model_folder(final.out), device)
        figures["parameters"] = sum(p.numel() for p in model.parameters())
        figures["trained_parameters"] = figures["parameters"] if private is None else trained_parameters(private)
        figures["tokens"] = model.config.length
        source = source_of_held_out(stages, base)
        if source is not None and not model.config.text_length:  # there are no texts of the images that were held out
            tokenizer = load_tokenizer(model_folder(final.tokenizer), device)
            layout = tokenizer.layout
            images = shared.open_held_out(source, image_size=layout.image_size, channels=layout.channels)
            nats = held_out_nats(model, tokenizer, images)
            figures |= {"held_out_images": len(images), "nats_per_token": nats}
            figures["nats_per_image"] = nats * model.config.length
            figures["nats_given_class"] = knows_classes(model, images)
    if private is not None:
        statement = read_json(private.out / "privacy.json")
        figures |= {name: statement[name] for name in ("epsilon", "delta", "noise_multiplier")}
    evaluation = last_of("evaluate", stages)
    return figures if evaluation is None else figures | accuracies(read_json(evaluation.out / "metrics.json"))


def trained_parameters(private: argparse.Namespace) -> int:
    """How many scalars a private stage trained."""
    public = public_model(private, torch.device("cpu"))
    return choose_trainable(public, private.trainable, **lora(private))


@torch.no_grad()
def held_out_nats(model: AutoregressiveTransformer, tokenizer: SpectralTokenizer, images: ImageDataset) -> float:
    """The mean over ``images`` of the model's loss, nats per token: given the class, or 'no class' where the model does
    not know theirs (`knows_classes`)."""
    device = model.class_embedding.weight.device
    tokens = tokenize(tokenizer, images, model.config.num_scales)
    labels = images.labels if knows_classes(model, images) else torch.full_like(images.labels, model.no_class)
    batches = zip(tokens.split(256), labels.split(256), strict=True)
    return sum(float(model.loss(t.to(device), y.to(device)).double().sum()) for t, y in batches) / len(images)


def knows_classes(model: AutoregressiveTransformer, images: ImageDataset) -> bool:
    """Whether the labels of ``images`` mean to the model what they mean here: by the names of its classes, or their
    number where it has no names. To a public model of other images they mean other things."""
    config = model.config
    return images.classes == config.class_names if config.class_names else len(images.classes) == config.num_classes


def accuracies(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Of the metrics.json of either protocol of 'wavedp evaluate'."""
    if "synthetic" in metrics:  # --protocol small
        values = [run["accuracy"] for run in metrics["synthetic"]["runs"]]
        found = {"accuracy_mean": mean(values), "accuracy_std": metrics["synthetic"]["std"]}
        return {**found, "accuracy_max": max(values)}
    accuracy = metrics["accuracy"]
    distances = metrics.get("distances", {}).get("in_trained_features", {})
    return {
        "accuracy_mean": accuracy["mean"],
        "accuracy_std": accuracy["std"],
        "accuracy_max": accuracy["maximum"],
        "frechet_distance": distances.get("frechet_distance"),
    }


def planned_cost(private: argparse.Namespace) -> dict[str, float]:
    """Epsilon and delta of all the steps that a private stage may take."""
    strict = private.noise_mode == "strict"  # what rounding costs depends on the model
    spec = privacy_spec(private, trained_parameters(private) if strict else None)
    return {"epsilon": spec.epsilon(), "delta": spec.delta}


def spent(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What private runs cost together, by adding their epsilons and deltas, which holds however they were chosen."""
    epsilon, delta = (sum(run[name] for run in runs) for name in ("epsilon", "delta"))
    return {"private_runs": len(runs), "epsilon": float(epsilon), "delta": float(delta)}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of results.csv for people."""
    lines = [("row", "epsilon", "parameters", "trained", "nats/token", "nats/image", "accuracy", "max", "minutes")]
    for row in rows:
        accuracy = _shown(row["accuracy_mean"], ".2f", 100)
        if row["accuracy_mean"] is not None:
            accuracy += f" +- {100 * row['accuracy_std']:.2f}"
        lines.append(
            (
                row["row"],
                _shown(row["epsilon"], ".4g"),
                _shown(row["parameters"], ",d"),
                _shown(row["trained_parameters"], ",d"),
                _shown(row["nats_per_token"], ".4f") + without_class(row),
                _shown(row["nats_per_image"], ".2f"),
                accuracy,
                _shown(row["accuracy_max"], ".2f", 100),
                _shown(row["seconds"], ".1f", 1 / 60),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    first, *others = widths
    return "\n".join(
        "  ".join([f"{line[0]:{first}}", *(f"{cell:>{width}}" for cell, width in zip(line[1:], others, strict=True))])
        for line in lines
    )


def without_class(row: Mapping[str, Any]) -> str:
    """What is said beside the loss of a model that was not told the class."""
    return " (no class)" if row["nats_given_class"] is False else ""


def _shown(value: float | None, how: str, factor: float | None = None) -> str:
    return "-" if value is None else format(value if factor is None else value * factor, how)


def draw(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A dot for each row, its accuracy if all have one, else its loss; nothing where matplotlib is missing, or where a
    row has neither."""
    if find_spec("matplotlib") is None:
        return
    points: dict[str, tuple[float, float]] = {}
    if all(row["accuracy_mean"] is not None for row in rows):
        points = {row["row"]: (100 * row["accuracy_mean"], 100 * row["accuracy_std"]) for row in rows}
        label = "accuracy, %: mean and standard deviation over classifier seeds"
    elif all(row["nats_per_token"] is not None for row in rows):
        points = {row["row"] + without_class(row): (row["nats_per_token"], 0.0) for row in rows}
        label = "nats per token on held-out images"
    if points:
        save_dots(path, points, title="NOT private; every row spends its own budget", x_label=label)
