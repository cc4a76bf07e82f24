# SPDX-License-Identifier: Apache-2.0
"""The rule of Conv1d, Conv2d and Conv3d."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from wavedp.errors import StateError
from wavedp.privacy.forms_conv import Convolution, Geometry
from wavedp.privacy.layers import Call, Tap, detached
from wavedp.privacy.layers_norm import sum_by_channel
from wavedp.privacy.per_sample import Materialised, PerSampleGradient

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvolutionRule:
    """``y = W * x + b`` on ``[B, channels, *axes]``, with any groups, stride, dilation, padding and padding mode."""

    parameters = frozenset({"weight", "bias"})
    covers_children = False

    def refusal(self, layer: Any) -> str | None:
        return None

    def forward(self, layer: Any, tap: Tap, input: Tensor) -> Tensor:
        axes = len(layer.kernel_size)
        if input.ndim != axes + 2:
            raise StateError(
                f"{type(layer).__name__} got an input of shape {tuple(input.shape)} with a GradientBook attached: it "
                f"needs the record axis first, [B, channels{', size' * axes}]"
            )
        padded, geometry = _padded(layer, input)
        weight, bias = layer.weight.detach(), detached(layer.bias)
        # The functions differ in their overloads only.
        convolution: Any = _CONVOLUTIONS[axes]
        output = convolution(
            padded, weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
        )
        return tap(output, padded)

    def min_axes(self, layer: Any, use: str) -> int:
        return 2 + len(layer.kernel_size)

    def gradients(self, layer: Any, use: str, call: Call) -> dict[str, PerSampleGradient]:
        gradients: dict[str, PerSampleGradient] = {}
        if layer.weight.requires_grad:
            gradients["weight"] = Convolution(call.inputs, call.output_grads, _geometry(layer))
        if layer.bias is not None and layer.bias.requires_grad:
            gradients["bias"] = Materialised(sum_by_channel(call.output_grads))
        return gradients


def _padded(layer: Any, input: Tensor) -> tuple[Tensor, Geometry]:
    """The input with the padding that a convolution cannot add itself."""
    geometry = _geometry(layer)
    # Last axis first, before and after: what F.pad takes.
    ends = tuple(layer._reversed_padding_repeated_twice)
    if layer.padding_mode != "zeros":
        return F.pad(input, ends, layer.padding_mode), geometry
    if any(geometry.padding) or not any(ends):
        return input, geometry
    return F.pad(input, ends), geometry


def _geometry(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Geometry:
    ends = tuple(layer._reversed_padding_repeated_twice)
    before, after = ends[::-2], ends[-2::-2]  # `ends` is by axis, last first, (before, after)
    even = layer.padding_mode == "zeros" and before == after
    return Geometry(
        weight_shape=tuple(layer.weight.shape),
        stride=tuple(layer.stride),
        padding=tuple(before) if even else (0,) * len(layer.kernel_size),
        dilation=tuple(layer.dilation),
        groups=layer.groups,
    )
