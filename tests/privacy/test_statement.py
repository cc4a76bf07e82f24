# SPDX-License-Identifier: Apache-2.0
"""The statement says everything a reader needs, and is refused where there is no guarantee."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from wavedp.privacy import (
    PoissonSampler,
    PrivacyLedger,
    PrivacySpec,
    PrivacyStatement,
    PrivateOptimizer,
    physical_batches,
    release_label_histogram,
)

MakeSpec = Callable[..., PrivacySpec]


def train(spec: PrivacySpec, steps: int, *, sampler: PoissonSampler | None = None, **options: Any) -> PrivateOptimizer:
    model = nn.Linear(3, 2)
    records = torch.randn(60, 3)
    sampler = sampler or PoissonSampler.for_spec(spec, 60)
    private = PrivateOptimizer(model, torch.optim.SGD(model.parameters()), spec, sampler=sampler, **options)
    for _, indices in zip(range(steps), sampler):
        for chunk in physical_batches(indices, 4):
            private.backward(model(records[chunk]).sum(1), records=chunk)
        private.step()
    return private


def test_fields(spec: MakeSpec, tmp_path: Path) -> None:
    made = spec()
    with PrivacyLedger(tmp_path / "ledger", made) as ledger:
        statement = PrivacyStatement.from_run(train(made, 20, ledger=ledger), assumptions=["Extra sentence."])
        head = ledger.head
    values = json.loads(statement.to_json())
    lower, upper = made.epsilon_bounds()
    assert values["epsilon"] == upper == made.epsilon()
    assert values["epsilon_lower"] == lower <= upper
    assert values["epsilon_charged"] == upper
    assert values["epsilon_rdp"] == made.epsilon_rdp() > upper
    for name in ("unit", "neighboring_relation", "delta", "sample_rate", "noise_multiplier", "max_grad_norm"):
        assert values[name] == getattr(made, name), name
    assert values["expected_batch_size"] == 8.0
    assert values["dataset_size_bound"] == 100
    assert (values["steps_planned"], values["steps_charged"]) == (20, 20)
    assert values["sensitivity"] == made.sensitivity
    assert values["noise_stddev"] == made.noise_stddev
    assert values["ledger_head"] == head
    assert values["spec_fingerprint"] == made.fingerprint()
    assert values["noise_mode"].startswith("standard")
    assert "PLD" in values["accountant"]
    assert "Poisson" in values["sampler"]
    assert values["assumptions"][-1] == "Extra sentence."
    for words in ("not covered", "check_records_independent", "held no state", "learning rates", "broke off"):
        assert any(words in sentence for sentence in values["assumptions"]), words
    assert values["warnings"] == []
    assert set(values["versions"]) == {"python", "wavedp", "torch", "numpy", "dp-accounting"}
    assert "loss" not in values
    assert "num_records" not in values


def test_names_the_clipping_rule_and_what_it_costs(spec: MakeSpec) -> None:
    flat = PrivacyStatement.from_run(train(spec(), 2))
    assert flat.clipping == "flat: factor min(1, C / norm) over all parameters, C = 1"
    assert flat.extra_charge is None
    automatic = PrivacyStatement.from_run(train(spec(clipping_rule="automatic"), 2))
    assert automatic.clipping.endswith("factor C / (norm + gamma) over all parameters, C = 1, gamma = 0.01")
    assert "AUTO-S" in automatic.to_text()


def test_names_adaptive_clipping_and_its_count(spec: MakeSpec) -> None:
    made = spec(clipping_rule={"name": "adaptive", "count_noise_stddev": 2.0, "target_quantile": 0.3})
    statement = PrivacyStatement.from_run(train(made, 2))
    for words in ("starts at 1 ", "exp(-0.2 (", "- 0.3))"):
        assert words in statement.clipping, words
    assert statement.extra_charge is not None
    for words in ("deviation 2;", "is 1.0328 in place of 1;", "C is public"):  # (1 - 1/16)^(-1/2)
        assert words in statement.extra_charge, words
    assert statement.noise_stddev == made.noise_stddev > made.sensitivity
    assert statement.epsilon == spec().epsilon()


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"name": "per_group", "bounds": {"weight": 0.6, "bias": 0.8}}, "{'bias': 0.8, 'weight': 0.6}, together C = 1"),
        ("per_layer", "C_k = C / sqrt(K) for K layers, C = 1"),
        ("normalised", "normalised: factor C / norm over all parameters, C = 1"),
    ],
)
def test_every_rule_describes_itself(spec: MakeSpec, rule: Any, words: str) -> None:
    assert spec(clipping_rule=rule).clipping.describe().endswith(words)


def test_text_is_aligned(spec: MakeSpec) -> None:
    statement = PrivacyStatement.from_run(train(spec(), 20))
    lines = statement.to_text().splitlines()
    fields = lines[2 : lines.index("Charged") - 1]
    width = fields[3].index(f"{statement.epsilon:.6g}")
    assert fields[3].startswith("epsilon (upper bound)")
    assert all(line[width - 1] == " " and line[width] != " " for line in fields)
    assert any(line.startswith("attempts charged") and line.endswith(" 20") for line in fields)
    assert max(len(line) for line in lines[lines.index("Charged") :]) <= 100


def test_early_stop_states_the_plan_and_warns(spec: MakeSpec) -> None:
    made = spec()
    statement = PrivacyStatement.from_run(train(made, 5))
    assert statement.epsilon == made.epsilon()
    assert statement.epsilon_charged == made.with_steps(5).epsilon()
    assert any("5 of 20 steps" in warning for warning in statement.warnings)
    assert any("No ledger" in warning for warning in statement.warnings)


def refused(private: PrivateOptimizer, reason: str) -> None:
    with pytest.raises(RuntimeError, match=reason):
        PrivacyStatement.from_run(private)


def test_refuses_seeded_noise(spec: MakeSpec) -> None:
    refused(train(spec(), 2, insecure_seed=1), "insecure_seed")


def test_refuses_seeded_sampling(spec: MakeSpec) -> None:
    private = train(spec(), 2, sampler=PoissonSampler.for_spec(spec(), 60, insecure_seed=1))
    refused(private, "insecure_seed")
    assert private.privacy_spent()["epsilon"] is None


def test_refuses_no_noise(spec: MakeSpec) -> None:
    refused(train(spec(noise_multiplier=0.0), 2, without_privacy=True), "not private")


def test_refuses_vanishing_noise(spec: MakeSpec) -> None:
    refused(train(spec(noise_multiplier=1e-3), 2), "epsilon is inf")


def test_refuses_an_untrained_or_pending_run(spec: MakeSpec) -> None:
    private = train(spec(sample_rate=1.0), 0)
    refused(private, "no step")
    assert private.sampler is not None
    chunk = next(iter(private.sampler))[:2]
    private.backward(private._book.model(torch.randn(2, 3)).sum(1), records=chunk)
    refused(private, "pending")
    private.discard()
    assert PrivacyStatement.from_run(private).steps_charged == 1


def test_refuses_a_run_without_a_sampler(spec: MakeSpec) -> None:
    model = nn.Linear(3, 2)
    private = PrivateOptimizer(model, torch.optim.SGD(model.parameters()), spec())
    private.step()
    refused(private, "pass sampler= to PrivateOptimizer")


def test_refuses_skipped_batches(spec: MakeSpec) -> None:
    """A loop that skips empty batches charges less than it reveals: that a batch was not empty."""
    private = train(spec(), 3)
    assert private.sampler is not None
    next(iter(private.sampler))
    PrivacyStatement.from_run(private)  # a batch drawn, and interrupted before it began
    next(iter(private.sampler))
    refused(private, "drawn and not stepped")


def test_refuses_steps_after_a_discarded_batch(spec: MakeSpec) -> None:
    """Which batches are left out may depend on the data: 'skip the step when the loss is too large'."""
    private = train(spec(), 3)
    assert private.sampler is not None
    next(iter(private.sampler))
    private.discard()
    PrivacyStatement.from_run(private)
    model = private._book.model
    chunk = next(iter(private.sampler))
    if chunk.numel():
        private.backward(model(torch.randn(len(chunk), 3)).sum(1), records=chunk)
    private.step()
    refused(private, "after a batch was discarded")


def test_refuses_a_model_that_was_written_to(spec: MakeSpec) -> None:
    private = train(spec(), 3)
    model = private._book.model
    kept = model.weight.detach().clone()
    model.weight.data.add_(1.0)
    refused(private, "'weight' of the model changed")
    model.weight.data.copy_(kept)
    PrivacyStatement.from_run(private)
    private.close()
    model.weight.data.add_(1.0)  # given back: what happens now is no part of the run
    PrivacyStatement.from_run(private)


def test_a_write_is_still_known_after_closing(spec: MakeSpec) -> None:
    private = train(spec(), 3)
    private._book.model.weight.data.add_(1.0)
    private.close()
    refused(private, "'weight' of the model changed")


def test_a_histogram_that_the_ledger_does_not_know_is_warned_of(spec: MakeSpec, tmp_path: Path) -> None:
    made = spec(label_noise_multiplier=5.0)
    with PrivacyLedger(tmp_path / "ledger", made) as ledger:
        (warning, *_) = PrivacyStatement.from_run(train(made, 2, ledger=ledger)).warnings
    assert "records no release of label_histogram" in warning
    with PrivacyLedger(tmp_path / "other", made) as ledger:
        release_label_histogram(torch.zeros(3, dtype=torch.int64), 2, made, ledger=ledger)
        statement = PrivacyStatement.from_run(train(made, 2, ledger=ledger))
    assert not any("records no release" in warning for warning in statement.warnings)
