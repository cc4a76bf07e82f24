# SPDX-License-Identifier: Apache-2.0
"""``wavedp::linear_norms`` and its like: norms and clipped sums of the gradients of single records.

``wavedp/reference/per_sample.py`` defines them. They have no derivative: what they give steers a privacy mechanism.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from wavedp.errors import InvalidTypeError, InvalidValueError, StateError
from wavedp.ops.backend import implementation, requested_backend
from wavedp.ops.eager import is_plain
from wavedp.ops.wavelet import define_op
from wavedp.reference import per_sample as reference
from wavedp.reference.per_sample import arithmetic_dtype as arithmetic_dtype

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _module(x: Tensor) -> ModuleType:
    module = implementation("per_sample", x.device)
    if x.device.type == "cuda" and module.__name__.endswith("_native"):
        # The compiled library for these ops is that of the CPU.
        if requested_backend() == "cuda":
            raise StateError("backend 'cuda' has no kernels for the norms of records: ask for 'triton' or 'reference'")
        return reference
    return module


def check_float(op: str, name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise InvalidTypeError(f"{name} of {op} must be float32, float64, bfloat16 or float16, not {x.dtype}")


def _check(
    op: str,
    sequences: Sequence[tuple[str, Tensor]],  # of three axes, of which the first two agree
    factors: Tensor | None = None,
    ids: Tensor | None = None,
    same_width: bool = False,
) -> None:
    if not _fit(sequences[0][1], sequences[-1][1], factors, ids, same_width):
        _refuse(op, sequences, factors, ids, same_width)


def _fit(first: Tensor, last: Tensor, factors: Tensor | None, ids: Tensor | None, same_width: bool) -> bool:
    """Whether :func:`_refuse` has nothing to refuse: a layer of a step cannot wait for it to look."""
    shape, other, device = first.shape, last.shape, first.device
    return (
        len(shape) == len(other) == 3
        and (shape == other if same_width else shape[:2] == other[:2])
        and first.dtype in DTYPES
        and last.dtype in DTYPES
        and last.device == device
        and (ids is None or (ids.dtype == torch.int64 and ids.shape == shape[:2] and ids.device == device))
        and (factors is None or (factors.dtype in DTYPES and factors.shape == shape[:1] and factors.device == device))
    )


def _refuse(
    op: str,
    sequences: Sequence[tuple[str, Tensor]],
    factors: Tensor | None,
    ids: Tensor | None,
    same_width: bool,
) -> None:
    first_name, first = sequences[0]
    for name, x in sequences:
        check_float(op, name, x)
        if x.ndim != 3:
            raise InvalidValueError(f"{name} of {op} must have the axes [B, T, width], not the shape {tuple(x.shape)}")
        if x.shape[:2] != first.shape[:2] or (same_width and x.shape != first.shape):
            raise InvalidValueError(
                f"{first_name} and {name} of {op} disagree on [B, T{', width' * same_width}]: {tuple(first.shape)} "
                f"and {tuple(x.shape)}"
            )
    if ids is not None:
        if ids.dtype != torch.int64:
            raise InvalidTypeError(f"ids of {op} must be int64, not {ids.dtype}")
        if ids.shape != first.shape[:2]:
            raise InvalidValueError(
                f"ids of {op} have the shape {tuple(ids.shape)}, but {first_name} {tuple(first.shape)}: expected [B, T]"
            )
    if factors is not None:
        check_factors(op, factors, first.shape[0])
    others = [("ids", ids), ("factors", factors), *sequences]
    for name, other in others:
        if other is not None and other.device != first.device:
            raise InvalidValueError(f"{first_name} of {op} is on {first.device}, but {name} on {other.device}")


def check_factors(op: str, factors: Tensor, records: int) -> None:
    check_float(op, "factors", factors)
    if tuple(factors.shape) != (records,):
        raise InvalidValueError(f"factors of {op} must have the shape [{records}], not {tuple(factors.shape)}")


def _linear_norms(a: Tensor, g: Tensor, bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    _check("linear_norms", [("a", a), ("g", g)])
    norms: tuple[Tensor, Tensor, Tensor] = _module(g).linear_norms(a, g, bias)
    return norms


def _linear_norms_fake(a: Tensor, g: Tensor, bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    _check("linear_norms", [("a", a), ("g", g)])
    B = a.shape[0]
    squared, bound = (a.new_empty(B, dtype=torch.float64) for _ in range(2))
    return squared, bound, g.new_empty((B, g.shape[2] if bias else 0), dtype=arithmetic_dtype(a.dtype, g.dtype))


def _embedding_norms(ids: Tensor, g: Tensor, padding_idx: int) -> Tensor:
    _check("embedding_norms", [("g", g)], ids=ids)
    squared: Tensor = _module(g).embedding_norms(ids, g, padding_idx)
    return squared


def _embedding_norms_fake(ids: Tensor, g: Tensor, padding_idx: int) -> Tensor:
    _check("embedding_norms", [("g", g)], ids=ids)
    return g.new_empty(g.shape[0], dtype=torch.float64)


def _embedding_weight_grad(ids: Tensor, g: Tensor, factors: Tensor, num_embeddings: int, padding_idx: int) -> Tensor:
    _check("embedding_weight_grad", [("g", g)], factors, ids)
    if num_embeddings < 0:
        raise InvalidValueError(f"embedding_weight_grad takes num_embeddings of at least 0, not {num_embeddings}")
    total: Tensor = _module(g).embedding_weight_grad(ids, g, factors, num_embeddings, padding_idx)
    return total


def _embedding_weight_grad_fake(
    ids: Tensor, g: Tensor, factors: Tensor, num_embeddings: int, padding_idx: int
) -> Tensor:
    _check("embedding_weight_grad", [("g", g)], factors, ids)
    return g.new_empty((num_embeddings, g.shape[2]), dtype=arithmetic_dtype(g.dtype))


def _norm_grads(x: Tensor, g: Tensor, eps: float, subtract_mean: bool) -> tuple[Tensor, Tensor]:
    _check("norm_grads", [("x", x), ("g", g)], same_width=True)
    grads: tuple[Tensor, Tensor] = _module(g).norm_grads(x, g, eps, subtract_mean)
    return grads


def _norm_grads_fake(x: Tensor, g: Tensor, eps: float, subtract_mean: bool) -> tuple[Tensor, Tensor]:
    _check("norm_grads", [("x", x), ("g", g)], same_width=True)
    shape, dtype = (x.shape[0], x.shape[2]), arithmetic_dtype(x.dtype, g.dtype)
    return g.new_empty(shape, dtype=dtype), g.new_empty(shape, dtype=dtype)


def _check_records(op: str, grads: Tensor) -> None:
    check_float(op, "grads", grads)
    if grads.ndim < 1:
        raise InvalidValueError(f"grads of {op} need the record axis first, got a tensor of no axis")


def _squared_norms(grads: Tensor) -> Tensor:
    _check_records("squared_norms", grads)
    squared: Tensor = _module(grads).squared_norms(grads)
    return squared


def _squared_norms_fake(grads: Tensor) -> Tensor:
    _check_records("squared_norms", grads)
    return grads.new_empty(grads.shape[0], dtype=torch.float64)


def _weighted_sum(grads: Tensor, factors: Tensor) -> Tensor:
    _check_records("weighted_sum", grads)
    check_factors("weighted_sum", factors, grads.shape[0])
    total: Tensor = _module(grads).weighted_sum(grads, factors)
    return total


def _weighted_sum_fake(grads: Tensor, factors: Tensor) -> Tensor:
    _check_records("weighted_sum", grads)
    check_factors("weighted_sum", factors, grads.shape[0])
    return grads.new_empty(grads.shape[1:], dtype=arithmetic_dtype(grads.dtype))


def _scaled_weight_grad(g: Tensor, a: Tensor, factors: Tensor) -> Tensor:
    _check("scaled_weight_grad", [("g", g), ("a", a)], factors)
    total: Tensor = _module(g).scaled_weight_grad(g, a, factors)
    return total


def _scaled_weight_grad_fake(g: Tensor, a: Tensor, factors: Tensor) -> Tensor:
    _check("scaled_weight_grad", [("g", g), ("a", a)], factors)
    return g.new_empty((g.shape[2], a.shape[2]), dtype=arithmetic_dtype(a.dtype, g.dtype))


define_op("linear_norms(Tensor a, Tensor g, bool bias) -> (Tensor, Tensor, Tensor)", _linear_norms, _linear_norms_fake)
define_op(
    "embedding_norms(Tensor ids, Tensor g, int padding_idx) -> Tensor",
    _embedding_norms,
    _embedding_norms_fake,
)
define_op(
    "embedding_weight_grad(Tensor ids, Tensor g, Tensor factors, SymInt num_embeddings, int padding_idx) -> Tensor",
    _embedding_weight_grad,
    _embedding_weight_grad_fake,
)
define_op(
    "norm_grads(Tensor x, Tensor g, float eps, bool subtract_mean) -> (Tensor, Tensor)",
    _norm_grads,
    _norm_grads_fake,
)
define_op("squared_norms(Tensor grads) -> Tensor", _squared_norms, _squared_norms_fake)
define_op("weighted_sum(Tensor grads, Tensor factors) -> Tensor", _weighted_sum, _weighted_sum_fake)
define_op(
    "scaled_weight_grad(Tensor g, Tensor a, Tensor factors) -> Tensor",
    _scaled_weight_grad,
    _scaled_weight_grad_fake,
)

_ops: Any = torch.ops.wavedp


def _past_dispatcher(op: Callable[..., Any], compute: Callable[..., Any], tensors: int) -> Callable[..., Any]:
    """The op of as many tensors and further arguments, or what computes it where nothing else would look at the call.

    Between the layers of a backward, when no cache holds the interpreter's own memory, the dispatcher takes longer than
    many a layer's norms.
    """

    def call(*arguments: Any) -> Any:
        return (compute if is_plain(*arguments[:tensors]) else op)(*arguments)

    return call


linear_norms = _past_dispatcher(_ops.linear_norms, _linear_norms, 2)
embedding_norms = _past_dispatcher(_ops.embedding_norms, _embedding_norms, 2)
embedding_weight_grad = _past_dispatcher(_ops.embedding_weight_grad, _embedding_weight_grad, 3)
norm_grads = _past_dispatcher(_ops.norm_grads, _norm_grads, 2)
squared_norms = _past_dispatcher(_ops.squared_norms, _squared_norms, 1)
weighted_sum = _past_dispatcher(_ops.weighted_sum, _weighted_sum, 2)
scaled_weight_grad = _past_dispatcher(_ops.scaled_weight_grad, _scaled_weight_grad, 3)
