# SPDX-License-Identifier: Apache-2.0
"""Public functions on tensors: the orthonormal Haar transform with PyWavelets' names, order, signs and modes.

``docs/wavelets.md`` is the user's page. All functions take ``[..., H, W]`` tensors of float16, bfloat16,
float32 or float64 with any strides on any device, keep the dtype (half precision is computed in float32 and
rounded once per level), and can be differentiated any number of times.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wavedp.ops import wavelet_autograd

Details = tuple[Tensor, Tensor, Tensor]

__all__ = ["coarse", "dwt2", "idwt2", "wavedec2", "waverec2"]


def dwt2(
    x: Tensor,  # [..., H, W]
    mode: str = "symmetric",
) -> tuple[Tensor, Details]:  # (cA, (cH, cV, cD)), each [..., ceil(H/2), ceil(W/2)]
    """One level of the two-dimensional Haar transform, as ``pywt.dwt2(x, "haar", mode)``.

    A block ``[[a, b], [c, d]]`` gives ``cA = (a+b+c+d)/2``, ``cH = (a+b-c-d)/2``, ``cV = (a-b+c-d)/2`` and
    ``cD = (a-b-c+d)/2``. The four bands are contiguous views of one allocation ``[4, ..., h, w]``.

    Args:
        x: images, at least 1 x 1.
        mode: what completes an axis of odd length: ``"zero"``, ``"constant"``, ``"symmetric"``,
            ``"periodization"``, ``"periodic"``, ``"reflect"``, ``"antisymmetric"``, ``"smooth"`` or
            ``"antireflect"``. Even sizes are the same in all.

    Raises:
        TypeError: ``x`` is not a tensor of one of the four dtypes.
        ValueError: ``x`` has fewer than two axes or an empty image, the mode is unknown, or a reflecting mode
            meets an axis of one sample.
    """
    _check_tensor("dwt2", x)
    ll, lh, hl, hh = wavelet_autograd.dwt2(x, mode).unbind(0)
    return ll, (lh, hl, hh)


def idwt2(
    coeffs: tuple[Tensor | None, Sequence[Tensor | None]],  # (cA, (cH, cV, cD)), each [..., h, w]
    *,
    output_size: Sequence[int] | None = None,
) -> Tensor:  # [..., 2 h, 2 w], or [..., *output_size]
    """Inverse of :func:`dwt2`, as ``pywt.idwt2(coeffs, "haar")``.

    Args:
        coeffs: the bands; None stands for a band of zeros, at least one is given.
        output_size: ``(H, W)`` of the image, to have an odd size back: each is twice the band's, or one less.

    Raises:
        TypeError: a band is not a tensor of one of the four dtypes.
        ValueError: ``coeffs`` is not such a pair, the bands differ in shape, dtype or device, all are None,
            or ``output_size`` does not fit them.
    """
    if not isinstance(coeffs, (tuple, list)) or len(coeffs) != 2:
        raise ValueError(f"idwt2 takes (cA, (cH, cV, cD)), not {_described(coeffs)}")
    bands = (coeffs[0], *_details("idwt2", coeffs[1]))
    given = next((band for band in bands if band is not None), None)
    if given is None:
        raise ValueError("idwt2 takes at least one band that is not None")
    for band in bands:
        if band is not None:
            _check_tensor("idwt2", band)
    height, width = _size("idwt2", output_size) or (2 * given.shape[-2], 2 * given.shape[-1])
    return wavelet_autograd.idwt2(*bands, height, width)


def wavedec2(
    x: Tensor,  # [..., H, W]
    level: int,
    mode: str = "symmetric",
) -> list[Tensor | Details]:  # [cA_L, (cH_L, cV_L, cD_L), ..., (cH_1, cV_1, cD_1)]
    """``level`` levels of the two-dimensional Haar transform, as ``pywt.wavedec2(x, "haar", mode, level)``.

    The bands of level ``k`` are ``[..., ceil(H/2^k), ceil(W/2^k)]``. Level 0 gives ``[x]``. An axis that has
    come down to one sample stays at one and is completed by ``mode``, as in PyWavelets, which warns of it.

    Raises:
        TypeError: as :func:`dwt2`, or ``level`` is not an integer.
        ValueError: as :func:`dwt2` at any level, or ``level`` is negative.
    """
    _check_tensor("wavedec2", x)
    approximation, details = x, []
    for _ in range(_levels("wavedec2", level)):
        approximation, level_details = dwt2(approximation, mode)
        details.append(level_details)
    return [approximation, *reversed(details)]


def waverec2(
    coeffs: Sequence[Tensor | Sequence[Tensor | None]],  # [cA_L, (cH_L, cV_L, cD_L), ..., (cH_1, cV_1, cD_1)]
    *,
    output_size: Sequence[int] | None = None,
) -> Tensor:  # [..., H, W]
    """Inverse of :func:`wavedec2`, as ``pywt.waverec2(coeffs, "haar")``.

    An approximation that is one row or column larger than its details, as odd sizes make it, is cut to them.

    Args:
        coeffs: coarsest first; None stands for a band of zeros among the details.
        output_size: ``(H, W)`` of the image, to have an odd size back; without it the last sizes are even.

    Raises:
        TypeError: a band is not a tensor of one of the four dtypes.
        ValueError: ``coeffs`` is not such a list, its bands do not fit together, or ``output_size`` does not
            fit them.
    """
    if not isinstance(coeffs, (tuple, list)) or len(coeffs) == 0:
        raise ValueError(f"waverec2 takes [cA, (cH, cV, cD), ...], not {_described(coeffs)}")
    _check_tensor("waverec2", coeffs[0])
    x: Tensor = coeffs[0]
    details = [_details("waverec2", level_details) for level_details in coeffs[1:]]
    size = _size("waverec2", output_size)
    if not details and size is not None and size != tuple(x.shape[-2:]):
        raise ValueError(f"waverec2 of no level gives the size {tuple(x.shape[-2:])} of cA, not {size}")
    if details:
        x = _trimmed(x, details[0])
    for finer, level_details in enumerate(details, start=1):
        remaining = len(details) - finer
        x = idwt2((x, level_details), output_size=_size_at(remaining, details, size))
    return x


def coarse(
    x: Tensor,  # [..., H, W]
    level: int,
    mode: str = "symmetric",
) -> Tensor:  # [..., ceil(H/2^level), ceil(W/2^level)]
    """The approximation band of :func:`wavedec2` alone.

    It is 2^level times the mean of each block of 2^level x 2^level pixels; ``mode`` completes the blocks of
    an odd size.

    Raises:
        TypeError, ValueError: as :func:`wavedec2`.
    """
    _check_tensor("coarse", x)
    for _ in range(_levels("coarse", level)):
        x, _ = dwt2(x, mode)
    return x


def _size_at(
    remaining: int,
    details: Sequence[Sequence[Tensor | None]],
    output_size: tuple[int, int] | None,
) -> tuple[int, int] | None:
    """Size of the image that still has ``remaining`` levels to go up; None where nothing says it."""
    if output_size is not None:
        # Halving and rounding up, once per remaining level.
        return -(-output_size[0] // 2**remaining), -(-output_size[1] // 2**remaining)
    if remaining == 0:
        return None
    band = next((band for band in details[-remaining] if band is not None), None)
    return None if band is None else (band.shape[-2], band.shape[-1])


def _trimmed(approximation: Tensor, details: Sequence[Tensor | None]) -> Tensor:
    """``approximation`` without its last row or column where it has one more than ``details``."""
    band = next((band for band in details if band is not None), None)
    if band is None:
        return approximation
    height, width = (
        size - 1 if size == wanted + 1 else size for size, wanted in zip(approximation.shape[-2:], band.shape[-2:])
    )
    return approximation[..., :height, :width]


def _details(op: str, details: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if not isinstance(details, (tuple, list)) or len(details) != 3:
        raise ValueError(f"{op} takes details (cH, cV, cD), not {_described(details)}")
    return details[0], details[1], details[2]


def _size(op: str, size: Sequence[int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise ValueError(f"{op} takes output_size (H, W), not {size!r}")
    return size[0], size[1]


def _levels(op: str, level: int) -> int:
    if isinstance(level, bool) or not hasattr(level, "__index__"):
        raise TypeError(f"{op} takes an integer level, not {level!r}")
    if level < 0:
        raise ValueError(f"{op} takes a level of at least 0, not {level}")
    return operator.index(level)


def _check_tensor(op: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op} takes torch tensors, not {_described(x)}")
    if x.layout != torch.strided:
        raise TypeError(f"{op} takes dense tensors, not {x.layout}: convert it by .to_dense()")


def _described(value: Any) -> str:
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, (tuple, list)) else "")
