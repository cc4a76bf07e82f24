# SPDX-License-Identifier: Apache-2.0
"""Vector quantisation with factorised, l2-normalised codes (ViT-VQGAN, arXiv 2110.04627)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Quantized(NamedTuple):
    """``values`` [B, N, width] carry the straight-through gradient; ``tokens`` [B, N] int64; losses are scalars."""

    values: Tensor
    tokens: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor


class VectorQuantizer(nn.Module):
    """Nearest code on the unit sphere of a low-dimensional space.

    A code unused for long is dead: nearest-neighbour assignment never brings it back. In training every code keeps
    a running usage; one that falls under ``revive_below`` of the uniform share is moved onto a random encoder
    output of the batch at hand. The first training batch initialises the codebook the same way.
    """

    usage: Tensor

    def __init__(self, width: int, num_codes: int, code_dim: int, *, revive_below: float = 0.02) -> None:
        super().__init__()
        self.num_codes = num_codes
        self.revive_below = revive_below
        self.reduce = nn.Linear(width, code_dim)
        self.expand = nn.Linear(code_dim, width)
        self.codebook = nn.Parameter(F.normalize(torch.randn(num_codes, code_dim), dim=-1))
        self.register_buffer("usage", torch.zeros(num_codes))

    def forward(self, hidden: Tensor) -> Quantized:
        """``hidden``: [B, N, width]."""
        z = F.normalize(self.reduce(hidden), dim=-1)
        if self.training:
            self._revive(z.detach().flatten(0, -2))
        codes = F.normalize(self.codebook, dim=-1)
        tokens = (z @ codes.T).argmax(dim=-1)
        if self.training:
            self._count(tokens)
        chosen = F.embedding(tokens, codes)
        codebook_loss = (chosen - z.detach()).square().sum(-1).mean()
        commitment_loss = (z - chosen.detach()).square().sum(-1).mean()
        values = self.expand(z + (chosen - z).detach())
        return Quantized(values, tokens, codebook_loss, commitment_loss)

    def lookup(self, tokens: Tensor) -> Tensor:
        """[B, N] token ids -> [B, N, width] decoder inputs."""
        values: Tensor = self.expand(F.embedding(tokens, F.normalize(self.codebook, dim=-1)))
        return values

    @torch.no_grad()
    def _revive(self, z: Tensor) -> None:
        first = not bool(self.usage.any())
        dead = (
            torch.ones_like(self.usage, dtype=torch.bool) if first else self.usage * self.num_codes < self.revive_below
        )
        num_dead = int(dead.sum())
        if num_dead == 0 or len(z) == 0:
            return
        picks = torch.randint(len(z), (num_dead,), device=z.device)
        self.codebook[dead] = z[picks].to(self.codebook.dtype)
        self.usage[dead] = 1.0 / self.num_codes

    @torch.no_grad()
    def _count(self, tokens: Tensor) -> None:
        share = torch.bincount(tokens.flatten(), minlength=self.num_codes).to(self.usage) / max(tokens.numel(), 1)
        self.usage.lerp_(share, 0.01)
