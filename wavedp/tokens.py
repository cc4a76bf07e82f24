# SPDX-License-Identifier: Apache-2.0
"""``wavelet_tokens`` and ``wavelet_untokens``: an image as one sequence of tokens per scale, in one pass over it.

They are public as ``wavedp.wavelet_tokens`` and ``wavedp.wavelet_untokens``; ``docs/wavelets.md`` is the user's page.
"""

import functools
import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

from wavedp.errors import InvalidTypeError, InvalidValueError
from wavedp.ops import wavelet_tokens_autograd
from wavedp.ops.arguments import affine_of, check_level, check_tensor, described, factor_of, result_type, size_of
from wavedp.ops.eager import is_plain
from wavedp.ops.out import check_out
from wavedp.ops.wavelet import check_dtype, result_dtype
from wavedp.ops.wavelet_tokens import check_grid, scale_channels, token_shapes

Constants: TypeAlias = Sequence[float | Tensor]

_NUMBERS = (float, int)


def wavelet_tokens(
    x: Tensor,  # [B, C, H, W], uint8 too
    levels: int,
    grid: int | Sequence[int],
    mean: Constants | None = None,
    std: Constants | None = None,
    *,
    scales: int | None = None,
    norm: str = "ortho",
    affine: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    energies: bool = False,
    out: Sequence[Tensor] | None = None,
) -> Any:  # [[B, gh gw, D_s], ...] coarse first; (that, [B, C (3 levels + 1)]) with energies
    """The Haar transform of ``levels`` levels, normalised by scale and cut into one grid of patches per scale.

    Scale 0 is the approximation, scale s >= 1 the details of level ``levels - s + 1``: cH, cV and cD one after the
    other on the channel axis, so that C_0 = C and C_s = 3 C. Every scale has ``gh * gw`` tokens, in row-major order
    of the grid, because its patches grow with its map (arXiv 2412.09607); a token's D_s = C_s p_s q_s values are in
    the order (channel, row, column). The image is read once and the tokens are written once, as contiguous
    views of one allocation. Gradients flow to ``x``.

    Args:
        x: images whose height and width are multiples of 2^levels times the grid.
        levels: of the full image, at least 0.
        grid: tokens per axis, ``(gh, gw)`` or one number for both.
        mean, std: constants of the normalisation ``(coefficient - mean) / std``: for each of ``levels + 1`` scales a
            number or a tensor [C_s]. None is no mean, or a deviation of 1.
        scales: where ``x`` is smaller than the image that ``levels`` speaks of, the number k of scales it is made of,
            as :func:`wavelet_untokens` gives it for the first k: these k scales come back, with the values that they
            have in the full image.
        norm: as for :func:`wavedp.dwt2`.
        affine: ``(gain, bias)`` for images of uint8, as for :func:`wavedp.coarse`.
        dtype: of the tokens: that of ``x``, or float32 for uint8, unless given.
        energies: also returns the sum of squares of ``x``'s coefficients, before ``mean`` and ``std``, for each image
            and channel of a scale: [B, C (3 levels + 1)] in float32 (float64 for float64), without gradient.
        out: a list of tensors for the tokens.

    Raises:
        TypeError: ``x`` is not a tensor of uint8 or of one of the four floating-point dtypes, ``levels`` is no integer,
            or ``out`` does not hold such tensors.
        ValueError: the sizes are not such multiples; ``mean`` or ``std`` does not fit or requires grad; a number in
            ``std`` is not positive (tensors are not looked into); or another argument has a value that it cannot
            have.
    """
    op = "wavelet_tokens"
    check_tensor(op, x)
    check_dtype(op, x.dtype, or_bytes=True)
    if type(levels) is not int or levels < 0:
        levels = check_level(op, levels, "number of levels")
    factor = factor_of(op, norm)
    scales = levels + 1 if scales is None else _scales(op, scales, levels)
    rows_columns = _grid(op, grid)
    if x.ndim != 4 or x.shape[1] < 1:
        raise InvalidValueError(
            f"{op} takes images [B, C, H, W] of at least one channel, not a shape of {tuple(x.shape)}"
        )
    gain, bias = affine_of(op, x, affine)
    dtype = result_dtype(x, None if dtype is None else result_type(op, dtype))
    shift = scale = None
    halvings = levels + 1 - scales if norm == "ortho" else 0
    if mean is not None or std is not None or halvings:
        # (2^n m - mean) / std for a coefficient m of x, which is the full image's approximation / 2^n.
        channels = scale_channels(x.shape[1], scales - 1)
        shift, scale = _constants(op, mean, std, levels, channels, 0.5**halvings, x, divide=True)
    outs = None
    if out is not None:
        if not isinstance(out, (tuple, list)):
            raise InvalidValueError(f"out of {op} must be a list of {scales} tensors, not {described(out)}")
        outs = list(out)
        check_grid(op, x.shape[2], x.shape[3], scales - 1, rows_columns)
        check_out(op, outs, token_shapes(x.shape, scales - 1, rows_columns), dtype, [x])
    tokens = wavelet_tokens_autograd.wavelet_tokens(
        x, scales - 1, rows_columns, factor, shift, scale, gain, bias, dtype, energies, outs
    )
    return (tokens[:-1], tokens[-1].detach()) if energies else tokens


