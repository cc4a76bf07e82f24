# SPDX-License-Identifier: Apache-2.0
"""What a private step does besides: averages, masters, rounding at random, the second moment without the noise's."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from torch import Tensor

import wavedp
from wavedp.ops import use_backend
from wavedp.ops.noise_step import ADAM, SGD, StepConstants, StepTensor, noise_step
from wavedp.optim import DPSGD, DPAdam, DPAdamW
from wavedp.reference.noise import NOISE_DOMAIN, ROUNDING_DOMAIN
from wavedp.reference.noise_step import rounded_at_random, rounding_bits

# One element, none, and sizes that part groups of 160, 128 and 512 numbers anywhere.
SIZES = (7, 0, 1, 1300, 513)
SIGMAS = 5.4  # two-sided 6.7e-8
GRID = 2.0**-12
KEY = torch.arange(32, dtype=torch.uint8)
RULES = {
    "sgd": (SGD, StepConstants(l2=0.1, rate=0.5), 0),
    "momentum": (SGD, StepConstants(rate=0.5, keep_first=0.9, first=0.3, nesterov=1.0, from_first=0.9), 1),
    "adam": (
        ADAM,
        StepConstants(rate=0.1, first=0.1, keep=0.9, keep_second=0.9, second=0.1, root_scale=1.7, eps=0.1),
        2,
    ),
    "amsgrad": (ADAM, StepConstants(rate=0.1, first=0.1, keep_second=0.5, second=0.5, root_scale=1.3, eps=0.1), 3),
}
RULES["corrected"] = (ADAM, RULES["adam"][1]._replace(noise_square=0.3, least_square=0.2), 2)
RULES["corrected-amsgrad"] = (ADAM, RULES["amsgrad"][1]._replace(noise_square=0.3, least_square=0.2), 3)
FORMS = ("plain", "average", "master", "stochastic")
# A few roundings of the type that a step is computed in, of numbers below 8.
TOLERANCES = {torch.float32: 64 * 2.0**-24, torch.float64: 64 * 2.0**-53}


def tensors_of(dtype: torch.dtype, form: str, moments: int, constants: StepConstants) -> list[StepTensor]:
    """Moments and averages are not zero, as after some steps. There is an average in every form but the first, so that
    the float32 number that was rounded is seen."""
    generator = torch.Generator().manual_seed(2)
    real = torch.promote_types(dtype, torch.float32)
    constants = constants._replace(average_weight=0.0 if form == "plain" else 1.0 if form != "average" else 0.3)
    tensors = []
    for size in SIZES:
        values = [torch.randn(size, generator=generator, dtype=real) for _ in range(7)]
        param, total = values[0].to(dtype), values[1] * 3
        first, second, largest = (x.abs() if k < moments else None for k, x in enumerate(values[2:5]))
        average = None if form == "plain" else values[5] if form == "average" else torch.zeros(size, dtype=real)
        master = values[0] + values[6] / 16 if form == "master" else None
        tensors.append(
            StepTensor(param, total, first, second, largest, average, master, form == "stochastic", constants)
        )
    return tensors


def forms_of(dtype: torch.dtype) -> tuple[str, ...]:
    return FORMS if dtype == torch.bfloat16 else FORMS[:3] if dtype == torch.float16 else FORMS[:2]


CASES = [
    (dtype, form) for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16) for form in forms_of(dtype)
]


@functools.cache
def expected_of(dtype: torch.dtype, form: str, rule: str, std: float, offset: int, strict: bool) -> list[StepTensor]:
    """By the definition; computed once for all instruction sets."""
    code, constants, moments = RULES[rule]
    tensors = tensors_of(dtype, form, moments, constants)
    with use_backend("reference"):
        noise_step(code, tensors, std, GRID if std > 0.0 else 0.0, 3.0, KEY, 5, offset, strict)
    return tensors


@pytest.mark.parametrize("implementation", ["baseline", "avx2", "avx512"], indirect=True)
@pytest.mark.parametrize("strict", [False, True], ids=["standard", "strict"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("dtype", "form"), CASES, ids=str)
def test_a_step_is_the_definitions(implementation: str, dtype: torch.dtype, form: str, rule: str, strict: bool) -> None:
    code, constants, moments = RULES[rule]
    real = torch.promote_types(dtype, torch.float32)
    for std, offset in ((0.0, 0), (0.7, 2**33 + 77)):
        found = tensors_of(dtype, form, moments, constants)
        noise_step(code, found, std, GRID if std > 0.0 else 0.0, 3.0, KEY, 5, offset, strict)
        expected = expected_of(dtype, form, rule, std, offset, strict)
        begin = offset
        for one, other in zip(found, expected):
            for name in ("first", "second", "largest", "average", "master"):
                x, y = getattr(one, name), getattr(other, name)
                if x is not None:
                    assert (x - y).abs().le(TOLERANCES[real]).all(), (implementation, name)
            if form in ("plain", "average"):
                # The rounding may fall the other way where the number that is rounded differs.
                unit = torch.finfo(dtype).eps if real != dtype else TOLERANCES[real]
                assert (one.param - other.param).abs().le(unit * other.param.abs().clamp_min(1.0)).all()
            elif form == "master":
                assert torch.equal(one.master, one.average)  # type: ignore[arg-type]
                assert torch.equal(one.param, one.master.to(dtype))  # type: ignore[union-attr]
            else:
                bits = rounding_bits(KEY, 5, begin, one.param.numel(), one.param.device)
                assert torch.equal(one.param, rounded_at_random(one.average, bits))  # type: ignore[arg-type]
            begin += one.param.numel()


def test_instruction_sets_and_threads_do_not_show() -> None:
    native = pytest.importorskip("wavedp._csrc", reason="needs the C++ library")
    before, threads = native.isa(), torch.get_num_threads()
    results: list[list[Tensor]] = []
    try:
        for isa, team in (("baseline", 1), ("avx2", 1), ("avx512", 1), (before, 3)):
            try:
                native.set_isa(isa)
            except ValueError:
                continue
            torch.set_num_threads(team)
            kept = []
            for (dtype, form), rule, strict in itertools.product(CASES, RULES, (False, True)):
                code, constants, moments = RULES[rule]
                tensors = tensors_of(dtype, form, moments, constants)
                noise_step(code, tensors, 0.7, GRID, 3.0, KEY, 5, 77, strict)
                kept += [x for one in tensors for x in (one.param, one.average, one.master) if x is not None]
            ours = [torch.nn.Parameter(torch.ones(300_001, dtype=torch.bfloat16)) for _ in range(2)]
            optimizer = DPAdamW(ours, stochastic_rounding=True, ema_decay=0.9)
            optimizer.step(sums=[None, None], std=1.0, denominator=3.0, key=wavedp.NoiseKey.insecure(1))
            results.append([*kept, *(x for p in ours for x in (p.detach(), optimizer.state[p]["average"]))])
    finally:
        native.set_isa(before)
        torch.set_num_threads(threads)
    assert len(results) >= 2
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0]))


def test_random_bits_stand_where_the_definition_says() -> None:
    """16 bits of word k // 2 of block 16 (i // 512) + i % 16 of domain 2, which are not the noise's."""
    offset, count, step = 2**40 + 93, 1300, 9
    found = rounding_bits(KEY, step, offset, count, torch.device("cpu"))
    assert int(found.min()) >= 0
    assert int(found.max()) < 1 << 16
    words = {}
    for domain in (ROUNDING_DOMAIN, NOISE_DOMAIN):
        nonce = step.to_bytes(4, "little") + (domain << 24).to_bytes(4, "little")
        first = 16 * (offset // 512)
        words[domain] = wavedp.chacha20_words(bytes(range(32)), first, nonce, 4 * 16 * 16).view(-1, 16).long()
    for i in range(0, count, 7):
        block = 16 * ((offset + i) // 512 - offset // 512) + (offset + i) % 16
        k = (offset + i) % 512 // 16
        for domain, same in ((ROUNDING_DOMAIN, True), (NOISE_DOMAIN, False)):
            bits = int(words[domain][block, k // 2]) >> 16 * (k % 2) & 0xFFFF
            if same:
                assert int(found[i]) == bits, i
    assert not (set(words[ROUNDING_DOMAIN].flatten().tolist()) & set(words[NOISE_DOMAIN].flatten().tolist()))


@pytest.mark.parametrize("fraction", [0.3, 2.0**-12, 0.9])
def test_rounding_at_random_is_unbiased(implementation: str, fraction: float) -> None:
    """From 1 a step of a fraction of a unit goes a whole unit up as often; false alarm 6.7e-8 for each fraction."""
    count = 200_000
    parameter = torch.nn.Parameter(torch.ones(count, dtype=torch.bfloat16))
    total = torch.full((count,), -fraction * 2.0**-7)
    DPSGD([parameter], lr=1.0, stochastic_rounding=True).step(sums=[total], std=0.0, denominator=1.0)
    up = (parameter.detach().double() - 1.0) * 2.0**7
    assert set(up.tolist()) == {0.0, 1.0}, implementation
    chance = float(1.0 + fraction * 2.0**-7 - 1.0) * 2.0**7
    kept = float(torch.tensor(1.0 + fraction * 2.0**-7).double() - 1.0) * 2.0**7  # in float32
    assert kept == pytest.approx(chance, abs=2.0**-16)
    assert abs(float(up.mean()) - kept) < SIGMAS * math.sqrt(kept * (1 - kept) / count)


def test_small_steps_add_up_with_a_master_or_at_random_and_are_lost_without() -> None:
    """A hundred steps of a hundredth of a unit in the last place."""
    moved = []
    for options in ({}, {"master_weights": True}, {"stochastic_rounding": True}):
        parameter = torch.nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
        optimizer = DPSGD([parameter], lr=1.0, **options)
        for _ in range(100):
            optimizer.step(sums=[torch.full((20_000,), -(2.0**-7) / 100)], std=0.0, denominator=1.0)
        moved.append((parameter.detach().double() - 1.0).mul(2.0**7))
    assert not moved[0].any()
    assert (moved[1] == 1.0).all()
    # Each is a sum of 100 draws with a variance of at most 1/100 x 99/100.
    assert abs(float(moved[2].mean()) - 1.0) < SIGMAS * math.sqrt(0.99 / 20_000)


def test_what_is_not_finite_is_not_rounded_at_random() -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, 3.4e38, -3.4e38, 0.0, -0.0, 1e-45])
    for bits in (0, 0xFFFF):
        found = rounded_at_random(x, torch.full((8,), bits, dtype=torch.int32))
        assert found[:2].tolist() == [math.inf, -math.inf]
        assert bool(found[2].isnan())
        assert found[5:7].tolist() == [0.0, 0.0]
        assert found[3:5].isinf().all() == (bits > 0)
        assert bool(found[7] > 0) == (bits > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_averages_are_those_of_a_loop(implementation: str, dtype: torch.dtype) -> None:
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 203).to(dtype))
    optimizer = DPAdamW([parameter], lr=0.1, ema_decay=0.8, master_weights=dtype == torch.bfloat16)
    average = torch.zeros(203, dtype=torch.float64)
    for t in range(60):
        optimizer.step(sums=[None], std=1.0, denominator=2.0, key=wavedp.NoiseKey.insecure(t))
        value = optimizer.state[parameter].get("master", parameter.detach()).double()
        average += (1.0 - min(0.8, t / (t + 10))) * (value - average)
    found = optimizer.state[parameter]["average"]
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert (found - average).abs().max() < 16 * torch.finfo(found.dtype).eps, implementation
    before = parameter.detach().clone()
    with optimizer.averaged():
        assert torch.equal(parameter, found.to(dtype))
        assert not torch.equal(parameter, before)
        with pytest.raises(RuntimeError, match="within averaged"):
            optimizer.step(sums=[None], std=1.0, denominator=2.0)
        with pytest.raises(RuntimeError, match="entered twice"), optimizer.averaged():
            pass
    assert torch.equal(parameter, before)


def test_without_averages_there_are_none_to_hold() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    for optimizer in (DPSGD([parameter]), DPSGD([parameter], ema_decay=0.9)):
        with pytest.raises(RuntimeError, match="give it ema_decay, and make a step"), optimizer.averaged():
            pass
    assert parameter.tolist() == [1.0] * 3


def corrected_by_hand(stds: list[float], total: Tensor, floor: float, seeds: list[int]) -> Tensor:
    """DP-AdamBC in float64 from the noisy means, for DPAdam's defaults with a rate of 0.1."""
    x, m, v, variance = (torch.zeros_like(total) for _ in range(4))
    for t, (std, seed) in enumerate(zip(stds, seeds), 1):
        g = wavedp.noisy_mean(total, std, divisor=4.0, key=wavedp.NoiseKey.insecure(seed))
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
        variance = 0.999 * variance + 0.001 * (std / 4.0) ** 2
        signal = (v - variance) / (1 - 0.999**t)
        x = x - 0.1 * (m / (1 - 0.9**t)) / (signal.clamp_min(floor).sqrt() + 1e-8)
    return x


def test_the_noise_is_taken_off_the_second_moment(implementation: str) -> None:
    """Also while the deviation changes, as it does with adaptive clipping."""
    stds, seeds, floor = [1.0, 3.0, 0.0, 0.5], [1, 2, 3, 4], 1e-2
    total = torch.linspace(-4, 4, 301, dtype=torch.float64)
    parameter = torch.nn.Parameter(torch.zeros(301, dtype=torch.float64))
    optimizer = DPAdam([parameter], lr=0.1, noise_correction=floor)
    for std, seed in zip(stds, seeds):
        optimizer.step(sums=[total], std=std, denominator=4.0, key=wavedp.NoiseKey.insecure(seed))
    expected = corrected_by_hand(stds, total, floor, seeds)
    assert (parameter - expected).abs().max() < 1e-11, implementation


def test_what_is_left_of_the_second_moment_is_the_signals() -> None:
    """Of 20,000 equal gradients of 0.1 under noise of deviation 1; false alarm 6.7e-8."""
    count, steps, signal = 20_000, 30, 0.1
    parameter = torch.nn.Parameter(torch.zeros(count))
    optimizer = DPAdam([parameter], noise_correction=1e-8)
    for t in range(steps):
        total = torch.full((count,), 8 * signal)
        optimizer.step(sums=[total], std=8.0, denominator=8.0, key=wavedp.NoiseKey.insecure(t))
    state = optimizer.state[parameter]
    scale = 1 / (1 - 0.999**steps)
    left = (state["exp_avg_sq"].double() - state["noise_variance"]) * scale
    assert float(state["noise_variance"] * scale) == pytest.approx(1.0)
    # A square has the variance 2 + 4 signal^2.
    assert abs(float(left.mean()) - signal**2) < SIGMAS * math.sqrt(2.05 / (steps * count)) * 1.001


def test_without_noise_the_correction_is_a_floor_alone(implementation: str) -> None:
    ours = [torch.nn.Parameter(torch.linspace(-1, 1, 100)) for _ in range(2)]
    optimizers = DPAdamW([ours[0]]), DPAdamW([ours[1]], noise_correction=1e-12)
    for optimizer in optimizers:
        for k in range(4):
            total = torch.linspace(1, 2, 100) * (-1) ** k
            optimizer.step(sums=[total], std=0.0, denominator=1.0)
    torch.testing.assert_close(ours[0], ours[1], rtol=1e-6, atol=1e-7)
    assert float(optimizers[1].state[ours[1]]["noise_variance"]) == 0.0, implementation


def test_strict_noise_is_that_of_the_mean(implementation: str) -> None:
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    ours = [torch.nn.Parameter(torch.zeros(203, dtype=dtype)) for dtype in dtypes]
    key = wavedp.NoiseKey.insecure(7)
    DPSGD(ours, lr=1.0).step(sums=[None] * 3, std=1.3, denominator=3.0, key=key, noise_mode="strict")
    for k, (parameter, dtype) in enumerate(zip(ours, dtypes)):
        total = torch.zeros(203, dtype=torch.promote_types(dtype, torch.float32))
        mean = wavedp.noisy_mean(total, 1.3, divisor=3.0, key=key, offset=203 * k, mode="strict")
        assert torch.equal(parameter.detach(), -mean.to(dtype)), implementation
