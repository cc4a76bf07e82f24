# SPDX-License-Identifier: Apache-2.0
"""The Haar transform of one and three levels: the backends, the reference under torch.compile, PyWavelets."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from registry import Case, Function, Shape
from torch import Tensor
from torch.nn.functional import avg_pool2d

import wavedp
from wavedp.ops import available_backends, use_backend
from wavedp.reference.wavelet import Edge, dwt2_forward, idwt2_forward

LEVEL = 3
BACKENDS = {"cpu": ("native", "reference"), "cuda": ("triton", "cuda", "reference")}
# 201 MB in float32 is past every cache; 50 MB is within the last-level cache of a server's processor.
SHAPES = {
    "quick": [(2, 3, 32, 48)],
    "cpu": [(64, 3, 256, 256), (256, 3, 256, 256)],
    "cuda": [(256, 3, 256, 256)],
}


def decompose(x: Tensor, level: int) -> list[Tensor]:
    """The definition: cA, then cH, cV, cD of each level, coarsest first."""
    details: list[Tensor] = []
    for _ in range(level):
        x, *bands = dwt2_forward(x, Edge.REPEAT).unbind(0)
        details = bands + details
    return [x, *details]


def recompose(*bands: Tensor) -> list[Tensor]:
    """The inverse of ``decompose`` for even sizes."""
    x, *details = bands
    for i in range(0, len(details), 3):
        x = idwt2_forward(x, *details[i : i + 3], 2 * x.shape[-2], 2 * x.shape[-1], Edge.ZERO)
    return [x]


def flat(coefficients: Iterable[Any]) -> list[Any]:
    """[cA, (cH, cV, cD), ...] as one list."""
    return [band for group in coefficients for band in (group if isinstance(group, tuple) else (group,))]


def nested(bands: tuple[Any, ...]) -> list[Any]:
    """The inverse of ``flat``."""
    return [bands[0], *(bands[i : i + 3] for i in range(1, len(bands), 3))]


def pywavelets(function: Callable[..., list[Any]]) -> Function:
    """A function of NumPy arrays as one of tensors, which share their memory."""
    return lambda *tensors: [torch.from_numpy(array) for array in function(*(t.numpy() for t in tensors))]


def by_backend(backend: str, function: Function) -> Function:
    def call(*inputs: Tensor) -> Any:
        with use_backend(backend):
            return function(*inputs)

    return call


def images(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(0)
    return (torch.randn(shape, generator=generator, device=device).to(dtype),)


def coefficients(level: int, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(band.contiguous() for band in decompose(*images(shape, dtype, device), level))


def wavelet_case(
    name: str,
    ours: Function,
    plain: Function,
    pywt_function: Callable[..., list[Any]],
    inputs: Callable[..., tuple[Tensor, ...]] = images,
    **rivals: Function,
) -> Case:
    def providers(device: torch.device, dtype: torch.dtype) -> dict[str, Function]:
        usable = [backend for backend in BACKENDS[device.type] if backend in available_backends()]
        found = {backend: by_backend(backend, ours) for backend in usable} | rivals
        torch.compiler.reset()
        found["torch.compile"] = torch.compile(plain, dynamic=False)
        if device.type == "cpu" and dtype == torch.float32 and importlib.util.find_spec("pywt"):
            found["PyWavelets"] = pywavelets(pywt_function)
        return found

    return Case(name, inputs, plain, providers, SHAPES)


def pywt_wavedec2(level: int, x: Any) -> list[Any]:
    import pywt

    return flat(pywt.wavedec2(x, "haar", level=level))


def pywt_waverec2(*bands: Any) -> list[Any]:
    import pywt

    return [pywt.waverec2(nested(bands), "haar")]


def pooled(x: Tensor) -> list[Tensor]:
    """LL of level L is the sum of a block of 2^L x 2^L pixels over 2^L."""
    return [avg_pool2d(x, 2**LEVEL) * 2**LEVEL]


CASES = [
    wavelet_case(
        "dwt2",
        ours=lambda x: flat(wavedp.dwt2(x)),
        plain=partial(decompose, level=1),
        pywt_function=partial(pywt_wavedec2, 1),
    ),
    wavelet_case(
        "idwt2",
        ours=lambda *bands: [wavedp.idwt2(tuple(nested(bands)))],
        plain=recompose,
        pywt_function=pywt_waverec2,
        inputs=partial(coefficients, 1),
    ),
    wavelet_case(
        f"wavedec2-L{LEVEL}",
        ours=lambda x: flat(wavedp.wavedec2(x, LEVEL)),
        plain=partial(decompose, level=LEVEL),
        pywt_function=partial(pywt_wavedec2, LEVEL),
    ),
    wavelet_case(
        f"waverec2-L{LEVEL}",
        ours=lambda *bands: [wavedp.waverec2(nested(bands))],
        plain=recompose,
        pywt_function=pywt_waverec2,
        inputs=partial(coefficients, LEVEL),
    ),
    wavelet_case(
        f"coarse-L{LEVEL}",
        ours=lambda x: [wavedp.coarse(x, LEVEL)],
        plain=pooled,
        pywt_function=lambda x: pywt_wavedec2(LEVEL, x)[:1],
        avg_pool2d=pooled,
    ),
]
