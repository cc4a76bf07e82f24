# SPDX-License-Identifier: Apache-2.0
"""``wavedp::wavedec2``, ``wavedp::waverec2`` and ``wavedp::coarse``: the Haar transform over all levels.

Bands are a flat list ``[LL_L, LH_L, HL_L, HH_L, LH_(L-1), ..., HH_1]``. ``factor`` is that of a level: 1/2 is
orthonormal. ``wavedp/ops/wavelet_autograd.py`` differentiates and batches the ops.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from wavedp.errors import InvalidTypeError, InvalidValueError
from wavedp.ops.backend import implementation
from wavedp.ops.out import copied, written
from wavedp.reference.wavelet import EDGE_OF_MODE, Edge, band_sizes

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What the ops take; half precision is computed in float32 and rounded once."""

_HALF = (torch.float16, torch.bfloat16)

MAX_FUSED_LEVELS = 8
"""Levels of one call of a backend. More are chained, in the precision of the arithmetic."""


def check_dtype(op: str, dtype: torch.dtype, *, or_bytes: bool = False) -> None:
    if dtype not in DTYPES and not (or_bytes and dtype == torch.uint8):
        also = ", and images of uint8" if or_bytes else ""
        raise InvalidTypeError(
            f"{op} takes float16, bfloat16, float32 or float64{also}, not {dtype}: convert it, say by .float()"
        )


def check_image(op: str, shape: Sequence[int], mode: str) -> Edge:
    """The rule of a mode by which images of this shape are completed.

    Raises:
        ValueError: no image, or an unknown mode.
    """
    if len(shape) < 2 or shape[-2] == 0 or shape[-1] == 0:
        raise InvalidValueError(f"{op} takes images [..., H, W] of at least 1 x 1, not a shape of {tuple(shape)}")
    edge = EDGE_OF_MODE.get(mode)
    if edge is None:
        raise InvalidValueError(f"unknown mode {mode!r}; choose from {', '.join(EDGE_OF_MODE)}")
    return edge


def _edge_rule(op: str, shape: Sequence[int], level: int, mode: str) -> Edge:
    """The rule by which ``mode`` completes odd axes of ``level`` levels of images of this shape.

    Raises:
        ValueError: as :func:`check_image`, a level below 1, or a mode that reflects an axis of one sample, as
            PyWavelets refuses it.
    """
    edge = check_image(op, shape, mode)
    if level < 1:
        raise InvalidValueError(f"{op} takes a level of at least 1, not {level}")
    if mode in ("reflect", "antireflect"):
        for height, width in band_sizes(shape[-2], shape[-1], level - 1):
            if height == 1 or width == 1:
                raise InvalidValueError(
                    f"mode {mode!r} needs at least 2 samples along each axis, but the image is {height} x {width}: "
                    "use 'symmetric', or fewer levels"
                )
    return edge


@functools.lru_cache(maxsize=4096)
def _edge_of(op: str, dtype: torch.dtype, shape: Sequence[int], level: int, mode: str) -> Edge:
    """:func:`_edge_rule`, and the check of the dtype: found once for each kind of image."""
    check_dtype(op, dtype, or_bytes=op == "coarse")
    return _edge_rule(op, shape, level, mode)


def band_shapes(shape: Sequence[int], level: int) -> list[tuple[int, ...]]:
    """The shapes of the bands, in their order, of images of this shape."""
    lead, sizes = tuple(shape[:-2]), band_sizes(shape[-2], shape[-1], level)
    shapes = [(*lead, *sizes[level])]
    for height, width in sizes[level:0:-1]:
        shapes += [(*lead, height, width)] * 3
    return shapes


