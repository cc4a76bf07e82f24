# SPDX-License-Identifier: Apache-2.0
"""Definition of a private optimizer step: the noisy mean of a clipped sum, then the rule of SGD or Adam."""

from typing import NamedTuple

import torch
from torch import Tensor

from wavedp.reference.noise import noisy_mean_forward

SGD, ADAM = 0, 1


class StepConstants(NamedTuple):
    """What a rule multiplies by; those that the other rule has are not read. The order is that of csrc/noise.h."""

    sign: float = 1.0  # -1 to ascend
    l2: float = 0.0  # gradient += l2 * parameter
    rate: float = 0.0  # parameter -= rate * direction
    keep_first: float = 0.0  # SGD: moment = keep_first * moment + first * gradient
    first: float = 0.0  # Adam: moment += first * (gradient - moment)
    nesterov: float = 0.0  # SGD: direction = nesterov * gradient + from_first * moment
    from_first: float = 0.0
    keep: float = 1.0  # Adam: parameter *= keep, before
    keep_second: float = 0.0  # Adam: square = keep_second * square + second * gradient^2
    second: float = 0.0
    root_scale: float = 0.0  # Adam: direction = moment / (root_scale * sqrt(square) + eps)
    eps: float = 0.0


class StepTensor(NamedTuple):
    """One parameter, its sum and its moments: contiguous, on one device."""

    param: Tensor  # [*]
    total: Tensor | None  # [*] float32 or float64; None: zero
    first: Tensor | None  # [*] float32, or float64 for a parameter of float64; None without momentum
    second: Tensor | None
    largest: Tensor | None  # None without amsgrad
    constants: StepConstants


def noise_step_forward(
    rule: int,
    tensors: list[StepTensor],
    std: float,
    grid: float,
    divisor: float,
    key: Tensor,  # [32] uint8
    step: int,
    offset: int,
) -> None:
    """Change parameters and moments in place; the tensors lie one after the other in the stream of the noise."""
    for one in tensors:
        param, c = one.param, one.constants
        real = torch.promote_types(param.dtype, torch.float32)
        gradient = torch.empty(param.shape, dtype=real, device=param.device)
        noisy_mean_forward(one.total, std, grid, divisor, key, step, offset, real == torch.float64, gradient)
        offset += param.numel()
        x = param.to(real)
        gradient = c.sign * gradient + c.l2 * x
        if rule == SGD:
            direction = gradient
            if one.first is not None:
                one.first.mul_(c.keep_first).add_(gradient, alpha=c.first)
                direction = c.nesterov * gradient + c.from_first * one.first
            param.copy_(x - c.rate * direction)
            continue
        assert one.first is not None
        assert one.second is not None
        one.first.add_(gradient - one.first, alpha=c.first)
        one.second.mul_(c.keep_second).add_(gradient * gradient, alpha=c.second)
        square = one.second
        if one.largest is not None:
            square = torch.maximum(one.largest, square, out=one.largest)
        param.copy_(c.keep * x - c.rate * (one.first / (square.sqrt() * c.root_scale + c.eps)))
