# SPDX-License-Identifier: Apache-2.0
"""The public stage: train the tokenizer, then the autoregressive model on its tokens. Public images only."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wavedp.data import ImageDataset, to_unit_range
from wavedp.errors import InvalidValueError
from wavedp.functional import coarse
from wavedp.models import (
    AutoregressiveConfig,
    AutoregressiveTransformer,
    SpectralTokenizer,
    SpectralTokenizerConfig,
    TextEmbeddings,
    check_compatible,
)
from wavedp.models import save_model as save
from wavedp.models.discriminator import PatchDiscriminator
from wavedp.models.perceptual import PerceptualDistance
from wavedp.training.loop import Losses, Opponent, TrainingConfig, fit
from wavedp.training.tokenizer_losses import Adversary, TokenizerLossConfig, tokenizer_losses


def train_tokenizer(
    dataset: ImageDataset,
    config: SpectralTokenizerConfig,
    training: TrainingConfig,
    folder: Path,
    *,
    loss: TokenizerLossConfig | None = None,
    perceptual: PerceptualDistance | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> SpectralTokenizer:
    """Trains a spectral tokenizer on public images and writes it to ``folder``/model.

    The normalisation constants come from up to 2,000 of these images. Only the full resolution is decoded: with
    scale-causal masks a prefix of the scales decodes to the same coefficients as the whole.

    ``loss``: weights of the losses beside L2 and commitment, all off by default. A perceptual weight without
    ``perceptual``, the network, warns and leaves that loss off. The discriminator is in the checkpoint only.
    """
    _need_images(dataset, "the tokenizer")
    weights = loss or TokenizerLossConfig()
    if weights.perceptual and perceptual is None:
        warnings.warn(
            f"the perceptual loss is off: it has the weight {weights.perceptual:g} and no network was given",
            RuntimeWarning,
            stacklevel=2,
        )
    torch.manual_seed(training.seed)
    model = SpectralTokenizer(config).to(device)
    sample = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(training.seed))[:2000]
    model.fit_normalisation(to_unit_range(dataset.stack(sample)).to(device))
    adversary = None
    if weights.adversarial:
        torch.manual_seed(training.seed)  # the discriminator's weights, whatever was drawn for the tokenizer's
        adversary = Adversary(
            PatchDiscriminator(config.channels, config.image_size, weights.discriminator_width).to(device), weights
        )

    def losses(generator: torch.Generator) -> Losses:
        picks = torch.randint(len(dataset), (training.batch_size,), generator=generator)
        images = to_unit_range(dataset.stack(picks)).to(device)
        return tokenizer_losses(model, images, weights, perceptual, adversary)

    fit_and_save(model, losses, training, folder, title="tokenizer", progress=progress, opponent=adversary)
    return model


def autoregressive_config(
    tokenizer: SpectralTokenizer,
    *,
    classes: tuple[str, ...],
    num_scales: int,
    width: int,
    depth: int,
    heads: int,
    text: TextEmbeddings | None = None,
    **others: Any,
) -> AutoregressiveConfig:
    """Sizes that fit a tokenizer's codebooks and grid, and the text; ``others`` are fields of the configuration."""
    if text is not None:
        others |= {"text_length": text.embeddings.shape[1], "text_width": text.embeddings.shape[2]}
    return AutoregressiveConfig(
        num_classes=len(classes),
        tokens_per_scale=tokenizer.layout.tokens_per_scale,
        num_scales=num_scales,
        approximation_codes=tokenizer.config.approximation_codes,
        detail_codes=tokenizer.config.detail_codes,
        width=width,
        depth=depth,
        heads=heads,
        class_names=classes,
        tokenizer_fingerprint=tokenizer.fingerprint(),
        **others,
    )


