# SPDX-License-Identifier: Apache-2.0
"""The rule of Hugging Face's Conv1D, the Linear layer with a transposed weight that GPT-2 has."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from wavedp.privacy.layers import Call, Tap, linear_gradients
from wavedp.privacy.per_sample import OuterProducts, PerSampleGradient


class TransposedLinearRule:
    """``y = x W + b`` on ``[B, ..., d]``: ``dW_b = sum_t x_bt g_bt^T`` and ``db_b = sum_t g_bt``."""

    parameters = frozenset({"weight", "bias"})
    covers_children = False

    def refusal(self, layer: Any) -> str | None:
        return None

    def forward(self, layer: Any, tap: Tap, x: Tensor) -> Tensor:
        return tap(F.linear(x, layer.weight.detach().mT, layer.bias.detach()), x)

    def min_axes(self, layer: Any, use: str) -> int:
        return 2

    def gradients(self, layer: Any, use: str, call: Call) -> dict[str, PerSampleGradient]:
        forms = linear_gradients(call, weight=layer.weight.requires_grad, bias=layer.bias.requires_grad)
        if isinstance(weight := forms.get("weight"), OuterProducts):
            forms["weight"] = weight.transposed()
        return forms
