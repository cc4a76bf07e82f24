# SPDX-License-Identifier: Apache-2.0
"""What each stage of the method allows on a data set, by one classifier protocol. NOT private: for public test sets.

  python benchmarks/ceilings.py --run runs/fashion-eps10 --data FOLDER --classes A,B,... --out runs/ceilings

The same number of images at every stage: real ones; reduced to the coarse scales and made large again, by bicubic
interpolation and by the run's super-resolution network; the same through its tokenizer; sampled from its public model,
and from that model after fine-tuning on the real tokens without clipping and noise; and sampled from the private models
of --also. `--quick`'s classifier of `wavedp evaluate --protocol dpimagebench`. Writes results.csv; repeated after an
interruption, it goes on.
"""

import argparse
import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from wavedp import superres
from wavedp.cli.evaluate_dpimagebench import IMAGE_SIZE
from wavedp.data import ImageDataset, open_dataset, to_unit_range
from wavedp.data.catalog import Split
from wavedp.data.resize import fit_pixels
from wavedp.evaluation import QUICK, LabelledImages, run_classifiers
from wavedp.evaluation.protocol import HELD_OUT
from wavedp.functional import coarse
from wavedp.models import AutoregressiveTransformer, load_autoregressive, load_tokenizer
from wavedp.pipeline import CoarseToFinePipeline
from wavedp.superres import SuperResolver
from wavedp.training.loop import TrainingConfig
from wavedp.training.public import fit_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a recipe: tokenizer, pretrain and espcn")
    parser.add_argument("--also", type=Path, nargs="*", default=[], help="folders of 'wavedp finetune'")
    parser.add_argument("--data", required=True)
    parser.add_argument("--classes", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num-images", type=int, default=20_000)
    parser.add_argument("--num-seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=800, help="of fine-tuning without privacy")
    parser.add_argument("--guidance-scale", type=float, default=1.5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    stages = Stages(arguments)
    rows = []
    for name, make in stages.all().items():
        images, labels = make()
        train, validation = divided(images, labels)
        results = run_classifiers(
            [QUICK], range(arguments.num_seeds), train, validation, stages.test, num_classes=len(stages.classes),
            folder=arguments.out / "classifiers" / name.replace(" ", "-"), trained_on=name,
        )  # fmt: skip
        for result in results:
            rows.append({"stage": name, "images": len(images), "seed": result.seed, "accuracy": result.accuracy})
            print(f"{name:40} seed {result.seed}: {100 * result.accuracy:.2f} %", flush=True)
        with (arguments.out / "results.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


class Stages:
    """Labelled images of every stage: float ``[N, 1, S, S]`` in [0, 1], int64 ``[N]``."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.classes = tuple(arguments.classes.split(","))
        run: Path = arguments.run
        self.tokenizer = load_tokenizer(run / "tokenizer" / "model").eval()
        self.public = load_autoregressive(run / "pretrain" / "model")
        self.skipped = self.tokenizer.layout.num_scales - self.public.config.num_scales
        self.resolver = superres.load("espcn", path=str(run / "espcn" / "espcn"), scale=None)
        self.real = self.pixels("train", self.tokenizer.layout.image_size)
        native = self.pixels("test", IMAGE_SIZE)
        self.test = LabelledImages(native.images, native.labels)
        self.private = len(self.real) - min(HELD_OUT, len(self.real) // 12)  # what a private model may see
        self.count = min(arguments.num_images, self.private)
        self.labels = self.real.labels[: self.count]

    def pixels(self, split: Split, size: int) -> ImageDataset:
        return open_dataset(self.arguments.data, image_size=size, split=split, classes=self.classes)

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
            model = load_autoregressive(self.arguments.run / "pretrain" / "model")
            fit_tokens(model, private, self.tokenizer, training, folder)
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


if __name__ == "__main__":
    main()
