# SPDX-License-Identifier: Apache-2.0
"""The per-record ops of the C++ library: tensors to addresses. ``csrc/per_sample.h`` says what they expect."""

import math

import torch
from torch import Tensor

from wavedp.ops.wavelet_native import DTYPE_CODES, compiled
from wavedp.reference import per_sample as reference
from wavedp.reference.per_sample import arithmetic_dtype

_MAX_BLOCK_ENTRIES = 1 << 22
"""Of the sums of all blocks of a weight gradient, which are held together; above it they are added up one by one."""


def _sequences(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:  # [B, T, width], any strides
    """The tensor with a contiguous last axis, and its sizes and strides."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    return x, (*x.shape, *x.stride()[:2])


def linear_norms(a: Tensor, g: Tensor, bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`wavedp.reference.per_sample.linear_norms` by the C++ library."""
    B, T, d = a.shape
    p = g.shape[2]
    a, a_axes = _sequences(a)
    g, g_axes = _sequences(g)
    dtype = arithmetic_dtype(a.dtype, g.dtype)
    if 0 in (B, T, d, p):
        sums = g.new_zeros((B, p if bias else 0), dtype=dtype) if T == 0 or not bias else g.sum(1, dtype=dtype)
        return g.new_zeros(B, dtype=torch.float64), g.new_zeros(B, dtype=torch.float64), sums
    sums = g.new_empty((B, p if bias else 0), dtype=dtype)
    squared, bound = g.new_empty(B, dtype=torch.float64), g.new_empty(B, dtype=torch.float64)
    inputs = a.data_ptr(), DTYPE_CODES[a.dtype], a_axes
    grads = g.data_ptr(), DTYPE_CODES[g.dtype], g_axes
    addresses = squared.data_ptr(), bound.data_ptr(), sums.data_ptr() if bias else 0
    compiled("linear_norms")(*inputs, *grads, *addresses, torch.get_num_threads())
    return squared, bound, sums


def embedding_norms(ids: Tensor, g: Tensor, padding_idx: int) -> Tensor:
    """:func:`wavedp.reference.per_sample.embedding_norms` by the C++ library."""
    squared = g.new_zeros(g.shape[0], dtype=torch.float64)
    if g.numel() > 0:
        ids, (g, axes) = ids.contiguous(), _sequences(g)
        grads = g.data_ptr(), DTYPE_CODES[g.dtype], axes
        compiled("embedding_norms")(ids.data_ptr(), *grads, padding_idx, squared.data_ptr(), torch.get_num_threads())
    return squared


def embedding_weight_grad(ids: Tensor, g: Tensor, factors: Tensor, num_embeddings: int, padding_idx: int) -> Tensor:
    """:func:`wavedp.reference.per_sample.embedding_weight_grad` by the C++ library."""
    shape, dtype = (num_embeddings, g.shape[2]), arithmetic_dtype(g.dtype)
    if g.numel() == 0:
        return g.new_zeros(shape, dtype=dtype)
    grad = g.new_empty(shape, dtype=dtype)
    ids, factors, (g, axes) = ids.contiguous(), factors.double().contiguous(), _sequences(g)
    arguments = ids.data_ptr(), g.data_ptr(), DTYPE_CODES[g.dtype], axes, factors.data_ptr()
    threads = torch.get_num_threads()
    if not compiled("embedding_weight_grad")(*arguments, num_embeddings, padding_idx, grad.data_ptr(), threads):
        raise IndexError(f"ids of embedding_weight_grad reach outside of the {num_embeddings} rows of the embedding")
    return grad


def norm_grads(x: Tensor, g: Tensor, eps: float, subtract_mean: bool) -> tuple[Tensor, Tensor]:
    """:func:`wavedp.reference.per_sample.norm_grads` by the C++ library."""
    shape, dtype = (x.shape[0], x.shape[2]), arithmetic_dtype(x.dtype, g.dtype)
    if x.numel() == 0:
        return g.new_zeros(shape, dtype=dtype), g.new_zeros(shape, dtype=dtype)
    weight, bias = g.new_empty(shape, dtype=dtype), g.new_empty(shape, dtype=dtype)
    (x, x_axes), (g, g_axes) = _sequences(x), _sequences(g)
    values = x.data_ptr(), DTYPE_CODES[x.dtype], x_axes
    grads = g.data_ptr(), DTYPE_CODES[g.dtype], g_axes
    addresses = weight.data_ptr(), bias.data_ptr()
    compiled("norm_grads")(*values, *grads, eps, subtract_mean, *addresses, torch.get_num_threads())
    return weight, bias


def _records(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:  # [B, ...]
    """The tensor as records of one row each, contiguous within, and its sizes and strides."""
    x = x.reshape(x.shape[0], 1, math.prod(x.shape[1:]))
    return _sequences(x)


def squared_norms(grads: Tensor) -> Tensor:
    """:func:`wavedp.reference.per_sample.squared_norms` by the C++ library."""
    squared = grads.new_zeros(grads.shape[0], dtype=torch.float64)
    if grads.numel() > 0:
        x, axes = _records(grads)
        code = DTYPE_CODES[x.dtype]
        compiled("squared_norms")(x.data_ptr(), code, axes, squared.data_ptr(), torch.get_num_threads())
    return squared


def weighted_sum(grads: Tensor, factors: Tensor) -> Tensor:
    """:func:`wavedp.reference.per_sample.weighted_sum` by the C++ library."""
    total = grads.new_zeros(grads.shape[1:], dtype=arithmetic_dtype(grads.dtype))
    if grads.numel() > 0:
        (x, axes), factors = _records(grads), factors.double().contiguous()
        addresses = factors.data_ptr(), total.data_ptr()
        compiled("weighted_sum")(x.data_ptr(), DTYPE_CODES[x.dtype], axes, *addresses, torch.get_num_threads())
    return total


def _scale_records(x: Tensor, factors: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """:func:`wavedp.reference.per_sample.scale_records` by the C++ library."""
    if x.numel() == 0 or (dtype == torch.float64) != (x.dtype == torch.float64):
        return reference.scale_records(x, factors, dtype)
    scaled = torch.empty(x.shape, dtype=dtype)
    (x, axes), factors = _sequences(x), factors.double().contiguous()
    arguments = x.data_ptr(), DTYPE_CODES[x.dtype], axes, factors.data_ptr(), reference.SMALLEST_ROW
    is_precise: bool = compiled("scale_records")(*arguments, scaled.data_ptr(), torch.get_num_threads())
    return scaled, is_precise


def _equal_blocks(B: int, T: int, entries: int) -> tuple[int, int]:
    """How many blocks of how many records add up in float32, as in the reference, with no more than a block left over.

    Where there are as many as threads, they are a multiple of them, which then end together, if as many sums of so many
    entries may be held.
    """
    most = min(reference.MAX_RECORDS_IN_FLOAT32, reference.MAX_ROWS_IN_FLOAT32 // max(T, 1))
    if most == 0 or most >= B:
        return 1, min(B, most)
    threads = torch.get_num_threads()
    blocks = -(-B // most)
    rounded_up = -(-blocks // threads) * threads
    if blocks >= threads and rounded_up * entries <= _MAX_BLOCK_ENTRIES:
        blocks = rounded_up
    if blocks <= B and B % blocks <= most:
        return blocks, B // blocks
    return B // most, most


_FEWEST_ROWS, _FEWEST_COLUMNS, _FEWEST_PRODUCTS = 128, 32, 1 << 20
"""From which on matrix tiles gain; below, taking the rows apart for them costs more."""


def _weight_grad_by_tiles(g: Tensor, a: Tensor, factors: Tensor) -> Tensor | None:
    """:func:`scaled_weight_grad` by the matrix tiles of the processor.

    None where it has none, they do not gain, or a row is too large or small for them.
    """
    (B, T, p), d = g.shape, a.shape[2]
    if g.dtype != torch.float32 or a.dtype != torch.float32 or T > reference.MAX_ROWS_IN_FLOAT32:
        return None
    if B * T < _FEWEST_ROWS or min(p, d) < _FEWEST_COLUMNS or B * T * p * d < _FEWEST_PRODUCTS:
        return None
    grad = g.new_empty((p, d))
    (g, g_axes), (a, a_axes), factors = _sequences(g), _sequences(a), factors.double().contiguous()
    records = min(reference.MAX_RECORDS_IN_FLOAT32, reference.MAX_ROWS_IN_FLOAT32 // T)
    inputs = g.data_ptr(), g_axes, a.data_ptr(), a_axes, factors.data_ptr()
    smallest, threads = reference.SMALLEST_ROW, torch.get_num_threads()
    is_done: bool = compiled("weight_grad")(*inputs, records, smallest, grad.data_ptr(), threads)
    return grad if is_done else None


def scaled_weight_grad(g: Tensor, a: Tensor, factors: Tensor) -> Tensor:
    """:func:`wavedp.reference.per_sample.scaled_weight_grad`, all by the C++ library or all but the products.

    These are then one batched product of all whole blocks.
    """
    (B, T, p), d = g.shape, a.shape[2]
    wide = arithmetic_dtype(a.dtype, g.dtype)
    if (total := _weight_grad_by_tiles(g, a, factors)) is not None:
        return total
    blocks, records = _equal_blocks(B, T, p * d)
    if 0 in (B, T, p, d, records) or blocks * p * d > _MAX_BLOCK_ENTRIES or not bool(factors.all()):
        return reference.scaled_weight_grad(g, a, factors, _scale_records)
    scaled, is_precise = _scale_records(a if d < p else g, factors, wide)
    if not is_precise:
        return reference.scaled_weight_grad(g, a, factors, _scale_records)
    g, a = (g.to(wide), scaled) if d < p else (scaled, a.to(wide))
    if blocks == 1:
        return torch.mm(g.reshape(-1, p).mT, a.reshape(-1, d))
    end = blocks * records
    products = torch.bmm(g[:end].reshape(blocks, -1, p).mT, a[:end].reshape(blocks, -1, d))
    total = products.sum(0, dtype=torch.float64)
    if end < B:
        total += torch.mm(g[end:].reshape(-1, p).mT, a[end:].reshape(-1, d))
    return total.to(wide)
