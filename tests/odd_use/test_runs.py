# SPDX-License-Identifier: Apache-2.0
"""Odd use of the parts of a run together: several engines, copies, loaders, samplers, other data when it resumes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import (
    SAMPLED_RECORDS,
    Bench,
    assert_close,
    inputs,
    losses_of,
    net,
    noisy,
    sampled,
    sgd,
    specification,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from wavedp import PrivacyEngine
from wavedp.errors import InvalidTypeError, InvalidValueError, StateError
from wavedp.functional import NoiseKey
from wavedp.privacy import (
    PoissonSampler,
    PrivacyLedger,
    PrivateOptimizer,
)

# Engines and modules


def test_two_engines_on_one_module() -> None:
    bench = Bench()
    for module in (bench.model, bench.model.first, nn.Sequential(bench.model)):
        with pytest.raises(InvalidValueError, match="a forward of its own"):
            PrivateOptimizer(module, sgd(module), noisy())
    bench.backward()
    bench.optimizer.step()
    bench.check_exact()
    bench.private.close()
    again = Bench(bench.model)
    again.backward()
    again.optimizer.step()
    again.check_exact()


def test_one_engine_on_two_modules() -> None:
    bench = Bench()
    other = net()
    with pytest.raises(StateError, match="serves another run already"):
        bench.engine.make_private_with_spec(spec=noisy(), module=other, optimizer=sgd(other), data_loader=None)
    losses_of(other, bench.x).mean().backward()  # it was left alone
    assert other.first.weight.grad is not None


def test_engines_whose_modules_share_a_parameter() -> None:
    """What one releases is a write to the other's model: its own noise does not cover that."""
    first, second = net(), net(1)
    second.first.weight = first.first.weight
    one, two = Bench(first), Bench(second)
    one.backward()
    one.optimizer.step()
    one.check_exact()
    two.remember()
    two.backward()
    with pytest.raises(StateError, match=r"'first\.weight' of the model changed"):
        two.optimizer.step()
    assert torch.equal(second.second.weight, two.before["second.weight"])


def test_a_graph_through_two_private_modules() -> None:
    """A generator and its critic: each book takes its own module's part, once, and clips it."""
    bodies = [net(seed) for seed in (0, 1)]
    head = nn.Linear(2, 3).double()
    benches = [Bench(body) for body in bodies]
    x = inputs()

    def through(generator: nn.Module, critic: nn.Module, data: Tensor) -> Tensor:
        return losses_of(critic, torch.tanh(head(generator(data))))

    through(*bodies, x).mean().backward()
    for bench in benches:
        bench.optimizer.step()
    rows: dict[str, list[Tensor]] = {}
    originals = [net(seed) for seed in (0, 1)]
    for i in range(len(x)):
        for original in originals:
            original.zero_grad()
        through(*originals, x[i : i + 1]).sum().backward()
        for which, original in enumerate(originals):
            for name, p in original.named_parameters():
                if p.requires_grad:
                    rows.setdefault(f"{which}.{name}", []).append(
                        torch.zeros_like(p) if p.grad is None else p.grad.clone()
                    )
    from wavedp.privacy import clip_and_sum

    for which, bench in enumerate(benches):
        own = {name[2:]: torch.stack(grads) for name, grads in rows.items() if name.startswith(str(which))}
        assert_close(bench.moved(), dict(zip(own, clip_and_sum(list(own.values()), 0.5))))


def test_a_graph_of_two_modules_and_losses_of_one() -> None:
    """The other's book was told nothing of the losses: it takes them as a plain backward or refuses them."""
    one = net()
    private = PrivateOptimizer(one, sgd(one), noisy())
    two = net(1)
    other = PrivateOptimizer(two, sgd(two), noisy())
    head = nn.Linear(2, 3).double()
    with pytest.raises(StateError, match="outside of private clipping"):
        private.backward(losses_of(two, head(one(inputs()))))
    assert not other.pending
    with pytest.raises(StateError, match="discard"):
        private.step()


def test_data_parallel_is_refused() -> None:
    model = nn.DataParallel(net())
    with pytest.raises(InvalidValueError, match="pass the model itself"):
        PrivateOptimizer(model, sgd(model), noisy())


