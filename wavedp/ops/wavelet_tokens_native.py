# SPDX-License-Identifier: Apache-2.0
"""The token ops of the compiled libraries: tensors to addresses. ``csrc/wavelet.h`` says what they expect."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from wavedp.ops.wavelet_native import DTYPE_CODES, Packing, call, empty_like, template
from wavedp.ops.wavelet_tokens import token_shapes


@functools.lru_cache(maxsize=4096)
def _plan(
    shape: Sequence[int], strides: Sequence[int], itemsize: int, level: int, grid: tuple[int, int]
) -> tuple[Packing, tuple[int, ...]]:
    return Packing(token_shapes(shape, level, grid), itemsize), (*shape, *strides)


def wavelet_tokens_forward(
    x: Tensor,  # [B, C, H, W], any strides; uint8 too
    level: int,
    grid: tuple[int, int],
    factor: float,
    shift: Tensor | None,  # contiguous [C (3 level + 1)], of float32, or float64 for float64; both or neither
    scale: Tensor | None,
    gain: float = 1.0,
    bias: float = 0.0,
    dtype: torch.dtype | None = None,
    energies: bool = False,
    out: list[Tensor] | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """:func:`wavedp.reference.wavelet_tokens.wavelet_tokens_forward` by a compiled library; the tokens are views of
    one allocation."""
    dtype = dtype or (torch.float32 if x.dtype == torch.uint8 else x.dtype)
    packing, axes = _plan(x.shape, x.stride(), dtype.itemsize, level, grid)
    squares = None
    if energies:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        squares = torch.zeros((x.shape[0], x.shape[1] * (3 * level + 1)), dtype=wide, device=x.device)
    if out is None:
        flat = x.new_empty(packing.total, dtype=dtype)
        addresses = packing.addresses(flat)
    else:
        addresses = [one.data_ptr() for one in out]
    if packing.total > 0:
        images = (x.data_ptr(), DTYPE_CODES[x.dtype], gain, bias, axes)
        starts = [0 if one is None else one.data_ptr() for one in (shift, scale, squares)]
        call("wavelet_tokens", x, *images, addresses, DTYPE_CODES[dtype], level, factor, *grid, *starts)
    return (packing.views(flat) if out is None else out), squares


@functools.lru_cache(maxsize=4096)
def _images(batch: int, channels: int, height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A template of the images."""
    return template((batch, channels, height, width), dtype, device)


def wavelet_untokens_forward(
    tokens: Sequence[Tensor],  # [B, gh gw, C_s p_s q_s] per scale, coarse first
    channels: int,
    height: int,
    width: int,
    grid: tuple[int, int],
    factor: float,
    shift: Tensor | None,
    scale: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:  # [B, C, height, width]
    """:func:`wavedp.reference.wavelet_tokens.wavelet_untokens_forward` by a compiled library."""
    tokens = [one if one.is_contiguous() else one.contiguous() for one in tokens]
    first, level = tokens[0], len(tokens) - 1
    batch, dtype = first.shape[0], first.dtype
    if out is None:
        out = empty_like(_images(batch, channels, height, width, dtype, first.device))
    if batch > 0:
        addresses = [one.data_ptr() for one in tokens]
        sizes = (batch, channels, height, width, level)
        affine = (0, 0) if shift is None or scale is None else (shift.data_ptr(), scale.data_ptr())
        call("wavelet_untokens", first, addresses, out.data_ptr(), DTYPE_CODES[dtype], *sizes, factor, *grid, *affine)
    return out
