# SPDX-License-Identifier: Apache-2.0
"""Sampling token by token, with keys and values kept.

What a step costs on a CPU is mostly calls at batch 1, and memory at batch 1,000. So the weights are read once, with the
norms' weights multiplied into the layers that follow; keys and values lie in one tensor whose length is that of its
product with the query, which grows with the sequence by copying; and nothing else is allocated by length.
"""

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavedp.models.positions import Rotation, rotated
from wavedp.models.sampling import SamplingOptions, guided_logits, sample_tokens
from wavedp.models.snapshot import Head, Snapshot, snapshot

if TYPE_CHECKING:
    from wavedp.models.autoregressive import AutoregressiveTransformer

GROWTH = 16  # positions by which keys and values grow: a copy in 16 steps that read as much each


def normed(x: Tensor, eps: Tensor, dtype: torch.dtype) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis; its weight is in the layer that follows."""
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (x * torch.addcmul(eps, size, size, value=1.0 / x.shape[-1]).rsqrt_()).to(dtype)


def added_product(x: Tensor, a: Tensor, weight: Tensor) -> Tensor:
    """x + a weight, in the dtype of ``x``."""
    return torch.addmm(x, a, weight) if a.dtype == x.dtype else x + torch.mm(a, weight)


def decode(
    taken: Snapshot,
    x: Tensor,  # [R, D] float32, one slot of each row
    slot: int | Tensor,  # its number; a tensor [1] where it must not be a constant
    caches: list[Tensor],  # a block each: [2, R, heads, C, d], keys and values of the slots before
    mask: Tensor,  # [C]
    rotation: Rotation | None,  # each [d / 2], of this slot
) -> Tensor:
    """Runs all blocks on one slot and puts its keys and values into ``caches``; returns [R, D]."""
    R, D = x.shape
    heads = taken.heads_count
    for weights, cache in zip(taken.blocks, caches):
        dtype = weights.qkv.dtype
        qkv = torch.mm(normed(x, weights.attention_eps, dtype), weights.qkv).view(R, 3, heads, D // heads)
        if rotation is not None:
            cos_q, sin_q, cos_k, sin_k = (part.to(dtype) for part in rotation)
            q, k, v = qkv.unbind(1)
            qkv = torch.stack([rotated(q, cos_q, sin_q), rotated(k, cos_k, sin_k), v], dim=1)
        pair = qkv[:, 1:].transpose(0, 1)
        if isinstance(slot, int):
            cache[:, :, :, slot] = pair
        else:
            cache.index_copy_(3, slot, pair.unsqueeze(3))
        keys, values = cache.flatten(1, 2)  # [R heads, C, d]
        query = qkv[:, 0].reshape(R * heads, 1, D // heads)
        scores = torch.baddbmm(mask, query, keys.mT)
        attended = torch.bmm(scores.softmax(-1), values).view(R, D)
        x = added_product(x, attended, weights.projection)
        inner = F.gelu(torch.addmm(weights.mlp_in_bias, normed(x, weights.mlp_eps, dtype), weights.mlp_in))
        x = added_product(x + weights.mlp_out_bias, inner, weights.mlp_out)
    return x


def prefill(taken: Snapshot, x: Tensor, caches: list[Tensor], rotation: Rotation | None) -> None:
    """Puts keys and values of the first slots, ``x`` [R, P, D], into ``caches``."""
    R, P, D = x.shape
    heads = taken.heads_count
    for weights, cache in zip(taken.blocks, caches):
        dtype = weights.qkv.dtype
        qkv = (normed(x, weights.attention_eps, dtype) @ weights.qkv).view(R, P, 3, heads, D // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if rotation is not None:
            cos_q, sin_q, cos_k, sin_k = (part.to(dtype) for part in rotation)
            q, k = rotated(q, cos_q, sin_q), rotated(k, cos_k, sin_k)
        cache[0, :, :, :P], cache[1, :, :, :P] = k, v
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=P > 1, scale=1.0)
        x = x + attended.transpose(1, 2).flatten(2) @ weights.projection
        inner = F.gelu(normed(x, weights.mlp_eps, dtype) @ weights.mlp_in + weights.mlp_in_bias)
        x = x + weights.mlp_out_bias + inner @ weights.mlp_out


def step(
    taken: Snapshot,
    x: Tensor,
    slot: int | Tensor,
    caches: list[Tensor],
    mask: Tensor,
    rotation: Rotation | None,
    head: Head,
    uniforms: Tensor | None,
    temperature: float | Tensor,
    guidance_scale: float | Tensor | None,
    top_k: int | None,
    top_p: float | None,
) -> Tensor:
    """`decode`, then the token [B] that follows."""
    x = decode(taken, x, slot, caches, mask, rotation)
    logits = torch.addmm(head.bias, normed(x, head.eps, head.weight.dtype), head.weight).float()
    if guidance_scale is not None:
        logits = guided_logits(logits, guidance_scale)
    return sample_tokens(logits, uniforms, temperature, top_k, top_p)


@torch.no_grad()
def generate_tokens(
    model: "AutoregressiveTransformer",
    labels: Tensor,
    text: Tensor | None,
    text_mask: Tensor | None,
    length: int,
    options: SamplingOptions,
    generator: torch.Generator | None,
    dtype: torch.dtype | None,
    compiled: bool,
) -> Tensor:
    """What `AutoregressiveTransformer.generate` does once it has checked its arguments."""
    config = model.config
    device = labels.device
    guided, P = options.guided, config.text_length
    dtype = dtype or model.class_embedding.weight.dtype
    tokens = labels.new_empty((len(labels), length))
    uniforms = None if options.temperature == 0 else torch.rand(length, len(labels), generator=generator, device=device)
    if not len(labels):
        return tokens
    rows = torch.cat([labels, torch.full_like(labels, model.no_class)]) if guided else labels
    shape = (2, len(rows), config.heads, P + length, config.width // config.heads)
    runner = CompiledSteps.of(model, shape, dtype) if compiled else EagerSteps(model, shape, dtype)
    taken = runner.taken
    if P:
        prefix = model.text_prefix(len(labels), text, text_mask).float()
        if guided:
            prefix = torch.cat([prefix, model.text_prefix(len(labels), None, None).float()])
        runner.reach(P)
        prefill(taken, prefix, runner.caches, None if taken.rotation is None else model.rotary(0, P))
    x = model.class_embedding(rows).float()
    for t in range(length):
        if t > 0:
            previous = tokens[:, t - 1] + taken.heads[(t - 1) // config.tokens_per_scale].offset
            x = F.embedding(previous, taken.embeddings)
            x = torch.cat([x, x]) if guided else x
        if taken.added is not None:
            x = x + taken.added[t]
        head = taken.heads[t // config.tokens_per_scale]
        tokens[:, t] = runner.step(x, P + t, head, None if uniforms is None else uniforms[t], options)
    return tokens


class EagerSteps:
    """Steps by PyTorch's own operations; keys and values grow with the sequence."""

    def __init__(self, model: "AutoregressiveTransformer", shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.taken = snapshot(model, shape[3], shape[3] - model.config.text_length, dtype)
        weight = model.class_embedding.weight
        self.caches = [torch.zeros(*shape[:3], 0, shape[4], dtype=dtype, device=weight.device) for _ in model.blocks]
        self.most = shape[3]

    def reach(self, slots: int) -> None:
        """Makes room for ``slots`` slots."""
        held = self.caches[0].shape[3]
        if slots > held:
            missing = min(-(-slots // GROWTH) * GROWTH, self.most) - held
            self.caches = [F.pad(cache, (0, 0, 0, missing)) for cache in self.caches]

    def step(self, x: Tensor, slot: int, head: Head, uniforms: Tensor | None, options: SamplingOptions) -> Tensor:
        self.reach(slot + 1)
        taken = self.taken
        rotation = None if taken.rotation is None else _at(taken.rotation, slot)
        mask = taken.masks[slot, : self.caches[0].shape[3]]
        scale = options.guidance_scale if options.guided else None
        return step(
            taken, x, slot, self.caches, mask, rotation, head, uniforms, options.temperature, scale, options.top_k,
            options.top_p,
        )  # fmt: skip


class CompiledSteps:
    """Steps by torch.compile with constant shapes: on a GPU a CUDA graph, whose tensors must stay where they are.

    One is kept for each model, that of the last batch size; the weights are read anew at the start of every call.
    """

    kept: ClassVar["weakref.WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], CompiledSteps]]"] = (
        weakref.WeakKeyDictionary()
    )
    functions: ClassVar[dict[str, Callable[..., Tensor]]] = {}  # by kind of device

    def __init__(self, model: "AutoregressiveTransformer", shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.slots, self.length, self.dtype = shape[3], shape[3] - model.config.text_length, dtype
        device = model.class_embedding.weight.device
        self.taken = snapshot(model, self.slots, self.length, dtype).copied()
        self.caches = [torch.zeros(shape, dtype=dtype, device=device) for _ in model.blocks]
        self.numbers = torch.arange(self.slots, device=device)
        kind = device.type
        if kind not in self.functions:
            mode = "reduce-overhead" if kind == "cuda" else None
            self.functions[kind] = torch.compile(step, dynamic=False, fullgraph=True, mode=mode)
        self.function = self.functions[kind]
        if kind == "cuda":
            for tensor in (*self.taken.tensors(), *self.caches):
                torch._dynamo.mark_static_address(tensor)

    @classmethod
    def of(cls, model: "AutoregressiveTransformer", shape: tuple[int, ...], dtype: torch.dtype) -> "CompiledSteps":
        key = (shape, dtype, model.class_embedding.weight.device, model.config)
        found = cls.kept.get(model)
        if found is None or found[0] != key:
            found = cls.kept[model] = (key, cls(model, shape, dtype))
        else:
            found[1].read(model)
        return found[1]

    def read(self, model: "AutoregressiveTransformer") -> None:
        """Takes the weights as they are now, into the same memory."""
        now = snapshot(model, self.slots, self.length, self.dtype)
        for held, new in zip(self.taken.tensors(), now.tensors(), strict=True):
            held.copy_(new)

    def reach(self, slots: int) -> None:
        """All slots have room."""

    def step(self, x: Tensor, slot: int, head: Head, uniforms: Tensor | None, options: SamplingOptions) -> Tensor:
        taken = self.taken
        number = self.numbers[slot : slot + 1]
        rotation = None if taken.rotation is None else _at(taken.rotation, slot)
        if x.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        scale = torch.tensor(options.guidance_scale, device=x.device) if options.guided else None
        temperature = torch.tensor(options.temperature, device=x.device)
        return self.function(
            taken, x, number, self.caches, taken.masks[slot], rotation, head, uniforms, temperature, scale,
            options.top_k, options.top_p,
        )  # fmt: skip


def _at(rotation: Rotation, slot: int) -> Rotation:
    cos_q, sin_q, cos_k, sin_k = (part[slot] for part in rotation)
    return cos_q, sin_q, cos_k, sin_k
