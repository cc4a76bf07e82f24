# SPDX-License-Identifier: Apache-2.0
"""Paths between records are found: at once, when they open later, inside checkpoints, behind another loss."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wavedp.privacy import FlatClipping, GradientBook, clip_and_sum
from wavedp.privacy.probe import IndependenceProbe, Place

Make = Callable[..., Any]


class SharedPositions(nn.Module):
    def __init__(self, leading: bool = False) -> None:
        super().__init__()
        self.position = nn.Embedding(4, 3)
        self.leading = leading

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 3]
        ids = torch.arange(x.shape[1])
        return (x * self.position(ids[None] if self.leading else ids)).sum((1, 2))


def test_shared_position_ids_are_refused_when_as_many_as_records() -> None:
    model = SharedPositions()
    with GradientBook(model) as book, pytest.raises(RuntimeError, match="expand"):
        book.clipped_sums(model(torch.randn(4, 4, 3)), FlatClipping(1.0))


@pytest.mark.parametrize("leading", [False, True])
def test_shared_position_ids_are_each_records_own(leading: bool) -> None:
    """[T] as in nanoGPT and [1, T] as in transformers, where T is not the number of records."""
    model = SharedPositions(leading)
    x = torch.randn(4, 3, 3)
    grads = []
    for row in x:
        model.zero_grad()
        model(row[None]).sum().backward()
        assert model.position.weight.grad is not None
        grads.append(model.position.weight.grad)
        model.position.weight.grad = None
    (expected,) = clip_and_sum([torch.stack(grads)], 0.7)
    with GradientBook(model) as book:
        sums = book.clipped_sums(model(x), FlatClipping(0.7))
    assert torch.allclose(sums["position.weight"], expected, rtol=1e-5)


@pytest.mark.parametrize("first_half_silent", [False, True])
def test_records_that_mix_are_refused(linear: nn.Linear, first_half_silent: bool) -> None:
    with GradientBook(linear) as book:
        out = linear(torch.randn(4, 3))
        losses = (out - out.mean(0)).square().sum(1)
        if first_half_silent:
            losses = losses * torch.tensor([0.0, 0.0, 1.0, 1.0])
        with pytest.raises(RuntimeError, match="depend on rows of other records"):
            book.clipped_sums(losses, FlatClipping(1.0))


@pytest.mark.parametrize("order", [[1, 0, 2, 3, 4], [0, 1, 3, 2, 4], [0, 1, 4, 3, 2]], ids=str)
def test_losses_in_another_order_than_the_rows_are_refused(linear: nn.Linear, order: list[int]) -> None:
    """Every pair of records is told apart, neighbours included."""
    with GradientBook(linear) as book, pytest.raises(RuntimeError, match="order of the losses"):
        book.clipped_sums(linear(torch.randn(5, 3)).sum(1)[order], FlatClipping(1.0))


def test_one_record_looking_at_one_other_is_refused(linear: nn.Linear) -> None:
    for reader, read in itertools.permutations(range(5), 2):
        with GradientBook(linear) as book:
            own = linear(torch.randn(5, 3)).sum(1)
            look = torch.zeros(5)
            look[reader] = 0.1
            with pytest.raises(RuntimeError, match="depend on rows of other records"):
                book.clipped_sums(own + look * own[read], FlatClipping(1.0))


def test_mixing_behind_a_gate_is_found_when_the_gate_opens() -> None:
    """A zero-initialised gate hides a path in the first step; its layer stays unverified until it is seen."""
    model = nn.ModuleDict({"plain": nn.Linear(3, 2), "gated": nn.Linear(3, 2)})
    x = torch.randn(4, 3)
    with GradientBook(model) as book:
        for gate in (0.0, 0.0, 0.5):
            mixed = model["gated"](x)
            losses = (model["plain"](x) + gate * (mixed - mixed.mean(0))).square().sum(1)
            if gate == 0.0:
                assert book.clipped_sums(losses, FlatClipping(1.0))["gated.weight"].abs().max() == 0.0
            else:
                with pytest.raises(RuntimeError, match="'gated'"):
                    book.clipped_sums(losses, FlatClipping(1.0))


def squares(x: Tensor) -> Tensor:
    return x.square().flatten(1).sum(1)


class Mixing(nn.Module):
    """Two layers with the batch's mean taken between them, optionally in a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def body(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.second(torch.tanh(h - h.mean(0)))

    def forward(self, x: Tensor, **settings: bool) -> Tensor:
        return squares(checkpoint(self.body, x.clone().requires_grad_(), **settings))


@pytest.mark.parametrize("reentrant", [False, True])
def test_records_that_mix_in_a_checkpoint_are_refused(reentrant: bool) -> None:
    model = Mixing()
    with GradientBook(model) as book:
        for _ in range(3):  # a refused backward proves nothing about the next
            losses = model(torch.randn(5, 3), use_reentrant=reentrant)
            with pytest.raises(RuntimeError, match="depend on rows of other records"):
                book.clipped_sums(losses, FlatClipping(1.0))


