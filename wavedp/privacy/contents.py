# SPDX-License-Identifier: Apache-2.0
"""Watches what a state_dict of the model would hold, to see writes that no private step made.

A forward that writes into a buffer, a frozen parameter or a weight publishes private data without noise. A
tensor's version counter does not see a write through ``.data`` or ``.numpy()``, so contents are compared.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wavedp.privacy.coverage import saved_tensors

EVERY_STEP_BYTES = 1 << 20
"""Up to this size all contents are compared at every step: SHA-256 takes 0.6 ms for 1 MiB on one core, twice a step."""

INTERVAL = 50
"""Larger models: contents are compared at the first step and at every 50th, version counters at every step."""


@dataclass
class _Seen:
    tensor: Tensor
    version: int
    digest: bytes | None


class ContentsWatch:
    """Remembers parameters and saved buffers of ``model``, and says which of them changed.

    Writes by :meth:`released` steps and by ``load_state_dict``, of the model or of any module in it, are
    remembered as meant.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen = {name: _remember(tensor) for name, tensor in saved_tensors(model).items()}
        size = sum(seen.tensor.numel() * seen.tensor.element_size() for seen in self._seen.values())
        self._interval = 1 if size <= EVERY_STEP_BYTES else INTERVAL
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
        for name, parameter in parameters.items():
            self._seen[name] = _Seen(parameter, _version(parameter), _digest(parameter) if comparing else None)

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _differs(self, name: str, tensor: Tensor, thorough: bool) -> bool:
        seen = self._seen[name]
        touched = tensor is not seen.tensor or _version(tensor) != seen.version
        if not touched and not thorough:
            return False
        if seen.digest is None:
            return touched
        if _digest(tensor) != seen.digest:
            return True
        self._seen[name] = _Seen(tensor, _version(tensor), seen.digest)  # written to and put back
        return False

    def _on_load(self, module: nn.Module, incompatible_keys: object) -> None:
        if module in self._modules:
            prefix = self._modules[module]
            for name, tensor in saved_tensors(module, recurse=False).items():
                self._seen[f"{prefix}.{name}" if prefix else name] = _remember(tensor)


def _remember(tensor: Tensor) -> _Seen:
    return _Seen(tensor, _version(tensor), _digest(tensor))


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _digest(tensor: Tensor) -> bytes:
    """Return the SHA-256 of type, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest.update(content.data)
    return digest.digest()
