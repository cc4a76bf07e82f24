# SPDX-License-Identifier: Apache-2.0
"""The specification refuses what it cannot account for, and everything else derives from it."""

import dataclasses
import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest

from wavedp.privacy import (
    AdaptiveClipping,
    AutomaticClipping,
    FlatClipping,
    NormalisedClipping,
    PerGroupClipping,
    PerLayerClipping,
    PrivacySpec,
    accounting,
)

MakeSpec = Callable[..., PrivacySpec]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sample_rate", 0.0),
        ("sample_rate", 1.0001),
        ("sample_rate", 5e-20),  # below 2^-64
        ("sample_rate", math.nan),
        ("steps", 0),
        ("noise_multiplier", -0.1),
        ("noise_multiplier", math.inf),
        ("max_grad_norm", 0.0),
        ("max_grad_norm", math.inf),
        ("max_grad_norm", 1e-12),
        ("expected_batch_size", 0.0),
        ("delta", 0.0),
        ("delta", 0.01),  # 1 / dataset_size_bound
        ("delta", 0.5),
        ("dataset_size_bound", 0),
        ("neighboring_relation", "replace_one"),
        ("unit", "  "),
    ],
)
def test_refuses(spec: MakeSpec, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        spec(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("steps", 10.0), ("steps", True), ("sample_rate", "0.1"), ("sample_rate", None)]
)
def test_refuses_types(spec: MakeSpec, name: str, value: object) -> None:
    with pytest.raises(TypeError, match=name):
        spec(**{name: value})


def test_is_immutable(spec: MakeSpec) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec().noise_multiplier = 0.1  # type: ignore[misc]


def test_noise_scales_with_sensitivity_which_covers_the_bound(spec: MakeSpec) -> None:
    made = spec(noise_multiplier=2.5, max_grad_norm=0.3)
    assert 0.3 < made.sensitivity < 0.3 * 1.002
    assert made.noise_stddev == pytest.approx(2.5 * made.sensitivity, rel=1e-15)


def test_event_is_what_epsilon_accounts_for(spec: MakeSpec) -> None:
    from dp_accounting.pld import PLDAccountant

    made = spec(sample_rate=0.05, steps=100)
    by_event = PLDAccountant().compose(made.event()).get_epsilon(made.delta)
    assert made.epsilon() == pytest.approx(by_event, rel=1e-9)
    assert made.with_steps(50).epsilon() < made.epsilon()
    assert made.with_steps(50).steps == 50


def test_round_trip_and_fingerprint(spec: MakeSpec) -> None:
    made = spec(delta=1.23456789e-7)
    again = PrivacySpec.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again == made
    assert again.fingerprint() == made.fingerprint()
    assert len(made.fingerprint()) == 64
    prints = {spec(**change).fingerprint() for change in ({}, {"steps": 21}, {"unit": "person"}, {"delta": 2e-3})}
    assert len(prints) == 4


@pytest.mark.parametrize(
    "rule",
    [
        "flat",
        "per_layer",
        {"name": "per_group", "bounds": {"head": 0.8, r"blocks\.\d+": 0.6}},
        "normalised",
        {"name": "automatic", "gamma": 0.1},
        {"name": "adaptive", "count_noise_stddev": 3.0, "target_quantile": 0.4},
    ],
    ids=str,
)
def test_clipping_rule_round_trips(spec: MakeSpec, rule: Any) -> None:
    made = spec(clipping_rule=rule)
    written = json.dumps(made.to_dict())
    again = PrivacySpec.from_dict(json.loads(written))
    assert again == made
    assert hash(again) == hash(made)
    assert again.clipping == made.clipping
    assert again.fingerprint() == made.fingerprint()
    assert json.loads(written)["clipping_rule"]["name"] == made.clipping_rule.name
    assert made.sensitivity == pytest.approx(1.0 + 2.0**-9, rel=1e-12)
    assert made.noise_stddev == made.clipping.sum_noise_multiplier(made.noise_multiplier) * made.sensitivity


def test_clipping_rule_is_part_of_the_fingerprint(spec: MakeSpec) -> None:
    rules = ["flat", "per_layer", "normalised", "automatic", {"name": "automatic", "gamma": 0.1}]
    rules += [{"name": "adaptive", "count_noise_stddev": s} for s in (2.0, 3.0)]
    assert len({spec(clipping_rule=rule).fingerprint() for rule in rules}) == len(rules)
    assert spec(clipping_rule={"name": "automatic", "gamma": 0.01}).fingerprint() == (
        spec(clipping_rule="automatic").fingerprint()
    )
    assert spec().clipping == FlatClipping(1.0)
    assert spec().to_dict()["clipping_rule"] == {"name": "flat"}


