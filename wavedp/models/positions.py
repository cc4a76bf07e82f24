# SPDX-License-Identifier: Apache-2.0
"""Where a token stands: its scale, row and column, as rotations of queries and keys."""

import torch
from torch import Tensor, nn

from wavedp.models.autoregressive_config import AutoregressiveConfig

Rotation = tuple[Tensor, Tensor, Tensor, Tensor]
"""Cosines and sines [slots, d / 2] of the queries, then of the keys."""

BASE = 100.0  # the slowest turn is about one radian in BASE steps; grids have tens of rows


def coordinates(num_scales: int, grid: int) -> Tensor:
    """[num_scales * grid^2, 3] int64: scale, row and column of every token, in raster order within a scale."""
    axes = (torch.arange(num_scales), torch.arange(grid), torch.arange(grid))
    return torch.cartesian_prod(*axes).view(-1, 3)


class RotaryPositions(nn.Module):
    """Rotary position by (scale, row, column): the dimensions of a head are dealt out to the three (arXiv 2104.09864
    along each axis).

    The slot before token t holds token t - 1 and predicts token t. So its key is turned by where token t - 1 stands and
    its query by where token t does: what attention sees is how far the two are apart. The class and the text stand at
    (-1, -1, -1), before the first token on every axis.
    """

    cos_q: Tensor
    sin_q: Tensor
    cos_k: Tensor
    sin_k: Tensor

    def __init__(self, config: AutoregressiveConfig) -> None:
        super().__init__()
        pairs = config.width // config.heads // 2
        of_scale = pairs // 4 or 1  # few scales, many rows: fewer frequencies
        of_row = (pairs - of_scale) // 2
        tokens = coordinates(config.num_scales, config.grid)
        before = torch.full((config.text_length + 1, 3), -1)
        places = {"q": torch.cat([before[:-1], tokens]), "k": torch.cat([before, tokens[:-1]])}
        for name, place in places.items():
            angles = [
                place[:, axis, None] * BASE ** (-torch.arange(count) / count)
                for axis, count in enumerate((of_scale, of_row, pairs - of_scale - of_row))
            ]
            turned = torch.cat(angles, dim=1)
            self.register_buffer(f"cos_{name}", turned.cos(), persistent=False)
            self.register_buffer(f"sin_{name}", turned.sin(), persistent=False)

    def forward(self, first: int, end: int) -> Rotation:
        """The rotations of the slots ``first`` to ``end``, which is left out."""
        part = slice(first, end)
        return self.cos_q[part], self.sin_q[part], self.cos_k[part], self.sin_k[part]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns ``x`` [..., d] in d / 2 planes, the i-th spanned by the dimensions i and i + d / 2."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
