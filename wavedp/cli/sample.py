# SPDX-License-Identifier: Apache-2.0
"""Samples images: coarse tokens, decoded, then super-resolved by a public model.

Writes pipeline/ (what CoarseToFinePipeline.from_pretrained takes), images/ and coarse/ (PNG in class sub-folders)
and grid.png. Labels are public choices: the classes take turns unless --labels names them; or they are drawn from the
histogram that 'wavedp finetune --label-noise' released, whose noise is part of the model's privacy statement.
"""

import argparse
from pathlib import Path

import torch

from wavedp.cli import arguments as shared
from wavedp.cli.pretrain import model_folder
from wavedp.cli.upscale import add_super_resolver, super_resolver
from wavedp.errors import InvalidValueError
from wavedp.models import check_compatible, load_autoregressive, load_tokenizer
from wavedp.pipeline import CoarseToFineOutput, CoarseToFinePipeline
from wavedp.privacy import label_probabilities, load_label_histogram
from wavedp.privacy.histogram import HISTOGRAM_FILE
from wavedp.storage import write_bytes
from wavedp.training.pictures import save_grid
from wavedp.training.results import save_images
from wavedp.training.runs import RunFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_argument_group("model: a pipeline, or its parts")
    source.add_argument("--pipeline", type=Path, metavar="DIR", help="folder written by an earlier 'wavedp sample'")
    source.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder written by 'wavedp tokenizer'")
    source.add_argument("--model", type=Path, metavar="DIR", help="folder written by 'wavedp finetune' or 'pretrain'")
    source.add_argument(
        "--classes", type=shared.listed_classes, metavar="A,B,...",
        help="names of the classes (default: as in training)",
    )  # fmt: skip
    add_super_resolver(parser, default=None)
    group = parser.add_argument_group("sampling")
    group.add_argument("--num-images", type=shared.positive_int, default=100, help="images in all")
    group.add_argument(
        "--labels",
        metavar="A,B,...",
        help="classes to sample, by name or number (default: all, in turn); or 'histogram': as often as the charged "
        "histogram says",
    )
    group.add_argument(
        "--temperature",
        type=shared.bounded(float, minimum=0),
        default=1.0,
        help="divides the logits; 0 is greedy",
    )
    group.add_argument("--top-k", type=shared.positive_int, metavar="K", help="sample among the K likeliest tokens")
    group.add_argument(
        "--top-p", type=shared.bounded(float, above=0, maximum=1), metavar="P",
        help="sample among the fewest likeliest tokens that hold this probability",
    )  # fmt: skip
    group.add_argument(
        "--guidance-scale",
        type=shared.bounded(float, minimum=-100, maximum=100),
        default=1.0,
        help="classifier-free guidance; 1 is none",
    )
    group.add_argument("--batch-size", type=shared.positive_int, default=256, help="images at once")
    shared.add_text(group)
    group.add_argument("--dtype", choices=("bfloat16",), help="weights, keys and values of the model in bfloat16")
    group.add_argument("--compile", action="store_true", help="torch.compile the step; pays off for many batches")
    shared.add_run(parser)


def run(arguments: argparse.Namespace) -> None:
    device = shared.prepare_device(arguments)
    pipeline = build_pipeline(arguments, device)
    folder = RunFolder(arguments.out, shared.settings(arguments), overwrite=True)
    output = pipeline(
        chosen_labels(arguments, pipeline.classes),
        arguments.num_images,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        text=shared.open_text(arguments),
        dtype=None if arguments.dtype is None else torch.bfloat16,
        compiled=arguments.compile,
        guidance_scale=arguments.guidance_scale,
        batch_size=arguments.batch_size,
        generator=torch.Generator(device).manual_seed(arguments.seed),
        progress=not arguments.no_progress,
    )
    pipeline.save_pretrained(folder / "pipeline")
    carry_statement(arguments, folder)
    write_output(output, pipeline.classes, folder)
    print(f"{len(output.images)} images in {folder / 'images'}; look at {folder / 'grid.png'}")


