# SPDX-License-Identifier: Apache-2.0
"""One private step of an optimizer over all of its parameters."""

import torch
from torch import Tensor

from wavedp.ops.noise import noise_module
from wavedp.ops.out import written
from wavedp.reference import noise as reference
from wavedp.reference import noise_step as reference_step
from wavedp.reference.noise_step import ADAM, SGD, StepConstants, StepTensor

__all__ = ["ADAM", "SGD", "StepConstants", "StepTensor", "noise_step"]


@torch.no_grad()
def noise_step(
    rule: int,
    tensors: list[StepTensor],  # contiguous moments; parameters and sums of any strides
    std: float,
    grid: float,
    divisor: float,
    key: Tensor,  # [32] uint8, on the CPU
    step: int,
    offset: int,
    strict: bool,
) -> None:
    """The checked arguments of an optimizer's step. Tensors of one device in one call where there is a library for it,
    else one tensor after the other by the definition."""
    dense = [
        one._replace(
            param=one.param if one.param.is_contiguous() else one.param.contiguous(),
            total=None if one.total is None else one.total.contiguous(),
        )
        for one in tensors
    ]
    devices = {one.param.device for one in dense}
    module = noise_module(devices.pop()) if len(devices) == 1 else reference
    forward = reference_step.noise_step_forward if module is reference else module.noise_step_forward
    if dense:
        forward(rule, dense, std, grid, divisor, key, step, offset, strict)
    for given, used in zip(tensors, dense):
        if used.param is not given.param:
            given.param.copy_(used.param)
    changed = [[one.param, one.first, one.second, one.largest, one.average, one.master] for one in tensors]
    written([x for tensor in changed for x in tensor if x is not None])
