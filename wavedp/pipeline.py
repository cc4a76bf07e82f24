# SPDX-License-Identifier: Apache-2.0
"""Class labels in, images out: sample coarse tokens, decode them, super-resolve."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import SupportsIndex

import torch
from torch import Tensor

from wavedp import superres
from wavedp.errors import BadFileError, InvalidValueError, MissingFileError
from wavedp.models import (
    AutoregressiveTransformer,
    SpectralTokenizer,
    TextEmbeddings,
    check_compatible,
    load_autoregressive,
    load_tokenizer,
    save_model,
)
from wavedp.storage import read_json, write_json
from wavedp.superres import SuperResolver

INDEX_FILE = "model_index.json"


@dataclass(frozen=True)
class CoarseToFineOutput:
    """``images`` [n, C, H, W] and ``coarse`` [n, C, h, w] in [0, 1], float32; ``labels`` [n], int64."""

    images: Tensor
    coarse: Tensor
    labels: Tensor


class CoarseToFinePipeline:
    """A tokenizer, an autoregressive model over its coarse tokens, and a public super-resolution model.

    ``classes`` names the labels; by default as the model was trained, or by their numbers. Sampling reads no private
    data: everything it does is post-processing of the weights, provided that the labels asked for are public choices
    or come from a charged histogram.
    """

    def __init__(
        self,
        tokenizer: SpectralTokenizer,
        autoregressive: AutoregressiveTransformer,
        super_resolver: SuperResolver,
        *,
        classes: Sequence[str] | None = None,
    ) -> None:
        if classes is None:
            config = autoregressive.config
            classes = config.class_names or [str(label) for label in range(config.num_classes)]
        if len(classes) != autoregressive.config.num_classes:
            raise InvalidValueError(
                f"{len(classes)} class names for a model of {autoregressive.config.num_classes} classes"
            )
        check_compatible(tokenizer, autoregressive.config)
        self.tokenizer = tokenizer.eval()
        self.autoregressive = autoregressive.eval()
        self.super_resolver = super_resolver
        self.classes = tuple(classes)

    @property
    def coarse_size(self) -> int:
        """Side of the coarse images, in pixels."""
        return self.tokenizer.layout.resolution(self.autoregressive.config.num_scales)

    def to(self, device: torch.device | str) -> "CoarseToFinePipeline":
        self.tokenizer.to(device)
        self.autoregressive.to(device)
        self.super_resolver.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        class_labels: SupportsIndex | str | Sequence[SupportsIndex | str] | Tensor | None = None,
        num_images: int | None = None,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float = 1.0,
        text: TextEmbeddings | None = None,
        batch_size: int = 256,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        compiled: bool = False,
        super_resolve: bool = True,
        progress: bool = False,
    ) -> CoarseToFineOutput:
        """Makes images.

        ``class_labels``: one label or a sequence of labels, as numbers or class names; without it the classes take
        turns. ``num_images``: how many in all; one label is repeated, several labels take turns, and so do the rows of
        ``text``. ``generator`` makes the result repeatable; ``super_resolve=False`` returns the coarse images as
        ``images``. ``dtype`` and ``compiled`` are those of `AutoregressiveTransformer.generate`; a last batch that is
        smaller is then drawn as a whole one and cut.
        """
        labels = self._labels(class_labels, num_images)
        if batch_size < 1:
            raise InvalidValueError(f"batch_size must be at least 1, got {batch_size}")
        device = self.autoregressive.class_embedding.weight.device
        coarse, images = [], []
        from tqdm import tqdm

        numbers = torch.arange(len(labels))
        for batch in tqdm(numbers.split(batch_size), desc="sample", unit="batch", disable=not progress):
            # 1. coarse tokens, decoded to the coarse image
            wanted = len(batch)
            if compiled and batch_size < len(labels):  # one shape for all
                batch = torch.arange(int(batch[0]), int(batch[0]) + batch_size) % len(labels)
            words, mask = (None, None) if text is None else text.rows(batch % len(text), device)
            tokens = self.autoregressive.generate(
                labels[batch].to(device),
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                guidance_scale=guidance_scale,
                text=words,
                text_mask=mask,
                generator=generator,
                dtype=dtype,
                compiled=compiled,
            )[:wanted]
            coarse.append(self.tokenizer.decode(tokens).float())
            # 2. public super-resolution
            images.append(self.super_resolver(coarse[-1], generator=generator) if super_resolve else coarse[-1])
        return CoarseToFineOutput(torch.cat(images).cpu(), torch.cat(coarse).cpu(), labels)

    def save_pretrained(self, folder: Path | str) -> None:
        """Writes the pipeline as a folder of safetensors and JSON; no pickles."""
        folder = Path(folder)
        save_model(self.tokenizer, folder / "tokenizer")
        save_model(self.autoregressive, folder / "autoregressive")
        self.super_resolver.save_pretrained(folder / "super_resolver")
        write_json(folder / INDEX_FILE, {"pipeline": "CoarseToFinePipeline", "classes": list(self.classes)})

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        *,
        device: torch.device | str = "cpu",
        super_resolver: SuperResolver | None = None,
    ) -> "CoarseToFinePipeline":
        """Loads a folder written by `save_pretrained`. ``super_resolver`` replaces the stored one.

        Raises FileNotFoundError when the folder is not a pipeline, ValueError when a file is damaged.
        """
        folder = Path(folder)
        if not (folder / INDEX_FILE).is_file():
            raise MissingFileError(f"{folder} holds no {INDEX_FILE}; give a folder written by save_pretrained")
        index = read_json(folder / INDEX_FILE)
        if not isinstance(index, dict) or index.get("pipeline") != cls.__name__ or "classes" not in index:
            raise InvalidValueError(f"{folder / INDEX_FILE} does not describe a {cls.__name__}")
        resolver = superres.from_pretrained(folder / "super_resolver") if super_resolver is None else super_resolver
        classes = index["classes"]
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise BadFileError(f"{folder / INDEX_FILE} lists no class names but {classes!r}")
        pipeline = cls(
            load_tokenizer(folder / "tokenizer"),
            load_autoregressive(folder / "autoregressive"),
            resolver,
            classes=classes,
        )
        return pipeline.to(device)

    def _labels(
        self, class_labels: SupportsIndex | str | Sequence[SupportsIndex | str] | Tensor | None, num_images: int | None
    ) -> Tensor:
        if num_images is not None and num_images < 1:
            raise InvalidValueError(f"num_images must be at least 1, got {num_images}")
        if class_labels is None:
            wanted: list[SupportsIndex | str] = list(range(len(self.classes)))
            num_images = len(wanted) if num_images is None else num_images
        elif isinstance(class_labels, Tensor):
            wanted = class_labels.flatten().tolist()
        elif isinstance(class_labels, SupportsIndex | str):
            wanted = [class_labels]
        else:
            wanted = list(class_labels)
        if not wanted:
            raise InvalidValueError("class_labels is empty; name at least one class")
        numbers = torch.tensor([self._label(w) for w in wanted])
        if num_images is None:
            return numbers
        return numbers.repeat(-(-num_images // len(numbers)))[:num_images]

    def _label(self, label: SupportsIndex | str) -> int:
        if isinstance(label, str):
            if label in self.classes:
                return self.classes.index(label)
        elif (
            isinstance(label, SupportsIndex)
            and not isinstance(label, bool)
            and 0 <= label.__index__() < len(self.classes)
        ):
            return label.__index__()
        raise InvalidValueError(
            f"unknown class {label!r}; give a number in 0..{len(self.classes) - 1} or one of {list(self.classes)}"
        )
