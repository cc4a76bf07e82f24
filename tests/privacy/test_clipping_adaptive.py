# SPDX-License-Identifier: Apache-2.0
"""Adaptive clipping: the noise it leaves for the sum, its votes, its update, its state, its cost."""

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from wavedp.privacy import (
    AdaptiveClipping,
    AdaptiveSession,
    Entropy,
    PrivacySpec,
    gaussian_noise,
    noise_multiplier_beside_count,
)

MakeSpec = Callable[..., PrivacySpec]
ADAPTIVE = {"name": "adaptive", "count_noise_stddev": 4.0}


class NoNoise(Entropy):
    """Marks sessions that are to add none."""


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    def noise(shape: tuple[int, ...], std: float, *, dtype: torch.dtype, entropy: Entropy) -> Tensor:
        return gaussian_noise(shape, 0.0 if isinstance(entropy, NoNoise) else std, dtype=dtype, entropy=entropy)

    monkeypatch.setattr("wavedp.privacy.clipping_adaptive.gaussian_noise", noise)


def norms(*values: float) -> dict[str, Tensor]:
    return {"": torch.tensor(values, dtype=torch.float64).square()}


def quiet_session(**options: float) -> AdaptiveSession:
    rule = AdaptiveClipping(1.0, 8.0, **{"learning_rate": 0.5, "count_noise_stddev": 1.0, **options})
    return rule.session(NoNoise())


@pytest.mark.parametrize(("z", "sigma"), [(1.0, 5.0), (0.7, 0.4), (2.0, 100.0)])
def test_noise_beside_the_count_is_theorem_1(z: float, sigma: float) -> None:
    beside = noise_multiplier_beside_count(z, sigma)
    assert beside == pytest.approx((z**-2 - (2 * sigma) ** -2) ** -0.5, rel=1e-13)
    assert beside**-2 + (2 * sigma) ** -2 == pytest.approx(z**-2, rel=1e-13)
    assert beside > z


def test_noise_beside_the_count_at_the_edges() -> None:
    assert noise_multiplier_beside_count(0.0, 1.0) == 0.0
    assert noise_multiplier_beside_count(1.0, 5.0) == pytest.approx(1.00503782, rel=1e-8)
    for sigma in (0.5, 0.4):
        with pytest.raises(ValueError, match=r"must be above noise_multiplier / 2 = 0\.5"):
            noise_multiplier_beside_count(1.0, sigma)


def test_sum_and_count_together_cost_what_the_plain_event_costs(spec: MakeSpec) -> None:
    """dp-accounting composes the two Gaussians of a step, on one Poisson sample, to the same epsilon."""
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    adaptive, plain = spec(clipping_rule=ADAPTIVE), spec()
    assert adaptive.epsilon() == plain.epsilon()
    assert adaptive.event() == plain.event()
    both = dp_accounting.ComposedDpEvent(
        [
            dp_accounting.GaussianDpEvent(adaptive.clipping.sum_noise_multiplier(adaptive.noise_multiplier)),
            dp_accounting.GaussianDpEvent(4.0 / 0.5),  # deviation over the sensitivity of the votes
        ]
    )
    step = dp_accounting.PoissonSampledDpEvent(adaptive.sample_rate, both)
    composed = RdpAccountant().compose(dp_accounting.SelfComposedDpEvent(step, adaptive.steps))
    assert composed.get_epsilon(adaptive.delta) == pytest.approx(plain.epsilon_rdp(), rel=1e-9)


def test_noise_of_the_specification_is_that_of_the_sum(spec: MakeSpec) -> None:
    made = spec(clipping_rule=ADAPTIVE, noise_multiplier=1.5, max_grad_norm=0.3)
    assert made.noise_stddev == pytest.approx((1.5**-2 - 8.0**-2) ** -0.5 * made.sensitivity, rel=1e-13)
    assert made.noise_stddev > spec(noise_multiplier=1.5, max_grad_norm=0.3).noise_stddev
    session = made.clipping.session(Entropy())
    assert session.sum_noise_multiplier(1.5) * session.sensitivity() == made.noise_stddev
    with pytest.raises(ValueError, match=r"count_noise_stddev=0\.4 must be above"):
        spec(clipping_rule="adaptive")  # 8 / 20, and a noise multiplier of 1
    assert spec(clipping_rule="adaptive", noise_multiplier=0.0).noise_stddev == 0.0


def test_one_step_by_hand() -> None:
    """Of 5 records in two micro-batches, 3 have a norm of at most C = 1: votes 1/2; fraction 1/2 + 0.5 / 8."""
    session = quiet_session(target_quantile=0.25)
    session.observe(norms(0.2, 1.0, 1.5))
    session.observe(norms(0.0, 7.0))
    assert session.max_grad_norm == 1.0  # not before the batch ends
    session.end_step()
    assert session.max_grad_norm == pytest.approx(math.exp(-0.5 * (0.5625 - 0.25)), rel=1e-12)
    assert session.sensitivity() == pytest.approx(session.max_grad_norm * (1 + 2.0**-9), rel=1e-12)
    factors = session.group_factors(norms(0.5, 10.0), torch.float64)[""]
    assert factors.tolist() == pytest.approx([1.0, session.max_grad_norm / 10.0], rel=1e-12)


