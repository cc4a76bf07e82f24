# SPDX-License-Identifier: Apache-2.0
"""The rule of Hugging Face's Conv1D, the Linear layer with a transposed weight that GPT-2 has."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from wavedp.privacy.layers import Call, Tap, linear_gradients, tokens
from wavedp.privacy.per_sample import Materialised, OuterProducts, PerSampleGradient, product_norms


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
        bias = layer.bias.requires_grad
        if not layer.weight.requires_grad:
            return linear_gradients(call, weight=False, bias=bias)
        a, g = tokens(call.inputs, 1), tokens(call.output_grads, 1)
        # A matrix and its transpose have the same norm.
        squared, bias_grads = product_norms(a, g, bias=bias)
        products = OuterProducts(g, a)
        products.set_norms(squared)
        return {"weight": products, "bias": Materialised(bias_grads)} if bias else {"weight": products}
