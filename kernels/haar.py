# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels of the Haar transform share: the arithmetic of a level, edge rules, tiles, launches.

A tile is ``[rows of a cell, cell rows, columns]``, where a cell is the ``2^n x 2^n`` pixels over one coefficient of
LL_n. A row is always loaded and stored as contiguous columns, and its even and odd samples are parted in registers
(``reshape`` and ``split``, ``join`` and ``reshape``): indexing with stride 2 would make every access a scalar one.
The rows of a cell are an axis of their own because the layouts that Triton chooses never part it over lanes or warps,
so that sums of rows stay within a lane. One warp owns a tile: what is left to exchange needs no barrier of a block.

``EDGE`` is the rule for the virtual sample ``x[N]`` that completes the last pair of an axis of odd length: 0 zero,
1 ``x[N-1]``, 2 ``x[0]``, 3 ``x[N-2]``, 4 ``-x[N-1]``, 5 ``2 x[N-1] - x[N-2]``. The numbers are those of
``wavedp.reference.wavelet.Edge``. -1 says that no axis is odd at any level, which lets levels share a launch.
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

EXACT = tl.constexpr(-1)
ZERO = tl.constexpr(0)
REPEAT = tl.constexpr(1)
WRAP = tl.constexpr(2)
REFLECT = tl.constexpr(3)
NEGATE = tl.constexpr(4)
LINEAR = tl.constexpr(5)


@triton.jit
def edge_source(i, N, EDGE: tl.constexpr):
    """Index read for sample ``i``: ``i`` itself, or for ``i == N`` the sample its edge rule starts from."""
    if EDGE == ZERO or EDGE == EXACT:  # noqa: SIM109 (Triton has no `in`)
        source = i
    elif EDGE == WRAP:
        source = tl.where(i == N, 0, i)
    elif EDGE == REFLECT or EDGE == LINEAR:  # noqa: SIM109
        source = tl.where(i == N, tl.maximum(N - 2, 0), i)
    else:
        source = tl.where(i == N, N - 1, i)
    return source


@triton.jit
def complete(first, second, virtual, EDGE: tl.constexpr):
    """Second samples of pairs: where ``virtual``, finishes the rule on what ``edge_source`` pointed at."""
    if EDGE == NEGATE:
        second = tl.where(virtual, -second, second)
    elif EDGE == LINEAR:
        second = tl.where(virtual, 2.0 * first - second, second)
    return second


@triton.jit
def fold(first, second, virtual, i, N, EDGE: tl.constexpr):
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
        # An axis of one sample has no x[N-2] and repeats x[0], here and in LINEAR.
        first += tl.where(in_last & (N == 1), virtual, 0.0)
        second += tl.where(before_last, virtual, 0.0)
    elif EDGE == LINEAR:
        first += tl.where(in_last, tl.where(N == 1, virtual, 2.0 * virtual), 0.0)
        second -= tl.where(before_last, virtual, 0.0)
    return first, second


@triton.jit
def load_wide(ptrs, mask, gain=1.0, bias=0.0):
    """Loads in the precision of the arithmetic: float64 as it is, narrower floats as float32, bytes as
    ``gain * x + bias``. Zeros where not ``mask``."""
    value = tl.load(ptrs, mask=mask, other=0)
    if value.dtype == tl.uint8:
        value = tl.where(mask, value.to(tl.float32) * gain + bias, 0.0)
    elif value.dtype != tl.float64:
        value = value.to(tl.float32)
    return value


@triton.jit
def split_rows(x):
    """``[2 k, cells, columns]`` -> its even and its odd rows."""
    K: tl.constexpr = x.shape[0] // 2
    return tl.split(tl.permute(tl.reshape(x, (K, 2, x.shape[1], x.shape[2])), (0, 2, 3, 1)))


@triton.jit
def split_columns(x):
    """``[k, cells, 2 columns]`` -> its even and its odd columns."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] // 2, 2)))


@triton.jit
def join_rows(top, bottom):
    pairs = tl.permute(tl.join(top, bottom), (0, 3, 1, 2))
    return tl.reshape(pairs, (2 * top.shape[0], top.shape[1], top.shape[2]))


@triton.jit
def join_columns(even, odd):
    return tl.reshape(tl.join(even, odd), (even.shape[0], even.shape[1], 2 * even.shape[2]))


@triton.jit
def analyse(a, b, c, d, factor):
    """LL, LH, HL, HH of the blocks ``[[a, b], [c, d]]``: sums of rows first, then of columns."""
    low_even, low_odd, high_even, high_odd = a + c, b + d, a - c, b - d
    ll = (low_even + low_odd) * factor
    lh = (high_even + high_odd) * factor
    hl = (low_even - low_odd) * factor
    hh = (high_even - high_odd) * factor
    return ll, lh, hl, hh


@triton.jit
def analyse_tile(x, factor):
    """A level of a tile ``[2 k, cells, 2 columns]``: LL, LH, HL, HH as ``[k, cells, columns]``."""
    top, bottom = split_rows(x)
    a, b = split_columns(top)
    c, d = split_columns(bottom)
    return analyse(a, b, c, d, factor)


@triton.jit
def synthesise(ll, lh, hl, hh, factor):
    """Transpose of ``analyse``: the blocks ``[[a, b], [c, d]]``. Absent bands are the scalar 0.0."""
    top, top_step, bottom, bottom_step = ll + lh, hl + hh, ll - lh, hl - hh
    a = (top + top_step) * factor
    b = (top - top_step) * factor
    c = (bottom + bottom_step) * factor
    d = (bottom - bottom_step) * factor
    return a, b, c, d


@triton.jit
def synthesise_tile(ll, lh, hl, hh, factor):
    """Transpose of ``analyse_tile``."""
    a, b, c, d = synthesise(ll, lh, hl, hh, factor)
    return join_rows(join_columns(a, b), join_columns(c, d))


@triton.jit
def tile_origin(h, w, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Plane, first cell row and first cell column of this program's tile among planes of ``h x w`` cells."""
    tiles_h = (h + BLOCK_H - 1) // BLOCK_H
    tiles_w = (w + BLOCK_W - 1) // BLOCK_W
    pid = tl.program_id(0)
    plane = pid // (tiles_w * tiles_h)
    row = pid // tiles_w % tiles_h * BLOCK_H
    col = pid % tiles_w * BLOCK_W
    return plane, row, col


