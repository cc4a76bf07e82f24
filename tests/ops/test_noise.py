# SPDX-License-Identifier: Apache-2.0
"""ChaCha20 against published vectors, the numbers made from it against float64, and their place in the stream."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import wavedp
from wavedp.noise import MAX_DEVIATION, grid_step
from wavedp.ops import use_backend
from wavedp.reference import noise as reference

WORD = 0xFFFFFFFF
KEY = bytes(range(32))
ULP = 5  # largest error of a float32 normal, in units in its last place; 4.7 was seen in 2e7 pairs
DRAWS = 1_000_000
SIGMAS = 5.4  # two-sided 6.7e-8


def hex_words(x: Tensor) -> str:
    return " ".join(f"{word:08x}" for word in x.tolist())


@pytest.mark.usefixtures("implementation")
def test_block_of_rfc_8439() -> None:
    """Section 2.3.2."""
    words = wavedp.chacha20_words(KEY, 1, bytes.fromhex("000000090000004a00000000"), 16)
    assert hex_words(words) == (
        "e4e7f110 15593bd1 1fdd0f50 c47120a3 c7f4d1c7 0368c033 9aaa2204 4e6cd4c3 "
        "466482d2 09aa9f07 05d7c214 a2028bd9 d19c12b5 b94e16de e883d0cb 4e3c50a2"
    )


VECTORS = {  # appendix A.1: key, counter, nonce, key stream
    1: (
        bytes(32),
        0,
        bytes(12),
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    2: (
        bytes(32),
        1,
        bytes(12),
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
    3: (
        bytes(31) + b"\x01",
        1,
        bytes(12),
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    ),
    4: (
        b"\x00\xff" + bytes(30),
        2,
        bytes(12),
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
        "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
    ),
    5: (
        bytes(32),
        0,
        bytes(11) + b"\x02",
        "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7"
        "8a970e0e955c14f3a88e741b97c286f75f8fc299e8148362fa198a39531bed6d",
    ),
}


@pytest.mark.parametrize("number", VECTORS)
@pytest.mark.usefixtures("implementation")
def test_key_streams_of_rfc_8439(number: int) -> None:
    key, counter, nonce, stream = VECTORS[number]
    words = wavedp.chacha20_words(key, counter, nonce, 16)
    assert words.numpy().astype("<u4").tobytes().hex() == stream


def block_by_integers(key: bytes, last: list[int], rounds: int) -> list[int]:
    """One block by Python's integers, from section 2.1 of the RFC."""
    x = [*(int.from_bytes((b"expand 32-byte k" + key)[k : k + 4], "little") for k in range(0, 48, 4)), *last]
    start = list(x)
    columns = [(k, 4 + k, 8 + k, 12 + k) for k in range(4)]
    diagonals = [(k, 4 + (k + 1) % 4, 8 + (k + 2) % 4, 12 + (k + 3) % 4) for k in range(4)]
    for a, b, c, d in (columns + diagonals) * (rounds // 2):
        for i, j, k, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            x[i] = (x[i] + x[j]) & WORD
            turned = x[k] ^ x[i]
            x[k] = ((turned << bits) | (turned >> (32 - bits))) & WORD
    return [(word + first) & WORD for word, first in zip(x, start)]


@pytest.mark.parametrize("rounds", [8, 12, 20])
@pytest.mark.usefixtures("implementation")
def test_the_counter_of_64_bits_carries(rounds: int) -> None:
    """Twenty blocks, so that the low half of the counter wraps inside of a vector and outside of one."""
    for first in (2**32 - 3, 2**32 - 16, 7, 2**64 - 20):
        words = wavedp.chacha20_words(KEY, first, bytes(range(8)), 20 * 16 - 5, rounds)
        expected: list[int] = []
        for block in range(first, first + 20):
            expected += block_by_integers(KEY, [block & WORD, block >> 32, 0x03020100, 0x07060504], rounds)
        assert words.tolist() == expected[:-5], first


def test_wrong_streams_are_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes of key_bytes, not 31"):
        wavedp.chacha20_words(KEY[1:], 0, bytes(12), 1)
    with pytest.raises(TypeError, match="key_bytes as bytes"):
        wavedp.chacha20_words("a" * 32, 0, bytes(12), 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="8 or 12 bytes of nonce"):
        wavedp.chacha20_words(KEY, 0, bytes(4), 1)
    with pytest.raises(ValueError, match="rounds, not 10"):
        wavedp.chacha20_words(KEY, 0, bytes(12), 1, 10)
    with pytest.raises(ValueError, match="wrap its counter of 32 bits"):
        wavedp.chacha20_words(KEY, 2**32 - 1, bytes(12), 17)
    with pytest.raises(ValueError, match="counter of at least 0"):
        wavedp.chacha20_words(KEY, 2**32, bytes(12), 1)
    with pytest.raises(TypeError, match="integer as count"):
        wavedp.chacha20_words(KEY, 0, bytes(12), 1.0)  # type: ignore[arg-type]
    assert wavedp.chacha20_words(KEY, 2**32 - 1, bytes(12), 16).numel() == 16
    assert wavedp.chacha20_words(KEY, 0, bytes(8), 0).numel() == 0


def words_of(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def test_radius_keeps_64_bits() -> None:
    """24-bit radii stop at 5.77 sigma, 32-bit ones at 6.66; here the low word goes on to 9.49."""

    def largest(high: int, low: int) -> float:
        return max(abs(float(x)) for x in reference.normals_from_words(*map(words_of, (high, low, 0))))

    assert largest(0, 0) == pytest.approx(9.4925, abs=1e-3)
    assert largest(0, 0) <= MAX_DEVIATION * (1 + 2.0**-52)
    assert largest(0, WORD) == pytest.approx(6.6604, abs=1e-3)
    assert largest(1, 0) == pytest.approx(6.6604, abs=1e-3)
    assert largest(0, 1 << 16) > 8.0
    assert largest(WORD, WORD) == pytest.approx(2.0**-32, rel=1e-12)


@pytest.mark.parametrize("high", [0, 1, 1 << 16, (1 << 31) - 1, 1 << 31, WORD])
@pytest.mark.parametrize("low", [0, 1, 1 << 31, WORD])
def test_words_map_as_documented(high: int, low: int) -> None:
    for angle in (0, 1 << 30, 1 << 31, WORD):
        x, y = (float(v) for v in reference.normals_from_words(*map(words_of, (high, low, angle))))
        v = 2 * ((high << 32) + low) + 1
        minus_log = -math.log(v * 2.0**-65) if v < 1 << 64 else -math.log1p(-((1 << 65) - v) * 2.0**-65)
        assert x * x + y * y == pytest.approx(2 * minus_log, rel=1e-12, abs=0)
        theta = 2 * math.pi * (angle + 0.5) / 2**32
        assert x == pytest.approx(math.hypot(x, y) * math.cos(theta), rel=1e-9, abs=1e-9)


def drawn(count: int, offset: int = 0, dtype: torch.dtype = torch.float32, seed: int = 3, step: int = 0) -> Tensor:
    key = wavedp.NoiseKey.insecure(seed)
    return wavedp.gaussian_noise((count,), key=key, offset=offset, dtype=dtype, step=step)


def test_numbers_stand_where_the_definition_says(implementation: str) -> None:
    """Number i from three words of block 16 (i // 160) + i % 16, taken from the raw stream."""
    key = wavedp.NoiseKey.insecure(3)
    key_bytes = bytes(key._bytes().tolist())
    step, offset, count = 2**32 - 2, 2**40 + 93, 700
    found = drawn(count, offset, torch.float64, step=step)
    nonce = step.to_bytes(4, "little") + (1 << 24).to_bytes(4, "little")
    for i in (0, 1, 66, 67, 68, 159, 160, 250, 699):
        group, place = divmod(offset + i, 160)
        k, lane = divmod(place, 16)
        words = wavedp.chacha20_words(key_bytes, 16 * group + lane, nonce, 16).long()
        pair = reference.normals_from_words(*words[3 * (k // 2) : 3 * (k // 2) + 3])
        assert float(found[i]) == pytest.approx(float(pair[k % 2]), rel=1e-13), (implementation, i)


def test_float32_is_within_its_bound(implementation: str) -> None:
    count = 1_000_000 if implementation == "avx512" else 160_000
    near, exact = drawn(count), drawn(count, dtype=torch.float64)
    # Of the smaller of the two binades at a power of two: the unit of what is found.
    unit = torch.from_numpy(np.spacing(exact.float().abs().numpy())).double()
    assert ((near.double() - exact).abs() <= ULP * unit).all()


def test_every_instruction_set_has_the_same_bits(implementation: str) -> None:
    if implementation == "reference":
        pytest.skip("float32 arithmetic is the C++ library's; the definition rounds float64")
    native = pytest.importorskip("wavedp._csrc", reason="needs the C++ library")
    found = drawn(100_003, offset=77), drawn(1_003, offset=77, dtype=torch.float64)
    native.set_isa("baseline")
    assert torch.equal(found[0], drawn(100_003, offset=77))
    assert torch.equal(found[1], drawn(1_003, offset=77, dtype=torch.float64))


def test_splits_and_threads_do_not_show(implementation: str) -> None:
    count = 3000 if implementation == "reference" else 200_001
    whole = drawn(count, offset=5)
    for cut in (1, 155, 156, 160, 1283, count - 1):
        parts = drawn(cut, offset=5), drawn(count - cut, offset=5 + cut)
        assert torch.equal(torch.cat(parts), whole), cut
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(drawn(count, offset=5), whole)
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(drawn(count, offset=5, step=1), whole)
    assert not torch.equal(drawn(count, offset=5, seed=4), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_law(dtype: torch.dtype) -> None:
    x = wavedp.gaussian_noise((DRAWS,), 3.0, dtype=dtype).double().numpy() / 3.0
    assert abs(x.mean()) < SIGMAS / math.sqrt(DRAWS)
    assert abs(x.var() - 1.0) < SIGMAS * math.sqrt(2.0 / DRAWS)
    assert stats.kstest(x, "norm").pvalue > 1e-7
    cells = np.histogram(stats.norm.cdf(x), bins=1000, range=(0.0, 1.0))[0]
    assert stats.chisquare(cells).pvalue > 1e-7
    for threshold in (3.0, 4.0, 4.6):
        expected = DRAWS * 2 * stats.norm.sf(threshold)
        count = int((np.abs(x) > threshold).sum())
        assert stats.poisson.ppf(1e-8, expected) <= count <= stats.poisson.isf(1e-8, expected), threshold
    for shift in (1, 16, 32, 160, DRAWS // 2):  # 16 lies between the cosine and the sine of a pair
        products = x[:-shift] * x[shift:]
        assert abs(products.mean()) < SIGMAS / math.sqrt(DRAWS - shift), shift
        squares = (x[:-shift] ** 2 - 1) * (x[shift:] ** 2 - 1)
        assert abs(squares.mean()) < 2 * SIGMAS / math.sqrt(DRAWS - shift), shift


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noisy_mean(implementation: str, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    """By exact arithmetic of float64 on the same normals; 3.0 is no power of two."""
    total = torch.linspace(-40.0, 40.0, 4001, dtype=dtype)
    std, grid = 0.7, 2.0**-13
    key = wavedp.NoiseKey.insecure(3)
    found = wavedp.noisy_mean(total, std, divisor=3.0, key=key, step=2, offset=11, out_dtype=out_dtype)
    assert found.dtype == out_dtype
    noise = wavedp.gaussian_noise(total.shape, key=key, step=2, offset=11, dtype=dtype).double()
    exact = torch.round((total.double() + std * noise) / grid) * grid / 3.0
    if out_dtype in (torch.float32, torch.float64):
        assert torch.equal(found, exact.to(out_dtype)), implementation
        return
    # Rounded once: no number of the type is nearer.
    error = (found.double() - exact).abs()
    for direction in (-math.inf, math.inf):
        neighbour = torch.nextafter(found, torch.tensor(direction, dtype=out_dtype))
        assert (error <= (neighbour.double() - exact).abs()).all()


def test_a_halfway_case_is_rounded_once() -> None:
    """1 + 2^-8 + 2^-40 is above the middle of two neighbours in bfloat16; by way of float32 it would be the middle."""
    total = torch.tensor([1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8, 1 + 2.0**-8 - 2.0**-40], dtype=torch.float64)
    expected = [1 + 2.0**-7, 1.0, 1.0]
    for backend in ("reference", "auto"):
        with use_backend(backend):
            found = wavedp.noisy_mean(torch.cat([total, -total]), 0.0, out_dtype=torch.bfloat16)
        assert found.tolist() == [*expected, *(-x for x in expected)]


def test_noisy_mean_stays_on_the_grid(implementation: str) -> None:
    total = torch.cat([torch.linspace(-3.0, 3.0, 2000), torch.tensor([1e-30, 1e4, -1e6, 3e7])]).double() / 3
    noisy = wavedp.noisy_mean(total, 1.0, key=wavedp.NoiseKey.insecure(1))
    steps = noisy / grid_step(1.0)
    assert torch.equal(steps, torch.round(steps)), implementation
    plain = wavedp.noisy_mean(total, 1.0, grid=0.0, key=wavedp.NoiseKey.insecure(1))
    assert ((noisy - plain).abs() <= grid_step(1.0) / 2).all()
    assert not torch.equal(noisy, plain)


def test_without_noise_the_sum_is_left_alone(implementation: str) -> None:
    total = torch.tensor([1 / 3, -1e-30, 1e30, math.nan, math.inf])
    key = wavedp.NoiseKey.insecure(1)
    found = wavedp.noisy_mean(total, 0.0, divisor=4.0, key=key)
    torch.testing.assert_close(found, total / 4, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(wavedp.gaussian_noise((300,), 0.0, key=key), torch.zeros(300)), implementation


def test_what_is_not_finite_stays_in_its_place(implementation: str) -> None:
    total = torch.zeros(50)
    total[7], total[8] = math.nan, -math.inf
    found = wavedp.noisy_mean(total, 1.0, key=wavedp.NoiseKey.insecure(1))
    assert found.isnan().nonzero().flatten().tolist() == [7], implementation
    assert found.isinf().nonzero().flatten().tolist() == [8]


def test_adding_in_place(implementation: str) -> None:
    """Elements are counted in row-major order whatever the strides."""
    key = wavedp.NoiseKey.insecure(9)
    base = torch.arange(60.0).reshape(3, 4, 5)
    expected = wavedp.noisy_mean(base, 2.0, key=key, offset=3)
    for x in (base.clone(), base.transpose(0, 2).contiguous().transpose(0, 2)):
        version = x._version
        assert wavedp.add_gaussian_noise_(x, 2.0, key=key, offset=3) is x
        assert torch.equal(x, expected), implementation
        assert x._version > version


def test_empty_shapes() -> None:
    assert wavedp.gaussian_noise(()).shape == ()
    assert wavedp.gaussian_noise((3, 0, 2)).shape == (3, 0, 2)
    assert wavedp.noisy_mean(torch.zeros(0), 1.0).shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"std": -1.0}, ValueError, "finite std >= 0"),
        ({"std": math.nan}, ValueError, "finite std >= 0"),
        ({"std": True}, TypeError, "real number as std"),
        ({"dtype": torch.bfloat16}, ValueError, "float32 or float64"),
        ({"step": 2**32}, ValueError, "step of at least 0 and at most 4294967295"),
        ({"offset": -1}, ValueError, "offset of at least 0"),
        ({"offset": 2**63}, ValueError, "offset of at least 0"),
        ({"offset": 1.5}, TypeError, "integer as offset"),
        ({"key": bytes(32)}, TypeError, "takes a NoiseKey"),
    ],
)
def test_wrong_arguments_of_noise(arguments: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        wavedp.gaussian_noise((2,), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("total", "arguments", "error", "match"),
    [
        (torch.zeros(2, dtype=torch.bfloat16), {}, ValueError, "float32 or float64"),
        (torch.zeros(2, dtype=torch.int64), {}, ValueError, "float32 or float64"),
        ([0.0], {}, TypeError, "takes torch tensors"),
        (torch.zeros(2), {"divisor": 0.0}, ValueError, "divisor > 0"),
        (torch.zeros(2), {"divisor": math.inf}, ValueError, "divisor > 0"),
        (torch.zeros(2), {"grid": 0.3}, ValueError, "power of two"),
        (torch.zeros(2), {"out_dtype": torch.int8}, ValueError, "out_dtype"),
        (torch.zeros(2), {"std": 1e-310}, ValueError, "grid_step"),
    ],
)
def test_wrong_arguments_of_a_mean(
    total: Tensor, arguments: dict[str, object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        wavedp.noisy_mean(total, **({"std": 1.0} | arguments))  # type: ignore[arg-type]


def test_a_leaf_that_requires_grad_is_refused() -> None:
    x = torch.zeros(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf that requires grad"):
        wavedp.add_gaussian_noise_(x, 1.0)
    with torch.no_grad():
        wavedp.add_gaussian_noise_(x, 1.0)
    assert (x != 0).all()
