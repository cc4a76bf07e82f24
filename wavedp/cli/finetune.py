# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes the autoregressive model on SENSITIVE images with differential privacy (DP-Adam, Poisson sampling).

Only the coarse wavelet coefficients of the images are read. Sample rate, expected batch size and the bound on
the number of records are public choices: they are given here and never computed from the data. The noise is
calibrated so that epsilon lands within 1 % below --epsilon, or given by --noise-multiplier.

The run's steps are charged in ledger.jsonl of its folder. With --ledger, several runs on the same images are charged in
one file and share its --budget: a run that would pass it is refused before it reads an image.

With --label-noise, the number of images of each class is released once, with noise that is charged as well, for
'wavedp sample --labels histogram'.

Writes model/, privacy.json, privacy.txt, ledger.jsonl, log.csv (its losses are NOT private), samples.png, a
checkpoint, and label_histogram.json if it was asked for. After Ctrl-C the same command continues and loses nothing;
after a crash, the steps since the last checkpoint are lost and stay charged, and the statement says how many.
"""

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from wavedp.cli import arguments as shared
from wavedp.cli.pretrain import digests, model_folder, show_samples
from wavedp.errors import InvalidValueError
from wavedp.models import AutoregressiveTransformer, load_autoregressive, load_tokenizer
from wavedp.privacy import PrivacyBudget, PrivacyLedger, PrivacySpec
from wavedp.privacy.ledger_budget import COMPOSITIONS
from wavedp.training.loop import SCHEDULES
from wavedp.training.private import PrivateTrainingConfig, finetune_private
from wavedp.training.results import save_log
from wavedp.training.runs import RunFolder
from wavedp.training.trainable import choose_trainable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_data(parser, "sensitive images", sizes=False)
    group = parser.add_argument_group("model")
    group.add_argument(
        "--tokenizer", type=Path, required=True, metavar="DIR", help="folder written by 'wavedp tokenizer'"
    )
    group.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder written by 'wavedp pretrain'")
    group.add_argument(
        "--new-classes", action="store_const", const=True,
        help="the images are of other classes than those the model knows: --classes, each begun as 'no class'",
    )  # fmt: skip
    group.add_argument(
        "--trainable", default=".*", metavar="WHAT",
        help="parameters to train; the others stay frozen: 'all', 'last-K-blocks', 'heads', or a regular expression "
        "that their names match from the start",
    )  # fmt: skip
    group.add_argument(
        "--lora-rank", type=shared.positive_int, metavar="R",
        help="train low-rank adapters beside frozen layers, and what --trainable names if it is not everything; the "
        "model that is written has them merged",
    )  # fmt: skip
    group.add_argument(
        "--lora-alpha", type=shared.positive_float, metavar="X", help="their factor is X / R (default: R)"
    )
    group.add_argument(
        "--lora-targets", metavar="REGEX", help="names of the layers to adapt (default: all of every block)"
    )
    shared.add_text(group)
    add_privacy(parser)
    add_ledger(parser)
    group = parser.add_argument_group("training (free of privacy cost)")
    group.add_argument("--learning-rate", type=shared.positive_float, default=1e-3, help="of Adam, at its peak")
    group.add_argument(
        "--schedule",
        choices=SCHEDULES,
        help="of the learning rate over --steps (default: constant)",
    )
    group.add_argument(
        "--warmup-steps", type=shared.bounded(int, minimum=0), metavar="STEPS",
        help="over which the learning rate rises (default: 0)",
    )  # fmt: skip
    group.add_argument(
        "--ema-decay",
        type=shared.bounded(float, minimum=0, below=1),
        default=0.95,
        help="decay of the weights' average",
    )
    group.add_argument(
        "--augmentations", type=shared.positive_int, metavar="K",
        help="versions of each image, itself among them, whose mean gradient is clipped once (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--augment-shift", type=shared.bounded(int, minimum=0), metavar="PIXELS",
        help="the other versions are moved by up to so many, each way (default: 2)",
    )  # fmt: skip
    group.add_argument("--augment-flip", action="store_true", default=None, help="and mirrored left to right at random")
    group.add_argument(
        "--physical-batch-size",
        type=shared.positive_int,
        default=256,
        help="images at once, every version counted; bounds memory only",
    )
    group.add_argument(
        "--save-every",
        type=shared.positive_int,
        default=50,
        metavar="STEPS",
        help="steps between checkpoints",
    )
    shared.add_run(parser)


def add_privacy(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("privacy (public constants)")
    noise = group.add_mutually_exclusive_group(required=True)
    noise.add_argument("--epsilon", type=shared.positive_float, help="target epsilon; the noise is calibrated to it")
    noise.add_argument("--noise-multiplier", type=shared.positive_float, help="noise standard deviation / sensitivity")
    group.add_argument(
        "--delta", type=shared.bounded(float, above=0, below=1), required=True, help="below 1 / --max-records"
    )
    group.add_argument(
        "--max-records",
        type=shared.positive_int,
        required=True,
        metavar="N",
        help="public upper bound on the images",
    )
    group.add_argument(
        "--sample-rate", type=shared.bounded(float, above=0, maximum=1), required=True,
        help="probability of each image to join each batch",
    )  # fmt: skip
    group.add_argument("--steps", type=shared.positive_int, required=True, help="optimizer steps; each is charged")
    group.add_argument(
        "--expected-batch-size", type=shared.positive_float, required=True, metavar="IMAGES",
        help="what the noisy sum is divided by, such as sample rate * expected number of images",
    )  # fmt: skip
    group.add_argument(
        "--max-grad-norm", type=shared.positive_float, default=1.0, help="clip of one image's gradient, l2"
    )
    group.add_argument(
        "--label-noise", type=shared.positive_float, metavar="X",
        help="release a label histogram with noise of this deviation on every count (default: none)",
    )  # fmt: skip
    group.add_argument(
        "--truncated-batch-size", type=shared.positive_int, metavar="IMAGES",
        help="images at most in a batch, a random choice of those drawn; well above sample rate * --max-records",
    )  # fmt: skip
    group.add_argument(
        "--noise-mode", choices=("standard", "strict"),
        help="strict: noise in integers whose rounding and law are charged (default: standard)",
    )  # fmt: skip


def add_ledger(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("one budget for all runs on these images (public constants)")
    group.add_argument("--ledger", type=Path, metavar="FILE", help="ledger that runs share (default: one of this run)")
    group.add_argument(
        "--budget", type=shared.positive_float, nargs=2, metavar=("EPSILON", "DELTA"),
        help="what all its runs may spend together; needed where FILE is new",
    )  # fmt: skip
    group.add_argument(
        "--composition", choices=COMPOSITIONS,
        help="of a new FILE. adaptive: the runs' costs are added up; joint: they are composed as one mechanism, which "
        "is less, and valid only if no run's settings were chosen by what earlier runs released (default: adaptive)",
    )  # fmt: skip
    group.add_argument("--run-name", metavar="NAME", help="name of this run in FILE (default: path of its folder)")


def open_ledger(arguments: argparse.Namespace, spec: PrivacySpec) -> PrivacyLedger | None:
    """The shared ledger, None where the run has one of its own."""
    if arguments.ledger is None:
        if arguments.budget or arguments.composition or arguments.run_name:
            raise InvalidValueError(
                "--budget, --composition and --run-name are about a shared ledger: give --ledger FILE"
            )
        return None
    budget = None
    if arguments.budget:
        epsilon, delta = arguments.budget
        composition = arguments.composition or "adaptive"
        budget = PrivacyBudget(epsilon=epsilon, delta=delta, composition=composition, unit=spec.unit)
    elif arguments.composition:
        raise InvalidValueError("--composition is chosen with --budget, when the ledger is made")
    name = arguments.run_name or str(arguments.out.resolve())
    return PrivacyLedger(arguments.ledger, spec, budget=budget, run=name)


def privacy_spec(arguments: argparse.Namespace, trainable_parameters: int | None = None) -> PrivacySpec:
    constants: dict[str, Any] = {
        "sample_rate": arguments.sample_rate,
        "steps": arguments.steps,
        "max_grad_norm": arguments.max_grad_norm,
        "expected_batch_size": arguments.expected_batch_size,
        "delta": arguments.delta,
        "dataset_size_bound": arguments.max_records,
        "label_noise_multiplier": arguments.label_noise,
        "truncated_batch_size": arguments.truncated_batch_size,
        "noise_mode": arguments.noise_mode or "standard",
        "trainable_parameters": trainable_parameters,
    }
    if arguments.epsilon is None:
        return PrivacySpec(noise_multiplier=arguments.noise_multiplier, **constants)
    return PrivacySpec.for_target_epsilon(arguments.epsilon, **constants)


def check_options(arguments: argparse.Namespace) -> None:
    """Raises for constants of the mechanism, classes and settings of versions that `run` would refuse; an epsilon that
    no noise reaches takes a search, and is left to it."""
    augmentation(arguments)
    new_classes(arguments)
    noise = arguments.noise_multiplier or 1.0
    trainable = 1 if arguments.noise_mode == "strict" else None
    privacy_spec(argparse.Namespace(**{**vars(arguments), "epsilon": None, "noise_multiplier": noise}), trainable)


def lora(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("lora_rank", "lora_alpha", "lora_targets")}


def augmentation(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was given of the versions of an image; the seed is that of everything public."""
    given = {
        "augmentations": arguments.augmentations,
        "augmentation_shift": arguments.augment_shift,
        "augmentation_flip": arguments.augment_flip,
        "augmentation_seed": arguments.seed,
    }
    if (arguments.augmentations or 1) == 1 and (arguments.augment_shift is not None or arguments.augment_flip):
        raise InvalidValueError(
            "--augment-shift and --augment-flip are about versions beyond the image itself: give --augmentations 2 or "
            "more"
        )
    return {name: value for name, value in given.items() if value is not None}


