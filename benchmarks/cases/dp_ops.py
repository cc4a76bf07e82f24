# SPDX-License-Identifier: Apache-2.0
"""The functions of private training alone: norms without gradients, clipped sums, weight gradients of scaled rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import wavedp
from wavedp.benchmarks.registry import Case, Provider, Size
from wavedp.benchmarks.transforms import is_compiled

BOUND = 1.0
# Sums of thousands of terms in float32, in an order that is each provider's own.
TOLERANCE = 2e-5

# [B, T, d, p]: a layer of d inputs and p outputs on T tokens of B records, and the head of a wide vocabulary.
LAYERS = {
    "quick": [Size((3, 4, 8, 5))],
    "cpu": [Size((16, 128, 256, 1024)), Size((16, 64, 512, 8192)), Size((256, 16, 64, 256)), Size((8, 1024, 64, 64))],
    "cuda": [
        Size((16, 256, 768, 3072)),
        Size((16, 256, 768, 3072), torch.bfloat16, ours_only=True),
        Size((8, 2048, 1024, 1024)),
        Size((8, 2048, 1024, 1024), torch.bfloat16, ours_only=True),
    ],
}
# [B, T, V, d]: a table of V rows of d, T tokens of B records.
TABLES = {
    "quick": [Size((3, 4, 6, 5))],
    "cpu": [Size((16, 128, 1024, 256)), Size((16, 64, 8192, 512))],
    "cuda": [Size((16, 256, 50257, 768)), Size((16, 256, 50257, 768), torch.bfloat16, ours_only=True)],
}
# [B, p, d]: gradients of a Linear layer, its bias included.
GRADIENTS = {
    "quick": [Size((3, 5, 8))],
    "cpu": [Size((16, 1024, 256)), Size((256, 256, 64))],
    "cuda": [Size((64, 1024, 1024)), Size((64, 1024, 1024), torch.bfloat16, ours_only=True)],
}


def float32(dtype: torch.dtype) -> torch.dtype:
    """Norms and sums are float32 for half precision too."""
    return torch.float32


def noise(size: Size, device: torch.device, *shapes: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(*shape, generator=generator, device=device).to(size.dtype) for shape in shapes]


def fresh(function: Callable[..., object], floor: str) -> Provider:
    """A provider of one tensor or of several, in float32."""

    def unpack(result: Tensor | Sequence[Tensor]) -> list[Tensor]:
        return [x.float() for x in ([result] if isinstance(result, Tensor) else result)]

    return Provider(lambda inputs, out: partial(function, *inputs), unpack, floor)


def layer_inputs(size: Size, device: torch.device) -> tuple[Tensor, ...]:
    """Activations [B, T, d] and output gradients [B, T, p]."""
    B, T, d, p = size.shape
    return tuple(noise(size, device, (B, T, d), (B, T, p)))


def expected_norms(size: Size, a: Tensor, g: Tensor) -> list[Tensor]:
    return [torch.stack([(y.mT @ x).square().sum() for x, y in zip(a, g)])]


def gram(a: Tensor, g: Tensor) -> Tensor:
    return (torch.bmm(a, a.mT) * torch.bmm(g, g.mT)).sum((1, 2))


def instantiated(a: Tensor, g: Tensor) -> Tensor:
    return torch.einsum("btp,btd->bpd", g, a).square().sum((1, 2))


def ghost_norm(size: Size, device: torch.device) -> Mapping[str, Provider]:
    ours = {"wavedp": fresh(wavedp.ghost_norm, "sum")}
    if size.ours_only:
        return ours
    return ours | {"bmm, T x T Gram": fresh(gram, "sum"), "einsum, B x P gradients": fresh(instantiated, "sum")}


def embedding_inputs(size: Size, device: torch.device) -> tuple[Tensor, ...]:
    """Ids [B, T] and output gradients [B, T, d]."""
    B, T, V, d = size.shape
    (g,) = noise(size, device, (B, T, d))
    return torch.randint(V, (B, T), generator=torch.Generator(device).manual_seed(1), device=device), g


def added(V: int, ids: Tensor, g: Tensor) -> Tensor:
    """Every record's own gradient of the table."""
    B = len(ids)
    rows = (ids + V * torch.arange(B, device=ids.device)[:, None]).flatten()
    table = g.new_zeros(B * V, g.shape[-1]).index_add_(0, rows, g.flatten(0, 1))
    return table.view(B, -1).square().sum(1)


