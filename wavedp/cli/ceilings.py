# SPDX-License-Identifier: Apache-2.0
"""Measures what each stage of the method allows on a data set. NOT private: all of it is computed from real images.

The same number of images at every stage: real ones; reduced to the coarse scales and made large again, by bicubic
interpolation and by the run's super-resolution network; the same through its tokenizer; sampled from its public model,
and from that model after fine-tuning on the real tokens without clipping and noise; and sampled from the private models
of --also. The classifier is that of 'wavedp evaluate --protocol dpimagebench --quick'. Writes results.csv and
grid.png; repeated after an interruption, it goes on.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wavedp import superres
from wavedp.cli import arguments as shared
from wavedp.cli.evaluate_dpimagebench import IMAGE_SIZE
from wavedp.data import ImageDataset, to_unit_range
from wavedp.data.catalog import Split
from wavedp.data.resize import fit_pixels
from wavedp.evaluation import QUICK, LabelledImages, run_classifiers
from wavedp.evaluation.protocol import HELD_OUT
from wavedp.functional import coarse
from wavedp.models import AutoregressiveTransformer, load_autoregressive, load_tokenizer
from wavedp.pipeline import CoarseToFinePipeline
from wavedp.superres import SuperResolver
from wavedp.training.loop import TrainingConfig
from wavedp.training.pictures import save_grid
from wavedp.training.public import fit_tokens
from wavedp.training.results import write_rows
from wavedp.training.runs import RunFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_data(parser, "real images, with a train and a test split", sizes=False, split=False)
    parser.add_argument("--run", dest="run_folder", type=Path, required=True, metavar="DIR", help="folder of a recipe")
    parser.add_argument("--also", type=Path, nargs="*", default=[], metavar="DIR", help="folders of 'wavedp finetune'")
    parser.add_argument("--num-images", type=shared.positive_int, default=20_000, help="images at every stage, at most")
    parser.add_argument("--num-seeds", type=shared.positive_int, default=1, help="classifiers trained at every stage")
    parser.add_argument("--epochs", type=shared.positive_int, default=QUICK.epochs, help="epochs of each classifier")
    parser.add_argument(
        "--steps", type=shared.positive_int, default=800, help="of fine-tuning without privacy, 256 images each"
    )
    parser.add_argument("--guidance-scale", type=float, default=1.5, help="of samples")
    shared.add_run(parser)


def run(arguments: argparse.Namespace) -> None:
    shared.prepare_device(arguments)
    folder = RunFolder(arguments.out, shared.settings(arguments), overwrite=True)
    stages = Stages(arguments)
    rows: list[dict[str, Any]] = []
    pictures: list[tuple[str, Tensor]] = []
    for name, make in stages.all().items():
        images, labels = make()
        pictures.append((name.replace(", ", "\n"), first_of_each(images, labels, len(stages.classes))))
        train, validation = divided(images, labels)
        results = run_classifiers(
            [replace(QUICK, epochs=arguments.epochs)], range(arguments.num_seeds), train, validation, stages.test,
            num_classes=len(stages.classes), folder=folder / "classifiers" / name.replace(" ", "-"), trained_on=name,
            progress=not arguments.no_progress,
        )  # fmt: skip
        for result in results:
            rows.append({"stage": name, "images": len(images), "seed": result.seed, "accuracy": result.accuracy})
            print(f"{name:40} seed {result.seed}: {100 * result.accuracy:.2f} %", flush=True)
        write_rows(folder / "results.csv", rows)
    save_grid(folder / "grid.png", pictures, column_labels=stages.classes, title="NOT private")


def first_of_each(images: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """The first image of every class, black where there is none: ``[num_classes, C, S, S]``."""
    shown = images.new_zeros((num_classes, *images.shape[1:]))
    for label in range(num_classes):
        found = (labels == label).nonzero()[:1, 0]
        shown[label : label + len(found)] = images[found]
    return shown


class Stages:
    """Labelled images of every stage: float ``[N, 1, S, S]`` in [0, 1], int64 ``[N]``."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        run: Path = arguments.run_folder
        self.tokenizer = load_tokenizer(run / "tokenizer" / "model").eval()
        self.public = load_autoregressive(run / "pretrain" / "model")
        self.skipped = self.tokenizer.layout.num_scales - self.public.config.num_scales
        self.resolver = superres.load("espcn", path=str(run / "espcn" / "espcn"), scale=None)
        self.real = self.pixels("train", self.tokenizer.layout.image_size)
        self.classes = self.real.classes
        native = self.pixels("test", IMAGE_SIZE)
        self.test = LabelledImages(native.images, native.labels)
        self.private = len(self.real) - min(HELD_OUT, len(self.real) // 12)  # what a private model may see
        self.count = min(arguments.num_images, self.private)
        self.labels = self.real.labels[: self.count]

    def pixels(self, split: Split, size: int) -> ImageDataset:
        return shared.open_data(self.arguments, image_size=size, channels=self.tokenizer.layout.channels, split=split)

    def all(self) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
        bicubic = superres.load("bicubic", scale=2**self.skipped)
        made: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
            "real": lambda: (to_unit_range(self.real.stack(range(self.count))), self.labels),
            "coarse, bicubic": lambda: (self.upscaled(self.coarse(), bicubic), self.labels),
            "coarse, super-resolved": lambda: (self.upscaled(self.coarse(), self.resolver), self.labels),
            "tokens, super-resolved": lambda: (self.upscaled(self.through_tokens(), self.resolver), self.labels),
            "public model": lambda: self.sampled(self.public),
            "fine-tuned without privacy": lambda: self.sampled(self.fine_tuned()),
        }
        for folder in self.arguments.also:
            made[f"private, {folder.parent.name}"] = partial(self.sampled, load_autoregressive(folder / "model"))
        return made

    def coarse(self) -> Tensor:
        images = to_unit_range(self.real.stack(range(self.count)))
        return coarse(images, self.skipped) * 0.5**self.skipped

    @torch.no_grad()
    def through_tokens(self) -> Tensor:
        return torch.cat([self.tokenizer.decode(self.tokenizer.encode(part)) for part in self.coarse().split(512)])

    def upscaled(self, images: Tensor, resolver: SuperResolver) -> Tensor:
        return torch.cat([resolver(part) for part in images.split(512)]).clamp(0, 1)

    def fine_tuned(self) -> AutoregressiveTransformer:
        """The public model after ordinary training on the tokens of the real training split."""
        folder = self.arguments.out / "fine-tuned"
        if not (folder / "model").is_dir():
            private = self.real.subset(range(self.private))
            training = TrainingConfig(steps=self.arguments.steps, batch_size=256, learning_rate=2e-3)
            model = load_autoregressive(self.arguments.run_folder / "pretrain" / "model")
            model.config = replace(model.config, privately_trained=True)  # so that nothing takes it for public
            progress = not self.arguments.no_progress
            fit_tokens(model, private, self.tokenizer, training, folder, progress=progress)
        return load_autoregressive(folder / "model")

    def sampled(self, model: AutoregressiveTransformer) -> tuple[Tensor, Tensor]:
        pipeline = CoarseToFinePipeline(self.tokenizer, model.eval(), self.resolver, classes=self.classes)
        generator = torch.Generator().manual_seed(0)
        output = pipeline(None, self.count, guidance_scale=self.arguments.guidance_scale, generator=generator)
        return output.images, output.labels


def divided(images: Tensor, labels: Tensor) -> tuple[LabelledImages, LabelledImages]:
    """Training and validation images at the protocol's size, 11 to 1, in an order drawn with seed 0."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    pixels = (images[order] * 255).round().to(torch.uint8)
    pixels = fit_pixels(pixels, IMAGE_SIZE, images.shape[1], fit="crop", background=0)
    cut = len(images) - len(images) // 12
    return LabelledImages(pixels[:cut], labels[order][:cut]), LabelledImages(pixels[cut:], labels[order][cut:])
