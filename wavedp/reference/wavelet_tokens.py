# SPDX-License-Identifier: Apache-2.0
"""Definition of wavelet tokens: the Haar transform, normalised and cut into one grid of patches per scale.

Scale 0 is the approximation, scale s >= 1 holds the details of level L - s + 1 with LH, HL and HH one after the
other on the channel axis. Every scale has the same ``grid`` of tokens, because patches grow with frequency
(arXiv 2412.09607); a token's values are in the order (channel of the scale, row, column).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from wavedp.reference.wavelet import Edge, _analyse, _synthesise, widened


def scale_channels(channels: int, level: int) -> list[int]:
    """Channels of each scale: C, 3 C, 3 C, ..."""
    return [channels] + [3 * channels] * level


def patchify(coefficients: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, C, gh p, gw q] -> [B, gh gw, C p q], tokens in row-major order of the grid."""
    batch, channels, height, width = coefficients.shape
    rows, columns = grid
    p, q = height // rows, width // columns
    blocks = coefficients.reshape(batch, channels, rows, p, columns, q)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * p * q)


def unpatchify(tokens: Tensor, channels: int, height: int, width: int, grid: tuple[int, int]) -> Tensor:
    """[B, gh gw, C p q] -> [B, C, height, width]; the inverse of :func:`patchify`."""
    batch = tokens.shape[0]
    rows, columns = grid
    blocks = tokens.reshape(batch, rows, columns, channels, height // rows, width // columns)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def wavelet_tokens_forward(
    x: Tensor,  # [B, C, H, W]; uint8 too. H and W are multiples of 2^level times the grid
    level: int,
    grid: tuple[int, int],
    factor: float,
    shift: Tensor | None,  # [C (3 level + 1)], by scale and channel of the scale; None: no normalisation
    scale: Tensor | None,  # the same
    gain: float = 1.0,  # of bytes: a sample is gain * x + bias
    bias: float = 0.0,
    dtype: torch.dtype | None = None,  # of the tokens: that of x, or float32 for bytes
    energies: bool = False,
) -> tuple[list[Tensor], Tensor | None]:  # tokens [B, gh gw, C_s p_s q_s] per scale, energies [B, C (3 level + 1)]
    """Tokens ``(coefficient - shift) * scale`` of every scale, coarse first, and if asked for, the sums of squares
    of the coefficients before that, for each image and channel of a scale."""
    dtype = dtype or (torch.float32 if x.dtype == torch.uint8 else x.dtype)
    approximation = widened(x, gain, bias)
    maps: list[Tensor] = []
    for _ in range(level):
        approximation, *bands = _analyse(approximation, Edge.ZERO, factor)
        maps.insert(0, torch.cat(bands, dim=1))
    maps.insert(0, approximation)
    squares = torch.cat([m.square().sum(dim=(-2, -1)) for m in maps], dim=1) if energies else None
    if shift is not None and scale is not None:
        sizes = scale_channels(x.shape[1], level)
        shifts, scales = shift.to(approximation.dtype).split(sizes), scale.to(approximation.dtype).split(sizes)
        maps = [(m - a[:, None, None]) * b[:, None, None] for m, a, b in zip(maps, shifts, scales)]
    return [patchify(m, grid).to(dtype).contiguous() for m in maps], squares


def wavelet_untokens_forward(
    tokens: Sequence[Tensor],  # [B, gh gw, C_s p_s q_s] per scale, coarse first; len(tokens) - 1 levels
    channels: int,
    height: int,
    width: int,
    grid: tuple[int, int],
    factor: float,
    shift: Tensor | None,  # [C (3 level + 1)]
    scale: Tensor | None,
) -> Tensor:  # [B, C, height, width], contiguous, in the dtype of the tokens
    """The image whose coefficients are ``token * scale + shift``."""
    level = len(tokens) - 1
    sizes = scale_channels(channels, level)
    maps = [
        unpatchify(widened(t), c, height >> k, width >> k, grid)
        for t, c, k in zip(tokens, sizes, [level, *range(level, 0, -1)])
    ]
    if shift is not None and scale is not None:
        shifts, scales = shift.to(maps[0].dtype).split(sizes), scale.to(maps[0].dtype).split(sizes)
        maps = [m * b[:, None, None] + a[:, None, None] for m, a, b in zip(maps, shifts, scales)]
    x, *details = maps
    for k, m in zip(range(level, 0, -1), details):
        lh, hl, hh = m.chunk(3, dim=1)
        x = _synthesise((x, lh, hl, hh), height >> (k - 1), width >> (k - 1), Edge.ZERO, factor)
    return x.to(tokens[0].dtype).contiguous()