def check_bands(bands: Sequence[Tensor], given: Sequence[bool], height: int, width: int) -> Tensor:
    """Raises unless the bands agree with each other and with an image of this size; returns one of them."""
    if len(given) % 3 != 1 or len(given) < 4 or sum(given) != len(bands):
        raise InvalidValueError(
            f"waverec2 takes 3 L + 1 flags, true for each of its {len(bands)} bands, not {list(given)}"
        )
    if not bands:
        raise InvalidValueError("waverec2 takes at least one band")
    first = bands[0]
    check_dtype("waverec2", first.dtype)
    if height < 1 or width < 1:
        raise InvalidValueError(f"waverec2 gives an image of at least 1 x 1, not {height} x {width}")
    shapes = band_shapes((*first.shape[:-2], height, width), len(given) // 3)
    for band, shape in zip(bands, (shape for shape, there in zip(shapes, given) if there)):
        if (band.dtype, band.device) != (first.dtype, first.device) or tuple(band.shape) != shape:
            raise InvalidValueError(
                f"a band of waverec2 must be {tuple(shape)} {first.dtype} on {first.device} for an image of "
                f"{height} x {width}, but one is {tuple(band.shape)} {band.dtype} on {band.device}"
            )
    return first


def result_dtype(x: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Of a result of which ``dtype`` was asked: that of the images, or float32 for bytes."""
    if dtype is not None:
        return dtype
    return torch.float32 if x.dtype == torch.uint8 else x.dtype


def kernel_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What a backend is asked for: float64 goes with float64 alone, and the rest is a conversion afterwards."""
    if (x.dtype == torch.float64) == (dtype == torch.float64):
        return dtype
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def writes_into(function: Callable[..., Any], out: Sequence[Tensor]) -> bool:
    """Whether a backend's function can write its results there: the definition writes into nothing."""
    return not function.__module__.startswith("wavedp.reference.") and all(one.is_contiguous() for one in out)


def compute_wavedec2(
    x: Tensor, level: int, mode: str, factor: float, out: list[Tensor] | None = None, op: str = "wavedec2"
) -> list[Tensor]:
    """The kernel of ``wavedp::wavedec2``; ``out`` is checked already."""
    edge = _edge_of(op, x.dtype, x.shape, level, mode)
    forward = implementation("wavelet", x.device).wavedec2_forward
    bands: list[Tensor]
    if level > MAX_FUSED_LEVELS and x.dtype in _HALF:
        bands = [band.to(x.dtype) for band in compute_wavedec2(x.float(), level, mode, factor, op=op)]
    elif level > MAX_FUSED_LEVELS:
        approximation, *finer = forward(x, MAX_FUSED_LEVELS, edge, factor)
        bands = [*compute_wavedec2(approximation, level - MAX_FUSED_LEVELS, mode, factor), *finer]
    elif out is not None and writes_into(forward, out):
        forward(x, level, edge, factor, out=out)
        written(out)
        return out
    else:
        bands = forward(x, level, edge, factor)
    return bands if out is None else copied(out, bands)


def compute_coarse(
    x: Tensor,
    level: int,
    mode: str,
    factor: float,
    gain: float,
    bias: float,
    dtype: torch.dtype | None,
    out: Tensor | None = None,
) -> Tensor:
    """The kernel of ``wavedp::coarse``; ``out`` is checked already."""
    edge = _edge_of("coarse", x.dtype, x.shape, level, mode)
    forward = implementation("wavelet", x.device).coarse_forward
    dtype = result_dtype(x, dtype)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    while level > MAX_FUSED_LEVELS:
        x, level = forward(x, MAX_FUSED_LEVELS, edge, factor, gain, bias, wide), level - MAX_FUSED_LEVELS
    asked = kernel_dtype(x, dtype)
    if out is not None and asked == dtype and writes_into(forward, [out]):
        forward(x, level, edge, factor, gain, bias, dtype, out=out)
        written([out])
        return out
    result: Tensor = forward(x, level, edge, factor, gain, bias, asked)
    return result.to(dtype) if out is None else out.copy_(result)


def compute_waverec2(
    bands: Sequence[Tensor], given: Sequence[bool], height: int, width: int, mode: str, factor: float
) -> Tensor:
    """The kernel of ``wavedp::waverec2``."""
    first = check_bands(bands, given, height, width)
    rest = iter(bands)
    every = [next(rest) if there else None for there in given]
    return compute_waverec2_of(every, first, height, width, mode, factor)


def compute_waverec2_of(
    bands: Sequence[Tensor | None],  # all 3 L + 1
    first: Tensor,  # one that is there
    height: int,
    width: int,
    mode: str,
    factor: float,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`compute_waverec2` of bands and ``out`` that are checked already."""
    image: Tensor
    level = len(bands) // 3
    edge = _edge_of("waverec2", first.dtype, (height, width), level, mode)
    if level > MAX_FUSED_LEVELS and first.dtype in _HALF:
        wide = [None if band is None else band.float() for band in bands]
        image = compute_waverec2_of(wide, first.float(), height, width, mode, factor).to(first.dtype)
        return image if out is None else out.copy_(image)
    if level > MAX_FUSED_LEVELS:
        finest = 3 * MAX_FUSED_LEVELS
        coarser, approximation = bands[:-finest], None
        if any(band is not None for band in coarser):
            size = band_sizes(height, width, MAX_FUSED_LEVELS)[-1]
            approximation = compute_waverec2_of(coarser, first, *size, mode, factor)
        bands = [approximation, *bands[-finest:]]
    forward = implementation("wavelet", first.device).waverec2_forward
    if out is not None and writes_into(forward, [out]):
        forward(bands, height, width, edge, factor, out=out)
        written([out])
        return out
    image = forward(bands, height, width, edge, factor)
    return image if out is None else out.copy_(image)


def separate(x: Tensor, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[Tensor]:
    """An allocation for each result: PyTorch forbids an op whose results share one."""
    return [x.new_empty(tuple(shape), dtype=dtype) for shape in shapes]


def _wavedec2(x: Tensor, level: int, mode: str, factor: float) -> list[Tensor]:
    _edge_of("wavedec2", x.dtype, x.shape, level, mode)
    return compute_wavedec2(x, level, mode, factor, separate(x, band_shapes(x.shape, level), x.dtype))


def _wavedec2_fake(x: Tensor, level: int, mode: str, factor: float) -> list[Tensor]:
    check_dtype("wavedec2", x.dtype)
    _edge_rule("wavedec2", x.shape, level, mode)
    return separate(x, band_shapes(x.shape, level), x.dtype)


def _coarse_fake(
    x: Tensor, level: int, mode: str, factor: float, gain: float, bias: float, dtype: torch.dtype | None
) -> Tensor:
    check_dtype("coarse", x.dtype, or_bytes=True)
    _edge_rule("coarse", x.shape, level, mode)
    return x.new_empty((*x.shape[:-2], *band_sizes(x.shape[-2], x.shape[-1], level)[-1]), dtype=result_dtype(x, dtype))


def _waverec2_fake(bands: list[Tensor], given: list[bool], height: int, width: int, mode: str, factor: float) -> Tensor:
    first = check_bands(bands, given, height, width)
    _edge_rule("waverec2", (height, width), len(given) // 3, mode)
    return first.new_empty((*first.shape[:-2], height, width))


torch_library: Any = torch.library  # its functions have no types
LIBRARY = torch_library.Library("wavedp", "FRAGMENT")


def define_op(schema: str, compute: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    # The kernel of every device; which module computes is chosen inside, from the tensors' device.
    LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    torch_library.register_fake(f"wavedp::{name}", fake, lib=LIBRARY)


define_op("wavedec2(Tensor x, int level, str mode, float factor) -> Tensor[]", _wavedec2, _wavedec2_fake)
define_op(
    "waverec2(Tensor[] bands, bool[] given, SymInt height, SymInt width, str mode, float factor) -> Tensor",
    compute_waverec2,
    _waverec2_fake,
)
define_op(
    "coarse(Tensor x, int level, str mode, float factor, float gain, float bias, ScalarType? dtype) -> Tensor",
    compute_coarse,
    _coarse_fake,
)
