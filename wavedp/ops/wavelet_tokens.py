# SPDX-License-Identifier: Apache-2.0
"""``wavedp::wavelet_tokens`` and ``wavedp::wavelet_untokens``: the Haar transform cut into one grid of patches a scale.

``wavedp/reference/wavelet_tokens.py`` defines them. ``wavedp/ops/wavelet_tokens_autograd.py`` differentiates and
batches the ops.
"""

import functools
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from wavedp.errors import InvalidValueError
from wavedp.ops.backend import implementation
from wavedp.ops.out import copied, written
from wavedp.ops.wavelet import (
    MAX_FUSED_LEVELS,
    check_dtype,
    define_op,
    kernel_dtype,
    result_dtype,
    separate,
    writes_into,
)
from wavedp.reference import wavelet_tokens as reference
from wavedp.reference.wavelet_tokens import scale_channels as scale_channels


def check_grid(op: str, height: int, width: int, level: int, grid: Sequence[int]) -> None:
    """Raises unless every scale of the image has whole patches in this grid."""
    if len(grid) != 2 or grid[0] < 1 or grid[1] < 1:
        raise InvalidValueError(f"{op} takes a grid (rows, columns) of at least 1 x 1, not {tuple(grid)}")
    for name, size, count in (("height", height, grid[0]), ("width", width, grid[1])):
        step = count * 2**level
        if size < 1 or size % step:
            raise InvalidValueError(
                f"{op} takes a {name} that is a multiple of {step} = {count} tokens * 2^{level}, not {size}: "
                "resize the image, or take fewer levels or a smaller grid"
            )


