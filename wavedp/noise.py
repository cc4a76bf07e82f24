# SPDX-License-Identifier: Apache-2.0
"""Gaussian noise from ChaCha20 under a key that is used once, and what hides the last bits of a noisy sum.

They are public as ``wavedp.gaussian_noise`` and so on. Number ``i`` of the noise is a function of the key, the step and
``offset + i`` alone (``wavedp/reference/noise.py``): it does not depend on threads, instruction sets, devices or on how
tensors part the range.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wavedp.errors import InvalidTypeError, InvalidValueError, StateError
from wavedp.noise_checks import (
    GRID_BITS,
    STRICT_GRID_BITS,
    check_wide_enough,
    grid_of,
    grid_step,
    integer_of,
    kind_of,
    real_of,
)
from wavedp.noise_key import KEY_BYTES, NoiseKey, secret_of
from wavedp.ops import noise as ops
from wavedp.ops.arguments import check_tensor
from wavedp.ops.noise import (
    MAX_STRICT_DEVIATION,
    STRICT_ANGLE_BITS,
    STRICT_NORMAL_ERROR,
    STRICT_RADIUS_BITS,
)

__all__ = [
    "GRID_BITS",
    "MAX_DEVIATION",
    "MAX_STRICT_DEVIATION",
    "STRICT_ANGLE_BITS",
    "STRICT_GRID_BITS",
    "STRICT_NORMAL_ERROR",
    "STRICT_RADIUS_BITS",
    "NoiseKey",
    "add_gaussian_noise_",
    "chacha20_words",
    "gaussian_noise",
    "grid_step",
    "noisy_mean",
]

MAX_DEVIATION = math.sqrt(2 * 65 * math.log(2))
"""Largest absolute value a unit normal can take: u is at least 2^-65, so r <= sqrt(-2 ln 2^-65) = 9.49."""


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
    for name, value, lengths in (("key_bytes", key_bytes, (KEY_BYTES,)), ("nonce", nonce, (8, 12))):
        if not isinstance(value, (bytes, bytearray)):
            raise InvalidTypeError(f"{op} takes {name} as bytes, not a {type(value).__name__}")
        if len(value) not in lengths:
            raise InvalidValueError(f"{op} takes {' or '.join(map(str, lengths))} bytes of {name}, not {len(value)}")
    bits = 64 if len(nonce) == 8 else 32
    counter = integer_of(op, "counter", counter, most=2**bits - 1)
    count = integer_of(op, "count", count)
    if rounds not in (8, 12, 20):
        raise InvalidValueError(f"{op} takes 20, 12 or 8 rounds, not {rounds!r}")
    if counter + -(-count // 16) > 2**bits:
        raise InvalidValueError(f"{op} of {count} words from block {counter} would wrap its counter of {bits} bits")
    words = tuple(int.from_bytes(nonce[k : k + 4], "little") for k in range(0, len(nonce), 4))
    out = torch.empty(count, dtype=torch.uint32, device=_device_of(op, device))
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
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    out: Tensor | None = None,  # [*shape]
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
        dtype: float32, also when ``None``, or float64. Lower precisions are refused: noise drawn in bfloat16 has some
            3,600 distinct values, which tell a record's presence.
        device: where the noise is made; the CPU when ``None``.
        out: takes the noise and is returned; of ``shape``, and of ``dtype`` and on ``device`` where these are given.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: a ``dtype`` that is not allowed, a ``std`` that is negative or not finite, a number that is out of
            range, or an ``out`` of another shape, dtype or device.
        RuntimeError: the key was wiped, or belongs to another process, or ``out`` is a leaf that requires grad.
    """
    op = "gaussian_noise"
    std = real_of(op, "std", std)
    if out is None:
        dtype = torch.float32 if dtype is None else dtype
        check_wide_enough(op, dtype)
        out = torch.empty(_checked_shape(op, shape), dtype=dtype, device=_device_of(op, device))
    else:
        _check_out(op, out, _checked_shape(op, shape), dtype, device)
    _draw(op, None, std, 0.0, 1.0, key, step, offset, kind_of(op, out.dtype, "standard"), out)
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
    check_wide_enough(op, tensor.dtype)
    _check_writable(op, tensor)
    std = real_of(op, "std", std)
    step_of_grid = grid_of(op, std, grid, "standard")
    _draw(op, tensor, std, step_of_grid, 1.0, key, step, offset, kind_of(op, tensor.dtype, "standard"), tensor)
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
    mode: str = "standard",
) -> Tensor:  # [*], contiguous
    """A private mean: the sum plus noise, rounded to the public grid, over a public denominator, in one pass.

    ``round((total + std * normal) / grid) * grid / divisor`` is computed in float64 and rounded once to
    ``out_dtype``. With ``std`` 0 there is neither noise nor rounding to the grid. What is not finite in ``total``
    stays so.

    ``mode="strict"`` computes ``(round(total / grid) + round(std / grid * normal)) * grid / divisor`` from float64
    normals whose radius has 76 bits: two integers, added exactly as long as ``total`` is below ``2^52`` steps of the
    grid. What is released is then a function of an integer and of noise whose law is known to within
    ``wavedp.noise.STRICT_NORMAL_ERROR``, at the price of a sensitivity that grows by ``grid * sqrt(numel)``. The
    integers are the same on every device.

    Args:
        total: a sum of clipped values, float32 or float64. Lower precisions do not hold one.
        std: standard deviation of the noise in the sum, finite and at least 0.
        divisor: the public denominator, positive. It must not be computed from private data.
        grid: as for :func:`add_gaussian_noise_`.
        key, step, offset: as for :func:`gaussian_noise`.
        out_dtype: dtype of the result; that of ``total`` when ``None``.
        mode: ``"standard"`` or ``"strict"``. The grid of strict noise is 2^-20 ``std``, rounded down to a power of two,
            unless given; then it is between 2^-40 ``std`` and ``std``.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: ``total`` is of another dtype, a number is out of range, or ``mode`` is unknown.
        RuntimeError: the key was wiped, or belongs to another process.
    """
    op = "noisy_mean"
    check_tensor(op, total)
    check_wide_enough(op, total.dtype)
    dtype = total.dtype if out_dtype is None else out_dtype
    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise InvalidValueError(f"{op} takes out_dtype float32, float64, bfloat16 or float16, not {dtype}")
    std, divisor = real_of(op, "std", std), real_of(op, "divisor", divisor, positive=True)
    step_of_grid, kind = grid_of(op, std, grid, mode), kind_of(op, total.dtype, mode)
    out = torch.empty(total.shape, dtype=dtype, device=total.device)
    _draw(op, total.detach(), std, step_of_grid, divisor, key, step, offset, kind, out)
    return out


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
    step = integer_of(op, "step", step, most=2**32 - 1)
    offset = integer_of(op, "offset", offset, most=2**63 - 1 - out.numel())
    with secret_of(op, key) as secret:
        ops.noisy_mean(total, std, grid, divisor, secret, step, offset, kind, out)


