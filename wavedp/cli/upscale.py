# SPDX-License-Identifier: Apache-2.0
"""Super-resolves a folder of images with a public model.

Writes images/ (PNG, class sub-folders kept) and grid.png. Models are chosen by name; 'espcn' needs --sr-path, the
others take a hub id or a local folder there and have a default.
"""

import argparse
from pathlib import Path

import torch

from wavedp import superres
from wavedp.cli import arguments as shared
from wavedp.data import open_dataset, to_unit_range
from wavedp.superres import SuperResolver
from wavedp.training.pictures import save_grid
from wavedp.training.results import save_images
from wavedp.training.runs import RunFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images", type=Path, required=True, metavar="DIR", help="folder of images, or of class folders"
    )
    parser.add_argument("--from-size", type=shared.positive_int, required=True, metavar="PX", help="side of the inputs")
    parser.add_argument("--to-size", type=shared.positive_int, required=True, metavar="PX", help="side of the outputs")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3, help="1 grey, 3 RGB")
    parser.add_argument("--fit", choices=("crop", "pad"), default="crop", help="how a picture becomes square")
    parser.add_argument("--skip-bad", action="store_true", help="skip and count unreadable images instead of stopping")
    parser.add_argument("--batch-size", type=shared.positive_int, default=16, help="images per call of the model")
    add_super_resolver(parser, default="bicubic")
    shared.add_run(parser)


def add_super_resolver(parser: argparse.ArgumentParser, *, default: str | None) -> None:
    group = parser.add_argument_group("super-resolution")
    names = ", ".join(superres.available())
    group.add_argument(
        "--sr",
        default=default,
        metavar="NAME",
        help=f"one of {names}; chains as A+B" + ("" if default else "; bicubic, or what the pipeline has"),
    )
    group.add_argument("--sr-path", metavar="PATH", help="weights: a local folder or a hub id")


def super_resolver(arguments: argparse.Namespace, from_size: int, to_size: int, device: torch.device) -> SuperResolver:
    """A run folder of 'wavedp espcn' stands for the network inside it."""
    options = {}
    if arguments.sr_path is not None:
        inside = Path(arguments.sr_path) / "espcn"
        options["path"] = str(inside) if arguments.sr == "espcn" and inside.is_dir() else arguments.sr_path
    return superres.to_size(arguments.sr, from_size, to_size, device=device, **options)


def run(arguments: argparse.Namespace) -> None:
    device = shared.prepare_device(arguments)
    dataset = open_dataset(
        arguments.images,
        image_size=arguments.from_size,
        channels=arguments.channels,
        split="all",
        fit=arguments.fit,
        skip_bad=arguments.skip_bad,
    )
    shared.report_skipped(dataset)
    resolver = super_resolver(arguments, arguments.from_size, arguments.to_size, device)
    folder = RunFolder(arguments.out, shared.settings(arguments), overwrite=True)
    from tqdm import tqdm

    outputs = []
    batches = torch.arange(len(dataset)).split(arguments.batch_size)
    generator = torch.Generator(device).manual_seed(arguments.seed)
    for indices in tqdm(batches, desc="upscale", unit="batch", disable=arguments.no_progress):
        low = to_unit_range(dataset.stack(indices)).to(device)
        outputs.append(resolver(low, generator=generator).cpu())
    images = torch.cat(outputs)
    save_images(folder / "images", images, dataset.labels, dataset.classes)
    shown = min(10, len(images))
    low = to_unit_range(dataset.stack(torch.arange(shown)))
    save_grid(
        folder / "grid.png",
        [
            (f"input\n{arguments.from_size} px", low),
            (f"{arguments.sr}\n{arguments.to_size} px", images[:shown]),
        ],
        cell=min(256, max(64, arguments.to_size)),
    )
    print(f"{len(images)} images in {folder / 'images'}; look at {folder / 'grid.png'}")
