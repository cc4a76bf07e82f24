# SPDX-License-Identifier: Apache-2.0
"""Gaussian noise from the operating system's entropy, and the public grid on which a release is rounded.

Box-Muller (Box and Muller, 1958) on a 64-bit radius and a 32-bit angle, in float64. 24-bit or 32-bit
radii, which torch and cuRAND use, cut the tail at 5.8 and 6.8 sigma; an output beyond the cut is possible
with one data set and impossible with its neighbour, which costs a delta that no accountant counts. Here
the tail reaches 9.49 sigma: the mass beyond it is below 1e-19.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wavedp.privacy.entropy import Entropy
from wavedp.privacy.validation import check_real

MAX_DEVIATION = math.sqrt(2 * 65 * math.log(2))
"""Largest absolute value a unit normal can take: u is at least 2^-65, so r <= sqrt(-2 ln 2^-65) = 9.49."""

GRID_BITS = 12
"""The grid step is the noise's standard deviation times 2^-12, rounded down to a power of two."""

_CHUNK_PAIRS = 1 << 18


def normals_from_words(
    high: npt.NDArray[np.unsignedinteger],  # [n] uint32, upper half of the radius
    low: npt.NDArray[np.unsignedinteger],  # [n] uint32, lower half of the radius
    angle: npt.NDArray[np.unsignedinteger],  # [n] uint32
) -> npt.NDArray[np.float64]:
    """Map uniform 32-bit words to independent standard normals, float64 ``[2 n]``.

    ``u = high 2^-32 + (low + 1/2) 2^-64`` lies in ``[2^-65, 1]`` and is never 0; it keeps its relative
    precision in the tail, where ``high`` is 0. ``r = sqrt(-2 ln u)`` and the result is
    ``r cos(theta), r sin(theta)`` with ``theta = 2 pi (angle + 1/2) 2^-32``.
    """
    u = high.astype(np.float64) * 2.0**-32 + (low.astype(np.float64) + 0.5) * 2.0**-64
    radius = np.sqrt(-2.0 * np.log(u))
    theta = (angle.astype(np.float64) + 0.5) * (2.0 * math.pi * 2.0**-32)
    return np.concatenate([radius * np.cos(theta), radius * np.sin(theta)])


def gaussian_noise(
    shape: Sequence[int],
    std: float,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    entropy: Entropy | None = None,
) -> Tensor:
    """Draw independent normals of mean 0 and standard deviation ``std``.

    Args:
        shape: shape of the result.
        std: standard deviation, finite and at least 0.
        dtype: float32 or float64. Lower precisions are refused: noise drawn in bfloat16 has some 3,600
            distinct values, which tell a record's presence.
        device: where the result is put; the noise itself is made on the CPU.
        entropy: source of the bits; the operating system when ``None``.

    Raises:
        ValueError: a ``dtype`` that is not allowed, or a ``std`` that is negative or not finite.
    """
    std = check_real("std", std, at_least=0.0)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"noise is drawn in float32 or float64, got {dtype}; round once, after adding it")
    source = Entropy() if entropy is None else entropy
    size = math.prod(shape)
    values = np.empty(size, dtype=np.float32 if dtype == torch.float32 else np.float64)
    for start in range(0, size, 2 * _CHUNK_PAIRS):
        stop = min(start + 2 * _CHUNK_PAIRS, size)
        pairs = (stop - start + 1) // 2
        words = source.words(3 * pairs, "<u4").reshape(3, pairs)
        values[start:stop] = std * normals_from_words(words[0], words[1], words[2])[: stop - start]
    return torch.from_numpy(values).reshape(tuple(shape)).to(device)


def grid_step(std: float) -> float:
    """Return the public rounding step for noise of deviation ``std``: ``2^(floor(log2 std) - 12)``."""
    std = check_real("std", std, above=0.0)
    return math.ldexp(1.0, math.frexp(std)[1] - 1 - GRID_BITS)


def round_to_grid(x: Tensor, step: float) -> Tensor:
    """Round ``x`` to the nearest multiple of ``step``, ties to even; ``step`` is a power of two.

    A float sum carries the last bits of its larger operand, so that ``sum + noise`` tells of the sum even
    under perfect noise (Mironov 2012; Haney et al., arXiv 2207.13793). Multiples of a step that depends on
    public constants alone do not. This is a hardening and not a proof: the noise is a rounded Gaussian, not
    a discrete one.

    Raises:
        ValueError: ``step`` is not a positive power of two.
    """
    step = check_real("step", step, above=0.0)
    if math.frexp(step)[0] != 0.5:
        raise ValueError(f"step must be a power of two, so that dividing by it is exact; got {step!r}")
    return torch.round(x / step) * step
