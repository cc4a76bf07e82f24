# SPDX-License-Identifier: Apache-2.0
"""A linear layer under the private optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from wavedp.privacy import (
    PrivacySpec,
    PrivateOptimizer,
)

MakeSpec = Callable[..., PrivacySpec]


def linear(inputs: int = 3, outputs: int = 2) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs)


def private_sgd(model: nn.Module, spec: PrivacySpec, **options: Any) -> PrivateOptimizer:
    return PrivateOptimizer(model, torch.optim.SGD(model.parameters(), lr=1.0), spec, **options)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()])
