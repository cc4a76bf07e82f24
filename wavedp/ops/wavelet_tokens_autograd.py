# SPDX-License-Identifier: Apache-2.0
"""Derivatives and batching of the token ops, and the way that a call of them takes: as in ``wavelet_autograd``.

Both are affine in the image or the tokens, and each is the other's adjoint once the shift is left out. Shift and
scale are constants; the scale is what is kept for backward. Energies carry no gradient.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wavedp.errors import InvalidValueError, StateError
from wavedp.ops.backend import requested_backend, use_backend
from wavedp.ops.eager import is_differentiated, is_plain
from wavedp.ops.out import copied
from wavedp.ops.wavelet import LIBRARY, torch_library
from wavedp.ops.wavelet_autograd import batched
from wavedp.ops.wavelet_tokens import compute_wavelet_tokens, compute_wavelet_untokens, token_shapes

ops: Any = torch.ops.wavedp


def wavelet_tokens(
    x: Tensor,
    level: int,
    grid: Sequence[int],
    factor: float,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    gain: float = 1.0,
    bias: float = 0.0,
    dtype: torch.dtype | None = None,
    energies: bool = False,
    out: list[Tensor] | None = None,
) -> list[Tensor]:
    """``torch.ops.wavedp.wavelet_tokens``, with forward-mode derivatives and for ``torch.func`` too."""
    arguments = (x, level, grid, factor, shift, scale, gain, bias, dtype, energies)
    others = () if shift is None and scale is None and out is None else (shift, scale, *(out or ()))
    if is_plain(x, *[one for one in others if one is not None]):
        return compute_wavelet_tokens(*arguments, out)
    apply: Any = _WaveletTokens.apply if is_differentiated(x) else ops.wavelet_tokens
    tokens = list(apply(*arguments))
    if out is None:
        return tokens
    return [*copied(out, tokens[: level + 1]), *tokens[level + 1 :]]


def wavelet_untokens(
    tokens: Sequence[Tensor],
    image: Sequence[int],  # C, H, W
    grid: Sequence[int],
    factor: float,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``torch.ops.wavedp.wavelet_untokens``, with forward-mode derivatives and for ``torch.func`` too."""
    if is_plain(*tokens, *[one for one in (shift, scale, out) if one is not None]):
        return compute_wavelet_untokens(tokens, image, grid, factor, shift, scale, out)
    result: Tensor
    if is_differentiated(*tokens):
        apply: Any = _WaveletUntokens.apply
        result = apply(image, grid, factor, shift, scale, *tokens)
    else:
        result = ops.wavelet_untokens(list(tokens), image, grid, factor, shift, scale)
    return result if out is None else out.copy_(result)


def _refuse_batched_constants(dims: Sequence[int | None]) -> None:
    if any(dim is not None for dim in dims):
        raise InvalidValueError(
            "mean and std are constants: vmap cannot run over them; normalise the tokens afterwards"
        )


class _WaveletTokens(torch.autograd.Function):
    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        compute: Any = compute_wavelet_tokens if is_plain(arguments[0]) else ops.wavelet_tokens
        return tuple(compute(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
        x, ctx.level, ctx.grid, ctx.factor, _, scale, ctx.gain, ctx.bias, _, ctx.energies = inputs
        ctx.image, ctx.dtypes, ctx.backend = x.shape[1:], (x.dtype, output[0].dtype), requested_backend()
        ctx.save_for_backward(scale)
        ctx.save_for_forward(scale)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *dtokens: Tensor | None) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        wanted = dtokens[: ctx.level + 1]
        if dtokens[ctx.level + 1 :] not in ((), (None,)):
            raise StateError("energies of wavelet_tokens carry no gradient: take the squares of its tokens")
        given = next((dtoken for dtoken in wanted if dtoken is not None), None)
        if given is None:
            return (None,) * 10
        wide = torch.promote_types(*ctx.dtypes)
        shapes = token_shapes((given.shape[0], *ctx.image), ctx.level, ctx.grid)
        tokens = [
            given.new_zeros(shape, dtype=wide) if dtoken is None else dtoken.to(wide)
            for dtoken, shape in zip(wanted, shapes)
        ]
        with use_backend(ctx.backend):
            dx = wavelet_untokens(tokens, ctx.image, ctx.grid, ctx.factor, None, scale)
        return dx.to(ctx.dtypes[0]), *(None,) * 9

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        constants = (ctx.level, ctx.grid, ctx.factor, None, scale, ctx.gain, ctx.bias, ctx.dtypes[1])
        return *wavelet_tokens(tangent, *constants), *((None,) if ctx.energies else ())

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, *arguments: Any) -> tuple[tuple[Tensor, ...], int]:
        _refuse_batched_constants(in_dims[4:6])
        x = x.movedim(in_dims[0], 0)
        tokens = wavelet_tokens(x.flatten(0, 1), *arguments)
        return tuple(one.unflatten(0, x.shape[:2]) for one in tokens), 0


