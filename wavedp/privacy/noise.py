# SPDX-License-Identifier: Apache-2.0
"""Gaussian noise from the operating system's entropy, and the public grid on which a release is rounded.

Box-Muller (Box and Muller, 1958) on a 64-bit radius and a 32-bit angle. 24-bit or 32-bit radii, which torch and
cuRAND use, cut the tail at 5.8 and 6.8 sigma; an output beyond the cut is possible with one data set and
impossible with its neighbour, which costs a delta that no accountant counts. Here the tail reaches 9.49 sigma: the
mass beyond it is below 1e-19. The bits are ChaCha20's under a fresh key of the operating system.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from wavedp import functional
from wavedp.errors import InvalidValueError
from wavedp.functional import GRID_BITS, MAX_DEVIATION, grid_step
from wavedp.privacy.entropy import Entropy
from wavedp.privacy.validation import check_real

__all__ = ["GRID_BITS", "MAX_DEVIATION", "gaussian_noise", "grid_step", "round_to_grid"]


def gaussian_noise(
    shape: Sequence[int],
    std: float,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    entropy: Entropy | None = None,
) -> Tensor:
    """Draw independent normals of mean 0 and standard deviation ``std`` under a key that is used once.

    Args:
        shape: shape of the result.
        std: standard deviation, finite and at least 0.
        dtype: float32 or float64. Lower precisions are refused: noise drawn in bfloat16 has some 3,600
            distinct values, which tell a record's presence.
        device: where the noise is made.
        entropy: source of the key; the operating system when ``None``.

    Raises:
        ValueError: a ``dtype`` that is not allowed, or a ``std`` that is negative or not finite.
    """
    std = check_real("std", std, at_least=0.0)
    with (Entropy() if entropy is None else entropy).key() as key:
        return functional.gaussian_noise(shape, std, key=key, dtype=dtype, device=device)


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
        raise InvalidValueError(f"step must be a power of two, so that dividing by it is exact; got {step!r}")
    return torch.round(x / step) * step