def wavelet_untokens(
    tokens: Sequence[Tensor],  # the first k scales: [B, gh gw, D_s] each, coarse first
    grid: int | Sequence[int],
    mean: Constants | None = None,
    std: Constants | None = None,
    *,
    levels: int | None = None,
    channels: int | None = None,
    output_size: Sequence[int] | None = None,
    norm: str = "ortho",
    out: Tensor | None = None,
) -> Tensor:  # [B, C, H, W]
    """Inverse of :func:`wavelet_tokens`, also for a prefix of the scales.

    The first k of ``levels + 1`` scales give the image at their resolution, 2^-(levels + 1 - k) of the full one: its
    pixels are the means of the full image's blocks.

    Args:
        tokens: the scales that are there, coarse first.
        grid, mean, std, norm: those of :func:`wavelet_tokens`; ``mean`` and ``std`` have ``levels + 1`` entries.
        levels: of the full image; unless given, all scales are there.
        channels: C. The patches are square then, unless ``output_size`` says what they are.
        output_size: ``(H, W)`` of the image returned. One of ``channels`` and ``output_size`` is needed.
        out: a tensor to write to.

    Raises:
        TypeError: the tokens are not tensors of one of the four floating-point dtypes.
        ValueError: the tokens fit no such image or each other, ``mean`` or ``std`` does not fit, or another argument
            has a value that it cannot have.
    """
    op = "wavelet_untokens"
    if not isinstance(tokens, (tuple, list)) or len(tokens) == 0:
        raise InvalidValueError(f"{op} takes the tokens of at least one scale in a list, not {described(tokens)}")
    for one in tokens:
        check_tensor(op, one)
    check_dtype(op, tokens[0].dtype)
    scales = len(tokens)
    levels = scales - 1 if levels is None else check_level(op, levels, "number of levels")
    if scales > levels + 1:
        raise InvalidValueError(f"{op} takes at most {levels + 1} scales of {levels} levels, not {scales}")
    factor = factor_of(op, norm, inverse=True)
    rows_columns = _grid(op, grid)
    image = _image(op, tokens[0], rows_columns, channels, size_of(op, output_size), scales - 1)
    shift = scale = None
    halvings = levels + 1 - scales if norm == "ortho" else 0
    if mean is not None or std is not None or halvings:
        channels_of = scale_channels(image[0], scales - 1)
        shift, scale = _constants(op, mean, std, levels, channels_of, 0.5**halvings, tokens[0], divide=False)
    if out is not None:
        check_out(op, [out], [(tokens[0].shape[0], *image)], tokens[0].dtype, list(tokens))
    return wavelet_tokens_autograd.wavelet_untokens(tokens, image, rows_columns, factor, shift, scale, out)


def _scales(op: str, scales: Any, levels: int) -> int:
    count = check_level(op, scales, "number of scales")
    if not 1 <= count <= levels + 1:
        raise InvalidValueError(f"{op} takes 1 to {levels + 1} scales of {levels} levels, not {count}")
    return count


def _grid(op: str, grid: Any) -> tuple[int, int]:
    if type(grid) is int and grid > 0:
        return grid, grid
    pair = tuple(grid) if isinstance(grid, (tuple, list)) else (grid, grid)
    if len(pair) != 2 or any(isinstance(n, bool) or not hasattr(n, "__index__") or n < 1 for n in pair):
        raise InvalidValueError(
            f"{op} takes a grid of at least 1 x 1 tokens, as (rows, columns) or one number, not {grid!r}"
        )
    return operator.index(pair[0]), operator.index(pair[1])


