# SPDX-License-Identifier: Apache-2.0
"""The moving average of a public model's weights."""

import torch
from torch import Tensor, nn

from wavedp.errors import InvalidValueError


class WeightAverage:
    """An exponential average of a model's parameters. The first steps count less, as min(decay, (1 + t) / (10 + t)),
    so that the start is forgotten; buffers are not averaged."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """After ``step``, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, p in model.named_parameters():
            self.values[name].lerp_(p, 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            p.copy_(self.values[name])

    def restore(self, values: dict[str, Tensor]) -> None:
        if set(values) != set(self.values):
            raise InvalidValueError("it holds no average of these weights; ema_decay was 0, or the model another")
        for name, value in values.items():
            self.values[name].copy_(value)