def test_a_model_that_is_all_in_a_reentrant_checkpoint_is_exact() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    with GradientBook(model) as book:
        for seed in range(5):
            torch.manual_seed(seed)
            expected = book.clipped_sums(squares(model(x)), FlatClipping(0.5))
            torch.manual_seed(seed)
            sums = book.clipped_sums(squares(checkpoint(model, x, use_reentrant=True)), FlatClipping(0.5))
            assert sums.keys() == expected.keys()
            for name, total in expected.items():
                assert torch.allclose(sums[name], total, rtol=1e-12)


def test_a_layer_that_appears_late_in_a_reentrant_checkpoint_is_refused_once() -> None:
    model = nn.ModuleDict({"early": nn.Linear(3, 3), "late": nn.Linear(3, 3)})
    x = torch.randn(4, 3, requires_grad=True)

    def losses(late: bool) -> Tensor:
        def body(h: Tensor) -> Tensor:
            return model["late"](model["early"](h)) if late else model["early"](h)

        return squares(checkpoint(body, x, use_reentrant=True))

    with GradientBook(model) as book:
        for _ in range(2):
            book.clipped_sums(losses(late=False), FlatClipping(1.0))
        with pytest.raises(RuntimeError, match=r"\['late'\] ran first inside .* use_reentrant=False"):
            book.clipped_sums(losses(late=True), FlatClipping(1.0))
        assert "late.weight" in book.clipped_sums(losses(late=True), FlatClipping(1.0))


def test_two_forwards_before_two_backwards_are_both_looked_at() -> None:
    model = nn.ModuleDict({"one": nn.Linear(3, 3), "two": nn.Linear(3, 3)})
    x = torch.randn(4, 3)
    with GradientBook(model) as book:
        for _ in range(3):
            first, second = squares(model["one"](x)), model["two"](x)
            second = squares(second - second.mean(0))
            book.clipped_sums(first, FlatClipping(1.0))
            with pytest.raises(RuntimeError, match=r"'two'.*depend on rows of other records"):
                book.clipped_sums(second, FlatClipping(1.0))


def test_a_residual_branch_that_starts_at_zero_is_looked_at_again() -> None:
    """``h + z(h - mean(h))`` mixes only once z has moved; every layer got a gradient before that."""
    torch.manual_seed(0)
    first, branch, x = nn.Linear(3, 3), nn.Linear(3, 3), torch.randn(6, 3)
    nn.init.zeros_(branch.weight)
    with GradientBook(nn.ModuleList([first, branch])) as book:

        def losses() -> Tensor:
            h = torch.tanh(first(x))
            return squares(h + branch(h - h.mean(0)) - x)

        sums = book.clipped_sums(losses(), FlatClipping(1.0))
        with torch.no_grad():
            branch.weight -= sums["1.weight"].float()
        with pytest.raises(RuntimeError, match="depend on rows of other records"):
            book.clipped_sums(losses(), FlatClipping(1.0))


@pytest.mark.parametrize("before", [1, 2, 3, 6])
def test_another_kind_of_loss_is_looked_at(linear: nn.Linear, before: int) -> None:
    x = torch.randn(6, 3)
    with GradientBook(linear) as book:
        for _ in range(before):
            book.clipped_sums(squares(linear(x)), FlatClipping(1.0))
        normal = F.normalize(linear(x))
        contrast = (normal @ normal.mT).log_softmax(1).diagonal().square()[:, None].flatten(1).sum(1)
        with pytest.raises(RuntimeError, match="depend on rows of other records"):
            book.clipped_sums(contrast, FlatClipping(1.0))


def test_looks_come_at_powers_of_two(linear: nn.Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    step, looks = 0, []

    def look(*_: object, full: bool) -> set[Place]:
        looks.append((step, full))
        return set()

    monkeypatch.setattr(GradientBook, "_look", look)
    with GradientBook(linear) as book:
        book._probe._verified.add(("", "", 2))
        while step < 17:
            step += 1
            book.clipped_sums(squares(linear(torch.randn(4, 3))), FlatClipping(1.0))
    assert looks == [(step, False) for step in (1, 2, 4, 8, 16)]


@pytest.mark.parametrize("records", [2, 3, 8, 13])
def test_parts_of_a_full_look_tell_any_two_records_apart(records: int) -> None:
    probe = IndependenceProbe()
    parts = torch.stack(list(probe.parts(records, full=True)))
    assert all((parts[:, i] & ~parts[:, j]).any() for i, j in itertools.permutations(range(records), 2))
    halves = [tuple(next(iter(probe.parts(records, full=False))).tolist()) for _ in range(200)]
    assert all(0 < sum(half) < records for half in halves)
    assert len(set(halves)) > 1
    assert len(list(probe.parts(records, full=False))) == 2


def test_a_second_backward_is_refused_after_a_look_too(linear: nn.Linear) -> None:
    with GradientBook(linear) as book:
        out = linear(torch.randn(4, 3))
        losses = squares(out)
        book.clipped_sums(losses, FlatClipping(1.0))
        with pytest.raises(RuntimeError, match="second time"):
            book.clipped_sums(losses, FlatClipping(1.0))
        with pytest.raises(RuntimeError, match="second time"):
            book.clipped_sums(losses * 2, FlatClipping(1.0))