def test_a_scaler_around_the_wrapped_optimizer() -> None:
    """It finds no gradients to look at, which torch refuses; were it to step, the wrapped optimizer would."""
    bench = Bench()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(losses_of(bench.model, bench.x).mean()).backward()
    assert bench.inner is not None
    with pytest.raises(AssertionError, match="No inf checks"):
        scaler.step(bench.inner)
    assert torch.equal(bench.model.first.weight, bench.before["first.weight"])


def test_forwards_booked_apart_and_used_together() -> None:
    """Two backwards save memory where a layer ran once: one graph of before and one of now are two uses."""
    model = net()
    private = PrivateOptimizer(model, sgd(model), specification(), two_backwards=True, without_privacy=True)
    early, late = losses_of(model, inputs(seed=2)), losses_of(model, inputs(seed=3))
    private.backward(early)
    with pytest.raises(StateError, match=r"different gradients|used once in the first backward and twice"):
        private.backward(late + losses_of(model, inputs(seed=4)))


# Copies


def owned(tmp_path: Path) -> dict[str, Any]:
    """Everything that a run is made of and that must not be there twice."""
    model = net()
    engine = PrivacyEngine()
    data = DataLoader(TensorDataset(inputs(SAMPLED_RECORDS)), batch_size=4)
    _, optimizer, loader = engine.make_private_with_spec(
        spec=noisy(), module=model, optimizer=sgd(model), data_loader=data
    )
    assert loader is not None
    return {
        "engine": engine,
        "optimizer": optimizer,
        "private": optimizer.private,
        "loader": loader,
        "sampler": loader.sampler,
        "ledger": PrivacyLedger(tmp_path / "ledger", noisy()),
        "key": NoiseKey.from_os(),
    }


@pytest.mark.parametrize("name", ["engine", "optimizer", "private", "loader", "sampler", "ledger", "key"])
def test_nothing_that_spends_can_be_copied(name: str, tmp_path: Path) -> None:
    part = owned(tmp_path)[name]
    for duplicate in (copy.deepcopy, pickle.dumps):
        with pytest.raises(InvalidTypeError, match="cannot be copied or pickled"):
            duplicate(part)


def test_rows_of_one_record_whichever_backward_takes_them() -> None:
    """``set_sample_id`` and then a vector of losses: two rows of a record must not count as two records."""
    bench = Bench(x=inputs(1).repeat(2, 1))
    bench.optimizer.set_sample_id(torch.zeros(2, dtype=torch.int64))
    bench.optimizer.backward(losses_of(bench.model, bench.x))
    bench.optimizer.step()
    bench.check_exact(bench.x[:1])


def test_states_hold_no_sums_keys_or_batches() -> None:
    """What a checkpoint of the training loop may hold, with a batch under way."""
    bench = Bench(options={"momentum": 0.9})
    bench.backward()
    state = pickle.loads(pickle.dumps(bench.optimizer.state_dict()))
    assert state["optimizer"]["state"] == {}
    assert set(bench.model.state_dict()) == set(net().state_dict())
    restored = Bench(options={"momentum": 0.9})
    restored.optimizer.load_state_dict(state)
    restored.remember()
    restored.backward()
    restored.optimizer.step()
    restored.check_exact()
    assert restored.private.steps_charged == 2


def test_one_sampler_for_two_optimizers() -> None:
    """Two mechanisms that step the same batches are not the sum of two that draw their own."""
    first, second = net(), net(1)
    private, sampler = sampled(first, noisy())
    with pytest.raises(StateError, match="serves another PrivateOptimizer"):
        PrivateOptimizer(second, sgd(second), noisy(), sampler=sampler)
    assert "forward" not in vars(second)
    private.close()
    with pytest.raises(StateError, match="build a sampler for each"):
        PrivateOptimizer(second, sgd(second), noisy(), sampler=sampler)
    bad = PoissonSampler.for_spec(noisy(), SAMPLED_RECORDS)
    with pytest.raises(InvalidValueError):  # and one that no run came of is free
        PrivateOptimizer(second, sgd(second), noisy(sample_rate=0.5), sampler=bad)
    PrivateOptimizer(second, sgd(second), noisy(), sampler=bad)
