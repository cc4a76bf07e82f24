# SPDX-License-Identifier: Apache-2.0
"""A model's weights as sampling reads them, once a call."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from wavedp.models.lora import effective_weight
from wavedp.models.positions import Rotation

if TYPE_CHECKING:
    from wavedp.models.autoregressive import AutoregressiveTransformer

Part = TypeVar("Part", "StepWeights", "Head")


@dataclass
class StepWeights:
    """A block's weights [in, out] as a step uses them; those behind a norm hold the norm's weight."""

    qkv: Tensor  # queries divided by sqrt(d)
    projection: Tensor
    mlp_in: Tensor
    mlp_in_bias: Tensor
    mlp_out: Tensor
    mlp_out_bias: Tensor
    attention_eps: Tensor  # [1, 1] float32
    mlp_eps: Tensor


@dataclass
class Head:
    """An output head, behind the last norm; and where the codes that it predicts are in the table of embeddings."""

    weight: Tensor
    bias: Tensor
    eps: Tensor
    offset: int


@dataclass
class Snapshot:
    """What the steps read: weights as they are at the start of a call, and the slots' positions and masks."""

    blocks: list[StepWeights]
    heads: list[Head]  # a scale each
    embeddings: Tensor  # of the tokens
    added: Tensor | None  # [length, D], to the slot that predicts a token
    masks: Tensor  # [slots, slots] float32, 0 where a slot may look and -inf elsewhere
    rotation: Rotation | None
    heads_count: int

    def tensors(self) -> list[Tensor]:
        found = [value for part in (*self.blocks, *self.heads) for value in vars(part).values()]
        found += [self.embeddings, self.added, self.masks, *(self.rotation or ())]
        return [value for value in found if isinstance(value, Tensor)]

    def copied(self) -> "Snapshot":
        """The same in memory of its own, which no model shares."""
        rotation = self.rotation
        if rotation is not None:
            cos_q, sin_q, cos_k, sin_k = (part.clone() for part in rotation)
            rotation = (cos_q, sin_q, cos_k, sin_k)
        return replace(
            self,
            blocks=[_copied(part) for part in self.blocks],
            heads=[_copied(part) for part in self.heads],
            embeddings=self.embeddings.clone(),
            added=None if self.added is None else self.added.clone(),
            masks=self.masks.clone(),
            rotation=rotation,
        )


def _copied(part: Part) -> Part:
    own: dict[str, Any] = {name: v.clone() for name, v in vars(part).items() if isinstance(v, Tensor)}
    return replace(part, **own)


def norm_eps(norm: nn.RMSNorm) -> float:
    return torch.finfo(norm.weight.dtype).eps if norm.eps is None else norm.eps


def snapshot(model: "AutoregressiveTransformer", slots: int, length: int, dtype: torch.dtype) -> Snapshot:
    """Reads ``model`` for sequences of ``slots`` slots and ``length`` tokens."""
    config = model.config
    device = model.class_embedding.weight.device

    def behind(norm: nn.RMSNorm, layer: nn.Module, scale: Tensor | None = None) -> Tensor:
        weight = effective_weight(layer) * norm.weight
        return (weight if scale is None else weight * scale[:, None]).t().to(dtype)

    def eps(norm: nn.RMSNorm) -> Tensor:
        return torch.full((1, 1), norm_eps(norm), device=device)

    scale = torch.ones(3 * config.width, device=device, dtype=model.class_embedding.weight.dtype)
    scale[: config.width] = (config.width // config.heads) ** -0.5
    blocks = []
    for block in model.blocks:
        part: Any = block.weights
        blocks.append(
            StepWeights(
                behind(part.attention_norm, part.qkv, scale),
                effective_weight(part.projection).t().to(dtype),
                behind(part.mlp_norm, part.mlp_in),
                part.mlp_in.bias.to(dtype),
                effective_weight(part.mlp_out).t().to(dtype),
                part.mlp_out.bias.float(),
                eps(part.attention_norm),
                eps(part.mlp_norm),
            )
        )
    heads = []
    for position in range(0, length, config.tokens_per_scale):
        head: Any = model.head(position)
        heads.append(Head(behind(model.norm, head), head.bias.to(dtype), eps(model.norm), model.offset(position)))
    added = model.positions(torch.arange(length, device=device))
    masks = torch.full((slots, slots), float("-inf"), device=device).triu(1)
    return Snapshot(
        blocks,
        heads,
        model.token_embedding.weight.float(),
        None if added is None else added.float(),
        masks.to(dtype),
        None if config.position != "rotary" else model.rotary(0, slots),
        config.heads,
    )
