# SPDX-License-Identifier: Apache-2.0
"""The Haar transform: all bands, back to the image, the gradients of both, and the coarse band alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import wavedp
from wavedp.benchmarks.cases.sizes import FLOAT32, SIZES, UINT8, images
from wavedp.benchmarks.registry import Case, Provider, Size, Thunk
from wavedp.benchmarks.transforms import Transform, by_backend, is_compiled, nested, transforms
from wavedp.ops import available_backends
from wavedp.reference.wavelet import Edge, band_sizes, coarse_forward, wavedec2_forward, waverec2_forward

LEVEL = 3
BYTES = (1 / 255, 0.0)  # gain and bias of uint8


def bands_of(level: int, size: Size, device: torch.device) -> tuple[Tensor, ...]:
    (x,) = images(size, device)
    return tuple(decompose(size, x, level))


def decompose(size: Size, x: Tensor, level: int) -> list[Tensor]:
    return wavedec2_forward(x, level, Edge.REPEAT, 0.5)


def recompose(size: Size, *bands: Tensor) -> list[Tensor]:
    height, width = size.shape[-2:]
    return [waverec2_forward(bands, height, width, Edge.ZERO, 0.5)]


def written(
    prepare: Callable[[Sequence[Tensor], Sequence[Tensor]], Thunk], device: torch.device, floor: str = "copy_"
) -> dict[str, Provider]:
    """This package writing into existing tensors; on a GPU also by each of the two implementations."""
    available = available_backends() if device.type == "cuda" else ()
    backends = {"wavedp, out=": "auto"}
    backends |= {f"wavedp {name}, out=": name for name in ("triton", "cuda") if name in available}

    def provider(backend: str) -> Provider:
        return Provider(lambda inputs, out: by_backend(backend, prepare(inputs, out)), floor=floor, writes_out=True)

    return {name: provider(backend) for name, backend in backends.items()}


def analysis(level: int, size: Size, device: torch.device) -> Mapping[str, Provider]:
    def fresh(transform: Transform) -> Provider:
        return Provider(lambda inputs, out: partial(transform.forward, inputs[0]), transform.unpack)

    ours = written(lambda inputs, out: partial(wavedp.wavedec2, inputs[0], level, out=nested(out)), device)
    return ours | {name: fresh(transform) for name, transform in transforms(level, size, device).items()}


def synthesis(level: int, size: Size, device: torch.device) -> Mapping[str, Provider]:
    def fresh(transform: Transform) -> Provider:
        return Provider(
            lambda bands, out: partial(transform.inverse, transform.pack(bands)), lambda x: [transform.image(x)]
        )

    ours = written(lambda bands, out: partial(wavedp.waverec2, nested(bands), out=out[0]), device)
    return ours | {name: fresh(transform) for name, transform in transforms(level, size, device).items()}


def analysis_backward(level: int, size: Size, device: torch.device) -> Mapping[str, Provider]:
    """From the gradients of the bands to that of the image."""
    image = torch.zeros(size.shape, dtype=size.dtype, device=device)  # one for all: it is not read

    def backward(transform: Transform) -> Provider:
        def prepare(grads: Sequence[Tensor], out: Sequence[Tensor]) -> Thunk:
            x = image.detach().requires_grad_()
            results, given = tree_leaves(transform.forward(x)), tree_leaves(transform.pack(grads))
            return partial(torch.autograd.grad, results, x, given, retain_graph=True)

        return Provider(prepare)

    return differentiable(backward, level, size, device)


def synthesis_backward(level: int, size: Size, device: torch.device) -> Mapping[str, Provider]:
    """From the gradient of the image to those of the bands."""
    height, width = size.shape[-2:]
    *finer, coarsest = band_sizes(height, width, level)[1:]
    shapes = [coarsest, *(shape for shape in [coarsest, *reversed(finer)] for _ in range(3))]
    bands = [torch.zeros((*size.shape[:-2], *shape), dtype=size.dtype, device=device) for shape in shapes]

    def backward(transform: Transform) -> Provider:
        packed, spec = tree_flatten(transform.pack(bands))
        tensors = [tensor.detach().requires_grad_() for tensor in packed]

        def prepare(inputs: Sequence[Tensor], out: Sequence[Tensor]) -> Thunk:
            x = transform.inverse(tree_unflatten(tensors, spec))
            return partial(torch.autograd.grad, x, tensors, inputs[0], retain_graph=True)

        return Provider(prepare, lambda grads: transform.unpack(tree_unflatten(list(grads), spec)))

    return differentiable(backward, level, size, device)


def differentiable(
    backward: Callable[[Transform], Provider], level: int, size: Size, device: torch.device
) -> Mapping[str, Provider]:
    found = transforms(level, size, device)
    return {name: backward(transform) for name, transform in found.items() if transform.differentiable}


def coarse_band(size: Size, x: Tensor) -> list[Tensor]:
    """Of bytes too, which come in a wider dtype."""
    gain, bias = BYTES if size.dtype == torch.uint8 else (1.0, 0.0)
    return [coarse_forward(x * gain + bias, LEVEL, Edge.REPEAT, 0.5)]


def pooled(x: Tensor) -> Tensor:
    """LL of level L is the sum of a block of 2^L x 2^L pixels over 2^L."""
    return torch.mul(avg_pool2d(x, 2**LEVEL), 2**LEVEL)


def pooled_bytes(x: Tensor) -> Tensor:
    gain, bias = BYTES
    return pooled(x.float() * gain + bias)


def coarse(size: Size, device: torch.device) -> Mapping[str, Provider]:
    def fresh(function: Callable[[Tensor], Any]) -> Provider:
        return Provider(lambda inputs, out: partial(function, inputs[0]), tree_leaves, "sum")

    ours = written(lambda inputs, out: partial(wavedp.coarse, inputs[0], LEVEL, out=out[0]), device, "sum")
    ours["wavedp"] = fresh(partial(wavedp.coarse, level=LEVEL))
    if size.ours_only:
        return ours
    if size.dtype == torch.uint8:
        (gain, bias), pool = BYTES, pooled_bytes
    else:
        (gain, bias), pool = (1.0, 0.0), pooled
    eager = partial(coarse_forward, level=LEVEL, edge=Edge.REPEAT, factor=0.5, gain=gain, bias=bias)
    if is_compiled(device):
        ours["torch.compile"] = fresh(torch.compile(eager, dynamic=False))
        ours["avg_pool2d, torch.compile"] = fresh(torch.compile(pool, dynamic=False))
    return ours | {"avg_pool2d": fresh(pool), "eager": fresh(eager)}


READ = ("sum", "copy_ of the input")
CASES = [
    *(
        Case(
            f"wavedec2-L{level}",
            images,
            partial(decompose, level=level),
            partial(analysis, level),
            SIZES if level == LEVEL else FLOAT32,
        )
        for level in (1, 3, 5)
    ),
    *(
        Case(
            f"waverec2-L{level}",
            partial(bands_of, level),
            recompose,
            partial(synthesis, level),
            SIZES if level == LEVEL else FLOAT32,
        )
        for level in (1, 3)
    ),
    *(
        Case(
            f"wavedec2_backward-L{level}",
            partial(bands_of, level),
            recompose,
            partial(analysis_backward, level),
            FLOAT32,
            floors=("clone",),
        )
        for level in (1, 3)
    ),
    Case(
        f"waverec2_backward-L{LEVEL}",
        images,
        partial(decompose, level=LEVEL),
        partial(synthesis_backward, LEVEL),
        FLOAT32,
        floors=("clone",),
    ),
    Case(f"coarse-L{LEVEL}", images, coarse_band, coarse, SIZES, READ),
    Case(f"coarse_uint8-L{LEVEL}", images, coarse_band, coarse, UINT8, READ),
]