class _WaveletUntokens(torch.autograd.Function):
    @staticmethod
    def forward(
        image: Sequence[int],
        grid: Sequence[int],
        factor: float,
        shift: Tensor | None,
        scale: Tensor | None,
        *tokens: Tensor,
    ) -> Tensor:
        compute: Any = compute_wavelet_untokens if is_plain(*tokens) else ops.wavelet_untokens
        result: Tensor = compute(list(tokens), image, grid, factor, shift, scale)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.image, ctx.grid, ctx.factor, _, scale, *tokens = inputs
        ctx.level, ctx.backend = len(tokens) - 1, requested_backend()
        ctx.save_for_backward(scale)
        ctx.save_for_forward(scale)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        with use_backend(ctx.backend):
            dtokens = wavelet_tokens(dx, ctx.level, ctx.grid, ctx.factor, None, scale)
        return None, None, None, None, None, *dtokens

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (scale,) = ctx.saved_tensors
        return wavelet_untokens(tangents[5:], ctx.image, ctx.grid, ctx.factor, None, scale)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], image: Sequence[int], grid: Sequence[int], *arguments: Any
    ) -> tuple[Tensor, int]:
        _refuse_batched_constants(in_dims[3:5])
        factor, shift, scale, *tokens = arguments
        stacked = [batched(info, one, dim) for one, dim in zip(tokens, in_dims[5:])]
        result = wavelet_untokens([one.flatten(0, 1) for one in stacked], image, grid, factor, shift, scale)
        return result.unflatten(0, stacked[0].shape[:2]), 0


def _wavelet_tokens_backward(ctx: Any, dtokens: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    return _WaveletTokens.backward(ctx, *dtokens)


def _wavelet_untokens_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, *rest = inputs
    _WaveletUntokens.setup_context(ctx, (*rest, *tokens), output)


def _wavelet_untokens_backward(ctx: Any, dx: Tensor) -> tuple[Any, ...]:
    gradients = _WaveletUntokens.backward(ctx, dx)
    return list(gradients[5:]), *gradients[:5]


# As in wavelet_autograd: an op's own batching rule takes the op again.


def _wavelet_tokens_vmap(
    info: Any, in_dims: tuple[Any, ...], x: Tensor, *constants: Any
) -> tuple[list[Tensor], list[int]]:
    _refuse_batched_constants(in_dims[4:6])
    x = x.movedim(in_dims[0], 0)
    tokens = ops.wavelet_tokens(x.flatten(0, 1), *constants)
    return [one.unflatten(0, x.shape[:2]) for one in tokens], [0] * len(tokens)


def _wavelet_untokens_vmap(
    info: Any, in_dims: tuple[Any, ...], tokens: list[Tensor], *constants: Any
) -> tuple[Tensor, int]:
    _refuse_batched_constants(in_dims[4:6])
    stacked = [batched(info, *one) for one in zip(tokens, in_dims[0])]
    images = ops.wavelet_untokens([one.flatten(0, 1) for one in stacked], *constants)
    return images.unflatten(0, stacked[0].shape[:2]), 0


for _name, _setup, _backward, _vmap in (
    ("wavelet_tokens", _WaveletTokens.setup_context, _wavelet_tokens_backward, _wavelet_tokens_vmap),
    ("wavelet_untokens", _wavelet_untokens_setup, _wavelet_untokens_backward, _wavelet_untokens_vmap),
):
    torch_library.register_autograd(f"wavedp::{_name}", _backward, setup_context=_setup, lib=LIBRARY)
    torch_library.register_vmap(f"wavedp::{_name}", _vmap, lib=LIBRARY)
