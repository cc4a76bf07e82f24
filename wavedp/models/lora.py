# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters beside frozen linear layers (LoRA, arXiv 2106.09685), and how they become part of them."""

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from wavedp.errors import InvalidValueError

TARGETS = r"blocks\..*\.(qkv|projection|mlp_in|mlp_out)"
"""Names of the layers that are adapted if nothing else is said: all of every block."""


class LoRALinear(nn.Module):
    """``base(x) + alpha / rank * B(A(x))`` with ``base`` frozen. B starts at zero, so that nothing changes at first.

    Both factors are plain linear layers, whose gradients are booked record by record as any other's.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        device, dtype = base.weight.device, base.weight.dtype
        self.base = base.requires_grad_(False)
        self.rank, self.alpha = rank, alpha
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device, dtype=dtype)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device, dtype=dtype)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        adapted: Tensor = self.base(x) + self.lora_B(self.lora_A(x)) * (self.alpha / self.rank)
        return adapted

    def weight(self) -> Tensor:
        """[out, in], what a single linear layer would have."""
        return self.base.weight + (self.alpha / self.rank) * (self.lora_B.weight @ self.lora_A.weight)


def effective_weight(layer: nn.Module) -> Tensor:
    """The weight of a linear layer, adapted or not."""
    if isinstance(layer, LoRALinear):
        return layer.weight()
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight


def add_lora(model: nn.Module, rank: int, *, alpha: float | None = None, targets: str = TARGETS) -> list[str]:
    """Puts adapters of ``rank`` beside the linear layers whose name matches ``targets`` as a whole, and freezes all
    else; returns their names. ``alpha``: of the factor alpha / rank (default: the rank, a factor of 1).

    A model that has the same adapters keeps them. Raises ValueError where nothing matches or others are there.
    """
    if type(rank) is not int or rank < 1:
        raise InvalidValueError(f"the rank of LoRA must be a positive integer, got {rank!r}")
    alpha = float(rank) if alpha is None else float(alpha)
    if not (math.isfinite(alpha) and alpha > 0):
        raise InvalidValueError(f"alpha of LoRA must be positive, got {alpha!r}")
    try:
        wanted = re.compile(targets)
    except re.error as error:
        raise InvalidValueError(f"{targets!r} for LoRA is not a regular expression: {error}") from error
    there = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[0] not in there
    ]
    names = [name for name in [*there, *linear] if wanted.fullmatch(name)]
    if not names:
        raise InvalidValueError(
            f"{targets!r} for LoRA matches no linear layer; names look like {', '.join(linear[:4])}"
        )
    if there and (set(there) != set(names) or any((m.rank, m.alpha) != (rank, alpha) for m in there.values())):
        raise InvalidValueError("the model has other LoRA adapters already: merge them first")
    model.requires_grad_(False)
    for name in names:
        if name in there:
            there[name].lora_A.requires_grad_(True)
            there[name].lora_B.requires_grad_(True)
            continue
        parent, _, child = name.rpartition(".")
        base: Any = model.get_submodule(name)
        if min(base.in_features, base.out_features) < rank:
            raise InvalidValueError(f"a LoRA rank of {rank} is more than layer {name!r} has: {base}")
        setattr(model.get_submodule(parent), child, LoRALinear(base, rank, alpha))
    return names


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Adds every adapter to its layer and takes it away: the model has the layers and names that it had before."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            module.base.weight.copy_(module.weight())
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base)
