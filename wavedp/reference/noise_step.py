# SPDX-License-Identifier: Apache-2.0
"""Definition of a private optimizer step: the noisy mean of a clipped sum, then the rule of SGD or Adam.

What follows the mean is computed in float32, or in float64 for a parameter of float64. A parameter of bfloat16 may be
rounded at random: 16 random bits are added below those that are kept, and the sum is cut off, so that its mean is the
number that was rounded. The bits are ChaCha20's, under the key and the step of the noise and with the domain 2:
element i of the stream has, with ``k = i % 512 // 16``, those of word ``k // 2`` of block ``16 (i // 512) + i % 16``,
the lower 16 for even k, the upper ones for odd k.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from wavedp.reference.noise import (
    GROUP_BLOCKS,
    NARROW,
    ROUNDING_DOMAIN,
    STRICT,
    WIDE,
    WORDS,
    chacha20_blocks,
    noisy_mean_forward,
)

SGD, ADAM = 0, 1
ROUNDINGS = 2 * WORDS * GROUP_BLOCKS  # numbers of 16 bits in a group of blocks


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
    # Adam, where least_square > 0: direction = moment / (sqrt(max(root_scale^2 * square - noise_square, least_square))
    # + eps), the square without the noise's part (Tang et al., arXiv 2312.14334).
    noise_square: float = 0.0
    least_square: float = 0.0
    average_weight: float = 0.0  # average += average_weight * (parameter - average), after


class StepTensor(NamedTuple):
    """One parameter, its sum and its moments: contiguous, on one device."""

    param: Tensor  # [*]
    total: Tensor | None  # [*] float32 or float64; None: zero
    first: Tensor | None  # [*] float32, or float64 for a parameter of float64; None without momentum
    second: Tensor | None
    largest: Tensor | None  # None without amsgrad
    average: Tensor | None  # [*] float32, or float64 for a parameter of float64; of the parameter before its rounding
    master: Tensor | None  # [*] float32: stands for a parameter of bfloat16 or float16, which is its rounding
    stochastic: bool  # a parameter of bfloat16 without a master is rounded at random
    constants: StepConstants


def rounding_bits(key: Tensor, step: int, offset: int, count: int, device: torch.device) -> Tensor:
    """Of ``count`` elements from element ``offset`` on: [count] int32, 16 random bits each."""
    first, skipped = divmod(offset, ROUNDINGS)
    groups = -(-(skipped + count) // ROUNDINGS)
    nonce = (step, ROUNDING_DOMAIN << 24)
    words = chacha20_blocks(key, first * GROUP_BLOCKS, nonce, 20, groups * GROUP_BLOCKS, device)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=1)  # [16, 2, 16 groups]
    bits = halves.view(2 * WORDS, groups, GROUP_BLOCKS).transpose(0, 1).flatten()
    return bits[skipped : skipped + count].to(torch.int32)


def rounded_at_random(
    x: Tensor,  # [*] float32
    bits: Tensor,  # [numel] int32, 16 bits each
) -> Tensor:  # [*] bfloat16
    """What is not finite is rounded to nearest."""
    raw = ((x.view(torch.int32) + bits.view(x.shape)) & ~0xFFFF).view(torch.float32)
    return torch.where(x.isfinite(), raw, x).bfloat16()


def noise_step_forward(
    rule: int,
    tensors: list[StepTensor],
    std: float,
    grid: float,
    divisor: float,
    key: Tensor,  # [32] uint8
    step: int,
    offset: int,
    strict: bool,
) -> None:
    """Change parameters, moments, averages and masters in place; the tensors lie one after the other in the stream of
    the noise."""
    for one in tensors:
        param, c = one.param, one.constants
        real = torch.promote_types(param.dtype, torch.float32)
        gradient = torch.empty(param.shape, dtype=real, device=param.device)
        kind = STRICT if strict else WIDE if real == torch.float64 else NARROW
        noisy_mean_forward(one.total, std, grid, divisor, key, step, offset, kind, gradient)
        x = param.to(real) if one.master is None else one.master
        gradient = c.sign * gradient + c.l2 * x
        x = _sgd(one, x, gradient) if rule == SGD else _adam(one, x, gradient)
        if one.average is not None:
            one.average.add_(x - one.average, alpha=c.average_weight)
        if one.master is not None:
            one.master.copy_(x)
        if one.stochastic:
            param.copy_(rounded_at_random(x, rounding_bits(key, step, offset, x.numel(), x.device)))
        else:
            param.copy_(x)
        offset += param.numel()


def _sgd(one: StepTensor, x: Tensor, gradient: Tensor) -> Tensor:
    c, direction = one.constants, gradient
    if one.first is not None:
        one.first.mul_(c.keep_first).add_(gradient, alpha=c.first)
        direction = c.nesterov * gradient + c.from_first * one.first
    return x - c.rate * direction


def _adam(one: StepTensor, x: Tensor, gradient: Tensor) -> Tensor:
    c = one.constants
    assert one.first is not None
    assert one.second is not None
    one.first.add_(gradient - one.first, alpha=c.first)
    one.second.mul_(c.keep_second).add_(gradient * gradient, alpha=c.second)
    square = one.second
    if one.largest is not None:
        square = torch.maximum(one.largest, square, out=one.largest)
    if c.least_square > 0.0:
        signal = square * (c.root_scale * c.root_scale) - c.noise_square
        root = signal.clamp_min(c.least_square).sqrt()
    else:
        root = square.sqrt() * c.root_scale
    return c.keep * x - c.rate * (one.first / (root + c.eps))
