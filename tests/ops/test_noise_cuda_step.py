# SPDX-License-Identifier: Apache-2.0
"""The CUDA source of an optimizer's step, compiled for the CPU: it has the bits of the C++ library."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import CDLL

import pytest
import torch
from torch import Tensor

from wavedp.ops import noise_native, use_backend
from wavedp.ops.noise_step import noise_step
from wavedp.ops.wavelet_native import DTYPE_CODES
from wavedp.reference import noise_step as reference_step
from wavedp.reference.noise_step import ADAM, SGD, StepConstants, StepTensor

KEY = torch.arange(32, dtype=torch.uint8)
STEP, OFFSET = 7, 2**40 + 61

CONSTANTS = {
    SGD: StepConstants(
        sign=-1.0, l2=0.01, rate=0.1, keep_first=0.9, first=0.8, nesterov=1.0, from_first=0.9, average_weight=0.05
    ),
    ADAM: StepConstants(
        *(1.0, 0.001, 0.02, 0.0, 0.1, 0.0, 0.0, 0.999, 0.99, 0.01, 2.5, 1e-8),
        average_weight=0.05,
    ),
}
SIZES = (1, 5, 333, 0, 16, 1000, 47)  # tensors that share groups, rows, and one of several groups


def some_tensors(rule: int, dtype: torch.dtype, option: str) -> list[StepTensor]:
    generator = torch.Generator().manual_seed(3)
    real = torch.promote_types(dtype, torch.float32)

    def drawn(size: int, of: torch.dtype) -> Tensor:
        return torch.randn(size, dtype=torch.float64, generator=generator).to(of)

    tensors = []
    for place, size in enumerate(SIZES):
        param, total = drawn(size, dtype), drawn(size, torch.float64 if place % 3 == 1 else torch.float32)
        first = drawn(size, real) if rule == ADAM or option != "bare" else None
        second = drawn(size, real).square() if rule == ADAM else None
        largest = drawn(size, real).square() if option == "amsgrad" else None
        average = drawn(size, real) if option in ("average", "master") else None
        master = param.float() + 1e-4 if option == "master" and dtype.itemsize == 2 else None
        stochastic = option == "stochastic" and dtype == torch.bfloat16 and place != 2
        constants = CONSTANTS[rule]
        if option == "corrected":
            constants = constants._replace(noise_square=0.5, least_square=1e-3)
        values = (None if place == 4 else total, first, second, largest, average, master)
        tensors.append(StepTensor(param, *values, stochastic, constants))
    return tensors


def taken_along(tensors: Sequence[StepTensor]) -> list[StepTensor]:
    return [StepTensor(*(x.clone() if isinstance(x, Tensor) else x for x in one)) for one in tensors]


def step_on_cpu(
    cuda_on_cpu: CDLL, rule: int, tensors: Sequence[StepTensor], std: float, grid: float, strict: bool, run: int
) -> list[int]:
    """A step in place; the forms of the tensors of each precision (csrc/cuda/noise_step.h)."""
    addresses, sizes, kinds, constants = [], [], [], []
    for one in tensors:
        memory = (one.param, one.total, one.first, one.second, one.largest, one.average, one.master)
        addresses += [0 if x is None else x.data_ptr() for x in memory]
        sizes.append(one.param.numel())
        total = 0 if one.total is None else DTYPE_CODES[one.total.dtype]
        kinds += [DTYPE_CODES[one.param.dtype], total, int(one.stochastic)]
        constants += one.constants
    forms = []
    for wide in sorted({one.param.dtype == torch.float64 for one in tensors}):
        arrays = (
            torch.tensor(addresses),
            torch.tensor(sizes),
            torch.tensor(kinds, dtype=torch.int32),
            torch.tensor(constants, dtype=torch.float64),
        )
        places = [array.data_ptr() for array in arrays]
        numbers = (STEP, OFFSET, rule, wide, strict, std, grid, 2.0, len(tensors))
        forms.append(cuda_on_cpu.noise_step(KEY.data_ptr(), *numbers, *places, run))
    return forms


@pytest.mark.parametrize("run", [1, 3])
@pytest.mark.parametrize("strict", [False, True], ids=["standard", "strict"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("rule", "option"),
    [
        *((SGD, option) for option in ("bare", "momentum", "average", "master", "stochastic")),
        *((ADAM, option) for option in ("plain", "amsgrad", "corrected", "average", "master", "stochastic")),
    ],
)
def test_step(cuda_on_cpu: CDLL, rule: int, option: str, dtype: torch.dtype, strict: bool, run: int) -> None:
    """A step equals the C++ library's bit by bit; in float64 and standard mode, the definition's to rounding."""
    pytest.importorskip("wavedp._csrc", reason="needs the C++ library")
    std, grid = 0.7, 2.0**-20 if strict else 2.0**-13
    given = some_tensors(rule, dtype, option)
    found, expected = taken_along(given), taken_along(given)
    step_on_cpu(cuda_on_cpu, rule, found, std, grid, strict, run)
    noise_native.noise_step_forward(rule, expected, std, grid, 2.0, KEY, STEP, OFFSET, strict)
    for one, other in zip(found, expected):
        for x, y in zip(one, other):
            if isinstance(x, Tensor):
                assert torch.equal(x, y)
    exact = taken_along(given)
    reference_step.noise_step_forward(rule, exact, std, grid, 2.0, KEY, STEP, OFFSET, strict)
    # A float32 normal of another last bit can fall on the next step of the grid.
    tolerance = {torch.float32: grid, torch.float64: 1e-13, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    for one, other in zip(found, exact):
        torch.testing.assert_close(one.param, other.param, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("strict", [False, True], ids=["standard", "strict"])
@pytest.mark.parametrize(
    ("rule", "option", "dtype", "form"),
    [
        (SGD, "bare", torch.float32, 0),
        (SGD, "momentum", torch.float32, 0 + 4),
        (SGD, "bare", torch.bfloat16, 1),
        (ADAM, "plain", torch.float32, 0 + 4),
        (ADAM, "plain", torch.bfloat16, 1 + 4),
        (ADAM, "plain", torch.float16, 2),
        (ADAM, "amsgrad", torch.float32, 2),
        (ADAM, "master", torch.bfloat16, 2),
        (ADAM, "stochastic", torch.bfloat16, 3),
        (ADAM, "plain", torch.float64, 2),
    ],
)
def test_plain_tensors_have_a_kernel_of_their_own(
    cuda_on_cpu: CDLL, rule: int, option: str, dtype: torch.dtype, form: int, strict: bool
) -> None:
    """With sums of float32 for all; and its bits are those of the C++ library."""
    pytest.importorskip("wavedp._csrc", reason="needs the C++ library")
    given = [
        one._replace(total=torch.zeros(one.param.shape) if one.total is None else one.total.float())
        for one in some_tensors(rule, dtype, option)
    ]
    found, expected = taken_along(given), taken_along(given)
    grid = 2.0**-20 if strict else 2.0**-13
    assert step_on_cpu(cuda_on_cpu, rule, found, 0.7, grid, strict, 1) == [form]
    noise_native.noise_step_forward(rule, expected, 0.7, grid, 2.0, KEY, STEP, OFFSET, strict)
    for one, other in zip(found, expected):
        for x, y in zip(one, other):
            assert not isinstance(x, Tensor) or torch.equal(x, y)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("strict", [False, True], ids=["standard", "strict"])
@pytest.mark.parametrize(
    ("rule", "option"),
    [(SGD, "momentum"), (ADAM, "plain"), (ADAM, "corrected"), (ADAM, "master"), (ADAM, "stochastic")],
)
def test_step_on_a_device_has_the_cpus_bits(rule: int, option: str, dtype: torch.dtype, strict: bool) -> None:
    pytest.importorskip("wavedp._csrc_cuda", reason="needs the CUDA library")
    pytest.importorskip("wavedp._csrc", reason="needs the C++ library")
    expected = some_tensors(rule, dtype, option)
    found = [StepTensor(*(x.cuda() if isinstance(x, Tensor) else x for x in one)) for one in expected]
    numbers = (0.7, 2.0**-20 if strict else 2.0**-13, 2.0, KEY, STEP, OFFSET, strict)
    with use_backend("cuda"):
        noise_step(rule, found, *numbers)
    with use_backend("native"):
        noise_step(rule, expected, *numbers)
    for one, other in zip(found, expected):
        for x, y in zip(one, other):
            assert not isinstance(x, Tensor) or torch.equal(x.cpu(), y)


def test_table_of_the_library() -> None:
    """It is made on the host, where no device is needed."""
    pytest.importorskip("wavedp._csrc_cuda", reason="needs the CUDA library")
    tensors = some_tensors(ADAM, torch.bfloat16, "stochastic")
    addresses = [[one.param.data_ptr(), 0, *[16] * 2, 0, 0, 0] for one in tensors]
    kinds = [(DTYPE_CODES[torch.bfloat16], 0, one.stochastic) for one in tensors]
    constants = [one.constants for one in tensors]
    listed = (addresses, list(SIZES), kinds, constants)
    table, form = noise_native.table_on(torch.device("cpu"), ADAM, False, *listed)
    assert form == 3
    starts = table[: 8 * (len(SIZES) + 1)].view(torch.int64)
    assert starts.tolist() == [sum(SIZES[:k]) for k in range(len(SIZES) + 1)]
    rows = table[64:].view(len(SIZES), -1)
    assert rows[:, :8].contiguous().view(torch.int64).flatten().tolist() == [x[0] for x in addresses]
    with pytest.raises(ValueError, match="a first moment is a null pointer"):
        noise_native.table_on(
            torch.device("cpu"), ADAM, False, [[16] * 2 + [0] * 5], [1], [(0, 0, False)], constants[:1]
        )


def test_tensors_of_both_precisions_share_the_stream(cuda_on_cpu: CDLL) -> None:
    singles, doubles = some_tensors(ADAM, torch.float32, "plain"), some_tensors(ADAM, torch.float64, "plain")
    mixed = [pair[place % 2] for place, pair in enumerate(zip(singles, doubles))]
    found, exact = taken_along(mixed), taken_along(mixed)
    step_on_cpu(cuda_on_cpu, ADAM, found, 0.7, 2.0**-13, False, 1)
    reference_step.noise_step_forward(ADAM, exact, 0.7, 2.0**-13, 2.0, KEY, STEP, OFFSET, False)
    for one, other, before in zip(found, exact, mixed):
        torch.testing.assert_close(one.param, other.param, rtol=2.0**-13, atol=2.0**-13)
        assert one.param.numel() == 0 or not torch.equal(one.param, before.param)


def test_without_noise_the_mean_is_the_sums(cuda_on_cpu: CDLL) -> None:
    given = some_tensors(SGD, torch.float32, "bare")
    found = taken_along(given)
    step_on_cpu(cuda_on_cpu, SGD, found, 0.0, 0.0, False, 1)
    c = CONSTANTS[SGD]
    for one, before in zip(found, given):
        mean = torch.zeros(before.param.shape) if before.total is None else (before.total.double() / 2.0).float()
        gradient = c.sign * mean + c.l2 * before.param
        torch.testing.assert_close(one.param, before.param - c.rate * gradient, rtol=1e-6, atol=1e-6)
