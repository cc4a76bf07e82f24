# SPDX-License-Identifier: Apache-2.0
"""What stands behind a layer's forward: who sees its calls, and what the walk over modules finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from wavedp.privacy import FlatClipping, GradientBook
from wavedp.privacy.coverage import _modules_of, trainable_parameters


class Seen(TorchFunctionMode):
    """Counts calls of F.linear."""

    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is F.linear
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
def test_a_mode_of_the_users_sees_into_layers(inside: bool) -> None:
    class Model(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            if not inside:
                return super().forward(x)
            with mode:
                return super().forward(x)

    mode, model = Seen(), Model(nn.Linear(3, 4), nn.Linear(4, 2))
    with GradientBook(model) as book:
        if inside:
            losses = model(torch.randn(5, 3)).sum(1)
        else:
            with mode:
                losses = model(torch.randn(5, 3)).sum(1)
        sums = book.clipped_sums(losses, FlatClipping(1.0))
    assert mode.calls == 2
    assert len(sums) == 4


def test_a_mode_around_a_layer_alone_sees_it() -> None:
    mode, layer = Seen(), nn.Linear(3, 4)
    model = nn.Sequential(layer)
    with GradientBook(model) as book, mode:
        book.clipped_sums(layer(torch.randn(5, 3)).sum(1), FlatClipping(1.0))
    assert mode.calls == 1


class Hooked(nn.Module):
    """Two layers, around which hooks use the first one's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.first.weight
        before = self.second.register_forward_pre_hook(lambda _, args: (F.linear(args[0], weight),))
        after = self.first.register_forward_hook(lambda _, args, output: output + F.linear(args[0], weight))
        with before, after:
            out: Tensor = self.second(self.first(x))
        return out


def test_hooks_of_a_layer_may_use_the_weights_of_others(measured: Callable[..., Any]) -> None:
    """A hook runs outside of the layer's own forward, in which functional uses are not looked for."""
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    result = measured(Hooked().double(), lambda model, x: model(x).square().flatten(1).sum(1), (x,))
    assert result.error < 1e-9
    assert result.largest <= 1 + 1e-6


def test_modules_are_those_that_torch_names() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict(
        {
            "a": nn.Sequential(shared, nn.ModuleList([nn.LayerNorm(2), shared])),
            "b": nn.ModuleDict({"again": shared, "own": nn.Embedding(3, 2)}),
        }
    )
    model.register_module("none", None)
    model.add_module("self", model["a"])
    model["b"]["own"].weight.requires_grad_(False)
    model["b"].register_parameter("tied", shared.weight)
    assert _modules_of(model) == list(model.named_modules())
    expected = {name: one for name, one in model.named_parameters() if one.requires_grad}
    assert list(trainable_parameters(model)) == list(expected)
    assert all(one is expected[name] for name, one in trainable_parameters(model).items())
