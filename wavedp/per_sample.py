# SPDX-License-Identifier: Apache-2.0
"""Norms of the gradients of single records, and clipped sums of them, for any training loop.

They are public as ``wavedp.ghost_norm`` and so on. A record is one entry of the first axis. All take float32, float64,
bfloat16 and float16 with any strides (half precision is computed in float32), accept no record at all, and give
results that carry no gradient. A record with an entry that is not finite has a norm that is not finite, gets the factor
0, is left out of sums by that, and leaves the other records as they are.
"""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from wavedp.errors import InvalidTypeError, InvalidValueError
from wavedp.ops import per_sample as ops
from wavedp.ops.arguments import check_tensor, described

_ROUND_DOWN = {torch.float32: 1.0 - 2.0**-22, torch.float64: 1.0 - 2.0**-50}


def ghost_norm(
    activations: Tensor,  # [B, ..., d], inputs of a linear layer
    grad_outputs: Tensor,  # [B, ..., p], gradients of the loss with respect to its outputs
) -> Tensor:  # [B] float64
    """Squared norms of every record's gradient of a linear layer's weight, without making the gradients.

    Record b has the gradient ``sum_t g_bt a_bt^T`` [p, d] over its tokens t, the axes between the first and the last.
    Its squared norm is ``<a a^T, g g^T>`` (Goodfellow 2015; Li et al. 2022) or the sum of squares of tiles of
    ``g^T a``, whichever takes fewer multiplications. Rounding errors are those of float32 (float64 for float64)
    relative to ``(sum_t |g_bt| |a_bt|)^2``, which is more than the result where tokens cancel; no size of the entries
    overflows or vanishes on the way.

    Raises:
        TypeError: not two tensors of the four dtypes.
        ValueError: fewer than two axes, or shapes that agree in other axes than the last, or devices, do not.
    """
    for name, x in (("activations", activations), ("grad_outputs", grad_outputs)):
        _check_float("ghost_norm", name, x)
        if x.ndim < 2:
            raise InvalidValueError(
                f"{name} of ghost_norm need the axes [B, ..., width], not the shape {tuple(x.shape)}"
            )
    _check_tokens("ghost_norm", activations, grad_outputs)
    squared: Tensor = ops.linear_norms(_tokens(activations.detach()), _tokens(grad_outputs.detach()), False)[0]
    return squared


def embedding_grad_norm(
    ids: Tensor,  # [B, ...] of integers
    grad_outputs: Tensor,  # [B, ..., d], gradients of the loss with respect to the embedding's outputs
    padding_idx: int | None = None,
) -> Tensor:  # [B] float64
    """Squared norms of every record's gradient of an embedding's weight.

    Row v of the gradient of record b is the sum of ``grad_outputs`` over its tokens with the id v: ids that come up
    several times in a record add up before they are squared. Tokens with ``padding_idx`` count for nothing.

    Raises:
        TypeError: ``ids`` are not integers, or ``grad_outputs`` not of one of the four dtypes.
        ValueError: the shape of ``ids`` is not that of ``grad_outputs`` without the last axis, ``padding_idx`` is
            negative, or the devices differ.
    """
    check_tensor("embedding_grad_norm", ids)
    _check_float("embedding_grad_norm", "grad_outputs", grad_outputs)
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise InvalidTypeError(f"ids of embedding_grad_norm must be integers, not {ids.dtype}")
    if ids.ndim < 1 or tuple(ids.shape) != tuple(grad_outputs.shape[:-1]):
        raise InvalidValueError(
            f"ids of embedding_grad_norm have the shape {tuple(ids.shape)}, grad_outputs {tuple(grad_outputs.shape)}: "
            "expected [B, ...] and [B, ..., d]"
        )
    if padding_idx is not None and (isinstance(padding_idx, bool) or not hasattr(padding_idx, "__index__")):
        raise InvalidTypeError(f"embedding_grad_norm takes an integer padding_idx or None, not {padding_idx!r}")
    if padding_idx is not None and padding_idx < 0:
        raise InvalidValueError(
            f"embedding_grad_norm takes a padding_idx of at least 0, not {padding_idx}: add the number of embeddings"
        )
    grads = _tokens(grad_outputs.detach())
    squared: Tensor = ops.embedding_norms(
        ids.to(torch.int64).reshape(grads.shape[:2]), grads, -1 if padding_idx is None else int(padding_idx)
    )
    return squared


def per_sample_norm(
    grad_samples: Sequence[Tensor],  # each [B, *parameter_shape]
) -> Tensor:  # [B] float64
    """Norms (not squared) of every record's gradient over all tensors, summed in float64.

    Raises:
        ValueError: no tensors, a tensor without a record axis, or tensors that disagree on B or the device.
        TypeError: gradients that are not tensors of one of the four dtypes.
    """
    return _squared_norms("per_sample_norm", grad_samples).sqrt()


def clip_factors(
    norms: Tensor,  # [B], not squared
    max_grad_norm: float,
) -> Tensor:  # [B] float32
    """``min(1, C / norm)`` (Abadi et al. 2016), rounded down.

    Formal guarantees: ``factor * norm <= max_grad_norm`` for every norm, in real arithmetic. A norm of 0 has the
    factor 1, and nothing is added to a norm. One that is not finite has the factor exactly 0, as has one so large that
    its factor is no normal float32 number: such a record is to be left out of sums, not multiplied.

    Raises:
        TypeError: ``norms`` is not a tensor of one of the four dtypes, or ``max_grad_norm`` not a real number.
        ValueError: ``norms`` has other axes than one, or ``max_grad_norm`` is not positive and finite.
    """
    _check_float("clip_factors", "norms", norms)
    if norms.ndim != 1:
        raise InvalidValueError(f"norms of clip_factors must have the shape [B], not {tuple(norms.shape)}")
    return _factors(norms.detach(), _checked_bound("clip_factors", max_grad_norm), torch.float32)


