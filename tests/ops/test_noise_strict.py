# SPDX-License-Identifier: Apache-2.0
"""Strict noise: integers from float64 normals that are the same bits everywhere, with a bounded error."""

from __future__ import annotations

import math
import random

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import wavedp
from wavedp.noise import MAX_STRICT_DEVIATION, STRICT_NORMAL_ERROR, grid_step
from wavedp.ops import use_backend
from wavedp.ops.noise import noisy_mean
from wavedp.reference.noise import STRICT, STRICT_DOMAIN
from wavedp.reference.normals_strict import COSINE, HALF_PI, LOG, SINE, strict_normals_from_words
from wavedp.reference.normals_strict import _square_root as reference_root

WORD = 0xFFFFFFFF
DRAWS = 1_000_000
SIGMAS = 5.4  # two-sided 6.7e-8
# Where a piece of the formula begins or ends: of the radius, of its polynomial (2^32 times 1/sqrt(2), its half and one
# less it), of a quarter turn.
CORNERS = (0, 1, 2, 0x4AFB0CCC, 0x4AFB0CCD, 0x5A827999, 0x5A82799A, (1 << 31) - 1, 1 << 31, 0xB504F333, WORD)
ANGLES = (0, 1, (1 << 29) - 1, 1 << 29, (1 << 30) - 1, 1 << 30, 3 << 29, 1 << 31, 5 << 29, 3 << 30, 7 << 29, WORD)


def exact_pair(high: int, low: int, angle_high: int, angle_low: int) -> tuple[mpmath.mpf, mpmath.mpf]:
    """Box and Muller's formula from integers, to 160 bits."""
    v = mpmath.mpf(2 * ((high << 44) + (low << 12) + (angle_low & 0xFFF)) + 1)
    u = v / mpmath.mpf(2) ** 77
    radius = mpmath.sqrt(-2 * (mpmath.log(u) if u < 0.5 else mpmath.log1p(u - 1)))
    turns = mpmath.mpf(2 * ((angle_high << 20) + (angle_low >> 12)) + 1) / mpmath.mpf(2) ** 53
    return radius * mpmath.cospi(2 * turns), radius * mpmath.sinpi(2 * turns)


def words_to_try() -> list[tuple[int, int, int, int]]:
    draw = random.Random(5)

    def word() -> int:
        return draw.getrandbits(32)

    def any_size() -> int:
        return word() >> draw.randrange(33)

    words = [(a, b, c, d) for a in CORNERS for b in (0, WORD) for c in ANGLES for d in (0, 0xFFF, WORD)]
    words += [(word(), word(), word(), word()) for _ in range(2000)]
    words += [(any_size(), any_size(), word(), word()) for _ in range(1000)]  # small u
    words += [(WORD - any_size(), word(), word(), word()) for _ in range(1000)]  # u near 1
    near_quarters = [(draw.randrange(8) << 29) + (word() >> 3 >> draw.randrange(30)) for _ in range(500)]
    return words + [(0, any_size(), angle, word()) for angle in near_quarters]


def test_error_of_a_normal() -> None:
    """2^-48.2 was the worst of 3.6e5 words, structured ones among them. An integer is made of std / grid times it."""
    words = words_to_try()
    found = torch.stack(strict_normals_from_words(*torch.tensor(words, dtype=torch.int64).T), dim=1)
    ratios = 2.0**20, 1.3 * 2.0**20, 2.0**21 * (1 - 2.0**-53)
    scaled = [(ratio * found).tolist() for ratio in ratios]
    with mpmath.workprec(160):
        for row, word in enumerate(words):
            for column, exact in enumerate(exact_pair(*word)):
                for ratio, values in zip(ratios, scaled):
                    error = abs(mpmath.mpf(values[row][column]) - mpmath.mpf(ratio) * exact)
                    assert error <= mpmath.mpf(STRICT_NORMAL_ERROR) * ratio, word


def test_polynomials() -> None:
    """Their errors are those that the definition states."""
    with mpmath.workprec(160):
        for k in range(1, 201):
            s = mpmath.mpf(k) / 200 * (3 - 2 * mpmath.sqrt(2))
            x = mpmath.mpf(k) / 400
            log = 2 * s + s * s * s * mpmath.polyval([mpmath.mpf(c) for c in LOG[::-1]], s * s)
            assert abs(log / mpmath.log((1 + s) / (1 - s)) - 1) < mpmath.mpf(2) ** -58.8
            z = x * x
            sine = x * (HALF_PI + z * mpmath.polyval([mpmath.mpf(c) for c in SINE[::-1]], z))
            assert abs(sine / mpmath.sinpi(x / 2) - 1) < mpmath.mpf(2) ** -54
            cosine = 1 + z * mpmath.polyval([mpmath.mpf(c) for c in COSINE[::-1]], z)
            assert abs(cosine - mpmath.cospi(x / 2)) < mpmath.mpf(2) ** -55.7