def _image(
    op: str, first: Tensor, grid: tuple[int, int], channels: Any, size: tuple[int, int] | None, level: int
) -> tuple[int, int, int]:
    """C, H and W of the image whose approximation has these tokens."""
    if first.ndim != 3 or first.shape[1] != grid[0] * grid[1]:
        raise InvalidValueError(
            f"{op} takes tokens [B, {grid[0] * grid[1]}, D] of a grid of {grid[0]} x {grid[1]}, not of a shape of "
            f"{tuple(first.shape)}"
        )
    length = first.shape[2]
    if size is not None:
        check_grid(op, *size, level, grid)
        patch = (size[0] // 2**level // grid[0]) * (size[1] // 2**level // grid[1])
        if length % patch or length == 0 or channels not in (None, length // patch):
            raise InvalidValueError(
                f"an image of {size[0]} x {size[1]} has approximation tokens of {patch} values a channel, but these "
                f"have {length}" + ("" if channels is None else f" for {channels} channels")
            )
        return length // patch, *size
    if channels is None:
        raise InvalidValueError(f"{op} takes channels=, or output_size=(H, W) where patches are not square")
    channels = check_level(op, channels, "number of channels")
    side = math.isqrt(length // channels) if channels else 0
    if side < 1 or channels * side**2 != length:
        raise InvalidValueError(
            f"approximation tokens of {length} values are not square patches of {channels} channels: give "
            "output_size=(H, W) where they are not square"
        )
    return channels, grid[0] * side * 2**level, grid[1] * side * 2**level


def _constants(
    op: str,
    mean: Any,
    std: Any,
    levels: int,
    channels: Sequence[int],  # of the scales that are there
    factor: float,  # of the coefficients of the image at hand, to those of the full image
    like: Tensor,
    *,
    divide: bool,
) -> tuple[Tensor, Tensor]:
    """``factor`` times the mean, and times the deviation or its inverse, of every channel of the scales."""
    dtype, device = torch.float64 if like.dtype == torch.float64 else torch.float32, like.device
    if not (_are_numbers(mean, levels + 1) and _are_numbers(std, levels + 1)):
        means, deviations = _both_checked(op, mean, std, levels, channels)
        if [entry for entry in (*means, *deviations) if isinstance(entry, Tensor)]:
            shift, scale = (
                torch.cat([_spread(entry, count, dtype, device) for entry, count in zip(constants, channels)])
                for constants in (means, deviations)
            )
            if factor != 1.0:
                shift, scale = factor * shift, factor * scale
            return shift, scale.reciprocal() if divide else scale
        mean, std = [float(entry) for entry in means], [float(entry) for entry in deviations]
    # What is made under a mode or a gradient is not for later calls.
    numbers = _cached_numbers if is_plain(like) else _numbers
    pair = mean and tuple(mean), std and tuple(std)
    return numbers(op, *pair, levels, tuple(channels), factor, dtype, device, divide)


def _are_numbers(constants: Any, count: int) -> bool:
    """Whether there are none, or a list or tuple of so many of Python's own numbers."""
    return constants is None or (
        type(constants) in (list, tuple)
        and len(constants) == count
        and not [entry for entry in constants if type(entry) not in _NUMBERS]
    )


def _numbers(
    op: str,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    levels: int,
    channels: Sequence[int],
    factor: float,
    dtype: torch.dtype,
    device: torch.device,
    divide: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`_constants` of numbers alone: one tensor for both, made at once."""
    means, deviations = _both_checked(op, mean, std, levels, channels)
    scales = [1 / (factor * value) if divide else factor * value for value in deviations]
    values = [factor * value for value, count in zip(means, channels) for _ in range(count)]
    values += [value for value, count in zip(scales, channels) for _ in range(count)]
    with torch.inference_mode(False):  # a tensor made in inference mode could not be saved for a later backward
        shift, scale = torch.tensor(values, dtype=dtype, device=device).view(2, -1).unbind(0)
    return shift, scale


_cached_numbers = functools.lru_cache(maxsize=256)(_numbers)


def _spread(entry: float | Tensor, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One value for each of ``count`` channels."""
    if type(entry) is Tensor and entry.dtype is dtype and entry.device == device and entry.ndim == 1:
        return entry
    return torch.as_tensor(entry, dtype=dtype, device=device).expand(count)


def _both_checked(
    op: str, mean: Any, std: Any, levels: int, channels: Sequence[int]
) -> tuple[Sequence[Any], Sequence[Any]]:
    return (
        _checked_constants(op, "mean", mean, 0.0, levels, channels),
        _checked_constants(op, "std", std, 1.0, levels, channels),
    )


def _checked_constants(
    op: str, name: str, constants: Any, absent: float, levels: int, channels: Sequence[int]
) -> Sequence[float | Tensor]:
    if constants is None:
        return [absent] * (levels + 1)
    if not isinstance(constants, (tuple, list)) or len(constants) != levels + 1:
        raise InvalidValueError(
            f"{op} takes {name} as a list of {levels + 1} entries, one for each scale, not {described(constants)}"
        )
    for scale, entry in enumerate(constants):
        if type(entry) is not float or not (entry > 0 or name == "mean"):
            _check_constant(op, name, scale, entry, channels)
    return constants


def _check_constant(op: str, name: str, scale: int, entry: Any, channels: Sequence[int]) -> None:
    """Raises unless the entry is one number, or one for each channel of the scale where that is there."""
    if isinstance(entry, Tensor):
        if entry.requires_grad:
            raise InvalidValueError(f"{name} of scale {scale} requires grad, but {op} takes constants: detach() it")
        shape = entry.shape
        if len(shape) > 1 or (len(shape) == 1 and scale < len(channels) and shape[0] != channels[scale]):
            raise InvalidValueError(
                f"{name} of scale {scale} must be a number or a tensor ({channels[min(scale, len(channels) - 1)]},), "
                f"not of shape {tuple(shape)}"
            )
    elif isinstance(entry, bool) or not isinstance(entry, Real):
        raise InvalidTypeError(f"{op} takes numbers or tensors in {name}, not {described(entry)}")
    elif name == "std" and not float(entry) > 0:
        raise InvalidValueError(f"std of scale {scale} must be positive, not {entry}")
