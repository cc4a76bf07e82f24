# SPDX-License-Identifier: Apache-2.0
"""Where random bits come from: the operating system, or, for debugging only, a seed.

Every draw of noise and every sampled batch reads fresh bytes from an :class:`Entropy`. The system source
keeps no state, so there is nothing to save, to resume or to replay, and a forked process cannot repeat it.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch

from wavedp.functional import NoiseKey
from wavedp.privacy.validation import check_integer


class Entropy:
    """A stream of random bytes.

    Args:
        insecure_seed: ``None`` (the default) reads ``os.urandom``. An integer makes the stream reproducible
            with SHAKE-256, and marks everything made from it as insecure: no privacy statement is issued.
        purpose: separates the streams that one seed makes (noise, sampling).
    """

    def __init__(self, insecure_seed: int | None = None, purpose: str = "") -> None:
        self._prefix: bytes | None = None
        if insecure_seed is not None:
            seed = check_integer("insecure_seed", insecure_seed)
            self._prefix = f"wavedp insecure {purpose} {seed} ".encode()
        self._reads = 0

    @property
    def insecure(self) -> bool:
        """Whether the bytes can be reproduced from a seed."""
        return self._prefix is not None

    def read(self, size: int) -> bytes:
        """Return ``size`` bytes that no other read returns."""
        if self._prefix is None:
            return os.urandom(size)
        self._reads += 1
        return hashlib.shake_256(self._prefix + str(self._reads).encode()).digest(size)

    def key(self) -> NoiseKey:
        """Return a fresh key for the noise of one release; wipe it after."""
        if self._prefix is None:
            return NoiseKey.from_os()
        return NoiseKey.insecure(int.from_bytes(self.read(32), "little"))

    def words(self, count: int, dtype: str = "<u8") -> npt.NDArray[np.unsignedinteger]:
        """Return ``count`` uniform unsigned integers of little-endian type ``dtype``, ``<u4`` or ``<u8``."""
        return np.frombuffer(self.read(count * np.dtype(dtype).itemsize), dtype=dtype)


@contextlib.contextmanager
def unpredictable_draws(device: torch.device) -> Iterator[Callable[[], object]]:
    """What a model draws inside, such as dropout; the function that is given seeds torch's generators by the operating
    system; those of the CPU and of ``device`` are put back in the end.

    Such draws go by a row's place in the batch. From a seed that is known, a record that is removed gives its draws to
    the next one, and so on, and the sum of clipped gradients changes by more than one record. From one that nobody
    knows they are alike in law for all records, each of which may be thought to keep its own. torch keeps 32 bits of a
    seed, so each batch gets its own.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield lambda: torch.manual_seed(int.from_bytes(os.urandom(8), "little"))
