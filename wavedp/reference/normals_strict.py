# SPDX-License-Identifier: Apache-2.0
"""Definition of the float64 normals of strict noise, operation by operation: the same bits on every device.

Only sums, products, quotients and square roots of float64, each rounded to nearest by itself: an implementation that
takes the same ones in the same order, and joins no product and sum into one operation, has the same bits.
"""

import math

import numpy as np
import torch
from torch import Tensor

STRICT_NORMAL_ERROR = 2.0**-47
"""Bound of ``|computed - exact|`` of ``(std / grid) * normal``, in units of one standard deviation, where exact is
Box and Muller's formula of the same words; the rounding to an integer is not counted. In units of 2^-53 the radius is
at most 1.6 off, relatively, a cosine 1.6, a product 1 each; so 5.2 * 2^-53 * 10.33 < 2^-47.2 is not exceeded (a sine is
1.8 off where it is 0.71, and makes less). The worst of 3.6e5 words, structured ones among them, was 2^-48.2."""

STRICT_RADIUS_BITS, STRICT_ANGLE_BITS = 76, 52
"""Of the four words of a pair. Both numbers of a pair together show the radius to the resolution of the grid. 64 bits
leave gaps between the radii above 8.1 sigma that are wider than a grid of 2^-20 sigma, which is seen once in 2^47
pairs; 76 bits leave them above 9.1 sigma, once in 2^59."""

MAX_STRICT_DEVIATION = math.sqrt(2 * (STRICT_RADIUS_BITS + 1) * math.log(2))
"""Largest absolute value: u is at least 2^-77, so r <= sqrt(-2 ln 2^-77) = 10.33."""

SQRT_HALF = float.fromhex("0x1.6a09e667f3bcdp-1")
# ln 2 in two parts, of which the first has 42 bits: its product with an exponent is exact.
LN2_HIGH, LN2_LOW = float.fromhex("0x1.62e42fefa3800p-1"), float.fromhex("0x1.ef35793c76730p-45")
# Minimax polynomials, lowest coefficient first. With z = s^2, ln((1 + s) / (1 - s)) = 2 s + s z LOG(z) for |s| <= 3 -
# 2 sqrt(2), relative error 2^-58.8; with z = x^2, sin(pi x / 2) = x (HALF_PI + z SINE(z)), relative error 2^-54.4 with
# that of HALF_PI, and cos(pi x / 2) = 1 + z COSINE(z), error 2^-55.7, for |x| <= 1/2.
LOG = tuple(
    float.fromhex(x)
    for x in (
        *("0x1.5555555555592p-1", "0x1.999999997fd7ap-2", "0x1.24924941f4e05p-2", "0x1.c71c520615de0p-3"),
        *("0x1.74663fa07a01fp-3", "0x1.39a1a70c4652ap-3", "0x1.2f0634596ccf8p-3"),
    )
)
HALF_PI = float.fromhex("0x1.921fb54442d18p+0")
SINE = tuple(
    float.fromhex(x)
    for x in (
        *("-0x1.4abbce625be47p-1", "0x1.466bc67758d85p-4", "-0x1.32d2cce3332ccp-8", "0x1.5078301b61792p-13"),
        *("-0x1.e300a6598bfb7p-19", "0x1.e403d056e4915p-25"),
    )
)
COSINE = tuple(
    float.fromhex(x)
    for x in (
        *("-0x1.3bd3cc9be45dep+0", "0x1.03c1f081b5ab0p-2", "-0x1.55d3c7e3c95bcp-6", "0x1.e1f50683b42d0p-11"),
        *("-0x1.a6d1ecb740509p-16", "0x1.f9cc6acff3cc6p-22", "-0x1.b26fe86abf9f6p-28"),
    )
)
_MASK = 0xFFFFFFFF


def _polynomial(z: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Horner's scheme, from the highest coefficient on."""
    value = z * coefficients[-1] + coefficients[-2]
    for coefficient in coefficients[-3::-1]:
        value = value * z + coefficient
    return value


def _square_root(x: Tensor) -> Tensor:
    """Rounded to nearest, as IEEE 754 has it: torch's root on the CPU may be MKL's, a unit off for 1 % of numbers."""
    if x.device.type == "cpu":
        return torch.from_numpy(np.sqrt(x.numpy()))
    return torch.sqrt(x)


def _radius(high: Tensor, low: Tensor, lowest: Tensor) -> Tensor:
    """``sqrt(-2 ln u)`` of ``u = (2^44 high + 2^12 low + lowest + 1/2) 2^-76``, from ``ln u = e ln 2 + ln(1 + f)`` with
    ``1 + f`` in ``[sqrt(1/2), sqrt(2))``. ``w`` is u, or above 1/2 its distance from 1, rounded once; f is exact.
    """
    upper_half = high >= 1 << 31
    high, low = (torch.where(upper_half, word ^ _MASK, word) for word in (high, low))
    lowest = torch.where(upper_half, lowest ^ 0xFFF, lowest)
    w = high.double() * 2.0**-32 + (low.double() * 2.0**-64 + (lowest.double() + 0.5) * 2.0**-76)
    mantissa, exponent = torch.frexp(w)  # [1/2, 1)
    small = mantissa < SQRT_HALF
    mantissa = torch.where(small, mantissa + mantissa, mantissa)
    near_one = w < 1.0 - SQRT_HALF
    f = torch.where(upper_half, torch.where(near_one, -w, 1.0 - (w + w)), mantissa - 1.0)
    e = torch.where(upper_half, near_one.double() - 1.0, exponent.double() - small.double())
    s = f / (f + 2.0)
    z = s * s
    rest = e * LN2_LOW - s * (f - z * _polynomial(z, LOG))
    return _square_root((e * LN2_HIGH + (f + rest)) * -2.0)


def strict_normals_from_words(
    high: Tensor,  # int64, of 32 bits: the highest of the radius
    low: Tensor,  # the next of the radius
    angle_high: Tensor,  # the highest of the angle
    angle_low: Tensor,  # its upper 20 bits are the angle's, its lower 12 the radius'
) -> tuple[Tensor, Tensor]:  # float64
    """Two independent standard normals from four uniform words (Box and Muller, 1958).

    ``r cos(theta), r sin(theta)`` with ``r = sqrt(-2 ln u)``, ``u = (2^44 high + 2^12 low + angle_low % 2^12 + 1/2)
    2^-76`` and ``theta = 2 pi (2^20 angle_high + angle_low // 2^12 + 1/2) 2^-52``. The nearest multiple of a quarter
    turn is taken off in integers; ``x`` is the rest, at most half of one either way, in quarter turns, and exact.
    """
    radius = _radius(high, low, angle_low & 0xFFF)
    quarter = ((angle_high + (1 << 29)) >> 30) & 3
    rest = angle_high - (quarter << 30)  # from -2^29 to 2^29 - 1, once the last quarter has wrapped
    rest = torch.where(rest >= 1 << 29, rest - (1 << 32), rest)
    x = rest.double() * 2.0**-30 + ((angle_low >> 12).double() + 0.5) * 2.0**-50
    z = x * x
    sine = x * (z * _polynomial(z, SINE) + HALF_PI)
    cosine = z * _polynomial(z, COSINE) + 1.0
    odd = (quarter & 1) != 0
    first, second = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    first = torch.where(((quarter + 1) & 2) != 0, -first, first)
    second = torch.where((quarter & 2) != 0, -second, second)
    return radius * first, radius * second
