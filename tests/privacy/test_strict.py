# SPDX-License-Identifier: Apache-2.0
"""Strict noise: what its rounding and its law cost, and that a run is charged for the noise it gets."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from wavedp import optim
from wavedp.privacy import PoissonSampler, PrivacySpec, PrivacyStatement, PrivateOptimizer, accounting, strict

MakeSpec = Callable[..., PrivacySpec]
LAW: dict[str, Any] = {"pairs": 10**7, "releases": 100, "shift": 1.0, "bits": 14, "delta": 1e-5, "epsilon": 3.0}


@pytest.mark.parametrize("multiplier", [0.3, 1.0, 7.7])
@pytest.mark.parametrize("parameters", [1, 1000, 12_345_678])
def test_noise_is_larger_by_what_rounding_adds(multiplier: float, parameters: int) -> None:
    """``std >= z (S + grid sqrt(d))``, with the grid that noise of that ``std`` gets, for any S."""
    bits = strict.grid_bits(multiplier, parameters)
    for sensitivity in (1e-3, 0.7, 1.0, 1.9, 55.0):
        rounded = strict.rounded_sensitivity(sensitivity, multiplier, parameters)
        grid = strict.grid_of(multiplier * rounded, bits)
        assert math.frexp(grid)[0] == 0.5
        assert rounded >= sensitivity + grid * math.sqrt(parameters)
        assert rounded <= sensitivity / (1.0 - 2.0**-6)
        assert 2.0 ** -(bits + 1) < grid / (multiplier * rounded) <= 2.0**-bits


def test_rounding_that_costs_too_much_is_refused() -> None:
    with pytest.raises(ValueError, match="round more than half of the sensitivity away"):
        strict.rounded_sensitivity(1.0, 1000.0, 10**9)


def cell_masses(radius_bits: int, angle_bits: int, grid: float, side: int) -> torch.Tensor:
    """The law of ``rint(normal / grid)`` for a pair from few bits, by going through all of them: [2 side + 1] twice."""
    u = (torch.arange(1 << radius_bits, dtype=torch.float64) + 0.5) / (1 << radius_bits)
    angle = (torch.arange(1 << angle_bits, dtype=torch.float64) + 0.5) * (2.0 * math.pi / (1 << angle_bits))
    counts = torch.zeros((2 * side + 1) ** 2, dtype=torch.float64)
    for radii in (-2.0 * u.log()).sqrt().split(64):
        x, y = ((radii[:, None] * f(angle) / grid).round().long() for f in (torch.cos, torch.sin))
        inside = (x.abs() <= side) & (y.abs() <= side)
        places = ((x + side) * (2 * side + 1) + y + side)[inside]
        counts += torch.bincount(places, minlength=counts.numel())
    return counts.view(2 * side + 1, -1) / 2.0 ** (radius_bits + angle_bits)


def test_ratio_bounds_the_true_law_of_few_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole law of a pair of 11 and 12 bits against the normal one, cell by cell."""
    radius_bits, angle_bits, grid, side = 11, 12, 2.0**-4, 40
    monkeypatch.setattr(strict, "STRICT_RADIUS_BITS", radius_bits)
    monkeypatch.setattr(strict, "STRICT_ANGLE_BITS", angle_bits)
    monkeypatch.setattr(strict, "STRICT_NORMAL_ERROR", 0.0)
    monkeypatch.setattr(strict, "MAX_STRICT_DEVIATION", 3.5)
    real = cell_masses(radius_bits, angle_bits, grid, side)
    edges = (torch.arange(-side, side + 2, dtype=torch.float64) - 0.5) * grid
    ideal = torch.special.ndtr(edges).diff()
    off = (real / torch.outer(ideal, ideal) - 1.0).abs()
    places = torch.arange(-side, side + 1, dtype=torch.float64) * grid
    u = torch.exp(-0.5 * (places[:, None] ** 2 + places**2)).clamp(max=1.0)
    bound = torch.tensor([strict.law_ratio(float(value), grid) for value in u.flatten()]).view(u.shape)
    covered = bound <= 0.5
    assert covered.sum() > 2000
    shares = (off / bound)[covered]
    assert shares.max() <= 1.0
    assert shares.max() >= 0.1  # and what happens is not far below it


def test_excess_bounds_both_moments() -> None:
    from mpmath import mp, mpf

    with mp.workdps(60):
        for order in (3.0, 40.0, 5000.0, 1e7):
            for ratio in (1e-12, 1e-7, 1e-4, 1e-2, 0.3):
                bound = strict._excess(order, ratio)
                if bound > 1e100:
                    continue
                for x in (mpf(ratio), mpf(-ratio), mpf(ratio) / 2):
                    above = (1 + x) ** order - 1 - order * x
                    below = (1 - x) ** (1 - order) - 1 - (order - 1) * x
                    assert max(above, below) <= bound * (1 + mpf(10) ** -9), (order, ratio)


@pytest.mark.parametrize(
    ("name", "worse"), [("pairs", 10**8), ("bits", 16), ("delta", 1e-7), ("epsilon", 9.0), ("shift", 2.5)]
)
def test_law_costs_more(name: str, worse: Any) -> None:
    assert 0.0 < strict.law_epsilon(**LAW) < strict.law_epsilon(**{**LAW, name: worse}) <= strict.MOST_LAW_EPSILON


