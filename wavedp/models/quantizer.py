# SPDX-License-Identifier: Apache-2.0
"""Vectors to codes: a learned codebook, or the grid of finite scalar quantisation."""

import math
from contextlib import AbstractContextManager, nullcontext
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


class Quantizer(nn.Module):
    """What both kinds have: a projection to few dimensions, one back, and a running share of use of every code."""

    usage: Tensor

    def __init__(self, width: int, num_codes: int, code_dim: int, width_out: int) -> None:
        super().__init__()
        self.num_codes = num_codes
        self.reduce = nn.Linear(width, code_dim)
        self.expand = nn.Linear(code_dim, width_out)

    def forward(self, hidden: Tensor) -> Quantized:  # [B, N, width]
        raise NotImplementedError

    def lookup(self, tokens: Tensor) -> Tensor:
        """[B, N] token ids -> [B, N, width_out] decoder inputs."""
        raise NotImplementedError

    @torch.no_grad()
    def use_of_codes(self) -> tuple[Tensor, Tensor]:
        """(perplexity of the running usage, share of the codes that are in use), scalars.

        The perplexity exp(-sum p log p) is the number of codes that would be as informative if all were used equally.
        A code is in use when its share is at least a fiftieth of 1 / codes. Before any training batch: 1 and 0.
        """
        share = self.usage / self.usage.sum().clamp_min(torch.finfo(self.usage.dtype).tiny)
        return torch.special.entr(share).sum().exp(), (share * self.num_codes >= 0.02).to(share.dtype).mean()

    @torch.no_grad()
    def _count(self, tokens: Tensor) -> None:
        share = torch.bincount(tokens.flatten(), minlength=self.num_codes).to(self.usage) / max(tokens.numel(), 1)
        self.usage.lerp_(share, 0.01)


class VectorQuantizer(Quantizer):
    """Nearest code on the unit sphere of a low-dimensional space: factorised, l2-normalised codes (ViT-VQGAN,
    arXiv 2110.04627).

    A code unused for long is dead: nearest-neighbour assignment never brings it back. In training every code keeps
    a running usage; one that falls under ``revive_below`` of the uniform share is moved onto a random encoder
    output of the batch at hand. The first training batch initialises the codebook the same way.
    """

    def __init__(
        self, width: int, num_codes: int, code_dim: int, *, width_out: int | None = None, revive_below: float = 0.02
    ) -> None:
        super().__init__(width, num_codes, code_dim, width_out or width)
        self.revive_below = revive_below
        self.codebook = nn.Parameter(F.normalize(torch.randn(num_codes, code_dim), dim=-1))
        self.register_buffer("usage", torch.zeros(num_codes))

    def forward(self, hidden: Tensor) -> Quantized:
        z = self.reduce(hidden)
        with _full_precision(hidden.device.type):  # in half precision many codes would be equally near
            z = F.normalize(z.to(self.codebook.dtype), dim=-1)
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


class FiniteScalarQuantizer(Quantizer):
    """A fixed grid: dimension i has ``levels[i]`` equally spaced values in [-1, 1] (arXiv 2309.15505).

    No codebook is learned, so none can die and no loss pulls at it: both losses are 0. The paper moves a grid of an
    even number of levels by half a step to one side; here it stays symmetric about 0. A token is the mixed-radix number
    of its digits, the first dimension counting least.
    """

    levels: Tensor
    basis: Tensor

    def __init__(self, width: int, levels: tuple[int, ...], *, width_out: int | None = None) -> None:
        super().__init__(width, math.prod(levels), len(levels), width_out or width)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("basis", torch.tensor(basis), persistent=False)
        self.register_buffer("usage", torch.zeros(self.num_codes))

    def forward(self, hidden: Tensor) -> Quantized:
        z = self.reduce(hidden)
        with _full_precision(hidden.device.type):
            z = torch.tanh(z.to(self.usage.dtype))
            # digit = round((z + 1) / 2 * (levels - 1)), in 0 .. levels - 1
            digits = ((z.detach() + 1) * 0.5 * (self.levels - 1)).nan_to_num(0.0).round().long()
            tokens = (digits * self.basis).sum(dim=-1)
            if self.training:
                self._count(tokens)
            values = z + (self._grid(digits) - z).detach()
        zero = z.new_zeros(())
        return Quantized(self.expand(values), tokens, zero, zero)

    def lookup(self, tokens: Tensor) -> Tensor:
        digits = tokens[..., None] // self.basis % self.levels
        values: Tensor = self.expand(self._grid(digits))
        return values

    def _grid(self, digits: Tensor) -> Tensor:
        return 2.0 * digits.to(self.usage.dtype) / (self.levels - 1) - 1.0


def _full_precision(device_type: str) -> AbstractContextManager[object]:
    """No autocast inside, on devices that have one."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()
