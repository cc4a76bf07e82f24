# SPDX-License-Identifier: Apache-2.0
"""The CUDA source of the noise, compiled for the CPU: the threads of its kernels one after the other.

Words, float32 normals, strict normals and whole steps have the bits of the C++ library; float64 normals those of no
other implementation, since each has a logarithm of its own.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

import wavedp
from wavedp.noise import MAX_DEVIATION
from wavedp.ops import noise, noise_native, use_backend
from wavedp.ops.noise_step import noise_step
from wavedp.ops.wavelet_native import DTYPE_CODES
from wavedp.reference import noise as reference
from wavedp.reference import noise_step as reference_step
from wavedp.reference.noise import NARROW, STRICT, STRICT_NORMAL_ERROR, WIDE
from wavedp.reference.noise_step import ADAM, SGD, StepConstants, StepTensor

SOURCE = Path(__file__).with_name("noise_cuda_host.cpp")
CXX = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
# As setup.py compiles the CPU's code: no product and sum becomes one operation, neither here nor by nvcc.
FLAGS = "-std=c++17 -O2 -ffp-contract=off -shared -fPIC -DWAVEDP_ISA=baseline"
CORNERS = (0, 1, 2**31, 2**32 - 1)
FLOAT_ULP = 5  # of a float32 normal: 4.54 was the worst of 2e7 pairs, corners included
DOUBLE_ULP = 6  # of a float64 normal of three words
KEY = torch.arange(32, dtype=torch.uint8)
STEP, OFFSET = 7, 2**40 + 61

Address = ctypes.c_void_p
ARGUMENTS = {
    "chacha20_words": [Address, ctypes.c_uint64, Address, ctypes.c_int, ctypes.c_int, Address, ctypes.c_int64],
    "normals": [ctypes.c_int, Address, ctypes.c_int64, Address],
    "noisy_mean": [
        *(Address, ctypes.c_uint32, ctypes.c_uint64, Address, ctypes.c_int, Address, ctypes.c_int, ctypes.c_int),
        *(ctypes.c_double, ctypes.c_double, ctypes.c_double, ctypes.c_int64),
    ],
    "noise_step": [
        *(Address, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int, ctypes.c_int, ctypes.c_int),
        *(ctypes.c_double, ctypes.c_double, ctypes.c_double, ctypes.c_int64),
        *(Address, Address, Address, Address, ctypes.c_int),
    ],
}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if CXX is None:
        pytest.skip("needs a C++ compiler, and none is installed")
    target = tmp_path_factory.mktemp("host") / "noise.so"
    result = subprocess.run([*CXX.split(), *FLAGS.split(), SOURCE, "-o", target], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    library = ctypes.CDLL(str(target))
    for name, arguments in ARGUMENTS.items():
        getattr(library, name).argtypes = arguments
        getattr(library, name).restype = ctypes.c_int if name == "noise_step" else None
    return library


def words_of(host: ctypes.CDLL, key: bytes, counter: int, nonce: bytes, count: int, rounds: int = 20) -> list[int]:
    secret = torch.frombuffer(bytearray(key), dtype=torch.uint8)
    tail = torch.frombuffer(bytearray(nonce), dtype=torch.uint32)
    out = torch.full((count + 1,), 77, dtype=torch.uint32)
    host.chacha20_words(secret.data_ptr(), counter, tail.data_ptr(), tail.numel(), rounds, out.data_ptr(), count)
    assert out[count] == 77  # nothing is written behind the last
    return out[:count].tolist()


def test_block_of_rfc_8439(host: ctypes.CDLL) -> None:
    """Section 2.3.2."""
    words = words_of(host, bytes(range(32)), 1, bytes.fromhex("000000090000004a00000000"), 16)
    assert " ".join(f"{word:08x}" for word in words) == (
        "e4e7f110 15593bd1 1fdd0f50 c47120a3 c7f4d1c7 0368c033 9aaa2204 4e6cd4c3 "
        "466482d2 09aa9f07 05d7c214 a2028bd9 d19c12b5 b94e16de e883d0cb 4e3c50a2"
    )


@pytest.mark.parametrize(
    ("key", "counter", "nonce", "stream"),
    [
        (bytes(32), 0, bytes(12), "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"),
        (bytes(32), 1, bytes(12), "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"),
        (bytes(31) + b"\x01", 1, bytes(12), "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"),
        (b"\x00\xff" + bytes(30), 2, bytes(12), "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"),
        (bytes(32), 0, bytes(11) + b"\x02", "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7"),
    ],
)
def test_vectors_of_rfc_8439(host: ctypes.CDLL, key: bytes, counter: int, nonce: bytes, stream: str) -> None:
    """Appendix A.1, test vectors 1 to 5, the first half of each block."""
    words = words_of(host, key, counter, nonce, 8)
    assert b"".join(word.to_bytes(4, "little") for word in words).hex() == stream


@pytest.mark.parametrize("rounds", [8, 12, 20])
@pytest.mark.parametrize(
    ("counter", "nonce"),
    [(2**32 - 2, bytes(range(8))), (2**64 - 2, bytes(range(8))), (2**32 - 2, bytes(range(12)))],
    ids=["64-bit carry", "64-bit wrap", "32-bit wrap"],
)
def test_words_of_many_blocks(host: ctypes.CDLL, counter: int, nonce: bytes, rounds: int) -> None:
    key, count = bytes(range(100, 132)), 16 * 5 + 3
    expected, tail = torch.empty(count, dtype=torch.uint32), torch.frombuffer(bytearray(nonce), dtype=torch.uint32)
    secret = torch.frombuffer(bytearray(key), dtype=torch.uint8)
    reference.chacha20_words_forward(secret, counter, tail.tolist(), rounds, expected)
    assert words_of(host, key, counter, nonce, count, rounds) == expected.tolist()


def test_the_counter_carries_into_its_upper_half(host: ctypes.CDLL) -> None:
    """Blocks 2^32 - 1 and 2^32, whose state has the halves of the counter as words 12 and 13."""
    key = bytes(range(32))
    words = words_of(host, key, 2**32 - 1, bytes(8), 32)
    assert words[:16] == words_of(host, key, 2**32 - 1, bytes(12), 16)
    assert words[16:] == words_of(host, key, 0, (1).to_bytes(4, "little") + bytes(8), 16)


def normals_of(host: ctypes.CDLL, kind: int, words: Tensor) -> Tensor:  # [N, 4] int64 -> [N, 2] float64
    pairs = torch.empty(len(words), 2, dtype=torch.float64)
    raw = words.to(torch.uint32).contiguous()
    host.normals(kind, raw.data_ptr(), len(words), pairs.data_ptr())
    return pairs


def corner_words() -> Tensor:
    """All quadruples of the corners, and their neighbours."""
    near = sorted({(word + by) % 2**32 for word in (*CORNERS, 2**29, 2**30) for by in (-1, 0, 1)})
    return torch.cartesian_prod(*[torch.tensor(near)] * 4)


def random_words(count: int) -> Tensor:
    return torch.randint(0, 2**32, (count, 4), generator=torch.Generator().manual_seed(5))


def in_ulp(found: Tensor, exact: Tensor, digits: int) -> Tensor:
    _, exponent = torch.frexp(exact)
    return (found - exact).abs() / torch.ldexp(torch.ones_like(exact), exponent - digits)


def test_float32_normals(host: ctypes.CDLL) -> None:
    words = torch.cat([corner_words(), random_words(400_000)])
    found = normals_of(host, NARROW, words)
    # Not the definition's, whose angle of 2 pi (1 - 2^-33) has lost digits that the sine needs.
    exact = normals_of(host, WIDE, words)
    assert in_ulp(found, exact, 24).max() <= FLOAT_ULP
    assert found.isfinite().all()
    assert 9.4 < found.abs().max() <= MAX_DEVIATION * (1 + 2.0**-22)


def test_float64_normals(host: ctypes.CDLL) -> None:
    words = torch.cat([corner_words(), random_words(100_000)])
    found = normals_of(host, WIDE, words)
    near = torch.stack(reference.normals_from_words(*words.T[:3]), dim=1)
    assert (found - near).abs().max() <= 2 * STRICT_NORMAL_ERROR
    some = torch.cat([corner_words()[::7], random_words(2000)])
    found = normals_of(host, WIDE, some)
    with mpmath.workprec(120):
        for (high, low, angle, _), pair in zip(some.tolist(), found.tolist()):
            u = mpmath.ldexp(2**32 * high + low + mpmath.mpf(0.5), -64)
            theta = mpmath.ldexp(angle + mpmath.mpf(0.5), -31)
            radius = mpmath.sqrt(-2 * mpmath.log(u))
            for value, exact in zip(pair, (radius * mpmath.cospi(theta), radius * mpmath.sinpi(theta))):
                ulp = mpmath.ldexp(1, mpmath.frexp(exact)[1] - 53)
                assert abs(value - exact) <= DOUBLE_ULP * ulp


def test_strict_normals_have_the_bits_of_the_definition(host: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch's square root of float64 is not always the nearest number.
    monkeypatch.setattr(torch, "sqrt", lambda x: torch.from_numpy(np.sqrt(x.numpy())))
    words = torch.cat([corner_words(), random_words(400_000)])
    expected = torch.stack(reference.strict_normals_from_words(*words.T), dim=1)
    assert torch.equal(normals_of(host, STRICT, words), expected)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("total_dtype", [None, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", [NARROW, WIDE, STRICT])
@pytest.mark.parametrize(("std", "grid"), [(1.5, 2.0**-12), (1.5, 0.0), (0.0, 0.0)])
def test_noisy_mean(
    host: ctypes.CDLL, kind: int, total_dtype: torch.dtype | None, out_dtype: torch.dtype, std: float, grid: float
) -> None:
    if kind == STRICT and std > 0.0 and grid == 0.0:
        grid = 2.0**-20
    for count, offset in ((1, 0), (700, OFFSET), (161, 159)):
        total = None if total_dtype is None else torch.linspace(-40, 40, count, dtype=total_dtype)
        out = torch.full((count + 1,), 77, dtype=out_dtype)
        source = (None, 0) if total is None else (total.data_ptr(), DTYPE_CODES[total.dtype])
        stream = KEY.data_ptr(), STEP, offset
        host.noisy_mean(*stream, *source, out.data_ptr(), DTYPE_CODES[out_dtype], kind, std, grid, 3.0, count)
        expected = torch.empty(count, dtype=out_dtype)
        noisy_mean_forward = reference_or_native(kind).noisy_mean_forward
        noisy_mean_forward(total, std, grid, 3.0, KEY, STEP, offset, kind, expected)
        assert out[count] == 77
        if kind == WIDE and grid == 0.0:  # the definition's logarithm is the C library's
            tolerance = 1e-14 if out_dtype == torch.float64 else torch.finfo(out_dtype).eps
            torch.testing.assert_close(out[:count], expected, rtol=0.0 if out_dtype == torch.float64 else tolerance,
                                       atol=tolerance)  # fmt: skip
        else:
            assert torch.equal(out[:count], expected)


def reference_or_native(kind: int) -> object:
    """Who has the same bits: the C++ library for float32 normals, else the definition."""
    if kind != NARROW:
        return reference
    pytest.importorskip("wavedp._csrc", reason="needs the C++ library")
    return noise_native


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


def step_on_host(
    host: ctypes.CDLL, rule: int, tensors: Sequence[StepTensor], std: float, grid: float, strict: bool, run: int
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
        forms.append(host.noise_step(KEY.data_ptr(), *numbers, *places, run))
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
def test_step(host: ctypes.CDLL, rule: int, option: str, dtype: torch.dtype, strict: bool, run: int) -> None:
    """A step equals the C++ library's bit by bit; in float64 and standard mode, the definition's to rounding."""
    pytest.importorskip("wavedp._csrc", reason="needs the C++ library")
    std, grid = 0.7, 2.0**-20 if strict else 2.0**-13
    given = some_tensors(rule, dtype, option)
    found, expected = taken_along(given), taken_along(given)
    step_on_host(host, rule, found, std, grid, strict, run)
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
    host: ctypes.CDLL, rule: int, option: str, dtype: torch.dtype, form: int, strict: bool
) -> None:
    """With sums of float32 for all; and its bits are those of the C++ library."""
    pytest.importorskip("wavedp._csrc", reason="needs the C++ library")
    given = [
        one._replace(total=torch.zeros(one.param.shape) if one.total is None else one.total.float())
        for one in some_tensors(rule, dtype, option)
    ]
    found, expected = taken_along(given), taken_along(given)
    grid = 2.0**-20 if strict else 2.0**-13
    assert step_on_host(host, rule, found, 0.7, grid, strict, 1) == [form]
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


@pytest.mark.cuda
def test_noise_on_a_device_has_the_cpus_bits() -> None:
    pytest.importorskip("wavedp._csrc_cuda", reason="needs the CUDA library")
    pytest.importorskip("wavedp._csrc", reason="needs the C++ library")
    key, count = wavedp.NoiseKey.insecure(3), 100_003
    found = {}
    for backend, device in (("cuda", "cuda"), ("native", "cpu")):
        with use_backend(backend):
            words = torch.empty(count, dtype=torch.uint32, device=device)
            noise.chacha20_words(KEY, 2**32 - 5, (1, 2), 20, words)
            narrow = wavedp.gaussian_noise((count,), 1.5, key=key, offset=OFFSET, device=device)
            strict = torch.linspace(-9, 9, count, device=device)
            noise.noisy_mean(strict, 1.5, 2.0**-20, 3.0, KEY, STEP, OFFSET, STRICT, strict)
        found[backend] = [words.cpu().to(torch.int64), narrow.cpu(), strict.cpu()]
    for x, y in zip(*found.values()):
        assert torch.equal(x, y)


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What is allocated for a device; on the CPU where there is none."""
    made: list[Tensor] = []
    empty, there = torch.empty, torch.cuda.is_available()

    def recorded(*size: int, **options: Any) -> Tensor:
        made.append(empty(*size, **options) if there else empty(*size, dtype=options["dtype"]))
        return made[-1]

    monkeypatch.setattr(torch, "empty", recorded)
    if not there:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return made


