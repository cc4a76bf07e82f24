# SPDX-License-Identifier: Apache-2.0
"""The key that the noise of one release is made from: drawn from the operating system, and wiped after its use."""

import contextlib
import hashlib
import os
import weakref
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor

from wavedp.errors import InvalidTypeError, StateError
from wavedp.noise_checks import integer_of

KEY_BYTES = 32


class NoiseKey:
    """256 secret bits that noise is made from: for one release, and never written anywhere.

    ::

        with NoiseKey.from_os() as key:  # wiped at the end of the block
            noise = wavedp.gaussian_noise((3, 4), 1.0, key=key)

    A key cannot be copied, pickled or printed. It is wiped by :meth:`wipe`, at the end of a ``with`` block, when it is
    collected, and in a process forked from its own, where it raises. (What the processor's registers and stack held
    of it while noise was made is not wiped.) The same key, step and offset give the same noise: draw a new key for
    every release.
    """

    __slots__ = ("__weakref__", "_insecure", "_memory", "_process")
    _memory: Tensor | None
    _insecure: bool
    _process: int

    def __init__(self) -> None:
        raise InvalidTypeError("a NoiseKey is made by NoiseKey.from_os(), or for debugging by NoiseKey.insecure(seed)")

    @classmethod
    def _blank(cls, insecure: bool) -> tuple["NoiseKey", memoryview]:
        key = cls.__new__(cls)
        key._memory = torch.zeros(KEY_BYTES, dtype=torch.uint8)
        key._insecure = insecure
        key._process = os.getpid()
        _live.add(key)
        array: Any = key._memory.numpy()
        return key, memoryview(array)

    @classmethod
    def from_os(cls) -> "NoiseKey":
        """Draw a key from the operating system."""
        key, memory = cls._blank(insecure=False)
        try:
            # Read in place: os.urandom would leave a copy among the interpreter's freed objects.
            with open("/dev/urandom", "rb", buffering=0) as device:
                if device.readinto(memory) == KEY_BYTES:
                    return key
        except OSError:
            pass
        memory[:] = os.urandom(KEY_BYTES)
        return key

    @classmethod
    def insecure(cls, seed: int) -> "NoiseKey":
        """Make the key of a seed: for debugging. What is made from it can be made again, and is not private."""
        seed = integer_of("NoiseKey.insecure", "seed", seed)
        key, memory = cls._blank(insecure=True)
        memory[:] = hashlib.shake_256(f"wavedp insecure key {seed}".encode()).digest(KEY_BYTES)
        return key

    @property
    def is_insecure(self) -> bool:
        """Whether the key was made from a seed."""
        return self._insecure

    @property
    def is_wiped(self) -> bool:
        """Whether there is nothing left to make noise from."""
        return self._memory is None

    def wipe(self) -> None:
        """Overwrite the bits with zeros; may be called again."""
        if self._memory is not None:
            self._memory.zero_()
            self._memory = None

    def _bytes(self) -> Tensor:  # [32] uint8, the key's own memory
        if os.getpid() != self._process:
            self.wipe()
            raise StateError("this NoiseKey belongs to another process: draw a new one after forking")
        if self._memory is None:
            raise StateError("this NoiseKey was wiped: a key makes the noise of one release; draw a new one")
        return self._memory

    def __enter__(self) -> "NoiseKey":
        return self

    def __exit__(self, *exception: object) -> None:
        self.wipe()

    def __del__(self) -> None:
        if getattr(self, "_memory", None) is not None:
            self.wipe()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise InvalidTypeError("a NoiseKey cannot be copied or pickled: the copy would repeat the noise, or tell it")

    def __repr__(self) -> str:
        kind = "wiped" if self.is_wiped else "insecure, from a seed" if self._insecure else "secret"
        return f"<NoiseKey: {kind}>"


_live: "weakref.WeakSet[NoiseKey]" = weakref.WeakSet()


def _wipe_all() -> None:
    for key in list(_live):
        key.wipe()


if hasattr(os, "register_at_fork"):  # pragma: always here
    os.register_at_fork(after_in_child=_wipe_all)


@contextlib.contextmanager
def secret_of(op: str, key: NoiseKey | None) -> Iterator[Tensor]:
    """The bits of a key, or for ``None`` of a fresh one, which is wiped at the end: [32] uint8."""
    if key is not None and not isinstance(key, NoiseKey):
        raise InvalidTypeError(f"{op} takes a NoiseKey as key, not a {type(key).__name__}")
    if key is not None:
        yield key._bytes()
        return
    with NoiseKey.from_os() as fresh:
        yield fresh._bytes()
