# SPDX-License-Identifier: Apache-2.0
"""The options of private steps: which go together, and what is saved, loaded and scheduled."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

import wavedp
from wavedp.optim import DPSGD, DPAdam, DPAdamW

OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "average": (DPSGD, {"momentum": 0.9, "ema_decay": 0.9}),
    "master": (DPSGD, {"master_weights": True}),
    "adam-master-average": (DPAdam, {"master_weights": True, "ema_decay": 0.5, "amsgrad": True}),
    "stochastic-average": (DPAdamW, {"stochastic_rounding": True, "ema_decay": 0.5}),
    "corrected": (DPAdamW, {"noise_correction": 1e-4, "ema_decay": 0.5, "master_weights": True}),
}


@pytest.mark.parametrize("noise_mode", ["standard", "strict"])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_saved_state_goes_on(options: str, noise_mode: str) -> None:
    make, arguments = OPTIONS[options]
    ours = [torch.nn.Parameter(torch.linspace(-1, 1, size).to(torch.bfloat16)) for size in (5, 700)]
    optimizer = make(ours, lr=0.01, **arguments)

    def step(one: Any, seed: int) -> None:
        total = [None, torch.linspace(-3, 3, 700)]
        key = wavedp.NoiseKey.insecure(seed)
        one.step(sums=total, std=1.0 + seed, denominator=2.0, key=key, noise_mode=noise_mode)

    for seed in range(3):
        step(optimizer, seed)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copies = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    other = make(copies, lr=0.5)
    other.load_state_dict(torch.load(file, weights_only=True))
    step(optimizer, 9)
    step(other, 9)
    for parameter, copy in zip(ours, copies):
        assert torch.equal(parameter, copy)
        assert optimizer.state[parameter].keys() == other.state[copy].keys()
        for name, value in optimizer.state[parameter].items():
            assert value.dtype == (torch.float64 if name == "noise_variance" else torch.float32), name
            assert torch.equal(value, other.state[copy][name]), name
            assert value is not other.state[copy][name]


def test_a_state_of_torchs_keeps_the_options() -> None:
    """Its moments are of gradients without noise, and it has no averages: both begin with the next step."""
    theirs, ours = ([torch.nn.Parameter(torch.linspace(-1, 1, 9))] for _ in range(2))
    plain = torch.optim.Adam(theirs, lr=0.25)
    for _ in range(3):
        theirs[0].grad = torch.linspace(1, 2, 9)
        plain.step()
    optimizer = DPAdam(ours, noise_correction=1e-6, ema_decay=0.99)
    optimizer.load_state_dict(plain.state_dict())
    group = optimizer.param_groups[0]
    assert (group["noise_correction"], group["ema_decay"], group["lr"]) == (1e-6, 0.99, 0.25)
    optimizer.step(sums=[torch.linspace(1, 2, 9)], std=2.0, denominator=4.0)
    state = optimizer.state[ours[0]]
    assert float(state["step"]) == 4.0
    assert float(state["noise_variance"]) == pytest.approx(0.001 * 0.25)
    assert torch.equal(state["average"], ours[0])


def test_an_amsgrad_state_of_torchs_is_refused_with_the_correction() -> None:
    theirs, ours = ([torch.nn.Parameter(torch.ones(3))] for _ in range(2))
    optimizer = DPAdam(ours, noise_correction=1e-6)
    optimizer.load_state_dict(torch.optim.Adam(theirs, amsgrad=True).state_dict())
    with pytest.raises(ValueError, match="leave amsgrad or noise_correction out"):
        optimizer.step(sums=[None], std=1.0, denominator=1.0)
    assert ours[0].tolist() == [1.0] * 3


def test_a_scheduler_of_rates_and_betas_is_torchs() -> None:
    theirs, ours = ([torch.nn.Parameter(torch.linspace(-1, 1, 50, dtype=torch.float64))] for _ in range(2))
    plain, optimizer = torch.optim.AdamW(theirs, lr=0.1), DPAdamW(ours, lr=0.1, ema_decay=0.9)
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(one, 0.3, total_steps=8) for one in (plain, optimizer)]
    for k in range(8):
        theirs[0].grad = torch.linspace(1, 2, 50, dtype=torch.float64) + k
        plain.step()
        optimizer.step(sums=[theirs[0].grad], std=0.0, denominator=1.0)
        for scheduler in schedulers:
            scheduler.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


def test_groups_have_options_of_their_own() -> None:
    ours = [torch.nn.Parameter(torch.ones(300, dtype=torch.bfloat16)) for _ in range(3)]
    groups: list[dict[str, Any]] = [
        {"params": ours[:1]},
        {"params": ours[1:2], "master_weights": True},
        {"params": ours[2:], "stochastic_rounding": True, "ema_decay": 0.5},
    ]
    optimizer = DPSGD(groups, lr=1.0)
    key = wavedp.NoiseKey.insecure(1)
    optimizer.step(sums=[None] * 3, std=1.0, denominator=1.0, key=key)
    for k, (parameter, names) in enumerate(zip(ours, (set(), {"master"}, {"average", "average_step"}))):
        assert set(optimizer.state[parameter]) == names
        value = 1.0 - wavedp.noisy_mean(torch.zeros(300), 1.0, key=key, offset=300 * k)
        near = parameter.detach().float() - value
        assert near.abs().max() < 2.0**-6
        assert torch.equal(parameter, value.bfloat16()) == (k < 2)
    optimizer.param_groups[1]["master_weights"] = False
    optimizer.step(sums=[None] * 3, std=1.0, denominator=1.0)
    assert not optimizer.state[ours[1]]


@pytest.mark.parametrize(
    ("make", "options", "error", "match"),
    [
        (DPAdam, {"noise_correction": 1e-3, "amsgrad": True}, ValueError, "leave amsgrad or noise_correction out"),
        (DPAdamW, {"noise_correction": 0.0}, ValueError, "noise_correction > 0"),
        (DPAdamW, {"noise_correction": True}, TypeError, "real number as noise_correction"),
        (DPSGD, {"ema_decay": 1.0}, ValueError, r"ema_decay in \[0, 1\)"),
        (DPSGD, {"ema_decay": -0.1}, ValueError, "ema_decay >= 0"),
        (DPSGD, {"master_weights": 1}, TypeError, "master_weights as True or False"),
        (DPAdam, {"stochastic_rounding": None}, TypeError, "stochastic_rounding as True or False"),
        (DPAdam, {"stochastic_rounding": True, "master_weights": True}, ValueError, "ask for one of them"),
        (DPAdam, {"stochastic_rounding": True}, ValueError, "float16: use master_weights=True"),
    ],
)
def test_wrong_options(make: Any, options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make([torch.nn.Parameter(torch.ones(1, dtype=torch.float16))], **options)


def test_a_refused_group_is_not_added() -> None:
    optimizer = DPSGD([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match="ema_decay"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "ema_decay": 2.0})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("arguments", [{"noise_mode": "exact"}, {"noise_mode": "strict", "grid": 0.0}])
def test_a_wrong_mode_changes_nothing(arguments: dict[str, Any]) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = DPAdam([parameter], ema_decay=0.9)
    with pytest.raises(ValueError, match=r"mode 'standard' or 'strict'|made of integers"):
        optimizer.step(sums=[None], std=1.0, denominator=1.0, **arguments)
    assert parameter.tolist() == [1.0] * 3
    assert not optimizer.state


def test_a_sparse_sum_changes_nothing() -> None:
    param = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = DPAdam([param])
    with pytest.raises(ValueError, match="make it dense"):
        optimizer.step(sums=[torch.ones(3, 2).to_sparse()], std=1.0, denominator=1.0)
    assert not optimizer.state[param]
    assert torch.equal(param, torch.ones(3, 2))


@pytest.mark.parametrize("count", [-1.0, float("nan"), float("inf")])
def test_a_state_with_an_impossible_count_of_steps_is_refused(count: float) -> None:
    optimizer = DPAdam([torch.nn.Parameter(torch.ones(2))])
    optimizer.step(sums=[torch.ones(2)], std=0.0, denominator=1.0)
    state = optimizer.state_dict()
    state["state"][0]["step"] = torch.tensor(count)
    with pytest.raises(ValueError, match="damaged"):
        optimizer.load_state_dict(state)