def test_the_realised_batch_size_is_nowhere() -> None:
    """Half of the votes each way: the fraction is 1/2 for every batch size, and the step exp(-eta / 4)."""
    for records in (0, 2, 6, 100):
        session = quiet_session(target_quantile=0.25)
        session.observe(norms(*[0.5, 2.0] * (records // 2)))
        session.end_step()
        assert session.max_grad_norm == pytest.approx(math.exp(-0.5 * 0.25), rel=1e-12)


def test_an_empty_batch_takes_the_same_path() -> None:
    empty, none_below = quiet_session(), quiet_session()
    empty.end_step()
    none_below.observe(norms(9.0, 9.0))
    none_below.end_step()
    assert empty.max_grad_norm == pytest.approx(1.0, rel=1e-12)  # quantile 1/2, fraction 1/2
    assert none_below.max_grad_norm == pytest.approx(math.exp(0.5 * 1.0 / 8.0), rel=1e-12)
    assert empty.state_dict()["steps"] == none_below.state_dict()["steps"] == 1


@pytest.mark.parametrize("gone", range(4))
def test_one_record_moves_the_votes_by_at_most_half(gone: int) -> None:
    values = [0.3, 1.0, 5.0, math.nan]
    whole, without = quiet_session(), quiet_session()
    whole.observe(norms(*values))
    without.observe(norms(*values[:gone], *values[gone + 1 :]))
    assert whole._votes - without._votes == [0.5, 0.5, -0.5, 0.0][gone]  # a non-finite record has no vote


def test_noise_has_the_stated_deviation() -> None:
    """Without records, C moves by noise alone: -eta N(0, sigma^2) / size in its logarithm; 4000 draws, 5 deviations."""
    rule = AdaptiveClipping(1.0, 50.0, learning_rate=0.01, count_noise_stddev=7.0)
    session = rule.session(Entropy(insecure_seed=3))
    logs = [0.0]
    for _ in range(4000):
        session.end_step()
        logs.append(math.log(session.max_grad_norm))
    draws = torch.tensor(logs, dtype=torch.float64).diff() * 50.0 / 0.01
    assert abs(draws.mean()) < 5 * 7.0 / math.sqrt(4000)
    assert draws.std().item() == pytest.approx(7.0, rel=5 / math.sqrt(2 * 4000))
    assert draws.unique().numel() > 1000


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("start", [1e-3, 1e3])
def test_converges_to_the_quantile(quantile: float, start: float) -> None:
    torch.manual_seed(0)
    rule = AdaptiveClipping(start, 200.0, target_quantile=quantile)
    session = rule.session(Entropy(insecure_seed=1))
    tail = []
    for step in range(500):
        records = int(torch.distributions.Poisson(200.0).sample())
        session.observe({"": torch.randn(records, dtype=torch.float64).exp().square()})  # lognormal norms
        session.end_step()
        if step >= 300:
            tail.append(session.max_grad_norm)
    below = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(tail).log().mean())
    assert below.item() == pytest.approx(quantile, abs=0.03)


def test_the_bound_stays_in_its_range() -> None:
    low, high = quiet_session(learning_rate=10.0), quiet_session(learning_rate=10.0)
    for _ in range(30):
        low.observe(norms(*[0.0] * 1000))
        low.end_step()
        high.observe(norms(*[1e12] * 1000))
        high.end_step()
    assert low.max_grad_norm == pytest.approx(1e-9, rel=1e-12)
    assert high.max_grad_norm == pytest.approx(1e9, rel=1e-12)


def test_a_dropped_batch_does_not_vote() -> None:
    session = quiet_session()
    session.observe(norms(9.0, 9.0))
    session.drop_step()
    session.end_step()
    assert session.max_grad_norm == pytest.approx(1.0, rel=1e-12)


def test_state_is_public_and_restores() -> None:
    session = quiet_session()
    session.observe(norms(9.0, 9.0))
    before = session.state_dict()
    assert before == {"max_grad_norm": 1.0, "steps": 0}  # no votes
    session.end_step()
    state = json.loads(json.dumps(session.state_dict()))
    again = quiet_session()
    again.load_state_dict(state)
    assert again.max_grad_norm == session.max_grad_norm
    assert again.state_dict() == state
    again.observe(norms(1.0))
    with pytest.raises(RuntimeError, match="under way"):
        again.load_state_dict(state)
    again.drop_step()
    with pytest.raises(ValueError, match="keys max_grad_norm and steps"):
        again.load_state_dict({})
    with pytest.raises(ValueError, match="max_grad_norm"):
        again.load_state_dict({"max_grad_norm": -1.0, "steps": 1})
    with pytest.raises(ValueError, match="one group"):
        again.observe({"layer": torch.ones(2)})
    assert again.max_grad_norm == session.max_grad_norm


def test_default_count_noise_follows_the_expected_batch_size() -> None:
    assert AdaptiveClipping(1.0, 100.0).count_noise_stddev == 5.0
    rule = AdaptiveClipping(1.0, 100.0, target_quantile=1)
    assert (rule.target_quantile, rule.learning_rate) == (1.0, 0.2)
    for bad in ({"expected_batch_size": 0.0}, {"target_quantile": -0.1}, {"learning_rate": 11.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            AdaptiveClipping(**{"max_grad_norm": 1.0, "expected_batch_size": 8.0, **bad})
