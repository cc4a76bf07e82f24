# SPDX-License-Identifier: Apache-2.0
"""DWTForward and DWTInverse against PyWavelets, and against pytorch_wavelets where it is installed."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import pywt
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import wavedp
from wavedp.compat import DWTForward, DWTInverse
from wavedp.compat import pytorch_wavelets as compat

# float64 on normal noise, 1 to 3 levels: a few roundings of numbers below 40.
EXACT = {"rtol": 0.0, "atol": 1e-13}
# float32, the original's precision: it multiplies by a rounded 1/sqrt(2) twice a level.
FLOAT32 = {"rtol": 0.0, "atol": 5e-6}
# Even; one axis odd; odd at every level; short enough to come down to one sample.
SIZES = [(16, 8), (7, 12), (11, 13), (2, 3)]
THEIR_MODES = ["zero", "symmetric", "reflect", "periodic", "periodization", "per"]
HAAR = pywt.Wavelet("haar")
SIZE_IDS = [f"H{h}-W{w}" for h, w in SIZES]


def noise(*shape: int, dtype: torch.dtype = torch.float64, device: Any = "cpu") -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(device, dtype)


def of_pywavelets(x: Tensor, levels: int, mode: str) -> tuple[Tensor, list[Tensor]]:
    """(Yl, Yh) put together from one-level calls of PyWavelets."""
    yl, yh = x.cpu().double().numpy(), []
    for _ in range(levels):
        yl, details = pywt.dwt2(yl, "haar", {"per": "periodization"}.get(mode, mode))
        yh.append(torch.from_numpy(np.stack(details, axis=-3)))
    return torch.from_numpy(yl), yh


def flat(coeffs: tuple[Tensor, list[Tensor]]) -> tuple[Tensor, ...]:
    return (coeffs[0], *coeffs[1])


def assert_same(actual: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]], **tolerances: Any) -> None:
    assert isinstance(actual[1], list)
    assert len(actual[1]) == len(expected[1])
    for a, b in zip(flat(actual), flat(expected)):
        torch.testing.assert_close(a, b, check_device=False, **tolerances)


def test_a_block_by_hand() -> None:
    yl, yh = DWTForward()(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))
    assert yl.tolist() == [[[[5.0]]]]  # (1+2+3+4)/2
    assert yh[0].tolist() == [[[[[-2.0]], [[-1.0]], [[0.0]]]]]  # (1+2-3-4)/2, (1-2+3-4)/2, (1-2-3+4)/2
    assert DWTInverse()((yl, yh)).tolist() == [[[[1.0, 2.0], [3.0, 4.0]]]]


@pytest.mark.parametrize("size", SIZES, ids=SIZE_IDS)
@pytest.mark.parametrize("mode", compat.MODES)
def test_coefficients_are_those_of_pywavelets(device: torch.device, mode: str, size: tuple[int, int]) -> None:
    for levels in (1, 2, 3):
        smallest = min(-(-side // 2 ** (levels - 1)) for side in size)
        if mode in ("reflect", "antireflect") and smallest == 1:
            continue  # refused by both: test_refused_images
        x = noise(2, 3, *size, device=device)
        yl, yh = DWTForward(J=levels, wave="haar", mode=mode)(x)
        assert_same((yl, yh), of_pywavelets(x, levels, mode), **EXACT)
        assert {band.device for band in (yl, *yh)} == {x.device}
        image = DWTInverse(wave="haar", mode=mode)((yl, yh))
        assert image.shape[-2:] == tuple(side + side % 2 for side in size)
        torch.testing.assert_close(image[..., : size[0], : size[1]], x, **EXACT)
        torch.testing.assert_close(DWTInverse()((yl, yh), output_size=size), x, **EXACT)


@pytest.mark.parametrize("size", SIZES, ids=SIZE_IDS)
@pytest.mark.parametrize("mode", THEIR_MODES)
def test_both_ways_as_the_original(pytorch_wavelets: ModuleType, mode: str, size: tuple[int, int]) -> None:
    levels = 1 if size == (2, 3) else 3
    x = noise(2, 3, *size, dtype=torch.float32)
    theirs = pytorch_wavelets.DWTForward(J=levels, wave="db1", mode=mode)(x)
    assert_same(DWTForward(J=levels, wave="db1", mode=mode)(x), theirs, **FLOAT32)
    yl, yh = theirs
    for given in (yh, [None, *yh[1:]], [*yh[:-1], None], [None] * levels, []):
        expected = pytorch_wavelets.DWTInverse(mode=mode)((yl, given))
        torch.testing.assert_close(DWTInverse(mode=mode)((yl, given)), expected, **FLOAT32)


def test_the_default_mode_is_zero() -> None:
    x = noise(2, 3, 5, 7)
    assert_same(DWTForward(J=2)(x), of_pywavelets(x, 2, "zero"), **EXACT)


def test_arguments_are_those_of_the_original(pytorch_wavelets: ModuleType) -> None:
    for ours, theirs in ((DWTForward, pytorch_wavelets.DWTForward), (DWTInverse, pytorch_wavelets.DWTInverse)):
        parameters = [
            [(parameter.name, parameter.kind, parameter.default) for parameter in signature.parameters.values()]
            for signature in map(inspect.signature, (ours, theirs))
        ]
        assert parameters[0] == parameters[1]


def test_absent_levels_are_levels_of_zeros() -> None:
    x = noise(2, 3, 9, 11)
    yl, yh = DWTForward(J=2)(x)
    zeros = [torch.zeros_like(level) for level in yh]
    for absent in ((0,), (1,), (0, 1)):
        given = [None if j in absent else level for j, level in enumerate(yh)]
        filled = [zeros[j] if j in absent else level for j, level in enumerate(yh)]
        expected = pywt.waverec2([yl.numpy(), *(tuple(h.unbind(-3)) for h in reversed(filled))], "haar")
        actual = DWTInverse()((yl, given), output_size=(9, 11))
        torch.testing.assert_close(actual, torch.from_numpy(expected)[..., :9, :11], **EXACT)


def test_no_level_is_the_image() -> None:
    x = noise(2, 3, 5, 5)
    yl, yh = DWTForward(J=0)(x)
    assert yh == []
    torch.testing.assert_close(yl, x, rtol=0, atol=0)
    torch.testing.assert_close(DWTInverse()((yl, yh)), x, rtol=0, atol=0)


def test_any_leading_axes_and_an_empty_batch() -> None:
    x = noise(2, 3, 4, 9, 6)
    yl, yh = DWTForward(J=2, mode="symmetric")(x)
    assert [tuple(level.shape) for level in (yl, *yh)] == [(2, 3, 4, 3, 2), (2, 3, 4, 3, 5, 3), (2, 3, 4, 3, 3, 2)]
    one_yl, one_yh = DWTForward(J=2, mode="symmetric")(x[1, 2, 3])
    torch.testing.assert_close(yl[1, 2, 3], one_yl, rtol=0, atol=0)
    torch.testing.assert_close(yh[0][1, 2, 3], one_yh[0], rtol=0, atol=0)
    yl, yh = DWTForward(J=2)(x[:0, 0])
    assert [tuple(level.shape) for level in (yl, *yh)] == [(0, 4, 3, 2), (0, 4, 3, 5, 3), (0, 4, 3, 3, 2)]
    assert DWTInverse()((yl, yh), output_size=(9, 6)).shape == (0, 4, 9, 6)


@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8), (torch.float64, 2**-52)], ids=str
)
def test_the_dtype_is_that_of_the_input(dtype: torch.dtype, relative: float) -> None:
    x = noise(2, 3, 16, 8, dtype=dtype)
    yl, yh = DWTForward(J=1)(x)
    expected_yl, expected_yh = of_pywavelets(x, 1, "zero")
    for band, expected in ((yl, expected_yl), (yh[0], expected_yh[0])):
        assert band.dtype == dtype
        # One rounding of the result; the float64 arithmetic of both has a few more of its own.
        torch.testing.assert_close(band.double(), expected, rtol=relative * 1.01, atol=2e-15 + 1e-7 * (relative > 1e-9))
    assert DWTInverse()((yl, yh)).dtype == dtype


def test_the_results_can_be_viewed_and_edited_in_place() -> None:
    x = noise(2, 3, 8, 8).requires_grad_()
    yl, yh = DWTForward(J=2)(x)
    assert all(level.is_contiguous() for level in (yl, *yh))
    assert yh[0].view(2, 9, 4, 4).shape == (2, 9, 4, 4)
    yh[0][:, :, 2] = 0  # denoising by hand, as users of the original do
    yh[1].mul_(2)
    yl.zero_()
    (yl.sum() + yh[0].sum() + yh[1].sum()).backward()
    assert x.grad is not None
    # The gradient of the sum of all details of level 1 but HH, plus twice those of level 2.
    fine, coarse = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([2.0, 2.0, 2.0])
    ones = torch.ones(2, 3, 1, 1, 1, dtype=torch.float64)
    details = [(weights[:, None, None] * ones).expand(2, 3, 3, s, s) for weights, s in ((fine, 4), (coarse, 2))]
    torch.testing.assert_close(x.grad, DWTInverse()((torch.zeros(2, 3, 2, 2, dtype=torch.float64), details)), **EXACT)


def test_channels_last_and_strided_images() -> None:
    x = noise(2, 3, 9, 7)
    expected = DWTForward(J=2, mode="reflect")(x)
    for strided in (x.to(memory_format=torch.channels_last), torch.cat([x, x], -1)[..., :7], x.mT.contiguous().mT):
        assert_same(DWTForward(J=2, mode="reflect")(strided), expected, rtol=0, atol=0)


@pytest.mark.parametrize("wave", [HAAR, pywt.Wavelet("bior1.1"), "HAAR", (HAAR.dec_lo, HAAR.dec_hi)], ids=repr)
def test_names_of_the_wavelet(wave: Any) -> None:
    x = noise(1, 1, 4, 4)
    assert_same(DWTForward(wave=wave)(x), of_pywavelets(x, 1, "zero"), **EXACT)


def test_filters_of_the_wavelet(pytorch_wavelets: ModuleType) -> None:
    dec = tuple(np.array(taps) for taps in (HAAR.dec_lo, HAAR.dec_hi))
    rec = tuple(np.array(taps) for taps in (HAAR.rec_lo, HAAR.rec_hi))
    x = noise(1, 1, 4, 4, dtype=torch.float32)
    for times in (1, 2):
        theirs = pytorch_wavelets.DWTForward(wave=dec * times)(x)
        assert_same(DWTForward(wave=dec * times)(x), theirs, **FLOAT32)
        torch.testing.assert_close(DWTInverse(wave=rec * times)(theirs), x, **FLOAT32)


@pytest.mark.parametrize(
    "wave", ["db2", "nonsense", pywt.Wavelet("db2"), (HAAR.rec_lo, HAAR.rec_hi), (HAAR.dec_lo,), 3], ids=repr
)
def test_refused_wavelets(wave: Any) -> None:
    with pytest.raises(ValueError, match="use pytorch_wavelets itself"):
        DWTForward(wave=wave)


def test_refused_modes_and_levels() -> None:
    for module in (DWTForward, DWTInverse):
        with pytest.raises(ValueError, match=r"unknown mode 'replicate'; choose from zero, "):
            module(mode="replicate")
    with pytest.raises(ValueError, match="level of at least 0"):
        DWTForward(J=-1)(noise(1, 1, 4, 4))


def test_refused_images() -> None:
    with pytest.raises(ValueError, match="reflect"):
        DWTForward(J=2, mode="reflect")(noise(1, 1, 2, 8))
    with pytest.raises(TypeError):
        DWTForward()(torch.zeros(1, 1, 4, 4, dtype=torch.int64))


def test_refused_coefficients() -> None:
    yl, yh = DWTForward(J=2)(noise(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"a pair \(Yl, Yh\)"):
        DWTInverse()((yl, *yh))
    with pytest.raises(ValueError, match=r"a pair \(Yl, Yh\)"):
        DWTInverse()((yl, yh[0]))
    with pytest.raises(ValueError, match=r"Yh\[1\] is \[N, C, 3, h, w\].*not \[2, 3, 2, 2, 2\]"):
        DWTInverse()((yl, [yh[0], yh[1][:, :, :2]]))
    with pytest.raises(ValueError):
        DWTInverse()((yl, [yh[1], yh[0]]))  # coarsest first, PyWavelets' order
    with pytest.raises(ValueError):
        DWTInverse()((yl, yh), output_size=(6, 8))


def test_checkpoints_go_both_ways(pytorch_wavelets: ModuleType) -> None:
    for ours, theirs in (
        (DWTForward(J=2), pytorch_wavelets.DWTForward(J=2)),
        (DWTInverse(), pytorch_wavelets.DWTInverse()),
    ):
        kept = theirs.state_dict()
        assert list(ours.state_dict()) == list(kept)
        for name, buffer in ours.state_dict().items():
            torch.testing.assert_close(buffer, kept[name], rtol=0, atol=0)
        assert str(ours.load_state_dict(kept)) == "<All keys matched successfully>"
        assert str(theirs.load_state_dict(ours.state_dict())) == "<All keys matched successfully>"


def test_the_checkpoint_of_a_model() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), DWTForward(), torch.nn.Identity())
    model.half()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert [name for name in kept if name.startswith("1.")] == ["1.h0_col", "1.h1_col", "1.h0_row", "1.h1_row"]
    assert kept["1.h1_row"].shape == (1, 1, 1, 2)
    # dec_hi, (-1, 1) / sqrt(2), reversed as convolution takes it; half precision rounds it by 7.6e-5.
    filter_of_rows = kept["1.h1_row"].flatten().tolist()
    assert filter_of_rows == pytest.approx([2**-0.5, -(2**-0.5)], abs=1e-4)
    model.load_state_dict(kept)
    db2 = {**kept, "1.h0_col": torch.tensor(pywt.Wavelet("db2").dec_lo).reshape(1, 1, 4, 1)}
    with pytest.raises(RuntimeError, match=r"1\.h0_col is the filter of another wavelet"):
        model.load_state_dict(db2)
    with pytest.raises(RuntimeError, match=r"1\.h1_row is the filter of another wavelet"):
        model.load_state_dict({**kept, "1.h1_row": -kept["1.h1_row"]})


@pytest.mark.parametrize("mode", compat.MODES)
def test_gradients_of_any_order(mode: str) -> None:
    x = noise(1, 2, 5, 6).requires_grad_()
    forward, inverse = DWTForward(J=2, mode=mode), DWTInverse(mode=mode)
    for check in (gradcheck, gradgradcheck):
        assert check(lambda x: flat(forward(x)), (x,))
    coeffs = [band.detach().requires_grad_() for band in flat(forward(x))]
    for check in (gradcheck, gradgradcheck):
        assert check(lambda yl, *yh: inverse((yl, list(yh))), coeffs)
        assert check(lambda yl, fine: inverse((yl, [fine, None]), output_size=(5, 6)), coeffs[:2])


def test_gradients_as_the_original_where_it_has_the_true_one(pytorch_wavelets: ModuleType) -> None:
    # On odd sizes the original drops the gradient of the virtual sample, which is right in the mode "zero" alone.
    for mode, size in (("zero", (7, 9)), ("symmetric", (8, 12)), ("periodization", (8, 12))):
        x = noise(2, 3, *size, dtype=torch.float32).requires_grad_()
        grads = []
        for module in (DWTForward(J=2, mode=mode), pytorch_wavelets.DWTForward(J=2, mode=mode)):
            yl, yh = module(x)
            torch.manual_seed(1)
            outputs = [yl, *yh]
            grads.append(torch.autograd.grad(outputs, x, [torch.randn_like(band) for band in outputs])[0])
        torch.testing.assert_close(*grads, **FLOAT32)


def test_backward_under_autocast() -> None:
    # The original fails here: the gradient of a half-precision result meets float32 filters.
    x = noise(1, 2, 8, 8, dtype=torch.float32).requires_grad_()
    weight = noise(2, 2, 1, 1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yl, yh = DWTForward(J=2)(torch.nn.functional.conv2d(x, weight))
        assert {band.dtype for band in (yl, *yh)} == {torch.bfloat16}
        image = DWTInverse()((yl, yh))
    image.float().square().sum().backward()
    mixed = weight[:, :, 0, 0]
    expected = 2 * torch.einsum("oc,od,ndhw->nchw", mixed, mixed, x.detach())  # the transform is orthonormal
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=0.15)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_without_a_graph_break(dynamic: bool) -> None:
    forward, inverse = DWTForward(J=2, mode="reflect"), DWTInverse()

    def loss(x: Tensor) -> Tensor:
        yl, yh = forward(x)
        return inverse((yl, [yh[0], None]), output_size=x.shape[-2:]).square().sum() + yl.sum() + yh[1].cos().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in ((6, 9), (8, 11)):
        x, y = (tensor.requires_grad_() for tensor in (noise(2, 3, *size), noise(2, 3, *size)))
        with torch.no_grad():
            y.copy_(x)
        loss(x).backward()
        value = compiled(y)
        value.backward()
        torch.testing.assert_close(value, loss(x))
        torch.testing.assert_close(y.grad, x.grad, **EXACT)


def test_under_torch_func() -> None:
    forward, inverse = DWTForward(J=2, mode="periodic"), DWTInverse()
    x, tangent = noise(4, 3, 5, 6), noise(4, 3, 5, 6)
    expected = forward(x)
    assert_same(torch.func.vmap(forward)(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.func.vmap(lambda yl, yh: inverse((yl, yh)))(*expected), inverse(expected), **EXACT)
    _, moved = torch.func.jvp(forward, (x,), (tangent,))
    assert_same(moved, forward(tangent), **EXACT)  # linear
    grads = torch.func.vmap(torch.func.grad(lambda image: inverse(forward(image), (5, 6)).square().sum()))(x)
    torch.testing.assert_close(grads, 2 * x, rtol=0, atol=1e-12)


def test_exported() -> None:
    x = noise(2, 3, 7, 8)
    forward = DWTForward(J=2, mode="symmetric")
    program = torch.export.export(forward, (x,)).module()
    assert_same(program(x), forward(x), rtol=0, atol=0)


def test_short_names_and_the_text_of_a_module() -> None:
    assert compat.DWT is compat.DWT2D is DWTForward
    assert compat.IDWT is compat.IDWT2D is DWTInverse
    assert str(DWTForward(J=3, mode="per")) == "DWTForward(J=3, mode='per')"
    assert str(DWTInverse(mode="reflect")) == "DWTInverse(mode='reflect')"


def test_modes_are_those_of_wavedp() -> None:
    x = noise(3, 3)
    for mode in compat.MODES:
        if mode != "per":
            torch.testing.assert_close(DWTForward(mode=mode)(x)[0], wavedp.dwt2(x, mode)[0], rtol=0, atol=0)
    assert set(compat.MODES) >= set(pywt.Modes.modes)
