# SPDX-License-Identifier: Apache-2.0
"""Definition of the orthonormal two-dimensional Haar transform and of its adjoint.

A 2x2 block ``[[a, b], [c, d]]`` becomes ``LL = (a+b+c+d)/2``, ``LH = (a+b-c-d)/2``, ``HL = (a-b+c-d)/2`` and
``HH = (a-b-c+d)/2``: order, signs and scale of PyWavelets' ``'haar'`` (cA, cH, cV, cD).
"""

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


def _widened(x: Tensor) -> Tensor:
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


def dwt2_forward(
    x: Tensor,  # [..., H, W]
    edge: Edge,
) -> Tensor:  # [4, ..., ceil(H/2), ceil(W/2)]
    """LL, LH, HL, HH of one level, in the dtype of ``x``; half precision is computed in float32."""
    padded = _extend(_extend(_widened(x), edge, -1), edge, -2)
    a, b = padded[..., 0::2, 0::2], padded[..., 0::2, 1::2]
    c, d = padded[..., 1::2, 0::2], padded[..., 1::2, 1::2]
    left, right = (a + b, c + d), (a - b, c - d)
    bands = [left[0] + left[1], left[0] - left[1], right[0] + right[1], right[0] - right[1]]
    return (torch.stack(bands) / 2).to(x.dtype)


def idwt2_forward(
    ll: Tensor | None,  # [..., h, w] each; None stands for zeros, at least one is given
    lh: Tensor | None,
    hl: Tensor | None,
    hh: Tensor | None,
    height: int,
    width: int,
    edge: Edge,
) -> Tensor:  # [..., height, width]
    """Adjoint of :func:`dwt2_forward` under ``edge``; with ``Edge.ZERO``, or even sizes, the inverse."""
    given = next(band for band in (ll, lh, hl, hh) if band is not None)
    ll, lh, hl, hh = (
        torch.zeros_like(given, dtype=_widened(given).dtype) if band is None else _widened(band)
        for band in (ll, lh, hl, hh)
    )
    top = torch.stack([(ll + lh) + (hl + hh), (ll + lh) - (hl + hh)], -1).flatten(-2)
    bottom = torch.stack([(ll - lh) + (hl - hh), (ll - lh) - (hl - hh)], -1).flatten(-2)
    padded = torch.stack([top, bottom], -2).flatten(-3, -2) / 2
    x = _fold(_fold(padded, width, edge, -1), height, edge, -2)
    return x[..., :height, :width].to(given.dtype).contiguous()
