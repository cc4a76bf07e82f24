# SPDX-License-Identifier: Apache-2.0
"""Which way a call takes: straight to a kernel, through PyTorch's dispatcher, or through an ``autograd.Function``.

The dispatcher costs a small image more than its transform does. A call goes past it where the dispatcher would do
nothing but call the kernel: no gradient, no tracing, no transform, no mode, no subclass, no lazy bit.
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_C: Any = torch._C
_KeySet, _Key = _C.DispatchKeySet, _C.DispatchKey

_Parameter = torch.nn.Parameter


def _plain_keys(backend: str) -> list[int]:
    """The key sets of ordinary dense tensors of a device: those made in inference mode lack the keys of autograd.
    Sparse, quantised, wrapped, conjugated, negated and zero tensors have keys besides these."""
    inference = _KeySet(getattr(_Key, backend)) | _KeySet(getattr(_Key, f"Autocast{backend}"))
    ordinary = inference | _KeySet(_Key.ADInplaceOrView) | _KeySet(getattr(_Key, f"Autograd{backend}"))
    return [inference.raw_repr(), ordinary.raw_repr()]


_PLAIN_CPU_KEYS = frozenset(_plain_keys("CPU"))
_PLAIN_KEYS = frozenset(_plain_keys("CUDA")) | _PLAIN_CPU_KEYS
_PLAIN_TYPES = {Tensor, _Parameter}
_dtype_of = attrgetter("dtype")
_bits_of = _KeySet.raw_repr
_dispatch_keys = _C._dispatch_keys
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_functorch_is_active = _C._are_functorch_transforms_active
_dispatch_modes = _C._len_torch_dispatch_stack
_function_modes = _C._len_torch_function_stack
_tracing_state = _C._get_tracing_state


def is_plain(*tensors: Tensor, under_grad: bool = False) -> bool:
    """Whether a kernel may be called on these tensors past the dispatcher; with ``under_grad``, whether only a
    gradient stands against it."""
    if (
        _is_compiling()
        or _functorch_is_active()
        or _dispatch_modes()
        or _function_modes()
        or _tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return False
    keys, plain_keys = _dispatch_keys, _PLAIN_KEYS
    grad = _is_grad_enabled() and not under_grad
    for x in tensors:
        kind = type(x)
        if kind is not Tensor and kind is not _Parameter:
            return False
        if (grad and x.requires_grad) or keys(x).raw_repr() not in plain_keys:
            return False
    return True


def lies_in_memory(x: Tensor) -> bool:
    """Whether the memory at ``x.data_ptr()`` holds the entries of ``x`` one after another, on the CPU."""
    kind = type(x)
    if kind is not Tensor and kind is not _Parameter:
        return False
    return _dispatch_keys(x).raw_repr() in _PLAIN_CPU_KEYS and x.is_contiguous()


def are_plain_alike(tensors: Sequence[Tensor]) -> bool:
    """Whether :func:`is_plain` holds of all of these tensors of the CPU, and all have one dtype."""
    if not is_plain() or not {*map(type, tensors)} <= _PLAIN_TYPES:
        return False
    if _is_grad_enabled() and [x for x in tensors if x.requires_grad]:
        return False
    return len({*map(_dtype_of, tensors)}) == 1 and {*map(_bits_of, map(_dispatch_keys, tensors))} <= _PLAIN_CPU_KEYS


def is_differentiated(*tensors: Tensor) -> bool:
    """Whether the call needs an ``autograd.Function``: in eager mode for a gradient, a ``torch.func`` transform or a
    forward-mode tangent. What is traced, and what a mode or a subclass handles, goes to the op."""
    if _is_compiling():
        return False
    if _functorch_is_active() or is_plain(*tensors, under_grad=True):
        return True
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