def test_law_of_too_many_pairs_has_no_cost_that_would_do() -> None:
    assert math.isinf(strict.law_epsilon(**{**LAW, "pairs": 10**14}))
    assert math.isinf(strict.law_epsilon(**{**LAW, "shift": 40.0}))
    assert math.isinf(strict.law_epsilon(**{**LAW, "bits": 30}))


def test_deltas_of_the_argument_add_up_to_what_was_promised() -> None:
    """As in docs/privacy.md, for tails of at most 1 %: exp(e) (0.9 delta + 2 q) / (1 - tails) + 2 q, q = 0.01 delta."""
    quarter = strict.LAW_SHARE / 4
    first = math.exp(strict.MOST_LAW_EPSILON) * (strict.MECHANISM_SHARE + 2 * quarter) / (1 - 1e-2)
    assert first + 2 * quarter < 1.0


def test_specification_charges_rounding_and_law(spec: MakeSpec) -> None:
    plain, made = spec(), spec(noise_mode="strict", trainable_parameters=50_000)
    law = made.law_epsilon()
    assert 0.0 < law < 1e-3
    assert made.epsilon() == accounting.composed_epsilon(made.phases(), 0.9 * made.delta) + 2.0 * law
    lower, upper = made.epsilon_bounds()
    assert upper == made.epsilon() > plain.epsilon()
    assert lower < plain.epsilon_bounds()[0]
    assert made.epsilon_rdp() > made.epsilon()
    assert plain.sensitivity < made.sensitivity < plain.sensitivity / (1 - 2.0**-6)
    assert made.noise_stddev == made.noise_multiplier * made.sensitivity
    assert made.epsilon(steps=5) < made.epsilon()
    assert made.law_epsilon(steps=0) == 0.0
    assert plain.law_epsilon() == 0.0
    assert plain.grid_of(1.0) is None


def test_calibration_meets_the_target() -> None:
    made = PrivacySpec.for_target_epsilon(
        2.0, sample_rate=0.05, steps=100, max_grad_norm=1.0, expected_batch_size=64, delta=1e-5,
        dataset_size_bound=2000, noise_mode="strict", trainable_parameters=1_000_000,
    )  # fmt: skip
    assert 0.99 * 2.0 <= made.epsilon() <= 2.0
    with pytest.raises(ValueError, match="reaches no epsilon of 2"):
        PrivacySpec.for_target_epsilon(
            2.0, sample_rate=0.05, steps=10_000, max_grad_norm=1.0, expected_batch_size=64, delta=1e-5,
            dataset_size_bound=2000, noise_mode="strict", trainable_parameters=10**9,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_mode": "exact"}, "noise_mode='exact' is not known"),
        ({"noise_mode": "strict"}, "needs trainable_parameters"),
        ({"trainable_parameters": 8}, "is for noise_mode='strict'"),
        ({"noise_mode": "strict", "trainable_parameters": 8, "clipping_rule": "adaptive"}, "does not cover the counts"),
        ({"noise_mode": "strict", "trainable_parameters": 8, "label_noise_multiplier": 300.0}, "at most 256"),
        ({"noise_mode": "strict", "trainable_parameters": 0}, "trainable_parameters"),
    ],
)
def test_refuses(spec: MakeSpec, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec(**changes)


@pytest.mark.parametrize("make", [optim.DPSGD, torch.optim.SGD], ids=["fused", "torch"])
def test_a_release_is_in_integers_of_the_grid_and_has_the_noise_that_is_charged(spec: MakeSpec, make: Any) -> None:
    made = spec(noise_mode="strict", trainable_parameters=40_000, sample_rate=1e-9, steps=1, noise_multiplier=1.7)
    model = nn.Linear(400, 100, bias=False).double()
    nn.init.zeros_(model.weight)
    sampler = PoissonSampler.for_spec(made, 60)
    with PrivateOptimizer(model, make(model.parameters(), lr=1.0), made, sampler=sampler) as private:
        for _ in sampler:
            private.step()
        grid = made.grid_of(made.noise_stddev)
        assert grid is not None
        released = model.weight.detach() * made.expected_batch_size
        assert torch.equal(released, (released / grid).round() * grid)
        assert len(released.unique()) > 10_000
        # 40,000 squares; six standard errors: a false alarm of 2e-9.
        assert float(released.std()) == pytest.approx(made.noise_stddev, rel=6 / math.sqrt(2 * 40_000))
        statement = PrivacyStatement.from_run(private)
    assert statement.noise_mode.startswith(
        f"strict: ChaCha20 keyed by the operating system, integers in units of {grid:.6g}"
    )
    assert any("40000 parameters: rounding to integers" in line for line in statement.charged)
    assert statement.epsilon == made.epsilon()


def test_a_model_of_another_size_is_refused(spec: MakeSpec, linear: nn.Linear) -> None:
    made = spec(noise_mode="strict", trainable_parameters=9)
    with pytest.raises(ValueError, match="rounding of 9 trainable parameters, the model has 8"):
        PrivateOptimizer(linear, torch.optim.SGD(linear.parameters()), made)
