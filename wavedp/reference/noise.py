# SPDX-License-Identifier: Apache-2.0
"""Definition of the noise: ChaCha20 (RFC 8439), which of its words make which number, and the noisy mean.

Word 12 and 13 of a block's state are its number, low half first, word 14 is the step, and word 15 the domain of use
in its upper byte: 1 for noise. Number ``i`` of a stream is made from block ``16 (i // 160) + i % 16``: with
``k = i % 160 // 16`` and ``p = k // 2``, words ``3 p``, ``3 p + 1`` and ``3 p + 2`` of the block are the upper and the
lower half of the radius and the angle, and the number is the cosine's for even k, the sine's for odd k. Neither calls
nor threads nor devices that share a range between them change a number.

Strict noise has a domain of its own, 3, and four words for two numbers: number ``i`` is from block ``16 (i // 128) +
i % 16``, and with ``k = i % 128 // 16`` and ``p = k // 2`` words ``4 p`` to ``4 p + 3`` make them as
:func:`strict_normals_from_words` says.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from wavedp.reference.normals_strict import (
    MAX_STRICT_DEVIATION,
    STRICT_ANGLE_BITS,
    STRICT_NORMAL_ERROR,
    STRICT_RADIUS_BITS,
    strict_normals_from_words,
)

__all__ = [
    "BLOCK_NORMALS",
    "GROUP_BLOCKS",
    "GROUP_NORMALS",
    "MAX_STRICT_DEVIATION",
    "NARROW",
    "NOISE_DOMAIN",
    "ROUNDING_DOMAIN",
    "STRICT",
    "STRICT_ANGLE_BITS",
    "STRICT_BLOCK_NORMALS",
    "STRICT_DOMAIN",
    "STRICT_GROUP_NORMALS",
    "STRICT_NORMAL_ERROR",
    "STRICT_RADIUS_BITS",
    "WIDE",
    "WORDS",
    "chacha20_blocks",
    "chacha20_words_forward",
    "noisy_mean_forward",
    "normals_from_words",
    "strict_normals_from_words",
]

WORDS = 16  # of a block
GROUP_BLOCKS, BLOCK_NORMALS = 16, 10
GROUP_NORMALS = GROUP_BLOCKS * BLOCK_NORMALS
STRICT_BLOCK_NORMALS = 8
STRICT_GROUP_NORMALS = GROUP_BLOCKS * STRICT_BLOCK_NORMALS
NOISE_DOMAIN, ROUNDING_DOMAIN, STRICT_DOMAIN = 1, 2, 3
NARROW, WIDE, STRICT = 0, 1, 2  # kinds of normals: of float32, of float64 from the same words, and of strict noise

_CONSTANTS = tuple(int.from_bytes(b"expand 32-byte k"[k : k + 4], "little") for k in range(0, 16, 4))
_MASK = 0xFFFFFFFF
_MOST_BLOCKS = 1 << 14  # at a time: 16 words of 8 bytes each, and as much again to compute with
# Quarter rounds of the columns, then of the diagonals (RFC 8439, section 2.3).
_ROUNDS = (
    *((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)),
    *((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)),
)


def _rotated(x: Tensor, bits: int) -> Tensor:
    return ((x << bits) | (x >> (32 - bits))) & _MASK


def chacha20_blocks(
    key: Tensor,  # [32] uint8
    counter: int,  # of the first block
    nonce: Sequence[int],  # 3 words, or 2 where the counter has 64 bits
    rounds: int,
    count: int,
    device: torch.device,
) -> Tensor:  # [16, count] int64, words by their place in a block
    halves = key.to(device, torch.int64).view(8, 4)
    shifts = torch.tensor([0, 8, 16, 24], device=device)
    number = torch.arange(count, dtype=torch.int64, device=device)
    low = (counter & _MASK) + number
    initial = [torch.full_like(number, word) for word in _CONSTANTS]
    initial += [word.expand(count) for word in (halves << shifts).sum(1)]
    initial.append(low & _MASK)
    if len(nonce) == 2:
        initial.append(((counter >> 32) + (low >> 32)) & _MASK)
    initial += [torch.full_like(number, word) for word in nonce]
    x = list(initial)
    for _ in range(rounds // 2):
        for a, b, c, d in _ROUNDS:
            for into, other, target, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
                x[into] = (x[into] + x[other]) & _MASK
                x[target] = _rotated(x[target] ^ x[into], bits)
    return torch.stack([(word + start) & _MASK for word, start in zip(x, initial)])


def chacha20_words_forward(
    key: Tensor,  # [32] uint8
    counter: int,
    nonce: Sequence[int],
    rounds: int,
    out: Tensor,  # [count] uint32
) -> None:
    """The raw stream from the beginning of block ``counter``."""
    for first in range(0, -(-out.numel() // WORDS), _MOST_BLOCKS):
        count = min(_MOST_BLOCKS, -(-out.numel() // WORDS) - first)
        words = chacha20_blocks(key, counter + first, nonce, rounds, count, out.device).T.flatten()
        part = out[first * WORDS : (first + count) * WORDS]
        part.copy_(words[: part.numel()].to(torch.uint32))


def normals_from_words(
    high: Tensor,  # int64, of 32 bits: upper half of the radius
    low: Tensor,  # its lower half
    angle: Tensor,
) -> tuple[Tensor, Tensor]:  # float64
    """Two independent standard normals from three uniform words (Box and Muller, 1958).

    ``u = (2^32 high + low + 1/2) 2^-64`` lies in ``[2^-65, 1)``; ``r = sqrt(-2 ln u)``; the result is
    ``r cos(theta), r sin(theta)`` with ``theta = 2 pi (angle + 1/2) 2^-32``. Above 1/2, ``u`` is told by ``1 - u``.
    """
    upper_half = high >= 1 << 31
    high, low = (torch.where(upper_half, word ^ _MASK, word) for word in (high, low))
    w = high.double() * 2.0**-32 + (low.double() + 0.5) * 2.0**-64
    radius = torch.sqrt(-2.0 * torch.where(upper_half, torch.log1p(-w), torch.log(w)))
    theta = (angle.double() + 0.5) * (2.0 * math.pi * 2.0**-32)
    return radius * torch.cos(theta), radius * torch.sin(theta)


def _normals(strict: bool, key: Tensor, step: int, first: int, groups: int, device: torch.device) -> Tensor:
    """Numbers of ``groups`` whole groups from group ``first`` on, float64."""
    numbers, nonce = (STRICT_BLOCK_NORMALS, STRICT_DOMAIN) if strict else (BLOCK_NORMALS, NOISE_DOMAIN)
    words = chacha20_blocks(key, first * GROUP_BLOCKS, (step, nonce << 24), 20, groups * GROUP_BLOCKS, device)
    pairs = numbers // 2
    if strict:
        both = strict_normals_from_words(*words.view(pairs, 4, -1).unbind(1))
    else:
        both = normals_from_words(*words[: 3 * pairs].view(pairs, 3, -1).unbind(1))
    rows = torch.stack(both, dim=1)  # [pairs, 2, 16 groups]
    return rows.view(numbers, groups, GROUP_BLOCKS).transpose(0, 1).flatten()


def _rounded_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 to a narrower type; to one of 16 bits by way of float32 with an odd last bit where that is inexact, which
    is as rounding once (Boldo and Melquiond, 2008)."""
    if dtype == torch.float32:
        return x.float()
    nearest = x.float()
    bits = nearest.view(torch.int32)
    toward_zero = torch.where(nearest.double().abs() > x.abs(), bits - 1, bits)
    inexact = (nearest.double() != x) & ~x.isnan()
    return torch.where(inexact, toward_zero | 1, bits).view(torch.float32).to(dtype)


