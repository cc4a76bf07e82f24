# SPDX-License-Identifier: Apache-2.0
"""Gaussian noise from ChaCha20 under a key that is used once, and what hides the last bits of a noisy sum.

They are public as ``wavedp.gaussian_noise`` and so on. Number ``i`` of the noise is a function of the key, the step and
``offset + i`` alone (``wavedp/reference/noise.py``): it does not depend on threads, instruction sets, devices or on how
tensors part the range.
"""

import contextlib
import hashlib
import math
import os
import weakref
from collections.abc import Iterator, Sequence
from numbers import Integral, Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from wavedp.ops import noise as ops
from wavedp.ops.arguments import check_tensor
from wavedp.ops.noise import NARROW, WIDE

__all__ = [
    "MAX_DEVIATION",
    "NoiseKey",
    "add_gaussian_noise_",
    "chacha20_words",
    "gaussian_noise",
    "grid_step",
    "noisy_mean",
]

MAX_DEVIATION = math.sqrt(2 * 65 * math.log(2))
"""Largest absolute value a unit normal can take: u is at least 2^-65, so r <= sqrt(-2 ln 2^-65) = 9.49."""

GRID_BITS = 12
"""The grid step is the noise's standard deviation times 2^-12, rounded down to a power of two."""

_KEY_BYTES = 32
_GRID_RANGE = 2.0**-1000, 2.0**1000


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
        raise TypeError("a NoiseKey is made by NoiseKey.from_os(), or for debugging by NoiseKey.insecure(seed)")

    @classmethod
    def _blank(cls, insecure: bool) -> tuple["NoiseKey", memoryview]:
        key = cls.__new__(cls)
        key._memory = torch.zeros(_KEY_BYTES, dtype=torch.uint8)
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
                if device.readinto(memory) == _KEY_BYTES:
                    return key
        except OSError:
            pass
        memory[:] = os.urandom(_KEY_BYTES)
        return key

    @classmethod
    def insecure(cls, seed: int) -> "NoiseKey":
        """Make the key of a seed: for debugging. What is made from it can be made again, and is not private."""
        seed = _integer("NoiseKey.insecure", "seed", seed)
        key, memory = cls._blank(insecure=True)
        memory[:] = hashlib.shake_256(f"wavedp insecure key {seed}".encode()).digest(_KEY_BYTES)
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
            raise RuntimeError("this NoiseKey belongs to another process: draw a new one after forking")
        if self._memory is None:
            raise RuntimeError("this NoiseKey was wiped: a key makes the noise of one release; draw a new one")
        return self._memory

    def __enter__(self) -> "NoiseKey":
        return self

    def __exit__(self, *exception: object) -> None:
        self.wipe()

    def __del__(self) -> None:
        if getattr(self, "_memory", None) is not None:
            self.wipe()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a NoiseKey cannot be copied or pickled: the copy would repeat the noise, or tell it")

    def __repr__(self) -> str:
        kind = "wiped" if self.is_wiped else "insecure, from a seed" if self._insecure else "secret"
        return f"<NoiseKey: {kind}>"


_live: "weakref.WeakSet[NoiseKey]" = weakref.WeakSet()


def _wipe_all() -> None:
    for key in list(_live):
        key.wipe()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_wipe_all)


