# SPDX-License-Identifier: Apache-2.0
"""The precision test sees what float sums tell, and that this package's outputs tell nothing of the kind."""

from __future__ import annotations

import json
import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from wavedp.benchmarks import precision
from wavedp.benchmarks.precision import Event, Mechanism
from wavedp.cli import main

TRIALS = 200_000


def test_the_allowed_delta_is_that_of_the_gaussian_mechanism() -> None:
    want = stats.norm.cdf(0.5 - 4) - math.exp(4) * stats.norm.cdf(-0.5 - 4)
    assert precision.gaussian_delta(4.0) == pytest.approx(want, rel=1e-9)
    assert precision.gaussian_delta(4.0) == pytest.approx(4.712e-5, rel=1e-3)


@pytest.mark.parametrize("count", [0, 1, 40, 50_000, 199_999, 200_000])
def test_the_bounds_are_outside_of_the_exact_ones(count: int) -> None:
    """Chernoff's contain Clopper and Pearson's, and are not much wider."""
    alarm = 1e-8
    upper = precision.bound(count, TRIALS, alarm, above=True)
    lower = precision.bound(count, TRIALS, alarm, above=False)
    exact = stats.beta.ppf(1 - alarm, count + 1, TRIALS - count) if count < TRIALS else 1.0
    assert exact - 1e-12 <= upper <= exact * 1.2 + 1e-12
    exact = stats.beta.ppf(alarm, count, TRIALS - count + 1) if count else 0.0
    assert exact / 2 - 1e-12 <= lower <= exact + 1e-12


@pytest.mark.parametrize("name", precision.ours())
def test_outputs_of_this_package_are_on_the_grid_with_the_record_and_without(name: str) -> None:
    here = precision.events(precision.ours()[name], TRIALS)
    bits = 20 if "strict" in name else 12
    assert [e for e in here if e.exponent >= bits and (e.without or e.with_record)] == []
    assert all(e.shown <= precision.gaussian_delta(precision.EPSILON) for e in here)
    (coarser,) = (e for e in here if e.exponent == bits - 1)  # the event is one that can be seen
    assert min(coarser.without, coarser.with_record) > TRIALS / 100


def float_sum(total: Tensor) -> Tensor:
    return total + torch.randn(total.shape)


def stepped(total: Tensor) -> Tensor:
    return torch.zeros(total.shape).sub_(precision.LEARNING_RATE * float_sum(total))


@pytest.mark.parametrize(
    ("mechanism", "share"),
    [(Mechanism(float_sum), 0.257), (Mechanism(stepped, precision.gradients_of), 0.220)],
    ids=["sum", "step"],
)
def test_a_sum_of_floats_tells_the_record(mechanism: Mechanism, share: float) -> None:
    (event,) = (e for e in precision.events(mechanism, TRIALS) if e.exponent == 24)
    assert event.without / TRIALS == pytest.approx(share, abs=0.01)
    assert event.with_record == 0
    assert share - 0.02 < event.shown < share


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("Opacus", 0.24, 0.27),
        ("Opacus, bfloat16", 0.24, 0.27),
        ("Opacus, secure mode", 0.15, 0.18),
        ("Opacus, secure mode, bfloat16", 0.24, 0.27),
    ],
)
def test_opacus_tells_the_record(name: str, low: float, high: float) -> None:
    pytest.importorskip("opacus", reason="needs opacus, of the extra [bench]")
    most = max(precision.events(precision.opacus()[name], TRIALS), key=lambda event: event.shown)
    assert low < most.without / TRIALS < high
    assert most.with_record == 0


def test_gradients_are_found_again() -> None:
    gradients = torch.cat([torch.randn(1000), torch.tensor([0.0, 1e-30, -7.5])])
    weights = torch.zeros_like(gradients).sub_(precision.LEARNING_RATE * gradients)
    candidates = torch.stack(precision.gradients_of(weights))
    assert (candidates == gradients.double()).any(0).all()


def test_an_event_shows_a_delta_in_both_directions() -> None:
    alarm = precision.FALSE_ALARM / (4 * len(precision.EXPONENTS))
    upper = precision.bound(0, TRIALS, alarm, above=True)
    lower = precision.bound(50_000, TRIALS, alarm, above=False)
    for counts in ((50_000, 0), (0, 50_000)):
        assert Event(24, *counts, TRIALS).shown == pytest.approx(lower - math.exp(4) * upper)
    assert Event(24, 50_000, 50_000, TRIALS).shown < 0


def test_the_command_passes_on_this_package(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "opacus", lambda: {"planted": Mechanism(float_sum)})
    assert main(["precision-test", "--trials", "50000"]) == 0
    shown = capsys.readouterr().out
    for name in precision.ours():
        assert f"| {name} | 0 | 0 |  |  |  | none |" in shown
    assert main(["precision-test", "--trials", "50000", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["trials"] == 50_000
    assert {len(events) for events in answer["events"].values()} == {len(precision.EXPONENTS)}


def test_the_command_fails_if_this_package_tells(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "opacus", dict)
    monkeypatch.setattr(precision, "ours", lambda: {"planted": Mechanism(float_sum)})
    assert main(["precision-test", "--trials", "50000"]) == 1
    assert "| planted | 25." in capsys.readouterr().out
