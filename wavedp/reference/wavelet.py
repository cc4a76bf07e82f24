# SPDX-License-Identifier: Apache-2.0
"""Definition of the two-dimensional Haar transform and of its adjoint, over any number of levels.

A 2x2 block ``[[a, b], [c, d]]`` becomes ``LL = k(a+b+c+d)``, ``LH = k(a+b-c-d)``, ``HL = k(a-b+c-d)`` and
``HH = k(a-b-c+d)``: order and signs of PyWavelets' ``'haar'`` (cA, cH, cV, cD). The factor ``k`` of a level is 1/2
in the orthonormal transform, whose matrix is its own inverse.

Sums are taken rows first, then columns, and sampled images are completed columns first, then rows; all kernels keep
to this, so that they return the same bits. Half precision is computed in float32 through all levels and rounded once.
"""

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor


class Edge(IntEnum):
    """What stands at ``x[N]`` when an axis of odd length ``N`` is completed to pairs.

    The kernels (``kernels/wavelet.py``, ``csrc/wavelet.h``) are given these numbers.
    """

    ZERO = 0  # 0
    REPEAT = 1  # x[N-1]
    WRAP = 2  # x[0]
    REFLECT = 3  # x[N-2]
    NEGATE = 4  # -x[N-1]
    LINEAR = 5  # 2 x[N-1] - x[N-2]; the flat line x[0] where N == 1


EDGE_OF_MODE = {
    "zero": Edge.ZERO,
    "constant": Edge.REPEAT,
    "symmetric": Edge.REPEAT,
    "periodization": Edge.REPEAT,
    "periodic": Edge.WRAP,
    "reflect": Edge.REFLECT,
    "antisymmetric": Edge.NEGATE,
    "smooth": Edge.LINEAR,
    "antireflect": Edge.LINEAR,
}
"""PyWavelets' mode names. A Haar filter has two taps, so all of them agree on even lengths."""


def band_sizes(height: int, width: int, level: int) -> list[tuple[int, int]]:
    """Sizes of the image and of its bands at levels 1 to ``level``: each half of the one before, rounded up."""
    sizes = [(height, width)]
    for _ in range(level):
        height, width = (height + 1) // 2, (width + 1) // 2
        sizes.append((height, width))
    return sizes


def widened(x: Tensor, gain: float = 1.0, bias: float = 0.0) -> Tensor:
    """``x`` in the precision of the arithmetic; bytes as ``gain * x + bias``."""
    if x.dtype == torch.uint8:
        return x.float() * gain + bias
    return x if x.dtype == torch.float64 else x.float()


def _extend(x: Tensor, edge: Edge, dim: int) -> Tensor:
    size = x.shape[dim]
    if size % 2 == 0:
        return x
    last, before = x.narrow(dim, size - 1, 1), x.narrow(dim, max(size - 2, 0), 1)
    if edge == Edge.ZERO:
        virtual = torch.zeros_like(last)
    elif edge == Edge.REPEAT:
        virtual = last
    elif edge == Edge.WRAP:
        virtual = x.narrow(dim, 0, 1)
    elif edge == Edge.REFLECT:
        virtual = before
    elif edge == Edge.NEGATE:
        virtual = -last
    else:
        virtual = 2 * last - before
    return torch.cat([x, virtual], dim)


def _fold(x: Tensor, size: int, edge: Edge, dim: int) -> Tensor:
    """Adjoint of :func:`_extend`: cuts the virtual sample off and adds it to the samples it was made of."""
    if size % 2 == 0:
        return x
    virtual = x.narrow(dim, size, 1)
    x = x.narrow(dim, 0, size).clone()
    first, last, before = x.narrow(dim, 0, 1), x.narrow(dim, size - 1, 1), x.narrow(dim, max(size - 2, 0), 1)
    if edge == Edge.REPEAT or (edge == Edge.LINEAR and size == 1):
        last += virtual
    elif edge == Edge.WRAP:
        first += virtual
    elif edge == Edge.REFLECT:
        before += virtual
    elif edge == Edge.NEGATE:
        last -= virtual
    elif edge == Edge.LINEAR:
        last += 2 * virtual
        before -= virtual
    return x


