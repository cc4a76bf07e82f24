# SPDX-License-Identifier: Apache-2.0
"""What the noise kernels share: ChaCha20 (RFC 8439), normals from its words, the noisy sum, rounding.

A lane holds one block, sixteen registers, and makes its ten numbers (eight in strict mode): one of each row of sixteen.
So the sixteen lanes of a group store and load whole rows, two sectors of 32 bytes for float32, and nothing goes from
lane to lane. ``wavedp/reference/noise.py`` says which word makes which number.

Launches switch fused multiply-adds off, and everything here is made of operations that IEEE 754 rounds: the
interpreter, the C++ library (float32 and strict) and every GPU give the same bits, so that what is verified without a
GPU is what one computes. float64 has a logarithm, a sine and a cosine of its own for that.

The sum is taken in float64. A GPU for data centres has half as many units for it as for float32, and eight operations
an element are lost beside the cipher's; one for desktops has 1/64, and waits for them.
"""

from __future__ import annotations

import triton
import triton.language as tl

NARROW = tl.constexpr(0)
WIDE = tl.constexpr(1)
STRICT = tl.constexpr(2)
COLUMNS = tl.constexpr(16)
"""Blocks of a group, and numbers of a row."""
NOISE_DOMAIN = tl.constexpr(1 << 24)
ROUNDING_DOMAIN = tl.constexpr(2 << 24)
STRICT_DOMAIN = tl.constexpr(3 << 24)
ROUNDING_ROWS = tl.constexpr(32)
"""Numbers of 16 bits in a block."""
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _quarter_round(a, b, c, d):
    a += b
    d ^= a
    d = (d << 16) | (d >> 16)
    c += d
    b ^= c
    b = (b << 12) | (b >> 20)
    a += b
    d ^= a
    d = (d << 8) | (d >> 24)
    c += d
    b ^= c
    b = (b << 7) | (b >> 25)
    return a, b, c, d


@triton.jit
def _key_word(key_ptr, K: tl.constexpr):
    return tl.load(key_ptr + tl.full((), K, tl.int64)).to(tl.uint32, bitcast=True)


