# SPDX-License-Identifier: Apache-2.0
"""Trains the package's own small super-resolution network on PUBLIC images.

Writes espcn/ (what --sr-path takes), log.csv, log.png, comparison.png and a checkpoint, from which the same command
continues.
"""

import argparse

import torch

from wavedp.cli import arguments as shared
from wavedp.data import ImageDataset, to_unit_range
from wavedp.superres import Bicubic, EspcnConfig, SuperResolver
from wavedp.training.pictures import save_grid
from wavedp.training.results import save_log
from wavedp.training.runs import RunFolder
from wavedp.training.superres import degrade, train_espcn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_data(parser, "public images at full resolution")
    group = parser.add_argument_group("model")
    group.add_argument("--scale", type=int, choices=(2, 3, 4, 8), default=4, help="enlargement factor")
    group.add_argument("--width", type=shared.positive_int, default=32, help="channels of the hidden layers")
    group.add_argument(
        "--degradation",
        choices=("haar", "bicubic"),
        default="haar",
        help="how low-resolution inputs are made; haar is what the private stage reads",
    )
    group.add_argument(
        "--input-noise",
        type=shared.bounded(float, minimum=0, maximum=1),
        default=0.05,
        metavar="STD",
        help="largest noise added to inputs in training, of the range [0, 1]; sampled coarse images are not perfect",
    )
    shared.add_training(parser, steps=600, batch_size=32, learning_rate=2e-3)
    shared.add_run(parser)


def run(arguments: argparse.Namespace) -> None:
    device = shared.prepare_device(arguments)
    dataset = shared.open_data(arguments, image_size=arguments.image_size, channels=arguments.channels)
    folder = RunFolder(arguments.out, shared.settings(arguments))
    resolver, _ = train_espcn(
        dataset,
        scale=arguments.scale,
        config=EspcnConfig(scale=arguments.scale, channels=arguments.channels, width=arguments.width),
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        lr=arguments.learning_rate,
        seed=arguments.seed,
        out_dir=folder.path,
        degradation=arguments.degradation,
        input_noise_std=arguments.input_noise,
        device=device,
        progress=not arguments.no_progress,
        save_every=arguments.save_every,
    )
    show_comparison(resolver, dataset, folder, arguments.degradation)
    save_log(folder / "log.png", folder / "log.csv", ("loss",))
    print(f"espcn: {folder / 'espcn'}; look at {folder / 'comparison.png'}")


@torch.no_grad()
def show_comparison(resolver: SuperResolver, dataset: ImageDataset, folder: RunFolder, degradation: str) -> None:
    """A picture: full resolution, its reduction, bicubic and learned enlargement."""
    images = to_unit_range(dataset.stack(torch.arange(min(10, len(dataset)))))
    low = degrade(images, resolver.scale, degradation).clamp(0, 1)
    rows = [
        ("image", images),
        (f"reduced\n{low.shape[-1]} px", low),
        ("bicubic", Bicubic(scale=resolver.scale)(low)),
        ("espcn", resolver(low).cpu()),
    ]
    save_grid(folder / "comparison.png", rows, title=f"espcn x{resolver.scale}")
