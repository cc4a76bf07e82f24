# SPDX-License-Identifier: Apache-2.0
"""Noise by the compiled libraries: tensors to addresses. ``csrc/noise.h`` says what they expect.

The C++ library takes CPU tensors, the CUDA library CUDA tensors, with the key and the table of a step in the memory of
the device.
"""

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from wavedp.errors import StateError
from wavedp.ops.wavelet_native import DTYPE_CODES, call
from wavedp.reference.noise_step import StepTensor


@contextlib.contextmanager
def key_on(
    device: torch.device,
    key: Tensor,  # [32] uint8, on the CPU
) -> Iterator[int]:
    """The address of the key where kernels of ``device`` read it. What is copied for that is zeros again once they have
    run: on the device, and in page-locked memory, without which the driver would keep a copy of its own.

    Raises:
        RuntimeError: a CUDA graph is being captured: it would keep the key, and repeat the noise.
    """
    if device.type == "cuda":  # pragma: needs a GPU
        if torch.cuda.is_current_stream_capturing():
            raise StateError("noise cannot be captured in a CUDA graph: it would keep the key, and repeat the noise")
        staged = torch.empty(32, dtype=torch.uint8, pin_memory=True)
        memory = torch.empty(32, dtype=torch.uint8, device=device)
        try:
            memory.copy_(staged.copy_(key), non_blocking=True)
            yield memory.data_ptr()
        finally:
            memory.zero_()
            staged.copy_(memory, non_blocking=True)  # behind the copy of the key, on the stream
        return
    yield key.data_ptr()


def chacha20_words_forward(key: Tensor, counter: int, nonce: Sequence[int], rounds: int, out: Tensor) -> None:
    """:func:`wavedp.reference.noise.chacha20_words_forward` by a compiled library."""
    with key_on(out.device, key) as address:
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
    """:func:`wavedp.reference.noise.noisy_mean_forward` by a compiled library. Normals of float32 are within 5 units in
    the last place of the definition, and have the same bits on every instruction set and GPU; those of strict noise
    have the definition's. Normals of float64 are within 6 units of the exact ones, with bits of their own on a GPU."""
    source = (0, 0) if total is None else (total.data_ptr(), DTYPE_CODES[total.dtype])
    target = out.data_ptr(), DTYPE_CODES[out.dtype]
    with key_on(out.device, key) as address:
        stream = address, step, offset
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
    """:func:`wavedp.reference.noise_step.noise_step_forward` by a compiled library: one pass over all tensors, or
    one over those of float64 and one over the others."""
    addresses, sizes, kinds, constants = [], [], [], []
    for one in tensors:
        memory = (one.param, one.total, one.first, one.second, one.largest, one.average, one.master)
        addresses.append([0 if x is None else x.data_ptr() for x in memory])
        sizes.append(one.param.numel())
        total_code = 0 if one.total is None else DTYPE_CODES[one.total.dtype]
        kinds.append((DTYPE_CODES[one.param.dtype], total_code, one.stochastic))
        constants.append(one.constants)
    device = tensors[0].param.device
    with key_on(device, key) as address:
        for wide in sorted({one.param.dtype == torch.float64 for one in tensors}):
            rules = address, step, offset, rule, wide, strict, std, grid, divisor
            listed: tuple[Any, ...] = (addresses, sizes, kinds, constants)
            if device.type == "cuda":  # pragma: needs a GPU
                table, form = table_on(device, rule, wide, *listed)
                listed = table.data_ptr(), len(tensors), sum(sizes), form
            call("noise_step", tensors[0].param, *rules, *listed)


def table_on(device: torch.device, rule: int, wide: bool, *listed: Any) -> tuple[Tensor, int]:  # pragma: needs a GPU
    """What a step's kernel reads of its tensors, in the memory of a device, and the form of the tensors."""
    cuda: Any = importlib.import_module("wavedp._csrc_cuda")
    size = cuda.noise_step_table_bytes(wide, len(listed[0]))
    staged = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    form: int = cuda.noise_step_table(rule, wide, *listed, staged.data_ptr())
    return staged.to(device, non_blocking=True), form
