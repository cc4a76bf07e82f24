# SPDX-License-Identifier: Apache-2.0
"""Gradients of any order, torch.compile, torch.func, autocast, and torch.library's own checks of the ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import wavedp
from wavedp.ops import use_backend, wavelet_native
from wavedp.reference.wavelet import EDGE_OF_MODE, Edge, dwt2_forward

TOLERANCES = {"rtol": 1e-13, "atol": 1e-13}  # float64, gradients of size 1 to 100
MODE_OF_EDGE = {edge: mode for mode, edge in reversed(EDGE_OF_MODE.items())}  # smooth, not antireflect
EDGES = [pytest.param(edge, id=edge.name) for edge in Edge]
ops = torch.ops.wavedp


def noise(*shape: int, device: str = "cpu", requires_grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(device).requires_grad_(requires_grad)


def check_gradients(target: Any, function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """First and second derivatives; of the slow interpreter the first, along random directions."""
    for check in (gradcheck,) if target.interpreted else (gradcheck, gradgradcheck):
        assert check(function, inputs, fast_mode=target.interpreted)


@pytest.mark.parametrize("size", [(3, 5), (2, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("edge", EDGES)
def test_gradients_of_any_order(target: Any, edge: Edge, size: tuple[int, int]) -> None:
    mode, (height, width) = MODE_OF_EDGE[edge], size
    if edge == Edge.REFLECT:
        height, width = max(height, 2), max(width, 2)
    x = noise(2, height, width, device=target.device, requires_grad=True)
    bands = noise(4, 2, (height + 1) // 2, (width + 1) // 2, device=target.device, requires_grad=True)
    check_gradients(target, lambda x: ops.dwt2(x, mode), x)
    check_gradients(target, lambda bands: ops.dwt2_backward(bands, mode, height, width), bands)


@pytest.mark.parametrize("size", [(4, 4), (3, 4), (3, 3)], ids=str)
def test_gradients_of_the_inverse(target: Any, size: tuple[int, int]) -> None:
    bands = [noise(2, 2, device=target.device, requires_grad=True) for _ in range(4)]
    check_gradients(target, lambda *bands: ops.idwt2(*bands, *size), *bands)
    check_gradients(target, lambda lh, hh: ops.idwt2(None, lh, None, hh, *size), *bands[:2])


@pytest.mark.parametrize("mode", EDGE_OF_MODE)
def test_the_gradient_is_that_of_the_definition(target: Any, mode: str) -> None:
    for size in ((17, 31), (6, 9), (4, 6)):
        x = noise(3, *size, device=target.device, requires_grad=True)
        weights = noise(4, 3, (size[0] + 1) // 2, (size[1] + 1) // 2, device=target.device)
        (expected,) = torch.autograd.grad(dwt2_forward(x, EDGE_OF_MODE[mode]), x, weights)
        (actual,) = torch.autograd.grad(ops.dwt2(x, mode), x, weights)
        torch.testing.assert_close(actual, expected, **TOLERANCES)
        inner = (ops.dwt2(x, mode) * weights).sum()
        torch.testing.assert_close(inner, (x * actual).sum(), rtol=1e-11, atol=1e-11)


def test_an_expanded_gradient(target: Any) -> None:
    for size in ((4, 6), (5, 7)):
        x = noise(2, *size, device=target.device, requires_grad=True)
        approximation, details = wavedp.dwt2(x)
        approximation.sum().backward()
        expected = torch.full_like(x, 0.5)
        if size == (5, 7):  # the last row and column stand for their virtual neighbours too
            expected[..., -1, :] *= 2
            expected[..., -1] *= 2
        torch.testing.assert_close(x.grad, expected)
        bands = [band.detach().requires_grad_() for band in (approximation, *details)]
        wavedp.idwt2((bands[0], bands[1:]), output_size=size).sum().backward()
        with use_backend("reference"):
            expected_bands = dwt2_forward(torch.ones_like(x), Edge.ZERO)
        for band, one in zip(bands, expected_bands):
            torch.testing.assert_close(band.grad, one)


def test_nothing_is_saved_for_backward() -> None:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: pytest.fail("nothing to unpack")):
        x = torch.randn(5, 7, requires_grad=True)
        wavedp.waverec2(wavedp.wavedec2(x, 2), output_size=(5, 7)).sum().backward()
    assert saved == []
    torch.testing.assert_close(x.grad, torch.ones(5, 7))


def test_a_gradient_is_computed_by_the_backend_of_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 7, requires_grad=True)
    with use_backend("reference"):
        bands = ops.dwt2(x, "smooth")
        image = ops.idwt2(*bands, 5, 7)

    def refused(*arguments: Any) -> Tensor:
        raise AssertionError("the native library was used")

    monkeypatch.setattr(wavelet_native, "dwt2_forward", refused)
    monkeypatch.setattr(wavelet_native, "idwt2_forward", refused)
    image.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(5, 7))


OPCHECK: dict[str, Callable[[str], tuple[Any, tuple[Any, ...]]]] = {
    "dwt2": lambda device: (ops.dwt2.default, (noise(2, 5, 7, device=device, requires_grad=True), "smooth")),
    "idwt2": lambda device: (
        ops.idwt2.default,
        (*(noise(2, 3, 4, device=device, requires_grad=True) for _ in range(4)), 5, 7),
    ),
    "idwt2 with absent bands": lambda device: (
        ops.idwt2.default,
        (None, noise(3, 4, device=device, requires_grad=True), None, noise(3, 4, device=device), 6, 7),
    ),
    "dwt2_backward": lambda device: (
        ops.dwt2_backward.default,
        (noise(4, 2, 3, 4, device=device, requires_grad=True), "periodic", 5, 7),
    ),
    "dwt2 of no image": lambda device: (ops.dwt2.default, (noise(0, 5, 7, device=device), "zero")),
}


@pytest.mark.parametrize("case", OPCHECK)
def test_opcheck(case: str, device: torch.device) -> None:
    torch.library.opcheck(*OPCHECK[case](device.type))


def round_trip_of_scaled(x: Tensor) -> Tensor:
    """Three levels there and back, with a nonlinearity between, so that its gradient depends on every band."""
    coeffs: Any = wavedp.wavedec2(x, 3, "antisymmetric")
    scaled = [coeffs[0].sin(), *(tuple(band.tanh() for band in level) for level in coeffs[1:])]
    return wavedp.waverec2(scaled, output_size=x.shape[-2:])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_whole_forward_and_backward(dynamic: bool, device: torch.device) -> None:
    torch.compiler.reset()
    compiled = torch.compile(round_trip_of_scaled, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in ((13, 18), (9, 7)):
        x = noise(2, *size, device=device.type, requires_grad=True)
        y, expected = compiled(x), round_trip_of_scaled(x)
        torch.testing.assert_close(y, expected, **TOLERANCES)
        weights = torch.randn_like(y)
        gradients = [torch.autograd.grad(out, x, weights)[0] for out in (y, expected)]
        torch.testing.assert_close(*gradients, **TOLERANCES)


def test_torch_func_transforms() -> None:
    images = noise(4, 5, 7)

    def loss(x: Tensor) -> Tensor:
        return round_trip_of_scaled(x).square().sum()

    one_by_one = torch.stack([torch.func.grad(loss)(image) for image in images])
    expected = torch.stack([torch.autograd.functional.jacobian(loss, image) for image in images])
    torch.testing.assert_close(one_by_one, expected, **TOLERANCES)
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(images), expected, **TOLERANCES)

    tangent = torch.randn_like(images[0])
    _, derivative = torch.func.jvp(loss, (images[0],), (tangent,))
    torch.testing.assert_close(derivative, (expected[0] * tangent).sum(), **TOLERANCES)
    hessian = torch.func.jacfwd(torch.func.jacrev(loss))(images[0][:3, :2])
    expected_hessian = torch.autograd.functional.hessian(loss, images[0][:3, :2])
    torch.testing.assert_close(hessian, expected_hessian, **TOLERANCES)


def test_forward_mode_derivatives_without_a_transform() -> None:
    x, tangent = noise(5, 7), noise(5, 7)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        approximation, details = wavedp.dwt2(dual, "smooth")
        back = wavedp.idwt2((approximation, (None, *details[1:])), output_size=(5, 7))
        derivative = torch.autograd.forward_ad.unpack_dual(back).tangent
    approximation, details = wavedp.dwt2(tangent, "smooth")
    expected = wavedp.idwt2((approximation, (None, *details[1:])), output_size=(5, 7))
    torch.testing.assert_close(derivative, expected, **TOLERANCES)


@pytest.mark.parametrize("in_dim", [0, 1, -1])
def test_vmap_over_any_axis(in_dim: int) -> None:
    images = noise(4, 5, 6)
    actual = torch.vmap(lambda x: wavedp.dwt2(x, "smooth"))(images)
    moved = torch.vmap(lambda x: wavedp.dwt2(x, "smooth"), in_dims=in_dim)(images.movedim(0, in_dim))
    torch.testing.assert_close(moved, actual)
    torch.testing.assert_close(actual, wavedp.dwt2(images, "smooth"))


def test_vmap_of_the_inverse_with_a_shared_and_absent_bands() -> None:
    shared, batch = noise(3, 4), noise(3, 5, 4)

    def inverse(band: Tensor) -> Tensor:
        return wavedp.idwt2((shared, (None, band, None)), output_size=(5, 8))

    actual = torch.vmap(inverse, in_dims=1)(batch)
    torch.testing.assert_close(actual, torch.stack([inverse(band) for band in batch.unbind(1)]))


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented")
def test_vmap_of_the_ops_themselves() -> None:
    images = noise(3, 5, 7)
    bands = torch.vmap(lambda x: ops.dwt2(x, "zero"))(images)
    torch.testing.assert_close(bands, ops.dwt2(images, "zero").movedim(1, 0))
    back = torch.vmap(lambda bands: ops.dwt2_backward(bands, "zero", 5, 7))(bands)
    torch.testing.assert_close(back, images)


def test_autocast_keeps_the_dtype_and_trains(device: torch.device) -> None:
    convolution = torch.nn.Conv2d(1, 2, 3, padding=1).to(device)
    x = torch.randn(2, 1, 7, 7, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        features = convolution(x)
        approximation, details = wavedp.dwt2(features)
        back = wavedp.idwt2((approximation, details), output_size=(7, 7))
    assert features.dtype == approximation.dtype == back.dtype == torch.bfloat16
    # 2^-8 for each of the two roundings, on values that one pixel's four bands make up to eight times as large.
    torch.testing.assert_close(back, features, rtol=2**-4, atol=2**-5)
    back.sum().backward()
    weight = convolution.weight.grad
    assert weight is not None
    convolution.zero_grad()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        convolution(x).sum().backward()
    torch.testing.assert_close(weight, convolution.weight.grad, rtol=2**-6, atol=2**-4)