def build_pipeline(arguments: argparse.Namespace, device: torch.device) -> CoarseToFinePipeline:
    """The saved pipeline, with another super-resolver if one is named; or one made of its parts."""
    if arguments.pipeline is not None:
        if arguments.tokenizer is not None or arguments.model is not None or arguments.classes is not None:
            raise InvalidValueError("give either --pipeline, or --tokenizer, --model and --classes")
        pipeline = CoarseToFinePipeline.from_pretrained(pipeline_folder(arguments.pipeline), device=device)
        if arguments.sr is not None:
            side = pipeline.tokenizer.layout.image_size
            pipeline.super_resolver = super_resolver(arguments, pipeline.coarse_size, side, device)
        elif arguments.sr_path is not None:
            raise InvalidValueError("--sr-path needs --sr, the name of the model it is for")
        return pipeline
    if arguments.tokenizer is None or arguments.model is None:
        raise InvalidValueError("give --pipeline, or both --tokenizer and --model")
    tokenizer = load_tokenizer(model_folder(arguments.tokenizer), device)
    model = load_autoregressive(model_folder(arguments.model), device)
    check_compatible(tokenizer, model.config)
    arguments.sr = arguments.sr or "bicubic"
    coarse_size = tokenizer.layout.resolution(model.config.num_scales)
    resolver = super_resolver(arguments, coarse_size, tokenizer.layout.image_size, device)
    classes = shared.class_names(arguments.classes)
    return CoarseToFinePipeline(tokenizer, model, resolver, classes=classes).to(device)


def pipeline_folder(path: Path) -> Path:
    """A run folder stands for the pipeline inside it."""
    return path / "pipeline" if (path / "pipeline").is_dir() else path


def source_folder(arguments: argparse.Namespace) -> Path:
    """Where the model's privacy statement and label histogram are."""
    source: Path = arguments.model if arguments.pipeline is None else pipeline_folder(arguments.pipeline)
    return source


def carry_statement(arguments: argparse.Namespace, folder: RunFolder) -> None:
    """Copies the model's privacy statement and label histogram, if it has them, next to the pipeline that holds its
    weights."""
    source = source_folder(arguments)
    for name in ("privacy.json", "privacy.txt", HISTOGRAM_FILE):
        if (source / name).is_file():
            write_bytes(folder / "pipeline" / name, (source / name).read_bytes())


def chosen_labels(arguments: argparse.Namespace, classes: tuple[str, ...]) -> list[int | str] | None:
    """One label for each image, or labels to take in turn; None for all classes in turn."""
    if arguments.labels != "histogram" or "histogram" in classes:
        names = shared.class_names(arguments.labels)
        return None if names is None else [label_of(name, classes) for name in names]
    file = source_folder(arguments) / HISTOGRAM_FILE
    if not file.is_file():
        raise InvalidValueError(
            f"--labels histogram: there is no {file}; 'wavedp finetune --label-noise' releases one, in its run folder"
        )
    counts = load_label_histogram(file)
    if len(counts) != len(classes):
        raise InvalidValueError(f"{file} has {len(counts)} classes, the model {len(classes)}")
    generator = torch.Generator().manual_seed(arguments.seed)
    drawn = torch.multinomial(label_probabilities(counts), arguments.num_images, replacement=True, generator=generator)
    return [*drawn.tolist()]


def label_of(name: str, classes: tuple[str, ...]) -> int | str:
    """A class name, or else a number."""
    return int(name) if name not in classes and name.isdecimal() else name


def write_output(output: CoarseToFineOutput, classes: tuple[str, ...], folder: RunFolder) -> None:
    save_images(folder / "images", output.images, output.labels, classes)
    save_images(folder / "coarse", output.coarse, output.labels, classes)
    shown = min(10, len(output.images))
    rows = [
        (f"coarse\n{output.coarse.shape[-1]} px", output.coarse[:shown]),
        (f"super-resolved\n{output.images.shape[-1]} px", output.images[:shown]),
    ]
    save_grid(folder / "grid.png", rows, column_labels=[classes[int(label)] for label in output.labels[:shown]])
