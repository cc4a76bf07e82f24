# SPDX-License-Identifier: Apache-2.0
"""Wavelet tokens: transform, normalisation and patches in one, and the image from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

import wavedp
from wavedp.benchmarks.cases.sizes import SIZES, images
from wavedp.benchmarks.cases.wavelet import written
from wavedp.benchmarks.registry import Case, Provider, Shape, Size, Thunk
from wavedp.benchmarks.transforms import Transform, is_compiled, transforms
from wavedp.reference.wavelet_tokens import (
    scale_channels,
    unpatchify,
    wavelet_tokens_forward,
    wavelet_untokens_forward,
)

LEVEL = 3
RIVALS = ("F.conv2d", "ptwt", "pytorch_wavelets")


def grid_of(shape: Shape) -> tuple[int, int]:
    """16 x 16 tokens of every scale, or fewer where the coarsest band is smaller than that."""
    height, width = shape[-2:]
    return min(16, height >> LEVEL), min(16, width >> LEVEL)


def statistics(channels: int, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """A mean and a standard deviation for each channel of each scale."""
    counts = scale_channels(channels, LEVEL)
    means = [torch.linspace(-0.5, 0.5, count, device=device) for count in counts]
    return means, [torch.linspace(0.5, 2.0, count, device=device) for count in counts]


def tokens_of(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> list[Tensor]:
    """The definition."""
    return wavelet_tokens_forward(x, LEVEL, grid_of(x.shape), 0.5, shift, scale)[0]


def image_of(shape: Shape, tokens: Sequence[Tensor], shift: Tensor, scale: Tensor) -> Tensor:
    """The image of ``shape`` that has these tokens, by the definition."""
    _, channels, height, width = shape
    return wavelet_untokens_forward(tokens, channels, height, width, grid_of(shape), 0.5, shift, scale)


def along(values: Tensor, scale: Tensor) -> Tensor:
    """One value for each channel of a scale [B, C, h, w] or [B, 3, C, h, w], so that they broadcast."""
    return values.view(*scale.shape[1:-2], 1, 1)


def patches(scale: Tensor, grid: tuple[int, int]) -> Tensor:
    """:func:`patchify` of [B, C, h, w] or of [B, 3, C, h, w] in any layout: one copy, into the tokens."""
    rows, columns = grid
    blocks: Tensor = scale.unflatten(-1, (columns, -1)).unflatten(-3, (rows, -1))  # [B, ..., C, rows, p, columns, q]
    return blocks.movedim((-4, -2), (1, 2)).flatten(3).flatten(1, 2)


def analysis(size: Size, device: torch.device) -> Mapping[str, Provider]:
    grid = grid_of(size.shape)
    means, deviations = statistics(size.shape[1], device)
    definition = partial(tokens_of, shift=torch.cat(means), scale=1 / torch.cat(deviations))

    def ours(inputs: Sequence[Tensor], out: Sequence[Tensor] | None) -> Thunk:
        existing = None if out is None else list(out)
        return partial(wavedp.wavelet_tokens, inputs[0], LEVEL, grid, means, deviations, out=existing)

    def rival(transform: Transform) -> Provider:
        def tokens(x: Tensor) -> list[Tensor]:
            maps = transform.to_scales(transform.forward(x))
            normal = [(m - along(a, m)) / along(b, m) for m, a, b in zip(maps, means, deviations)]
            return [patches(m.to(x.dtype), grid) for m in normal]

        return Provider(lambda inputs, out: partial(tokens, inputs[0]))

    found = written(ours, device) | {"wavedp": Provider(lambda inputs, out: ours(inputs, None))}
    if size.ours_only:
        return found
    if is_compiled(device):
        compiled = torch.compile(definition, dynamic=False)
        found["torch.compile"] = Provider(lambda inputs, out: partial(compiled, inputs[0]))
    found["eager"] = Provider(lambda inputs, out: partial(definition, inputs[0]))
    return found | {
        name: rival(transform) for name, transform in transforms(LEVEL, size, device).items() if name in RIVALS
    }


def synthesis(size: Size, device: torch.device) -> Mapping[str, Provider]:
    grid, shape = grid_of(size.shape), size.shape
    channels, height, width = shape[1:]
    means, deviations = statistics(channels, device)
    definition = partial(image_of, shape, shift=torch.cat(means), scale=torch.cat(deviations))

    def ours(tokens: Sequence[Tensor], out: Sequence[Tensor] | None) -> Thunk:
        existing = None if out is None else out[0]
        untokens = partial(wavedp.wavelet_untokens, output_size=(height, width), out=existing)
        return partial(untokens, list(tokens), grid, means, deviations)

    def rival(transform: Transform) -> Provider:
        def image(tokens: Sequence[Tensor]) -> Tensor:
            scales = []
            for i, scale in enumerate(tokens):
                level, count = min(LEVEL, LEVEL + 1 - i), scale_channels(channels, LEVEL)[i]
                plain = unpatchify(scale, count, height >> level, width >> level, grid)
                bands = (plain * deviations[i][:, None, None] + means[i][:, None, None]).to(size.dtype)
                scales.append(bands.unflatten(1, (3, channels)) if i else bands)
            return transform.image(transform.inverse(transform.from_scales(scales)))

        return Provider(lambda tokens, out: partial(image, tokens), alone)

    found = written(ours, device)
    found["wavedp"] = Provider(lambda tokens, out: ours(tokens, None), alone)
    if size.ours_only:
        return found
    if is_compiled(device):
        compiled = torch.compile(definition, dynamic=False)
        found["torch.compile"] = Provider(lambda tokens, out: partial(compiled, tokens), alone)
    found["eager"] = Provider(lambda tokens, out: partial(definition, tokens), alone)
    return found | {
        name: rival(transform) for name, transform in transforms(LEVEL, size, device).items() if name in RIVALS
    }


def alone(x: Tensor) -> list[Tensor]:
    return [x]


def tokens_as_inputs(size: Size, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(expected_tokens(size, *images(size, device)))


def expected_tokens(size: Size, x: Tensor) -> list[Tensor]:
    means, deviations = (torch.cat(values) for values in statistics(x.shape[1], x.device))
    return tokens_of(x, means, 1 / deviations.to(torch.promote_types(x.dtype, torch.float32)))


def expected_image(size: Size, *tokens: Tensor) -> list[Tensor]:
    means, deviations = (torch.cat(values) for values in statistics(size.shape[1], tokens[0].device))
    return [image_of(size.shape, tokens, means, deviations)]


CASES = [
    Case(f"wavelet_tokens-L{LEVEL}", images, expected_tokens, analysis, SIZES),
    Case(f"wavelet_untokens-L{LEVEL}", tokens_as_inputs, expected_image, synthesis, SIZES),
]
