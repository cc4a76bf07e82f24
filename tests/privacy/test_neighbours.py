# SPDX-License-Identifier: Apache-2.0
"""Neighbour replay: on random models and hostile batches, one record moves the clipped sum by at most C."""

import random

import pytest
import torch
from torch import Tensor, nn

from wavedp.privacy import FlatClipping, GradientBook, clip_and_sum


class RandomModel(nn.Module):
    def __init__(self, rng: random.Random, width: int, only_bias: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, width, padding_idx=rng.choice([None, 0]))
        self.mixing = nn.ModuleList()
        for _ in range(rng.randint(1, 3)):
            norm = rng.choice([nn.LayerNorm, nn.RMSNorm, None])
            if norm is not None:
                self.mixing.append(norm(width))
            self.mixing.append(nn.Linear(width, width, bias=only_bias or rng.random() < 0.5))
        self.twice = rng.random() < 0.5
        if only_bias:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(name.endswith("bias"))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        for _ in range(2 if self.twice else 1):
            for layer in self.mixing:
                h = layer(h)
        return h


def clipped(book: GradientBook, ids: Tensor, scales: Tensor, bound: float) -> list[Tensor]:
    losses = (book.model(ids).square().sum(-1) * scales).sum(1)
    sums = book.clipped_sums(losses, FlatClipping(bound)) if len(ids) else {}
    return [sums.get(n, torch.zeros_like(p)).double() for n, p in book.parameters.items()]


def distance(left: list[Tensor], right: list[Tensor]) -> float:
    return torch.stack([(a - b).norm() for a, b in zip(left, right)]).norm().item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_neighbour_replay(dtype: torch.dtype) -> None:
    rng = random.Random(2024)
    torch.manual_seed(2024)
    clipped_cases = 0
    for case in range(200):
        records, tokens, width = rng.randint(1, 6), rng.randint(1, 6), rng.choice([2, 5, 16])
        bound = 10.0 ** rng.uniform(-3, 3)
        model = RandomModel(rng, width, only_bias=rng.random() < 0.2).to(dtype)
        ids = torch.randint(0, 7, (records, tokens))
        scales = 10.0 ** torch.empty(records, tokens, dtype=dtype).uniform_(-4, 4)
        if rng.random() < 0.3:
            scales[rng.randrange(records), rng.randrange(tokens)] = rng.choice(
                [float("nan"), float("inf"), 0.0, 1e30, -1e30]
            )
        gone = rng.randrange(records)
        kept = [b for b in range(records) if b != gone]
        with GradientBook(model) as book:
            whole = clipped(book, ids, scales, bound)
            without = clipped(book, ids[kept], scales[kept], bound)
            alone = clipped(book, ids[gone : gone + 1], scales[gone : gone + 1], bound)
        assert all(torch.isfinite(total).all() for total in (*whole, *without, *alone)), case
        allowed = bound * (1 + 1e-6) if dtype == torch.float64 else FlatClipping(bound).sensitivity()
        assert distance(whole, without) <= allowed, case
        norm = distance(alone, [torch.zeros_like(total) for total in alone])
        assert norm <= bound * (1 + 1e-6), case
        clipped_cases += norm > 0.999 * bound
    assert clipped_cases > 60  # the bound was reached, so an overshoot would have shown


def test_reference_neighbour_replay() -> None:
    rng = random.Random(7)
    torch.manual_seed(7)
    for case in range(200):
        records = rng.randint(1, 8)
        shapes = [(records, *(rng.randint(1, 5) for _ in range(rng.randint(1, 2)))) for _ in range(3)]
        grads = [torch.randn(shape) * 10.0 ** rng.uniform(-4, 4) for shape in shapes]
        if rng.random() < 0.3:
            grads[rng.randrange(3)].view(-1)[0] = rng.choice([float("nan"), float("inf"), 1e38])
        bound = 10.0 ** rng.uniform(-3, 3)
        gone = rng.randrange(records)
        without = [torch.cat([g[:gone], g[gone + 1 :]]) for g in grads]
        moved = distance(
            [g.double() for g in clip_and_sum(grads, bound)], [g.double() for g in clip_and_sum(without, bound)]
        )
        assert moved <= bound * (1 + 1e-6), case
