# SPDX-License-Identifier: Apache-2.0
"""Trains a spectral image tokenizer on PUBLIC images.

Writes model/ (config.json, model.safetensors), log.csv, log.png, reconstructions.png and a checkpoint, from
which the same command continues.
"""

import argparse

import torch

from wavedp.cli import arguments as shared
from wavedp.data import ImageDataset, to_unit_range
from wavedp.models import SpectralTokenizer, SpectralTokenizerConfig
from wavedp.training.pictures import save_grid
from wavedp.training.public import train_tokenizer
from wavedp.training.results import save_log
from wavedp.training.runs import RunFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_data(parser, "public images")
    group = parser.add_argument_group("model")
    group.add_argument("--levels", type=shared.positive_int, default=2, help="Haar levels; scales are levels + 1")
    group.add_argument(
        "--grid", type=shared.positive_int, default=4, help="tokens a side; every scale has grid^2 tokens"
    )
    group.add_argument("--width", type=shared.positive_int, default=64, help="width of the transformers")
    group.add_argument("--encoder-depth", type=shared.positive_int, default=2, help="blocks of the encoder")
    group.add_argument("--decoder-depth", type=shared.positive_int, default=2, help="blocks of the decoder")
    group.add_argument("--heads", type=shared.positive_int, default=4, help="attention heads")
    group.add_argument("--mlp-ratio", type=shared.positive_float, default=2.0, help="hidden width of an MLP / width")
    group.add_argument(
        "--approximation-codes", type=shared.positive_int, default=128, help="codes for the coarse scale"
    )
    group.add_argument("--detail-codes", type=shared.positive_int, default=128, help="codes for the details")
    group.add_argument("--code-dim", type=shared.positive_int, default=8, help="dimension of a code")
    shared.add_training(parser, steps=1000, batch_size=64, learning_rate=3e-3)
    shared.add_run(parser)


def run(arguments: argparse.Namespace) -> None:
    device = shared.prepare_device(arguments)
    config = SpectralTokenizerConfig(
        image_size=arguments.image_size,
        channels=arguments.channels,
        levels=arguments.levels,
        grid=arguments.grid,
        width=arguments.width,
        encoder_depth=arguments.encoder_depth,
        decoder_depth=arguments.decoder_depth,
        heads=arguments.heads,
        mlp_ratio=arguments.mlp_ratio,
        approximation_codes=arguments.approximation_codes,
        detail_codes=arguments.detail_codes,
        code_dim=arguments.code_dim,
    )
    dataset = shared.open_data(arguments, image_size=config.image_size, channels=config.channels)
    folder = RunFolder(arguments.out, shared.settings(arguments))
    training = shared.training_config(arguments)
    model = train_tokenizer(dataset, config, training, folder.path, device=device, progress=not arguments.no_progress)
    show_reconstructions(model, dataset, folder)
    save_log(folder / "log.png", folder / "log.csv", ("reconstruction",))
    print(f"tokenizer: {folder / 'model'}; look at {folder / 'reconstructions.png'}")


@torch.no_grad()
def show_reconstructions(model: SpectralTokenizer, dataset: ImageDataset, folder: RunFolder) -> None:
    """A picture: images, and what every prefix of the scales decodes to."""
    images = to_unit_range(dataset.stack(torch.arange(min(10, len(dataset)))))
    tokens = model.encode(images.to(model.coefficient_mean.device))
    rows = [("image", images)]
    for k in range(1, model.layout.num_scales + 1):
        decoded = model.decode(tokens[:, : k * model.layout.tokens_per_scale]).cpu()
        rows.append((f"{k} of {model.layout.num_scales} scales\n{decoded.shape[-1]} px", decoded))
    save_grid(folder / "reconstructions.png", rows, title="tokenizer: image and partial decodings")
