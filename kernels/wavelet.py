# SPDX-License-Identifier: Apache-2.0
"""Two-dimensional Haar transform in Triton: up to three levels a launch, one read and one write.

The definition is ``wavedp.reference.wavelet``, whose bits these kernels return; ``kernels/haar.py`` says how a tile is
laid out. Where a size is even at every level of a launch, the levels share it and only coefficients are written. A
level with an odd size takes a launch of its own, which knows the edge rules, and passes its LL on in the precision of
the arithmetic, so that half precision is rounded once however many launches there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from wavedp.kernels.haar import (
    EXACT,
    ZERO,
    Images,
    Step,
    analyse,
    analyse_tile,
    complete,
    edge_source,
    fold,
    images,
    join_columns,
    join_rows,
    launch_grid,
    load_wide,
    on_device,
    split_columns,
    split_rows,
    steps,
    synthesise,
    synthesise_tile,
    tile_indices,
    tile_of,
    tile_origin,
    wide_dtype,
)


@triton.jit
def _store_band(
    band_ptr, value, plane, row, col, h, w, SCALE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr
):
    """``value``, a tile of a contiguous band ``[planes, h SCALE, w SCALE]``."""
    rows, cols, mask = tile_indices(row, col, h, w, SCALE, BLOCK_H, BLOCK_W)
    offsets = (plane.to(tl.int64) * (h * SCALE) + rows) * (w * SCALE) + cols
    tl.store(band_ptr + offsets, value, mask=mask)


@triton.jit
def _load_band(band_ptr, plane, row, col, h, w, SCALE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """A tile of a contiguous band ``[planes, h SCALE, w SCALE]``, zeros where the band is absent."""
    if band_ptr is None:
        value = tl.full((SCALE, BLOCK_H, BLOCK_W * SCALE), 0.0, tl.float32)
    else:
        rows, cols, mask = tile_indices(row, col, h, w, SCALE, BLOCK_H, BLOCK_W)
        offsets = (plane.to(tl.int64) * (h * SCALE) + rows) * (w * SCALE) + cols
        value = load_wide(band_ptr + offsets, mask)
    return value


@triton.jit
def _store_details(
    bands, lh, hl, hh, plane, row, col, h, w, K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr
):
    """The details of the level ``K`` levels finer than LL, to their places in the list of ``bands``."""
    SCALE: tl.constexpr = 1 << K
    FIRST: tl.constexpr = 3 * K + 1
    _store_band(bands[FIRST], lh, plane, row, col, h, w, SCALE, BLOCK_H, BLOCK_W)
    _store_band(bands[FIRST + 1], hl, plane, row, col, h, w, SCALE, BLOCK_H, BLOCK_W)
    _store_band(bands[FIRST + 2], hh, plane, row, col, h, w, SCALE, BLOCK_H, BLOCK_W)


@triton.jit(do_not_specialize=["inner", "H", "W", "h"])
def _wavedec2_forward_kernel(
    x_ptr,  # [outer, inner, H, W], strides in elements
    bands,  # LL, then LH, HL, HH of each level from the coarsest: contiguous [outer, inner, h_k, w_k]; or LL alone
    stride_xo,
    stride_xi,
    stride_xh,
    stride_xw,
    inner,
    H,
    W,
    h,  # of LL: ceil(H / 2^LEVELS)
    w,  # of LL; an argument, so that its divisibility by 16 is known and stores are vectors
    factor,
    gain,  # of bytes: a sample is gain * x + bias
    bias,
    LEVELS: tl.constexpr,
    EDGE: tl.constexpr,  # EXACT, or LEVELS is 1
    DETAILS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    plane, row, col = tile_origin(h, w, BLOCK_H, BLOCK_W)
    rows, cols, mask = tile_indices(row, col, h, w, 1 << LEVELS, BLOCK_H, BLOCK_W)
    x_ptr += (plane // inner).to(tl.int64) * stride_xo + (plane % inner).to(tl.int64) * stride_xi
    if EDGE != EXACT:
        rows, cols = edge_source(rows, H, EDGE), edge_source(cols, W, EDGE)
        mask = (rows < H) & (cols < W)
    x = load_wide(x_ptr + rows * stride_xh + cols * stride_xw, mask, gain, bias)

    for k in tl.static_range(LEVELS):
        if EDGE == EXACT:
            x, lh, hl, hh = analyse_tile(x, factor)
        else:
            rows, cols, _ = tile_indices(row, col, h, w, 1, BLOCK_H, BLOCK_W)
            top, bottom = split_rows(x)
            a, b = split_columns(top)
            c, d = split_columns(bottom)
            b = complete(a, b, 2 * cols + 1 == W, EDGE)
            d = complete(c, d, 2 * cols + 1 == W, EDGE)
            c = complete(a, c, 2 * rows + 1 == H, EDGE)
            d = complete(b, d, 2 * rows + 1 == H, EDGE)
            x, lh, hl, hh = analyse(a, b, c, d, factor)
        if DETAILS:
            _store_details(bands, lh, hl, hh, plane, row, col, h, w, LEVELS - 1 - k, BLOCK_H, BLOCK_W)
    _store_band(bands[0], x, plane, row, col, h, w, 1, BLOCK_H, BLOCK_W)


@triton.jit
def _load_details(bands, plane, row, col, h, w, K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """LH, HL, HH of the level ``K`` levels finer than LL."""
    SCALE: tl.constexpr = 1 << K
    FIRST: tl.constexpr = 3 * K + 1
    lh = _load_band(bands[FIRST], plane, row, col, h, w, SCALE, BLOCK_H, BLOCK_W)
    hl = _load_band(bands[FIRST + 1], plane, row, col, h, w, SCALE, BLOCK_H, BLOCK_W)
    hh = _load_band(bands[FIRST + 2], plane, row, col, h, w, SCALE, BLOCK_H, BLOCK_W)
    return lh, hl, hh


@triton.jit
def _load_line(band_ptr, offsets, mask):
    return tl.full(offsets.shape, 0.0, tl.float32) if band_ptr is None else load_wide(band_ptr + offsets, mask)


@triton.jit
def _blocks(bands, plane, rows, cols, mask, h, w, factor):
    """Pixel blocks ``[[a, b], [c, d]]`` of the coefficients at ``rows`` x ``cols`` of the only level."""
    offsets = (plane.to(tl.int64) * h + rows) * w + cols
    ll = _load_line(bands[0], offsets, mask)
    lh = _load_line(bands[1], offsets, mask)
    hl = _load_line(bands[2], offsets, mask)
    hh = _load_line(bands[3], offsets, mask)
    return synthesise(ll, lh, hl, hh, factor)


@triton.jit
def _column_folded_blocks(bands, plane, rows, cols, mask, W, h, w, factor, EDGE: tl.constexpr):
    """``_blocks`` with the virtual pixel column folded back into the columns it was made of."""
    a, b, c, d = _blocks(bands, plane, rows, cols, mask, h, w, factor)
    if EDGE != ZERO:
        at_border = mask & ((cols == 0) | (cols >= w - 2))
        _, upper, _, under = _blocks(bands, plane, rows, cols * 0 + (w - 1), at_border, h, w, factor)
        a, b = fold(a, b, upper, cols, W, EDGE)
        c, d = fold(c, d, under, cols, W, EDGE)
    return a, b, c, d


@triton.jit
def _folded_blocks(bands, plane, rows, cols, mask, H, W, h, w, factor, EDGE: tl.constexpr):
    """``_column_folded_blocks`` with the virtual pixel row folded back too: columns first, then rows."""
    a, b, c, d = _column_folded_blocks(bands, plane, rows, cols, mask, W, h, w, factor, EDGE)
    if EDGE != ZERO:
        at_border = mask & ((rows == 0) | (rows >= h - 2))
        _, _, left, right = _column_folded_blocks(
            bands, plane, rows * 0 + (h - 1), cols, at_border, W, h, w, factor, EDGE
        )
        a, c = fold(a, c, left, rows, H, EDGE)
        b, d = fold(b, d, right, rows, H, EDGE)
    return a, b, c, d


@triton.jit(do_not_specialize=["H", "W", "h"])
def _waverec2_forward_kernel(
    bands,  # LL, then LH, HL, HH of each level from the coarsest: contiguous [planes, h_k, w_k], or None for zeros
    x_ptr,  # [planes, H, W], contiguous
    H,
    W,
    h,  # of LL: ceil(H / 2^LEVELS)
    w,
    factor,
    LEVELS: tl.constexpr,
    EDGE: tl.constexpr,  # EXACT, or LEVELS is 1
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    plane, row, col = tile_origin(h, w, BLOCK_H, BLOCK_W)
    if EDGE == EXACT:
        x = _load_band(bands[0], plane, row, col, h, w, 1, BLOCK_H, BLOCK_W)
        for k in tl.static_range(LEVELS):
            lh, hl, hh = _load_details(bands, plane, row, col, h, w, k, BLOCK_H, BLOCK_W)
            x = synthesise_tile(x, lh, hl, hh, factor)
        _store_band(x_ptr, x, plane, row, col, h, w, 1 << LEVELS, BLOCK_H, BLOCK_W)
    else:
        rows, cols, mask = tile_indices(row, col, h, w, 1, BLOCK_H, BLOCK_W)
        a, b, c, d = _folded_blocks(bands, plane, rows, cols, mask, H, W, h, w, factor, EDGE)
        x = join_rows(join_columns(a, b), join_columns(c, d))
        rows, cols, _ = tile_indices(row, col, h, w, 2, BLOCK_H, BLOCK_W)
        tl.store(x_ptr + (plane.to(tl.int64) * H + rows) * W + cols, x, mask=(rows < H) & (cols < W))


INTERPRETED = not isinstance(_wavedec2_forward_kernel, triton.JITFunction)
"""True if this module was imported under ``TRITON_INTERPRET=1``: its kernels then take CPU tensors."""


def _step_bands(bands: Sequence[torch.Tensor | None], step: Step) -> list[torch.Tensor | None]:
    """The details that ``step`` makes or reads, from the coarsest level."""
    finest = len(bands) - 3 * step.first
    return list(bands[finest - 3 * step.levels : finest])


def _allocate(source: Images, level: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """The bands as contiguous views of one allocation."""
    lead = source.x.shape[:-2]
    shapes = []
    height, width = source.height, source.width
    for _ in range(level):
        height, width = (height + 1) // 2, (width + 1) // 2
        shapes += [(*lead, height, width)] * 3
    shapes = [(*lead, height, width), *reversed(shapes)]
    sizes = [source.outer * source.inner * h * w for *_, h, w in shapes]
    flat = torch.empty(sum(sizes), dtype=dtype, device=source.x.device)
    return [flat[end - size : end].view(shape) for shape, size, end in zip(shapes, sizes, accumulate(sizes))]


def _launch_forward(
    source: Images, bands: Sequence[torch.Tensor], level: int, edge: int, factor: float, gain: float, bias: float
) -> None:
    """Writes ``bands``: all of them, or LL alone."""
    x, planes, lead = source.x, source.outer * source.inner, source.x.shape[:-2]
    with on_device(x):
        for step in (schedule := steps(source.height, source.width, level, edge)):
            h, w = step.cells
            last = step is schedule[-1]
            ll = bands[0] if last else x.new_empty((*lead, h, w), dtype=wide_dtype(x.dtype))
            details = _step_bands(bands, step) if len(bands) > 1 else []
            tile = tile_of(step.levels, h, w, source.x.dtype, dense=source.strides[3] == 1)
            _wavedec2_forward_kernel[launch_grid(planes, h, w, tile)](
                source.x, (ll, *details), *source.strides, source.inner, step.height, step.width, h, w,
                factor, gain, bias, LEVELS=step.levels, EDGE=step.edge, DETAILS=bool(details), **tile,
            )  # fmt: skip
            source = images(ll)


def wavedec2_forward(
    x: torch.Tensor, level: int, edge: int, factor: float, out: list[torch.Tensor] | None = None
) -> list[torch.Tensor]:
    """The bands of ``level`` >= 1 levels.

    Args:
        x: ``[..., H, W]``, any strides, float16, bfloat16, float32 or float64.
        edge: rule for odd sizes, see ``kernels/haar.py``.
        factor: of one level; 1/2 is orthonormal. A power of two.
        out: contiguous tensors to write, shapes and dtype as returned.

    Returns:
        LL_L, LH_L, HL_L, HH_L, LH_(L-1), ..., HH_1 in the dtype of ``x``; ``out``, or views of one allocation.
    """
    source = images(x)
    bands = _allocate(source, level, x.dtype) if out is None else out
    if x.numel() > 0:
        _launch_forward(source, bands, level, edge, factor, 1.0, 0.0)
    return bands


def coarse_forward(
    x: torch.Tensor,
    level: int,
    edge: int,
    factor: float,
    gain: float = 1.0,
    bias: float = 0.0,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """LL of ``level`` >= 1 levels alone; as :func:`wavedec2_forward`, and ``x`` may be uint8.

    Args:
        gain, bias: a sample of bytes is ``gain * x + bias``.
        dtype: of the result; that of ``x``, or float32 for bytes.
    """
    if out is None:
        dtype = dtype or (torch.float32 if x.dtype == torch.uint8 else x.dtype)
        h, w = -(-x.shape[-2] // 2**level), -(-x.shape[-1] // 2**level)
        out = torch.empty((*x.shape[:-2], h, w), dtype=dtype, device=x.device)
    if x.numel() > 0:
        _launch_forward(images(x), [out], level, edge, factor, gain, bias)
    return out


def waverec2_forward(
    bands: Sequence[torch.Tensor | None],
    height: int,
    width: int,
    edge: int,
    factor: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Transpose of :func:`wavedec2_forward` under ``edge``: with edge 0, or even sizes, the inverse up to the factor.

    Args:
        bands: ``3 L + 1`` bands ``[..., h_k, w_k]`` of one dtype, in the order of :func:`wavedec2_forward`; None
            stands for zeros, at least one is given.
        height, width: size of the result.

    Returns:
        ``[..., height, width]``, contiguous, in the dtype of the bands; ``out`` if given.
    """
    bands = [None if band is None else band.contiguous() for band in bands]
    given = next(band for band in bands if band is not None)
    *lead, _, _ = given.shape
    if out is None:
        out = torch.empty((*lead, height, width), dtype=given.dtype, device=given.device)
    if out.numel() == 0:
        return out
    planes = out.numel() // (height * width)
    ll = bands[0]
    with on_device(out):
        for step in reversed(steps(height, width, len(bands) // 3, edge)):
            details = _step_bands(bands, step)
            if ll is None and all(band is None for band in details):
                continue
            wide = wide_dtype(out.dtype)
            x = out.new_empty((*lead, step.height, step.width), dtype=wide) if step.first else out
            h, w = step.cells
            tile = tile_of(step.levels, h, w, out.dtype)
            _waverec2_forward_kernel[launch_grid(planes, h, w, tile)](
                (ll, *details), x, step.height, step.width, h, w, factor,
                LEVELS=step.levels, EDGE=step.edge, **tile,
            )  # fmt: skip
            ll = x
    return out