def _checked_shape(op: str, shape: Any) -> tuple[int, ...]:
    if isinstance(shape, (str, bytes)) or not isinstance(shape, Sequence):
        raise InvalidTypeError(f"{op} takes a shape as a sequence of integers, not {shape!r}")
    return tuple(integer_of(op, "size of the shape", size) for size in shape)


def _device_of(op: str, device: Any) -> torch.device:
    try:
        return torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise InvalidValueError(f"{op} takes a torch device, such as 'cpu' or 'cuda', not {device!r}") from error


def _check_out(
    op: str, out: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None, device: torch.device | str | None
) -> None:
    check_tensor(op, out)
    check_wide_enough(op, out.dtype)
    _check_writable(op, out)
    if out.shape != shape:
        raise InvalidValueError(f"out of {op} must have the shape {shape}, not {tuple(out.shape)}")
    if dtype not in (None, out.dtype):
        raise InvalidValueError(f"out of {op} is of {out.dtype}, but dtype={dtype} was asked for")
    if device is not None and torch.empty(0, device=_device_of(op, device)).device != out.device:
        raise InvalidValueError(f"out of {op} is on {out.device}, but device={str(device)!r} was asked for")


def _check_writable(op: str, tensor: Tensor) -> None:
    if tensor.requires_grad and tensor.is_leaf and torch.is_grad_enabled():
        raise StateError(f"{op} was called on a leaf that requires grad: call it under torch.no_grad()")