def test_copies_of_the_key_are_zeros_after_its_use(allocated: list[Tensor]) -> None:
    key = KEY.clone()
    with noise_native.key_on(torch.device("cuda"), key) as address:
        staged, memory = allocated
        assert address == memory.data_ptr()
        assert torch.equal(memory.cpu(), KEY)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    assert not staged.any()
    assert not memory.any()
    assert torch.equal(key, KEY)  # its owner's part


def test_no_key_goes_into_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with (
        pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"),
        noise_native.key_on(torch.device("cuda"), KEY),
    ):
        pass


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


def test_tensors_of_both_precisions_share_the_stream(host: ctypes.CDLL) -> None:
    singles, doubles = some_tensors(ADAM, torch.float32, "plain"), some_tensors(ADAM, torch.float64, "plain")
    mixed = [pair[place % 2] for place, pair in enumerate(zip(singles, doubles))]
    found, exact = taken_along(mixed), taken_along(mixed)
    step_on_host(host, ADAM, found, 0.7, 2.0**-13, False, 1)
    reference_step.noise_step_forward(ADAM, exact, 0.7, 2.0**-13, 2.0, KEY, STEP, OFFSET, False)
    for one, other, before in zip(found, exact, mixed):
        torch.testing.assert_close(one.param, other.param, rtol=2.0**-13, atol=2.0**-13)
        assert one.param.numel() == 0 or not torch.equal(one.param, before.param)


def test_without_noise_the_mean_is_the_sums(host: ctypes.CDLL) -> None:
    given = some_tensors(SGD, torch.float32, "bare")
    found = taken_along(given)
    step_on_host(host, SGD, found, 0.0, 0.0, False, 1)
    c = CONSTANTS[SGD]
    for one, before in zip(found, given):
        mean = torch.zeros(before.param.shape) if before.total is None else (before.total.double() / 2.0).float()
        gradient = c.sign * mean + c.l2 * before.param
        torch.testing.assert_close(one.param, before.param - c.rate * gradient, rtol=1e-6, atol=1e-6)
