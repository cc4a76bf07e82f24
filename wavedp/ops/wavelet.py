# SPDX-License-Identifier: Apache-2.0
"""``wavedp::dwt2``, ``wavedp::idwt2`` and ``wavedp::dwt2_backward``: one level of the Haar transform.

Bands travel as one tensor ``[4, ..., h, w]`` in the order LL, LH, HL, HH where all four are there, and one by
one where some may be absent. ``wavedp/ops/wavelet_autograd.py`` differentiates and batches the ops.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from wavedp.ops.backend import implementation
from wavedp.reference.wavelet import EDGE_OF_MODE, Edge

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What the ops take; half precision is computed in float32 and rounded once."""


def edge_rule(mode: str, height: int, width: int) -> Edge:
    """The rule by which ``mode`` completes an odd axis of an image of this size.

    Raises:
        ValueError: unknown mode, or one that reflects an axis of one sample, as PyWavelets refuses it.
    """
    edge = EDGE_OF_MODE.get(mode)
    if edge is None:
        raise ValueError(f"unknown mode {mode!r}; choose from {', '.join(EDGE_OF_MODE)}")
    if mode in ("reflect", "antireflect") and (height == 1 or width == 1):
        raise ValueError(
            f"mode {mode!r} needs at least 2 samples along each axis, but the image is {height} x {width}: "
            "use 'symmetric', or fewer levels"
        )
    return edge


def _check_dtype(op: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"{op} takes float16, bfloat16, float32 or float64, not {x.dtype}: convert it, say by .float()")


def _check_image(x: Tensor) -> None:
    _check_dtype("dwt2", x)
    if x.ndim < 2 or x.shape[-2] == 0 or x.shape[-1] == 0:
        raise ValueError(f"dwt2 takes images [..., H, W] of at least 1 x 1, not a shape of {tuple(x.shape)}")


def _check_bands(bands: Sequence[Tensor | None], height: int, width: int) -> Tensor:
    """Raises unless the bands agree and give an image of this size; returns one of them."""
    given = [band for band in bands if band is not None]
    if not given:
        raise ValueError("idwt2 takes at least one band that is not None")
    first = given[0]
    _check_dtype("idwt2", first)
    if first.ndim < 2:
        raise ValueError(f"idwt2 takes bands [..., h, w], not a shape of {tuple(first.shape)}")
    for band in given[1:]:
        if (band.shape, band.dtype, band.device) != (first.shape, first.dtype, first.device):
            raise ValueError(
                "the bands of idwt2 must agree in shape, dtype and device, but one is "
                f"{tuple(first.shape)} {first.dtype} on {first.device} and another "
                f"{tuple(band.shape)} {band.dtype} on {band.device}"
            )
    h, w = first.shape[-2:]
    if height < 1 or width < 1 or (height + 1) // 2 != h or (width + 1) // 2 != w:
        raise ValueError(
            f"an image of {height} x {width} has bands of {(height + 1) // 2} x {(width + 1) // 2}, "
            f"but these are {h} x {w}"
        )
    return first


def _check_stacked(bands: Tensor, height: int, width: int) -> None:
    if bands.ndim < 3 or bands.shape[0] != 4:
        raise ValueError(f"dwt2_backward takes bands [4, ..., h, w], not a shape of {tuple(bands.shape)}")
    _check_bands((bands[0],), height, width)


def _dwt2(x: Tensor, mode: str) -> Tensor:
    _check_image(x)
    edge = edge_rule(mode, *x.shape[-2:])
    bands: Tensor = implementation("wavelet", x.device).dwt2_forward(x, edge)
    return bands


def _idwt2(
    ll: Tensor | None, lh: Tensor | None, hl: Tensor | None, hh: Tensor | None, height: int, width: int
) -> Tensor:
    device = _check_bands((ll, lh, hl, hh), height, width).device
    x: Tensor = implementation("wavelet", device).idwt2_forward(ll, lh, hl, hh, height, width, Edge.ZERO)
    return x


def _dwt2_backward(bands: Tensor, mode: str, height: int, width: int) -> Tensor:
    _check_stacked(bands, height, width)
    edge = edge_rule(mode, height, width)
    x: Tensor = implementation("wavelet", bands.device).idwt2_forward(*bands, height, width, edge)
    return x


def _dwt2_fake(x: Tensor, mode: str) -> Tensor:
    _check_image(x)
    *lead, height, width = x.shape
    edge_rule(mode, height, width)
    return x.new_empty((4, *lead, (height + 1) // 2, (width + 1) // 2))


def _idwt2_fake(
    ll: Tensor | None, lh: Tensor | None, hl: Tensor | None, hh: Tensor | None, height: int, width: int
) -> Tensor:
    given = _check_bands((ll, lh, hl, hh), height, width)
    return given.new_empty((*given.shape[:-2], height, width))


def _dwt2_backward_fake(bands: Tensor, mode: str, height: int, width: int) -> Tensor:
    _check_stacked(bands, height, width)
    edge_rule(mode, height, width)
    return bands.new_empty((*bands.shape[1:-2], height, width))


_OPS: list[tuple[str, Callable[..., Tensor], Callable[..., Tensor]]] = [
    ("dwt2(Tensor x, str mode) -> Tensor", _dwt2, _dwt2_fake),
    (
        "idwt2(Tensor? ll, Tensor? lh, Tensor? hl, Tensor? hh, SymInt height, SymInt width) -> Tensor",
        _idwt2,
        _idwt2_fake,
    ),
    (
        "dwt2_backward(Tensor bands, str mode, SymInt height, SymInt width) -> Tensor",
        _dwt2_backward,
        _dwt2_backward_fake,
    ),
]

torch_library: Any = torch.library  # its functions have no types
LIBRARY = torch_library.Library("wavedp", "FRAGMENT")
for _schema, _compute, _fake in _OPS:
    _name = _schema.partition("(")[0]
    LIBRARY.define(_schema)
    # The kernel of every device; which module computes is chosen inside, from the tensors' device.
    LIBRARY.impl(_name, _compute, "CompositeExplicitAutograd")
    torch_library.register_fake(f"wavedp::{_name}", _fake, lib=LIBRARY)
