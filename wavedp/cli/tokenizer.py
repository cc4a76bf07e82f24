# SPDX-License-Identifier: Apache-2.0
"""Trains a spectral image tokenizer on PUBLIC images.

Writes model/ (config.json, model.safetensors), log.csv, log.png, reconstructions.png and a checkpoint, from
which the same command continues.
"""

import argparse
from dataclasses import fields, replace
from typing import Any

import torch

from wavedp.cli import arguments as shared
from wavedp.data import ImageDataset, to_unit_range
from wavedp.models import SpectralTokenizer, SpectralTokenizerConfig
from wavedp.models.perceptual import load_perceptual
from wavedp.models.tokenizer_config import CAUSAL_SIDES, PRESETS, QUANTIZERS
from wavedp.training.loop import PRECISIONS
from wavedp.training.pictures import save_grid
from wavedp.training.public import train_tokenizer
from wavedp.training.reconstruction import reconstruction_quality
from wavedp.training.results import save_log
from wavedp.training.runs import RunFolder
from wavedp.training.tokenizer_losses import ADVERSARIES, TokenizerLossConfig

OWN_SIZES = SpectralTokenizerConfig(
    width=64, encoder_depth=2, decoder_depth=2, mlp_ratio=2.0, approximation_codes=128, detail_codes=128
)
"""The sizes without --preset."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_data(parser, "public images")
    parser.set_defaults(image_size=None, channels=None)  # the preset's, or 32 and 1
    group = parser.add_argument_group("model", "sizes that are given replace the preset's")
    group.add_argument("--preset", choices=tuple(PRESETS), help="named sizes, and losses where they belong to them")
    for flag, text in {
        "--levels": "Haar levels; scales are levels + 1",
        "--grid": "tokens a side; every scale has grid^2 tokens",
        "--width": "width of the encoder, and of the decoder without --decoder-width",
        "--encoder-depth": "blocks of the encoder",
        "--decoder-depth": "blocks of the decoder",
        "--heads": "attention heads of the encoder, and of the decoder without --decoder-heads",
        "--decoder-width": "width of the decoder",
        "--decoder-heads": "attention heads of the decoder",
        "--approximation-codes": "codes for the coarse scale",
        "--detail-codes": "codes for the details",
        "--code-dim": "dimension of a code",
    }.items():
        group.add_argument(flag, type=shared.positive_int, help=_with_default(flag, text))
    group.add_argument("--mlp-ratio", type=shared.positive_float, help=_with_default("--mlp-ratio", "MLP / width"))
    group.add_argument(
        "--causal", choices=CAUSAL_SIDES, help=_with_default("--causal", "the scale-causal mask's sides")
    )
    group.add_argument("--quantizer", choices=QUANTIZERS, help=_with_default("--quantizer", "learned codes or a grid"))
    for part in ("approximation", "detail"):
        group.add_argument(
            f"--{part}-levels", type=_levels, metavar="A,B,...", help=f"fsq: values per dimension, {part} (8,6,5)"
        )
    group = parser.add_argument_group("losses", "beside L2 and commitment; off, but for the presets sit-*")
    weight = shared.bounded(float, minimum=0, below=float("inf"))
    group.add_argument(
        "--perceptual-weight", type=weight, help="of the distance in VGG-16's features; the paper's: 0.1"
    )
    group.add_argument("--perceptual-network", metavar="FILE", help="VGG-16 as safetensors, or hub:OWNER/NAME")
    group.add_argument("--adversarial-weight", type=weight, help="of a patch discriminator; the paper's: 0.1")
    group.add_argument("--adversarial-start", type=shared.bounded(int, minimum=0), help="step at which it begins (0)")
    group.add_argument("--adversary", choices=ADVERSARIES, help="how the discriminator is judged (hinge)")
    group.add_argument("--multiscale-weight", type=weight, help="of the L2 at the resolution of every prefix of scales")
    shared.add_training(parser, steps=1000, batch_size=64, learning_rate=3e-3)
    parser.add_argument("--precision", choices=PRECISIONS, help="of the forward pass; weights stay float32 (float32)")
    shared.add_run(parser)


def run(arguments: argparse.Namespace) -> None:
    device = shared.prepare_device(arguments)
    config = sizes(arguments)
    for name, value in config.to_dict().items():  # recorded as they are, not as they were asked for
        if hasattr(arguments, name) and (name != "causal" or value != "both"):
            setattr(arguments, name, value)
    losses = loss_weights(arguments)
    perceptual = None
    if losses.perceptual and arguments.perceptual_network is None:
        print(f"perceptual loss: off; it has the weight {losses.perceptual:g}, and no --perceptual-network is given")
        losses, arguments.perceptual_network = replace(losses, perceptual=0.0), "off"
    elif losses.perceptual:
        perceptual = load_perceptual(arguments.perceptual_network, device)
    dataset = shared.open_data(arguments, image_size=config.image_size, channels=config.channels)
    folder = RunFolder(arguments.out, shared.settings(arguments))
    model = train_tokenizer(
        dataset,
        config,
        replace(shared.training_config(arguments), precision=arguments.precision or "float32"),
        folder.path,
        loss=losses,
        perceptual=perceptual,
        device=device,
        progress=not arguments.no_progress,
    )
    show_reconstructions(model, dataset, folder)
    save_log(folder / "log.png", folder / "log.csv", ("reconstruction",))
    for side, psnr in reconstruction_quality(model, dataset, limit=1000).items():
        print(f"reconstruction at {side} px: {psnr:.2f} dB, of images it was trained on")
    print(f"tokenizer: {folder / 'model'}; look at {folder / 'reconstructions.png'}")


def sizes(arguments: argparse.Namespace) -> SpectralTokenizerConfig:
    """The preset's sizes, or the command's own, with those that were given in their place."""
    base = OWN_SIZES if arguments.preset is None else PRESETS[arguments.preset]
    asked = {field.name: getattr(arguments, field.name, None) for field in fields(base)}
    return replace(base, **{name: value for name, value in asked.items() if value is not None})


def loss_weights(arguments: argparse.Namespace) -> TokenizerLossConfig:
    """The preset's weights, with those that were given in their place."""
    asked: dict[str, Any] = {
        "perceptual": arguments.perceptual_weight,
        "adversarial": arguments.adversarial_weight,
        "multiscale": arguments.multiscale_weight,
        "adversary": arguments.adversary,
        "adversarial_start": arguments.adversarial_start,
    }
    base = TokenizerLossConfig.for_preset(arguments.preset)
    return replace(base, **{name: value for name, value in asked.items() if value is not None})


def _levels(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of integers such as 8,6,5") from None


def _with_default(flag: str, text: str) -> str:
    value = getattr(OWN_SIZES, flag[2:].replace("-", "_"))
    return text if value is None else f"{text} ({value})"


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