def token_shapes(images: Sequence[int], level: int, grid: Sequence[int]) -> list[tuple[int, int, int]]:
    """[B, gh gw, D_s] of every scale, coarse first, of images [B, C, H, W]."""
    batch, channels, height, width = images
    rows, columns = grid
    halvings = [level, *range(level, 0, -1)]
    return [
        (batch, rows * columns, c * (height // 2**k // rows) * (width // 2**k // columns))
        for c, k in zip(scale_channels(channels, level), halvings)
    ]


def _check_images(dtype: torch.dtype, shape: Sequence[int], level: int, grid: Sequence[int]) -> None:
    check_dtype("wavelet_tokens", dtype, or_bytes=True)
    if len(shape) != 4 or shape[1] < 1:
        raise InvalidValueError(f"wavelet_tokens takes images [B, C, H, W] of at least one channel, not {tuple(shape)}")
    check_grid("wavelet_tokens", shape[2], shape[3], level, grid)


_cached_check_images = functools.lru_cache(maxsize=4096)(_check_images)


def _check_tokens(
    dtype: torch.dtype, shapes: Sequence[Sequence[int]], image: Sequence[int], grid: Sequence[int]
) -> None:
    check_dtype("wavelet_untokens", dtype)
    channels, height, width = image
    level = len(shapes) - 1
    check_grid("wavelet_untokens", height, width, level, grid)
    batch = shapes[0][0] if len(shapes[0]) == 3 else 0
    for scale, (found, shape) in enumerate(zip(shapes, token_shapes((batch, channels, height, width), level, grid))):
        if tuple(found) != shape:
            raise InvalidValueError(
                f"the tokens of scale {scale} of images [{channels}, {height}, {width}] have the shape "
                f"[B, {shape[1]}, {shape[2]}] with one batch B for all scales, not {tuple(found)}"
            )


_cached_check_tokens = functools.lru_cache(maxsize=4096)(_check_tokens)


def _check_agreement(tokens: Sequence[Tensor]) -> Tensor:
    if not tokens:
        raise InvalidValueError("wavelet_untokens takes the tokens of at least one scale")
    first = tokens[0]
    dtype, device = first.dtype, first.device
    for scale, one in enumerate(tokens):
        if one.dtype is not dtype or one.device != device:
            raise InvalidValueError(
                f"the tokens of wavelet_untokens must agree in dtype and device, but scale 0 is {first.dtype} on "
                f"{first.device} and scale {scale} {one.dtype} on {one.device}"
            )
    return first


def _affine(op: str, shift: Tensor | None, scale: Tensor | None, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Both as contiguous tensors [count] in the precision of the arithmetic; one may be absent."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    result = []
    for name, value, absent in (("shift", shift, 0.0), ("scale", scale, 1.0)):
        if value is None:
            value = torch.full((count,), absent, dtype=dtype, device=like.device)
        elif value.shape != (count,):
            raise InvalidValueError(f"the {name} of {op} must have the shape ({count},), not {tuple(value.shape)}")
        if value.dtype is not dtype or value.device != like.device or not value.is_contiguous():
            value = value.to(like.device, dtype).contiguous()
        result.append(value)
    return result[0], result[1]


def _module(level: int, device: torch.device) -> ModuleType:
    """No level has nothing to fuse, and more levels than a backend takes need images of 512 pixels and more a
    token: both are left to the definition."""
    return implementation("wavelet_tokens", device) if 1 <= level <= MAX_FUSED_LEVELS else reference


def compute_wavelet_tokens(
    x: Tensor,
    level: int,
    grid: Sequence[int],
    factor: float,
    shift: Tensor | None,
    scale: Tensor | None,
    gain: float,
    bias: float,
    dtype: torch.dtype | None,
    energies: bool,
    out: list[Tensor] | None = None,
) -> list[Tensor]:
    """The kernel of ``wavedp::wavelet_tokens``: tokens, then the energies where asked for; ``out`` is checked."""
    grid = grid[0], grid[1]
    _cached_check_images(x.dtype, x.shape, level, grid)
    if shift is not None or scale is not None:
        shift, scale = _affine("wavelet_tokens", shift, scale, x.shape[1] * (3 * level + 1), x)
    dtype = result_dtype(x, dtype)
    asked = dtype if dtype is x.dtype else kernel_dtype(x, dtype)
    forward = _module(level, x.device).wavelet_tokens_forward
    arguments = (x, level, grid, factor, shift, scale, gain, bias, asked, energies)
    tokens: list[Tensor]
    if out is not None and asked == dtype and writes_into(forward, out):
        tokens, squares = forward(*arguments, out=out)
        written(out)
    else:
        tokens, squares = forward(*arguments)
        if out is not None:
            tokens = copied(out, tokens)
        elif asked != dtype:
            tokens = [one.to(dtype) for one in tokens]
    return tokens if squares is None else [*tokens, squares]


def compute_wavelet_untokens(
    tokens: Sequence[Tensor],
    image: Sequence[int],
    grid: Sequence[int],
    factor: float,
    shift: Tensor | None,
    scale: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """The kernel of ``wavedp::wavelet_untokens``; ``out`` is checked already."""
    first = _check_agreement(tokens)
    channels, height, width = image
    grid = grid[0], grid[1]
    _cached_check_tokens(first.dtype, tuple([one.shape for one in tokens]), (channels, height, width), grid)
    level = len(tokens) - 1
    if shift is not None or scale is not None:
        shift, scale = _affine("wavelet_untokens", shift, scale, channels * (3 * level + 1), first)
    forward = _module(level, first.device).wavelet_untokens_forward
    arguments = (tokens, channels, height, width, grid, factor, shift, scale)
    if out is not None and writes_into(forward, [out]):
        forward(*arguments, out=out)
        written([out])
        return out
    image_of_tokens: Tensor = forward(*arguments)
    return image_of_tokens if out is None else out.copy_(image_of_tokens)


def _wavelet_tokens(
    x: Tensor,
    level: int,
    grid: Sequence[int],
    factor: float,
    shift: Tensor | None,
    scale: Tensor | None,
    gain: float,
    bias: float,
    dtype: torch.dtype | None,
    energies: bool,
) -> list[Tensor]:
    _cached_check_images(x.dtype, x.shape, level, (grid[0], grid[1]))
    out = separate(x, token_shapes(x.shape, level, grid), result_dtype(x, dtype))
    return compute_wavelet_tokens(x, level, grid, factor, shift, scale, gain, bias, dtype, energies, out)


def _wavelet_tokens_fake(
    x: Tensor,
    level: int,
    grid: Sequence[int],
    factor: float,
    shift: Tensor | None,
    scale: Tensor | None,
    gain: float,
    bias: float,
    dtype: torch.dtype | None,
    energies: bool,
) -> list[Tensor]:
    _check_images(x.dtype, x.shape, level, grid)
    tokens = separate(x, token_shapes(x.shape, level, grid), result_dtype(x, dtype))
    if energies:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        tokens.append(x.new_empty((x.shape[0], x.shape[1] * (3 * level + 1)), dtype=wide))
    return tokens


def _wavelet_untokens(
    tokens: Sequence[Tensor],
    image: Sequence[int],
    grid: Sequence[int],
    factor: float,
    shift: Tensor | None,
    scale: Tensor | None,
) -> Tensor:
    return compute_wavelet_untokens(tokens, image, grid, factor, shift, scale)


def _wavelet_untokens_fake(
    tokens: Sequence[Tensor],
    image: Sequence[int],
    grid: Sequence[int],
    factor: float,
    shift: Tensor | None,
    scale: Tensor | None,
) -> Tensor:
    first = _check_agreement(tokens)
    _check_tokens(first.dtype, [one.shape for one in tokens], image, grid)
    return tokens[0].new_empty((tokens[0].shape[0], *image))


define_op(
    "wavelet_tokens(Tensor x, int level, SymInt[] grid, float factor, Tensor? shift, Tensor? scale, float gain, "
    "float bias, ScalarType? dtype, bool energies) -> Tensor[]",
    _wavelet_tokens,
    _wavelet_tokens_fake,
)
define_op(
    "wavelet_untokens(Tensor[] tokens, SymInt[] image, SymInt[] grid, float factor, Tensor? shift, Tensor? scale) "
    "-> Tensor",
    _wavelet_untokens,
    _wavelet_untokens_fake,
)
