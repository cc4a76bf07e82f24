# SPDX-License-Identifier: Apache-2.0
"""Who computes an op: the device decides, unless a backend is asked for.

========== ============== ==========================================================
backend    takes          what it is
========== ============== ==========================================================
reference  any device     plain PyTorch, the definition
native     CPU            C++ library ``wavedp._csrc``
triton     CUDA           Triton kernels (CPU too, under ``TRITON_INTERPRET=1``)
cuda       CUDA           CUDA library ``wavedp._csrc_cuda``
========== ============== ==========================================================

Left alone (``"auto"``), CPU tensors go to native, CUDA tensors to triton or else cuda, and where none of
these is installed, to reference. Libraries and Triton are imported when the first op needs them.
"""

import functools
import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import NamedTuple

import torch

from wavedp.errors import InvalidValueError, StateError


class _Backend(NamedTuple):
    needs: str | None  # module without which it does not work
    how_to_get: str
    devices: tuple[str, ...]  # where it is chosen, in order, when none is asked for
    implementation: str  # module that holds one op's functions, by the op's stem


_BACKENDS = {
    "native": _Backend(
        "wavedp._csrc", "install wavedp with a C++17 compiler present", ("cpu",), "wavedp.ops.{}_native"
    ),
    "triton": _Backend("triton", "pip install triton", ("cuda",), "wavedp.kernels.{}"),
    "cuda": _Backend("wavedp._csrc_cuda", "install wavedp with nvcc present", ("cuda",), "wavedp.ops.{}_native"),
    "reference": _Backend(None, "", (), "wavedp.reference.{}"),
}

_is_forked = False


def _note_fork() -> None:
    global _is_forked
    _is_forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def is_forked() -> bool:
    """Whether this process was forked after ``import wavedp``: it has none of the threads of before."""
    return _is_forked


_requested: ContextVar[str] = ContextVar("wavedp_backend", default="auto")


@functools.cache
def _import_error(module: str) -> ImportError | None:
    """Why an optional module cannot be imported, None if it can. Absence is silent, a broken build is not."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        if not (isinstance(error, ModuleNotFoundError) and error.name == module):
            warnings.warn(f"{module} is installed but cannot be loaded: {error}", RuntimeWarning, stacklevel=2)
        return error
    return None


def _is_installed(backend: _Backend) -> bool:
    return backend.needs is None or _import_error(backend.needs) is None


def available_backends() -> tuple[str, ...]:
    """Names that :func:`use_backend` accepts in this installation, apart from ``"auto"``."""
    return tuple(name for name, backend in _BACKENDS.items() if _is_installed(backend))


def requested_backend() -> str:
    """What :func:`use_backend` has asked for in this context, ``"auto"`` outside of it."""
    return _requested.get()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Asks for one backend inside a ``with`` block, in this thread or task only.

    A gradient is computed by the backend of its forward call. Code under ``torch.compile`` asks when it runs:
    put the block around the call of the compiled function, and around its backward.

    Args:
        name: ``"auto"``, ``"reference"``, ``"native"``, ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: unknown name.
        RuntimeError: the backend is not installed. An op raises it too, for tensors on a device that the
            backend does not take.
    """
    if name != "auto":
        backend = _BACKENDS.get(name)
        if backend is None:
            raise InvalidValueError(f"unknown backend {name!r}; choose from {', '.join(['auto', *_BACKENDS])}")
        if backend.needs is not None and (error := _import_error(backend.needs)):
            raise StateError(
                f"backend {name!r} was asked for, but {backend.needs} cannot be imported ({error}): "
                f"{backend.how_to_get}"
            ) from error
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


@functools.cache
def _choice(requested: str, op: str, device: str) -> tuple[str, str, bool]:
    """The backend for tensors of a type of device, its module for an op, and whether it takes that device."""
    name = requested
    if name == "auto":
        name = next((n for n, b in _BACKENDS.items() if device in b.devices and _is_installed(b)), "reference")
    backend = _BACKENDS[name]
    return name, backend.implementation.format(op), name == "reference" or device in backend.devices


def forget_imports() -> None:
    """Looks again for the modules of the backends, when an op next needs them."""
    _import_error.cache_clear()
    _choice.cache_clear()
    _implementation.cache_clear()


def implementation(op: str, device: torch.device) -> ModuleType:
    """The module that computes ``op`` (``"wavelet"``, a stem) for tensors on ``device``.

    Raises:
        RuntimeError: the backend that was asked for does not take tensors of this device.
    """
    return _implementation(_requested.get(), op, device)


@functools.cache
def _implementation(requested: str, op: str, device: torch.device) -> ModuleType:
    name, where, takes_device = _choice(requested, op, device.type)
    module = importlib.import_module(where)
    if takes_device or (device.type == "cpu" and getattr(module, "INTERPRETED", False)):
        return module
    hint = "; to interpret the kernels on a CPU, start Python with TRITON_INTERPRET=1"
    raise StateError(
        f"backend {name!r} takes {_BACKENDS[name].devices[0]} tensors, but these are on {device}"
        + (hint if name == "triton" else "")
    )
