# SPDX-License-Identifier: Apache-2.0
"""The ordinary training loop, private: exact at zero noise, its batches and its epsilon."""

import copy

import pytest
import torch
import torch.nn.functional as F
from engine_runs import (
    EXPECTED,
    RATE,
    RECORDS,
    TinyGPT,
    assert_close,
    clipped_by_loop,
    loader_of,
    moved,
    private,
    state,
    token_loss,
    tokens,
)
from torch import Tensor

from wavedp import PrivacyEngine
from wavedp.privacy import clip_and_sum


@pytest.mark.parametrize("tying", ["none", "module", "function", "product"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_step_is_the_clipped_sum(tying: str, reduction: str) -> None:
    torch.manual_seed(1)
    model = TinyGPT(tying).double()
    ids, targets = tokens(7)
    expected = clipped_by_loop(model, ids, targets)
    _, optimizer, _ = private(model, loss_reduction=reduction)
    for _ in range(3):  # a first look at the model's outputs, and steps without
        before = state(model)
        loss = token_loss(model, ids, targets)
        (loss if reduction == "mean" else loss * len(ids)).backward()
        optimizer.step()
        assert_close(moved(model, before), expected)
        model.load_state_dict({**model.state_dict(), **before})
        optimizer.zero_grad()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_model_trains_as_the_model(backend: str) -> None:
    ids, targets = tokens(6)
    trained = []
    for compiled in (False, True):
        torch.manual_seed(1)
        model = TinyGPT()
        _, optimizer, _ = private(model)
        run = torch.compile(model, backend=backend) if compiled else model
        for records in (6, 5, 6):
            token_loss(run, ids[:records], targets[:records]).backward()
            optimizer.step()
        trained.append(state(model))
    torch._dynamo.reset()
    for name, value in trained[0].items():
        assert (trained[1][name] - value).norm() <= 1e-5 * value.norm(), name


def test_bound_of_one_record_in_units_of_the_norm() -> None:
    """The 1.8 C of other libraries with tied weights."""
    for tying in ("none", "module", "function"):
        torch.manual_seed(1)
        model = TinyGPT(tying)
        ids, targets = tokens(1)
        _, optimizer, _ = private(model, max_grad_norm=1e-3)
        before = state(model)
        token_loss(model, ids, targets).backward()
        optimizer.step()
        total = torch.stack([value.double().norm() for value in moved(model, before).values()]).norm().item()
        assert 0.99e-3 < total <= 1e-3 * (1 + 1e-4)  # the difference of float32 weights rounds


def test_micro_batches_add_up_and_evaluation_may_come_between() -> None:
    model = TinyGPT().double()
    ids, targets = tokens(6)
    expected = clipped_by_loop(model, ids, targets)
    _, optimizer, _ = private(model)
    before = state(model)
    for part in (slice(0, 2), slice(2, 6)):
        model(ids[part])  # a forward without a backward
        with torch.no_grad():
            model.eval()(ids)
        optimizer.announce(torch.arange(6)[part])
        token_loss(model.train(), ids[part], targets[part]).backward()
    optimizer.step()
    assert_close(moved(model, before), expected)


def test_one_record_of_several_rows_is_clipped_once() -> None:
    model = TinyGPT().double()
    ids, targets = tokens(6)
    sample_id = torch.tensor([4, 9, 4, 9, 7, 9])
    rows: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for record in (4, 7, 9):
        own = sample_id == record
        model.zero_grad()
        token_loss(model, ids[own], targets[own]).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            rows[name].append(parameter.grad.clone())
    model.zero_grad()
    expected = dict(zip(rows, clip_and_sum([torch.stack(grads) for grads in rows.values()], 0.5)))
    for plain in (True, False):
        copied = copy.deepcopy(model)
        _, optimizer, _ = private(copied)
        before = state(copied)
        if plain:
            optimizer.set_sample_id(sample_id)
            token_loss(copied, ids, targets).backward()
        else:
            losses = F.cross_entropy(copied(ids).mT, targets, reduction="none").mean(1)
            optimizer.backward(losses, sample_id=sample_id)
        optimizer.step()
        assert_close(moved(copied, before), expected)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("physical", [None, 3])
def test_the_loader_yields_poisson_batches_and_each_is_stepped_once(physical: int | None, workers: int) -> None:
    model = TinyGPT()
    engine, optimizer, loader = private(
        model,
        data_loader=loader_of(num_workers=workers),
        physical_batch_size=physical,
        noise_multiplier=1.0,
        steps=12,
        delta=1e-3,
    )
    assert len(loader) == 4
    sizes, seen = [], []
    for _ in range(4):
        for ids, targets, index in loader:
            assert torch.equal(ids, tokens(RECORDS)[0][index])
            sizes.append(len(index))
            seen += index.tolist()
            optimizer.zero_grad()
            token_loss(model, ids, targets).backward()
            optimizer.step()
    assert optimizer.private.steps_charged == 12
    assert list(loader) == []
    assert 60 < len(seen) < 180  # 12 batches of 10 in expectation, at 5 standard deviations
    assert physical is None or max(sizes) <= physical
    statement = engine.privacy_statement()
    assert statement.epsilon == pytest.approx(engine.get_epsilon(1e-3), rel=1e-6)


def test_empty_batches_are_stepped_on_the_way() -> None:
    model = TinyGPT()
    _, optimizer, loader = private(
        model, data_loader=loader_of(3), sample_rate=0.02, noise_multiplier=1.0, steps=50, delta=1e-3
    )
    yielded = 0
    before = state(model)
    for ids, targets, _ in loader:
        yielded += 1
        token_loss(model, ids, targets).backward()
        optimizer.step()
    assert optimizer.private.steps_charged == 50
    assert yielded < 25
    assert not torch.equal(state(model)["mix.weight"], before["mix.weight"])


def test_epsilon_is_that_of_the_steps_taken() -> None:
    model = TinyGPT()
    engine, optimizer, loader = private(model, data_loader=loader_of(), noise_multiplier=2.0)
    assert engine.get_epsilon(1e-5) == 0.0
    for ids, targets, _ in loader:
        token_loss(model, ids, targets).backward()
        optimizer.step()
    from wavedp.privacy import epsilon

    steps = optimizer.private.steps_charged
    assert steps == 4
    assert engine.get_epsilon(1e-5) == epsilon(sample_rate=RATE, noise_multiplier=2.0, steps=steps, delta=1e-5)
    with pytest.raises(RuntimeError, match="steps="):
        engine.privacy_statement()


def test_noise_for_a_target_epsilon() -> None:
    model = TinyGPT()
    engine = PrivacyEngine()
    _, optimizer, _ = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.Adam(model.parameters()),
        data_loader=loader_of(),
        sample_rate=RATE,
        max_grad_norm=1.0,
        expected_batch_size=EXPECTED,
        target_epsilon=3.0,
        target_delta=1e-3,
        steps=20,
    )
    assert 2.97 <= optimizer.private.spec.epsilon() <= 3.0
