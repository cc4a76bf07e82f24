# SPDX-License-Identifier: Apache-2.0
"""The wavelet ops of the compiled libraries: tensors to addresses. ``csrc/wavelet.h`` says what they expect.

The C++ library computes CPU tensors, the CUDA library CUDA tensors. Their signatures differ in the last
argument alone: a number of threads, or a stream.
"""

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from wavedp.errors import StateError
from wavedp.ops.backend import is_forked
from wavedp.reference.wavelet import Edge, band_sizes

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 4}

_C: Any = torch._C
_below_autograd = _C._AutoDispatchBelowADInplaceOrView
_unflatten = _C._nn.unflatten_dense_tensors
_threads = torch.get_num_threads
empty_like = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)


@functools.cache
def compiled(name: str) -> Callable[..., Any]:
    library: Any = importlib.import_module("wavedp._csrc")
    if is_forked():
        library.leave_pool()
    function: Callable[..., Any] = getattr(library, name)
    return function


def call(function: str, x: Tensor, *arguments: Any) -> None:
    """Calls the library that computes tensors of the device of ``x``."""
    if not x.is_cuda:
        compiled(function)(*arguments, _threads())
        return
    device = x.device
    cuda: Any = importlib.import_module("wavedp._csrc_cuda")
    with torch.cuda.device(device) if device.index != torch.cuda.current_device() else nullcontext():
        stream = torch.cuda.current_stream(device).cuda_stream
        if code := getattr(cuda, function)(*arguments, stream):
            raise StateError(f"wavedp {function} on {device}: {cuda.error_string(code)}")


def template(shape: Sequence[int], dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
    """One element expanded to a shape: a function takes that faster from a tensor than from numbers."""
    return torch.empty(1, dtype=dtype, device=device).expand(tuple(shape))


class Packing:
    """Contiguous tensors one after the other in one allocation."""

    def __init__(self, shapes: Sequence[Sequence[int]], itemsize: int) -> None:
        sizes = [math.prod(shape) for shape in shapes]
        self.total = sum(sizes)  # elements
        self._shapes = [tuple(shape) for shape in shapes]
        self._offsets = [itemsize * sum(sizes[:k]) for k in range(len(sizes))]  # bytes
        self._templates = [template(shape) for shape in self._shapes]

    def addresses(self, flat: Tensor) -> list[int]:
        start = flat.data_ptr()
        return [start + offset for offset in self._offsets]

    def views(self, flat: Tensor) -> list[Tensor]:
        """The tensors. Autograd does not take a change of one for a change of all: they share no element."""
        if self.total == 0:
            return [flat.new_empty(shape) for shape in self._shapes]
        with _below_autograd():
            tensors: list[Tensor] = _unflatten(flat, self._templates)
            return tensors


def axes_of(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...] | None:
    """(outer, inner, H, W) and their strides; None where the leading axes do not collapse into two."""
    lead: list[tuple[int, int]] = []  # (size, stride), outermost first
    for size, stride in zip(shape[:-2], strides[:-2]):
        if size == 1:
            continue
        if lead and lead[-1][1] == size * stride:
            lead[-1] = lead[-1][0] * size, stride
        else:
            lead.append((size, stride))
    if len(lead) > 2:
        return None
    (outer, stride_outer), (inner, stride_inner) = [(1, 0)] * (2 - len(lead)) + lead
    return outer, inner, *shape[-2:], stride_outer, stride_inner, *strides[-2:]


def collapsed(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A contiguous copy of an image whose leading axes do not collapse, and its axes."""
    x = x.contiguous()
    axes = axes_of(x.shape, x.stride())
    assert axes is not None
    return x, axes


@functools.lru_cache(maxsize=4096)
def _plan(
    shape: Sequence[int], strides: Sequence[int], itemsize: int, level: int
) -> tuple[Packing, tuple[int, ...] | None]:
    lead, sizes = shape[:-2], band_sizes(shape[-2], shape[-1], level)
    shapes = [(*lead, *sizes[level])] + [(*lead, *sizes[k]) for k in range(level, 0, -1) for _ in range(3)]
    return Packing(shapes, itemsize), axes_of(shape, strides)


def wavedec2_forward(
    x: Tensor,  # [..., H, W], any strides
    level: int,
    edge: Edge,
    factor: float,
    out: list[Tensor] | None = None,
) -> list[Tensor]:
    """:func:`wavedp.reference.wavelet.wavedec2_forward` by a compiled library; views of one allocation."""
    bands, axes = _plan(x.shape, x.stride(), x.itemsize, level)
    if out is None:
        flat = x.new_empty(bands.total)
        addresses = bands.addresses(flat)
    else:
        addresses = [band.data_ptr() for band in out]
    if bands.total > 0:
        if axes is None:
            x, axes = collapsed(x)
        code = DTYPE_CODES[x.dtype]
        call("wavedec2", x, x.data_ptr(), code, 1.0, 0.0, axes, addresses, code, edge, level, factor)
    return bands.views(flat) if out is None else out


@functools.lru_cache(maxsize=4096)
def _coarse_plan(
    shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device, level: int
) -> tuple[Tensor, tuple[int, ...] | None]:
    """A template of the band, and the axes of the images."""
    band = (*shape[:-2], *band_sizes(shape[-2], shape[-1], level)[-1])
    return template(band, dtype, device), axes_of(shape, strides)


def coarse_forward(
    x: Tensor,  # [..., H, W], any strides; uint8 too
    level: int,
    edge: Edge,
    factor: float,
    gain: float = 1.0,
    bias: float = 0.0,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:  # [..., ceil(H/2^level), ceil(W/2^level)]
    """:func:`wavedp.reference.wavelet.coarse_forward` by a compiled library."""
    dtype = dtype or (torch.float32 if x.dtype == torch.uint8 else x.dtype)
    band, axes = _coarse_plan(x.shape, x.stride(), dtype, x.device, level)
    if out is None:
        out = empty_like(band)
    if out.numel() > 0:
        if axes is None:
            x, axes = collapsed(x)
        bands = [out.data_ptr(), *[0] * (3 * level)]
        codes = DTYPE_CODES[x.dtype], DTYPE_CODES[dtype]
        call("wavedec2", x, x.data_ptr(), codes[0], gain, bias, axes, bands, codes[1], edge, level, factor)
    return out


@functools.lru_cache(maxsize=4096)
def _image_plan(
    band: Sequence[int], dtype: torch.dtype, device: torch.device, height: int, width: int
) -> tuple[int, Tensor]:
    """How many images bands of this shape make, and a template of them."""
    return math.prod(band[:-2]), template((*band[:-2], height, width), dtype, device)


def waverec2_forward(
    bands: Sequence[Tensor | None],  # LL_L, LH_L, HL_L, HH_L, ..., HH_1; None stands for zeros
    height: int,
    width: int,
    edge: Edge,
    factor: float,
    out: Tensor | None = None,
) -> Tensor:  # [..., height, width]
    """:func:`wavedp.reference.wavelet.waverec2_forward` by a compiled library."""
    first = bands[0] if bands[0] is not None else next(band for band in bands if band is not None)
    if [band for band in bands if band is not None and not band.is_contiguous()]:
        bands = [None if band is None else band.contiguous() for band in bands]
    dtype = first.dtype
    n, image = _image_plan(first.shape, dtype, first.device, height, width)
    if out is None:
        out = empty_like(image)
    if n > 0:
        addresses = [0 if band is None else band.data_ptr() for band in bands]
        code, level = DTYPE_CODES[dtype], len(bands) // 3
        call("waverec2", first, addresses, out.data_ptr(), code, n, height, width, edge, level, factor)
    return out
