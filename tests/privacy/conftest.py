# SPDX-License-Identifier: Apache-2.0
"""A small transformer with every supported layer, its per-record gradients by torch.func, and a specification."""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from wavedp.privacy import FlatClipping, GradientBook, PrivacySpec, clip_and_sum

sys.path.insert(0, str(Path(__file__).parent))  # engine_runs, optimizer_runs

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


@dataclass
class Measured:
    """What a book makes of a batch, against a loop over its records in float64."""

    error: float  # of the clipped sum in float64, relative
    single_error: float  # in float32
    largest: float  # contribution of one record to the sum, in units of C, in float32 and float64
    clipped: int  # records whose gradient was longer than C
    sums: dict[str, Tensor]


def measure(
    model: nn.Module,  # in float64
    losses: Callable[..., Tensor],  # (model, *batch) -> [B]
    batch: tuple[Tensor, ...],  # each [B, ...]
    *,
    sample_id: Tensor | None = None,  # [B]
    bound: float | None = None,  # the median record's gradient norm if None
) -> Measured:
    """Clip and sum by a GradientBook and by the definition, and look at every record's contribution alone."""
    records = torch.arange(len(batch[0])) if sample_id is None else torch.unique(sample_id, return_inverse=True)[1]
    rows_of = [torch.nonzero(records == record).flatten() for record in range(int(records.max()) + 1)]
    grads = loop_over_records(model, losses, batch, rows_of)
    norms = torch.stack([grad.reshape(len(grad), -1).square().sum(1) for grad in grads.values()]).sum(0).sqrt()
    bound = float(norms.median()) if bound is None else bound
    bound = bound if bound > 0 else 1.0
    clipping = FlatClipping(bound)
    expected = dict(zip(grads, clip_and_sum(list(grads.values()), bound)))

    largest = 0.0
    errors: list[float] = []
    sums: dict[str, Tensor] = {}
    for dtype in (torch.float32, torch.float64):
        subject = copy.deepcopy(model).to(dtype)
        data = tuple(part.to(dtype) if part.is_floating_point() else part for part in batch)
        with GradientBook(subject) as book:
            for rows in rows_of:
                own = torch.zeros(len(rows), dtype=torch.int64)
                alone = book.clipped_sums(
                    losses(subject, *(part[rows] for part in data)),
                    clipping,
                    sample_id=None if sample_id is None else own,
                )
                norm = torch.stack([total.double().square().sum() for total in alone.values()]).sum().sqrt()
                largest = max(largest, float(norm) / bound)
            sums = book.clipped_sums(losses(subject, *data), clipping, sample_id=sample_id)
        errors.append(distance(sums, expected))
    single, double = errors
    return Measured(double, single, largest, int((norms > bound).sum()), sums)


def distance(sums: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The distance of all sums from what is expected, relative to its length; a missing sum is zero."""
    assert set(sums) <= set(expected)
    scale = torch.stack([total.square().sum() for total in expected.values()]).sum().sqrt()
    parts = [(sums.get(name, torch.zeros_like(total)) - total).square().sum() for name, total in expected.items()]
    return float(torch.stack(parts).sum().sqrt() / (scale if scale > 0 else 1.0))


def loop_over_records(
    model: nn.Module, losses: Callable[..., Tensor], batch: tuple[Tensor, ...], rows_of: list[Tensor]
) -> dict[str, Tensor]:
    """Every record's gradient [records, *parameter], by one backward pass for each: the mean loss of its rows."""
    subject = copy.deepcopy(model)
    grads: dict[str, list[Tensor]] = {name: [] for name, p in subject.named_parameters() if p.requires_grad}
    for rows in rows_of:
        subject.zero_grad()
        losses_of_record = [losses(subject, *(part[row : row + 1] for part in batch)).sum() for row in rows.tolist()]
        torch.stack(losses_of_record).mean().backward()
        for name, parameter in subject.named_parameters():
            if parameter.requires_grad:
                grads[name].append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone())
    return {name: torch.stack(rows) for name, rows in grads.items()}


@pytest.fixture(scope="session")
def measured() -> Callable[..., Measured]:
    return measure