def _analyse(x: Tensor, edge: Edge, factor: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LL, LH, HL, HH of one level."""
    padded = _extend(_extend(x, edge, -1), edge, -2)
    top, bottom = padded[..., 0::2, :], padded[..., 1::2, :]
    low, high = top + bottom, top - bottom
    return (
        (low[..., 0::2] + low[..., 1::2]) * factor,
        (high[..., 0::2] + high[..., 1::2]) * factor,
        (low[..., 0::2] - low[..., 1::2]) * factor,
        (high[..., 0::2] - high[..., 1::2]) * factor,
    )


def _synthesise(
    bands: tuple[Tensor, Tensor, Tensor, Tensor], height: int, width: int, edge: Edge, factor: float
) -> Tensor:
    """Transpose of :func:`_analyse`."""
    ll, lh, hl, hh = bands
    top, top_step, bottom, bottom_step = ll + lh, hl + hh, ll - lh, hl - hh
    top = torch.stack([top + top_step, top - top_step], -1).flatten(-2)
    bottom = torch.stack([bottom + bottom_step, bottom - bottom_step], -1).flatten(-2)
    padded = torch.stack([top, bottom], -2).flatten(-3, -2) * factor
    return _fold(_fold(padded, width, edge, -1), height, edge, -2)[..., :height, :width]


def wavedec2_forward(
    x: Tensor,  # [..., H, W]
    level: int,
    edge: Edge,
    factor: float,  # k of the module's formula: 1/2 is orthonormal
) -> list[Tensor]:  # LL_L, then LH, HL, HH of levels L to 1: contiguous [..., ceil(H/2^l), ceil(W/2^l)] each
    """The bands of ``level`` >= 1 levels, in the dtype of ``x``."""
    approximation, details = widened(x), []
    for _ in range(level):
        approximation, *bands = _analyse(approximation, edge, factor)
        details.append(bands)
    bands = [approximation, *(band for bands in reversed(details) for band in bands)]
    return [band.to(x.dtype).contiguous() for band in bands]


def coarse_forward(
    x: Tensor,  # [..., H, W]; uint8 too
    level: int,
    edge: Edge,
    factor: float,
    gain: float = 1.0,  # of bytes: a sample is gain * x + bias
    bias: float = 0.0,
    dtype: torch.dtype | None = None,  # of the result: that of x, or float32 for bytes
) -> Tensor:  # [..., ceil(H/2^level), ceil(W/2^level)]
    """LL of ``level`` >= 1 levels alone."""
    approximation = widened(x, gain, bias)
    for _ in range(level):
        approximation = _analyse(approximation, edge, factor)[0]
    return approximation.to(dtype or (torch.float32 if x.dtype == torch.uint8 else x.dtype)).contiguous()


def waverec2_forward(
    bands: Sequence[Tensor | None],  # as wavedec2_forward returns; None stands for zeros, at least one is given
    height: int,
    width: int,
    edge: Edge,
    factor: float,
) -> Tensor:  # [..., height, width], contiguous
    """Transpose of :func:`wavedec2_forward` under ``edge``. The transpose for ``Edge.ZERO`` is the inverse, up to
    the factor: what lies beyond an odd size is dropped."""
    given = next(band for band in bands if band is not None)
    lead, level = given.shape[:-2], len(bands) // 3
    sizes = band_sizes(height, width, level)
    zeros = [widened(given).new_zeros(()).expand(*lead, *size) for size in sizes]
    wide = [None if band is None else widened(band) for band in bands]
    x = zeros[level] if wide[0] is None else wide[0]
    for k in range(level, 0, -1):
        first = 3 * (level - k) + 1
        lh, hl, hh = (zeros[k] if band is None else band for band in wide[first : first + 3])
        x = _synthesise((x, lh, hl, hh), *sizes[k - 1], edge, factor)
    return x.to(given.dtype).contiguous()
