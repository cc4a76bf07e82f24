# SPDX-License-Identifier: Apache-2.0
"""Derivatives and batching of the wavelet ops, and the way that a call of them takes.

The ops are linear and closed under differentiation, so nothing is saved but sizes, at any order:

* the gradient of ``wavedec2`` is ``waverec2`` of the same mode and factor (its adjoint, edge rule included), and
  the other way round; a band without a gradient is not read, and where the approximation alone was given, no detail
  is computed;
* the gradient of ``coarse`` is ``waverec2`` of the approximation alone, and the other way round.

An op with a Python gradient has no forward-mode derivative (it drops the tangent) and ``torch.func`` cannot
transform it; ``torch.compile`` cannot trace an ``autograd.Function`` that has such rules. So the rules are written
once, as an ``autograd.Function`` per op, whose backward is registered with the op too. The functions here take the
Function in eager mode and the op where a call is traced, or go straight to the kernel (:mod:`wavedp.ops.eager`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wavedp.ops.backend import requested_backend, use_backend
from wavedp.ops.eager import is_differentiated, is_plain
from wavedp.ops.out import copied
from wavedp.ops.wavelet import (
    LIBRARY,
    check_bands,
    compute_coarse,
    compute_wavedec2,
    compute_waverec2,
    compute_waverec2_of,
    torch_library,
)

ops: Any = torch.ops.wavedp


def wavedec2(x: Tensor, level: int, mode: str, factor: float, out: list[Tensor] | None = None) -> list[Tensor]:
    """The bands of ``level`` >= 1 levels, by the way that ``x`` needs."""
    if is_plain(x, *(out or ())):
        return compute_wavedec2(x, level, mode, factor, out)
    apply: Any = _Wavedec2.apply if is_differentiated(x) else ops.wavedec2
    bands = list(apply(x, level, mode, factor))
    return bands if out is None else copied(out, bands)


def waverec2(
    bands: Sequence[Tensor | None],  # all 3 L + 1; None stands for zeros
    height: int,
    width: int,
    mode: str,
    factor: float,
    out: Tensor | None = None,
) -> Tensor:
    """The image of the bands, by the way that they need."""
    present = [band for band in bands if band is not None]
    given = [band is not None for band in bands]
    if is_plain(*present, *(() if out is None else (out,))):
        check_bands(present, given, height, width)
        return compute_waverec2_of(bands, present[0], height, width, mode, factor, out)
    image: Tensor
    if is_differentiated(*present):
        apply: Any = _Waverec2.apply
        image = apply(given, height, width, mode, factor, *present)
    else:
        image = ops.waverec2(present, given, height, width, mode, factor)
    return image if out is None else out.copy_(image)


def coarse(
    x: Tensor,
    level: int,
    mode: str,
    factor: float,
    gain: float = 1.0,
    bias: float = 0.0,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """LL of ``level`` >= 1 levels, by the way that ``x`` needs."""
    if is_plain(x, *(() if out is None else (out,))):
        return compute_coarse(x, level, mode, factor, gain, bias, dtype, out)
    apply: Any = _Coarse.apply if is_differentiated(x) else ops.coarse
    result: Tensor = apply(x, level, mode, factor, gain, bias, dtype)
    return result if out is None else out.copy_(result)


def batched(info: Any, x: Tensor, dim: int | None) -> Tensor:
    """``x`` with the axis of a vmap in front."""
    return x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)


class _Wavedec2(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, level: int, mode: str, factor: float) -> tuple[Tensor, ...]:
        compute: Any = compute_wavedec2 if is_plain(x) else ops.wavedec2
        return tuple(compute(x, level, mode, factor))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
        x, ctx.level, ctx.mode, ctx.factor = inputs
        ctx.size, ctx.backend = x.shape[-2:], requested_backend()
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *dbands: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if all(dband is None for dband in dbands):
            return None, None, None, None
        with use_backend(ctx.backend):
            return waverec2(dbands, ctx.size[0], ctx.size[1], ctx.mode, ctx.factor), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor, ...]:
        return tuple(wavedec2(tangent, ctx.level, ctx.mode, ctx.factor))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, level: int, mode: str, factor: float
    ) -> tuple[tuple[Tensor, ...], int]:
        return tuple(wavedec2(x.movedim(in_dims[0], 0), level, mode, factor)), 0


class _Waverec2(torch.autograd.Function):
    @staticmethod
    def forward(given: list[bool], height: int, width: int, mode: str, factor: float, *bands: Tensor) -> Tensor:
        compute: Any = compute_waverec2 if is_plain(*bands) else ops.waverec2
        image: Tensor = compute(list(bands), given, height, width, mode, factor)
        return image

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.given, ctx.height, ctx.width, ctx.mode, ctx.factor, *_ = inputs
        ctx.backend = requested_backend()
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None) -> tuple[Tensor | None, ...]:
        if dx is None:
            return tuple([None] * (5 + sum(ctx.given)))
        level = len(ctx.given) // 3
        with use_backend(ctx.backend):
            if sum(ctx.given) == 1 and ctx.given[0]:
                return None, None, None, None, None, coarse(dx, level, ctx.mode, ctx.factor)
            dbands = wavedec2(dx, level, ctx.mode, ctx.factor)
        return None, None, None, None, None, *(dband for dband, there in zip(dbands, ctx.given) if there)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        rest = iter(tangents[5:])
        bands = [next(rest) if there else None for there in ctx.given]
        return waverec2(bands, ctx.height, ctx.width, ctx.mode, ctx.factor)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], given: list[bool], *arguments: Any) -> tuple[Tensor, int]:
        rest = iter(zip(arguments[4:], in_dims[5:]))
        bands = [batched(info, *next(rest)) if there else None for there in given]
        return waverec2(bands, *arguments[:4]), 0


class _Coarse(torch.autograd.Function):
    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        compute: Any = compute_coarse if is_plain(arguments[0]) else ops.coarse
        result: Tensor = compute(*arguments)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.level, ctx.mode, ctx.factor, ctx.gain, ctx.bias, _ = inputs
        ctx.size, ctx.dtypes, ctx.backend = x.shape[-2:], (x.dtype, output.dtype), requested_backend()

    @staticmethod
    def backward(ctx: Any, dband: Tensor) -> tuple[Tensor | None, ...]:
        wide = torch.promote_types(*ctx.dtypes)
        bands = [dband.to(wide), *[None] * (3 * ctx.level)]
        with use_backend(ctx.backend):
            dx = waverec2(bands, ctx.size[0], ctx.size[1], ctx.mode, ctx.factor)
        return dx.to(ctx.dtypes[0]), None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return coarse(tangent, ctx.level, ctx.mode, ctx.factor, ctx.gain, ctx.bias, ctx.dtypes[1])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, *arguments: Any) -> tuple[Tensor, int]:
        return coarse(x.movedim(in_dims[0], 0), *arguments), 0


def _wavedec2_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _Wavedec2.setup_context(ctx, inputs, output)


def _wavedec2_backward(ctx: Any, dbands: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    return _Wavedec2.backward(ctx, *dbands)


def _waverec2_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    bands, *rest = inputs
    _Waverec2.setup_context(ctx, (*rest, *bands), output)


def _waverec2_backward(ctx: Any, dx: Tensor | None) -> tuple[Any, ...]:
    gradients = _Waverec2.backward(ctx, dx)
    return list(gradients[5:]), *gradients[:5]


# Inside an op's own batching rule no transform can begin: it takes the op again, not a Function.


def _wavedec2_vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, *constants: Any) -> tuple[list[Tensor], list[int]]:
    bands = ops.wavedec2(x.movedim(in_dims[0], 0), *constants)
    return bands, [0] * len(bands)


def _waverec2_vmap(info: Any, in_dims: tuple[Any, ...], bands: list[Tensor], *constants: Any) -> tuple[Tensor, int]:
    return ops.waverec2([batched(info, *one) for one in zip(bands, in_dims[0])], *constants), 0


def _coarse_vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, *constants: Any) -> tuple[Tensor, int]:
    return ops.coarse(x.movedim(in_dims[0], 0), *constants), 0


for _name, _setup, _backward, _vmap in (
    ("wavedec2", _wavedec2_setup, _wavedec2_backward, _wavedec2_vmap),
    ("waverec2", _waverec2_setup, _waverec2_backward, _waverec2_vmap),
    ("coarse", _Coarse.setup_context, _Coarse.backward, _coarse_vmap),
):
    torch_library.register_autograd(f"wavedp::{_name}", _backward, setup_context=_setup, lib=LIBRARY)
    torch_library.register_vmap(f"wavedp::{_name}", _vmap, lib=LIBRARY)
