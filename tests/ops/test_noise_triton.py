# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the noise in the interpreter: published words, numbers against float64, sums, the key's end.

Launches switch fused multiply-adds off, so that what the interpreter computes is what a GPU computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from wavedp.reference import noise as reference
from wavedp.reference.noise import NARROW, STRICT, WIDE
from wavedp.reference.noise_step import SGD, StepConstants, StepTensor

triton: Any = pytest.importorskip("triton", reason="needs Triton")
import triton.language as tl  # noqa: E402

WORD = 0xFFFFFFFF
KEY = bytes(range(32))
SECRET = torch.frombuffer(bytearray(KEY), dtype=torch.uint8)
ULP = 5  # of a float32 normal, as on the CPU
WIDE_ERROR = 2.0**-47  # of a float64 normal of three words: the definition's angle is off by up to 2^-51 of 9.5 sigma
OFFSETS = [0, 7, 2**40 + 93]
COUNT = 1301  # more than the 1280 numbers of a program, and odd


@pytest.fixture(scope="module")
def kernels(fresh_kernels: Callable[..., ModuleType]) -> ModuleType:
    module = fresh_kernels("noise", interpreted=True)
    assert module.INTERPRETED
    return module


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory: None) -> None:
    """What a kernel leaves unwritten is NaN."""


def words(kernels: ModuleType, key: bytes, counter: int, nonce: Sequence[int], count: int, rounds: int = 20) -> Tensor:
    out = torch.empty(count, dtype=torch.uint32)
    kernels.chacha20_words_forward(torch.frombuffer(bytearray(key), dtype=torch.uint8), counter, nonce, rounds, out)
    return out


def expected_words(counter: int, nonce: Sequence[int], count: int, rounds: int) -> list[int]:
    """By the definition, which ``test_noise.py`` holds to integers at the same counters."""
    out = torch.empty(count, dtype=torch.uint32)
    reference.chacha20_words_forward(SECRET, counter, nonce, rounds, out)
    found: list[int] = out.tolist()
    return found


