# SPDX-License-Identifier: Apache-2.0
"""How a layer type is run and differentiated per record, and the rules of Linear, Embedding, LayerNorm, RMSNorm.

A rule runs its layer with detached parameters, so that autograd never computes their gradients, and puts a tap
behind every use of them. In the backward the tap books the use's input and output gradient, which the rule turns
into per-record gradients, one form per parameter.
"""

import math
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavedp.ops import per_sample as ops
from wavedp.privacy.per_sample import Materialised, OuterProducts, PerSampleGradient, RowScatter


class Call(NamedTuple):
    """One use of a layer's parameters that the loss reached."""

    inputs: Tensor  # [B, ...], what the parameters were applied to
    output_grads: Tensor  # [B, ...], the loss's gradient with respect to the result


class Tap(Protocol):
    """Puts a tap behind one use of a layer's parameters."""

    def __call__(
        self,
        output: Tensor,  # computed from detached parameters; returned, with the tap behind it
        inputs: Tensor,  # kept for the backward
        use: str = "",  # tells apart the uses that one layer makes in one call
    ) -> Tensor: ...


class LayerRule(Protocol):
    """How one layer type is run and differentiated per record. ``layer`` is always of the rule's own type."""

    @property
    def parameters(self) -> frozenset[str] | None:
        """Names of the parameters that the rule differentiates; a layer that trains others has no rule. None: all."""

    @property
    def covers_children(self) -> bool:
        """Whether the rule stands for the layer's whole subtree; names are then dotted, as in named_parameters."""

    def refusal(self, layer: Any) -> str | None:
        """Return why this layer's settings are not supported and what to do, or ``None``."""

    def forward(self, layer: Any, tap: Tap, *args: Any, **kwargs: Any) -> Any:
        """Run the layer with detached parameters, with a tap behind each use of them."""

    def min_axes(self, layer: Any, use: str) -> int:
        """Return how many axes an input has when it has a record axis and no token axis."""

    def gradients(self, layer: Any, use: str, call: Call) -> dict[str, PerSampleGradient]:
        """Return the per-record gradients of one use, by parameter name; uses of one parameter add up."""


class LinearRule:
    """``y = x W^T + b`` on ``[B, ..., d]``: ``dW_b = sum_t g_bt x_bt^T`` and ``db_b = sum_t g_bt``."""

    parameters = frozenset({"weight", "bias"})
    covers_children = False

    def refusal(self, layer: nn.Linear) -> str | None:
        return None

    def forward(self, layer: nn.Linear, tap: Tap, input: Tensor) -> Tensor:
        return tap(F.linear(input, layer.weight.detach(), detached(layer.bias)), input)

    def min_axes(self, layer: nn.Linear, use: str) -> int:
        return 2

    def gradients(self, layer: nn.Linear, use: str, call: Call) -> dict[str, PerSampleGradient]:
        bias = layer.bias is not None and layer.bias.requires_grad
        return linear_gradients(call, weight=layer.weight.requires_grad, bias=bias)


def linear_gradients(call: Call, *, weight: bool, bias: bool) -> dict[str, PerSampleGradient]:
    """The gradients of ``y = x W^T + b``: the norms of the weight's, and the bias's, from one pass."""
    a, g = tokens(call.inputs, 1), tokens(call.output_grads, 1)
    if not weight:
        return {"bias": Materialised(g.sum(1, dtype=torch.float64))} if bias else {}
    products = OuterProducts(a, g)
    if not bias:
        return {"weight": products}
    return {"weight": products, "bias": Materialised(products.measure(bias=True))}


class EmbeddingRule:
    """``y = W[ids]``: row v of ``dW_b`` is the sum of ``g_bt`` over the tokens with ``id_bt = v``."""

    parameters = frozenset({"weight"})
    covers_children = False

    def refusal(self, layer: nn.Embedding) -> str | None:
        if layer.max_norm is not None:
            return "max_norm rewrites weights in the forward, unprotected by noise; build it with max_norm=None"
        if layer.scale_grad_by_freq:
            return "scale_grad_by_freq couples the records of a batch; build it with scale_grad_by_freq=False"
        if layer.sparse:
            return "a noisy gradient is never sparse; build it with sparse=False"
        return None

    def forward(self, layer: nn.Embedding, tap: Tap, input: Tensor) -> Tensor:
        return tap(F.embedding(input, layer.weight.detach(), layer.padding_idx), input)

    def min_axes(self, layer: nn.Embedding, use: str) -> int:
        return 1

    def gradients(self, layer: nn.Embedding, use: str, call: Call) -> dict[str, PerSampleGradient]:
        ids, g = tokens(call.inputs, 0).long(), tokens(call.output_grads, 1)
        return {"weight": RowScatter(ids, g, layer.num_embeddings, layer.padding_idx)}


class LayerNormRule:
    """``y = w * n(x) + b`` with n the normalisation over the last axes.

    ``dw_b = sum_t g_bt * n(x_bt)`` and ``db_b = sum_t g_bt``, elementwise.
    """

    parameters = frozenset({"weight", "bias"})
    covers_children = False
    _subtract_mean = True

    def refusal(self, layer: nn.Module) -> str | None:
        return None

    def forward(self, layer: nn.LayerNorm, tap: Tap, input: Tensor) -> Tensor:
        weight, bias = detached(layer.weight), detached(layer.bias)
        return tap(F.layer_norm(input, layer.normalized_shape, weight, bias, layer.eps), input)

    def min_axes(self, layer: Any, use: str) -> int:
        return 1 + len(layer.normalized_shape)

    def gradients(self, layer: Any, use: str, call: Call) -> dict[str, PerSampleGradient]:
        shape = tuple(layer.normalized_shape)
        x, g = tokens(call.inputs, len(shape)), tokens(call.output_grads, len(shape))
        if len(shape) > 1:
            x, g = x.flatten(2), g.flatten(2)
        eps = layer.eps
        if eps is None:  # of RMSNorm's arithmetic
            eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
        weight, bias = ops.norm_grads(x, g, eps, self._subtract_mean)
        found = (
            {"weight": weight, "bias": bias} if self._subtract_mean and layer.bias is not None else {"weight": weight}
        )
        if len(shape) > 1:
            found = {name: grads.unflatten(1, shape) for name, grads in found.items()}
        return {name: Materialised(grads) for name, grads in found.items()}


class RMSNormRule(LayerNormRule):
    """``y = w * x / rms(x)``: as :class:`LayerNormRule`, without a bias."""

    parameters = frozenset({"weight"})
    _subtract_mean = False

    def forward(self, layer: Any, tap: Tap, x: Tensor) -> Tensor:
        return tap(F.rms_norm(x, layer.normalized_shape, detached(layer.weight), layer.eps), x)


def detached(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach()


def tokens(x: Tensor, trailing: int) -> Tensor:
    """Reshape ``[B, ..., *trailing axes]`` to ``[B, T, *trailing axes]``."""
    split = x.ndim - trailing
    if split == 2:
        return x
    return x.reshape(x.shape[0], math.prod(x.shape[1:split]), *x.shape[split:])