def clip_and_sum(
    grad_samples: Sequence[Tensor],  # each [B, *parameter_shape]
    max_grad_norm: float,
) -> list[Tensor]:  # each parameter_shape, float32, or float64 for float64
    """Clips the gradients of every record to ``max_grad_norm`` over all tensors at once, and sums them.

    Formal guarantees: adding or removing one record moves the result by at most ``max_grad_norm`` in l2 norm, up to
    the rounding of the sums. A record with an entry that is not finite contributes exactly zero and leaves the
    others unchanged. Sums are taken in float64 and rounded once. Nothing is divided by a batch size.

    Raises:
        ValueError: as :func:`per_sample_norm`, or ``max_grad_norm`` is not positive and finite.
        TypeError: as :func:`per_sample_norm`, or ``max_grad_norm`` is not a real number.
    """
    bound = _checked_bound("clip_and_sum", max_grad_norm)
    norms = _squared_norms("clip_and_sum", grad_samples).sqrt()
    factors: dict[torch.dtype, Tensor] = {}
    sums = []
    for grads in grad_samples:
        dtype = ops.arithmetic_dtype(grads.dtype)
        if dtype not in factors:
            factors[dtype] = _factors(norms, bound, dtype)
        sums.append(ops.weighted_sum(grads.detach(), factors[dtype]))
    return sums


def scaled_weight_grad(
    grad_outputs: Tensor,  # [B, ..., p], gradients of the loss with respect to a linear layer's outputs
    activations: Tensor,  # [B, ..., d], its inputs
    factors: Tensor,  # [B]
) -> Tensor:  # [p, d] float32, or float64 for float64
    """``sum_b factors_b g_b^T a_b``, the clipped sum of a linear layer's weight gradients, as one matrix product.

    A record whose factor is 0 is left out, whatever its entries are. Products add up in float32 in blocks of at most 64
    records and 8192 tokens, and blocks in float64.

    Raises:
        TypeError: not three tensors of the four dtypes.
        ValueError: fewer than two axes, or shapes or devices that do not agree.
    """
    op = "scaled_weight_grad"
    for name, x in (("grad_outputs", grad_outputs), ("activations", activations)):
        _check_float(op, name, x)
        if x.ndim < 2:
            raise InvalidValueError(f"{name} of {op} need the axes [B, ..., width], not the shape {tuple(x.shape)}")
    _check_tokens(op, activations, grad_outputs)
    check_tensor(op, factors)
    ops.check_factors(op, factors, grad_outputs.shape[0])
    total: Tensor = ops.scaled_weight_grad(
        _tokens(grad_outputs.detach()), _tokens(activations.detach()), factors.detach()
    )
    return total


def _check_float(op: str, name: str, x: Any) -> None:
    check_tensor(op, x)
    ops.check_float(op, name, x)


def _check_tokens(op: str, activations: Tensor, grad_outputs: Tensor) -> None:
    """Raises unless both have the same records and tokens."""
    if activations.shape[:-1] != grad_outputs.shape[:-1]:
        raise InvalidValueError(
            f"activations {tuple(activations.shape)} and grad_outputs {tuple(grad_outputs.shape)} of {op} must agree "
            "in all axes but the last"
        )


def _tokens(x: Tensor) -> Tensor:
    """[B, ..., d] -> [B, T, d]; a record of [B, d] is one token."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def _checked_bound(op: str, max_grad_norm: Any) -> float:
    if isinstance(max_grad_norm, bool) or not isinstance(max_grad_norm, Real):
        raise InvalidTypeError(f"{op} takes a real number max_grad_norm, not {described(max_grad_norm)}")
    try:
        bound = float(max_grad_norm)
    except OverflowError:
        bound = math.inf
    if not (bound > 0 and math.isfinite(bound)):
        raise InvalidValueError(f"{op} takes a max_grad_norm that is positive and finite, not {bound}")
    return bound


def _squared_norms(op: str, grad_samples: Any) -> Tensor:
    if not isinstance(grad_samples, (list, tuple)):
        raise InvalidTypeError(f"{op} takes a list of tensors [B, *parameter_shape], not {described(grad_samples)}")
    if not grad_samples:
        raise InvalidValueError(f"grad_samples of {op} is empty: give one tensor [B, *parameter_shape] per parameter")
    for grads in grad_samples:
        _check_float(op, "grad_samples", grads)
        if grads.ndim == 0:
            raise InvalidValueError(
                f"every tensor of grad_samples of {op} needs the record axis first, got a 0-d tensor"
            )
        if grads.shape[0] != grad_samples[0].shape[0]:
            sizes = sorted({x.shape[0] for x in grad_samples})
            raise InvalidValueError(f"grad_samples of {op} disagree on the number of records: {sizes}")
        if grads.device != grad_samples[0].device:
            raise InvalidValueError(f"grad_samples of {op} lie on {grad_samples[0].device} and on {grads.device}")
    total: Tensor = ops.squared_norms(grad_samples[0].detach())
    for grads in grad_samples[1:]:
        total = total + ops.squared_norms(grads.detach())
    return total


def _factors(norms: Tensor, bound: float, dtype: torch.dtype) -> Tensor:
    ratio = bound / norms.double() * _ROUND_DOWN[dtype]
    # C / 0 is infinite and stays unclipped; C / inf is 0; NaN fails both comparisons and ends as 0.
    factors = torch.where(ratio >= 1.0, torch.ones_like(ratio), ratio)
    return torch.where(factors >= torch.finfo(dtype).tiny, factors, torch.zeros_like(factors)).to(dtype)
