# SPDX-License-Identifier: Apache-2.0
"""The public wavelet functions under inputs nobody sends on purpose: extreme values, extreme shapes, wrong types.

What is expected comes from a transform written here in numpy, or from PyWavelets, never from wavedp's reference.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import pywt
import torch
from torch import Tensor

import wavedp
from wavedp.ops import available_backends, use_backend

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def noise(*shape: int, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).to(device)


def flat(coeffs: Any) -> list[Tensor]:
    return [coeffs[0], *(band for details in coeffs[1:] for band in details)]


@pytest.fixture
def exact(target: Any, dtype: torch.dtype) -> Any:
    """The target, where it rounds as hardware does."""
    if not target.rounds_to_nearest(dtype):
        pytest.skip("Triton's interpreter cuts float32 off to bfloat16 where hardware rounds")
    return target


def haar(x: Tensor, level: int) -> list[Tensor]:
    """Bands of an image whose sizes are even at every level: rows first, then columns, then one product by 1/2."""
    wide = x.cpu().double().numpy() if x.dtype == torch.float64 else x.cpu().float().numpy()
    half, details = wide.dtype.type(0.5), []
    with np.errstate(all="ignore"):
        for _ in range(level):
            low, high = wide[..., 0::2, :] + wide[..., 1::2, :], wide[..., 0::2, :] - wide[..., 1::2, :]
            wide = half * (low[..., 0::2] + low[..., 1::2])
            lh, hl = half * (high[..., 0::2] + high[..., 1::2]), half * (low[..., 0::2] - low[..., 1::2])
            details.append([lh, hl, half * (high[..., 0::2] - high[..., 1::2])])
    bands = [wide, *(band for of_level in reversed(details) for band in of_level)]
    return [torch.from_numpy(np.ascontiguousarray(band)).to(x.dtype) for band in bands]


def assert_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Equal to the bit, the sign of zero included; any NaN is as good as another."""
    for a, e in zip(actual, expected, strict=True):
        a = a.cpu()
        torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(torch.signbit(a) & ~a.isnan(), torch.signbit(e) & ~e.isnan())


