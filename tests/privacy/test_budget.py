# SPDX-License-Identifier: Apache-2.0
"""Training never gets past the target epsilon: all phases together, resumed or not, whoever drives it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from wavedp.privacy import (
    PoissonSampler,
    PrivacyEngine,
    PrivacyLedger,
    PrivacySpec,
    PrivacyStatement,
    PrivateOptimizer,
    accounting,
    release_label_histogram,
)

TARGET = 2.0
RECORDS = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(60) % 4
CONSTANTS: dict[str, Any] = {
    "sample_rate": 0.1,
    "steps": 12,
    "max_grad_norm": 1.0,
    "expected_batch_size": 6.0,
    "delta": 1e-4,
    "dataset_size_bound": 100,
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "adaptive": {"clipping_rule": {"name": "adaptive", "count_noise_stddev": 20.0}},
    "truncated": {"truncated_batch_size": 8},
    "histogram": {"label_noise_multiplier": 6.0},
    "strict": {"noise_mode": "strict", "trainable_parameters": 8},
    "all": {
        "truncated_batch_size": 20,
        "label_noise_multiplier": 6.0,
        "noise_mode": "strict",
        "trainable_parameters": 8,
    },
}


@pytest.fixture(scope="module")
def specs() -> dict[str, PrivacySpec]:
    return {name: PrivacySpec.for_target_epsilon(TARGET, **CONSTANTS, **kind) for name, kind in KINDS.items()}


def train(spec: PrivacySpec, path: Path, most: int = 1000) -> tuple[int, PrivacyStatement]:
    """As many steps as the budget allows, one release of labels if it was not made; how many steps there were."""
    model, taken = nn.Linear(3, 2), 0
    with PrivacyLedger(path, spec) as ledger:
        if spec.releases and not ledger.released:
            release_label_histogram(LABELS, 4, spec, ledger=ledger, path=path.with_suffix(".json"))
        sampler = PoissonSampler.for_spec(spec, 60, steps=ledger.remaining)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with PrivateOptimizer(model, optimizer, spec, sampler=sampler, ledger=ledger, reserve_steps=1) as private:
            for indices in sampler:
                if taken == most:
                    break
                if len(indices):
                    private.backward(model(RECORDS[indices]).square().sum(1), records=indices)
                private.step()
                taken += 1
            statement = PrivacyStatement.from_run(private)
            if taken < most:
                with pytest.raises(RuntimeError, match=r"drew no batch|budget exhausted"):
                    private.step()
    return taken, statement


@pytest.mark.parametrize("kind", KINDS)
def test_a_specification_lands_under_its_target(specs: dict[str, PrivacySpec], kind: str) -> None:
    spec = specs[kind]
    assert 0.99 * TARGET <= spec.epsilon() <= TARGET
    assert spec.epsilon() <= spec.epsilon_rdp() * 1.001
    steps_alone = accounting.composed_epsilon(spec.phases()[:1], spec.delta)
    assert steps_alone <= spec.epsilon()
    assert spec.noise_multiplier >= specs["plain"].noise_multiplier * (1 - 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_and_releases_end_where_the_budget_does(specs: dict[str, PrivacySpec], kind: str, tmp_path: Path) -> None:
    """Interrupted once and continued twice, the last time with nothing left."""
    spec, path = specs[kind], tmp_path / "ledger"
    assert train(spec, path, most=5)[0] == 5
    saved = (tmp_path / "ledger.json").read_bytes() if spec.releases else b""
    # The batch that was drawn and not stepped before the interruption was not begun, so not charged.
    taken, statement = train(spec, path)
    assert taken == 7
    assert (statement.steps_charged, statement.steps_planned) == (12, 12)
    assert statement.epsilon == statement.epsilon_charged <= TARGET
    taken, statement = train(spec, path)
    assert taken == 0
    assert statement.epsilon <= TARGET
    if spec.releases:
        assert (tmp_path / "ledger.json").read_bytes() == saved
        with PrivacyLedger(path, spec) as ledger, pytest.raises(RuntimeError, match="not drawn again"):
            release_label_histogram(LABELS, 4, spec, ledger=ledger)


def test_an_engine_stops_at_its_target(tmp_path: Path) -> None:
    """An endless loop over the loader takes the planned steps and no more, whatever their number per epoch."""
    model = nn.Linear(3, 2)
    engine = PrivacyEngine()
    loader = DataLoader(TensorDataset(RECORDS), batch_size=6)
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=loader, sample_rate=0.1,
        max_grad_norm=1.0, expected_batch_size=6.0, target_epsilon=TARGET, target_delta=1e-4, steps=25,
    )  # fmt: skip
    for _ in range(10):
        for (records,) in loader:
            model(records).square().sum(1).mean().backward()
            optimizer.step()
    assert optimizer.private.steps_charged == 25
    assert engine.get_epsilon(1e-4) <= TARGET
    assert engine.privacy_statement().epsilon <= TARGET
    with pytest.raises(RuntimeError, match=r"drew no batch|budget exhausted"):
        optimizer.private.step()


@pytest.mark.parametrize("kind", ["truncated", "all"])
def test_an_engine_goes_by_the_whole_specification(specs: dict[str, PrivacySpec], kind: str, tmp_path: Path) -> None:
    spec, model, engine = specs[kind], nn.Linear(3, 2), PrivacyEngine()
    with PrivacyLedger(tmp_path / "ledger", spec) as ledger:
        model, optimizer, loader = engine.make_private_with_spec(
            spec=spec, module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), ledger=ledger,
            data_loader=DataLoader(TensorDataset(RECORDS), batch_size=6),
        )  # fmt: skip
        sizes = []
        for _ in range(3):
            for (records,) in loader:
                sizes.append(len(records))
                model(records).square().sum(1).mean().backward()
                optimizer.step()
        assert max(sizes) <= spec.truncated_batch_size
        assert loader.physical_batch_size == spec.truncated_batch_size
        assert ledger.remaining == 0
        assert engine.get_epsilon(1e-4) == spec.epsilon() <= TARGET
        statement = engine.privacy_statement()
    assert statement.epsilon == spec.epsilon()
    assert statement.sampler.startswith("truncated Poisson")


def test_a_statement_lists_every_phase(specs: dict[str, PrivacySpec], tmp_path: Path) -> None:
    _, statement = train(specs["all"], tmp_path / "ledger", most=2)
    steps, labels, strict = statement.charged
    multiplier = specs["all"].noise_multiplier
    assert "12 steps: sums of clipped gradients of Poisson samples at rate 0.1, cut to 20 records" in steps
    assert f"multiplier {multiplier:.6g}, sensitivity {specs['all'].sensitivity:.6g}" in steps
    assert "multiplier 6, sensitivity 1." in labels
    assert f"2 * {specs['all'].law_epsilon():.3g} of epsilon and 0.1 of delta" in strict
    assert any("drawn from the charged histogram" in sentence for sentence in statement.assumptions)
    assert "\nCharged\n  - 12 steps" in statement.to_text()
    _, statement = train(specs["adaptive"], tmp_path / "other", most=2)
    assert "Within those steps: every step also releases the count of norms" in statement.charged[1]
    assert any("not counted from the private data" in sentence for sentence in statement.assumptions)
