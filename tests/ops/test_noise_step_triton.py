# SPDX-License-Identifier: Apache-2.0
"""The fused step in Triton's interpreter, against the definition: rules, options, types, tensors of any size."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import wavedp
from wavedp.ops import use_backend
from wavedp.ops.backend import forget_imports
from wavedp.reference.noise_step import ADAM, SGD, StepConstants, StepTensor, noise_step_forward

pytest.importorskip("triton", reason="needs Triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, where numbers overflow on purpose

SECRET = torch.arange(32, dtype=torch.uint8)
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
WRITTEN = ("param", "first", "second", "largest", "average", "master")
# Of the largest entry of a tensor, in units in the last place of its type: three roundings of other sequences of the
# same rule, root and quotient included, and five of a normal before them.
ULP = 8
# One element; more than a row; empty; a row of 16 exactly; more than the 1280 numbers of a program, from the one to the
# next. The offset puts the first of them amidst a group of 160, of 128 and of 512.
SIZES = (1, 23, 0, 16, 1333, 5)
OFFSET = 2**40 + 93

RULES: dict[str, tuple[int, dict[str, Any]]] = {
    "sgd": (SGD, {"momentum": "none", "l2": 0.2}),
    "momentum": (SGD, {"momentum": "all", "keep_first": 0.9, "first": 0.7, "from_first": 1.0, "l2": 0.1}),
    "nesterov": (SGD, {"momentum": "some", "keep_first": 0.8, "first": 1.0, "nesterov": 1.0, "from_first": 0.8}),
    "adam": (ADAM, {"l2": 0.1}),
    "adamw": (ADAM, {"keep": 0.99, "sign": -1.0}),
    "amsgrad": (ADAM, {"largest": "all"}),
    "amsgrad of some": (ADAM, {"largest": "some"}),
    "corrected": (ADAM, {"noise_square": 0.3, "least_square": 0.01}),
    "corrected amsgrad": (ADAM, {"noise_square": 0.3, "least_square": 0.01, "largest": "some"}),
}


@pytest.fixture(scope="module")
def kernels(fresh_kernels: Callable[..., ModuleType]) -> ModuleType:
    return fresh_kernels("noise", interpreted=True)


def tensors_of(rule: int, dtypes: tuple[torch.dtype, ...], **options: Any) -> list[StepTensor]:
    """Tensors of ``SIZES``, in turn of the types. ``some`` are every other one; sums are float32, float64 and none."""
    generator = torch.Generator().manual_seed(1)
    found = []
    constants = {"rate": 0.1, "first": 0.1, "keep_second": 0.9, "second": 0.1, "root_scale": 1.3, "eps": 1e-3}
    constants |= {k: v for k, v in options.items() if k in StepConstants._fields}
    for k, size in enumerate(SIZES):
        dtype = dtypes[k % len(dtypes)]
        real = torch.promote_types(dtype, F32)

        def drawn(name: str, real: torch.dtype = real, size: int = size, k: int = k) -> Tensor | None:
            there = options.get(name, "none")
            present = there == "all" or (there == "some" and k % 2 == 0)
            return torch.rand(size, generator=generator, dtype=F64).to(real) if present else None

        param = torch.randn(size, generator=generator).to(dtype)
        total = torch.randn(size, generator=generator, dtype=F64).to((F32, F64)[k % 2]) if k % 3 != 2 else None
        moment = torch.randn(size, generator=generator, dtype=F64).to(real)
        has_moment = rule == ADAM or options["momentum"] == "all" or (options["momentum"] == "some" and k % 2 == 0)
        master = param.float() if options.get("master") and dtype in (BF16, F16) else None
        used = dict(constants)
        if rule == SGD and not has_moment:
            used |= {"nesterov": 0.0, "from_first": 0.0}
        if k % 2:
            used["least_square"] = 0.0
        found.append(
            StepTensor(
                param,
                total,
                moment if has_moment else None,
                torch.rand(size, generator=generator, dtype=F64).to(real) if rule == ADAM else None,
                drawn("largest"),
                drawn("average"),
                master,
                bool(options.get("stochastic")) and dtype == BF16 and master is None,
                StepConstants(**used, average_weight=0.2),
            )
        )
    return found


def copied(tensors: list[StepTensor]) -> list[StepTensor]:
    def copy(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.clone()

    return [one._replace(**{name: copy(getattr(one, name)) for name in WRITTEN}) for one in tensors]


def stepped(
    forward: Callable[..., None], rule: int, tensors: list[StepTensor], strict: bool, std: float = 1.5
) -> list[StepTensor]:
    """Without a grid in standard mode, where a normal's last bit would move its sum to the next multiple."""
    ours = copied(tensors)
    forward(rule, ours, std, 2.0**-20 if strict else 0.0, 3.0, SECRET, 5, OFFSET, strict)
    return ours


