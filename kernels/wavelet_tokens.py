# SPDX-License-Identifier: Apache-2.0
"""Wavelet tokens in Triton: transform, normalisation and patches of every scale in one pass, and its inverse.

The definition is ``wavedp.reference.wavelet_tokens``. A tile is that of ``kernels/haar.py``; what is written or read in
place of bands are rows of patches. The columns of a patch of LL are given as ``Q_UNIT``, their largest power of two,
times the odd ``q_odd``: the compiler then sees how many neighbours one access may take, and where ``q_odd`` is 1,
which Triton specialises, no division is left. More than three levels take another launch on the float32 LL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from wavedp.kernels.haar import (
    Step,
    analyse_tile,
    launch_grid,
    load_wide,
    on_device,
    steps,
    synthesise_tile,
    tile_indices,
    tile_of,
    tile_origin,
    wide_dtype,
)


@triton.jit
def _map_offsets(plane, row, col, h, w, SCALE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Offsets and mask of a tile on contiguous maps ``[planes, h SCALE, w SCALE]``."""
    rows, cols, mask = tile_indices(row, col, h, w, SCALE, BLOCK_H, BLOCK_W)
    return (plane.to(tl.int64) * (h * SCALE) + rows) * (w * SCALE) + cols, mask


@triton.jit
def _token_offsets(
    image,
    channel,
    channels,  # of the scale
    row,
    col,
    p,
    q_odd,
    grid_h,
    grid_w,
    SCALE: tl.constexpr,
    Q_UNIT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Offsets and mask of a tile in tokens ``[B, grid_h grid_w, channels, p SCALE, q SCALE]``."""
    cells = row + tl.arange(0, BLOCK_H)[None, :, None]
    cols = col * SCALE + tl.arange(0, BLOCK_W * SCALE)[None, None, :]
    q = q_odd * (Q_UNIT * SCALE)
    piece = (p * SCALE).to(tl.int64) * q  # values of a channel in a token
    first_token = (image * grid_h + cells // p).to(tl.int64) * grid_w
    row_in_piece = cells % p * SCALE + tl.arange(0, SCALE)[:, None, None]
    row_offsets = (first_token * channels + channel) * piece + row_in_piece * q
    col_offsets = (cols // q).to(tl.int64) * channels * piece + cols % q
    return row_offsets + col_offsets, (cells < grid_h * p) & (cols < grid_w * q)


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _store_scale(
    token_ptr, value, shift_ptr, scale_ptr, partial_ptr, image, channel, channels, index, row, col, p, q_odd, grid_h,
    grid_w, SCALE: tl.constexpr, Q_UNIT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One channel of a scale; ``index`` is its place in the list of the channels of all scales."""
    index = index.to(tl.int64)
    if partial_ptr is not None:
        tl.store(partial_ptr + index, tl.reduce(value * value, None, _add))
    if shift_ptr is not None:
        value = (value - tl.load(shift_ptr + index)) * tl.load(scale_ptr + index)
    offsets, mask = _token_offsets(
        image, channel, channels, row, col, p, q_odd, grid_h, grid_w, SCALE, Q_UNIT, BLOCK_H, BLOCK_W
    )
    tl.store(token_ptr + offsets, value, mask=mask)


@triton.jit
def _load_scale(
    token_ptr, shift_ptr, scale_ptr, image, channel, channels, index, row, col, p, q_odd, grid_h, grid_w,
    SCALE: tl.constexpr, Q_UNIT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The inverse of ``_store_scale``."""
    offsets, mask = _token_offsets(
        image, channel, channels, row, col, p, q_odd, grid_h, grid_w, SCALE, Q_UNIT, BLOCK_H, BLOCK_W
    )
    value = load_wide(token_ptr + offsets, mask)
    index = index.to(tl.int64)
    if shift_ptr is not None:
        value = value * tl.load(scale_ptr + index) + tl.load(shift_ptr + index)
    return value


@triton.jit(do_not_specialize=["B", "C", "first_index", "all_channels", "p", "grid_h", "grid_w"])
def _wavelet_tokens_forward_kernel(
    x_ptr,  # [B, C, H, W], strides in elements
    ll_ptr,  # tokens of scale 0, or the contiguous LL [B, C, h, w] that the next launch starts from
    tokens,  # of each scale of details that this launch makes, coarse first: [B, grid_h grid_w, 3 C, p_k, q_k]
    shift_ptr,  # [all_channels], with scale; or None
    scale_ptr,
    partial_ptr,  # sums of squares [tiles of a plane, B, all_channels], or None
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    B,
    C,
    first_index,  # of this launch's coarsest details among the channels of all scales
    all_channels,  # C (3 L + 1)
    p,  # rows of LL in a patch
    q_odd,  # times Q_UNIT: columns of LL in a patch
    grid_h,
    grid_w,
    factor,
    gain,  # of bytes: a sample is gain * x + bias
    bias,
    LEVELS: tl.constexpr,
    LAST: tl.constexpr,
    Q_UNIT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    h = grid_h * p
    w = grid_w * (q_odd * Q_UNIT)
    plane, row, col = tile_origin(h, w, BLOCK_H, BLOCK_W)
    image, channel = plane // C, plane % C
    if partial_ptr is not None:
        tiles = tl.num_programs(0) // (B * C)
        partial_ptr += ((tl.program_id(0) % tiles).to(tl.int64) * B + image) * all_channels

    rows, cols, mask = tile_indices(row, col, h, w, 1 << LEVELS, BLOCK_H, BLOCK_W)
    x_ptr += image.to(tl.int64) * stride_xb + channel.to(tl.int64) * stride_xc
    x = load_wide(x_ptr + rows * stride_xh + cols * stride_xw, mask, gain, bias)

    for k in tl.static_range(LEVELS):
        x, lh, hl, hh = analyse_tile(x, factor)
        _store_details(
            tokens, (lh, hl, hh), shift_ptr, scale_ptr, partial_ptr, image, channel, C, first_index, row, col, p, q_odd,
            grid_h, grid_w, LEVELS - 1 - k, Q_UNIT, BLOCK_H, BLOCK_W,
        )  # fmt: skip
    if LAST:
        _store_scale(
            ll_ptr, x, shift_ptr, scale_ptr, partial_ptr, image, channel, C, channel, row, col, p, q_odd, grid_h,
            grid_w, 1, Q_UNIT, BLOCK_H, BLOCK_W,
        )  # fmt: skip
    else:
        offsets, mask = _map_offsets(plane, row, col, h, w, 1, BLOCK_H, BLOCK_W)
        tl.store(ll_ptr + offsets, x, mask=mask)


@triton.jit
def _store_details(
    tokens, bands, shift_ptr, scale_ptr, partial_ptr, image, channel, C, first_index, row, col, p, q_odd, grid_h,
    grid_w, K: tl.constexpr, Q_UNIT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """LH, HL, HH of the level ``K`` levels finer than LL, one after the other on the channel axis of their scale."""
    for band in tl.static_range(3):
        index = first_index + (3 * K + band) * C + channel
        _store_scale(
            tokens[K], bands[band], shift_ptr, scale_ptr, partial_ptr, image, band * C + channel, 3 * C, index, row,
            col, p, q_odd, grid_h, grid_w, 1 << K, Q_UNIT, BLOCK_H, BLOCK_W,
        )  # fmt: skip


@triton.jit
def _load_band(
    tokens, shift_ptr, scale_ptr, image, channel, C, first_index, row, col, p, q_odd, grid_h, grid_w,
    BAND: tl.constexpr, K: tl.constexpr, Q_UNIT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """LH, HL or HH of the level ``K`` levels finer than LL."""
    index = first_index + (3 * K + BAND) * C + channel
    return _load_scale(
        tokens[K], shift_ptr, scale_ptr, image, BAND * C + channel, 3 * C, index, row, col, p, q_odd, grid_h, grid_w,
        1 << K, Q_UNIT, BLOCK_H, BLOCK_W,
    )  # fmt: skip


@triton.jit(do_not_specialize=["C", "first_index", "p", "grid_h", "grid_w"])
def _wavelet_untokens_forward_kernel(
    ll_ptr,  # tokens of scale 0, or the contiguous LL [B, C, h, w] that the launch before made
    tokens,  # as in _wavelet_tokens_forward_kernel
    x_ptr,  # [B, C, H, W], contiguous
    shift_ptr,  # [C (3 L + 1)], with scale; or None
    scale_ptr,
    C,
    first_index,
    p,
    q_odd,
    grid_h,
    grid_w,
    factor,
    LEVELS: tl.constexpr,
    LAST: tl.constexpr,  # whether LL comes from tokens
    Q_UNIT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    h = grid_h * p
    w = grid_w * (q_odd * Q_UNIT)
    plane, row, col = tile_origin(h, w, BLOCK_H, BLOCK_W)
    image, channel = plane // C, plane % C
    if LAST:
        x = _load_scale(
            ll_ptr, shift_ptr, scale_ptr, image, channel, C, channel, row, col, p, q_odd, grid_h, grid_w, 1, Q_UNIT,
            BLOCK_H, BLOCK_W,
        )  # fmt: skip
    else:
        offsets, mask = _map_offsets(plane, row, col, h, w, 1, BLOCK_H, BLOCK_W)
        x = load_wide(ll_ptr + offsets, mask)
    for k in tl.static_range(LEVELS):
        lh = _load_band(
            tokens, shift_ptr, scale_ptr, image, channel, C, first_index, row, col, p, q_odd, grid_h, grid_w, 0, k,
            Q_UNIT, BLOCK_H, BLOCK_W,
        )  # fmt: skip
        hl = _load_band(
            tokens, shift_ptr, scale_ptr, image, channel, C, first_index, row, col, p, q_odd, grid_h, grid_w, 1, k,
            Q_UNIT, BLOCK_H, BLOCK_W,
        )  # fmt: skip
        hh = _load_band(
            tokens, shift_ptr, scale_ptr, image, channel, C, first_index, row, col, p, q_odd, grid_h, grid_w, 2, k,
            Q_UNIT, BLOCK_H, BLOCK_W,
        )  # fmt: skip
        x = synthesise_tile(x, lh, hl, hh, factor)
    offsets, mask = _map_offsets(plane, row, col, h, w, 1 << LEVELS, BLOCK_H, BLOCK_W)
    tl.store(x_ptr + offsets, x, mask=mask)


INTERPRETED = not isinstance(_wavelet_tokens_forward_kernel, triton.JITFunction)
"""True if this module was imported under ``TRITON_INTERPRET=1``: its kernels then take CPU tensors."""


def _lowest_bit(n: int) -> int:
    return n & -n


def _patches(step: Step, grid: tuple[int, int]) -> tuple[int, int, int]:
    """``p``, ``q_odd`` and ``Q_UNIT`` at the LL of a launch."""
    (h, w), (grid_h, grid_w) = step.cells, grid
    q = w // grid_w
    return h // grid_h, q // _lowest_bit(q), _lowest_bit(q)


def _tile(step: Step, p: int, dtype: torch.dtype, dense: bool = True) -> dict[str, Any]:
    """A tile that holds whole patches where up to four of their rows allow it, at least 128 pixels wide: what one
    program writes of a token then lies together."""
    h, w = step.cells
    tile = tile_of(step.levels, h, w, wide_dtype(dtype) if dtype == torch.uint8 else dtype, dense)
    while tile["BLOCK_H"] < min(_lowest_bit(p), 4) and tile["BLOCK_W"] << step.levels > 128:
        tile |= {"BLOCK_H": 2 * tile["BLOCK_H"], "BLOCK_W": tile["BLOCK_W"] // 2}
    return tile


def wavelet_tokens_forward(
    x: torch.Tensor,
    level: int,
    grid: tuple[int, int],
    factor: float,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    gain: float = 1.0,
    bias: float = 0.0,
    dtype: torch.dtype | None = None,
    energies: bool = False,
    out: list[torch.Tensor] | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Tokens ``(coefficient - shift) * scale`` of ``level`` >= 1 levels.

    Args:
        x: ``[B, C, H, W]``, any strides, float16, bfloat16, float32, float64, or uint8 as ``gain * x + bias``; ``H``
            and ``W`` are multiples of ``2^level`` times the grid.
        factor: of one level; 1/2 is orthonormal. A power of two.
        shift, scale: ``[C (3 level + 1)]`` by scale and channel of the scale, contiguous, float64 where the arithmetic
            is and else float32; or both None.
        dtype: of the tokens; that of ``x``, or float32 for bytes.
        out: contiguous tensors to write, shapes and dtype as returned.

    Returns:
        Tokens ``[B, gh gw, C_s p_s q_s]`` per scale, coarse first (``out``, or views of one allocation), and if
        ``energies``, the sums of squares of the coefficients ``[B, C (3 level + 1)]`` in the precision of the
        arithmetic: sums of tiles that are then summed, so that they do not depend on the order of the programs.
    """
    B, C, H, W = x.shape
    wide = wide_dtype(x.dtype)
    if out is None:
        out = _allocate(x, level, grid, dtype or (torch.float32 if x.dtype == torch.uint8 else x.dtype))
    all_channels = C * (3 * level + 1)
    total = torch.zeros((B, all_channels), dtype=wide, device=x.device) if energies else None
    if x.numel() == 0:
        return out, total
    with on_device(x):
        for step in (schedule := steps(H, W, level, 0)):
            h, w = step.cells
            p, q_odd, q_unit = _patches(step, grid)
            tile = _tile(step, p, x.dtype, dense=x.stride(3) == 1)
            programs = launch_grid(B * C, h, w, tile)
            last = step is schedule[-1]
            coarser = level - step.first - step.levels  # scales of details that later launches make
            ll = out[0] if last else x.new_empty((B, C, h, w), dtype=wide)
            partial = x.new_zeros((programs[0] // (B * C), B, all_channels), dtype=wide) if energies else None
            _wavelet_tokens_forward_kernel[programs](
                x, ll, tuple(out[1 + coarser : 1 + coarser + step.levels]), shift, scale, partial, *x.stride(),
                B, C, C + 3 * C * coarser, all_channels, p, q_odd, *grid, factor, gain, bias,
                LEVELS=step.levels, LAST=last, Q_UNIT=q_unit, **tile,
            )  # fmt: skip
            if total is not None and partial is not None:
                total += partial.sum(0)
            x = ll
    return out, total


def _allocate(x: torch.Tensor, level: int, grid: tuple[int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    """Tokens of all scales as contiguous views of one allocation."""
    B, C, H, W = x.shape
    tokens = grid[0] * grid[1]
    pixels = C * H * W // tokens
    values = [pixels >> (2 * level), *(3 * pixels >> (2 * k) for k in range(level, 0, -1))]
    flat = torch.empty(B * C * H * W, dtype=dtype, device=x.device)
    return [part.view(B, tokens, n) for part, n in zip(flat.split([B * tokens * n for n in values]), values)]


def wavelet_untokens_forward(
    tokens: Sequence[torch.Tensor],
    channels: int,
    height: int,
    width: int,
    grid: tuple[int, int],
    factor: float,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The image whose coefficients are ``token * scale + shift``; arguments as in :func:`wavelet_tokens_forward`.

    Args:
        tokens: ``[B, gh gw, C_s p_s q_s]`` of ``len(tokens) - 1`` >= 1 levels, coarse first, of one dtype.
        channels, height, width: of the image.

    Returns:
        ``[B, channels, height, width]``, contiguous, in the dtype of the tokens; ``out`` if given.
    """
    tokens = [t.contiguous() for t in tokens]
    B, level, dtype = tokens[0].shape[0], len(tokens) - 1, tokens[0].dtype
    if out is None:
        out = tokens[0].new_empty((B, channels, height, width))
    if out.numel() == 0:
        return out
    ll = tokens[0]
    with on_device(out):
        for step in (schedule := steps(height, width, level, 0))[::-1]:
            h, w = step.cells
            p, q_odd, q_unit = _patches(step, grid)
            tile = _tile(step, p, dtype)
            coarser = level - step.first - step.levels
            shape = (B, channels, step.height, step.width)
            x = out.new_empty(shape, dtype=wide_dtype(dtype)) if step.first else out
            _wavelet_untokens_forward_kernel[launch_grid(B * channels, h, w, tile)](
                ll, tuple(tokens[1 + coarser : 1 + coarser + step.levels]), x, shift, scale,
                channels, channels + 3 * channels * coarser, p, q_odd, *grid, factor,
                LEVELS=step.levels, LAST=step is schedule[-1], Q_UNIT=q_unit, **tile,
            )  # fmt: skip
            ll = x
    return out