@torch.no_grad()
def tokenize(tokenizer: SpectralTokenizer, dataset: ImageDataset, num_scales: int, *, batch_size: int = 256) -> Tensor:
    """Tokens [N, num_scales * tokens_per_scale] of every image, read from its coarse image alone.

    The image is reduced to the ``num_scales`` coarsest scales before the tokenizer sees it; each record's tokens depend
    on that record only.
    """
    if tokenizer.training:
        raise InvalidValueError(
            "the tokenizer is in training mode, where encoding changes its codebook; call .eval() first"
        )
    layout = tokenizer.layout
    skipped = layout.num_scales - num_scales  # levels whose details are never computed
    device = tokenizer.coefficient_mean.device
    tokens = []
    for indices in torch.arange(len(dataset)).split(batch_size):
        images = to_unit_range(dataset.stack(indices)).to(device)
        if skipped:
            images = coarse(images, skipped) * 0.5**skipped
        tokens.append(tokenizer.encode(images).cpu())
    return torch.cat(tokens) if tokens else torch.empty(0, num_scales * layout.tokens_per_scale, dtype=torch.int64)


def pretrain_autoregressive(
    dataset: ImageDataset,
    tokenizer: SpectralTokenizer,
    config: AutoregressiveConfig,
    training: TrainingConfig,
    folder: Path,
    *,
    text: TextEmbeddings | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> AutoregressiveTransformer:
    """Trains the autoregressive model on the tokens of public images and writes it to ``folder``/model.

    ``text`` has a row for each image, where the model takes text.
    """
    torch.manual_seed(training.seed)
    model = AutoregressiveTransformer(config).to(device)
    fit_tokens(model, dataset, tokenizer, training, folder, text=text, progress=progress)
    return model


def fit_tokens(
    model: AutoregressiveTransformer,
    dataset: ImageDataset,
    tokenizer: SpectralTokenizer,
    training: TrainingConfig,
    folder: Path,
    *,
    text: TextEmbeddings | None = None,
    progress: bool = True,
) -> None:
    """Trains ``model`` in place, without privacy, on the tokens of ``dataset``; otherwise `pretrain_autoregressive`."""
    _need_images(dataset, "the autoregressive model")
    check_compatible(tokenizer, model.config)
    check_text(model, text, len(dataset), dataset.name)
    tokens = tokenize(tokenizer, dataset, model.config.num_scales)
    labels = dataset.labels
    device = model.class_embedding.weight.device

    def losses(generator: torch.Generator) -> Losses:
        picks = torch.randint(len(tokens), (training.batch_size,), generator=generator)
        given = () if text is None else text.rows(picks, device)
        return {"loss": model.loss(tokens[picks].to(device), labels[picks].to(device), *given).mean()}

    fit_and_save(model, losses, training, folder, title="pretrain", progress=progress)


def fit_and_save(
    model: SpectralTokenizer | AutoregressiveTransformer,
    losses: Callable[[torch.Generator], Losses],
    training: TrainingConfig,
    folder: Path,
    *,
    title: str,
    progress: bool,
    opponent: Opponent | None = None,
) -> None:
    """`fit`, then ``folder``/model; an interrupted run leaves the model as it is, usable and to be continued."""
    try:
        fit(model, losses, training, folder, title=title, progress=progress, opponent=opponent)
    except KeyboardInterrupt:
        save(model, folder / "model")
        raise
    save(model, folder / "model")


def check_text(model: AutoregressiveTransformer, text: TextEmbeddings | None, images: int, name: str) -> None:
    """Raises ValueError unless ``text`` is what the model takes, a row for each of ``images``."""
    config = model.config
    if (text is None) != (config.text_length == 0):
        raise InvalidValueError(
            f"the model takes no text, but texts were given for {name}; leave them out"
            if text is not None
            else f"the model takes text, and {name} has none: give its embeddings (--text), a row for each image"
        )
    if text is None:
        return
    rows, length, width = text.embeddings.shape
    if rows != images:
        raise InvalidValueError(f"{rows} texts for the {images} images of {name}")
    if length > config.text_length or width != config.text_width:
        raise InvalidValueError(
            f"texts of {length} tokens and width {width} for a model of {config.text_length} and {config.text_width}"
        )


def _need_images(dataset: ImageDataset, what: str) -> None:
    if len(dataset) == 0:
        raise InvalidValueError(f"{what} needs at least one image, and {dataset.name} has none")
