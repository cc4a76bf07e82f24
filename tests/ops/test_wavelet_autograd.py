# SPDX-License-Identifier: Apache-2.0
"""Gradients of any order and what they cost, torch.func, autocast, and torch.library's own checks of the ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import wavedp
from wavedp.ops import use_backend, wavelet_native
from wavedp.reference.wavelet import EDGE_OF_MODE, Edge, band_sizes, wavedec2_forward

TOLERANCES = {"rtol": 1e-12, "atol": 1e-12}  # float64, gradients of size 1 to 100
MODE_OF_EDGE = {edge: mode for mode, edge in reversed(EDGE_OF_MODE.items())}  # smooth, not antireflect
EDGES = [pytest.param(edge, id=edge.name) for edge in Edge]
ops = torch.ops.wavedp


def noise(*shape: int, device: str = "cpu", requires_grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(device).requires_grad_(requires_grad)


def noise_bands(lead: int, size: tuple[int, int], level: int, device: str = "cpu", grad: bool = True) -> list[Tensor]:
    sizes = band_sizes(*size, level)
    shapes = [sizes[level]] + [sizes[k] for k in range(level, 0, -1) for _ in range(3)]
    return [noise(lead, *shape, device=device, requires_grad=grad) for shape in shapes]


def flat(coeffs: Any) -> list[Any]:
    return [coeffs[0], *(band for details in coeffs[1:] for band in details)]


def nested(bands: Any) -> list[Any]:
    return [bands[0], *(tuple(bands[k : k + 3]) for k in range(1, len(bands), 3))]


def check_gradients(target: Any, function: Callable[..., Any], *inputs: Tensor) -> None:
    """First and second derivatives; of the slow interpreter the first, along random directions."""
    for check in (gradcheck,) if target.interpreted else (gradcheck, gradgradcheck):
        assert check(function, inputs, fast_mode=True)


@pytest.mark.parametrize("size", [(3, 5), (2, 3), (1, 1), (6, 5)], ids=str)
@pytest.mark.parametrize("edge", EDGES)
def test_gradients_of_any_order(target: Any, edge: Edge, size: tuple[int, int]) -> None:
    if target.interpreted and size != (3, 5):
        pytest.skip("needs a CUDA device: Triton's interpreter takes seconds, and one odd size shows each edge")
    mode = MODE_OF_EDGE[edge]
    level = 2 if edge != Edge.REFLECT else 1
    if edge == Edge.REFLECT:
        size = (max(size[0], 2), max(size[1], 2))
    x = noise(2, *size, device=target.device, requires_grad=True)
    bands = noise_bands(2, size, level, target.device)
    check_gradients(target, lambda x: tuple(ops.wavedec2(x, level, mode, 0.25)), x)
    check_gradients(target, lambda x: ops.coarse(x, level, mode, 0.5, 1.0, 0.0, None), x)
    given = [True] * len(bands)
    check_gradients(target, lambda *bands: ops.waverec2(list(bands), given, *size, mode, 1.0), *bands)


def test_gradients_of_some_bands(target: Any) -> None:
    bands = noise_bands(1, (5, 6), 2, target.device)
    for present in ([True] + [False] * 6, [False, True, False, True, False, False, True]):
        some = [band for band, there in zip(bands, present) if there]
        check_gradients(target, lambda *some: ops.waverec2(list(some), present, 5, 6, "zero", 0.5), *some)  # noqa: B023


@pytest.mark.parametrize("level", [1, 3])
@pytest.mark.parametrize("mode", EDGE_OF_MODE)
def test_the_gradient_is_that_of_the_definition(target: Any, mode: str, level: int) -> None:
    for size in ((17, 31), (16, 24)) if target.interpreted else ((17, 31), (12, 9), (24, 40)):
        x = noise(3, *size, device=target.device, requires_grad=True)
        weights = noise_bands(3, size, level, target.device, grad=False)
        (expected,) = torch.autograd.grad(wavedec2_forward(x, level, EDGE_OF_MODE[mode], 0.5), x, weights)
        actual_bands = flat(wavedp.wavedec2(x, level, mode))
        (actual,) = torch.autograd.grad(actual_bands, x, weights)
        torch.testing.assert_close(actual, expected, **TOLERANCES)
        inner = sum((band * weight).sum() for band, weight in zip(actual_bands, weights))
        torch.testing.assert_close(inner, (x * actual).sum(), rtol=1e-11, atol=1e-11)
        # A band that is not used has no gradient, not one of zeros; the result is that of zeros.
        (some,) = torch.autograd.grad(flat(wavedp.wavedec2(x, level, mode))[2:], x, weights[2:])
        zeros = [torch.zeros_like(weight) for weight in weights[:2]] + weights[2:]
        (filled,) = torch.autograd.grad(flat(wavedp.wavedec2(x, level, mode)), x, zeros)
        assert torch.equal(some, filled)


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
        expected_bands = wavedec2_forward(torch.ones_like(x), 1, Edge.ZERO, 0.5)
        for band, one in zip(bands, expected_bands):
            torch.testing.assert_close(band.grad, one)


def test_a_channels_last_image_gets_its_gradient(target: Any) -> None:
    images = noise(2, 3, 8, 12, device=target.device)
    gradients = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = images.clone(memory_format=memory_format).requires_grad_()
        coeffs: Any = wavedp.wavedec2(x, 2)
        (coeffs[0].sin().sum() + coeffs[2][1].square().sum()).backward()
        gradients.append(x.grad)
    assert torch.equal(gradients[0], gradients[1])


def test_nothing_is_saved_for_backward() -> None:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: pytest.fail("nothing to unpack")):
        x = torch.randn(5, 7, requires_grad=True)
        y = wavedp.waverec2(wavedp.wavedec2(x, 2), output_size=(5, 7)).sum()
        (y + wavedp.coarse(x, 1, "zero", norm="mean").sum() * 0).backward()
    assert saved == []
    torch.testing.assert_close(x.grad, torch.ones(5, 7))


def allocated(function: Callable[[], Any]) -> int:
    """Bytes that a call allocates on the CPU, freed or not."""
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0)


@pytest.mark.parametrize("level", [1, 3])
def test_a_pass_allocates_its_result_and_nothing_else(level: int) -> None:
    pytest.importorskip("wavedp._csrc", reason="the reference allocates at will")
    image = torch.randn(4, 3, 64, 64)
    size = image.numel() * 4
    x = image.clone().requires_grad_()
    bands = flat(wavedp.wavedec2(x, level))
    gradients = [torch.randn_like(band) for band in bands]
    assert allocated(lambda: wavedp.wavedec2(image, level)) == size
    assert allocated(lambda: wavedp.wavedec2(x, level)) == size
    assert allocated(lambda: torch.autograd.grad(bands, x, gradients, retain_graph=True)) == size
    assert allocated(lambda: torch.autograd.grad(bands[1:3], x, gradients[1:3], retain_graph=True)) == size
    leaves = [band.detach().requires_grad_() for band in bands]
    assert allocated(lambda: wavedp.waverec2(nested(leaves))) == size
    back = wavedp.waverec2(nested(leaves))
    assert allocated(lambda: torch.autograd.grad(back, leaves, image, retain_graph=True)) == size
    low = wavedp.waverec2([leaves[0], *[(None,) * 3] * level])
    assert allocated(lambda: torch.autograd.grad(low, leaves[0], image, retain_graph=True)) == size // 4**level
    approximation = wavedp.coarse(x, level)
    assert allocated(lambda: torch.autograd.grad(approximation, x, gradients[0], retain_graph=True)) == size


def test_changing_one_band_leaves_the_gradient_of_another_alone() -> None:
    for level in (1, 3):
        x = torch.randn(8, 8, requires_grad=True)
        for image in (x, x.detach()):
            weight = torch.ones((), requires_grad=True)
            bands = flat(wavedp.wavedec2(image, level))
            before = bands[1].detach().clone()
            product = (bands[1] * weight).sum()
            bands[0].mul_(3)
            (product + bands[0].sum()).backward()
            torch.testing.assert_close(weight.grad, before.sum())
        ones = [torch.full_like(bands[0], 3.0), torch.ones_like(bands[1]), *[None] * (3 * level - 1)]
        torch.testing.assert_close(x.grad, wavedp.waverec2(nested(ones), output_size=(8, 8)))


def test_a_gradient_is_computed_by_the_backend_of_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 7, requires_grad=True)
    with use_backend("reference"):
        bands = ops.wavedec2(x, 2, "smooth", 0.5)
        image = ops.waverec2(bands, [True] * 7, 5, 7, "zero", 0.5)

    def refused(*arguments: Any) -> Tensor:
        raise AssertionError("the native library was used")

    for name in ("wavedec2_forward", "waverec2_forward", "coarse_forward"):
        monkeypatch.setattr(wavelet_native, name, refused)
    image.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(5, 7))


def coarse_arguments(device: str, shape: tuple[int, ...], **changes: Any) -> tuple[Any, ...]:
    values: dict[str, Any] = {"level": 2, "mode": "smooth", "dtype": None, **changes}
    x = noise(*shape, device=device, requires_grad=True)
    return x, values["level"], values["mode"], 0.5, 1.0, 0.0, values["dtype"]


OPCHECK: dict[str, Callable[[str], tuple[Any, tuple[Any, ...]]]] = {
    "wavedec2": lambda device: (
        ops.wavedec2.default,
        (noise(2, 5, 7, device=device, requires_grad=True), 2, "smooth", 0.5),
    ),
    "wavedec2 of ten levels": lambda device: (
        ops.wavedec2.default,
        (noise(2, 5, 7, device=device, requires_grad=True), 10, "zero", 0.5),
    ),
    "wavedec2 of no image": lambda device: (ops.wavedec2.default, (noise(0, 5, 7, device=device), 1, "zero", 0.25)),
    "waverec2": lambda device: (
        ops.waverec2.default,
        (noise_bands(2, (5, 7), 2, device), [True] * 7, 5, 7, "zero", 0.5),
    ),
    "waverec2 with absent bands": lambda device: (
        ops.waverec2.default,
        (noise_bands(1, (6, 7), 1, device)[:2], [False, True, False, True], 6, 7, "periodic", 1.0),
    ),
    "coarse": lambda device: (ops.coarse.default, coarse_arguments(device, (2, 5, 7))),
    "coarse in another dtype": lambda device: (
        ops.coarse.default,
        coarse_arguments(device, (3, 8, 8), dtype=torch.float32),
    ),
    "coarse of bytes": lambda device: (
        ops.coarse.default,
        (torch.arange(35, dtype=torch.uint8, device=device).view(5, 7), 1, "smooth", 0.5, 1 / 255, -1.0, None),
    ),
}


@pytest.mark.parametrize("case", OPCHECK)
def test_opcheck(case: str, device: torch.device) -> None:
    torch.library.opcheck(*OPCHECK[case](device.type))


def round_trip_of_scaled(x: Tensor) -> Tensor:
    """Three levels there and back, with a nonlinearity between, so that its gradient depends on every band."""
    coeffs: Any = wavedp.wavedec2(x, 3, "antisymmetric")
    scaled = [coeffs[0].sin(), *(tuple(band.tanh() for band in level) for level in coeffs[1:])]
    return wavedp.waverec2(scaled, output_size=x.shape[-2:]) + wavedp.coarse(x, 1).cos().mean()


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
    def function(x: Tensor) -> Tensor:
        approximation, details = wavedp.dwt2(x, "smooth")
        back = wavedp.idwt2((approximation, (None, *details[1:])), output_size=(5, 7))
        return back + wavedp.coarse(x, 2).sum()

    x, tangent = noise(5, 7), noise(5, 7)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        derivative = torch.autograd.forward_ad.unpack_dual(function(dual)).tangent
        constant = torch.autograd.forward_ad.unpack_dual(function(x)).tangent
    torch.testing.assert_close(derivative, function(tangent), **TOLERANCES)
    assert constant is None


@pytest.mark.parametrize("in_dim", [0, 1, -1])
def test_vmap_over_any_axis(in_dim: int) -> None:
    images = noise(4, 5, 6)
    for function in (lambda x: flat(wavedp.wavedec2(x, 2, "smooth")), lambda x: [wavedp.coarse(x, 2)]):
        moved = torch.vmap(function, in_dims=in_dim)(images.movedim(0, in_dim))
        for one, other in zip(moved, function(images), strict=True):
            torch.testing.assert_close(one, other)


def test_vmap_of_the_inverse_with_a_shared_and_absent_bands() -> None:
    shared, batch = noise(3, 4), noise(3, 5, 4)

    def inverse(band: Tensor) -> Tensor:
        return wavedp.idwt2((shared, (None, band, None)), output_size=(5, 8))

    actual = torch.vmap(inverse, in_dims=1)(batch)
    torch.testing.assert_close(actual, torch.stack([inverse(band) for band in batch.unbind(1)]))


def test_vmap_of_the_ops_themselves() -> None:
    images = noise(3, 5, 7)
    bands = torch.vmap(lambda x: ops.wavedec2(x, 2, "zero", 0.5))(images)
    for one, other in zip(bands, ops.wavedec2(images, 2, "zero", 0.5), strict=True):
        torch.testing.assert_close(one, other)
    back = torch.vmap(lambda *bands: ops.waverec2(list(bands), [True] * 7, 5, 7, "zero", 0.5))(*bands)
    torch.testing.assert_close(back, images)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_the_dtype_and_trains(device: torch.device, dtype: torch.dtype) -> None:
    convolution = torch.nn.Conv2d(1, 2, 3, padding=1).to(device)
    x = torch.randn(2, 1, 7, 7, device=device)
    with torch.autocast(device.type, dtype=dtype):
        features = convolution(x)
        coeffs: Any = wavedp.wavedec2(features, 2)
        back = wavedp.waverec2(coeffs, output_size=(7, 7))
        plain = wavedp.coarse(x, 1)
    assert features.dtype == coeffs[0].dtype == back.dtype == dtype
    assert plain.dtype == torch.float32
    # 2^-8 for each of the two roundings, on values that four bands make up to sixteen times as large.
    torch.testing.assert_close(back, features, rtol=2**-3, atol=2**-4)
    back.sum().backward()
    weight = convolution.weight.grad
    assert weight is not None
    convolution.zero_grad()
    with torch.autocast(device.type, dtype=dtype):
        convolution(x).sum().backward()
    torch.testing.assert_close(weight, convolution.weight.grad, rtol=2**-6, atol=2**-4)
