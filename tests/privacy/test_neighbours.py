# SPDX-License-Identifier: Apache-2.0
"""Neighbour replay: on random models and hostile batches, one record moves the clipped sum by at most C."""

import random

import pytest
import torch
from torch import Tensor, nn

from wavedp.privacy import FlatClipping, GradientBook, clip_and_sum
from wavedp.privacy.clipping import SUM_ROUNDING_ALLOWANCE


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


def moved_by_the_first_record(layer: nn.Linear, x: Tensor, scales: Tensor, chunk: int) -> float:
    """How far a logical batch's clipped sum moves when its first record goes and every chunk shifts by one."""
    with GradientBook(layer) as book:

        def total(rows: Tensor, weights: Tensor) -> list[Tensor]:
            sums: dict[str, Tensor] = {}
            for part, factor in zip(rows.split(chunk), weights.split(chunk)):
                losses = (layer(part) * factor).flatten(1).sum(1)
                for name, value in book.clipped_sums(losses, FlatClipping(1.0)).items():
                    if name in sums:
                        sums[name] += value
                    else:
                        sums[name] = value
            return list(sums.values())

        return distance(total(x, scales), total(x[1:], scales[1:]))


@pytest.mark.parametrize(("records", "chunk"), [(2048, 2), (65536, 1024), (65536, 65536)])
def test_large_logical_batches_of_aligned_records(records: int, chunk: int) -> None:
    torch.manual_seed(5)
    x, scales = 1 + 0.01 * torch.randn(records, 8), 100 + torch.randn(records, 8)
    layer = nn.Linear(8, 8, bias=False)
    assert moved_by_the_first_record(layer, x, scales, chunk) <= 1 + SUM_ROUNDING_ALLOWANCE


def test_small_records_behind_a_large_one() -> None:
    """The worst order for a float32 sum: what comes after the large record would be lost, and only with it there."""
    records = 1 + 2**13
    scales = torch.full((records, 1), 2.0**-25)
    scales[0] = 1.0
    layer = nn.Linear(1, 1, bias=False)
    assert moved_by_the_first_record(layer, torch.ones(records, 1), scales, records) <= 1 + 1e-6


def test_very_long_records() -> None:
    torch.manual_seed(6)
    x, scales = 1 + 0.01 * torch.randn(3, 200_000, 4), 1 + 0.01 * torch.randn(3, 200_000, 4)
    layer = nn.Linear(4, 4, bias=False)
    assert moved_by_the_first_record(layer, x, scales, 3) <= 1 + 1e-6
