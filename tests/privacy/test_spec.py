# SPDX-License-Identifier: Apache-2.0
"""The specification refuses what it cannot account for, and everything else derives from it."""

import dataclasses
import json
import math
from collections.abc import Callable

import pytest

from wavedp.privacy import PrivacySpec, accounting

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
    )
    assert 0.99 * 4.0 <= made.epsilon() <= 4.0
    assert made.epsilon() <= accounting.epsilon_rdp(
        sample_rate=0.05, noise_multiplier=made.noise_multiplier, steps=200, delta=1e-4
    )