def test_the_radius_has_76_bits() -> None:
    pair = strict_normals_from_words(*torch.zeros(4, 1, dtype=torch.int64))
    assert math.hypot(*map(float, pair)) == pytest.approx(MAX_STRICT_DEVIATION, rel=1e-15)
    assert pytest.approx(10.3318, abs=1e-4) == MAX_STRICT_DEVIATION
    lowest = torch.tensor([[0], [0], [0], [1]])  # the last of the twelve bits
    assert math.hypot(*map(float, strict_normals_from_words(*lowest))) == pytest.approx(10.2249, abs=1e-3)


def strict_integers(count: int, offset: int = 0, std: float = 1.0, step: int = 0, seed: int = 3) -> Tensor:
    key = wavedp.NoiseKey.insecure(seed)
    total = torch.zeros(count, dtype=torch.float64)
    return wavedp.noisy_mean(total, std, key=key, offset=offset, step=step, mode="strict") / grid_step(std, "strict")


def test_numbers_stand_where_the_definition_says(implementation: str) -> None:
    """Number i from four words of block 16 (i // 128) + i % 16 of domain 3, taken from the raw stream."""
    key = wavedp.NoiseKey.insecure(3)
    key_bytes = bytes(key._bytes().tolist())
    step, offset, count, std = 2**32 - 2, 2**40 + 93, 700, 1.3
    found = strict_integers(count, offset, std, step)
    nonce = step.to_bytes(4, "little") + (STRICT_DOMAIN << 24).to_bytes(4, "little")
    for i in (0, 1, 34, 35, 36, 127, 128, 250, 699):
        group, place = divmod(offset + i, 128)
        k, lane = divmod(place, 16)
        words = wavedp.chacha20_words(key_bytes, 16 * group + lane, nonce, 16).long()
        with mpmath.workprec(160):
            exact = exact_pair(*words[4 * (k // 2) : 4 * (k // 2) + 4].tolist())[k % 2]
            assert float(found[i]) == mpmath.nint(exact * std / grid_step(std, "strict")), (implementation, i)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_implementation_has_the_definitions_bits(
    implementation: str, dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    key = wavedp.NoiseKey.insecure(1)
    generator = torch.Generator().manual_seed(1)
    for count, offset, std in ((1, 0, 1.0), (127, 5, 0.7), (1283, 2**41 + 77, 3e-9), (30_011, 128, 2.0**40)):
        total = (torch.randn(count, generator=generator, dtype=dtype) * 40 * std).requires_grad_()
        options = {"divisor": 3.0, "key": key, "offset": offset, "out_dtype": out_dtype, "mode": "strict"}
        found = wavedp.noisy_mean(total, std, **options)  # type: ignore[arg-type]
        with use_backend("reference"):
            expected = wavedp.noisy_mean(total, std, **options)  # type: ignore[arg-type]
        assert torch.equal(found, expected), implementation


def test_normals_to_their_last_bits(implementation: str) -> None:
    """On a grid of 2^-52 of the deviation nothing above 2^-1 is rounded, and of the rest a place or two."""
    key = torch.arange(32, dtype=torch.uint8)
    found, expected = (torch.empty(200_000, dtype=torch.float64) for _ in range(2))
    noisy_mean(None, 1.0, 2.0**-52, 1.0, key, 1, 5, STRICT, found)
    with use_backend("reference"):
        noisy_mean(None, 1.0, 2.0**-52, 1.0, key, 1, 5, STRICT, expected)
    assert torch.equal(found, expected), implementation


def test_the_definitions_root_is_rounded_to_nearest() -> None:
    x = torch.rand(100_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    roots = reference_root(x).tolist()
    assert roots == [math.sqrt(one) for one in x.tolist()]


def test_sum_and_noise_are_rounded_apart(implementation: str) -> None:
    """Every result is on the grid, and moves by the sum's own rounding whatever the noise."""
    std, grid = 0.7, grid_step(0.7, "strict")
    assert grid == 2.0**-21
    total = torch.cat([torch.linspace(-3.0, 3.0, 2000), torch.tensor([0.5, 1.5, -0.5]) * grid]).double()
    key = wavedp.NoiseKey.insecure(1)
    noisy = wavedp.noisy_mean(total, std, key=key, mode="strict") / grid
    noise = wavedp.noisy_mean(torch.zeros_like(total), std, key=key, mode="strict") / grid
    assert torch.equal(noisy, torch.round(noisy)), implementation
    assert torch.equal(noisy, torch.round(total / grid) + noise)
    assert (noisy - noise)[-3:].tolist() == [0.0, 2.0, 0.0]


def test_splits_and_threads_do_not_show(implementation: str) -> None:
    count = 3000 if implementation == "reference" else 100_001
    whole = strict_integers(count, 5)
    for cut in (1, 122, 123, 128, 515, count - 1):
        parts = strict_integers(cut, 5), strict_integers(count - cut, 5 + cut)
        assert torch.equal(torch.cat(parts), whole), cut
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(strict_integers(count, 5), whole)
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(strict_integers(count, 5, step=1), whole)
    assert not torch.equal(strict_integers(count, 5, seed=4), whole)


def test_strict_noise_is_not_the_standard_one() -> None:
    total, key = torch.zeros(10_000, dtype=torch.float64), wavedp.NoiseKey.insecure(3)
    strict, standard = (wavedp.noisy_mean(total, 1.0, key=key, mode=mode) for mode in ("strict", "standard"))
    assert abs(float(strict @ standard)) < SIGMAS * math.sqrt(10_000)


def test_law() -> None:
    """False alarms: 6.7e-8 for each moment and product, 1e-7 for each p-value, 2e-8 for each tail; some 14 in all."""
    with wavedp.NoiseKey.from_os() as key:
        x = wavedp.noisy_mean(torch.zeros(DRAWS, dtype=torch.float64), 3.0, key=key, mode="strict").numpy() / 3.0
    integers = x * 3.0 / grid_step(3.0, "strict")
    assert (integers == np.rint(integers)).all()
    assert abs(x.mean()) < SIGMAS / math.sqrt(DRAWS)
    assert abs(x.var() - 1.0) < SIGMAS * math.sqrt(2.0 / DRAWS)
    assert stats.kstest(x, "norm").pvalue > 1e-7
    parities = np.bincount((integers % 8).astype(int), minlength=8)  # the last three bits are even
    assert stats.chisquare(parities).pvalue > 1e-7
    for threshold in (3.0, 4.0, 4.6):
        expected = DRAWS * 2 * stats.norm.sf(threshold)
        count = int((np.abs(x) > threshold).sum())
        assert stats.poisson.ppf(1e-8, expected) <= count <= stats.poisson.isf(1e-8, expected), threshold
    for shift in (1, 16, 128):  # 16 lies between the cosine and the sine of a pair
        products = x[:-shift] * x[shift:]
        assert abs(products.mean()) < SIGMAS / math.sqrt(DRAWS - shift), shift
        squares = (x[:-shift] ** 2 - 1) * (x[shift:] ** 2 - 1)
        assert abs(squares.mean()) < 2 * SIGMAS / math.sqrt(DRAWS - shift), shift


def test_what_is_not_finite_stays_in_its_place(implementation: str) -> None:
    total = torch.zeros(50)
    total[7], total[8] = math.nan, -math.inf
    found = wavedp.noisy_mean(total, 1.0, mode="strict")
    assert found.isnan().nonzero().flatten().tolist() == [7], implementation
    assert found.isinf().nonzero().flatten().tolist() == [8]
    assert torch.equal(wavedp.noisy_mean(total[:7] + 1 / 3, 0.0, divisor=2.0, mode="strict"), (total[:7] + 1 / 3) / 2)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"mode": "exact"}, "mode 'standard' or 'strict', not 'exact'"),
        ({"mode": ["strict"]}, "mode 'standard' or 'strict'"),
        ({"mode": "strict", "grid": 0.0}, "made of integers"),
        ({"mode": "strict", "grid": 2.0**-40}, "made of integers"),
        ({"mode": "strict", "grid": 4.0}, "made of integers"),
        ({"mode": "strict", "grid": 0.3}, "power of two"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        wavedp.noisy_mean(torch.zeros(2), 2.0, **arguments)  # type: ignore[arg-type]


def test_grid_of_a_mode() -> None:
    assert [grid_step(std, "strict") for std in (1.0, 1.99, 2.0, 0.7)] == [2.0**-20, 2.0**-20, 2.0**-19, 2.0**-21]
    with pytest.raises(ValueError, match="mode 'standard' or 'strict'"):
        grid_step(1.0, "loose")


def test_a_given_tensor_takes_the_noise(implementation: str) -> None:
    key = wavedp.NoiseKey.insecure(3)
    for dtype in (torch.float32, torch.float64):
        expected = wavedp.gaussian_noise((5, 7), 2.0, key=key, dtype=dtype, offset=3)
        for out in (torch.empty(5, 7, dtype=dtype), torch.empty(7, 5, dtype=dtype).T):
            version = out._version
            assert wavedp.gaussian_noise((5, 7), 2.0, key=key, offset=3, out=out) is out
            assert torch.equal(out, expected), implementation
            assert out._version > version


@pytest.mark.parametrize(
    ("out", "options", "error", "match"),
    [
        ([0.0], {}, TypeError, "takes torch tensors"),
        (torch.zeros(3), {}, ValueError, "must have the shape"),
        (torch.zeros(2, dtype=torch.bfloat16), {}, ValueError, "float32 or float64"),
        (torch.zeros(2), {"dtype": torch.float64}, ValueError, "dtype=torch.float64 was asked for"),
        (torch.zeros(2), {"device": "meta"}, ValueError, "device='meta' was asked for"),
        (torch.zeros(2, requires_grad=True), {}, RuntimeError, "leaf that requires grad"),
    ],
)
def test_wrong_out(out: Tensor, options: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        wavedp.gaussian_noise((2,), out=out, **options)  # type: ignore[arg-type]
