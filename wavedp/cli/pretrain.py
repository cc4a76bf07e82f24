# SPDX-License-Identifier: Apache-2.0
"""Trains the autoregressive model on the tokens of PUBLIC images.

Writes model/, log.csv, log.png, samples.png and a checkpoint, from which the same command continues.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from wavedp.cli import arguments as shared
from wavedp.models import AutoregressiveTransformer, SpectralTokenizer, load_tokenizer
from wavedp.models.autoregressive_config import POSITIONS
from wavedp.storage import weights_digest
from wavedp.training.loop import PRECISIONS
from wavedp.training.pictures import save_grid
from wavedp.training.public import autoregressive_config, pretrain_autoregressive
from wavedp.training.results import save_log
from wavedp.training.runs import RunFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_data(parser, "public images", sizes=False)
    group = parser.add_argument_group("model")
    group.add_argument(
        "--tokenizer", type=Path, required=True, metavar="DIR", help="folder written by 'wavedp tokenizer'"
    )
    group.add_argument("--scales", type=shared.positive_int, default=1, help="how many of the coarsest scales to model")
    group.add_argument("--width", type=shared.positive_int, default=96, help="width of the transformer")
    group.add_argument("--depth", type=shared.positive_int, default=3, help="blocks")
    group.add_argument("--heads", type=shared.positive_int, default=4, help="attention heads")
    group.add_argument(
        "--position", choices=POSITIONS,
        help="a table of positions; scale + row + column; or rotations of queries and keys by these (default: learned)",
    )  # fmt: skip
    group.add_argument(
        "--per-scale-heads", action="store_const", const=True, help="an output head for each detail scale"
    )
    shared.add_text(group)
    group.add_argument(
        "--ema-decay", type=shared.bounded(float, minimum=0, below=1), metavar="X",
        help="write the exponential average of the weights with this decay, such as 0.999 (default: the last weights)",
    )  # fmt: skip
    group.add_argument("--precision", choices=PRECISIONS, help="of the forward pass; weights stay float32 (float32)")
    shared.add_training(parser, steps=1500, batch_size=128, learning_rate=2e-3)
    shared.add_run(parser)


def run(arguments: argparse.Namespace) -> None:
    device = shared.prepare_device(arguments)
    tokenizer = load_tokenizer(model_folder(arguments.tokenizer), device)
    layout = tokenizer.layout
    dataset = shared.open_data(arguments, image_size=layout.image_size, channels=layout.channels)
    text = shared.open_text(arguments)
    folder = RunFolder(arguments.out, shared.settings(arguments), reads=digests(tokenizer=arguments.tokenizer))
    config = autoregressive_config(
        tokenizer,
        classes=dataset.classes,
        num_scales=arguments.scales,
        width=arguments.width,
        depth=arguments.depth,
        heads=arguments.heads,
        text=text,
        position=arguments.position or "learned",
        per_scale_heads=bool(arguments.per_scale_heads),
    )
    training = replace(
        shared.training_config(arguments),
        ema_decay=arguments.ema_decay or 0.0,
        precision=arguments.precision or "float32",
    )
    model = pretrain_autoregressive(
        dataset, tokenizer, config, training, folder.path, text=text, device=device, progress=not arguments.no_progress
    )
    show_samples(tokenizer, model, dataset.classes, folder, seed=arguments.seed)
    save_log(folder / "log.png", folder / "log.csv", ("loss",))
    print(f"model: {folder / 'model'}; look at {folder / 'samples.png'}")


def model_folder(path: Path) -> Path:
    """A run folder stands for the model inside it."""
    return path / "model" if (path / "model" / "config.json").is_file() else path


def digests(**models: Path) -> dict[str, str]:
    """What tells the models in these folders from others in their place."""
    return {name: weights_digest(model_folder(path)) for name, path in models.items()}


@torch.no_grad()
def show_samples(
    tokenizer: SpectralTokenizer,
    model: AutoregressiveTransformer,
    classes: tuple[str, ...],
    folder: RunFolder,
    *,
    seed: int,
    rows: int = 5,
) -> None:
    """A picture: coarse samples, a column for each class."""
    shown = classes[:12]
    labels = torch.arange(len(shown)).repeat(rows).to(model.class_embedding.weight.device)
    tokens = model.generate(labels, generator=torch.Generator(labels.device).manual_seed(seed))
    images = tokenizer.decode(tokens).cpu().unflatten(0, (rows, len(shown)))
    side = images.shape[-1]
    save_grid(
        folder / "samples.png",
        [(f"sample {i + 1}", row) for i, row in enumerate(images)],
        title=f"coarse samples, {side} x {side} pixels",
        column_labels=shown,
    )
