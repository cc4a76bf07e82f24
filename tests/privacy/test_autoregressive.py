# SPDX-License-Identifier: Apache-2.0
"""The pipeline's model with every option: its clipped sums are those of a loop over the records."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wavedp.models import AutoregressiveConfig, AutoregressiveTransformer
from wavedp.models.lora import LoRALinear, add_lora

OPTIONS: dict[str, dict[str, Any]] = {
    "learned": {},
    "factorised": {"position": "factorised"},
    "rotary": {"position": "rotary"},
    "a head for each scale": {"per_scale_heads": True},
    "text": {"text_width": 5, "text_length": 3},
    "rotary, text, heads, LoRA": {
        "position": "rotary", "text_width": 5, "text_length": 3, "per_scale_heads": True, "lora": 2,
    },
}  # fmt: skip


def make(lora: int | None = None, **options: Any) -> AutoregressiveTransformer:
    torch.manual_seed(0)
    model = AutoregressiveTransformer(AutoregressiveConfig(3, 4, 3, 10, 7, width=16, depth=2, heads=2, **options))
    if lora:
        add_lora(model, lora)
        for module in model.modules():
            if isinstance(module, LoRALinear):  # B starts at zero, and A then has no gradient
                nn.init.normal_(module.lora_B.weight, std=0.3)
        model.text_projection.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.eps = torch.finfo(torch.float32).eps  # by default it depends on the dtype
    return model.double().eval()  # dropout of class and text is random


def losses(model: AutoregressiveTransformer, tokens: Tensor, labels: Tensor, *text: Tensor) -> Tensor:
    return model.loss(tokens, labels, *text)


@pytest.mark.parametrize("name", OPTIONS)
def test_clipped_sums_are_those_of_a_loop(measured: Callable[..., Any], name: str):
    model = make(**OPTIONS[name])
    tokens, labels = torch.randint(7, (6, 12)), torch.randint(4, (6,))
    batch: tuple[Tensor, ...] = (tokens, labels)
    if model.config.text_length:
        batch += (torch.randn(6, 2, 5, dtype=torch.float64), torch.rand(6, 2) < 0.7)
    found = measured(model, losses, batch)
    assert set(found.sums) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert found.error < 1e-13
    assert found.single_error < 1e-5
    assert found.largest <= 1 + 1e-12
    assert 2 <= found.clipped <= 4