def new_classes(arguments: argparse.Namespace) -> Sequence[str] | None:
    """The names that replace the model's, None where it keeps its own. They are public: they are not read from data."""
    if not arguments.new_classes:
        return None
    names = shared.class_names(arguments.classes)
    if names is None:
        raise InvalidValueError("--new-classes: name them by --classes A,B,..., in label order")
    return names


def public_model(arguments: argparse.Namespace, device: torch.device) -> AutoregressiveTransformer:
    model = load_autoregressive(model_folder(arguments.model), device)
    names = new_classes(arguments)
    if names is None:
        return model
    chosen = model.with_classes(names)
    choose_trainable(chosen, arguments.trainable, **lora(arguments))
    if not chosen.class_embedding.weight.requires_grad:
        raise InvalidValueError(
            "--new-classes begins every class as 'no class', and --trainable leaves the class embedding as it is: the "
            "classes would stay alike; let --trainable match class_embedding too"
        )
    return model.with_classes(names)


def run(arguments: argparse.Namespace) -> None:
    device = shared.prepare_device(arguments)
    spec = None if arguments.noise_mode == "strict" else privacy_spec(arguments)
    tokenizer = load_tokenizer(model_folder(arguments.tokenizer), device)
    model = public_model(arguments, device)
    if spec is None:  # what rounding costs depends on the model
        spec = privacy_spec(arguments, choose_trainable(model, arguments.trainable, **lora(arguments)))
    config = PrivateTrainingConfig(
        learning_rate=arguments.learning_rate,
        schedule=arguments.schedule or "constant",
        warmup_steps=arguments.warmup_steps or 0,
        ema_decay=arguments.ema_decay,
        trainable=arguments.trainable,
        **lora(arguments),
        **augmentation(arguments),
        physical_batch_size=arguments.physical_batch_size,
        save_every=arguments.save_every,
    )
    layout = tokenizer.layout
    config.check_image_size(layout.image_size)
    # The ledger comes first: a run without a budget reads no image and leaves no folder.
    with open_ledger(arguments, spec) or contextlib.nullcontext() as ledger:
        dataset = shared.open_data(arguments, image_size=layout.image_size, channels=layout.channels)
        reads = digests(tokenizer=arguments.tokenizer, model=arguments.model)
        folder = RunFolder(arguments.out, shared.settings(arguments), reads=reads)
        statement = finetune_private(
            dataset, tokenizer, model, spec, config, folder.path, text=shared.open_text(arguments), ledger=ledger,
            progress=not arguments.no_progress,
        )  # fmt: skip
    show_samples(tokenizer, model, dataset.classes, folder, seed=arguments.seed)
    save_log(
        folder / "log.png", folder / "log.csv", ("loss_not_private",), title="loss on sensitive images: NOT private"
    )
    print(statement.to_text())
    print(f"\nmodel: {folder / 'model'}; look at {folder / 'samples.png'}")
