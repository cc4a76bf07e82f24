# SPDX-License-Identifier: Apache-2.0
"""What a private optimizer saves, resumes from, and charges in its ledger."""

from pathlib import Path

import pytest
import torch
from optimizer_runs import MakeSpec, flat, linear, private_sgd

from wavedp.privacy import LedgerError, PoissonSampler, PrivacyLedger, PrivateOptimizer


def test_state_carries_no_sums_and_no_entropy(spec: MakeSpec) -> None:
    model = linear()
    private = PrivateOptimizer(model, torch.optim.Adam(model.parameters()), spec())
    private.step()
    private.backward(model(torch.randn(4, 3)).sum(1))
    state = private.state_dict()
    assert set(state) == {"optimizer", "spec", "steps_charged", "ledger_head", "clipping"}
    assert state["steps_charged"] == 2
    assert set(state["optimizer"]["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}


def test_resume_from_state(spec: MakeSpec) -> None:
    model = linear()
    first = PrivateOptimizer(model, torch.optim.Adam(model.parameters()), spec(steps=5))
    for _ in range(3):
        first.step()
    state = first.state_dict()
    first.close()
    second = PrivateOptimizer(model, torch.optim.Adam(model.parameters()), spec(steps=5))
    second.load_state_dict(state)
    assert (second.steps_charged, second.steps_left) == (3, 2)
    second.load_state_dict({**state, "steps_charged": 1})
    assert second.steps_charged == 3
    second.close()
    for steps in (5, 2):
        sampler = PoissonSampler.for_spec(spec(steps=5), 60, steps=steps)
        inner = torch.optim.Adam(model.parameters())
        with PrivateOptimizer(model, inner, spec(steps=5), sampler=sampler) as third:
            third.load_state_dict(state)
            assert sampler.steps == 2
    other = PrivateOptimizer(model, torch.optim.Adam(model.parameters()), spec(steps=6))
    with pytest.raises(RuntimeError, match="another PrivacySpec"):
        other.load_state_dict(state)


def test_ledger_is_charged_in_blocks_before_the_step(spec: MakeSpec, tmp_path: Path) -> None:
    made = spec(steps=25)
    with PrivacyLedger(tmp_path / "ledger", made) as ledger:
        private = private_sgd(linear(), made, ledger=ledger, reserve_steps=10)
        assert ledger.charged == 0
        private.backward(private._book.model(torch.randn(2, 3)).sum(1))
        assert ledger.charged == 10  # before the release
        for _ in range(11):
            private.step()
        assert (ledger.charged, private.steps_charged, private.steps_left) == (20, 20, 14)
        private.close()
    with PrivacyLedger(tmp_path / "ledger", made) as ledger:
        private = private_sgd(linear(), made, ledger=ledger)
        assert (private.steps_charged, private.steps_left) == (20, 5)
        for _ in range(5):
            private.step()
        with pytest.raises(RuntimeError, match="budget exhausted"):
            private.step()
        assert ledger.charged == 25


def test_nothing_is_released_when_the_ledger_fails(spec: MakeSpec, tmp_path: Path) -> None:
    ledger = PrivacyLedger(tmp_path / "ledger", spec())
    model = linear()
    private = private_sgd(model, spec(), ledger=ledger)
    before = flat(model)
    ledger.close()
    with pytest.raises(LedgerError, match="closed"):
        private.step()
    assert torch.equal(flat(model), before)


def test_checkpoints_cannot_roll_a_ledger_back(spec: MakeSpec, tmp_path: Path) -> None:
    made = spec()
    with PrivacyLedger(tmp_path / "a", made) as ledger:
        private = private_sgd(linear(), made, ledger=ledger, reserve_steps=1)
        private.step()
        early = private.state_dict()
        private.step()
        late = private.state_dict()
        private.load_state_dict(early)
        assert private.steps_charged == 2
    with PrivacyLedger(tmp_path / "b", made) as ledger:
        fresh = private_sgd(linear(), made, ledger=ledger)
        with pytest.raises(LedgerError, match="older than the checkpoint"):
            fresh.load_state_dict(late)
    with pytest.raises(RuntimeError, match="pass it as ledger="):
        private_sgd(linear(), made).load_state_dict(late)


def test_ledger_of_another_spec_is_refused(spec: MakeSpec, tmp_path: Path) -> None:
    other = PrivacyLedger(tmp_path / "ledger", spec(noise_multiplier=2.0))
    with other, pytest.raises(LedgerError, match="another specification"):
        private_sgd(linear(), spec(), ledger=other)


def test_closed_optimizer_is_of_no_use(spec: MakeSpec) -> None:
    model = linear()
    with private_sgd(model, spec()) as private:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        private.step()
    assert "forward" not in vars(model)
