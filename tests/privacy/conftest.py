# SPDX-License-Identifier: Apache-2.0
"""A small transformer with every supported layer, its per-record gradients by torch.func, and a specification."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from wavedp.privacy import PrivacySpec

VOCABULARY, WIDTH, TOKENS, CLASSES = 13, 8, 6, 4


class TinyTransformer(nn.Module):
    """Padding ids, class labels [B], ids [B, T], a layer called twice, an in-place activation, a bare norm."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.position = nn.Embedding(TOKENS, WIDTH)
        self.label = nn.Embedding(CLASSES, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.rms = nn.RMSNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.twice = nn.Linear(WIDTH, WIDTH)
        self.bare = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        h = self.token(ids) + self.position(positions) + self.label(labels)[:, None]
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        h = h + self.out((q @ k.mT / WIDTH**0.5).softmax(-1) @ v)
        h = h + self.down(F.relu(self.up(self.rms(h)), inplace=True))
        h = self.twice(torch.tanh(self.twice(self.norm(h))))
        return self.head(self.bare(h))


def next_token_losses(model: nn.Module, ids: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    logits = model(ids, labels)
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)


def token_batch(records: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (records, TOKENS), generator=generator)
    labels = torch.randint(0, CLASSES, (records,), generator=generator)
    targets = torch.randint(0, VOCABULARY, (records, TOKENS), generator=generator)
    return ids, labels, targets


def reference_grad_samples(model: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Per-record gradients of the trainable parameters by vmap(grad), each [B, *parameter]."""
    trainable = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], ids: Tensor, label: Tensor, target: Tensor) -> Tensor:
        logits = functional_call(model, parameters, (ids[None], label[None]))[0]
        return F.cross_entropy(logits, target)

    return vmap(grad(loss), (None, 0, 0, 0))(trainable, *batch)


@pytest.fixture
def transformer() -> Callable[..., nn.Module]:
    def make(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return TinyTransformer().to(dtype)

    return make


@pytest.fixture
def losses() -> Callable[..., Tensor]:
    return next_token_losses


@pytest.fixture
def batch() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return token_batch


@pytest.fixture
def grad_samples() -> Callable[..., dict[str, Tensor]]:
    return reference_grad_samples


@pytest.fixture
def spec() -> Callable[..., PrivacySpec]:
    def make(**changes: Any) -> PrivacySpec:
        fields: dict[str, Any] = {
            "sample_rate": 0.1,
            "steps": 20,
            "noise_multiplier": 1.0,
            "max_grad_norm": 1.0,
            "expected_batch_size": 8.0,
            "delta": 1e-3,
            "dataset_size_bound": 100,
        }
        return PrivacySpec(**{**fields, **changes})

    return make


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)
