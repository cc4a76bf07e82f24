# SPDX-License-Identifier: Apache-2.0
"""Every clipping rule: the closed form of its factors, the bound on a contribution, groups, and wrong arguments."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from wavedp.privacy import (
    SUM_ROUNDING_ALLOWANCE,
    AdaptiveClipping,
    AutomaticClipping,
    Clipping,
    ClippingRule,
    Entropy,
    FlatClipping,
    GradientBook,
    NormalisedClipping,
    PerGroupClipping,
    PerLayerClipping,
)

NORMS = [0.0, 1e-30, 0.005, 0.5, 1.0, 3.0, 1e6, 1e30]
PARAMETERS = ("embed.weight", "blocks.0.weight", "blocks.0.bias", "blocks.1.weight", "scale")
HALF_ROUNDING = {torch.float32: 2.0**-21, torch.float64: 2.0**-49}


def squared(norms: list[float]) -> Tensor:
    return torch.tensor(norms, dtype=torch.float64).square()


def rules(bound: float) -> list[Clipping]:
    """Every rule whose bound on the whole contribution is ``bound``, for PARAMETERS."""
    share = bound / math.sqrt(14.0)
    per_group = PerGroupClipping({"embed": share, r"blocks\.\d+": 2 * share, "scale": 3 * share})
    return [
        FlatClipping(bound),
        AutomaticClipping(bound),
        AutomaticClipping(bound, gamma=1e-9),
        NormalisedClipping(bound),
        AdaptiveClipping(bound, 8.0),
        AdaptiveClipping(bound, 8.0).session(Entropy()),
        PerLayerClipping(bound).for_parameters(PARAMETERS),
        per_group.for_parameters(PARAMETERS),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("rule", "closed_form"),
    [
        (FlatClipping(0.7), lambda n: min(1.0, 0.7 / n) if n else 1.0),
        (AutomaticClipping(0.7), lambda n: 0.7 / (n + 0.01)),
        (AutomaticClipping(0.7, gamma=2.0), lambda n: 0.7 / (n + 2.0)),
        (NormalisedClipping(0.7), lambda n: min(2.0**64, 0.7 / n) if n else 0.0),
        (AdaptiveClipping(0.7, 8.0), lambda n: min(1.0, 0.7 / n) if n else 1.0),
        (AdaptiveClipping(0.7, 8.0).session(Entropy()), lambda n: min(1.0, 0.7 / n) if n else 1.0),
    ],
    ids=["flat", "automatic", "gamma", "normalised", "adaptive", "session"],
)
def test_closed_forms_over_all_parameters(rule: Clipping, closed_form: Any, dtype: torch.dtype) -> None:
    assert {rule.group_of(name) for name in PARAMETERS} == {""}
    factors = rule.group_factors({"": squared(NORMS)}, dtype)[""]
    assert factors.dtype == dtype
    exact = [closed_form(norm) for norm in NORMS]
    assert factors.tolist() == pytest.approx(exact, rel=HALF_ROUNDING[dtype] * 2)
    assert all(f <= e for f, e in zip(factors.tolist(), exact))  # down, never up
    assert rule.sensitivity() == 0.7 * (1 + SUM_ROUNDING_ALLOWANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_closed_form_by_group(dtype: torch.dtype) -> None:
    rule = PerGroupClipping({"embed": 0.3, r"blocks\.\d+": 0.4, "scale": 1.2})
    norms = {"embed": squared([0.6, 0.1]), r"blocks\.\d+": squared([0.0, 4.0]), "scale": squared([1.2, 2.4])}
    factors = rule.group_factors(norms, dtype)
    expected = {"embed": [0.5, 1.0], r"blocks\.\d+": [1.0, 0.1], "scale": [1.0, 0.5]}
    assert {g: f.tolist() for g, f in factors.items()} == {
        g: pytest.approx(f, rel=2 * HALF_ROUNDING[dtype]) for g, f in expected.items()
    }
    assert rule.max_grad_norm == pytest.approx(1.3, rel=1e-15)
    assert rule.sensitivity() == rule.max_grad_norm * (1 + SUM_ROUNDING_ALLOWANCE)


def test_closed_form_by_layer() -> None:
    rule = PerLayerClipping(2.0).for_parameters(PARAMETERS)
    groups = {name: rule.group_of(name) for name in PARAMETERS}
    assert sorted(set(groups.values())) == ["", "blocks.0", "blocks.1", "embed"]  # K = 4: each gets 2 / sqrt(4)
    assert groups["blocks.0.bias"] == groups["blocks.0.weight"] == "blocks.0"
    factors = rule.group_factors({"": squared([4.0, 0.5]), "embed": squared([10.0, 1.01])}, torch.float64)
    assert factors[""].tolist() == pytest.approx([0.25, 1.0], rel=1e-14)
    assert factors["embed"].tolist() == pytest.approx([0.1, 1 / 1.01], rel=1e-14)
    assert rule.sensitivity() == PerLayerClipping(2.0).sensitivity() == 2.0 * (1 + SUM_ROUNDING_ALLOWANCE)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    log_bound=st.floats(-6, 6),
    log_sizes=st.lists(st.floats(-12, 12), min_size=len(PARAMETERS), max_size=len(PARAMETERS)),
    poison=st.sampled_from([None, math.nan, math.inf, -math.inf, 0.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_no_record_contributes_more_than_the_bound(
    seed: int, log_bound: float, log_sizes: list[float], poison: float | None, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    grads = {
        name: torch.randn(6, 5, generator=generator, dtype=torch.float64).mul(10.0**size).to(dtype)
        for name, size in zip(PARAMETERS, log_sizes)
    }
    grads["scale"][3] *= 1e-20
    if poison is not None:
        grads["blocks.1.weight"][2, 1] = poison
    if poison == 0.0:
        for grad in grads.values():
            grad[1] = 0.0
    bound = 10.0**log_bound
    for rule in rules(bound):
        norms: dict[str, Tensor] = {}
        for name, grad in grads.items():
            group = rule.group_of(name)
            norms[group] = norms.get(group, torch.zeros(6, dtype=torch.float64)) + grad.double().square().sum(1)
        factors = rule.group_factors(norms, dtype)
        contributions = torch.zeros(6, dtype=torch.float64)
        for name, grad in grads.items():
            factor = factors[rule.group_of(name)].double()
            assert torch.isfinite(factor).all()
            kept = torch.where(factor[:, None] > 0, grad.double() * factor[:, None], torch.zeros(()).double())
            contributions += kept.square().sum(1)
        assert contributions.sqrt().max() <= bound * (1 + 1e-6), rule
        assert rule.sensitivity() >= bound * (1 + 1e-6) * (1 - 1e-12), rule
        if poison is not None and not math.isfinite(poison):
            assert {f[2].item() for f in factors.values()} == {0.0}, rule  # out of every group
            assert contributions[[0, 1, 3, 4, 5]].min() > 0.0, rule


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_non_finite_in_one_group_is_left_out_of_all_and_leaves_the_others(poison: float) -> None:
    rule = PerGroupClipping({"a": 1.0, "b": 1.0})
    clean = rule.group_factors({"a": squared([2.0, 3.0, 4.0]), "b": squared([0.5, 0.5, 8.0])}, torch.float32)
    norms = {"a": squared([2.0, 3.0, 4.0]), "b": torch.tensor([0.25, poison, 64.0], dtype=torch.float64)}
    for group, factors in rule.group_factors(norms, torch.float32).items():
        assert factors[1] == 0.0
        assert torch.equal(factors[[0, 2]], clean[group][[0, 2]])


def test_factors_that_underflow_are_zero_and_factors_that_would_overflow_are_capped() -> None:
    for rule in rules(1.0)[:6]:
        assert rule.group_factors({"": squared([1e39])}, torch.float32)[""].item() == 0.0
        assert 0.0 < rule.group_factors({"": squared([1e39])}, torch.float64)[""].item() <= 1e-39
    tiny = NormalisedClipping(1.0).factors(squared([1e-45, 1e-150, 1e-170, 0.0]), torch.float32)
    assert tiny[:2].tolist() == pytest.approx([2.0**64] * 2, rel=1e-6)
    assert tiny[2:].tolist() == [0.0, 0.0]  # a square that vanishes counts as zero


def test_empty_batches_and_no_groups() -> None:
    for rule in rules(1.0):
        group = rule.group_of(PARAMETERS[0])
        assert rule.group_factors({group: squared([])}, torch.float32)[group].shape == (0,)
        assert rule.group_factors({}, torch.float32) == {}


@pytest.mark.parametrize("rule", rules(1.0), ids=lambda rule: type(rule).__name__)
def test_wrong_norms_and_types_are_refused(rule: Clipping) -> None:
    group = rule.group_of("scale")
    with pytest.raises(ValueError, match="'elsewhere'"):
        rule.group_factors({"elsewhere": squared([1.0])}, torch.float32)
    with pytest.raises(ValueError, match=r"one vector \[B\] per group"):
        rule.group_factors({group: torch.ones(2, 2, dtype=torch.float64)}, torch.float32)
    with pytest.raises(ValueError, match=r"one vector \[B\] per group"):
        rule.group_factors({group: squared([1.0]), "embed": squared([1.0, 2.0])}, torch.float32)
    for dtype in (torch.bfloat16, torch.int64):
        with pytest.raises(TypeError, match="float32 or float64"):
            rule.group_factors({group: squared([1.0])}, dtype)


def test_static_rules_are_their_own_sessions_without_state() -> None:
    for rule in (*rules(1.0)[:4], *rules(1.0)[6:]):
        assert rule.session(Entropy()) is rule
        rule.observe({rule.group_of("scale"): squared([1.0])})
        rule.end_step()
        rule.drop_step()
        assert rule.state_dict() == {}
        rule.load_state_dict({})
        with pytest.raises(ValueError, match="has no state"):
            rule.load_state_dict({"max_grad_norm": 2.0})
        assert rule.sum_noise_multiplier(1.3) == 1.3
        assert rule.extra_charge(1.3) is None


def test_patterns_match_up_to_a_dot_or_the_end() -> None:
    rule = PerGroupClipping({"blocks.1": 1.0, "blocks.10": 2.0, ".*bias": 3.0})
    assert rule.group_of("blocks.1.weight") == "blocks.1"
    assert rule.group_of("blocks.10.weight") == "blocks.10"
    assert rule.group_of("head.bias") == ".*bias"
    with pytest.raises(ValueError, match=r"'blocks\.1\.bias' is in 2 clipping groups"):
        rule.group_of("blocks.1.bias")
    with pytest.raises(ValueError, match=r"'blocks\.2\.weight' is in no clipping group"):
        rule.group_of("blocks.2.weight")
    with pytest.raises(ValueError, match=r"groups \['.\*bias', 'blocks.10'\] take no trainable parameter"):
        rule.for_parameters(["blocks.1.weight"])
    assert PerGroupClipping({".*": 1.0}).group_of("anything.at.all") == ".*"
    assert PerGroupClipping({"a|b": 1.0}).group_of("b.weight") == "a|b"


def test_a_layer_that_the_rule_does_not_know_is_refused() -> None:
    rule = PerLayerClipping(1.0).for_parameters(["a.weight", "b.weight"])
    with pytest.raises(ValueError, match=r"'c\.weight' is in no layer"):
        rule.group_of("c.weight")
    with pytest.raises(ValueError, match="call for_parameters"):
        PerLayerClipping(1.0).group_factors({"a": squared([1.0])}, torch.float32)
    with pytest.raises(ValueError, match="no trainable parameters"):
        PerLayerClipping(1.0).for_parameters([])


@pytest.mark.parametrize(
    ("bounds", "error", "words"),
    [
        ({}, ValueError, "bounds is empty"),
        ({"a": 0.0}, ValueError, r"bounds\['a'\] must be >= 1e-09"),
        ({"a": math.inf}, ValueError, r"bounds\['a'\] must be finite"),
        ({"a": "1"}, TypeError, r"bounds\['a'\] must be a real number"),
        ({"a(": 1.0}, ValueError, "'a\\(' is not a regular expression"),
    ],
)
def test_wrong_bounds_are_refused(bounds: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        PerGroupClipping(bounds)


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ("sparse", ValueError, "'sparse' is not known; choose one of flat, per_layer, per_group, automatic"),
        ({"gamma": 0.1}, ValueError, "None is not known"),
        ({"name": "flat", "gamma": 0.1}, ValueError, r"'flat' has no parameters \['gamma'\]"),
        ({"name": "automatic", "gamma": 0.0}, ValueError, "gamma must be >= 1e-09"),
        ("per_group", ValueError, r"'per_group' needs the parameters \['bounds'\]"),
        ({"name": "adaptive", "target_quantile": 1.5}, ValueError, "target_quantile must be <= 1"),
        ({"name": "adaptive", "learning_rate": 0.0}, ValueError, "learning_rate must be > 0"),
        ({"name": "adaptive", "count_noise_stddev": -1.0}, ValueError, "count_noise_stddev must be > 0"),
        (3, TypeError, "clipping_rule must be a name or a mapping"),
    ],
)
def test_wrong_rules_are_refused(value: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ClippingRule.parse(value)


def test_rules_compare_by_meaning() -> None:
    assert ClippingRule.parse("automatic") == ClippingRule.parse({"name": "automatic", "gamma": 0.01})
    pairs = {"name": "per_group", "bounds": {"b": 1, "a": 2}}
    same = ClippingRule.parse({"bounds": {"a": 2.0, "b": 1.0}, "name": "per_group"})
    assert ClippingRule.parse(pairs) == same == ClippingRule.parse(same)
    assert hash(ClippingRule.parse(pairs)) == hash(same)
    made = same.make(max_grad_norm=math.hypot(1.0, 2.0), expected_batch_size=8.0)
    assert made == PerGroupClipping({"a": 2.0, "b": 1.0})
    with pytest.raises(ValueError, match=r"max_grad_norm=2\.0 must be the l2 norm of the bounds .* = 2\.236"):
        same.make(max_grad_norm=2.0, expected_batch_size=8.0)


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.second = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("index", range(8))
def test_booked_sums_follow_the_rule(index: int) -> None:
    """Against per-record gradients one at a time, for the rules of :func:`rules` on a model of two layers."""
    torch.manual_seed(0)
    model = TwoLayers().double()
    names = [name for name, _ in model.named_parameters()]
    per_group = PerGroupClipping({"first": 0.03, "second.bias": 0.01, "second.weight": 0.02})
    rule = per_group if index == 7 else rules(0.05)[index]
    rule = PerLayerClipping(0.05) if index == 6 else rule
    rule = rule.for_parameters(names)
    x = torch.randn(5, 4, dtype=torch.float64)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in x:
        grads = dict(zip(names, torch.autograd.grad(model(row[None]).square().sum(), list(model.parameters()))))
        norms: dict[str, Tensor] = {}
        for name, grad in grads.items():
            group = rule.group_of(name)
            norms[group] = norms.get(group, torch.zeros(1, dtype=torch.float64)) + grad.square().sum()
        factors = rule.group_factors(norms, torch.float64)
        for name, grad in grads.items():
            expected[name] += grad * factors[rule.group_of(name)].item()
    with GradientBook(model) as book:
        sums = book.clipped_sums(model(x).square().sum(1), rule)
    for name, total in expected.items():
        assert torch.allclose(sums[name], total, rtol=1e-9, atol=1e-15), name