def quiet_pywt(x: Tensor, level: int, mode: str) -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        coeffs = pywt.wavedec2(x.double().numpy(), "haar", mode, level)
    return [torch.from_numpy(np.ascontiguousarray(band)) for band in flat(coeffs)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_a_pixel_that_is_not_finite_stays_in_its_block(exact: Any, dtype: torch.dtype, value: float) -> None:
    x = noise(2, 16, 24, dtype=dtype)
    for row, column in ((0, 0), (7, 23), (15, 11)):
        bad = x.clone()
        bad[1, row, column] = value
        expected = haar(bad, 3)
        assert not torch.equal(expected[0], haar(x, 3)[0])
        assert sum(int((~band.isfinite()).sum()) for band in expected) == 10
        assert_bits(flat(wavedp.wavedec2(bad.to(exact.device), 3)), expected)
        assert_bits([wavedp.coarse(bad.to(exact.device), 3)], expected[:1])


@pytest.mark.parametrize("mode", pywt.Modes.modes)
def test_a_nan_goes_as_far_as_the_mode_takes_it(mode: str) -> None:
    x = noise(11, 13, dtype=torch.float64)
    for backend in available_backends():
        if backend in ("triton", "cuda"):
            continue
        for row in (0, 4, 9, 10):
            for column in (0, 6, 11, 12):
                bad = x.clone()
                bad[row, column] = float("nan")
                with use_backend(backend):
                    bands = flat(wavedp.wavedec2(bad, 3, mode))
                for band, expected in zip(bands, quiet_pywt(bad, 3, mode), strict=True):
                    torch.testing.assert_close(band, expected, rtol=0, atol=1e-13, equal_nan=True)


def test_a_coefficient_that_is_not_finite_stays_in_its_block(target: Any) -> None:
    coeffs = wavedp.wavedec2(noise(2, 16, 24, device=target.device), 3)
    clean = wavedp.waverec2(coeffs)
    for position, band in enumerate(flat(coeffs)):
        bad = [one.clone() for one in flat(coeffs)]
        bad[position][1, -1, 1] = float("nan")
        image = wavedp.waverec2([bad[0], *(tuple(bad[k : k + 3]) for k in (1, 4, 7))])
        block = 16 // band.shape[-2]
        expected = clean.clone()
        expected[1, 16 - block :, block : 2 * block] = float("nan")
        torch.testing.assert_close(image, expected, rtol=0, atol=0, equal_nan=True)


def test_absent_bands_are_not_multiplied(target: Any) -> None:
    """None stands for zeros, but 0 * inf is not 0: nothing is computed from it."""
    x = torch.full((1, 4, 4), float("inf"), device=target.device)
    assert torch.equal(wavedp.waverec2([x, (None, None, None)]), x.new_full((1, 8, 8), float("inf")))


def test_a_nan_stays_in_its_tokens(target: Any) -> None:
    x = noise(2, 3, 16, 16, device=target.device)
    clean, clean_energies = wavedp.wavelet_tokens(x, 2, 2, energies=True)
    bad = x.clone()
    bad[1, 2, 3, 9] = float("nan")
    tokens, energies = wavedp.wavelet_tokens(bad, 2, 2, energies=True)
    for one, other in zip(tokens, clean, strict=True):
        touched = one.isnan()
        assert touched[1, 1].sum() == (1 if one is tokens[0] else 3)
        assert touched.sum() == touched[1, 1].sum()
        assert torch.equal(one[~touched], other[~touched])
    touched = energies.isnan()
    assert touched.sum() == touched[1].sum() == 7
    torch.testing.assert_close(energies[~touched], clean_energies[~touched], rtol=0, atol=0)
    image = wavedp.wavelet_untokens(tokens, 2, channels=3)
    assert image.isnan().sum() == image[1, 2, 0:4, 8:12].isnan().sum() == 16


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_smallest_numbers_are_not_flushed_to_zero(exact: Any, dtype: torch.dtype) -> None:
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the least subnormal
    counts = torch.randint(-9, 10, (2, 8, 64), dtype=torch.float64)
    x = (counts * smallest).to(dtype)
    assert torch.equal(x.double(), counts * smallest)
    expected = haar(x, 2)
    assert sum(int((band != 0).sum()) for band in expected) > 200
    coeffs = wavedp.wavedec2(x.to(exact.device), 2)
    assert_bits(flat(coeffs), expected)
    one = wavedp.dwt2(x.to(exact.device))
    again = wavedp.idwt2((one[0] * 2, [band * 2 for band in one[1]]))
    doubled = haar(x, 1)
    assert torch.equal((one[0] * 2).cpu(), doubled[0] * 2)
    if dtype in (torch.float32, torch.float64):
        # The halves that rounding lost are at most one step of the four sums each.
        assert (again.cpu().double() - 2 * x.double()).abs().max() <= 4 * smallest


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # numpy's, interpreted
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_largest_numbers(exact: Any, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = noise(2, 8, 16, dtype=torch.float64).sign().mul(largest).to(dtype)
    x[0, :, :8] = largest
    x[1, :4] /= 8
    expected = haar(x, 2)
    assert_bits(flat(wavedp.wavedec2(x.to(exact.device), 2)), expected)
    if dtype == torch.float16:  # four times 65504 overflows the type and not the arithmetic: its details are exact
        assert expected[-1][0, :, :4].eq(0).all()
        assert expected[0][0, :, :2].isinf().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_neighbours_of_another_magnitude_do_not_mix(exact: Any, dtype: torch.dtype) -> None:
    tiny, huge = (1e-30, 1e30) if dtype != torch.float16 else (1e-4, 1e4)
    x = noise(1, 16, 16, dtype=torch.float64)
    chessboard = (torch.arange(8)[:, None] + torch.arange(8)).remainder(2).repeat_interleave(2, 0)
    x = (x * torch.where(chessboard.repeat_interleave(2, 1) > 0, huge, tiny)).to(dtype)
    assert_bits(flat(wavedp.wavedec2(x.to(exact.device), 1)), haar(x, 1))


def test_the_sign_of_zero(target: Any) -> None:
    x = torch.where(torch.rand(2, 8, 32) > 0.5, 0.0, -0.0)
    assert_bits(flat(wavedp.wavedec2(x.to(target.device), 2)), haar(x, 2))


SLIM = ((1, 1), (1, 2), (2, 1), (1, 7), (7, 1), (1, 64), (65, 1), (2, 2), (3, 1))


@pytest.mark.parametrize("mode", pywt.Modes.modes)
def test_lines_and_single_pixels(target: Any, mode: str) -> None:
    sizes = ((1, 7), (1, 1)) if target.interpreted else SLIM
    for size in sizes:
        x = noise(2, *size, dtype=torch.float64)
        for level in (4,) if target.interpreted else (1, 4):
            try:
                expected = quiet_pywt(x, level, mode)
            except ValueError:
                with pytest.raises(ValueError, match="2 samples"):
                    wavedp.wavedec2(x.to(target.device), level, mode)
                continue
            coeffs = wavedp.wavedec2(x.to(target.device), level, mode)
            for band, wanted in zip(flat(coeffs), expected, strict=True):
                torch.testing.assert_close(band.cpu(), wanted, rtol=1e-13, atol=1e-13)
            back = wavedp.waverec2(coeffs, output_size=size)
            torch.testing.assert_close(back.cpu(), x, rtol=0, atol=1e-12)


def test_many_more_levels_than_samples() -> None:
    for mode in ("zero", "symmetric", "antisymmetric", "periodic", "smooth"):
        x = noise(3, 5, dtype=torch.float64)
        for band, expected in zip(flat(wavedp.wavedec2(x, 40, mode)), quiet_pywt(x, 40, mode), strict=True):
            torch.testing.assert_close(band, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(wavedp.coarse(x, 40, mode), quiet_pywt(x, 40, mode)[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("lead", [(0,), (0, 3), (3, 0), (2, 0, 4)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_empty_batches(target: Any, lead: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.empty(*lead, 9, 6, dtype=dtype, device=target.device, requires_grad=True)
    coeffs = wavedp.wavedec2(x, 2, "reflect")
    assert [tuple(band.shape) for band in flat(coeffs)] == [(*lead, 3, 2)] * 4 + [(*lead, 5, 3)] * 3
    image = wavedp.waverec2(coeffs, output_size=(9, 6))
    assert (image.shape, image.dtype, image.device) == (x.shape, dtype, x.device)
    image.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert wavedp.coarse(x, 2).shape == (*lead, 3, 2)
    for size in ((0, 4), (4, 0), (0, 0)):
        with pytest.raises(ValueError):
            wavedp.wavedec2(x.new_empty(*lead, *size), 1)


def test_empty_batches_of_tokens(target: Any) -> None:
    x = torch.empty(0, 3, 8, 8, device=target.device)
    tokens, energies = wavedp.wavelet_tokens(x, 2, 2, [0.0] * 3, [2.0] * 3, energies=True)
    assert [tuple(one.shape) for one in tokens] == [(0, 4, 3), (0, 4, 9), (0, 4, 36)]
    assert energies.shape == (0, 21)
    assert wavedp.wavelet_untokens(tokens, 2, channels=3).shape == (0, 3, 8, 8)


def test_many_small_images(target: Any) -> None:
    count = 33 if target.interpreted else 70_001  # more than the 65,535 blocks of a grid's second axis
    x = noise(count, 2, 2)
    assert_bits(flat(wavedp.wavedec2(x.to(target.device), 1)), haar(x, 1))
    transposed = x.movedim(0, -1).contiguous().movedim(-1, 0)
    assert_bits(flat(wavedp.wavedec2(transposed.to(target.device), 1)), haar(x, 1))


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(4, 4, dtype=torch.bool),
        torch.zeros(4, 4, dtype=torch.int8),
        torch.zeros(4, 4, dtype=torch.int64),
        torch.zeros(4, 4, dtype=torch.complex64),
        torch.zeros(4, 4, dtype=torch.float8_e4m3fn),
        torch.zeros(4, 4).to_sparse(),
        np.zeros((4, 4), dtype=np.float32),
        [[1.0, 2.0], [3.0, 4.0]],
        None,
    ],
    ids=lambda x: str(getattr(x, "dtype", type(x).__name__)) + str(getattr(x, "layout", "")),
)
def test_what_is_no_image_raises_type_error(x: Any) -> None:
    functions: list[Callable[[], Any]] = [
        lambda: wavedp.dwt2(x),
        lambda: wavedp.wavedec2(x, 2),
        lambda: wavedp.waverec2([x, (None, None, None)]),
        lambda: wavedp.idwt2((x, (x, x, x))),
        lambda: wavedp.wavelet_untokens([x], 1, channels=1),
        lambda: wavedp.coarse(x, 1),
        lambda: wavedp.wavelet_tokens(x, 1, 1),
    ]
    for function in functions:
        with pytest.raises((TypeError, ValueError)) as caught:
            function()
        if x is not None:
            assert issubclass(caught.type, TypeError)


@pytest.mark.parametrize("level", [True, 1.0, "1", None, torch.tensor(1.5)], ids=repr)
def test_levels_that_are_no_integers(level: Any) -> None:
    x = noise(8, 8)
    for function in (wavedp.wavedec2, wavedp.coarse):
        with pytest.raises(TypeError):
            function(x, level)


def test_integers_of_other_libraries() -> None:
    x = noise(8, 8)
    for level in (np.int64(2), torch.tensor(2)):
        assert_bits(flat(wavedp.wavedec2(x, level)), haar(x, 2))


def test_modes_that_do_not_exist() -> None:
    for mode in ("", "Zero", "edge", None, 3):
        for function in (wavedp.dwt2, lambda x, mode: wavedp.wavedec2(x, 2, mode), lambda x, m: wavedp.coarse(x, 2, m)):
            with pytest.raises((ValueError, TypeError)):
                function(noise(8, 8), mode)


def test_output_sizes_that_do_not_fit() -> None:
    coeffs = wavedp.wavedec2(noise(2, 9, 12), 2)
    for size in ((8, 12), (11, 12), (9, 13), (0, 12), (-9, 12), (9,), (9, 12, 1), (9.0, 12.0), "ab", 9):
        with pytest.raises((ValueError, TypeError)):
            wavedp.waverec2(coeffs, output_size=size)
