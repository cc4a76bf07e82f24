# SPDX-License-Identifier: Apache-2.0
"""wavedec2 and waverec2 of wavedp.compat against PyWavelets, and against ptwt where it is installed."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import pywt
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from wavedp.compat import WaveletDetailTuple2d, wavedec2, waverec2

ROOT = Path(__file__).parents[2]
# float64 on normal noise, up to 4 levels: a few roundings of numbers below 80.
EXACT = {"rtol": 0.0, "atol": 2e-13}
THEIR_MODES = ["constant", "zero", "reflect", "periodic", "symmetric"]
# Even; one axis odd; odd at every level; one axis much longer.
SIZES = [(32, 16), (31, 32), (11, 13), (5, 40)]
SIZE_IDS = [f"H{h}-W{w}" for h, w in SIZES]
HAAR = pywt.Wavelet("haar")


def noise(*shape: int, dtype: torch.dtype = torch.float64, device: Any = "cpu") -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(device, dtype)


def flat(coeffs: Any) -> list[Tensor]:
    return [coeffs[0], *(band for details in coeffs[1:] for band in details)]


def assert_same(actual: Any, expected: Any, **tolerances: Any) -> None:
    assert type(actual) is tuple
    assert [len(details) for details in actual[1:]] == [3] * (len(expected) - 1)
    for a, b in zip(flat(actual), flat(expected), strict=True):
        torch.testing.assert_close(a, torch.as_tensor(b), check_device=False, **tolerances)


@pytest.mark.parametrize("size", SIZES, ids=SIZE_IDS)
@pytest.mark.parametrize("level", [0, 1, 2, None])
@pytest.mark.parametrize("mode", pywt.Modes.modes)
def test_coefficients_are_those_of_pywavelets(
    device: torch.device, mode: str, level: int | None, size: tuple[int, int]
) -> None:
    x = noise(2, 3, *size, device=device)
    coeffs = wavedec2(x, "haar", mode=mode, level=level)
    levels = pywt.dwtn_max_level(size, "haar") if level is None else level
    assert_same(coeffs, pywt.wavedec2(x.cpu().numpy(), "haar", mode, levels), **EXACT)
    image = waverec2(coeffs, "haar")
    assert image.shape[-2:] == tuple(side + side % 2 * (levels > 0) for side in size)
    torch.testing.assert_close(image[..., : size[0], : size[1]], x, **EXACT)
    torch.testing.assert_close(waverec2(coeffs, "haar", output_size=size), x, **EXACT)


@pytest.mark.parametrize("size", SIZES, ids=SIZE_IDS)
@pytest.mark.parametrize("mode", THEIR_MODES)
def test_both_ways_as_the_original(ptwt: ModuleType, mode: str, size: tuple[int, int]) -> None:
    x = noise(2, 3, *size)
    for arguments in ({}, {"level": 1}, {"level": 2, "axes": (-1, -2)}, {"level": 0}):
        theirs = ptwt.wavedec2(x, "db1", mode=mode, **arguments)
        ours = wavedec2(x, "db1", mode=mode, **arguments)
        assert_same(ours, theirs, **EXACT)
        axes = arguments.get("axes", (-2, -1))
        expected = ptwt.waverec2(theirs, "db1", axes)
        torch.testing.assert_close(waverec2(theirs, "db1", axes), expected, **EXACT)
        torch.testing.assert_close(ptwt.waverec2(ours, "db1", axes=axes), expected, **EXACT)


def test_the_default_mode_is_reflect() -> None:
    x = noise(7, 9)
    assert_same(wavedec2(x, "haar", level=2), pywt.wavedec2(x.numpy(), "haar", "reflect", 2), **EXACT)


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 9), (2, 2), (2, 3), (3, 3), (8, 8), (15, 16), (16, 17), (31, 31)], ids=str
)
def test_the_default_level(size: tuple[int, int]) -> None:
    assert len(wavedec2(noise(*size), "haar")) - 1 == pywt.dwtn_max_level(size, "haar")


def test_details_have_names() -> None:
    coeffs = wavedec2(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "haar")
    assert coeffs[0].tolist() == [[5.0]]  # (1+2+3+4)/2
    assert type(coeffs[1]) is WaveletDetailTuple2d
    assert coeffs[1].horizontal.tolist() == [[-2.0]]  # (1+2-3-4)/2
    assert coeffs[1].vertical.tolist() == [[-1.0]]  # (1-2+3-4)/2
    assert coeffs[1].diagonal.tolist() == [[0.0]]  # (1-2-3+4)/2


def test_names_are_those_of_the_original(ptwt: ModuleType) -> None:
    assert WaveletDetailTuple2d._fields == ptwt.WaveletDetailTuple2d._fields
    for ours, theirs in ((wavedec2, ptwt.wavedec2), (waverec2, ptwt.waverec2)):
        parameters = [inspect.signature(function).parameters for function in (ours, theirs)]
        for name, parameter in parameters[1].items():
            assert (parameters[0][name].kind, parameters[0][name].default) == (parameter.kind, parameter.default)
        assert set(parameters[0]) - set(parameters[1]) <= {"output_size"}


@pytest.mark.parametrize("axes", [(0, 1), (1, 0), (-3, -1), (2, 0), (1, -1), (-4, 3), (-2, -1), (2, 3)], ids=str)
def test_any_two_axes(axes: tuple[int, int]) -> None:
    x = noise(6, 9, 5, 8)
    coeffs = wavedec2(x, "haar", mode="symmetric", level=2, axes=axes)
    assert_same(coeffs, pywt.wavedec2(x.numpy(), "haar", "symmetric", 2, axes), **EXACT)
    size = tuple(x.shape[axis] for axis in axes)
    torch.testing.assert_close(waverec2(coeffs, "haar", axes, output_size=size), x, **EXACT)


@pytest.mark.parametrize("shape", [(8, 6), (4, 8, 6), (2, 3, 2, 2, 8, 6), (0, 8, 6)], ids=str)
def test_any_leading_axes(shape: tuple[int, ...]) -> None:
    x = noise(*shape)
    coeffs = wavedec2(x, "haar", level=2)
    assert [tuple(band.shape) for band in flat(coeffs)] == [(*shape[:-2], 2, 2)] * 4 + [(*shape[:-2], 4, 3)] * 3
    torch.testing.assert_close(waverec2(coeffs, "haar"), x, **EXACT)


@pytest.mark.parametrize(
    "wavelet", ["Haar", "db1", HAAR, pywt.Wavelet("rbio1.1"), HAAR.filter_bank], ids=lambda w: str(w)[:20]
)
def test_names_of_the_wavelet(wavelet: Any) -> None:
    x = noise(3, 4, 6)
    coeffs = wavedec2(x, wavelet, level=1)
    assert_same(coeffs, pywt.wavedec2(x.numpy(), "haar", level=1), **EXACT)
    torch.testing.assert_close(waverec2(coeffs, wavelet), x, **EXACT)


def test_the_originals_tensor_filters(ptwt: ModuleType) -> None:
    x = noise(3, 4, 6)
    for dtype in (torch.float16, torch.float32, torch.float64):
        filters = ptwt.WaveletTensorTuple.from_wavelet(HAAR, dtype)
        assert_same(wavedec2(x, filters, level=1), pywt.wavedec2(x.numpy(), "haar", level=1), **EXACT)
    with pytest.raises(ValueError, match="not filters that require a gradient: use ptwt itself"):
        wavedec2(x, ptwt.WaveletTensorTuple(*(taps.requires_grad_() for taps in filters)))


@pytest.mark.parametrize("wavelet", ["db2", "unknown", pywt.Wavelet("db2"), HAAR.filter_bank[:2], None], ids=str)
def test_refused_wavelets(wavelet: Any) -> None:
    x = noise(4, 4)
    with pytest.raises(ValueError, match="use ptwt itself"):
        wavedec2(x, wavelet)
    with pytest.raises(ValueError, match="use ptwt itself"):
        waverec2((x,), wavelet)


@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8), (torch.float32, 2**-22)], ids=str
)
def test_half_precision_is_taken(dtype: torch.dtype, relative: float) -> None:
    x = noise(2, 16, 16, dtype=dtype)
    coeffs = wavedec2(x, "haar", level=1)
    expected = pywt.wavedec2(x.double().numpy(), "haar", level=1)
    for band, exact in zip(flat(coeffs), flat(expected), strict=True):
        assert band.dtype == dtype
        torch.testing.assert_close(band.double(), torch.from_numpy(exact), rtol=relative * 1.01, atol=5e-7)
    assert waverec2(coeffs, "haar").dtype == dtype


@pytest.mark.parametrize(
    "data", [torch.zeros(4, 4, dtype=torch.int32), torch.zeros(4, 4, dtype=torch.complex64), [[1.0, 2.0]]], ids=repr
)
def test_refused_data(data: Any) -> None:
    with pytest.raises(ValueError, match="takes a floating-point torch tensor, not"):
        wavedec2(data, "haar")


def test_refused_axes_and_sizes() -> None:
    x = noise(2, 4, 6)
    coeffs = wavedec2(x, "haar")
    for axes, message in (((1,), "two axes, not 1"), ((1, 1), "same axis twice"), ((-1, 2), "same axis twice")):
        with pytest.raises(ValueError, match=message):
            wavedec2(x, "haar", axes=axes)
        with pytest.raises(ValueError, match=message):
            waverec2(coeffs, "haar", axes)
    for axes in ((0, 3), (-4, 1)):
        with pytest.raises(ValueError, match="data that has 3 axes"):
            wavedec2(x, "haar", axes=axes)
    with pytest.raises(ValueError, match="at least two axes"):
        wavedec2(x[0, 0], "haar")
    with pytest.raises(ValueError, match="at least 1 x 1, not 0 x 6"):
        wavedec2(x[:, :0], "haar")
    with pytest.raises(ValueError, match="mode"):
        wavedec2(x, "haar", mode="replicate")
    with pytest.raises(ValueError, match="level"):
        wavedec2(x, "haar", level=-1)


def test_refused_coefficients() -> None:
    coarse, level_2, level_1 = wavedec2(noise(2, 8, 12), "haar", level=2)
    for coeffs in (
        (),
        coarse,
        (None, level_2),
        (level_2, level_1),
        (coarse, level_2[:2], level_1),
        (coarse, level_2[0], level_1),
        (coarse, level_1),  # a level left out
        (coarse, level_1, level_2),
        (coarse[..., :1], level_2, level_1),
        (coarse.float(), level_2, level_1),
    ):
        with pytest.raises(ValueError):
            waverec2(coeffs, "haar")


def test_absent_bands_are_zeros_and_lists_are_taken() -> None:
    coarse, level_2, level_1 = wavedec2(noise(2, 9, 12), "haar", level=2)
    zeros = tuple(torch.zeros_like(band) for band in level_2)
    expected = pywt.waverec2([coarse.numpy(), zeros, level_1], "haar")
    for absent in (None, (None, None, None), [None, zeros[1], None]):
        actual = waverec2([coarse, absent, list(level_1)], "haar")
        torch.testing.assert_close(actual, torch.from_numpy(expected), **EXACT)


@pytest.mark.parametrize("mode", THEIR_MODES)
def test_gradients_of_any_order(device: torch.device, mode: str) -> None:
    x = noise(2, 5, 1, 6, device=device).requires_grad_()
    for check in (gradcheck, gradgradcheck):
        assert check(lambda x: tuple(flat(wavedec2(x, "haar", mode=mode, axes=(1, -1)))), (x,))


def test_gradients_of_the_inverse(device: torch.device) -> None:
    bands = [band.detach().requires_grad_() for band in flat(wavedec2(noise(2, 5, 6, device=device), "haar"))]
    for check in (gradcheck, gradgradcheck):
        assert check(lambda *b: waverec2((b[0], b[1:4], b[4:]), "haar", output_size=(5, 6)), bands)


def test_gradients_as_the_original(ptwt: ModuleType) -> None:
    x = noise(2, 11, 9).requires_grad_()
    for mode in THEIR_MODES:
        grads = []
        for function in (wavedec2, ptwt.wavedec2):
            outputs = flat(function(x, "haar", mode=mode, level=2))
            torch.manual_seed(1)
            grads.append(torch.autograd.grad(outputs, x, [torch.randn_like(band) for band in outputs])[0])
        torch.testing.assert_close(*grads, **EXACT)


@pytest.mark.parametrize("wavelet", ["haar", HAAR], ids=["name", "object"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_without_a_graph_break(dynamic: bool, wavelet: Any) -> None:
    # The original cannot be compiled with fullgraph=True.
    def loss(x: Tensor) -> Tensor:
        coarse, *details = wavedec2(x, wavelet, mode="zero", level=2, axes=(-1, 1))
        fine = details[1]._replace(diagonal=details[1].diagonal * 2)
        return waverec2((coarse, details[0], fine), wavelet, (-1, 1)).square().sum() + details[0].vertical.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((2, 6, 3, 9), (2, 8, 3, 11)):
        x = noise(*shape).requires_grad_()
        (expected,) = torch.autograd.grad(loss(x), x)
        (actual,) = torch.autograd.grad(compiled(x), x)
        torch.testing.assert_close(actual, expected, **EXACT)


def test_under_torch_func() -> None:
    x, tangent = noise(4, 3, 5, 6), noise(4, 3, 5, 6)
    expected = wavedec2(x, "haar")
    assert_same(torch.func.vmap(lambda image: wavedec2(image, "haar"))(x), expected, rtol=0, atol=0)
    back = torch.func.vmap(lambda coeffs: waverec2(coeffs, "haar", output_size=(5, 6)))(expected)
    torch.testing.assert_close(back, x, **EXACT)
    _, moved = torch.func.jvp(lambda image: tuple(flat(wavedec2(image, "haar"))), (x,), (tangent,))
    for a, b in zip(moved, flat(wavedec2(tangent, "haar")), strict=True):  # linear
        torch.testing.assert_close(a, b, **EXACT)


def test_names_load_when_they_are_used_and_without_the_originals() -> None:
    code = f"""
import sys
sys.modules.update(dict.fromkeys(("ptwt", "pytorch_wavelets", "pywt", "pkg_resources")))
sys.path.insert(0, {str(ROOT)!r})
import wavedp.compat
assert not {{"wavedp.compat.ptwt", "wavedp.compat.pytorch_wavelets"}} & set(sys.modules)
for name in ("DWTForward", "DWTInverse", "WaveletDetailTuple2d", "wavedec2", "waverec2"):
    assert name in dir(wavedp.compat)
    assert getattr(wavedp.compat, name).__name__ == name
try:
    wavedp.compat.DTCWTForward
except AttributeError as error:
    assert "'wavedp.compat' has no attribute 'DTCWTForward'" in str(error)
else:
    raise AssertionError("DTCWTForward")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