@triton.jit
def tile_indices(row, col, h, w, SCALE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Rows, columns and mask of a tile on a map with ``SCALE`` x ``SCALE`` samples to a cell, as int64."""
    cells = row + tl.arange(0, BLOCK_H)[None, :, None]
    rows = (cells * SCALE + tl.arange(0, SCALE)[:, None, None]).to(tl.int64)
    cols = (col * SCALE + tl.arange(0, BLOCK_W * SCALE)[None, None, :]).to(tl.int64)
    return rows, cols, (cells < h) & (cols < w * SCALE)


class Images(NamedTuple):
    """Images of any leading dimensions as planes of two leading axes, with their strides in elements."""

    x: torch.Tensor
    outer: int
    inner: int
    height: int
    width: int
    strides: tuple[int, int, int, int]  # outer, inner, rows, columns


def images(x: torch.Tensor) -> Images:
    """``x`` ``[..., H, W]`` without a copy where its leading dimensions collapse into two: NCHW, channels_last,
    slices and expansions of either do."""
    if x.numel() == 0:
        return Images(x, 0, 1, x.shape[-2], x.shape[-1], (0, 0, 0, 0))
    leading: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-2], x.stride()[:-2]):
        if size == 1:
            continue
        if leading and leading[-1][1] == size * stride:
            leading[-1] = (leading[-1][0] * size, stride)
        else:
            leading.append((size, stride))
    if len(leading) > 2:
        return images(x.contiguous())
    (outer, stride_outer), (inner, stride_inner) = ([(1, 0)] * 2 + leading)[-2:]
    return Images(x, outer, inner, x.shape[-2], x.shape[-1], (stride_outer, stride_inner, x.stride(-2), x.stride(-1)))


class Step(NamedTuple):
    """Levels that one launch computes."""

    first: int  # levels done before, on the way from the image
    levels: int
    height: int  # of the image, or of the LL, that it starts from
    width: int
    edge: int  # EXACT, or the rule of its only level

    @property
    def cells(self) -> tuple[int, int]:
        return -(-self.height // 2**self.levels), -(-self.width // 2**self.levels)


MAX_LEVELS = 3  # of a launch: an 8 x 8 cell a lane is 64 registers of float32


@functools.lru_cache(maxsize=1024)
def steps(height: int, width: int, level: int, edge: int) -> tuple[Step, ...]:
    """How ``level`` levels are parted into launches: up to three together while no size is odd, odd sizes alone."""
    found = []
    first = 0
    while first < level:
        levels = min(MAX_LEVELS, level - first)
        while levels > 1 and (height % 2**levels or width % 2**levels):
            levels -= 1
        step = Step(first, levels, height, width, int(edge) if height % 2 or width % 2 else EXACT.value)
        found.append(step)
        first, (height, width) = first + levels, step.cells
    return tuple(found)


def tile_of(levels: int, h: int, w: int, dtype: torch.dtype, dense: bool = True) -> dict[str, int]:
    """Tile of 16 to 64 pixels a lane, wide for wide images and tall for narrow ones, so that a lane's share of the
    finest details is 16 bytes. Where neighbours in a row are not ``dense`` in memory, lanes take single pixels and
    pass them on to where they are summed, which takes twice the registers: 16 pixels a lane there."""
    cells = {0: 256, 1: 128, 2: 64, 3: 32}[levels]
    if not dense:
        cells = 128 >> 2 * (levels - 1)
    elif dtype == torch.float64 and levels > 1:
        cells //= 2  # for want of registers
    elif (dtype.itemsize == 2 and levels == 1) or dtype == torch.uint8:
        cells *= 2
    block_w = min(triton.next_power_of_2(w), cells)
    return {"BLOCK_H": cells // block_w, "BLOCK_W": block_w, "num_warps": 1}


def launch_grid(planes: int, h: int, w: int, tile: dict[str, int]) -> tuple[int]:
    return (planes * triton.cdiv(h, tile["BLOCK_H"]) * triton.cdiv(w, tile["BLOCK_W"]),)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the arithmetic, and of what one launch leaves to the next."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
