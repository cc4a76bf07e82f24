# SPDX-License-Identifier: Apache-2.0
"""The rule of EmbeddingBag: sums or means of an embedding's rows."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavedp.errors import StateError
from wavedp.privacy.layers import Call, EmbeddingRule, Tap
from wavedp.privacy.per_sample import PerSampleGradient, RowScatter


class EmbeddingBagRule(EmbeddingRule):
    """``y = sum_t W[id_t]``, or the mean, on ids ``[B, T]``: row v of ``dW_b`` is ``g_b`` times v's share."""

    def refusal(self, layer: nn.EmbeddingBag) -> str | None:  # type: ignore[override]
        if layer.mode == "max":
            return "the gradient of mode='max' is not known by record; use mode='sum' or 'mean', or an Embedding"
        return super().refusal(layer)  # type: ignore[arg-type]

    def forward(  # type: ignore[override]
        self,
        layer: nn.EmbeddingBag,
        tap: Tap,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        if input.ndim != 2 or per_sample_weights is not None:
            raise StateError(
                f"EmbeddingBag got ids of shape {tuple(input.shape)}"
                f"{' and per_sample_weights' if per_sample_weights is not None else ''} with a GradientBook attached: "
                f"it takes ids [B, T], padded to one length, and no weights; else use an Embedding and sum its rows"
            )
        weight = layer.weight.detach()
        return tap(F.embedding_bag(input, weight, mode=layer.mode, padding_idx=layer.padding_idx), input)

    def min_axes(self, layer: nn.EmbeddingBag, use: str) -> int:  # type: ignore[override]
        return 2

    def gradients(  # type: ignore[override]
        self, layer: nn.EmbeddingBag, use: str, call: Call
    ) -> dict[str, PerSampleGradient]:
        ids, g = call.inputs.long(), call.output_grads
        if layer.mode == "mean":
            counted = torch.full_like(ids, True, dtype=torch.bool)
            if layer.padding_idx is not None:
                counted = ids != layer.padding_idx
            g = g.to(torch.promote_types(g.dtype, torch.float32)) / counted.sum(1).clamp_min(1)[:, None]
        g = g[:, None].expand(-1, ids.shape[1], -1)
        return {"weight": RowScatter(ids, g, layer.num_embeddings, layer.padding_idx)}
