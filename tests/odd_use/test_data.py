# SPDX-License-Identifier: Apache-2.0
"""Loaders and data in odd hands: what is yielded is of the batch that is charged, whoever draws, stops or resumes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import (
    EXPECTED,
    SAMPLED_RECORDS,
    assert_close,
    clipped_by_loop,
    inputs,
    losses_of,
    net,
    noisy,
    sampled,
    sgd,
    specification,
)
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from wavedp import PrivacyEngine
from wavedp.errors import InvalidValueError, StateError
from wavedp.privacy import (
    LedgerError,
    PrivacyLedger,
    PrivacyStatement,
    PrivateLoader,
    physical_batches,
)


class Indexed(Dataset[tuple[Tensor, int]]):
    """Record i is row i of the inputs, with its index; ``failing`` records raise once."""

    def __init__(self, failing: int | None = None) -> None:
        self.x, self.failing = inputs(SAMPLED_RECORDS), failing

    def __len__(self) -> int:
        return SAMPLED_RECORDS

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == self.failing:
            self.failing = None
            raise OSError("a file that cannot be read")
        return self.x[index], index


class Announced:
    """A run whose loaders are checked: what they yield is what is announced, and is of the batch drawn last."""

    def __init__(self, workers: int = 0, physical: int = 3, data: Dataset[Any] | None = None, **changes: Any) -> None:
        self.model = net()
        self.private, self.sampler = sampled(self.model, noisy(**changes), loss_reduction="mean")
        self.source = DataLoader(Indexed() if data is None else data, batch_size=4, num_workers=workers)
        self.physical = physical

    def loader(self) -> PrivateLoader:
        return PrivateLoader(self.source, self.private, self.physical)

    def train(self, loader: PrivateLoader) -> Iterator[set[int]]:
        """The records of every logical batch of one iteration, each stepped."""
        records: set[int] = set()
        for x, index in loader:
            assert set(index.tolist()) == self.private._batch._announced
            losses_of(self.model, x).mean().backward()
            assert not records & set(index.tolist())
            records |= set(index.tolist())
            if loader.at_end_of_batch:
                self.private.step()
                assert self.sampler.last_batch is not None
                assert records == set(self.sampler.last_batch.tolist())
                yield records
                records = set()


@pytest.mark.parametrize("workers", [0, 2])
def test_two_loaders_of_one_run_take_turns(workers: int) -> None:
    """Workers of the one have prepared batches that the other went on to step: these must not come again."""
    run = Announced(workers)
    loaders = run.loader(), run.loader()
    steps = 0
    for loader in itertools.islice(itertools.cycle(loaders), 4):
        steps += len(list(run.train(loader)))
    assert run.private.steps_charged == run.sampler.drawn >= steps > 10
    run.private.check_regular()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_drawn_beside_the_loader(workers: int) -> None:
    run = Announced(workers)
    loader = run.loader()
    for _ in range(3):
        list(run.train(loader))
        for chunk in physical_batches(next(iter(run.sampler)), 3):
            run.private.backward(losses_of(run.model, inputs(SAMPLED_RECORDS)[chunk]), records=chunk)
        run.private.step()
    run.private.check_regular()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_iteration_left_standing_in_a_batch(workers: int) -> None:
    """Its half of a batch must not be taken for the next one's, and it cannot go on."""
    run = Announced(workers, sample_rate=0.5, physical=2)
    loader = run.loader()
    standing = iter(loader)
    x, _ = next(standing)
    losses_of(run.model, x).mean().backward()
    run.private.discard()
    assert len(list(run.train(loader))) == 2
    with pytest.raises(StateError, match="another batch was drawn while this iteration"):
        next(standing)
    with pytest.raises(StateError, match="discarded or failed"):
        PrivacyStatement.from_run(run.private)


def train_on(run: Announced, loader: PrivateLoader) -> None:
    while run.private.steps_left:
        list(run.train(loader))


def test_an_error_of_the_data_set_in_the_middle_of_a_batch() -> None:
    """A caller that goes on with the next batch is told; after discard() the loader is right again."""
    run = Announced(data=Indexed(failing=7), sample_rate=0.5, physical=1)
    loader = run.loader()
    with pytest.raises(OSError, match="cannot be read"):
        train_on(run, loader)
    with pytest.raises((StateError, InvalidValueError), match=r"2 batches were drawn|comes twice"):
        list(run.train(loader))
    run.private.discard()
    assert len(list(run.train(loader))) >= 1


