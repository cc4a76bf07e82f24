# SPDX-License-Identifier: Apache-2.0
"""Per-record gradients of an embedding in Triton: tokens are sorted by their ids, and each run of one id is added up.

A program stands at every place of the sorted tokens and leaves at once where no run starts. Nothing is one-hot, and a
row has one writer: no atomics, so that results repeat.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from wavedp.kernels.haar import on_device, wide_dtype
from wavedp.kernels.per_sample_tiles import cdiv, operand, sum_of

CHUNK = tl.constexpr(64)
"""Places of the sorted tokens that one program adds up at most, so that a frequent id is shared among many."""
SEARCH = tl.constexpr(128)
"""Places looked at together for the end of a run."""


@triton.jit
def _run_end(ids_ptr, token, place, end):
    """Where the run of ``token`` ends that holds ``place``, at most ``end``."""
    found = place
    for k in range(place, end, SEARCH):
        if found == k:  # all of the blocks before were of the run
            i = k + tl.arange(0, SEARCH).to(tl.int64)
            same = (tl.load(ids_ptr + i, mask=i < end, other=0) == token) & (i < end)
            found += sum_of(same.to(tl.int64), 0)
    return found


@triton.jit
def _add_tokens(g_ptr, factors_ptr, order, kept, T, stride_b, stride_t, stride_f, first, d, BLOCK: tl.constexpr):
    """Sum of rows of ``g`` in float64, each times the factor of its record; what a factor of 0 scales is not read."""
    records, tokens = order // T, order % T
    cols = first + tl.arange(0, BLOCK).to(tl.int64)
    scale = kept.to(tl.float64)
    if factors_ptr is not None:
        scale = tl.load(factors_ptr + records * stride_f, mask=kept, other=0.0).to(tl.float64)
    offsets = (records * stride_b + tokens * stride_t)[:, None] + cols[None, :]
    g = tl.load(g_ptr + offsets, mask=(scale != 0.0)[:, None] & (cols < d)[None, :], other=0.0)
    return sum_of(g.to(tl.float64) * scale[:, None], 0)


@triton.jit(do_not_specialize=["T", "padding_idx"])
def _embedding_norms_kernel(
    ids_ptr,  # [B, T], each record sorted
    order_ptr,  # [B, T], where its tokens were
    g_ptr,  # [B, T, d], rows contiguous
    parts_ptr,  # [B, T] float64
    stride_b,
    stride_t,
    T,
    d,
    padding_idx,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    record, place = pid // T, pid % T
    ids_ptr += record * T
    order_ptr += record * T
    token = tl.load(ids_ptr + place)
    before = tl.load(ids_ptr + (place - 1), mask=place > 0, other=-1)
    squared = tl.full((), 0.0, tl.float64)
    if (token != padding_idx) & ((place == 0) | (before != token)):
        end = _run_end(ids_ptr, token, place, tl.full((), 0, tl.int64) + T)
        for first in range(0, d, BLOCK):
            total = tl.full((BLOCK,), 0, tl.float64)
            for k in range(place, end, ROWS):
                i = k + tl.arange(0, ROWS).to(tl.int64)
                order = tl.load(order_ptr + i, mask=i < end, other=0)
                total += _add_tokens(
                    g_ptr + record * stride_b, None, order, i < end, T, stride_b, stride_t, 0, first, d, BLOCK
                )
            squared += sum_of(total * total, 0)
    tl.store(parts_ptr + pid, squared)


def embedding_norms(ids: torch.Tensor, g: torch.Tensor, padding_idx: int) -> torch.Tensor:
    """Squared norms ``[B]`` float64 of the gradients of ``W[ids]``: rows of one id add up before they are squared.

    Args:
        ids: ``[B, T]`` int64.
        g: ``[B, T, d]``, any strides, float16, bfloat16, float32 or float64.
        padding_idx: tokens with this id count for nothing; -1: none.
    """
    B, T, d = g.shape
    if g.numel() == 0:
        return torch.zeros(B, dtype=torch.float64, device=g.device)
    g = operand(g, g.dtype)
    places, order = torch.sort(ids, dim=1, stable=True)
    squared = torch.empty((B, T), dtype=torch.float64, device=g.device)
    with on_device(g):
        _embedding_norms_kernel[(B * T,)](
            places.contiguous(), order.contiguous(), g, squared, g.stride(0), g.stride(1), T, d, padding_idx,
            **tile_of(d),
        )  # fmt: skip
    return squared.sum(1)


@triton.jit(do_not_specialize=["N", "T", "padding_idx", "num_embeddings"])
def _embedding_weight_grad_kernel(
    ids_ptr,  # [N], sorted, N = B T
    order_ptr,  # [N], where the tokens were
    g_ptr,  # [B, T, d], rows contiguous
    factors_ptr,  # [B]
    out_ptr,  # [num_embeddings, d]
    parts_ptr,  # [chunks, 2, d] float64: what a chunk adds to a run that came from before, and to one that goes on
    stride_b,
    stride_t,
    stride_f,
    N,
    T,
    d,
    num_embeddings,
    padding_idx,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    token = tl.load(ids_ptr + place)
    is_start = tl.load(ids_ptr + (place - 1), mask=place > 0, other=-1) != token
    chunk = place // CHUNK
    counts = (token != padding_idx) & (token >= 0) & (token < num_embeddings)
    if counts & (is_start | (place % CHUNK == 0)):
        last = tl.minimum((chunk + 1) * CHUNK, N)
        end = _run_end(ids_ptr, token, place, last)
        goes_on = (end == last) & (tl.load(ids_ptr + last, mask=last < N, other=-1) == token)
        for first in range(0, d, BLOCK):
            total = tl.full((BLOCK,), 0, tl.float64)
            for k in range(place, end, ROWS):
                i = k + tl.arange(0, ROWS).to(tl.int64)
                order = tl.load(order_ptr + i, mask=i < end, other=0)
                total += _add_tokens(
                    g_ptr, factors_ptr, order, i < end, T, stride_b, stride_t, stride_f, first, d, BLOCK
                )
            cols = first + tl.arange(0, BLOCK).to(tl.int64)
            if is_start & (goes_on == 0):
                tl.store(out_ptr + (token * d + cols), total.to(out_ptr.dtype.element_ty), mask=cols < d)
            else:
                tl.store(parts_ptr + ((2 * chunk + is_start.to(tl.int64)) * d + cols), total, mask=cols < d)


@triton.jit(do_not_specialize=["N", "padding_idx", "num_embeddings"])
def _embedding_join_kernel(
    ids_ptr,  # [N], sorted
    parts_ptr,  # [chunks, 2, d] float64
    out_ptr,  # [num_embeddings, d]
    N,
    d,
    num_embeddings,
    padding_idx,
    BLOCK: tl.constexpr,
):
    """A program for each chunk finishes the run that starts in it and goes on in the next, if there is one."""
    chunk = tl.program_id(0).to(tl.int64)
    chunks = cdiv(N, CHUNK)
    next_place = (chunk + 1) * CHUNK
    token = tl.load(ids_ptr + (next_place - 1), mask=next_place < N, other=-1)
    goes_on = tl.load(ids_ptr + next_place, mask=next_place < N, other=-2) == token
    before = tl.load(ids_ptr + (chunk * CHUNK - 1), mask=chunk > 0, other=-1)
    counts = (token != padding_idx) & (token >= 0) & (token < num_embeddings)
    if counts & goes_on & (before != token):
        for first in range(0, d, BLOCK):
            cols = first + tl.arange(0, BLOCK).to(tl.int64)
            total = tl.load(parts_ptr + ((2 * chunk + 1) * d + cols), mask=cols < d, other=0.0)
            k = chunk + 1
            while k < chunks:
                total += tl.load(parts_ptr + (2 * k * d + cols), mask=cols < d, other=0.0)
                k += 1
                place = k * CHUNK
                k = tl.where(tl.load(ids_ptr + place, mask=place < N, other=-1) == token, k, chunks)
            tl.store(out_ptr + (token * d + cols), total.to(out_ptr.dtype.element_ty), mask=cols < d)


def tile_of(d: int) -> dict[str, int]:
    """Most runs are of a token or two, so that a program has few rows and a whole row of ``d`` where it can."""
    return {"ROWS": 2, "BLOCK": min(triton.next_power_of_2(d), 1024), "num_warps": 4}


def embedding_weight_grad(
    ids: torch.Tensor, g: torch.Tensor, factors: torch.Tensor, num_embeddings: int, padding_idx: int
) -> torch.Tensor:
    """``sum_b factors_b dW_b`` of ``W[ids]`` without the records whose factor is 0, added in float64.

    Args:
        ids: ``[B, T]`` int64.
        g: ``[B, T, d]``, any strides, float16, bfloat16, float32 or float64.
        factors: ``[B]``, of any of these types.
        num_embeddings: rows of ``W``.
        padding_idx: tokens with this id count for nothing; -1: none.

    Returns:
        ``[num_embeddings, d]`` float32, or float64 for float64.
    """
    B, T, d = g.shape
    out = torch.zeros((num_embeddings, d), dtype=wide_dtype(g.dtype), device=g.device)
    if g.numel() == 0 or num_embeddings == 0:
        return out
    g = operand(g, g.dtype)
    N = B * T
    places, order = torch.sort(ids.reshape(-1), stable=True)
    chunks = triton.cdiv(N, CHUNK.value)
    parts = torch.empty((chunks, 2, d), dtype=torch.float64, device=g.device)
    tile = tile_of(d)
    with on_device(g):
        _embedding_weight_grad_kernel[(N,)](
            places, order, g, factors, out, parts, g.stride(0), g.stride(1), factors.stride(0),
            N, T, d, num_embeddings, padding_idx, **tile,
        )  # fmt: skip
        if chunks > 1:
            _embedding_join_kernel[(chunks - 1,)](
                places, parts, out, N, d, num_embeddings, padding_idx, BLOCK=tile["BLOCK"], num_warps=4
            )
    return out
