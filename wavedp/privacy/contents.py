# SPDX-License-Identifier: Apache-2.0
"""Watches what a state_dict of the model would hold, to see writes that no private step made.

A forward that writes into a buffer, a frozen parameter or a weight publishes private data without noise. A
tensor's version counter does not see a write through ``.data`` or ``.numpy()``, so contents are compared.
"""

import ctypes
import hashlib
import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wavedp.ops.eager import lies_in_memory
from wavedp.privacy.coverage import saved_tensors

EVERY_STEP_BYTES = 1 << 20
"""Up to this size all contents are compared at every step, with a copy of them."""

INTERVAL = 50
"""Larger models: digests of the contents are compared at the first step and at every 50th, version counters at every
step. SHA-256 takes 0.6 ms for 1 MiB on one core, twice a step."""


@dataclass
class _Seen:
    tensor: Tensor
    version: int
    content: "_Digest | _Copy | None"


class ContentsWatch:
    """Remembers parameters and saved buffers of ``model``, and says which of them changed.

    Writes by :meth:`released` steps and by ``load_state_dict``, of the model or of any module in it, are
    remembered as meant.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        saved = saved_tensors(model)
        is_small = sum(tensor.numel() * tensor.element_size() for tensor in saved.values()) <= EVERY_STEP_BYTES
        self._content: type[_Copy] | type[_Digest] = _Copy if is_small else _Digest
        self._interval = 1 if is_small else INTERVAL
        self._seen = {name: self._remember(tensor) for name, tensor in saved.items()}
        self._releases = 0
        self._modules = {module: prefix for prefix, module in model.named_modules()}
        self._hooks = [module.register_load_state_dict_post_hook(self._on_load) for module in self._modules]

    def __deepcopy__(self, memo: object) -> "ContentsWatch":
        # Copies of the model, such as an average of its weights, carry the hooks along.
        return self

    def changed(self, *, thorough: bool = False) -> list[str]:
        """Return the names of tensors that changed, appeared or went; ``thorough`` reads all contents."""
        thorough = thorough or self._releases % self._interval == 0
        now = saved_tensors(self._model)
        changed = self._seen.keys() ^ now.keys()
        for name in self._seen.keys() & now.keys():
            if self._differs(name, now[name], thorough):
                changed.add(name)
        return sorted(changed)

    def released(self, parameters: dict[str, nn.Parameter]) -> None:
        """Remember ``parameters`` as a private step left them."""
        self._releases += 1
        comparing = self._releases % self._interval == 0
        stepped = {id(parameter) for parameter in parameters.values()}
        for name, seen in self._seen.items():  # a tied parameter has several names
            tensor, before = seen.tensor, seen.content
            if id(tensor) not in stepped:
                continue
            if not comparing:
                self._seen[name] = _Seen(tensor, _version(tensor), None)
            elif isinstance(before, _Copy) and before.overwrite(tensor):
                self._seen[name] = _Seen(tensor, _version(tensor), before)
            else:
                self._seen[name] = self._remember(tensor)

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _differs(self, name: str, tensor: Tensor, thorough: bool) -> bool:
        seen = self._seen[name]
        touched = tensor is not seen.tensor or _version(tensor) != seen.version
        if not touched and not thorough:
            return False
        if seen.content is None:
            return touched
        if not seen.content.is_of(tensor):
            return True
        self._seen[name] = _Seen(tensor, _version(tensor), seen.content)  # written to and put back
        return False

    def _remember(self, tensor: Tensor) -> _Seen:
        return _Seen(tensor, _version(tensor), self._content(tensor))

    def _on_load(self, module: nn.Module, incompatible_keys: object) -> None:
        if module in self._modules:
            prefix = self._modules[module]
            for name, tensor in saved_tensors(module, recurse=False).items():
                self._seen[f"{prefix}.{name}" if prefix else name] = self._remember(tensor)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class _Digest:
    """The SHA-256 of a tensor's type, shape and bytes."""

    def __init__(self, tensor: Tensor) -> None:
        self._digest = _sha256(tensor)

    def is_of(self, tensor: Tensor) -> bool:
        return self._digest == _sha256(tensor)


class _Copy:
    """A tensor's type, shape and bits."""

    def __init__(self, tensor: Tensor) -> None:
        self._dtype, self._shape = tensor.dtype, tensor.shape
        self._bits = _bits(tensor).clone(memory_format=torch.contiguous_format)
        self._bytes = self._bits.numel() * self._bits.element_size()

    def is_of(self, tensor: Tensor) -> bool:
        if self._dtype != tensor.dtype or self._shape != tensor.shape:
            return False
        if _memcmp is not None and self._is_alike(tensor):
            return bool(_memcmp(self._bits.data_ptr(), tensor.data_ptr(), self._bytes) == 0)
        return torch.equal(self._at(tensor), _bits(tensor))

    def overwrite(self, tensor: Tensor) -> bool:
        """Become the copy of another tensor, if that is of the same type and shape."""
        if self._dtype != tensor.dtype or self._shape != tensor.shape:
            return False
        if self._is_alike(tensor):
            ctypes.memmove(self._bits.data_ptr(), tensor.data_ptr(), self._bytes)
        else:
            self._bits = self._at(tensor).copy_(_bits(tensor))
        return True

    def _is_alike(self, tensor: Tensor) -> bool:
        """Whether the tensor lies in memory as the copy does, whose bytes then stand for it."""
        return self._bits.is_cpu and lies_in_memory(tensor)

    def _at(self, tensor: Tensor) -> Tensor:
        return self._bits if self._bits.device == tensor.device else self._bits.to(tensor.device)


# A call of torch.equal on each of many small tensors takes most of a small model's step.
_Memcmp = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memcmp = _Memcmp(("memcmp", ctypes.CDLL(None))) if os.name == "posix" else None

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's memory as integers, which are equal where bits are: NaN too, and 0 is not -0."""
    tensor = tensor.detach()
    integers = _INTEGERS.get(tensor.element_size())
    return tensor.contiguous().reshape(-1).view(torch.uint8) if integers is None else tensor.view(integers)


def _sha256(tensor: Tensor) -> bytes:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest.update(content.data)
    return digest.digest()
