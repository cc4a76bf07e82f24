# SPDX-License-Identifier: Apache-2.0
"""The rule of nn.MultiheadAttention: its projections are Linear layers whose weights are blocks of one parameter."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavedp.errors import StateError
from wavedp.privacy.forms_blocks import RowBlocks
from wavedp.privacy.layers import Call, Tap, detached, linear_gradients
from wavedp.privacy.per_sample import Materialised, PerSampleGradient

# Which thirds of in_proj_weight and in_proj_bias a projection uses: of query, key, value.
_THIRDS = {"qkv": (0, 3), "kv": (1, 3), "q": (0, 1), "k": (1, 2), "v": (2, 3)}


class MultiheadAttentionRule:
    """Self- or cross-attention of ``[B, T, d]``, or ``[T, B, d]``, with everything that the layer can do.

    Taps are behind the input projections, behind the output projection, and behind ``bias_k`` and ``bias_v``, which
    every record gets as a token of its own.
    """

    parameters = frozenset(
        {"in_proj_weight", "in_proj_bias", "bias_k", "bias_v", "out_proj.weight", "out_proj.bias"}
        | {f"{name}_proj_weight" for name in "qkv"}
    )
    covers_children = True

    def refusal(self, layer: nn.MultiheadAttention) -> str | None:
        return None

    def forward(
        self,
        layer: nn.MultiheadAttention,
        tap: Tap,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if any(x.ndim != 3 for x in (query, key, value)):
            raise StateError(
                f"MultiheadAttention got a query of shape {tuple(query.shape)} with a GradientBook attached: it needs "
                f"a record axis, [B, T, d] with batch_first=True or [T, B, d] without"
            )
        if is_causal and attn_mask is None:
            raise StateError("is_causal is a hint about attn_mask: pass attn_mask too")
        q, k, v = self._projected(layer, tap, query, key, value)
        if is_causal and key_padding_mask is None and not need_weights:
            mask = None
        else:
            is_causal = False
            mask = _bias(attn_mask, key_padding_mask, len(q), layer.num_heads, q.dtype)
        if layer.bias_k is not None and layer.bias_v is not None:
            tokens = (self._token(layer, tap, name, q) for name in ("bias_k", "bias_v"))
            k, v = (torch.cat([x, token], dim=1) for x, token in zip((k, v), tokens))
        if layer.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        q, k, v = (x.unflatten(2, (layer.num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, heads, T, d]
        if mask is not None:  # the tokens that were added are seen by all
            mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]))
        dropout = layer.dropout if layer.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.mT / math.sqrt(layer.head_dim)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            attended = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        attended = attended.transpose(1, 2).flatten(2)
        output = F.linear(attended, layer.out_proj.weight.detach(), detached(layer.out_proj.bias))
        output = tap(output, attended, "out")
        return output if layer.batch_first else output.transpose(0, 1), weights

    def min_axes(self, layer: nn.MultiheadAttention, use: str) -> int:
        return 2

    def gradients(self, layer: nn.MultiheadAttention, use: str, call: Call) -> dict[str, PerSampleGradient]:
        if use in ("bias_k", "bias_v"):
            return {use: Materialised(call.output_grads[:, None])}
        if use == "out":
            weight, bias = layer.out_proj.weight, layer.out_proj.bias
            names = {"weight": "out_proj.weight", "bias": "out_proj.bias"}
        else:
            names = {"weight": _weight_name(layer, use), "bias": "in_proj_bias"}
            weight, bias = getattr(layer, names["weight"]), layer.in_proj_bias
        trainable = {"weight": weight.requires_grad, "bias": bias is not None and bias.requires_grad}
        forms = linear_gradients(call, **trainable)
        first, last = (third * layer.embed_dim for third in _THIRDS.get(use, (0, 3)))
        return {
            names[key]: RowBlocks({(first, last): form}, 3 * layer.embed_dim)
            if names[key] in ("in_proj_weight", "in_proj_bias") and use != "qkv"
            else form
            for key, form in forms.items()
        }

    def _projected(
        self, layer: nn.MultiheadAttention, tap: Tap, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The projected query, key and value, each [B, T, d]; one product for those of one input."""
        packed = layer.in_proj_weight is not None
        shared = {"qkv": (query,)} if query is key else {"q": (query,), "kv": (key,)}
        apart = {"q": (query,), "k": (key,), "v": (value,)}
        outputs: list[Tensor] = []
        for use, (x,) in (shared if packed and key is value else apart).items():
            x = x if layer.batch_first else x.transpose(0, 1)
            first, last = (third * layer.embed_dim for third in _THIRDS[use])
            weight = getattr(layer, _weight_name(layer, use)).detach()
            bias = detached(layer.in_proj_bias)
            output = F.linear(x, weight[first:last] if packed else weight, None if bias is None else bias[first:last])
            outputs += tap(output, x, use).chunk(len(use), dim=2)
        q, k, v = outputs
        return q, k, v

    def _token(self, layer: nn.MultiheadAttention, tap: Tap, name: str, like: Tensor) -> Tensor:
        """Return ``bias_k`` or ``bias_v``, [1, 1, d], as a token [B, 1, d] of every record."""
        token = getattr(layer, name).detach().expand(len(like), 1, -1)
        return tap(token, like.new_empty(len(like), 0), name)


def _weight_name(layer: nn.MultiheadAttention, use: str) -> str:
    return "in_proj_weight" if layer.in_proj_weight is not None else f"{use}_proj_weight"


def _bias(
    attn_mask: Tensor | None,  # [T, S] or [B * heads, T, S]; true where it is not looked, or added to the scores
    key_padding_mask: Tensor | None,  # [B, S], of the same kind
    records: int,
    heads: int,
    dtype: torch.dtype,
) -> Tensor | None:  # broadcasts to [B, heads, T, S], added to the scores
    total = None
    for mask, axes in ((attn_mask, 3), (key_padding_mask, 2)):
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
        if axes == 2:
            mask = mask[:, None, None]
        elif mask.ndim == 3:
            mask = mask.unflatten(0, (records, heads))
        total = mask if total is None else total + mask
    return total
