# SPDX-License-Identifier: Apache-2.0
"""Which parameters the private stage trains: all, the last blocks, the heads, those of a pattern, or LoRA adapters."""

import re

import torch

from wavedp.errors import InvalidValueError
from wavedp.models import AutoregressiveTransformer
from wavedp.models.lora import add_lora

HEADS = r"(approximation_head|detail_head|detail_heads\.\d+)\."
EVERYTHING = (".*", "all")


def trainable_pattern(model: AutoregressiveTransformer, trainable: str) -> str:
    """The regular expression that ``trainable`` stands for: 'all'; 'heads', the output heads; 'last-K-blocks', the last
    K blocks, the last norm and the heads; anything else is an expression itself."""
    if trainable == "all":
        return ".*"
    if trainable == "heads":
        return HEADS
    found = re.fullmatch(r"last-(\d{1,6})-blocks?", trainable)
    if found is None:
        return trainable
    count, depth = int(found[1]), len(model.blocks)
    if not 1 <= count <= depth:
        raise InvalidValueError(f"trainable={trainable!r}: the model has {depth} blocks")
    blocks = "|".join(str(i) for i in range(depth - count, depth))
    return rf"blocks\.({blocks})\.|norm\.|{HEADS}"


def freeze_all_but(model: torch.nn.Module, pattern: str) -> None:
    """Trains the parameters whose name matches ``pattern`` from its start, and freezes the others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_compiled(pattern).match(name) is not None)
    if not any(p.requires_grad for p in model.parameters()):
        names = ", ".join(name for name, _ in list(model.named_parameters())[:4])
        raise InvalidValueError(f"trainable={pattern!r} matches no parameter; names look like {names}")


def choose_trainable(
    model: AutoregressiveTransformer,
    trainable: str,
    *,
    lora_rank: int | None = None,
    lora_alpha: float | None = None,
    lora_targets: str | None = None,
) -> int:
    """Freezes what is not trained, and puts LoRA adapters in where ``lora_rank`` is given; returns how many scalars are
    trained. Beside adapters, ``trainable`` names what else is: nothing where it says everything, its default.

    A second call with the same choice changes nothing.
    """
    pattern = trainable_pattern(model, trainable)
    if lora_rank is None:
        if lora_alpha is not None or lora_targets is not None:
            raise InvalidValueError("lora_alpha and lora_targets are about LoRA: give lora_rank")
        freeze_all_but(model, pattern)
    else:
        adapted = add_lora(
            model, lora_rank, alpha=lora_alpha, **({} if lora_targets is None else {"targets": lora_targets})
        )
        if trainable not in EVERYTHING:
            inside = tuple(f"{name}." for name in adapted)
            for name, parameter in model.named_parameters():
                if _compiled(pattern).match(name) and not name.startswith(inside):
                    parameter.requires_grad_(True)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _compiled(pattern: str) -> "re.Pattern[str]":
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InvalidValueError(f"trainable={pattern!r} is not a regular expression: {error}") from error
