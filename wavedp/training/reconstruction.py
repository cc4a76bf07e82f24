# SPDX-License-Identifier: Apache-2.0
"""How much of an image its tokens keep, at the resolution of every prefix of the scales."""

import math

import torch
from torch.nn.functional import mse_loss

from wavedp.data import ImageDataset, to_unit_range
from wavedp.errors import InvalidValueError
from wavedp.functional import coarse
from wavedp.models import SpectralTokenizer


@torch.no_grad()
def reconstruction_quality(
    tokenizer: SpectralTokenizer, dataset: ImageDataset, *, limit: int | None = None, batch_size: int = 256
) -> dict[int, float]:
    """Peak signal-to-noise ratio in dB, by pixels a side, coarse first.

    A prefix of k scales is decoded and compared with the block means of the image, which those scales describe. The
    squared error is averaged over all images, channels and pixels: 10 log10(1 / MSE), the range being [0, 1]. Prefixes
    that the tokenizer's masks do not allow to be decoded alone are left out.

    Args:
        limit: only that many images, the first; None for all.

    Raises ValueError for no images, and where the tokenizer is in training mode, in which encoding changes it.
    """
    count = min(len(dataset), len(dataset) if limit is None else limit)
    if count < 1:
        raise InvalidValueError(f"{dataset.name} has no image to reconstruct")
    if tokenizer.training:
        raise InvalidValueError("the tokenizer is in training mode; call .eval() first")
    layout = tokenizer.layout
    partial = tokenizer.config.causal in ("decoder", "both")
    prefixes = range(1 if partial else layout.num_scales, layout.num_scales + 1)
    errors = dict.fromkeys(prefixes, 0.0)
    for indices in torch.arange(count).split(batch_size):
        images = to_unit_range(dataset.stack(indices)).to(tokenizer.coefficient_mean.device)
        tokens = tokenizer.encode(images)
        for k in prefixes:
            skipped = layout.num_scales - k
            target = coarse(images, skipped) * 0.5**skipped if skipped else images
            decoded = tokenizer.decode(tokens[:, : k * layout.tokens_per_scale])
            errors[k] += float(mse_loss(decoded, target)) * len(indices)
    return {layout.resolution(k): 10 * math.log10(count / max(error, 1e-12)) for k, error in errors.items()}