@triton.jit
def chacha_block(
    key_ptr,  # [8] int32
    s12,  # [lanes] uint32, as those that follow: counter and nonce
    s13,
    s14,
    s15,
    ROUNDS: tl.constexpr,
):
    """The sixteen words of each lane's block."""
    zero = tl.full(s12.shape, 0, tl.uint32)
    s0, s1, s2, s3 = zero + 0x61707865, zero + 0x3320646E, zero + 0x79622D32, zero + 0x6B206574  # "expand 32-byte k"
    s4, s5, s6, s7 = _key_word(key_ptr, 0), _key_word(key_ptr, 1), _key_word(key_ptr, 2), _key_word(key_ptr, 3)
    s8, s9, s10, s11 = _key_word(key_ptr, 4), _key_word(key_ptr, 5), _key_word(key_ptr, 6), _key_word(key_ptr, 7)
    x0, x1, x2, x3, x4, x5, x6, x7 = s0, s1, s2, s3, zero + s4, zero + s5, zero + s6, zero + s7
    x8, x9, x10, x11, x12, x13, x14, x15 = zero + s8, zero + s9, zero + s10, zero + s11, s12, s13, s14, s15
    # Unrolled as far as the compiler then parts the additions evenly between the pipes of a multiprocessor. The loop
    # that is left keeps the rounds out of what Triton looks through for each access to memory: a fifth of the time.
    UNROLLED: tl.constexpr = 5 if ROUNDS == 20 else ROUNDS // 2
    for _ in range(ROUNDS // (2 * UNROLLED)):
        for _ in tl.static_range(UNROLLED):
            x0, x4, x8, x12 = _quarter_round(x0, x4, x8, x12)
            x1, x5, x9, x13 = _quarter_round(x1, x5, x9, x13)
            x2, x6, x10, x14 = _quarter_round(x2, x6, x10, x14)
            x3, x7, x11, x15 = _quarter_round(x3, x7, x11, x15)
            x0, x5, x10, x15 = _quarter_round(x0, x5, x10, x15)
            x1, x6, x11, x12 = _quarter_round(x1, x6, x11, x12)
            x2, x7, x8, x13 = _quarter_round(x2, x7, x8, x13)
            x3, x4, x9, x14 = _quarter_round(x3, x4, x9, x14)
    first = (x0 + s0, x1 + s1, x2 + s2, x3 + s3, x4 + s4, x5 + s5, x6 + s6, x7 + s7)
    return first + (x8 + s8, x9 + s9, x10 + s10, x11 + s11, x12 + s12, x13 + s13, x14 + s14, x15 + s15)  # noqa: RUF005


@triton.jit
def stream_block(
    key_ptr,
    blocks,  # [lanes] int64
    step,
    DOMAIN: tl.constexpr,
):
    """Each lane's block of the stream of a step and a use."""
    low, high = blocks.to(tl.uint32), (blocks >> 32).to(tl.uint32)
    zero = tl.full(low.shape, 0, tl.uint32)
    return chacha_block(key_ptr, low, high, zero + step.to(tl.uint32), zero + DOMAIN, 20)


@triton.jit
def rows_of(KIND: tl.constexpr):
    """Numbers that a block makes."""
    return 8 if KIND == STRICT else 10


@triton.jit
def lane_places(ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Where each lane's number of its first row lies among those of its program; the next row's is 16 further."""
    lanes = tl.arange(0, BLOCK)
    return lanes // COLUMNS * (ROWS * COLUMNS) + lanes % COLUMNS


@triton.jit
def within(places, begin, end):
    """``begin <= places < end`` in one comparison, for ``begin <= end``."""
    return (places - begin).to(tl.uint32, bitcast=True) < (end - begin).to(tl.uint32, bitcast=True)


@triton.jit
def noise_block(key_ptr, blocks, step, KIND: tl.constexpr):
    if KIND == STRICT:
        return stream_block(key_ptr, blocks, step, STRICT_DOMAIN)
    else:
        return stream_block(key_ptr, blocks, step, NOISE_DOMAIN)


@triton.jit
def _radius(high, low):
    """``sqrt(-2 ln u)``, ``u = (2^32 high + low + 1/2) 2^-64``, in float32: the sequence of csrc/cpu/normals.h, whose
    comments say where its constants come from."""
    w = low.to(tl.int32, bitcast=True).to(tl.float32) * 5.421010862427522e-20 + 2.710505431213761e-20
    w += (high + (low >> 31)).to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10
    bits = tl.where(w < 0.0, w + 1.0, w).to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23 << 23  # the bits of sqrt(1/2)
    g = tl.where(exponent == 0, w * -2.0, (bits - exponent).to(tl.float32, bitcast=True) * -2.0 + 2.0)
    q = g * 0.00035717288847081363 + 0.001147112692706287
    q = q * g + 0.002330334857106209
    q = q * g + 0.0051571885123848915
    q = q * g + 0.0124727888032794
    q = q * g + 0.03125715255737305
    q = q * g + 0.0833354964852333
    q = q * g + 0.24999958276748657
    return tl.sqrt_rn(q * g * g + (exponent.to(tl.float32) * -1.6525916635146132e-07 + g))


@triton.jit
def narrow_normals(high, low, angle):
    """Cosine's and sine's number of three words, in float32."""
    radius = _radius(high, low)
    quarter = (angle + 0x20000000) >> 30
    rest = angle - (quarter << 30)
    x = (rest + rest + 1).to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077393e-10
    z = x * x
    s = z * -0.004602177068591118 + 0.07968022674322128
    s = s * z - 0.6459634900093079
    s = (s * z + 1.5707963705062866) * x
    c = z * 0.0009037665440700948 - 0.02086016535758972
    c = c * z + 0.25366923213005066
    c = (c * z - 1.2337005138397217) * z + 1.0
    odd = (quarter & 1) != 0
    cosine = tl.where(odd, s, c).to(tl.uint32, bitcast=True) ^ (((quarter + 1) & 2) << 30)
    sine = tl.where(odd, c, s).to(tl.uint32, bitcast=True) ^ ((quarter & 2) << 30)
    return radius * cosine.to(tl.float32, bitcast=True), radius * sine.to(tl.float32, bitcast=True)


@triton.jit
def _wide_radius(w, upper_half):
    """``sqrt(-2 ln u)`` in float64 from ``w``, which is ``u``, or its distance from 1 in the ``upper_half``: by the
    sequence of ``wavedp/reference/normals_strict.py``, which says what its constants are."""
    bits = w.to(tl.int64, bitcast=True)
    exponent = (bits - 0x3FE6A09E667F3BCD) >> 52  # the bits of sqrt(1/2)
    mantissa = (bits - (exponent << 52)).to(tl.float64, bitcast=True)
    near_one = w < 0.2928932188134524
    f = tl.where(upper_half, tl.where(near_one, -w, 1.0 - (w + w)), mantissa - 1.0)
    e = tl.where(upper_half, tl.where(near_one, 0, -1), exponent.to(tl.int32)).to(tl.float64)
    s = f / (f + 2.0)
    z = s * s
    p = z * 0.14796105287459915 + 0.15314035898408324
    p = p * z + 0.181835648617608
    p = p * z + 0.2222219856364367
    p = p * z + 0.28571428742472477
    p = p * z + 0.3999999999941434
    p = p * z + 0.6666666666666734
    rest = e * 5.497923018708371e-14 - s * (f - z * p)
    return tl.sqrt((e * 0.6931471805598903 + (f + rest)) * -2.0)


@triton.jit
def _wide_turn(radius, x, quarter):
    """``radius`` times cosine and sine of ``x`` quarter turns, at most half of one either way, behind ``quarter``."""
    z = x * x
    sine = z * 5.634675009145192e-08 - 3.598649340096041e-06
    sine = sine * z + 0.00016044115259833104
    sine = sine * z - 0.004681754132616244
    sine = sine * z + 0.07969262624606273
    sine = sine * z - 0.645964097506245
    sine = x * (z * sine + 1.5707963267948966)
    cosine = z * -6.321892435542693e-09 + 4.710615657517368e-07
    cosine = cosine * z - 2.520203699152727e-05
    cosine = cosine * z + 0.0009192602742250314
    cosine = cosine * z - 0.020863480763315442
    cosine = cosine * z + 0.2536695079010469
    cosine = cosine * z - 1.2337005501361697
    cosine = z * cosine + 1.0
    odd = (quarter & 1) != 0
    first, second = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    first = tl.where(((quarter + 1) & 2) != 0, -first, first)
    second = tl.where((quarter & 2) != 0, -second, second)
    return radius * first, radius * second


@triton.jit
def _complement(high):
    """Whether the radius is above 1/2, and what complements its words there."""
    mask = (high.to(tl.int32, bitcast=True) >> 31).to(tl.uint32, bitcast=True)
    return mask != 0, mask


@triton.jit
def wide_normals(high, low, angle):
    """Cosine's and sine's number of three words, in float64."""
    upper_half, mask = _complement(high)
    w = (high ^ mask).to(tl.float64) * 2.3283064365386963e-10
    w += ((low ^ mask).to(tl.float64) + 0.5) * 5.421010862427522e-20
    quarter = (angle + 0x20000000) >> 30
    x = ((angle - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float64) + 0.5) * 9.313225746154785e-10
    return _wide_turn(_wide_radius(w, upper_half), x, quarter)


@triton.jit
def strict_normals(high, low, angle_high, angle_low):
    """The same of four, with 76 bits of radius and 52 of angle."""
    upper_half, mask = _complement(high)
    lowest = ((angle_low ^ mask) & 0xFFF).to(tl.float64)
    w = (low ^ mask).to(tl.float64) * 5.421010862427522e-20 + (lowest + 0.5) * 1.3234889800848443e-23
    w = (high ^ mask).to(tl.float64) * 2.3283064365386963e-10 + w
    quarter = (angle_high + 0x20000000) >> 30
    x = (angle_high - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float64) * 9.313225746154785e-10
    x += ((angle_low >> 12).to(tl.float64) + 0.5) * 8.881784197001252e-16
    return _wide_turn(_wide_radius(w, upper_half), x, quarter)


@triton.jit
def pair_of_normals(words, PAIR: tl.constexpr, KIND: tl.constexpr):
    """Numbers ``2 PAIR`` and ``2 PAIR + 1`` of each lane."""
    if KIND == NARROW:
        return narrow_normals(words[3 * PAIR], words[3 * PAIR + 1], words[3 * PAIR + 2])
    elif KIND == WIDE:
        return wide_normals(words[3 * PAIR], words[3 * PAIR + 1], words[3 * PAIR + 2])
    else:
        return strict_normals(words[4 * PAIR], words[4 * PAIR + 1], words[4 * PAIR + 2], words[4 * PAIR + 3])


@triton.jit
def nearest_integer(x):
    """float64 to the nearest integer, ties to even. It has no fractions from 2^52 on. Zeros lose their sign."""
    sign = x.to(tl.int64, bitcast=True) & -0x8000000000000000
    shift = (sign | 0x4330000000000000).to(tl.float64, bitcast=True)  # 2^52 of the sign of x
    return tl.where(tl.abs(x) < 4503599627370496.0, (x + shift) - shift, x)


@triton.jit
def noisy_sum(total, normal, std, grid, per_grid, std_per_grid, KIND: tl.constexpr, GRID: tl.constexpr):
    """The sum, float64, and its noise, on the grid."""
    normal = normal.to(tl.float64)
    if KIND == STRICT:
        return (nearest_integer(total * per_grid) + nearest_integer(std_per_grid * normal)) * grid
    elif GRID:
        return nearest_integer((total + std * normal) * per_grid) * grid
    else:
        return total + std * normal


@triton.jit
def _rounded_to_odd(x):
    """float64 to float32, with an odd last bit where that is inexact: rounding once more is as rounding ``x`` once
    (Boldo and Melquiond, 2008)."""
    nearest = x.to(tl.float32)
    back = nearest.to(tl.float64)
    bits = nearest.to(tl.int32, bitcast=True)
    toward_zero = tl.where(tl.abs(back) > tl.abs(x), bits - 1, bits)
    return tl.where((back < x) | (back > x), toward_zero | 1, bits).to(tl.float32, bitcast=True)


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """float32 to ``dtype``, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:  # which the interpreter would cut off
        bits = x.to(tl.uint32, bitcast=True)
        kept = tl.where(x == x, (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16, 0x7FC0)
        return kept.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def mean_of(x, divisor, reciprocal, dtype: tl.constexpr):
    """``x / divisor`` rounded once to ``dtype``; narrow ones take a product, whose error is far below the rounding."""
    if dtype == tl.float64:
        return x / divisor
    elif dtype == tl.float32:
        return (x * reciprocal).to(tl.float32)
    else:
        return narrowed(_rounded_to_odd(x * reciprocal), dtype)
