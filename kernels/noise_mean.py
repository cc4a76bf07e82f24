# SPDX-License-Identifier: Apache-2.0
"""The raw stream of ChaCha, and the noisy mean of one tensor in one pass, in Triton.

A program has 128 lanes of one block each, which make 1280 numbers (1024 in strict mode). What it moves is the total and
the result once, 8 bytes an element for float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from wavedp.kernels.haar import on_device
from wavedp.kernels.noise_normals import (
    COLUMNS,
    STRICT,
    chacha_block,
    lane_places,
    mean_of,
    noise_block,
    noisy_sum,
    pair_of_normals,
    rows_of,
    within,
)

BLOCK = 128
"""Lanes of a program, one to a thread."""
LAUNCH: dict[str, Any] = {"BLOCK": BLOCK, "num_warps": BLOCK // 32, "enable_fp_fusion": False}
GROUP_BLOCKS = 16


def group_normals(kind: int) -> int:
    """Numbers of the sixteen blocks of a group."""
    return GROUP_BLOCKS * (8 if kind == STRICT.value else 10)


@contextlib.contextmanager
def device_key(key: torch.Tensor, device: torch.device) -> Iterator[torch.Tensor]:
    """The key in the memory of a device, where kernels read it, as ``[8]`` int32; zeros once they have run.

    A key that were an argument of a launch would stay in the driver's queue and in whatever records launches; copied
    from ordinary memory, it would stay in the driver's staging memory, so it goes through a page of its own.

    Raises:
        RuntimeError: a CUDA graph is being captured: it would keep the key, and repeat the noise.
    """
    on_gpu = device.type == "cuda"
    if on_gpu and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("noise cannot be captured in a CUDA graph: it would keep the key, and repeat the noise")
    staged = torch.empty(8, dtype=torch.int32, pin_memory=on_gpu)
    memory = torch.empty(8, dtype=torch.int32, device=device)
    try:
        memory.copy_(staged.copy_(key.view(torch.int32)), non_blocking=True)
        yield memory
    finally:
        memory.zero_()
        staged.copy_(memory, non_blocking=True)  # behind the copy of the key, on the stream


def signed(word: int) -> int:
    """64 bits as int64 has them."""
    return word - (1 << 64) if word >> 63 else word


@triton.jit(do_not_specialize=["counter", "nonce0", "nonce1", "nonce2", "count"])
def _chacha20_words_kernel(
    out_ptr,  # [count] uint32
    key_ptr,  # [8] int32
    counter: tl.int64,
    nonce0: tl.int64,  # upper half of the counter is taken where it is negative
    nonce1: tl.int64,
    nonce2: tl.int64,
    count: tl.int64,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lanes = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    number = counter + lanes
    low = number.to(tl.uint32)
    zero = tl.full(low.shape, 0, tl.uint32)
    high = tl.where(nonce0 < 0, (number >> 32).to(tl.uint32), zero + nonce0.to(tl.uint32))
    words = chacha_block(key_ptr, low, high, zero + nonce1.to(tl.uint32), zero + nonce2.to(tl.uint32), ROUNDS)
    # Joined by the bits of their number, so that a lane stores its words side by side.
    x = tl.join(
        tl.join(tl.join(tl.join(words[0], words[8]), tl.join(words[4], words[12])),
                tl.join(tl.join(words[2], words[10]), tl.join(words[6], words[14]))),
        tl.join(tl.join(tl.join(words[1], words[9]), tl.join(words[5], words[13])),
                tl.join(tl.join(words[3], words[11]), tl.join(words[7], words[15]))),
    )  # fmt: skip
    places = lanes[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out_ptr + places, tl.reshape(x, (BLOCK, 16)), mask=places < count)


def chacha20_words_forward(
    key: torch.Tensor,  # [32] uint8
    counter: int,
    nonce: Sequence[int],  # 3 words, or 2 where the counter has 64 bits
    rounds: int,
    out: torch.Tensor,  # contiguous [count] uint32
) -> None:
    """The raw stream from the beginning of block ``counter``."""
    count = out.numel()
    if count == 0:
        return
    last = (-1, *nonce) if len(nonce) == 2 else nonce
    with on_device(out), device_key(key, out.device) as memory:
        _chacha20_words_kernel[(triton.cdiv(count, 16 * BLOCK),)](
            out.view(torch.int32), memory, signed(counter), *last, count, ROUNDS=rounds, **LAUNCH
        )


@triton.jit
def _load_total(total_ptr, offsets, mask):
    if total_ptr is None:
        return tl.full(offsets.shape, 0.0, tl.float64)
    else:
        return tl.load(total_ptr + offsets, mask=mask, other=0.0).to(tl.float64)


@triton.jit(do_not_specialize=["step", "first_group", "skipped", "count"])
def _noisy_mean_kernel(
    total_ptr,  # [count] float32 or float64, or None
    out_ptr,  # [count]
    key_ptr,  # [8] int32
    step: tl.int64,
    first_group: tl.int64,  # the one that holds the first element
    skipped: tl.int64,  # its numbers before that
    count: tl.int64,
    std: tl.float64,
    grid: tl.float64,
    per_grid: tl.float64,
    std_per_grid: tl.float64,
    divisor: tl.float64,
    reciprocal: tl.float64,
    KIND: tl.constexpr,
    NOISE: tl.constexpr,
    GRID: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ROWS: tl.constexpr = rows_of(KIND)
    SIZE: tl.constexpr = ROWS * BLOCK
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    origin = program * SIZE - skipped  # element at place 0
    places = lane_places(ROWS, BLOCK)
    begin, end = tl.maximum(-origin, 0).to(tl.int32), tl.minimum(count - origin, SIZE).to(tl.int32)
    offsets = origin + places
    # What is loaded for the pair that follows waits behind the numbers of this one: it comes before its stores, which
    # the compiler cannot know to be elsewhere.
    inside, inside_odd = within(places, begin, end), within(places + COLUMNS, begin, end)
    even, odd = _load_total(total_ptr, offsets, inside), _load_total(total_ptr, offsets + COLUMNS, inside_odd)
    if NOISE:
        words = noise_block(key_ptr, first_group * COLUMNS + program * BLOCK + tl.arange(0, BLOCK), step, KIND)
    for pair in tl.static_range(ROWS // 2):
        x, y, mask, mask_odd = even, odd, inside, inside_odd
        here = offsets + 2 * COLUMNS * pair
        if pair + 1 < ROWS // 2:
            after = places + 2 * COLUMNS * (pair + 1)
            inside, inside_odd = within(after, begin, end), within(after + COLUMNS, begin, end)
            even = _load_total(total_ptr, here + 2 * COLUMNS, inside)
            odd = _load_total(total_ptr, here + 3 * COLUMNS, inside_odd)
        if NOISE:
            first, second = pair_of_normals(words, pair, KIND)
            x = noisy_sum(x, first, std, grid, per_grid, std_per_grid, KIND, GRID)
            y = noisy_sum(y, second, std, grid, per_grid, std_per_grid, KIND, GRID)
        tl.store(out_ptr + here, mean_of(x, divisor, reciprocal, DTYPE), mask=mask)
        tl.store(out_ptr + (here + COLUMNS), mean_of(y, divisor, reciprocal, DTYPE), mask=mask_odd)


def noisy_mean_forward(
    total: torch.Tensor | None,  # contiguous [*] float32 or float64; None: zero
    std: float,
    grid: float,  # a power of two; 0: no rounding
    divisor: float,
    key: torch.Tensor,  # [32] uint8
    step: int,
    offset: int,  # of the first element in the stream
    kind: int,
    out: torch.Tensor,  # contiguous [*]
) -> None:
    """The noisy mean of ``wavedp.reference.noise.noisy_mean_forward``; ``out`` may be ``total``."""
    count, numbers = out.numel(), group_normals(kind)
    if count == 0:
        return
    first_group, skipped = divmod(offset, numbers)
    programs = triton.cdiv(skipped + count, numbers * (BLOCK // GROUP_BLOCKS))
    with on_device(out), device_key(key, out.device) as memory:
        _noisy_mean_kernel[(programs,)](
            total, out, memory, step, first_group, skipped, count, *scales(std, grid, divisor),
            KIND=kind, NOISE=std > 0.0, GRID=grid > 0.0, **LAUNCH,
        )  # fmt: skip


def scales(std: float, grid: float, divisor: float) -> tuple[float, ...]:
    """``std``, grid, reciprocal of the grid, ``std / grid``, divisor, reciprocal of the divisor."""
    # The grid is a power of two: products with its reciprocal are quotients.
    per_grid = 1.0 / grid if grid > 0.0 else 0.0
    return std, grid, per_grid, std * per_grid, divisor, 1.0 / divisor