def noisy_mean_forward(
    total: Tensor | None,  # contiguous [*] float32 or float64; None: zero
    std: float,
    grid: float,  # a power of two; 0: no rounding
    divisor: float,
    key: Tensor,  # [32] uint8
    step: int,
    offset: int,  # of the first element in the stream
    kind: int,  # NARROW, WIDE or STRICT
    out: Tensor,  # contiguous [*]
) -> None:
    """``round((total + std * normal) / grid) * grid / divisor`` in float64, rounded once to the type of ``out``.

    Strict noise is ``(round(total / grid) + round(std / grid * normal)) * grid / divisor``, and needs a grid: two
    integers below 2^52, whose sum and whose product with the grid are exact. With ``std`` 0 there is neither noise nor
    grid.
    """
    strict = kind == STRICT
    flat = out.view(-1)
    totals = None if total is None else total.reshape(-1)
    group = STRICT_GROUP_NORMALS if strict else GROUP_NORMALS
    size = _MOST_BLOCKS // GROUP_BLOCKS * group
    for start in range(0, flat.numel(), size):
        part = flat[start : start + size]
        x = torch.zeros_like(part, dtype=torch.float64) if totals is None else totals[start : start + size].double()
        if std > 0.0:
            first, skipped = divmod(offset + start, group)
            groups = -(-(skipped + part.numel()) // group)
            normals = _normals(strict, key, step, first, groups, out.device)[skipped : skipped + part.numel()]
            if strict:
                x = (torch.round(x / grid) + torch.round((std / grid) * normals)) * grid
            else:
                x = x + std * (normals.float().double() if kind == NARROW else normals)
                if grid > 0.0:
                    x = torch.round(x / grid) * grid
        # The reciprocal's error is far below the rounding to a narrower type.
        part.copy_(x / divisor if out.dtype == torch.float64 else _rounded_once(x * (1.0 / divisor), out.dtype))
