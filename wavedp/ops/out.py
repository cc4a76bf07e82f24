# SPDX-License-Identifier: Apache-2.0
"""``out=``: whether given tensors can take results, and how the results get there."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wavedp.errors import InvalidTypeError, InvalidValueError, StateError
from wavedp.ops.eager import is_plain


def check_out(
    op: str,
    out: Sequence[Any],  # the tensors given, in the order of the results
    shapes: Sequence[Sequence[int]],  # of the results
    dtype: torch.dtype,
    inputs: Sequence[Tensor],  # what the op reads; its device is that of the results
) -> bool:
    """Raises unless ``out`` holds dense tensors of these shapes, outside of the graph and of the inputs' memory.

    Returns:
        Whether a kernel may be called on all of these tensors past the dispatcher.

    Raises:
        TypeError: something given is not a dense tensor, or of another dtype.
        ValueError: a wrong number, shape or device, or memory that an input or another result has. (What is traced
            or transformed is computed first and copied then: memory is not looked at.)
        RuntimeError: a derivative was asked for, or an inference tensor is given outside of inference mode.
    """
    if len(out) != len(shapes):
        raise InvalidValueError(f"out of {op} must be {len(shapes)} tensors, not {len(out)}")
    plain = is_plain(*inputs, *out, under_grad=True)
    device = inputs[0].device
    for position, (given, shape) in enumerate(zip(out, shapes)):
        if not (plain and given.shape == shape and given.dtype is dtype and given.device == device):
            where = f"out of {op}" if len(out) == 1 else f"tensor {position} in out of {op}"
            _check_one(where, given, shape, dtype, device)
    if torch.is_grad_enabled() and [x for x in (*inputs, *out) if x.requires_grad]:
        raise StateError(
            f"{op} with out= does not support automatic differentiation, but one of the arguments requires grad: "
            "leave out away, or call it under torch.no_grad()"
        )
    if plain:
        if not torch.is_inference_mode_enabled() and [given for given in out if given.is_inference()]:
            raise StateError(f"out of {op} is an inference tensor, which is not written to outside of inference mode")
        _check_memory(op, out, inputs)
    return plain


def _check_one(where: str, given: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    if not isinstance(given, Tensor):
        raise InvalidTypeError(f"{where} must be a torch tensor, not a {type(given).__name__}")
    if given.shape != shape:
        raise InvalidValueError(f"{where} must have the shape {tuple(shape)}, not {tuple(given.shape)}")
    if given.dtype != dtype:
        raise InvalidTypeError(f"{where} must be of {dtype}, not {given.dtype}")
    if given.device != device:
        raise InvalidValueError(f"{where} must be on {device} as the input is, not on {given.device}")
    if given.layout != torch.strided:
        raise InvalidTypeError(f"{where} must be a dense tensor, not {given.layout}")


def _check_memory(op: str, out: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """Raises ValueError where results would overwrite an input or one another."""
    extents = sorted([_extent(x) for x in (*out, *inputs)])
    if not [one for one, other in pairwise(extents) if one[1] > other[0]]:
        return
    for position, given in enumerate(out):
        if any(_share_memory(given, source) for source in inputs):
            raise InvalidValueError(f"out of {op} overlaps the memory of its input: give it memory of its own")
        if any(_share_memory(given, earlier) for earlier in out[:position]):
            raise InvalidValueError(f"two tensors in out of {op} overlap: give each memory of its own")


def _extent(x: Tensor) -> tuple[int, int]:
    """First address of a tensor and the one past its last."""
    start = x.data_ptr()
    if x.is_contiguous():
        return start, start + x.nbytes
    if x.numel() == 0:
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return start, start + (last + 1) * x.element_size()


def written(out: Sequence[Tensor]) -> None:
    """Tells autograd that a kernel wrote to these tensors: what was saved of them for a backward is gone."""
    tracked = [given for given in out if not given.is_inference()]
    if tracked:
        torch.autograd.graph.increment_version(tracked)


class _Memory:
    """The bytes of a tensor as an array of NumPy, which is never read."""

    def __init__(self, x: Tensor) -> None:
        size = x.element_size()
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{size}",
            "shape": tuple(x.shape),
            "strides": tuple(size * stride for stride in x.stride()),
            "data": (x.data_ptr(), False),
        }


_MOST_WORK = 100_000  # of the exact search for a common byte, a few milliseconds


def _share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have a byte in common: interleaved views, as parts of a channel axis are, have none. Where
    that is hard to tell, they are taken to have one."""
    extents = _extent(one), _extent(other)
    if extents[0][1] <= extents[1][0] or extents[1][1] <= extents[0][0]:
        return False
    if one.is_contiguous() and other.is_contiguous():
        return True
    try:
        shares_memory: Any = np.shares_memory  # typed for two special values of max_work alone
        return bool(shares_memory(np.asarray(_Memory(one)), np.asarray(_Memory(other)), max_work=_MOST_WORK))
    except np.exceptions.TooHardError:
        return True


def copied(out: list[Tensor], results: Sequence[Tensor]) -> list[Tensor]:
    """``out``, holding the results."""
    for given, result in zip(out, results):
        given.copy_(result)
    return out
