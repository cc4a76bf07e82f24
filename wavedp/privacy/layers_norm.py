# SPDX-License-Identifier: Apache-2.0
"""The rules of GroupNorm and InstanceNorm, whose weights are per channel."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavedp.errors import StateError
from wavedp.privacy.clipping import accumulation_dtype
from wavedp.privacy.layers import Call, Tap, detached
from wavedp.privacy.per_sample import Materialised, PerSampleGradient


class GroupNormRule:
    """``y_c = w_c n_c(x) + b_c`` on ``[B, C, ...]``, n being the normalisation over groups of channels.

    ``dw_bc = sum_l g_bcl n_c(x_b)_l`` and ``db_bc = sum_l g_bcl``.
    """

    parameters = frozenset({"weight", "bias"})
    covers_children = False

    def refusal(self, layer: Any) -> str | None:
        return None

    def forward(self, layer: Any, tap: Tap, input: Tensor) -> Tensor:
        weight, bias = detached(layer.weight), detached(layer.bias)
        return tap(F.group_norm(input, layer.num_groups, weight, bias, layer.eps), input)

    def min_axes(self, layer: Any, use: str) -> int:
        return 2

    def groups(self, layer: Any) -> int:
        """Return how many groups the channels are normalised in."""
        groups: int = layer.num_groups
        return groups

    def gradients(self, layer: Any, use: str, call: Call) -> dict[str, PerSampleGradient]:
        x, g = (y.to(accumulation_dtype(y.dtype)) for y in call)
        gradients: dict[str, PerSampleGradient] = {}
        if layer.weight is not None and layer.weight.requires_grad:
            normalised = torch.group_norm(x, self.groups(layer), eps=layer.eps)
            gradients["weight"] = Materialised(sum_by_channel(g * normalised))
        if layer.bias is not None and layer.bias.requires_grad:
            gradients["bias"] = Materialised(sum_by_channel(g))
        return gradients


class InstanceNormRule(GroupNormRule):
    """:class:`GroupNormRule` with every channel for itself; running statistics are refused before the start."""

    def forward(self, layer: Any, tap: Tap, input: Tensor) -> Tensor:
        layer._check_input_dim(input)
        if input.ndim == layer._get_no_batch_dim():
            raise StateError(
                f"{type(layer).__name__} got an input of shape {tuple(input.shape)} with a GradientBook attached: it "
                f"needs the record axis first, [B, channels, ...]"
            )
        weight, bias = detached(layer.weight), detached(layer.bias)
        if len(input) == 0:  # which instance_norm does not take
            return tap(torch.group_norm(input, layer.num_features, weight, bias, layer.eps), input)
        return tap(F.instance_norm(input, weight=weight, bias=bias, eps=layer.eps), input)

    def min_axes(self, layer: Any, use: str) -> int:
        return 3

    def groups(self, layer: nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d) -> int:
        return layer.num_features


def sum_by_channel(x: Tensor) -> Tensor:
    """``[B, C, ...]`` to ``[B, C]``; float32, or float64 for float64."""
    dtype = accumulation_dtype(x.dtype)
    return x.flatten(2).sum(2, dtype=dtype) if x.ndim > 2 else x.to(dtype)
