# SPDX-License-Identifier: Apache-2.0
"""Pre-norm transformer parts shared by the tokenizer and the autoregressive model."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavedp.errors import InvalidValueError
from wavedp.models.positions import Rotation, rotated


class BlockWeights(nn.Module):
    """The weights of one block: norm, QKV, projection, norm, MLP. What mixes tokens stands outside, so that two
    sets of weights can serve one sequence."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        if width % heads:
            raise InvalidValueError(f"width={width} must be a multiple of heads={heads}")
        self.heads = heads
        hidden = int(width * mlp_ratio)
        self.attention_norm = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.projection = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp_in = nn.Linear(width, hidden)
        self.mlp_out = nn.Linear(hidden, width)

    def heads_qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, D] -> three of [B, heads, T, D / heads]."""
        B, T, D = x.shape
        qkv = self.qkv(self.attention_norm(x)).reshape(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def merge(self, x: Tensor, attended: Tensor) -> Tensor:
        """Residual of the attention output [B, heads, T, d], then the MLP."""
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        hidden: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return x + hidden


class CausalBlock(nn.Module):
    """One block of a left-to-right transformer."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.weights = BlockWeights(width, heads, mlp_ratio)

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        """``x``: [B, T, D]; ``rotation`` of its T positions, where position is rotary."""
        q, k, v = self.weights.heads_qkv(x)
        if rotation is not None:
            cos_q, sin_q, cos_k, sin_k = rotation
            q, k = rotated(q, cos_q, sin_q), rotated(k, cos_k, sin_k)
        return self.weights.merge(x, F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1))


class SpectralBlock(nn.Module):
    """One block over approximation and detail tokens: one sequence, one attention, two sets of weights
    (norms, QKV, projection and MLP unshared, as in the ADTransformer of arXiv 2412.09607)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.approximation = BlockWeights(width, heads, mlp_ratio)
        self.detail = BlockWeights(width, heads, mlp_ratio)

    def forward(self, x: Tensor, num_approximation: int, mask: Tensor | None) -> Tensor:
        """``x``: [B, T, D], the first ``num_approximation`` tokens being the approximation; ``mask``: [T, T] bool,
        True where a query may look, or None for dense attention."""
        parts = [(self.approximation, x[:, :num_approximation])]
        if x.shape[1] > num_approximation:
            parts.append((self.detail, x[:, num_approximation:]))
        qkv = [weights.heads_qkv(tokens) for weights, tokens in parts]
        q, k, v = (torch.cat(tensors, dim=2) for tensors in zip(*qkv))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        sizes = [tokens.shape[1] for _, tokens in parts]
        merged = [weights.merge(tokens, a) for (weights, tokens), a in zip(parts, attended.split(sizes, dim=2))]
        return torch.cat(merged, dim=1)


def scale_causal_mask(num_scales: int, tokens_per_scale: int, device: torch.device) -> Tensor:
    """[T, T] bool: dense within a scale, causal across scales (arXiv 2412.09607)."""
    scale = torch.arange(num_scales, device=device).repeat_interleave(tokens_per_scale)
    return scale[:, None] >= scale[None, :]
