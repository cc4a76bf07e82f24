# SPDX-License-Identifier: Apache-2.0
"""Derivatives and batching of the wavelet ops.

The three ops are linear and closed under differentiation, so nothing is saved but sizes, at any order:

* the gradient of ``dwt2`` is ``dwt2_backward`` (its adjoint, edge rule included), whose gradient is ``dwt2``;
* the gradient of ``idwt2`` is ``dwt2`` in mode ``"zero"``: what ``idwt2`` crops off has no gradient.

An op with a Python gradient has no forward-mode derivative (it drops the tangent) and ``torch.func`` cannot
transform it; ``torch.compile`` cannot trace an ``autograd.Function`` that has such rules. So the rules are
written once, as an ``autograd.Function`` per op, whose backward is registered with the op; :func:`dwt2` and
:func:`idwt2` take the op, which is quicker, or the Function where it is needed.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from wavedp.ops.backend import requested_backend, use_backend
from wavedp.ops.wavelet import LIBRARY, torch_library


def _transformed(*inputs: Tensor | None) -> bool:
    """Whether a ``torch.func`` transform is active, or an input carries a forward-mode tangent."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or any(
        unpack_dual(x).tangent is not None for x in inputs if x is not None
    )


def dwt2(x: Tensor, mode: str) -> Tensor:
    """``torch.ops.wavedp.dwt2``, with forward-mode derivatives and for ``torch.func`` too."""
    apply: Any = _Dwt2.apply if _transformed(x) else torch.ops.wavedp.dwt2
    bands: Tensor = apply(x, mode)
    return bands


def idwt2(
    ll: Tensor | None, lh: Tensor | None, hl: Tensor | None, hh: Tensor | None, height: int, width: int
) -> Tensor:
    """``torch.ops.wavedp.idwt2``, with forward-mode derivatives and for ``torch.func`` too."""
    apply: Any = _Idwt2.apply if _transformed(ll, lh, hl, hh) else torch.ops.wavedp.idwt2
    x: Tensor = apply(ll, lh, hl, hh, height, width)
    return x


def _dwt2_backward(bands: Tensor, mode: str, height: int, width: int) -> Tensor:
    apply: Any = _Dwt2Backward.apply if _transformed(bands) else torch.ops.wavedp.dwt2_backward
    x: Tensor = apply(bands, mode, height, width)
    return x


class _Dwt2(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, mode: str) -> Tensor:
        bands: Tensor = torch.ops.wavedp.dwt2(x, mode)
        return bands

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.mode = inputs
        ctx.size, ctx.backend = x.shape[-2:], requested_backend()

    @staticmethod
    def backward(ctx: Any, dbands: Tensor) -> tuple[Tensor, None]:
        with use_backend(ctx.backend):
            return _dwt2_backward(dbands, ctx.mode, *ctx.size), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return dwt2(tangent, ctx.mode)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, mode: str) -> tuple[Tensor, int]:
        return dwt2(x.movedim(in_dims[0], 0), mode), 1


class _Idwt2(torch.autograd.Function):
    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        x: Tensor = torch.ops.wavedp.idwt2(*arguments)
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *bands, ctx.height, ctx.width = inputs
        ctx.given, ctx.backend = [band is not None for band in bands], requested_backend()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        with use_backend(ctx.backend):
            dbands = dwt2(dx, "zero").unbind(0)
        return *(dband if given else None for dband, given in zip(dbands, ctx.given)), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        ll, lh, hl, hh, _, _ = tangents
        return idwt2(ll, lh, hl, hh, ctx.height, ctx.width)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
        def batched(band: Tensor | None, dim: int | None) -> Tensor | None:
            if band is None:
                return None
            return band.expand(info.batch_size, *band.shape) if dim is None else band.movedim(dim, 0)

        ll, lh, hl, hh = map(batched, arguments[:4], in_dims)
        return idwt2(ll, lh, hl, hh, *arguments[4:]), 0


class _Dwt2Backward(torch.autograd.Function):
    @staticmethod
    def forward(bands: Tensor, mode: str, height: int, width: int) -> Tensor:
        x: Tensor = torch.ops.wavedp.dwt2_backward(bands, mode, height, width)
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.mode, ctx.height, ctx.width = inputs
        ctx.backend = requested_backend()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None, None]:
        with use_backend(ctx.backend):
            return dwt2(dx, ctx.mode), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _dwt2_backward(tangent, ctx.mode, ctx.height, ctx.width)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], bands: Tensor, mode: str, height: int, width: int
    ) -> tuple[Tensor, int]:
        return _dwt2_backward(bands.movedim(in_dims[0], 1), mode, height, width), 0


for _name, _rules in (("dwt2", _Dwt2), ("idwt2", _Idwt2), ("dwt2_backward", _Dwt2Backward)):
    torch_library.register_autograd(
        f"wavedp::{_name}", _rules.backward, setup_context=_rules.setup_context, lib=LIBRARY
    )