def test_gradients_accumulated_by_hand() -> None:
    """A loss over N micro-batches divided by N: the logical batch is clipped as such, once for every record."""
    model = net()
    engine = PrivacyEngine()
    x = inputs(SAMPLED_RECORDS)
    _, optimizer, loader = engine.make_private_with_spec(
        spec=specification(),
        module=model,
        optimizer=sgd(model),
        data_loader=DataLoader(TensorDataset(x, torch.arange(SAMPLED_RECORDS)), batch_size=4),
        physical_batch_size=3,
        without_privacy=True,
    )
    assert loader is not None
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    records: list[int] = []
    for part, index in loader:
        (losses_of(model, part).mean() / 4).backward()
        records += index.tolist()
        ended = loader.at_end_of_batch
        optimizer.step()  # does nothing before the end of the logical batch
        optimizer.zero_grad()
        if ended:
            break
    moved = {name: (before[name] - p.detach()) * EXPECTED for name, p in model.named_parameters()}
    assert len(records) > 3
    assert_close(moved, clipped_by_loop(net(), x[records], scale=0.25))


def train_without_steps(run: Announced) -> None:
    for x, _ in run.loader():
        losses_of(run.model, x).mean().backward()


def test_logical_batches_accumulated_by_hand() -> None:
    """Every fourth batch stepped: the three before it would have been skipped."""
    run = Announced(physical=SAMPLED_RECORDS)
    with pytest.raises((StateError, InvalidValueError), match=r"2 batches were drawn and not stepped|comes twice"):
        train_without_steps(run)
    assert torch.equal(run.model.first.weight, net().first.weight)


def test_an_exception_between_micro_batches() -> None:
    """The loop goes on with the next batch: what it adds would be of another one."""
    run = Announced(physical=2, sample_rate=0.5)
    batches = iter(run.sampler)
    parts = list(physical_batches(next(batches), 2))
    run.private.backward(losses_of(run.model, inputs(SAMPLED_RECORDS)[parts[0]]), records=parts[0])
    following = next(batches)[:2]
    for call in (
        lambda: run.private.backward(losses_of(run.model, inputs(SAMPLED_RECORDS)[following]), records=following),
        run.private.step,
    ):
        with pytest.raises(StateError, match="2 batches were drawn"):
            call()


# Other data when a run is resumed


def change_length(x: Tensor) -> Tensor:
    return x[:25]


def change_order(x: Tensor) -> Tensor:
    return x.flip(0)


def change_content(x: Tensor) -> Tensor:
    return x * 3.0


@pytest.mark.parametrize("change", [change_length, change_order, change_content])
def test_other_data_on_resume_is_charged_and_clipped_alike(change: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    """A record has part in every step at most once, with at most C, whichever data set a step draws from: both halves
    of the run together cost what the plan says. The batches are those of the data that are there."""
    spec = specification(steps=8)
    model = net()
    for x, steps in ((inputs(SAMPLED_RECORDS), 4), (change(inputs(SAMPLED_RECORDS)), 4)):
        with (
            PrivacyLedger(tmp_path / "ledger", spec) as ledger,
            sampled(model, spec, len(x), ledger=ledger, reserve_steps=1, without_privacy=True)[0] as private,
        ):
            sampler = private.sampler
            assert sampler is not None
            for indices in itertools.islice(sampler, steps):
                assert len(indices) == 0 or int(indices.max()) < len(x)
                before = {name: p.detach().clone() for name, p in model.named_parameters()}
                expected = clipped_by_loop(model, x[indices]) if len(indices) else {}
                private.backward(losses_of(model, x[indices]), records=indices)
                private.step()
                moved = {name: (before[name] - p.detach()) * EXPECTED for name, p in model.named_parameters()}
                assert_close(moved, expected) if expected else None
    with PrivacyLedger(tmp_path / "ledger", spec) as ledger:
        assert (ledger.charged, ledger.remaining) == (8, 0)


def test_more_data_than_the_bound_on_resume(tmp_path: Path) -> None:
    """delta was chosen for the bound; the ledger's specification cannot be changed to fit."""
    spec = noisy()
    with PrivacyLedger(tmp_path / "ledger", spec) as ledger:
        ledger.reserve(1)
        with pytest.raises(InvalidValueError, match="more records than dataset_size_bound"):
            sampled(net(), spec, 101, ledger=ledger)
    with pytest.raises(LedgerError, match="another specification"):
        PrivacyLedger(tmp_path / "ledger", noisy(dataset_size_bound=200))


def test_other_labels_do_not_draw_a_second_histogram(tmp_path: Path) -> None:
    from wavedp.privacy import release_label_histogram

    spec = noisy(label_noise_multiplier=10.0)
    with PrivacyLedger(tmp_path / "ledger", spec) as ledger:
        release_label_histogram(torch.zeros(9, dtype=torch.int64), 2, spec, ledger=ledger)
    with (
        PrivacyLedger(tmp_path / "ledger", spec) as ledger,
        pytest.raises(StateError, match="is not drawn again"),
    ):
        release_label_histogram(torch.ones(9, dtype=torch.int64), 2, spec, ledger=ledger)
