# SPDX-License-Identifier: Apache-2.0
"""Which module makes the noise. Its functions are no ops of PyTorch: a traced graph would keep the key."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from wavedp.ops.backend import implementation
from wavedp.ops.out import written
from wavedp.reference.noise import (
    MAX_STRICT_DEVIATION,
    NARROW,
    STRICT,
    STRICT_ANGLE_BITS,
    STRICT_NORMAL_ERROR,
    STRICT_RADIUS_BITS,
    WIDE,
)

__all__ = [
    "MAX_STRICT_DEVIATION",
    "NARROW",
    "STRICT",
    "STRICT_ANGLE_BITS",
    "STRICT_NORMAL_ERROR",
    "STRICT_RADIUS_BITS",
    "WIDE",
    "chacha20_words",
    "noise_module",
    "noisy_mean",
]


def noise_module(device: torch.device) -> ModuleType:
    """As for the other ops: the C++ library for CPU tensors, Triton or else the CUDA library for those on a GPU, unless
    a backend is asked for; the definition on other devices."""
    return implementation("noise", device)


def chacha20_words(key: Tensor, counter: int, nonce: tuple[int, ...], rounds: int, out: Tensor) -> None:
    noise_module(out.device).chacha20_words_forward(key, counter, nonce, rounds, out)


@torch.no_grad()
def noisy_mean(
    total: Tensor | None,  # [*] float32 or float64
    std: float,
    grid: float,
    divisor: float,
    key: Tensor,  # [32] uint8, on the CPU
    step: int,
    offset: int,
    kind: int,  # NARROW, WIDE or STRICT
    out: Tensor,  # [*]
) -> None:
    """The checked arguments of :func:`wavedp.noise.noisy_mean`, for tensors of any strides."""
    arguments: tuple[Any, ...] = (std, grid, divisor, key, step, offset, kind)
    module = noise_module(out.device)
    target = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    module.noisy_mean_forward(None if total is None else total.contiguous(), *arguments, target)
    if target is out:
        written([out])
    else:
        out.copy_(target)
