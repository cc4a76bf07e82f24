# SPDX-License-Identifier: Apache-2.0
"""``wavedec2`` and ``waverec2`` of ptwt 1.0, the PyTorch Wavelet Toolbox, for the Haar wavelet.

Layout: a tuple, the approximation first, then named tuples of details, coarsest first. ``docs/compat.md`` lists what
differs.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from typing_extensions import Unpack

from wavedp import functional
from wavedp.compat import haar
from wavedp.errors import InvalidValueError

__all__ = ["WaveletDetailTuple2d", "wavedec2", "waverec2"]


class WaveletDetailTuple2d(NamedTuple):
    """Details of one level: PyWavelets' cH, cV, cD, the subbands LH, HL, HH."""

    horizontal: Tensor
    vertical: Tensor
    diagonal: Tensor


WaveletCoeff2d = tuple[Tensor, Unpack[tuple[WaveletDetailTuple2d, ...]]]


def wavedec2(
    data: Tensor,  # [..., H, W], or with the two axes anywhere
    wavelet: Any,
    *,
    mode: str = "reflect",
    level: int | None = None,
    axes: Sequence[int] = (-2, -1),
) -> WaveletCoeff2d:  # (cA_L, details of level L, ..., details of level 1), the transformed axes where they were
    """``level`` levels of the two-dimensional Haar transform over ``axes``.

    Args:
        data: images of float16, bfloat16, float32 or float64.
        wavelet: ``"haar"``, ``"db1"`` or the same wavelet as an object with PyWavelets' attributes or as its four
            filters.
        mode: what completes an axis of odd length, as in :func:`wavedp.wavedec2`.
        level: how many; by default floor(log2(min(H, W))), the most that complete no axis of one sample.
        axes: which axes are the rows' and the columns' (H and W).

    Raises:
        ValueError: another wavelet, ``data`` is not such a tensor, an unknown mode, an axis that is missing or given
            twice, or an empty image.
    """
    haar.check_wavelet("ptwt", wavelet, (haar.DEC_LO, haar.DEC_HI, haar.REC_LO, haar.REC_HI))
    if not isinstance(data, Tensor) or not data.is_floating_point():
        kind = data.dtype if isinstance(data, Tensor) else type(data).__name__
        raise InvalidValueError(
            f"wavedec2 takes a floating-point torch tensor, not {kind}: convert it by torch.as_tensor(...)"
        )
    axes = _axes("wavedec2", axes, data.ndim)
    images = _moved(data, axes, (-2, -1))
    levels = _max_level(*images.shape[-2:]) if level is None else level
    coeffs: list[Any] = functional.wavedec2(images, levels, mode)
    approximation, *details = coeffs
    return (
        _moved(approximation, (-2, -1), axes),
        *(WaveletDetailTuple2d(*(_moved(band, (-2, -1), axes) for band in bands)) for bands in details),
    )


def waverec2(
    coeffs: Sequence[Any],  # as wavedec2 returns; None stands for a band, or for a level, of zeros
    wavelet: Any,
    axes: Sequence[int] = (-2, -1),
    *,
    output_size: Sequence[int] | None = None,
) -> Tensor:  # [..., H, W], or with the two axes where they were
    """Inverse of :func:`wavedec2`.

    Args:
        coeffs: approximation and details, coarsest first; plain tuples and lists are taken too.
        wavelet: as for :func:`wavedec2`.
        axes: as for :func:`wavedec2`.
        output_size: sizes of the image along ``axes``; without it an odd size comes back one larger.

    Raises:
        TypeError: as :func:`wavedp.waverec2`.
        ValueError: another wavelet, coefficients that are not such a sequence or do not fit together, or an axis
            that is missing or given twice.
    """
    haar.check_wavelet("ptwt", wavelet, (haar.DEC_LO, haar.DEC_HI, haar.REC_LO, haar.REC_HI))
    if not isinstance(coeffs, (tuple, list)) or not coeffs or not isinstance(coeffs[0], Tensor):
        raise InvalidValueError("waverec2 takes (cA, (cH, cV, cD), ...), the approximation being a tensor")
    axes = _axes("waverec2", axes, coeffs[0].ndim)
    inner = [_moved(coeffs[0], axes, (-2, -1)), *(_details(level, axes) for level in coeffs[1:])]
    return _moved(functional.waverec2(inner, output_size=output_size), (-2, -1), axes)


def _details(level: Any, axes: tuple[int, int]) -> Any:
    """One level with the axes last; what is no level is left for ``functional.waverec2`` to refuse."""
    if level is None:
        return None, None, None
    if not isinstance(level, (tuple, list)):
        return level
    return tuple(_moved(band, axes, (-2, -1)) if isinstance(band, Tensor) else band for band in level)


def _axes(function: str, axes: Sequence[int], ndim: int) -> tuple[int, int]:
    """``axes`` counted from the end."""
    if ndim < 2:
        raise InvalidValueError(f"{function} takes at least two axes of data, not {ndim}")
    if len(axes) != 2:
        raise InvalidValueError(f"{function} transforms two axes, not {len(axes)}: {tuple(axes)}")
    rows, columns = (axis if axis < 0 else axis - ndim for axis in axes)
    if not (-ndim <= rows < 0 and -ndim <= columns < 0):
        raise InvalidValueError(f"{function} was given the axes {tuple(axes)} of data that has {ndim} axes")
    if rows == columns:
        raise InvalidValueError(f"{function} cannot transform the same axis twice: {tuple(axes)}")
    return rows, columns


def _moved(x: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    return x if source == target else x.movedim(source, target)


def _max_level(height: int, width: int) -> int:
    """floor(log2(min(height, width))), PyWavelets' ``dwtn_max_level`` of a filter of two taps."""
    smallest, level = min(height, width), 0
    if smallest < 1:
        raise InvalidValueError(f"wavedec2 takes images of at least 1 x 1, not {height} x {width}")
    while smallest >= 2:
        smallest, level = smallest // 2, level + 1
    return level
