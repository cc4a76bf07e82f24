# SPDX-License-Identifier: Apache-2.0
"""Private steps against torch's optimizers without noise, and against the noisy mean with it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import wavedp
from wavedp.optim import DPSGD, DPAdam, DPAdamW

# One element, odd sizes, none, no axis, and more than a chunk of 640 numbers.
SHAPES = ((7,), (33, 5), (0,), (1300,), (), (2, 3, 4))
RULES = {
    "sgd": (DPSGD, torch.optim.SGD, {"lr": 0.1}),
    "sgd-decay": (DPSGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.2, "maximize": True}),
    "momentum": (DPSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "nesterov": (DPSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True}),
    "adam": (DPAdam, torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-3}),
    "amsgrad": (DPAdam, torch.optim.Adam, {"amsgrad": True, "betas": (0.5, 0.6), "maximize": True}),
    "adamw": (DPAdamW, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "adamw-amsgrad": (DPAdamW, torch.optim.AdamW, {"amsgrad": True, "betas": (0.9, 0.3)}),
}
# In units of the largest parameter: a few roundings of the type that a step is computed in, 2^-24 or 2^-53 each.
TOLERANCES = {torch.float32: 8 * 2.0**-24, torch.float64: 8 * 2.0**-53}


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def clipped_sums(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_without_noise_a_step_is_torchs(implementation: str, rule: str, dtype: torch.dtype) -> None:
    private, plain, options = RULES[rule]
    ours, theirs = parameters(dtype), parameters(dtype)
    optimizer, expected = private(ours, **options), plain(theirs, **options)
    for step in range(6):
        sums = clipped_sums(step, dtype)
        for parameter, total in zip(theirs, sums):
            parameter.grad = total / 4
        expected.step()
        optimizer.step(sums=sums, std=0.0, denominator=4.0)
    for parameter, other in zip(ours, theirs):
        assert (parameter - other).abs().le(TOLERANCES[dtype] * 4).all(), implementation
    for parameter, other in zip(ours, theirs):
        assert optimizer.state[parameter].keys() == {k for k, v in expected.state[other].items() if v is not None}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(implementation: str, dtype: torch.dtype) -> None:
    """One step from float32 copies of the parameters, rounded once; the moments are those of float32."""
    ours = parameters(dtype)
    wide = [torch.nn.Parameter(parameter.detach().float()) for parameter in ours]
    optimizer, expected = DPAdamW(ours, lr=0.01), DPAdamW(wide, lr=0.01)
    for one in (optimizer, expected):
        one.step(sums=clipped_sums(1), std=0.5, denominator=3.0, key=wavedp.NoiseKey.insecure(1))
    for parameter, other in zip(ours, wide):
        assert torch.equal(parameter, other.to(dtype)), implementation
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[parameter][name], expected.state[other][name])


def test_the_noise_is_that_of_the_mean(implementation: str) -> None:
    """By a rate of 1 from zero a step is minus the noisy mean; parameters take the stream one after the other, in
    the order of their groups, and those without a sum get noise too."""
    ours = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.float32)) for shape in SHAPES]
    sums: list[Tensor | None] = [*clipped_sums(2)]
    sums[3] = None
    groups = [{"params": ours[:2]}, {"params": ours[2:]}]
    key = wavedp.NoiseKey.insecure(7)
    DPSGD(groups, lr=1.0).step(sums=sums, std=1.5, denominator=3.0, key=key)
    offset = 0
    for parameter, total in zip(ours, sums):
        total = torch.zeros_like(parameter) if total is None else total
        mean = wavedp.noisy_mean(total, 1.5, divisor=3.0, key=key, offset=offset)
        assert torch.equal(parameter.detach(), -mean), implementation
        offset += parameter.numel()
    assert not key.is_wiped


def test_parameters_of_several_types_share_the_stream(implementation: str) -> None:
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float64, torch.float32)
    ours = [torch.nn.Parameter(torch.zeros(203, dtype=dtype)) for dtype in dtypes]
    key = wavedp.NoiseKey.insecure(7)
    DPSGD(ours, lr=1.0).step(sums=[None] * 5, std=1.0, denominator=1.0, key=key)
    for k, (parameter, dtype) in enumerate(zip(ours, dtypes)):
        total = torch.zeros(203, dtype=torch.promote_types(dtype, torch.float32))
        mean = wavedp.noisy_mean(total, 1.0, key=key, offset=203 * k)
        assert torch.equal(parameter.detach(), -mean.to(dtype)), implementation


def test_isas_and_threads_do_not_show() -> None:
    native = pytest.importorskip("wavedp._csrc", reason="needs the C++ library")
    before, threads = native.isa(), torch.get_num_threads()
    results = []
    try:
        for isa, team in (("baseline", 1), ("avx2", 1), ("avx512", 1), (before, 3)):
            try:
                native.set_isa(isa)
            except ValueError:
                continue
            torch.set_num_threads(team)
            ours = [torch.nn.Parameter(torch.ones(100_001)), *parameters()]
            optimizer = DPAdamW(ours, amsgrad=True)
            for seed in range(3):
                sums = [torch.full((100_001,), 0.5), *clipped_sums(seed)]
                optimizer.step(sums=sums, std=1.0, denominator=3.0, key=wavedp.NoiseKey.insecure(seed))
            results.append(torch.cat([parameter.detach().flatten() for parameter in ours]))
    finally:
        native.set_isa(before)
        torch.set_num_threads(threads)
    assert len(results) >= 2
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_key_of_its_own_for_every_step() -> None:
    ours = [torch.nn.Parameter(torch.zeros(500))]
    optimizer = DPSGD(ours, lr=1.0)
    optimizer.step(sums=[None], std=1.0, denominator=1.0)
    first = ours[0].detach().clone()
    optimizer.step(sums=[None], std=1.0, denominator=1.0)
    second = ours[0].detach() - first
    assert abs(float(first @ second)) < 6 * math.sqrt(500)
    assert 0.7 < float(second.std()) < 1.3
    steps = first * 2.0**12
    assert torch.equal(steps, torch.round(steps))


def test_strides_do_not_matter(implementation: str) -> None:
    base = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    ours = [torch.nn.Parameter(x) for x in (base.clone(), base.transpose(0, 2).contiguous().transpose(0, 2))]
    total = torch.randn(5, 4, 3).transpose(0, 2)
    for parameter in ours:
        version = parameter._version
        DPAdam([parameter]).step(sums=[total], std=1.0, denominator=2.0, key=wavedp.NoiseKey.insecure(1))
        assert parameter._version > version
    assert torch.equal(ours[0], ours[1]), implementation
    assert not torch.equal(ours[0].detach(), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["momentum", "adamw-amsgrad"])
def test_a_loaded_state_goes_on_as_the_saved_one(rule: str, dtype: torch.dtype) -> None:
    """torch casts moments to the type of their parameter; these keep theirs."""
    private, _, options = RULES[rule]
    ours = parameters(dtype)
    optimizer = private(ours, **options)
    for seed in range(2):
        optimizer.step(sums=clipped_sums(seed), std=1.0, denominator=2.0, key=wavedp.NoiseKey.insecure(seed))
    copies = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    other = private(copies, **options)
    other.load_state_dict(optimizer.state_dict())
    for one in (optimizer, other):
        one.step(sums=clipped_sums(9), std=1.0, denominator=2.0, key=wavedp.NoiseKey.insecure(9))
    for parameter, copy in zip(ours, copies):
        assert torch.equal(parameter, copy)
        for name in optimizer._moments:
            assert optimizer.state[parameter][name].dtype == torch.float32
            assert torch.equal(optimizer.state[parameter][name], other.state[copy][name])
            assert optimizer.state[parameter][name] is not other.state[copy][name]


def test_a_state_of_torchs_is_taken() -> None:
    theirs, ours = parameters(), parameters()
    plain, optimizer = torch.optim.AdamW(theirs), DPAdamW(ours)
    for _ in range(2):
        for parameter, total in zip(theirs, clipped_sums(1)):
            parameter.grad = total
        plain.step()
    with torch.no_grad():
        for parameter, other in zip(ours, theirs):
            parameter.copy_(other)
    optimizer.load_state_dict(plain.state_dict())
    plain.step()
    optimizer.step(sums=clipped_sums(1), std=0.0, denominator=1.0)
    for parameter, other in zip(ours, theirs):
        torch.testing.assert_close(parameter, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"sums": None}, RuntimeError, "not by .grad"),
        ({"std": None}, RuntimeError, "takes sums=, std= and denominator="),
        ({"closure": lambda: 0.0}, RuntimeError, "takes no closure"),
        ({"sums": torch.zeros(2, 3)}, TypeError, "as a list"),
        ({"sums": [torch.zeros(3)]}, ValueError, "2 sums, one for each parameter, not 1"),
        ({"sums": [torch.zeros(3), torch.zeros(2)]}, ValueError, "sum 1 of DPAdam.step has the shape"),
        ({"sums": [torch.zeros(3), 0.0]}, TypeError, "sum 1 of DPAdam.step must be a tensor"),
        ({"sums": [torch.zeros(3).bfloat16(), None]}, ValueError, "sum 0 of DPAdam.step is torch.bfloat16"),
        ({"std": -1.0}, ValueError, "std >= 0"),
        ({"std": math.nan}, ValueError, "std >= 0"),
        ({"denominator": 0}, ValueError, "denominator > 0"),
        ({"grid": 0.1}, ValueError, "power of two"),
        ({"key": b"0" * 32}, TypeError, "takes a NoiseKey"),
    ],
)
def test_what_does_not_fit_changes_nothing(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    ours = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(1))]
    optimizer = DPAdam(ours)
    good: dict[str, Any] = {"sums": [torch.zeros(3), None], "std": 1.0, "denominator": 2.0}
    with pytest.raises(error, match=match):
        optimizer.step(**(good | arguments))
    assert all(torch.equal(parameter, torch.ones_like(parameter)) for parameter in ours)
    assert not optimizer.state


@pytest.mark.parametrize(
    ("optimizer", "options", "match"),
    [
        (DPSGD, {"lr": -1.0}, "lr >= 0"),
        (DPSGD, {"nesterov": True}, "nesterov needs a momentum"),
        (DPAdam, {"betas": (0.9, 1.0)}, "betas"),
        (DPAdamW, {"eps": math.inf}, "finite eps"),
    ],
)
def test_wrong_options(optimizer: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        optimizer([torch.nn.Parameter(torch.ones(1))], **options)


def test_a_scheduler_of_torchs_sets_the_rate() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = DPSGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(3):
        optimizer.step(sums=[torch.ones(3)], std=0.0, denominator=1.0)
        scheduler.step()
    assert parameter.tolist() == [-1.75] * 3
