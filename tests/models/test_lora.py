# SPDX-License-Identifier: Apache-2.0
"""LoRA: what is adapted and trained, and that merging gives the same function under the old names."""

import pytest
import torch
from torch import nn

from wavedp.models import AutoregressiveConfig, AutoregressiveTransformer
from wavedp.models.lora import LoRALinear, add_lora, merge_lora


def make() -> AutoregressiveTransformer:
    torch.manual_seed(0)
    return AutoregressiveTransformer(AutoregressiveConfig(3, 4, 1, 10, 10, width=16, depth=2, heads=2)).eval()


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def test_adapters_start_at_nothing_and_merge_into_what_they_do():
    model, tokens, labels = make(), torch.randint(10, (5, 4)), torch.randint(3, (5,))
    names, before = list(model.state_dict()), model.loss(tokens, labels)
    assert len(add_lora(model, 3, alpha=6.0)) == 8
    torch.testing.assert_close(model.loss(tokens, labels), before)
    for module in adapters(model).values():
        nn.init.normal_(module.lora_B.weight)
    adapted = model.loss(tokens, labels)
    assert not torch.allclose(adapted, before, atol=1e-2)
    drawn = model.generate(labels, temperature=0)
    layer = adapters(model)["blocks.1.weights.qkv"]
    expected = layer.base.weight + 2.0 * layer.lora_B.weight @ layer.lora_A.weight
    merge_lora(model)
    torch.testing.assert_close(model.get_submodule("blocks.1.weights.qkv").weight, expected)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model.loss(tokens, labels), adapted)
    assert torch.equal(model.generate(labels, temperature=0), drawn)


def test_adapters_alone_are_trained():
    model = make()
    assert add_lora(model, 2, targets=r".*\.qkv|approximation_head") == [
        "blocks.0.weights.qkv",
        "blocks.1.weights.qkv",
        "approximation_head",
    ]
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in trained)
    assert sum(trained.values()) == 2 * 2 * (16 + 48) + 2 * (16 + 10)
    held = adapters(model)
    add_lora(model, 2, targets=r".*\.qkv|approximation_head")  # again: nothing new
    assert adapters(model) == held


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank of LoRA"),
        ({"rank": 1, "alpha": -1.0}, "alpha of LoRA"),
        ({"rank": 1, "targets": "nothing"}, "matches no linear layer; names look like blocks.0"),
        ({"rank": 1, "targets": "("}, "not a regular expression"),
        ({"rank": 11, "targets": "approximation_head"}, "more than layer"),
    ],
)
def test_what_cannot_be_adapted_is_refused(arguments: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        add_lora(make(), **arguments)  # type: ignore[arg-type]


def test_other_adapters_are_refused():
    model = make()
    add_lora(model, 2)
    with pytest.raises(ValueError, match="other LoRA adapters"):
        add_lora(model, 3)
