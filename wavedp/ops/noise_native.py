# SPDX-License-Identifier: Apache-2.0
"""Noise by the C++ library: tensors to addresses. ``csrc/noise.h`` says what it expects."""

from collections.abc import Sequence

import torch
from torch import Tensor

from wavedp.ops.wavelet_native import DTYPE_CODES, call
from wavedp.reference.noise_step import StepTensor


def chacha20_words_forward(key: Tensor, counter: int, nonce: Sequence[int], rounds: int, out: Tensor) -> None:
    """:func:`wavedp.reference.noise.chacha20_words_forward` by the C++ library."""
    address = key.data_ptr()
    call("chacha20_words", out, address, counter, list(nonce), rounds, out.data_ptr(), out.numel())


def noisy_mean_forward(
    total: Tensor | None,  # contiguous [*]
    std: float,
    grid: float,
    divisor: float,
    key: Tensor,  # [32] uint8
    step: int,
    offset: int,
    kind: int,
    out: Tensor,  # contiguous [*]
) -> None:
    """:func:`wavedp.reference.noise.noisy_mean_forward` by the C++ library. Normals of float32 are within 5 units in
    the last place of the definition, and have the same bits on every instruction set; those of strict noise have the
    definition's."""
    source = (0, 0) if total is None else (total.data_ptr(), DTYPE_CODES[total.dtype])
    target = out.data_ptr(), DTYPE_CODES[out.dtype]
    stream = key.data_ptr(), step, offset
    call("noisy_mean", out, *stream, *source, *target, kind, std, grid, divisor, out.numel())


def noise_step_forward(
    rule: int,
    tensors: list[StepTensor],
    std: float,
    grid: float,
    divisor: float,
    key: Tensor,
    step: int,
    offset: int,
    strict: bool,
) -> None:
    """:func:`wavedp.reference.noise_step.noise_step_forward` by the C++ library: one pass over all tensors."""
    addresses, sizes, kinds, constants = [], [], [], []
    for one in tensors:
        memory = (one.param, one.total, one.first, one.second, one.largest, one.average, one.master)
        addresses.append([0 if x is None else x.data_ptr() for x in memory])
        sizes.append(one.param.numel())
        total_code = 0 if one.total is None else DTYPE_CODES[one.total.dtype]
        kinds.append((DTYPE_CODES[one.param.dtype], total_code, one.stochastic))
        constants.append(one.constants)
    stream = key.data_ptr(), step, offset
    for wide in sorted({one.param.dtype == torch.float64 for one in tensors}):
        rules = rule, wide, strict, std, grid, divisor
        call("noise_step", tensors[0].param, *stream, *rules, addresses, sizes, kinds, constants)
