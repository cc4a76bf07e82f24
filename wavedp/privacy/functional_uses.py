# SPDX-License-Identifier: Apache-2.0
"""Books parameters that a model's forward uses without calling their layer, as ``F.linear(h, embedding.weight)``."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from wavedp.privacy.layers import Call, LayerRule, Tap, linear_gradients, tokens
from wavedp.privacy.per_sample import OuterProducts, PerSampleGradient, RowScatter

Book = Callable[[LayerRule, dict[str, str], Tensor, Tensor], Tensor]
"""Puts a tap behind a use: the rule, its names for the parameters, the output, and the input that is kept."""

_TRANSPOSES = {Tensor.t, torch.t, Tensor.T.__get__, Tensor.mT.__get__}  # type: ignore[attr-defined]
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__}
_OF_INTEREST = {F.linear, F.embedding} | _PRODUCTS | _TRANSPOSES


class FunctionalUses(TorchFunctionMode):
    """While active, ``F.linear``, ``F.embedding`` and ``h @ W`` with a trainable parameter are booked.

    Any other use keeps its path to the parameter, whose ``.grad`` fills in the backward: that raises then.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], book: Book) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._book = book
        self._transposed: dict[int, tuple[Tensor, Tensor]] = {}  # of a transposed view: itself, its parameter

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _OF_INTEREST:
            return func(*args, **kwargs)
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func is F.embedding:
            return self._embedding(args, kwargs)
        if func in _PRODUCTS and len(args) == 2 and not kwargs:
            return self._product(func, *args)
        result = func(*args, **kwargs)
        if func in _TRANSPOSES and self._is_trainable(args[0]) and args[0].ndim == 2:
            self._transposed[id(result)] = (result, args[0])
        return result

    def _is_trainable(self, x: Any) -> bool:
        return id(x) in self._names

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        names = {key: self._names[id(p)] for key, p in (("weight", weight), ("bias", bias)) if self._is_trainable(p)}
        if not names:
            return F.linear(input, weight, bias)
        output = F.linear(
            input,
            weight.detach() if "weight" in names else weight,
            bias.detach() if bias is not None and "bias" in names else bias,
        )
        return self._book(_FunctionalLinear("weight" in names, "bias" in names), names, output, input)

    def _product(self, func: Any, left: Tensor, right: Tensor) -> Tensor:
        view, parameter = self._transposed.get(id(right), (None, None))
        if view is not None and parameter is not None:
            names = {"weight": self._names[id(parameter)]}
            return self._book(_FunctionalLinear(True, False), names, func(left, right.detach()), left)
        if self._is_trainable(right) and right.ndim == 2:
            names = {"weight": self._names[id(right)]}
            return self._book(_FunctionalProduct(), names, func(left, right.detach()), left)
        result: Tensor = func(left, right)
        return result

    def _embedding(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        given = dict(zip(("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq"), args))
        given |= kwargs
        ids, weight = given["input"], given["weight"]
        if not self._is_trainable(weight) or given.get("max_norm") is not None or given.get("scale_grad_by_freq"):
            result: Tensor = F.embedding(*args, **kwargs)
            return result
        padding = given.get("padding_idx")
        if padding is not None and padding < 0:
            padding += len(weight)
        rule = _FunctionalEmbedding(len(weight), padding)
        output = F.embedding(ids, weight.detach(), padding)
        return self._book(rule, {"weight": self._names[id(weight)]}, output, ids)


class _FunctionalRule:
    """What a functional use has in common with a layer's rule; it has run already when it is booked."""

    parameters = None
    covers_children = False
    axes = 2

    def refusal(self, layer: nn.Module) -> str | None:
        return None

    def forward(self, layer: nn.Module, tap: Tap, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a functional use is no layer")

    def min_axes(self, layer: nn.Module, use: str) -> int:
        return self.axes


@dataclass(frozen=True)
class _FunctionalLinear(_FunctionalRule):
    """``y = x W^T + b``, with what of it is trainable."""

    weight: bool
    bias: bool

    def gradients(self, layer: nn.Module, use: str, call: Call) -> dict[str, PerSampleGradient]:
        return linear_gradients(call, weight=self.weight, bias=self.bias)


@dataclass(frozen=True)
class _FunctionalProduct(_FunctionalRule):
    """``y = x W``: ``dW_b = sum_t x_bt g_bt^T``."""

    def gradients(self, layer: nn.Module, use: str, call: Call) -> dict[str, PerSampleGradient]:
        return {"weight": OuterProducts(tokens(call.output_grads, 1), tokens(call.inputs, 1))}


@dataclass(frozen=True)
class _FunctionalEmbedding(_FunctionalRule):
    """``y = W[ids]``."""

    rows: int
    padding_idx: int | None
    axes = 1

    def gradients(self, layer: nn.Module, use: str, call: Call) -> dict[str, PerSampleGradient]:
        ids, g = tokens(call.inputs, 0).long(), tokens(call.output_grads, 1)
        return {"weight": RowScatter(ids, g, self.rows, self.padding_idx)}
