# SPDX-License-Identifier: Apache-2.0
"""torch.compile, torch.export, make_fx, torch.jit.trace, FakeTensor and modes: whoever records a call sees the ops, and
what was recorded gives the values of the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import wavedp
from wavedp.ops import use_backend, wavelet_native
from wavedp.ops.eager import is_plain

TOLERANCES = {"rtol": 1e-12, "atol": 1e-12}


def noise(*shape: int, requires_grad: bool = False, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(device).requires_grad_(requires_grad)


def flat(coeffs: Any) -> list[Any]:
    return [coeffs[0], *(band for details in coeffs[1:] for band in details)]


def of_images(x: Tensor) -> Tensor:
    """Every wavelet function, with a nonlinearity between, so that the gradient depends on every band."""
    coeffs: Any = wavedp.wavedec2(x, 3, "antisymmetric")
    scaled = [coeffs[0].sin(), *(tuple(band.tanh() for band in level) for level in coeffs[1:])]
    back = wavedp.waverec2(scaled, output_size=x.shape[-2:], norm="mean")
    return back + wavedp.coarse(x, 2, norm="mean").cos().mean()


def of_tokens(x: Tensor) -> Tensor:
    tokens, energies = wavedp.wavelet_tokens(x, 2, 2, [0.1, 0.2, 0.3], [1.0, 2.0, 3.0], energies=True)
    scaled = [one.tanh() for one in tokens]
    back = wavedp.wavelet_untokens(scaled, 2, std=[0.5, 1.5, 2.5], output_size=x.shape[-2:])
    return back + energies.mean()


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], list[tuple[int, ...]]]] = {
    "wavelets": (of_images, [(2, 13, 18), (2, 9, 7), (3, 16, 8)]),
    "tokens": (of_tokens, [(2, 3, 8, 16), (3, 3, 16, 24)]),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compile_whole_forward_and_backward(name: str, dynamic: bool, device: torch.device) -> None:
    function, shapes = FUNCTIONS[name]
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in shapes:
        for memory_format in (torch.contiguous_format, torch.channels_last)[: 2 if len(shape) == 4 else 1]:
            x = noise(*shape, device=device.type).to(memory_format=memory_format).requires_grad_()
            y, expected = compiled(x), function(x)
            torch.testing.assert_close(y, expected, **TOLERANCES)
            weights = torch.randn_like(y)
            gradients = [torch.autograd.grad(out, x, weights)[0] for out in (y, expected)]
            torch.testing.assert_close(*gradients, **TOLERANCES)


@pytest.mark.filterwarnings("error:.*may not alias")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_inductor_generates_code_that_agrees(name: str) -> None:
    function, shapes = FUNCTIONS[name]
    torch.compiler.reset()
    x = noise(*shapes[0], requires_grad=True)
    y, expected = torch.compile(function, fullgraph=True)(x), function(x)
    torch.testing.assert_close(y, expected, **TOLERANCES)
    weights = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, x, weights)[0], torch.autograd.grad(expected, x, weights)[0], **TOLERANCES
    )


def test_compile_with_out() -> None:
    def function(x: Tensor, outs: list[Any]) -> Tensor:
        wavedp.wavedec2(x, 2, out=outs[:3])
        wavedp.waverec2(wavedp.wavedec2(x, 1), out=outs[3])
        return wavedp.coarse(x, 1, out=outs[4])

    torch.compiler.reset()
    x = noise(2, 8, 12)
    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        bands = [torch.full(shape, torch.nan) for shape in [(2, 2, 3)] * 4 + [(2, 4, 6)] * 3]
        bands = [band.double() for band in bands]
        image, low = torch.full_like(x, torch.nan), bands[4].clone()
        result = call(x, [bands[0], tuple(bands[1:4]), tuple(bands[4:]), image, low])
        torch.testing.assert_close(result, low)
        results.append([*bands, image, low])
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[0][-2], x)


class OfImages(torch.nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_export(name: str, strict: bool) -> None:
    function, shapes = FUNCTIONS[name]
    x = noise(*shapes[0])
    program = torch.export.export(OfImages(function), (x,), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes}
    assert {target.split(".")[1] for target in targets if target.startswith("wavedp.")} == (
        {"wavedec2", "waverec2", "coarse"} if name == "wavelets" else {"wavelet_tokens", "wavelet_untokens"}
    )
    y = noise(*shapes[0])
    torch.testing.assert_close(program.module()(y), function(y), **TOLERANCES)


def test_export_with_a_batch_of_any_size() -> None:
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(OfImages(of_images), (noise(2, 13, 18),), dynamic_shapes=({0: batch},))
    x = noise(7, 13, 18)
    torch.testing.assert_close(program.module()(x), of_images(x), **TOLERANCES)


@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_make_fx_records_the_ops(name: str, mode: str, pre_dispatch: bool) -> None:
    function, shapes = FUNCTIONS[name]
    graph = make_fx(function, tracing_mode=mode, pre_dispatch=pre_dispatch)(noise(*shapes[0]))
    assert any(str(node.target).startswith("wavedp.") for node in graph.graph.nodes)
    x = noise(*shapes[0])
    torch.testing.assert_close(graph(x), function(x), **TOLERANCES)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_records_the_ops() -> None:
    traced = torch.jit.trace(lambda x: wavedp.coarse(x, 2), (noise(2, 8, 8),))
    assert "wavedp::coarse" in str(traced.graph)
    x = noise(2, 8, 8)
    torch.testing.assert_close(traced(x), wavedp.coarse(x, 2))


def test_fake_tensors_have_the_metadata_of_real_ones() -> None:
    def results(x: Tensor) -> list[Tensor]:
        bands = flat(wavedp.wavedec2(x, 10))
        return [*bands, wavedp.coarse(x, 2), wavedp.waverec2([bands[0], bands[1:4]]), *wavedp.wavelet_tokens(x, 1, 2)]

    real = noise(2, 3, 8, 12)
    with FakeTensorMode() as mode:
        fakes = results(mode.from_tensor(real))
    for fake, result in zip(fakes, results(real), strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (result.shape, result.dtype, result.stride())


def test_modes_see_the_ops() -> None:
    seen: list[str] = []

    class Dispatched(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    class Called(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Dispatched():
        wavedp.dwt2(noise(4, 4))
    assert "wavedp.wavedec2.default" in seen
    with Called():
        wavedp.idwt2((noise(4, 4), (None, None, None)))
    assert "wavedp.waverec2" in seen


class Subclass(Tensor):
    """Counts what is called on it."""

    calls: list[str]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "wavedp" in str(function):
            cls.calls.append(str(function))
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_subclass_sees_the_ops() -> None:
    Subclass.calls = []
    x = noise(4, 4)
    result = wavedp.coarse(x.as_subclass(Subclass), 1)
    assert isinstance(result, Subclass)
    assert Subclass.calls == ["wavedp.coarse"]
    torch.testing.assert_close(result.as_subclass(Tensor), wavedp.coarse(x, 1))


def test_what_is_plain() -> None:
    x = torch.randn(4, 6)
    parameter = torch.nn.Parameter(x)
    assert is_plain(x, x.half(), x.t(), x[:0])
    with torch.inference_mode():
        assert is_plain(x, torch.randn(3))
    assert not is_plain(parameter)
    assert is_plain(parameter, under_grad=True)
    with torch.no_grad():
        assert is_plain(parameter)
    odd = [
        x.to_sparse(),
        x.to("meta"),
        torch._neg_view(x),
        torch._efficientzerotensor(4, 6),
        torch._to_functional_tensor(x),
        x.as_subclass(Subclass),
        torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
    ]
    assert [is_plain(x, one) for one in odd] == [False] * len(odd)
    with torch.autograd.forward_ad.dual_level():
        assert not is_plain(x)
    with torch.device("cpu"):  # a function mode
        assert not is_plain(x)


def test_the_backend_asked_for_computes_on_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("the native library was used")

    for name in ("wavedec2_forward", "waverec2_forward", "coarse_forward"):
        monkeypatch.setattr(wavelet_native, name, refused)
    torch.compiler.reset()
    compiled = torch.compile(of_images, backend="aot_eager")
    with use_backend("reference"):
        for x in (noise(2, 13, 18), noise(2, 13, 18, requires_grad=True)):
            torch.testing.assert_close(compiled(x), of_images(x))