def test_every_rule_makes_its_clipping(spec: MakeSpec) -> None:
    assert spec(clipping_rule={"name": "automatic", "gamma": 1}).clipping == AutomaticClipping(1.0, gamma=1.0)
    assert spec(clipping_rule="normalised", max_grad_norm=0.2).clipping == NormalisedClipping(0.2)
    assert spec(clipping_rule="per_layer").clipping == PerLayerClipping(1.0)
    bounds = {"a": 3.0, "b": 4.0}
    made = spec(clipping_rule={"name": "per_group", "bounds": bounds}, max_grad_norm=5.0)
    assert made.clipping == PerGroupClipping(bounds)
    made = spec(clipping_rule="adaptive", expected_batch_size=100.0, max_grad_norm=0.5)
    assert made.clipping == AdaptiveClipping(0.5, 100.0, count_noise_stddev=5.0)
    # The default count noise follows the one field that a resumed run may change, at the same cost.
    assert dataclasses.replace(made, expected_batch_size=200.0).clipping == AdaptiveClipping(0.5, 200.0)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("ghost", "clipping_rule 'ghost' is not known"),
        ({"name": "per_group", "bounds": {"a": 3.0}}, "max_grad_norm=1.0 must be the l2 norm"),
        ({"name": "adaptive", "count_noise_stddev": 0.5}, "count_noise_stddev=0.5 must be above"),
    ],
)
def test_refuses_rules(spec: MakeSpec, rule: Any, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        spec(clipping_rule=rule)


def test_from_dict_wants_every_field(spec: MakeSpec) -> None:
    values = spec().to_dict()
    del values["delta"]
    with pytest.raises(ValueError, match="missing \\['delta'\\]"):
        PrivacySpec.from_dict(values)
    with pytest.raises(ValueError, match="unknown \\['seed'\\]"):
        PrivacySpec.from_dict({**spec().to_dict(), "seed": 1})


def test_for_target_epsilon() -> None:
    made = PrivacySpec.for_target_epsilon(
        4.0,
        sample_rate=0.05,
        steps=200,
        max_grad_norm=1.0,
        expected_batch_size=64,
        delta=1e-4,
        dataset_size_bound=2000,
        clipping_rule={"name": "adaptive", "count_noise_stddev": 9},
    )
    assert dict(made.to_dict()["clipping_rule"])["count_noise_stddev"] == 9.0
    assert 0.99 * 4.0 <= made.epsilon() <= 4.0
    assert made.epsilon() <= accounting.epsilon_rdp(
        sample_rate=0.05, noise_multiplier=made.noise_multiplier, steps=200, delta=1e-4
    )


def test_what_was_written_before_later_fields_came_is_still_read(spec: MakeSpec) -> None:
    made = spec()
    written = made.to_dict()
    assert set(written) == {
        "sample_rate", "steps", "noise_multiplier", "max_grad_norm", "expected_batch_size", "delta",
        "dataset_size_bound", "neighboring_relation", "unit", "clipping_rule",
    }  # fmt: skip
    assert PrivacySpec.from_dict(written) == made
    assert made.fingerprint() == "f5ed577220f61d1f40f990d0ef43144af986d1069f380f2f17498a429cb445a0"


LATER = [
    {"truncated_batch_size": 30},
    {"label_noise_multiplier": 5},
    {"noise_mode": "strict", "trainable_parameters": 1000},
]


@pytest.mark.parametrize("change", LATER, ids=lambda change: next(iter(change)))
def test_later_fields_are_part_of_the_fingerprint(spec: MakeSpec, change: dict[str, Any]) -> None:
    made = spec(**change)
    assert made.to_dict() == {**spec().to_dict(), **change}
    assert PrivacySpec.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert made.fingerprint() != spec().fingerprint()


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("truncated_batch_size", 0, ValueError),
        ("truncated_batch_size", 2.5, TypeError),
        ("label_noise_multiplier", 0.0, ValueError),
        ("label_noise_multiplier", math.inf, ValueError),
        ("label_noise_multiplier", "1", TypeError),
    ],
)
def test_refuses_later_fields(spec: MakeSpec, name: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        spec(**{name: value})


def test_phases_are_what_is_charged(spec: MakeSpec) -> None:
    made = spec(label_noise_multiplier=5.0, truncated_batch_size=30)
    training, labels = made.phases()
    assert training == accounting.Phase(1.0, 0.1, 20, truncated_batch_size=30, dataset_size_bound=100)
    assert labels == accounting.Phase(5.0)
    assert made.releases == ("label_histogram",)
    assert spec().releases == ()
    assert made.phases(steps=3)[0].steps == 3
    assert made.epsilon() == accounting.composed_epsilon(made.phases(), made.delta)
    assert made.epsilon_bounds() == accounting.composed_epsilon_bounds(made.phases(), made.delta)
    assert made.epsilon_rdp() == accounting.composed_epsilon_rdp(made.phases(), made.delta)
    assert made.epsilon(steps=7, delta=1e-4) == accounting.composed_epsilon(made.phases(7), 1e-4)
    assert made.event() == accounting.composed_event(made.phases())
    assert made.epsilon() > spec(label_noise_multiplier=5.0).epsilon() > spec().epsilon()
    with pytest.raises(ValueError, match="steps"):
        made.phases(steps=21)


@pytest.mark.parametrize("change", LATER, ids=lambda change: next(iter(change)))
def test_calibration_counts_all_phases(change: dict[str, Any]) -> None:
    made = PrivacySpec.for_target_epsilon(
        3.0, sample_rate=0.05, steps=50, max_grad_norm=1.0, expected_batch_size=10, delta=1e-4, dataset_size_bound=300,
        **change,
    )  # fmt: skip
    assert 0.99 * 3.0 <= made.epsilon() <= 3.0
    assert made.calibrated(1.0).noise_multiplier > made.noise_multiplier


def test_a_histogram_that_costs_the_target_leaves_no_noise_for_the_steps() -> None:
    with pytest.raises(ValueError):
        PrivacySpec.for_target_epsilon(
            1.0, sample_rate=0.05, steps=50, max_grad_norm=1.0, expected_batch_size=10, delta=1e-4,
            dataset_size_bound=300, label_noise_multiplier=0.5,
        )  # fmt: skip
    with pytest.raises(TypeError, match="leave it out"):
        PrivacySpec.for_target_epsilon(1.0, noise_multiplier=1.0)
