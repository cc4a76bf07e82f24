# SPDX-License-Identifier: Apache-2.0
"""Two-dimensional Haar transform in Triton: one pass over the image, one over the coefficients.

A row of pixels is always loaded and stored as one contiguous tile; its even and odd columns are parted in
registers (``reshape`` and ``split``, ``join`` and ``reshape``). Indexing with stride 2 would make every
access a scalar one. One warp owns a tile, so that parting the columns needs no barrier.

``edge`` is the rule for the virtual sample ``x[N]`` that completes the last pair of an axis of odd length:
0 zero, 1 ``x[N-1]``, 2 ``x[0]``, 3 ``x[N-2]``, 4 ``-x[N-1]``, 5 ``2 x[N-1] - x[N-2]``. The numbers are those
of ``wavedp.reference.wavelet.Edge``.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

ZERO = tl.constexpr(0)
REPEAT = tl.constexpr(1)
WRAP = tl.constexpr(2)
REFLECT = tl.constexpr(3)
NEGATE = tl.constexpr(4)
LINEAR = tl.constexpr(5)


@triton.jit
def _edge_source(i, N, EDGE: tl.constexpr):
    """Index read for sample ``i``: ``i`` itself, or for ``i == N`` the sample its edge rule starts from."""
    if EDGE == ZERO:
        source = i
    elif EDGE == WRAP:
        source = tl.where(i == N, 0, i)
    elif EDGE == REFLECT or EDGE == LINEAR:  # noqa: SIM109 (Triton has no `in`)
        source = tl.where(i == N, tl.maximum(N - 2, 0), i)
    else:
        source = tl.where(i == N, N - 1, i)
    return source


@triton.jit
def _complete(first, second, virtual, EDGE: tl.constexpr):
    """Second samples of pairs: where ``virtual``, finishes the rule on what ``_edge_source`` pointed at."""
    if EDGE == NEGATE:
        second = tl.where(virtual, -second, second)
    elif EDGE == LINEAR:
        second = tl.where(virtual, 2.0 * first - second, second)
    return second


@triton.jit
def _fold(first, second, virtual, i, N, EDGE: tl.constexpr):
    """Adjoint of the edge rule on pairs ``i``: ``virtual`` goes to the samples it was made of."""
    in_last = 2 * i + 1 == N  # first is x[N-1]
    before_last = 2 * i + 1 == N - 2  # second is x[N-2]
    if EDGE == REPEAT:
        first += tl.where(in_last, virtual, 0.0)
    elif EDGE == NEGATE:
        first -= tl.where(in_last, virtual, 0.0)
    elif EDGE == WRAP:
        first += tl.where((i == 0) & (N % 2 == 1), virtual, 0.0)
    elif EDGE == REFLECT:
        second += tl.where(before_last, virtual, 0.0)
    elif EDGE == LINEAR:
        # An axis of one sample has no x[N-2]: its line is flat.
        first += tl.where(in_last, tl.where(N == 1, virtual, 2.0 * virtual), 0.0)
        second -= tl.where(before_last, virtual, 0.0)
    return first, second


@triton.jit
def _load_wide(ptrs, mask):
    """Loads in the precision of the arithmetic: float64 as it is, anything narrower as float32."""
    value = tl.load(ptrs, mask=mask, other=0.0)
    if value.dtype != tl.float64:
        value = value.to(tl.float32)
    return value


@triton.jit
def _tile_indices(h, w, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Plane, first coefficient row and first coefficient column of this program's tile, as int64."""
    tiles_w = (w + BLOCK_W - 1) // BLOCK_W
    tiles_h = (h + BLOCK_H - 1) // BLOCK_H
    pid = tl.program_id(0)
    plane = (pid // (tiles_w * tiles_h)).to(tl.int64)
    row = (pid // tiles_w % tiles_h).to(tl.int64) * BLOCK_H
    col = (pid % tiles_w).to(tl.int64) * BLOCK_W
    return plane, row, col


@triton.jit(do_not_specialize=["N", "H", "h"])
def _dwt2_forward_kernel(
    x_ptr,  # [N, H, W], strides in elements
    bands_ptr,  # [4, N, h, w], contiguous
    stride_xn,
    stride_xh,
    stride_xw,
    N,
    H,
    W,
    h,  # ceil(H / 2)
    w,  # ceil(W / 2); an argument, so that its divisibility by 16 is known and stores are vectors
    EDGE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    plane, row, col = _tile_indices(h, w, BLOCK_H, BLOCK_W)
    rows = row + tl.arange(0, BLOCK_H)[:, None]
    cols = col + tl.arange(0, BLOCK_W)[None, :]
    pixels = _edge_source(2 * col + tl.arange(0, 2 * BLOCK_W)[None, :], W, EDGE)
    lower = _edge_source(2 * rows + 1, H, EDGE)

    x_ptr += plane * stride_xn
    top = _load_wide(x_ptr + 2 * rows * stride_xh + pixels * stride_xw, (2 * rows < H) & (pixels < W))
    bottom = _load_wide(x_ptr + lower * stride_xh + pixels * stride_xw, (lower < H) & (pixels < W))
    a, b = tl.split(tl.reshape(top, (BLOCK_H, BLOCK_W, 2)))
    c, d = tl.split(tl.reshape(bottom, (BLOCK_H, BLOCK_W, 2)))
    b = _complete(a, b, 2 * cols + 1 == W, EDGE)
    d = _complete(c, d, 2 * cols + 1 == W, EDGE)
    c = _complete(a, c, 2 * rows + 1 == H, EDGE)
    d = _complete(b, d, 2 * rows + 1 == H, EDGE)

    mask = (rows < h) & (cols < w)
    tl.store(bands_ptr + (plane * h + rows) * w + cols, ((a + b) + (c + d)) * 0.5, mask=mask)
    plane += N
    tl.store(bands_ptr + (plane * h + rows) * w + cols, ((a + b) - (c + d)) * 0.5, mask=mask)
    plane += N
    tl.store(bands_ptr + (plane * h + rows) * w + cols, ((a - b) + (c - d)) * 0.5, mask=mask)
    plane += N
    tl.store(bands_ptr + (plane * h + rows) * w + cols, ((a - b) - (c - d)) * 0.5, mask=mask)


@triton.jit
def _load_band(band_ptr, offsets, mask):
    """A band's tile, or zeros where the band is absent."""
    return (offsets * 0).to(tl.float32) if band_ptr is None else _load_wide(band_ptr + offsets, mask)


@triton.jit
def _blocks(ll_ptr, lh_ptr, hl_ptr, hh_ptr, plane, rows, cols, h, w):
    """Pixel blocks ``[[a, b], [c, d]]`` of the coefficients at ``rows`` x ``cols``."""
    mask = (rows < h) & (cols < w)
    offsets = (plane * h + rows) * w + cols
    ll = _load_band(ll_ptr, offsets, mask)
    lh = _load_band(lh_ptr, offsets, mask)
    hl = _load_band(hl_ptr, offsets, mask)
    hh = _load_band(hh_ptr, offsets, mask)
    a = ((ll + lh) + (hl + hh)) * 0.5
    b = ((ll + lh) - (hl + hh)) * 0.5
    c = ((ll - lh) + (hl - hh)) * 0.5
    d = ((ll - lh) - (hl - hh)) * 0.5
    return a, b, c, d


@triton.jit
def _column_folded_blocks(ll_ptr, lh_ptr, hl_ptr, hh_ptr, plane, rows, cols, W, h, w, EDGE: tl.constexpr):
    """``_blocks`` with the virtual pixel column folded back into the columns it was made of."""
    a, b, c, d = _blocks(ll_ptr, lh_ptr, hl_ptr, hh_ptr, plane, rows, cols, h, w)
    if EDGE != ZERO:
        _, upper, _, under = _blocks(ll_ptr, lh_ptr, hl_ptr, hh_ptr, plane, rows, w - 1, h, w)
        a, b = _fold(a, b, upper, cols, W, EDGE)
        c, d = _fold(c, d, under, cols, W, EDGE)
    return a, b, c, d


@triton.jit(do_not_specialize=["H", "h"])
def _idwt2_forward_kernel(
    ll_ptr,  # each band [N, h, w], contiguous, or None for zeros
    lh_ptr,
    hl_ptr,
    hh_ptr,
    x_ptr,  # [N, H, W], contiguous
    H,
    W,
    h,  # ceil(H / 2)
    w,  # ceil(W / 2)
    EDGE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    plane, row, col = _tile_indices(h, w, BLOCK_H, BLOCK_W)
    rows = row + tl.arange(0, BLOCK_H)[:, None]
    cols = col + tl.arange(0, BLOCK_W)[None, :]
    a, b, c, d = _column_folded_blocks(ll_ptr, lh_ptr, hl_ptr, hh_ptr, plane, rows, cols, W, h, w, EDGE)
    if EDGE != ZERO:
        _, _, left, right = _column_folded_blocks(ll_ptr, lh_ptr, hl_ptr, hh_ptr, plane, h - 1, cols, W, h, w, EDGE)
        a, c = _fold(a, c, left, rows, H, EDGE)
        b, d = _fold(b, d, right, rows, H, EDGE)

    pixels = 2 * col + tl.arange(0, 2 * BLOCK_W)[None, :]
    top = tl.reshape(tl.join(a, b), (BLOCK_H, 2 * BLOCK_W))
    bottom = tl.reshape(tl.join(c, d), (BLOCK_H, 2 * BLOCK_W))
    upper_row = plane * H + 2 * rows
    tl.store(x_ptr + upper_row * W + pixels, top, mask=(2 * rows < H) & (pixels < W))
    tl.store(x_ptr + (upper_row + 1) * W + pixels, bottom, mask=(2 * rows + 1 < H) & (pixels < W))


INTERPRETED = not isinstance(_dwt2_forward_kernel, triton.JITFunction)
"""True if this module was imported under ``TRITON_INTERPRET=1``: its kernels then take CPU tensors."""


def _tile(h: int, w: int) -> dict[str, int]:
    """Tile of 128 coefficients, 16 pixels a lane: wide for wide images, tall for narrow ones."""
    block_w = min(max(triton.next_power_of_2(w), 8), 128)
    return {"BLOCK_H": 128 // block_w, "BLOCK_W": block_w, "num_warps": 1}


def _grid(n: int, h: int, w: int, tile: dict[str, int]) -> tuple[int]:
    return (n * triton.cdiv(h, tile["BLOCK_H"]) * triton.cdiv(w, tile["BLOCK_W"]),)


def _on_device(x: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def dwt2_forward(x: torch.Tensor, edge: int) -> torch.Tensor:
    """One level of the transform.

    Args:
        x: ``[..., H, W]``, any strides, float16, bfloat16, float32 or float64.
        edge: rule for odd sizes, see the module.

    Returns:
        LL, LH, HL, HH as ``[4, ..., h, w]``, contiguous, in the dtype of ``x``.
    """
    *lead, H, W = x.shape
    h, w = (H + 1) // 2, (W + 1) // 2
    bands = torch.empty((4, *lead, h, w), dtype=x.dtype, device=x.device)
    if bands.numel() == 0:
        return bands
    planes = x.reshape(-1, H, W)
    tile = _tile(h, w)
    with _on_device(x):
        _dwt2_forward_kernel[_grid(planes.shape[0], h, w, tile)](
            planes, bands, *planes.stride(), *planes.shape, h, w, EDGE=_needed_edge(edge, H, W), **tile
        )
    return bands


def idwt2_forward(
    ll: torch.Tensor | None,
    lh: torch.Tensor | None,
    hl: torch.Tensor | None,
    hh: torch.Tensor | None,
    height: int,
    width: int,
    edge: int,
) -> torch.Tensor:
    """Adjoint of :func:`dwt2_forward` under ``edge``: with edge 0, or even sizes, the inverse transform.

    Args:
        ll, lh, hl, hh: bands ``[..., h, w]`` of one dtype; None stands for zeros, at least one is given.
        height, width: size of the result, ``h = ceil(height / 2)``, ``w = ceil(width / 2)``.
        edge: rule for odd sizes, see the module.

    Returns:
        ``[..., height, width]``, contiguous, in the dtype of the bands.
    """
    bands = [None if band is None else band.contiguous() for band in (ll, lh, hl, hh)]
    given = next(band for band in bands if band is not None)
    *lead, h, w = given.shape
    x = torch.empty((*lead, height, width), dtype=given.dtype, device=given.device)
    if x.numel() == 0:
        return x
    tile = _tile(h, w)
    with _on_device(x):
        _idwt2_forward_kernel[_grid(given.numel() // (h * w), h, w, tile)](
            *bands, x, height, width, h, w, EDGE=_needed_edge(edge, height, width), **tile
        )
    return x


def _needed_edge(edge: int, H: int, W: int) -> int:
    """Even sizes need no rule: they all share the kernel that reads nothing twice."""
    return int(edge) if H % 2 or W % 2 else 0