def one_hot(V: int, ids: Tensor, g: Tensor) -> Tensor:
    return torch.bmm(F.one_hot(ids, V).to(g.dtype).mT, g).square().sum((1, 2))


def same_id(ids: Tensor, g: Tensor) -> Tensor:
    return torch.where(ids[:, :, None] == ids[:, None, :], torch.bmm(g, g.mT), 0).sum((1, 2))


def expected_embedding_norms(size: Size, ids: Tensor, g: Tensor) -> list[Tensor]:
    return [torch.cat([added(size.shape[2], i[None], x[None]) for i, x in zip(ids.long(), g)])]


def embedding_grad_norm(size: Size, device: torch.device) -> Mapping[str, Provider]:
    V = size.shape[2]
    ours = {"wavedp": fresh(wavedp.embedding_grad_norm, "sum")}
    if size.ours_only:
        return ours
    return ours | {
        "index_add, B x P gradients": fresh(partial(added, V), "sum"),
        "one-hot": fresh(partial(one_hot, V), "sum"),
        "bmm, T x T mask": fresh(same_id, "sum"),
    }


def gradient_inputs(size: Size, device: torch.device) -> tuple[Tensor, ...]:
    """Gradients of a weight and of a bias, whose records' norms lie on both sides of the bound."""
    B, p, d = size.shape
    weight, bias = noise(size, device, (B, p, d), (B, p))
    scale = torch.linspace(0.5, 2, B, device=device, dtype=torch.float64) * BOUND / (p * d + p) ** 0.5
    return (weight * scale[:, None, None]).to(size.dtype), (bias * scale[:, None]).to(size.dtype)


def clipped(*grads: Tensor) -> list[Tensor]:
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads]).norm(dim=0)
    factors = (BOUND / norms).clamp(max=1)
    return [torch.tensordot(factors, g, dims=1) for g in grads]


def clip_and_sum(size: Size, device: torch.device) -> Mapping[str, Provider]:
    def call(*grads: Tensor) -> list[Tensor]:
        return list(wavedp.clip_and_sum(list(grads), BOUND))

    ours = {"wavedp": fresh(call, "sum")}
    if size.ours_only:
        return ours
    if is_compiled(device):
        ours["torch.compile"] = fresh(torch.compile(clipped, dynamic=False), "sum")
    return ours | {"eager": fresh(clipped, "sum")}


def scaled_inputs(size: Size, device: torch.device) -> tuple[Tensor, ...]:
    """Output gradients [B, T, p], activations [B, T, d], factors [B]."""
    a, g = layer_inputs(size, device)
    return g, a, torch.linspace(0.1, 1.0, len(g), device=device)


def scaled(g: Tensor, a: Tensor, factors: Tensor) -> Tensor:
    return (g * factors[:, None, None]).flatten(0, 1).mT @ a.flatten(0, 1)


def scaled_weight_grad(size: Size, device: torch.device) -> Mapping[str, Provider]:
    ours = {"wavedp": fresh(wavedp.scaled_weight_grad, "mm")}
    return ours if size.ours_only else ours | {"scale, then mm": fresh(scaled, "mm")}


SUM = ("sum",)
CASES = [
    Case(
        "ghost_norm", layer_inputs, expected_norms, ghost_norm, LAYERS, ("sum", "mm of all records"), float32, TOLERANCE
    ),
    Case(
        "embedding_grad_norm",
        embedding_inputs,
        expected_embedding_norms,
        embedding_grad_norm,
        TABLES,
        SUM,
        float32,
        TOLERANCE,
    ),
    Case(
        "clip_and_sum",
        gradient_inputs,
        lambda size, *grads: clipped(*grads),
        clip_and_sum,
        GRADIENTS,
        SUM,
        float32,
        TOLERANCE,
    ),
    Case(
        "scaled_weight_grad",
        scaled_inputs,
        lambda size, g, a, factors: [scaled(g, a, factors)],
        scaled_weight_grad,
        LAYERS,
        ("mm",),
        float32,
        TOLERANCE,
    ),
]