def chacha20_words(
    key_bytes: bytes | bytearray,
    counter: int,
    nonce: bytes,
    count: int,
    rounds: int = 20,
    *,
    device: torch.device | str = "cpu",
) -> Tensor:  # [count] uint32
    """The raw stream of ChaCha20 (RFC 8439, section 2.3), as words: for known-answer tests of what makes the noise.

    Args:
        key_bytes: 32 bytes.
        counter: number of the first block.
        nonce: 12 bytes, as in the RFC, with a counter of 32 bits; or 8 bytes with one of 64 bits, as the noise has.
        count: number of words.
        rounds: 20, 12 or 8.
        device: where the stream is made.

    Raises:
        TypeError: ``key_bytes`` or ``nonce`` are no bytes, or a number is no integer.
        ValueError: a wrong length, a number out of range, or more blocks than the counter can count.
    """
    op = "chacha20_words"
    for name, value, lengths in (("key_bytes", key_bytes, (_KEY_BYTES,)), ("nonce", nonce, (8, 12))):
        if not isinstance(value, (bytes, bytearray)):
            raise TypeError(f"{op} takes {name} as bytes, not a {type(value).__name__}")
        if len(value) not in lengths:
            raise ValueError(f"{op} takes {' or '.join(map(str, lengths))} bytes of {name}, not {len(value)}")
    bits = 64 if len(nonce) == 8 else 32
    counter = _integer(op, "counter", counter, most=2**bits - 1)
    count = _integer(op, "count", count)
    if rounds not in (8, 12, 20):
        raise ValueError(f"{op} takes 20, 12 or 8 rounds, not {rounds!r}")
    if counter + -(-count // 16) > 2**bits:
        raise ValueError(f"{op} of {count} words from block {counter} would wrap its counter of {bits} bits")
    words = tuple(int.from_bytes(nonce[k : k + 4], "little") for k in range(0, len(nonce), 4))
    out = torch.empty(count, dtype=torch.uint32, device=device)
    key = torch.frombuffer(bytearray(key_bytes), dtype=torch.uint8)
    try:
        ops.chacha20_words(key, counter, words, rounds, out)
    finally:
        key.zero_()
    return out


def gaussian_noise(
    shape: Sequence[int],
    std: float = 1.0,
    *,
    key: NoiseKey | None = None,
    step: int = 0,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:  # [*shape]
    """Independent normals of mean 0 and standard deviation ``std``, cryptographically strong.

    ChaCha20, three words for two numbers by Box-Muller on a radius of 64 bits, so that the tail reaches 9.49 ``std``
    and the mass beyond it is below 1e-19. float32 is computed in float32, within 5 units in the last place of the
    float64 formula; ``std * normal`` is rounded once more. To release ``x + noise``, use
    :func:`add_gaussian_noise_` or :func:`noisy_mean`, which also hide the last bits of ``x``.

    Args:
        shape: shape of the result.
        std: standard deviation, finite and at least 0.
        key: what the noise is made from; a fresh key of the operating system, wiped at once, when ``None``.
        step: separates the streams of one key, 0 to 2^32 - 1.
        offset: number in the stream of the first element; elements are counted in row-major order.
        dtype: float32 or float64. Lower precisions are refused: noise drawn in bfloat16 has some 3,600
            distinct values, which tell a record's presence.
        device: where the noise is made.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: a ``dtype`` that is not allowed, a ``std`` that is negative or not finite, or a number that is
            out of range.
        RuntimeError: the key was wiped, or belongs to another process.
    """
    op = "gaussian_noise"
    std = _real(op, "std", std)
    _check_wide_enough(op, dtype)
    out = torch.empty(tuple(shape), dtype=dtype, device=device)
    _draw(op, None, std, 0.0, 1.0, key, step, offset, _kind(dtype), out)
    return out


def add_gaussian_noise_(
    tensor: Tensor,  # [*]
    std: float,
    *,
    grid: float | None = None,
    key: NoiseKey | None = None,
    step: int = 0,
    offset: int = 0,
) -> Tensor:
    """Add normals of deviation ``std`` to ``tensor`` in place and round the sum to the public grid.

    A float sum carries the last bits of its larger operand, so that ``sum + noise`` tells of the sum even under
    perfect noise (Mironov 2012; Haney et al., arXiv 2207.13793). Multiples of a step that depends on public
    constants alone do not. The sum is taken in float64. With ``std`` 0 the tensor stays as it is.

    Args:
        tensor: float32 or float64, with any strides.
        std: standard deviation, finite and at least 0.
        grid: the step, a power of two; :func:`grid_step` of ``std`` when ``None``; 0 leaves rounding out.
        key, step, offset: as for :func:`gaussian_noise`.

    Returns:
        ``tensor``.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: ``tensor`` is of another dtype, or a number is out of range.
        RuntimeError: the key was wiped or belongs to another process, or ``tensor`` is a leaf that requires grad.
    """
    op = "add_gaussian_noise_"
    check_tensor(op, tensor)
    _check_wide_enough(op, tensor.dtype)
    if tensor.requires_grad and tensor.is_leaf and torch.is_grad_enabled():
        raise RuntimeError(f"{op} was called on a leaf that requires grad: call it under torch.no_grad()")
    std = _real(op, "std", std)
    step_of_grid = _grid(op, grid, std)
    _draw(op, tensor, std, step_of_grid, 1.0, key, step, offset, _kind(tensor.dtype), tensor)
    return tensor


def noisy_mean(
    total: Tensor,  # [*]
    std: float,
    *,
    divisor: float = 1.0,
    grid: float | None = None,
    key: NoiseKey | None = None,
    step: int = 0,
    offset: int = 0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # [*], contiguous
    """A private mean: the sum plus noise, rounded to the public grid, over a public denominator, in one pass.

    ``round((total + std * normal) / grid) * grid / divisor`` is computed in float64 and rounded once to
    ``out_dtype``. With ``std`` 0 there is neither noise nor rounding to the grid. What is not finite in ``total``
    stays so.

    Args:
        total: a sum of clipped values, float32 or float64. Lower precisions do not hold one.
        std: standard deviation of the noise in the sum, finite and at least 0.
        divisor: the public denominator, positive. It must not be computed from private data.
        grid: as for :func:`add_gaussian_noise_`.
        key, step, offset: as for :func:`gaussian_noise`.
        out_dtype: dtype of the result; that of ``total`` when ``None``.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: ``total`` is of another dtype, or a number is out of range.
        RuntimeError: the key was wiped, or belongs to another process.
    """
    op = "noisy_mean"
    check_tensor(op, total)
    _check_wide_enough(op, total.dtype)
    dtype = total.dtype if out_dtype is None else out_dtype
    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise ValueError(f"{op} takes out_dtype float32, float64, bfloat16 or float16, not {dtype}")
    std, divisor = _real(op, "std", std), _real(op, "divisor", divisor, positive=True)
    step_of_grid = _grid(op, grid, std)
    out = torch.empty(total.shape, dtype=dtype, device=total.device)
    _draw(op, total.detach(), std, step_of_grid, divisor, key, step, offset, _kind(total.dtype), out)
    return out


def grid_step(std: float) -> float:
    """Return the public rounding step for noise of deviation ``std``: ``2^(floor(log2 std) - 12)``."""
    std = _real("grid_step", "std", std, positive=True)
    step = math.ldexp(1.0, math.frexp(std)[1] - 1 - GRID_BITS)
    if not _GRID_RANGE[0] <= step <= _GRID_RANGE[1]:
        raise ValueError(f"grid_step takes a std whose grid is in [2^-1000, 2^1000], not {std!r}")
    return step


def _kind(dtype: torch.dtype) -> int:
    return WIDE if dtype == torch.float64 else NARROW


def _draw(
    op: str,
    total: Tensor | None,
    std: float,
    grid: float,
    divisor: float,
    key: NoiseKey | None,
    step: int,
    offset: int,
    kind: int,
    out: Tensor,
) -> None:
    step = _integer(op, "step", step, most=2**32 - 1)
    offset = _integer(op, "offset", offset, most=2**63 - 1 - out.numel())
    with secret_of(op, key) as secret:
        ops.noisy_mean(total, std, grid, divisor, secret, step, offset, kind, out)


@contextlib.contextmanager
def secret_of(op: str, key: NoiseKey | None) -> Iterator[Tensor]:
    """The bits of a key, or for ``None`` of a fresh one, which is wiped at the end: [32] uint8."""
    if key is not None and not isinstance(key, NoiseKey):
        raise TypeError(f"{op} takes a NoiseKey as key, not a {type(key).__name__}")
    if key is not None:
        yield key._bytes()
        return
    with NoiseKey.from_os() as fresh:
        yield fresh._bytes()


def grid_of(op: str, std: Any, denominator: Any, grid: Any) -> tuple[float, float, float]:
    """Deviation, denominator and grid of a noisy mean, checked."""
    std = _real(op, "std", std)
    return std, _real(op, "denominator", denominator, positive=True), _grid(op, grid, std)


def _grid(op: str, grid: Any, std: float) -> float:
    if grid is None:
        return grid_step(std) if std > 0.0 else 0.0
    step = _real(op, "grid", grid)
    if step != 0.0 and (math.frexp(step)[0] != 0.5 or not _GRID_RANGE[0] <= step <= _GRID_RANGE[1]):
        raise ValueError(f"{op} takes a power of two as grid, or 0 for none, not {grid!r}")
    return step


def _check_wide_enough(op: str, dtype: Any) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{op}: noise is drawn in float32 or float64, got {dtype}; round once, after adding it")


def _real(op: str, name: str, value: Any, *, positive: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{op} takes a real number as {name}, not {value!r}")
    number = float(value)
    if not math.isfinite(number) or number < 0.0 or (positive and number == 0.0):
        raise ValueError(f"{op} takes a finite {name} {'> 0' if positive else '>= 0'}, not {number!r}")
    return number


def _integer(op: str, name: str, value: Any, *, most: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{op} takes an integer as {name}, not {value!r}")
    number = int(value)
    if number < 0 or (most is not None and number > most):
        limit = "" if most is None else f" and at most {most}"
        raise ValueError(f"{op} takes a {name} of at least 0{limit}, not {number}")
    return number
