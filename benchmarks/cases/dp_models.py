# SPDX-License-Identifier: Apache-2.0
"""The models of the training steps; each forward returns one loss a record."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wavedp.models import AutoregressiveConfig, AutoregressiveTransformer


class Block(nn.Module):
    """Pre-norm attention and MLP, as GPT-2 has them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, d]
        B, T, d = x.shape
        qkv = self.qkv(self.attention_norm(x)).reshape(B, T, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).reshape(B, T, d))
        hidden: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return x + hidden


class Gpt(nn.Module):
    """A left-to-right transformer whose embedding and head are not tied, without dropout."""

    def __init__(
        self,
        *,
        vocabulary: int,
        length: int,
        width: int,
        depth: int,
        heads: int,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.autocast = autocast  # the forward's arithmetic; None: that of the weights
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for embedding in (self.token_embedding, self.position_embedding):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:  # [B, T] both -> [B], nats a token
        with torch.autocast(ids.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            positions = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)
            x = self.token_embedding(ids) + self.position_embedding(positions)
            for block in self.blocks:
                x = block(x)
            logits = self.head(self.norm(x))
            losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        return losses.view(targets.shape).mean(dim=1)


class FineTuned(nn.Module):
    """The pipeline's model, with the loss of its private stage as forward."""

    def __init__(self, *, codes: int, grid: int, scales: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.model = AutoregressiveTransformer(
            AutoregressiveConfig(
                num_classes=10,
                tokens_per_scale=grid * grid,
                num_scales=scales,
                approximation_codes=codes,
                detail_codes=codes,
                width=width,
                depth=depth,
                heads=heads,
                class_dropout=0.0,  # random, so it would spoil the comparison of gradients
            )
        )

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return self.model.loss(tokens, labels)
