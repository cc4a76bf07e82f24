# SPDX-License-Identifier: Apache-2.0
"""The layer types whose per-record gradients are known: Linear, Embedding, LayerNorm, RMSNorm.

A rule runs its layer with detached parameters, so that autograd never computes their gradients, and later
turns what was booked (inputs, output gradients) into per-record gradients, one form per parameter. A layer
that is called several times in a forward books several calls; its gradient is their sum, taken exactly.
"""

import math
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavedp.privacy.per_sample import Materialised, OuterProducts, PerSampleGradient, RowScatter


class Call(NamedTuple):
    """One call of a layer that the loss reached."""

    inputs: Tensor  # [B, ...], the layer's input
    output_grads: Tensor  # [B, ...], the loss's gradient with respect to the layer's output


class LayerRule(Protocol):
    """How one layer type is run and differentiated per record. ``layer`` is always of the rule's own type."""

    parameters: frozenset[str]
    """Names of the parameters that the rule differentiates; a layer that trains others is refused."""

    def refusal(self, layer: Any) -> str | None:
        """Return why this layer's settings are not supported and what to do, or ``None``."""

    def forward(self, layer: Any, inputs: Tensor) -> Tensor:
        """Run the layer with detached parameters."""

    def min_axes(self, layer: Any) -> int:
        """Return how many axes an input has when it has a record axis and no token axis."""

    def gradients(self, layer: Any, calls: list[Call]) -> dict[str, PerSampleGradient]:
        """Return every parameter's per-record gradients, summed over the calls."""


class LinearRule:
    """``y = x W^T + b`` on ``[B, ..., d]``: ``dW_b = sum_t g_bt x_bt^T`` and ``db_b = sum_t g_bt``."""

    parameters = frozenset({"weight", "bias"})

    def refusal(self, layer: nn.Linear) -> str | None:
        return None

    def forward(self, layer: nn.Linear, inputs: Tensor) -> Tensor:
        return F.linear(inputs, layer.weight.detach(), _detached(layer.bias))

    def min_axes(self, layer: nn.Linear) -> int:
        return 2

    def gradients(self, layer: nn.Linear, calls: list[Call]) -> dict[str, PerSampleGradient]:
        a = _joined([_tokens(call.inputs, 1) for call in calls])
        g = _joined([_tokens(call.output_grads, 1) for call in calls])
        gradients: dict[str, PerSampleGradient] = {"weight": OuterProducts(a, g)}
        if layer.bias is not None:
            gradients["bias"] = Materialised(g.sum(1, dtype=torch.float64))
        return gradients


class EmbeddingRule:
    """``y = W[ids]``: row v of ``dW_b`` is the sum of ``g_bt`` over the tokens with ``id_bt = v``."""

    parameters = frozenset({"weight"})

    def refusal(self, layer: nn.Embedding) -> str | None:
        if layer.max_norm is not None:
            return "max_norm rewrites weights in the forward, unprotected by noise; build it with max_norm=None"
        if layer.scale_grad_by_freq:
            return "scale_grad_by_freq couples the records of a batch; build it with scale_grad_by_freq=False"
        if layer.sparse:
            return "a noisy gradient is never sparse; build it with sparse=False"
        return None

    def forward(self, layer: nn.Embedding, inputs: Tensor) -> Tensor:
        return F.embedding(inputs, layer.weight.detach(), layer.padding_idx)

    def min_axes(self, layer: nn.Embedding) -> int:
        return 1

    def gradients(self, layer: nn.Embedding, calls: list[Call]) -> dict[str, PerSampleGradient]:
        ids = _joined([_tokens(call.inputs, 0) for call in calls])
        g = _joined([_tokens(call.output_grads, 1) for call in calls])
        return {"weight": RowScatter(ids, g, layer.num_embeddings, layer.padding_idx)}


class LayerNormRule:
    """``y = w * n(x) + b`` with n the normalisation over the last axes.

    ``dw_b = sum_t g_bt * n(x_bt)`` and ``db_b = sum_t g_bt``, elementwise.
    """

    parameters = frozenset({"weight", "bias"})

    def refusal(self, layer: nn.Module) -> str | None:
        return None

    def forward(self, layer: Any, inputs: Tensor) -> Tensor:
        return self._normalise(layer, inputs, _detached(layer.weight), _detached(layer.bias))

    def min_axes(self, layer: Any) -> int:
        return 1 + len(layer.normalized_shape)

    def gradients(self, layer: Any, calls: list[Call]) -> dict[str, PerSampleGradient]:
        axes = len(layer.normalized_shape)
        weight, bias = [], []
        for call in calls:
            x = _tokens(call.inputs, axes)
            normalised = self._normalise(layer, x.to(torch.promote_types(x.dtype, torch.float32)), None, None)
            g = _tokens(call.output_grads, axes).double()
            weight.append((g * normalised.double()).sum(1))
            bias.append(g.sum(1))
        return {
            "weight": Materialised(torch.stack(weight).sum(0)),
            "bias": Materialised(torch.stack(bias).sum(0)),
        }

    def _normalise(self, layer: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)


class RMSNormRule(LayerNormRule):
    """``y = w * x / rms(x)``: as :class:`LayerNormRule`, without a bias."""

    parameters = frozenset({"weight"})

    def forward(self, layer: Any, inputs: Tensor) -> Tensor:
        return self._normalise(layer, inputs, _detached(layer.weight), None)

    def _normalise(self, layer: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.rms_norm(x, layer.normalized_shape, weight, layer.eps)


SUPPORTED_LAYERS = "Linear, Embedding, LayerNorm, RMSNorm"

# Looked up by forward function: a subclass that keeps its parent's forward keeps its rule, and one that
# changes it has none.
_RULES: dict[object, LayerRule] = {
    nn.Linear.forward: LinearRule(),
    nn.Embedding.forward: EmbeddingRule(),
    nn.LayerNorm.forward: LayerNormRule(),
    nn.RMSNorm.forward: RMSNormRule(),
}


def rule_for(layer: nn.Module) -> LayerRule | None:
    """Return the rule for a layer, or ``None`` where its type has none."""
    return _RULES.get(type(layer).forward)


def _detached(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach()


def _joined(parts: list[Tensor]) -> Tensor:
    """Concatenate along the token axis; a single call, the usual case, is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _tokens(x: Tensor, trailing: int) -> Tensor:
    """Reshape ``[B, ..., *trailing axes]`` to ``[B, T, *trailing axes]``."""
    split = x.ndim - trailing
    return x.reshape(x.shape[0], math.prod(x.shape[1:split]), *x.shape[split:])
