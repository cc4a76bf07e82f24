# SPDX-License-Identifier: Apache-2.0
"""Arguments that several commands share, and how to read them."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from wavedp.data import ImageDataset, open_dataset
from wavedp.data.catalog import Split
from wavedp.errors import InvalidValueError
from wavedp.extras import import_extra
from wavedp.models import TextEmbeddings
from wavedp.models.autoregressive_config import check_class_names
from wavedp.training.loop import TrainingConfig

Number = TypeVar("Number", int, float)
WITHOUT_EFFECT = frozenset(
    {"out", "no_progress", "traceback", "threads", "device", "save_every", "physical_batch_size"}
)
"""Arguments that do not decide a result."""


def bounded(
    kind: Callable[[str], Number],
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
) -> Callable[[str], Number]:
    """An argparse type: a number in a range, and an error that states the range."""
    parts = [
        *([f">= {minimum:g}"] if minimum is not None else []),
        *([f"> {above:g}"] if above is not None else []),
        *([f"<= {maximum:g}"] if maximum is not None else []),
        *([f"< {below:g}"] if below is not None else []),
    ]

    def parse(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of type {kind.__name__}") from None
        inside = (
            (minimum is None or value >= minimum)
            and (above is None or value > above)
            and (maximum is None or value <= maximum)
            and (below is None or value < below)
        )
        if not inside:
            raise argparse.ArgumentTypeError(f"{text} is out of range: must be {' and '.join(parts)}")
        return value

    return parse


def listed_classes(text: str) -> str:
    """An argparse type: class names with commas between them, kept as they were given."""
    try:
        check_class_names(class_names(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


positive_int = bounded(int, minimum=1)
seed = bounded(int, minimum=0, maximum=2**31 - 1)
positive_float = bounded(float, above=0, below=float("inf"))


def add_run(parser: argparse.ArgumentParser, *, out: bool = True) -> None:
    group = parser.add_argument_group("run")
    if out:
        group.add_argument("--out", type=Path, required=True, metavar="DIR", help="run folder to write into, or resume")
    group.add_argument("--device", default="cpu", help="torch device, such as cpu or cuda")
    group.add_argument("--threads", type=bounded(int, minimum=1, maximum=1024), metavar="N", help="CPU threads to use")
    group.add_argument("--seed", type=seed, default=0, help="seed of everything public")
    group.add_argument("--no-progress", action="store_true", help="no progress bar")
    group.add_argument("--traceback", action="store_true", help="show the Python traceback of an error")


def add_data(parser: argparse.ArgumentParser, what: str, *, sizes: bool = True, split: bool = True) -> None:
    """``sizes``, ``split``: whether the geometry and the split are asked for, or decided by the command."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        required=True,
        metavar="SOURCE",
        help=f"{what}: 'digits', 'glyphs', 'silhouettes', an image folder with class sub-folders, a folder of IDX "
        "files (.gz too), a .npz, or a .zip",
    )
    if split:
        group.add_argument(
            "--hold-out",
            type=positive_int,
            metavar="N",
            help="leave out the last N images of the split (the DPImageBench protocol: 5000)",
        )
        group.add_argument("--split", choices=("train", "test", "all"), default="train", help="which part of the data")
    group.add_argument(
        "--classes", type=listed_classes, metavar="A,B,...",
        help="class names in label order (default: as the data says)",
    )  # fmt: skip
    group.add_argument("--fit", choices=("crop", "pad"), default="crop", help="how a picture becomes square")
    group.add_argument("--skip-bad", action="store_true", help="skip and count unreadable images instead of stopping")
    group.add_argument(
        "--num-generated",
        type=positive_int,
        default=10_000,
        metavar="N",
        help="images of a drawn source (glyphs)",
    )
    if sizes:
        group.add_argument(
            "--image-size", type=positive_int, default=32, metavar="PX", help="side of the images, pixels"
        )
        group.add_argument("--channels", type=int, choices=(1, 3), default=1, help="1 grey, 3 RGB")


def open_data(
    arguments: argparse.Namespace, *, image_size: int, channels: int, split: Split | None = None
) -> ImageDataset:
    """Opens ``--data``; says how many files were skipped, if any were."""
    dataset = open_dataset(
        arguments.data,
        image_size=image_size,
        channels=channels,
        split=arguments.split if split is None else split,
        fit=arguments.fit,
        skip_bad=arguments.skip_bad,
        classes=class_names(arguments.classes),
        num_images=arguments.num_generated,
        seed=arguments.seed,
    )
    report_skipped(dataset)
    held_out = getattr(arguments, "hold_out", None)
    return dataset if held_out is None else dataset.subset(torch.arange(len(dataset) - _held_out(dataset, held_out)))


def open_held_out(arguments: argparse.Namespace, *, image_size: int, channels: int) -> ImageDataset:
    """The images that ``--hold-out`` leaves out of ``--data``."""
    whole = argparse.Namespace(**{**vars(arguments), "hold_out": None})
    dataset = open_data(whole, image_size=image_size, channels=channels)
    held_out = _held_out(dataset, arguments.hold_out)
    return dataset.subset(torch.arange(len(dataset) - held_out, len(dataset)))


def _held_out(dataset: ImageDataset, number: int) -> int:
    if number >= len(dataset):
        raise InvalidValueError(f"--hold-out {number} leaves nothing of the {len(dataset)} images of {dataset.name}")
    return number


def add_text(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--text", type=Path, metavar="FILE",
        help="text embeddings, as TextEmbeddings.save writes them: a row for each image, in the data's order",
    )  # fmt: skip


def open_text(arguments: argparse.Namespace) -> TextEmbeddings | None:
    return None if arguments.text is None else TextEmbeddings.load(arguments.text)


def report_skipped(dataset: ImageDataset) -> None:
    skipped = dataset.skipped
    if skipped:
        print(f"{dataset.name}: skipped {len(skipped)} unreadable files; the first: {skipped[0][0]}: {skipped[0][1]}")


def class_names(text: str | None) -> Sequence[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


def add_training(parser: argparse.ArgumentParser, *, steps: int, batch_size: int, learning_rate: float) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=positive_int, default=steps, help="optimizer steps")
    group.add_argument("--batch-size", type=positive_int, default=batch_size, help="images per step")
    group.add_argument(
        "--learning-rate", type=positive_float, default=learning_rate, help="peak of AdamW's cosine schedule"
    )
    group.add_argument("--weight-decay", type=bounded(float, minimum=0), default=0.01, help="AdamW's weight decay")
    group.add_argument(
        "--save-every", type=positive_int, default=500, metavar="STEPS", help="steps between checkpoints"
    )


def training_config(arguments: argparse.Namespace) -> TrainingConfig:
    return TrainingConfig(
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
        seed=arguments.seed,
        save_every=arguments.save_every,
    )


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a run folder records: every argument that decides the result, and no other."""

    def plain(value: Any) -> Any:
        return (
            [plain(item) for item in value]
            if isinstance(value, list)
            else str(value)
            if isinstance(value, Path)
            else value
        )

    return {key: plain(value) for key, value in vars(arguments).items() if key not in {"run", *WITHOUT_EFFECT}}


def prepare_device(arguments: argparse.Namespace) -> torch.device:
    """Applies ``--threads``, and refuses a device that is not there; also that pictures can be written, before the work
    that they would show."""
    import_extra("PIL", "data")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        device = torch.device(arguments.device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InvalidValueError(f"--device {arguments.device} cannot be used here: {error}") from error
    return device
