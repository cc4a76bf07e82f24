# SPDX-License-Identifier: Apache-2.0
"""The wavelet ops of the compiled libraries: tensors to addresses. ``csrc/wavelet.h`` says what they expect.

The C++ library computes CPU tensors, the CUDA library CUDA tensors. Their signatures differ in the last
argument alone: a number of threads, or a stream.
"""

import importlib
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from wavedp.reference.wavelet import Edge

_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def _call(function: str, device: torch.device, *arguments: int) -> None:
    on_cuda = device.type == "cuda"
    compiled: Any = importlib.import_module("wavedp._csrc_cuda" if on_cuda else "wavedp._csrc")
    with torch.cuda.device(device) if on_cuda else nullcontext():
        if not on_cuda:
            getattr(compiled, function)(*arguments, torch.get_num_threads())
        elif code := getattr(compiled, function)(*arguments, torch.cuda.current_stream(device).cuda_stream):
            raise RuntimeError(f"wavedp {function} on {device}: {compiled.error_string(code)}")


def dwt2_forward(
    x: Tensor,  # [..., H, W], any strides
    edge: Edge,
) -> Tensor:  # [4, ..., ceil(H/2), ceil(W/2)]
    """:func:`wavedp.reference.wavelet.dwt2_forward` by a compiled library."""
    *lead, height, width = x.shape
    bands = torch.empty((4, *lead, (height + 1) // 2, (width + 1) // 2), dtype=x.dtype, device=x.device)
    if bands.numel() == 0:
        return bands
    planes = x.reshape(-1, height, width)
    code = _DTYPE_CODES[x.dtype]
    _call("dwt2", x.device, planes.data_ptr(), bands.data_ptr(), code, *planes.shape, *planes.stride(), edge)
    return bands


def idwt2_forward(
    ll: Tensor | None,  # [..., h, w] each; None stands for zeros, at least one is given
    lh: Tensor | None,
    hl: Tensor | None,
    hh: Tensor | None,
    height: int,
    width: int,
    edge: Edge,
) -> Tensor:  # [..., height, width]
    """:func:`wavedp.reference.wavelet.idwt2_forward` by a compiled library."""
    bands = [None if band is None else band.contiguous() for band in (ll, lh, hl, hh)]
    given = next(band for band in bands if band is not None)
    *lead, h, w = given.shape
    x = torch.empty((*lead, height, width), dtype=given.dtype, device=given.device)
    if x.numel() == 0:
        return x
    addresses = [0 if band is None else band.data_ptr() for band in bands]
    code = _DTYPE_CODES[x.dtype]
    n = given.numel() // (h * w)
    _call("idwt2", x.device, *addresses, x.data_ptr(), code, n, height, width, edge)
    return x
