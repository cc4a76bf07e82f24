# SPDX-License-Identifier: Apache-2.0
"""wavedec2, waverec2 and coarse against PyWavelets: levels, odd sizes, absent bands, refused arguments."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import pywt
import torch
from torch import Tensor

import wavedp
from wavedp.reference.wavelet import EDGE_OF_MODE

# dtype: (relative, absolute), for N(0, 1) images: LL grows by 2 a level, and with it the error.
TOLERANCES = {torch.float64: (1e-13, 1e-13), torch.float32: (1e-5, 2e-5)}
MODES = list(EDGE_OF_MODE)
SIZES = [(8, 8), (5, 7), (13, 9), (16, 31), (2, 11)]


def flat(coeffs: Any) -> list[Any]:
    return [coeffs[0], *(band for details in coeffs[1:] for band in details)]


def quiet_pywt_wavedec2(x: Tensor, mode: str, level: int) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Level value")
        return pywt.wavedec2(x.numpy(), "haar", mode, level)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_wavedec2_and_waverec2_are_pywavelets(mode: str, dtype: torch.dtype) -> None:
    relative, absolute = TOLERANCES[dtype]
    for size in SIZES:
        for level in (1, 2, 3):
            x = torch.randn(2, 3, *size, dtype=dtype)
            try:
                expected = quiet_pywt_wavedec2(x, mode, level)
            except ValueError:
                assert mode in ("reflect", "antireflect")
                with pytest.raises(ValueError, match="at least 2 samples"):
                    wavedp.wavedec2(x, level, mode)
                continue
            actual = wavedp.wavedec2(x, level, mode)
            assert len(actual) == level + 1
            for one, other in zip(flat(actual), flat(expected), strict=True):
                torch.testing.assert_close(one, torch.from_numpy(other), rtol=relative, atol=absolute)
            rebuilt = torch.from_numpy(pywt.waverec2(expected, "haar", mode))
            torch.testing.assert_close(wavedp.waverec2(actual), rebuilt, rtol=relative, atol=absolute)
            back = wavedp.waverec2(actual, output_size=size)
            torch.testing.assert_close(back, x, rtol=relative, atol=4 * absolute)
            assert torch.equal(wavedp.coarse(x, level, mode), actual[0])


@pytest.mark.parametrize(("size", "level"), [((3, 2), 5), ((3, 2), 10), ((5, 700), 9), ((1, 300), 17)], ids=str)
def test_more_levels_than_the_image_has_or_one_call_takes(size: tuple[int, int], level: int) -> None:
    """PyWavelets warns and goes on: an axis of one sample is completed by the mode again and again."""
    x = torch.randn(*size, dtype=torch.float64)
    for mode in ("symmetric", "zero", "periodic", "antisymmetric", "smooth"):
        expected = quiet_pywt_wavedec2(x, mode, level)
        actual: Any = wavedp.wavedec2(x, level, mode)
        for one, other in zip(flat(actual), flat(expected), strict=True):
            torch.testing.assert_close(one, torch.from_numpy(other))
        assert torch.equal(wavedp.coarse(x, level, mode), actual[0])
        absent = [*actual[:2], *[(None, None, None)] * (level - 1)]
        filled = [*actual[:2], *(tuple(map(torch.zeros_like, details)) for details in actual[2:])]
        rebuilt = wavedp.waverec2(filled, output_size=size)
        assert torch.equal(wavedp.waverec2(absent, output_size=size), rebuilt)
        back = torch.from_numpy(pywt.waverec2(expected, "haar"))[: size[0], : size[1]]
        torch.testing.assert_close(wavedp.waverec2(actual, output_size=size), back)


def test_coarse_has_the_bits_of_the_transform(target: Any) -> None:
    """Widths of vectors of every size with cells left over, whole blocks and rows below them, any strides."""
    sizes = [(8, 8), (16, 24), (24, 264), (64, 136), (40, 520), (33, 64), (12, 72), (17, 40)]
    for height, width in sizes[:1] if target.interpreted else sizes:
        for dtype in TOLERANCES:
            wide = torch.randn(2, 3, 2 * height, width + 5, dtype=dtype, device=target.device)
            images = [
                wide[:, :, :height, :width].contiguous(),
                wide[:, :, ::2, 3 : 3 + width],
                wide[:, :1, :1, :width].expand(2, 3, height, width),
                wide[:, :, :height, :width].contiguous(memory_format=torch.channels_last),
            ]
            for x in images:
                for level in range(1, 6):
                    low = wavedp.wavedec2(x, level)[0]
                    assert torch.equal(wavedp.coarse(x, level), low), (height, width, level, x.stride())


def test_level_zero_is_the_image() -> None:
    x = torch.randn(4, 5)
    (only,) = wavedp.wavedec2(x, 0)
    assert torch.equal(only, x)
    assert torch.equal(wavedp.coarse(x, 0), x)
    assert torch.equal(wavedp.waverec2([x]), x)
    assert torch.equal(wavedp.waverec2([x], output_size=(4, 5)), x)


def test_coarse_is_the_scaled_block_mean() -> None:
    x = torch.rand(2, 3, 16, 24, dtype=torch.float64)
    for level in (1, 2, 3):
        mean = torch.nn.functional.avg_pool2d(x, 2**level)
        torch.testing.assert_close(wavedp.coarse(x, level), 2**level * mean)


def test_the_transform_is_orthonormal() -> None:
    x = torch.randn(16, 24, dtype=torch.float64)
    energy = sum(band.square().sum() for band in flat(wavedp.wavedec2(x, 3)))
    torch.testing.assert_close(energy, x.square().sum())


def test_absent_details_are_zeros() -> None:
    for size in ((8, 8), (13, 9)):
        coeffs: Any = wavedp.wavedec2(torch.randn(2, *size), 3)
        zeros = [coeffs[0], *(tuple(torch.zeros_like(band) for band in level) for level in coeffs[1:])]
        absent = [coeffs[0], *((None, None, None) for _ in coeffs[1:])]
        back = wavedp.waverec2(absent, output_size=size)
        assert torch.equal(back, wavedp.waverec2(zeros, output_size=size))
        some = [coeffs[0], coeffs[1], (None, None, None), (None, coeffs[3][1], None)]
        filled = [coeffs[0], coeffs[1], zeros[2], (zeros[3][0], coeffs[3][1], zeros[3][2])]
        assert torch.equal(wavedp.waverec2(some, output_size=size), wavedp.waverec2(filled, output_size=size))


def test_absent_details_without_a_size_double_the_approximation() -> None:
    x = torch.randn(3, 5)
    back = wavedp.waverec2([x, (None, None, None), (None, None, None)])
    torch.testing.assert_close(back, x.repeat_interleave(4, -1).repeat_interleave(4, -2) / 4)


def test_an_approximation_of_one_row_too_many_is_cut() -> None:
    details = tuple(torch.randn(3, 4, 5, dtype=torch.float64))
    approximation = torch.randn(5, 6, dtype=torch.float64)
    expected = pywt.waverec2([approximation.numpy(), tuple(band.numpy() for band in details)], "haar")
    torch.testing.assert_close(wavedp.waverec2([approximation, details]), torch.from_numpy(expected))
    with pytest.raises(ValueError, match=r"must agree in shape.*\(6, 5\).*\(4, 5\)"):
        wavedp.waverec2([torch.randn(6, 6, dtype=torch.float64), details])


IMAGE = torch.ones(8, 8)
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a negative level": (lambda: wavedp.wavedec2(IMAGE, -1), ValueError, "at least 0, not -1"),
    "a real level": (lambda: wavedp.coarse(IMAGE, 1.0), TypeError, "coarse takes an integer level, not 1.0"),
    "a truth value": (lambda: wavedp.wavedec2(IMAGE, True), TypeError, "not True"),
    "integers": (lambda: wavedp.wavedec2(IMAGE.int(), 2), TypeError, "not torch.int32"),
    "no tensor": (lambda: wavedp.coarse([[1.0]], 1), TypeError, "coarse takes torch tensors, not a list of 1"),
    "a mode": (lambda: wavedp.coarse(IMAGE, 1, "per"), ValueError, "unknown mode 'per'"),
    "a tensor of coefficients": (lambda: wavedp.waverec2(IMAGE), ValueError, "not a Tensor"),
    "no coefficients": (lambda: wavedp.waverec2([]), ValueError, "not a list of 0"),
    "two bands": (lambda: wavedp.waverec2([IMAGE, (IMAGE, IMAGE)]), ValueError, "not a tuple of 2"),
    "no approximation": (lambda: wavedp.waverec2([None, (IMAGE,) * 3]), TypeError, "not a NoneType"),
    "a size of another image": (
        lambda: wavedp.waverec2(wavedp.wavedec2(IMAGE, 2), output_size=(8, 12)),
        ValueError,
        "image of 4 x 6 has bands of 2 x 3, but these are 2 x 2",
    ),
    "a size without levels": (lambda: wavedp.waverec2([IMAGE], output_size=(7, 8)), ValueError, r"\(8, 8\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()


def test_a_size_of_floats_is_refused_and_spoils_nothing() -> None:
    coeffs = wavedp.wavedec2(torch.randn(9, 11), 1)
    with pytest.raises(TypeError, match="waverec2 takes integers in output_size"):
        wavedp.waverec2(coeffs, output_size=(9.0, 11.0))
    assert wavedp.waverec2(coeffs, output_size=(9, 11)).shape == (9, 11)


@pytest.mark.parametrize("function", [wavedp.wavedec2, wavedp.coarse])
def test_no_level_is_checked_as_any(function: Any) -> None:
    with pytest.raises(ValueError, match="takes images"):
        function(torch.randn(3), 0)
    with pytest.raises(ValueError, match="unknown mode"):
        function(torch.randn(3, 3), 0, "nonsense")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once_at_any_depth(dtype: torch.dtype) -> None:
    x = torch.randn(520, 530).to(dtype)
    coeffs = wavedp.wavedec2(x, 10)
    assert coeffs[0].dtype == dtype
    wide = wavedp.wavedec2(x.float(), 10)
    assert torch.equal(coeffs[0], wide[0].to(dtype))
    assert torch.equal(wavedp.coarse(x, 10), coeffs[0])
    assert torch.ops.wavedp.coarse(x, 10, "symmetric", 0.5, 1.0, 0.0, None).dtype == dtype
    back = wavedp.waverec2(coeffs, output_size=(520, 530))
    exact = wavedp.waverec2(
        [coeffs[0].float(), *[tuple(band.float() for band in level) for level in coeffs[1:]]], output_size=(520, 530)
    )
    assert torch.equal(back, exact.to(dtype))