def assert_near(found: list[StepTensor], expected: list[StepTensor], changed_bits: bool = False) -> None:
    for k, (one, other) in enumerate(zip(found, expected)):
        for name in WRITTEN:
            x, y = getattr(one, name), getattr(other, name)
            if y is None or y.numel() == 0:
                continue
            assert x.dtype == y.dtype
            scale = float(y.double().abs().max())
            allowed = ULP * torch.finfo(torch.promote_types(x.dtype, F32)).eps * max(scale, 1.0)
            apart = (x.double() - y.double()).abs()
            if x.dtype in (BF16, F16):  # another rounding of nearly the same number, for few
                assert (apart <= 2 * torch.finfo(x.dtype).eps * y.double().abs() + allowed).all(), (k, name)
                assert (apart > allowed).sum() <= 1 + y.numel() // 200, (k, name)
            else:
                assert (apart <= allowed).all(), (k, name, float(apart.max()) / allowed)


@pytest.mark.parametrize("name", RULES)
def test_rules(kernels: ModuleType, name: str) -> None:
    rule, options = RULES[name]
    tensors = tensors_of(rule, (F32,), **options)
    found, expected = (
        stepped(forward, rule, tensors, False) for forward in (kernels.noise_step_forward, noise_step_forward)
    )
    assert_near(found, expected)


# Each of the two modes has each of the ways in which noise, types and options meet: rounding at random takes its bits
# from other blocks for groups of 160 and of 128.
@pytest.mark.parametrize(
    ("rule", "dtypes", "options", "strict"),
    [
        pytest.param(SGD, (F64,), {"momentum": "all", "keep_first": 0.9, "from_first": 1.0}, True, id="SGD in float64"),
        pytest.param(
            ADAM, (F64,), {"largest": "some", "average": "some", "least_square": 0.01}, False, id="Adam in float64"
        ),
        pytest.param(SGD, (BF16, F32, F16), {"momentum": "some", "average": "all"}, False, id="SGD of three types"),
        pytest.param(ADAM, (F32, BF16, F16, F64), {"average": "some"}, True, id="Adam of four types"),
        pytest.param(ADAM, (BF16,), {"master": True, "average": "all"}, True, id="masters of all"),
        pytest.param(ADAM, (F16, F32, BF16), {"master": True}, False, id="masters of some"),
        pytest.param(ADAM, (BF16,), {"stochastic": True, "average": "all"}, False, id="rounded at random"),
        pytest.param(
            SGD, (F32, BF16), {"momentum": "none", "stochastic": True}, True, id="some rounded at random, strict"
        ),
    ],
)
def test_types_and_options(
    kernels: ModuleType, rule: int, dtypes: tuple[torch.dtype, ...], options: dict[str, Any], strict: bool
) -> None:
    tensors = tensors_of(rule, dtypes, **options)
    found, expected = (
        stepped(forward, rule, tensors, strict) for forward in (kernels.noise_step_forward, noise_step_forward)
    )
    assert_near(found, expected)


@pytest.mark.parametrize("dtype", [None, F32, F64], ids=str)
def test_sums_of_one_type_that_some_have(kernels: ModuleType, dtype: torch.dtype | None) -> None:
    """Nothing is read of a sum that is not there."""
    tensors = [
        StepTensor(
            torch.zeros(5),
            torch.ones(5, dtype=dtype) if dtype and k else None,
            *(None,) * 5,
            False,
            StepConstants(rate=1.0),
        )
        for k in range(2)
    ]
    kernels.noise_step_forward(SGD, tensors, 0.0, 0.0, 4.0, SECRET, 0, 0, False)
    assert torch.equal(tensors[0].param, torch.zeros(5))
    assert torch.equal(tensors[1].param, torch.full((5,), -0.25 if dtype else 0.0))


