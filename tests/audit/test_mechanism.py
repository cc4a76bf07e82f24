# SPDX-License-Identifier: Apache-2.0
"""Canaries through the real private step: their gradients, their scores, and what broken steps look like."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from wavedp.audit import AuditReport, GradientCanaries, audit_mechanism, score_canaries
from wavedp.audit.mechanism import OVERSHOOT
from wavedp.privacy import PrivacySpec, sampling
from wavedp.privacy.clipping import FlatClipping

SPEC = PrivacySpec(
    sample_rate=0.3,
    steps=12,
    noise_multiplier=1.0,
    max_grad_norm=0.5,
    expected_batch_size=40.0,
    delta=1e-5,
    dataset_size_bound=1000,
)


class Tied(nn.Module):
    """Every kind of layer that canaries use, one that they do not, a frozen one, and a weight in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 6)
        self.inner = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.back = nn.Linear(8, 6, bias=False)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.table.weight


def audited(model: nn.Module, spec: PrivacySpec = SPEC, **settings: int) -> AuditReport:
    return audit_mechanism(model, spec, canaries=100, repeats=2, insecure_seed=1, **settings)[0]


def test_canaries_have_one_coordinate_each() -> None:
    model = Tied()
    capacity = 60 + 48 + 8 + 48  # table, inner weight and bias, back; the head's weight is the table's
    canaries = GradientCanaries(model, capacity, norm=3.0, generator=np.random.default_rng(0))
    assert canaries.parameters == 4
    taken = set()
    for number in range(capacity):
        model.zero_grad()
        canaries.losses(torch.tensor([number])).sum().backward()
        hits = [
            (name, int(index), float(p.grad.reshape(-1)[index]))
            for name, p in model.named_parameters()
            if p.grad is not None
            for index in p.grad.reshape(-1).nonzero()[:, 0]
        ]
        ((name, index, value),) = hits
        assert value == 3.0
        taken.add((name, index))
    assert len(taken) == capacity


def test_more_canaries_than_coordinates_are_refused() -> None:
    with pytest.raises(ValueError, match="have 164: use fewer canaries"):
        GradientCanaries(Tied(), 165, norm=1.0, generator=np.random.default_rng(0))
    with pytest.raises(ValueError, match="LayerNorm have 0"):
        GradientCanaries(nn.LayerNorm(4), 1, norm=1.0, generator=np.random.default_rng(0))


@pytest.mark.parametrize("mode", ["standard", "strict"])
def test_scores_are_participations_and_the_claimed_noise(mode: str) -> None:
    model = Tied()
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    spec = replace(SPEC, noise_mode=mode, trainable_parameters=count if mode == "strict" else None)
    found = score_canaries(model, spec, 160, insecure_seed=3)
    noise = found.scores - found.participations
    deviation = math.sqrt(12)
    assert abs(noise.mean()) < 5 * deviation / math.sqrt(160)
    assert abs(noise.std() / deviation - 1) < 5 / math.sqrt(2 * 160)
    assert found.participations[~found.members].sum() == 0
    assert abs(found.participations[found.members].mean() / 12 - 0.3) < 0.1
    assert abs(found.members.mean() - 0.5) < 0.2


def test_almost_without_noise_a_score_is_the_participations() -> None:
    """Clipping by the factor 1 / OVERSHOOT, the sum, the mean and Adam's moment lose nothing."""
    found = score_canaries(Tied(), replace(SPEC, noise_multiplier=1e-4), 160, insecure_seed=3)
    assert OVERSHOOT > 1
    assert np.abs(found.scores - found.participations).max() < 3e-3
    assert len(set(found.participations)) > 3


def test_repeats_draw_anew() -> None:
    first, second = (score_canaries(Tied(), SPEC, 50) for _ in range(2))
    assert not np.array_equal(first.members, second.members)
    assert not np.isclose(first.scores, second.scores).any()


def test_the_right_mechanism_is_no_violation() -> None:
    report = audited(Tied())
    assert not report.violation
    assert report.claimed == SPEC.epsilon()
    assert [bound.method for bound in report.bounds] == ["z-test", "guesses", "one run"]
    assert all(bound.confidence == pytest.approx(1 - 0.05 / 3) for bound in report.bounds)
    assert 0.4 * report.claimed < report.epsilon < report.claimed
    assert (report.canaries, report.repeats, report.steps, report.steps_of_run) == (100, 2, 12, 12)


def test_fewer_steps_stand_beside_their_own_claim() -> None:
    report = audited(Tied(), steps=3)
    assert report.claimed == SPEC.epsilon(steps=3) < SPEC.epsilon()
    assert (report.steps, report.steps_of_run) == (3, 12)
    assert not report.violation


def test_a_label_histogram_is_not_part_of_the_claim() -> None:
    report = audited(Tied(), replace(SPEC, label_noise_multiplier=2.0), steps=3)
    assert report.claimed == SPEC.epsilon(steps=3)


def _without_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    def ones(self: FlatClipping, squared_norms: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.ones_like(squared_norms, dtype=dtype)

    monkeypatch.setattr(FlatClipping, "factors", ones)


def _with_half_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PrivacySpec.stddev_with
    monkeypatch.setattr(PrivacySpec, "stddev_with", lambda self, clipping: 0.5 * right(self, clipping))


def _without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrivacySpec, "stddev_with", lambda self, clipping: 0.0)


def _with_noise_of_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PrivacySpec.stddev_with
    monkeypatch.setattr(PrivacySpec, "stddev_with", lambda self, c: right(self, c) / self.expected_batch_size)


def _with_larger_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    right = sampling.membership_threshold
    monkeypatch.setattr(sampling, "membership_threshold", lambda rate: 3 * right(rate))


@pytest.mark.parametrize(
    "plant",
    [_without_clipping, _with_half_the_noise, _without_noise, _with_noise_of_the_mean, _with_larger_batches],
)
def test_a_broken_step_is_a_violation(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    report = audited(Tied(), replace(SPEC, noise_multiplier=2.0))
    assert report.violation
    assert report.verdict().startswith("VIOLATION: epsilon is at least")
    assert report.epsilon > 1.2 * report.claimed


def test_mechanisms_that_the_audit_does_not_know_are_refused() -> None:
    for rule in ("per_layer", "adaptive"):
        with pytest.raises(ValueError, match="one fixed bound over all parameters"):
            audit_mechanism(Tied(), replace(SPEC, clipping_rule=rule))
    with pytest.raises(ValueError, match="no guarantee to audit"):
        audit_mechanism(Tied(), replace(SPEC, noise_multiplier=0.0))
    with pytest.raises(ValueError, match="more than the run's bound of 90 records"):
        audit_mechanism(Tied(), replace(SPEC, dataset_size_bound=90), canaries=100)
    with pytest.raises(ValueError, match="use at most 50 canaries"):
        audit_mechanism(Tied(), replace(SPEC, truncated_batch_size=50), canaries=100)
    with pytest.raises(ValueError, match="13 steps are more than the run's 12"):
        audit_mechanism(Tied(), SPEC, canaries=100, steps=13)
    for wrong in ({"canaries": 9}, {"repeats": 0}, {"steps": 0}, {"confidence": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            audit_mechanism(Tied(), SPEC, **{"canaries": 100, **wrong})
