# SPDX-License-Identifier: Apache-2.0
"""One private step of an optimizer over all of its parameters."""

import itertools
from collections.abc import Callable

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
    """The checked arguments of an optimizer's step: one call for tensors of one device that follow each other. The
    definition takes them one by one."""
    dense = [
        one._replace(
            param=one.param if one.param.is_contiguous() else one.param.contiguous(),
            total=None if one.total is None else one.total.contiguous(),
        )
        for one in tensors
    ]
    for device, run in itertools.groupby(dense, key=lambda one: one.param.device):
        part = list(run)
        _forward(device)(rule, part, std, grid, divisor, key, step, offset, strict)
        offset += sum(one.param.numel() for one in part)
    for given, used in zip(tensors, dense):
        if used.param is not given.param:
            given.param.copy_(used.param)
    changed = [[one.param, one.first, one.second, one.largest, one.average, one.master] for one in tensors]
    written([x for tensor in changed for x in tensor if x is not None])


def _forward(device: torch.device) -> Callable[..., None]:
    module = noise_module(device)
    forward: Callable[..., None] = (reference_step if module is reference else module).noise_step_forward
    return forward