@pytest.mark.parametrize("rule", [SGD, ADAM])
def test_without_noise(kernels: ModuleType, rule: int) -> None:
    tensors = tensors_of(rule, (F32, BF16), momentum="all", from_first=1.0)
    found, expected = (
        stepped(forward, rule, tensors, False, std=0.0) for forward in (kernels.noise_step_forward, noise_step_forward)
    )
    assert_near(found, expected)
    assert not torch.equal(found[4].param, tensors[4].param)


def test_the_noise_is_that_of_the_mean(kernels: ModuleType) -> None:
    """By a rate of 1 from zero a step is minus the noisy mean, over the borders of tensors and of programs."""
    row = torch.empty(sum(SIZES))
    kernels.noisy_mean_forward(None, 1.5, 2.0**-12, 3.0, SECRET, 5, OFFSET, 0, row)
    blank = [
        StepTensor(torch.zeros(size), None, None, None, None, None, None, False, StepConstants(rate=1.0))
        for size in SIZES
    ]
    kernels.noise_step_forward(SGD, blank, 1.5, 2.0**-12, 3.0, SECRET, 5, OFFSET, False)
    assert torch.equal(torch.cat([one.param for one in blank]), -row)


def test_many_small_tensors_are_one_launch(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters of one type take one launch, whatever their number; those of float64 one more."""
    name = "_noise_step_kernel"
    globals_of_step = kernels.noise_step_forward.__globals__
    launches = []

    class Counted:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launches.append(grid)
            return self.kernel[grid]

    monkeypatch.setitem(globals_of_step, name, Counted(globals_of_step[name]))
    sizes = [k % 4 for k in range(12)]
    generator = torch.Generator().manual_seed(2)
    for dtypes, expected in (((F32, BF16), [(1,)]), ((F32, F64), [(1,), (1,)])):
        tensors = [
            StepTensor(
                torch.randn(size, generator=generator).to(dtypes[k % 2]),
                *(None,) * 6,
                False,
                StepConstants(rate=0.1, l2=0.01 * k),
            )
            for k, size in enumerate(sizes)
        ]
        launches.clear()
        found = stepped(kernels.noise_step_forward, SGD, tensors, False)
        assert launches == expected
        assert_near(found, stepped(noise_step_forward, SGD, tensors, False))


def test_nothing_is_nothing(kernels: ModuleType) -> None:
    empty = StepTensor(torch.empty(0), *(None,) * 6, False, StepConstants(rate=1.0))
    kernels.noise_step_forward(SGD, [empty, empty], 1.0, 0.0, 1.0, SECRET, 0, 0, False)
    kernels.noise_step_forward(SGD, [], 1.0, 0.0, 1.0, SECRET, 0, 0, False)


def test_what_is_not_finite_is_not_rounded_at_random(kernels: ModuleType) -> None:
    total = torch.tensor([-1e300, 1e300, 0.0, 0.0, 0.0], dtype=F64)
    given = torch.tensor([1.0, 1.0, float("nan"), 3.3e38, 1.0]).bfloat16()
    one = StepTensor(given.clone(), total, None, None, None, None, None, True, StepConstants(rate=1.0))
    kernels.noise_step_forward(SGD, [one], 0.0, 0.0, 1.0, SECRET, 0, 0, False)
    assert one.param[:2].tolist() == [float("inf"), float("-inf")]
    assert one.param[2].isnan()
    assert torch.equal(one.param[3:], given[3:])  # what bfloat16 has, no bits move


def test_an_optimizer_steps_by_the_backend_that_is_asked_for(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wavedp.kernels.noise", kernels)
    results = []
    for backend in ("triton", "reference"):
        ours = [torch.nn.Parameter(torch.ones(size)) for size in (40, 3)]
        optimizer = wavedp.optim.DPAdamW(ours, lr=0.1, amsgrad=True, ema_decay=0.9)
        forget_imports()
        with use_backend(backend):
            sums = [torch.linspace(-1, 1, 40), None]
            optimizer.step(sums=sums, std=1.0, denominator=2.0, key=wavedp.NoiseKey.insecure(1), noise_mode="strict")
            noise = wavedp.gaussian_noise((33,), key=wavedp.NoiseKey.insecure(2), offset=5)
        results.append(torch.cat([*(parameter.detach() for parameter in ours), noise]))
    forget_imports()
    assert (results[0] - results[1]).abs().max() <= 4e-6