# RFC 8439, section 2.3.2, then appendix A.1: key, counter, nonce, key stream.
STREAMS = [
    (
        KEY,
        1,
        "000000090000004a00000000",
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
    ),
    (
        bytes(32),
        0,
        "000000000000000000000000",
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    (
        bytes(32),
        1,
        "000000000000000000000000",
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
    (
        bytes(31) + b"\x01",
        1,
        "000000000000000000000000",
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    ),
    (
        b"\x00\xff" + bytes(30),
        2,
        "000000000000000000000000",
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
        "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
    ),
    (
        bytes(32),
        0,
        "000000000000000000000002",
        "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7"
        "8a970e0e955c14f3a88e741b97c286f75f8fc299e8148362fa198a39531bed6d",
    ),
]


@pytest.mark.parametrize(
    ("key", "counter", "nonce", "stream"), STREAMS, ids=["2.3.2", *(f"A.1-{k}" for k in range(1, 6))]
)
def test_streams_of_rfc_8439(kernels: ModuleType, key: bytes, counter: int, nonce: str, stream: str) -> None:
    found = words(kernels, key, counter, np.frombuffer(bytes.fromhex(nonce), "<u4").tolist(), 16)
    assert found.numpy().astype("<u4").tobytes().hex() == stream


@pytest.mark.parametrize("rounds", [8, 12, 20])
@pytest.mark.parametrize("first", [2**32 - 3, 7, 2**64 - 20])
def test_the_counter_of_64_bits_carries(kernels: ModuleType, first: int, rounds: int) -> None:
    nonce, count = (0x03020100, 0x07060504), 20 * 16 - 5
    assert words(kernels, KEY, first, nonce, count, rounds).tolist() == expected_words(first, nonce, count, rounds)


@pytest.mark.parametrize("count", [1, 2049])  # of more than one program
@pytest.mark.parametrize("nonce", [(0x80000000, WORD), (WORD, 0, 0xDEADBEEF)])
def test_words_of_the_definition(kernels: ModuleType, nonce: tuple[int, ...], count: int) -> None:
    found = words(kernels, KEY, 2**31 - 1, nonce, count)
    assert found.tolist() == expected_words(2**31 - 1, nonce, count, 20)


def mean(
    kernels: ModuleType, total: Tensor | None, kind: int, dtype: torch.dtype, grid: float, **given: Any
) -> tuple[Tensor, Tensor]:
    """Noisy means of the kernel and of the definition."""
    arguments = {"std": 1.5, "divisor": 3.0, "step": 2**32 - 2, "offset": 0, "count": COUNT} | given
    std, divisor, step, offset, count = arguments.values()
    both = torch.empty(count, dtype=dtype), torch.empty(count, dtype=dtype)
    for forward, out in zip((kernels.noisy_mean_forward, reference.noisy_mean_forward), both):
        forward(total, std, grid, divisor, SECRET, step, offset, kind, out)
    return both


@pytest.mark.parametrize("offset", OFFSETS)
def test_narrow_normals_are_within_their_ulps(kernels: ModuleType, offset: int) -> None:
    found, _ = mean(kernels, None, NARROW, torch.float32, 0.0, std=1.0, divisor=1.0, offset=offset)
    exact = torch.empty(COUNT, dtype=torch.float64)
    reference.noisy_mean_forward(None, 1.0, 0.0, 1.0, SECRET, 2**32 - 2, offset, WIDE, exact)
    last_place = torch.from_numpy(np.spacing(exact.abs().float().numpy())).double()
    assert ((found.double() - exact).abs() <= ULP * last_place).all()


@pytest.mark.parametrize("kind", [NARROW, STRICT])
def test_numbers_have_the_bits_of_the_cpus(kernels: ModuleType, kind: int) -> None:
    native = pytest.importorskip("wavedp.ops.noise_native", reason="needs the C++ library")
    dtype = torch.float32 if kind == NARROW else torch.float64
    ours, theirs = torch.empty(COUNT, dtype=dtype), torch.empty(COUNT, dtype=dtype)
    grid = 0.0 if kind == NARROW else 2.0**-50  # fine enough to show every bit
    kernels.noisy_mean_forward(None, 1.0, grid, 1.0, SECRET, 3, 11, kind, ours)
    native.noisy_mean_forward(None, 1.0, grid, 1.0, SECRET, 3, 11, kind, theirs)
    assert torch.equal(ours, theirs)


def test_strict_numbers_have_the_bits_of_the_definition(kernels: ModuleType) -> None:
    found, expected = mean(kernels, None, STRICT, torch.float64, 2.0**-50, std=1.0, divisor=1.0, offset=2**40 + 93)
    assert torch.equal(found, expected)


def test_wide_numbers_are_near_the_definitions(kernels: ModuleType) -> None:
    found, expected = mean(kernels, None, WIDE, torch.float64, 0.0, std=1.0, divisor=1.0)
    assert ((found - expected).abs() <= WIDE_ERROR).all()


# The reference has float64's normals rounded to float32, of which one in some thousands rounds its sum to the other
# multiple of the grid: 1 of 1301 and fewer.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("kind", "total_dtype"),
    [(NARROW, None), (NARROW, torch.float32), (NARROW, torch.float64), (WIDE, torch.float64), (STRICT, torch.float32)],
)
def test_means(kernels: ModuleType, kind: int, total_dtype: torch.dtype | None, dtype: torch.dtype) -> None:
    total = None if total_dtype is None else 4 * torch.randn(COUNT, dtype=torch.float64).to(total_dtype)
    grid = 2.0**-20 if kind == STRICT else 2.0**-12
    found, expected = mean(kernels, total, kind, dtype, grid, offset=7)
    differ = found != expected
    assert differ.sum() <= (3 if kind == NARROW else 0)
    step = (found - expected).abs().double()
    spacing = torch.finfo(dtype).eps * expected.abs().double()
    assert (step <= (grid / 3.0 + spacing) * (1 + 1e-12)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_without_noise_a_sum_is_divided(kernels: ModuleType, dtype: torch.dtype) -> None:
    total = torch.randn(COUNT, dtype=torch.float64)
    total[:3] = torch.tensor([math.inf, -math.inf, math.nan])
    found, expected = mean(kernels, total, NARROW, dtype, 2.0**-3, std=0.0)
    assert torch.equal(found.nan_to_num(9.0), expected.nan_to_num(9.0))


@pytest.mark.parametrize("kind", [NARROW, STRICT])
def test_what_no_grid_can_hold_stays(kernels: ModuleType, kind: int) -> None:
    total = torch.tensor([math.inf, -math.inf, math.nan, 1e300, -(2.0**53) - 2.0, 2.0**51 + 0.5], dtype=torch.float64)
    found, expected = mean(kernels, total, kind, torch.float64, 1.0, count=6, divisor=1.0)
    assert torch.equal(found.nan_to_num(9.0), expected.nan_to_num(9.0))


def test_in_place(kernels: ModuleType) -> None:
    total = torch.randn(COUNT)
    expected = torch.empty(COUNT)
    kernels.noisy_mean_forward(total, 1.5, 2.0**-12, 3.0, SECRET, 1, 5, NARROW, expected)
    kernels.noisy_mean_forward(total, 1.5, 2.0**-12, 3.0, SECRET, 1, 5, NARROW, total)
    assert torch.equal(total, expected)


def test_nothing_is_nothing(kernels: ModuleType) -> None:
    kernels.noisy_mean_forward(None, 1.0, 0.0, 1.0, SECRET, 0, 0, NARROW, torch.empty(0))
    kernels.chacha20_words_forward(SECRET, 0, (0, 0), 20, torch.empty(0, dtype=torch.uint32))


def exact_normals(high: Tensor, low: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """The definition's, with the nearest quarter turn taken off the angle in integers: near the zeros of sine and
    cosine the definition itself is off by units in the last place of float64's angle."""
    radius, _ = reference.normals_from_words(high, low, torch.zeros_like(angle))
    quarter = (angle + (1 << 29)) >> 30
    rest = (angle - (quarter << 30)).double() + 0.5
    sine, cosine = torch.sin(rest * (math.pi * 2.0**-31)), torch.cos(rest * (math.pi * 2.0**-31))
    turned = torch.stack((cosine, -sine, -cosine, sine))
    place = (quarter % 4)[None]
    return radius * turned.gather(0, place)[0], radius * turned.roll(1, 0).gather(0, place)[0]


def _transform_kernel(words_ptr, first_ptr, second_ptr, TRANSFORM: tl.constexpr, WORDS: tl.constexpr, N: tl.constexpr):
    """Words stand in columns ``[WORDS, N]``."""
    lanes = tl.arange(0, N)
    a = tl.load(words_ptr + lanes)
    b = tl.load(words_ptr + N + lanes)
    c = tl.load(words_ptr + 2 * N + lanes)
    if WORDS == 3:
        first, second = TRANSFORM(a, b, c)
    else:
        first, second = TRANSFORM(a, b, c, tl.load(words_ptr + 3 * N + lanes))
    tl.store(first_ptr + lanes, first)
    tl.store(second_ptr + lanes, second)


# Of a sign, a branch or a rounding each; the fifth and sixth are where a quarter turn ends, and before.
CORNERS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 0x20000000, 0x1FFFFFFF, 0x4AFB0CCC)


@pytest.mark.parametrize(("kind", "count"), [(NARROW, 3), (WIDE, 3), (STRICT, 4)])
def test_corners_of_the_transform(fresh_kernels: Callable[..., ModuleType], kind: int, count: int) -> None:
    device = fresh_kernels("noise_normals", interpreted=True)
    transform = (device.narrow_normals, device.wide_normals, device.strict_normals)[kind]
    given = torch.cartesian_prod(*[torch.tensor(CORNERS)] * count).T.contiguous()
    dtype = torch.float32 if kind == NARROW else torch.float64
    found = [torch.empty(given.shape[1], dtype=dtype) for _ in range(2)]
    kernel = triton.runtime.interpreter.InterpretedFunction(_transform_kernel)
    kernel[(1,)](given.to(torch.uint32), *found, TRANSFORM=transform, WORDS=count, N=given.shape[1])
    exact = (reference.strict_normals_from_words if kind == STRICT else exact_normals)(*given)
    for one, expected in zip(found, exact):
        if kind == STRICT:
            assert torch.equal(one, expected)
        elif kind == WIDE:
            assert ((one - expected).abs() <= 2.0**-48).all()
        else:
            last_place = torch.from_numpy(np.spacing(expected.abs().float().numpy())).double()
            assert ((one.double() - expected).abs() <= ULP * last_place).all()
    largest = max(float(one.abs().max()) for one in found)
    assert largest == pytest.approx(10.3317 if kind == STRICT else 9.4925, abs=1e-3)


class Watched:
    """A kernel that notes the key that it was given, and the memory that it lay in."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.seen = kernel, []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **keywords: Any) -> None:
            (key,) = [x for x in arguments if isinstance(x, Tensor) and x.dtype == torch.int32 and x.shape == (8,)]
            numbers = [x for x in arguments if isinstance(x, (int, float))]
            assert not set(np.frombuffer(KEY, "<i4").tolist()) & set(numbers)
            self.seen.append((key, key.clone()))
            self.kernel[grid](*arguments, **keywords)

        return launch


def test_the_key_is_wiped_after_a_launch(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = []
    for forward, name in (
        (kernels.chacha20_words_forward, "_chacha20_words_kernel"),
        (kernels.noisy_mean_forward, "_noisy_mean_kernel"),
        (kernels.noise_step_forward, "_noise_step_kernel"),
    ):
        watched.append(Watched(forward.__globals__[name]))
        monkeypatch.setitem(forward.__globals__, name, watched[-1])
    words(kernels, KEY, 0, (0, 0), 16)
    mean(kernels, None, NARROW, torch.float32, 0.0, count=3)
    tensor = StepTensor(torch.zeros(3), None, None, None, None, None, None, False, StepConstants(rate=1.0))
    kernels.noise_step_forward(SGD, [tensor], 1.0, 0.0, 1.0, SECRET, 0, 0, False)
    for one in watched:
        ((memory, during),) = one.seen
        assert torch.equal(during, SECRET.view(torch.int32))
        assert torch.equal(memory, torch.zeros(8, dtype=torch.int32))
    assert SECRET.tolist() == list(KEY)


def test_the_key_is_wiped_when_a_launch_fails(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []

    class Broken:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*arguments: Any, **keywords: Any) -> None:
                kept.append(arguments[2])
                raise ValueError("no such device")

            return launch

    monkeypatch.setitem(kernels.noisy_mean_forward.__globals__, "_noisy_mean_kernel", Broken())
    with pytest.raises(ValueError, match="no such device"):
        mean(kernels, None, NARROW, torch.float32, 0.0, count=3)
    assert not kept[0].any()
