// SPDX-License-Identifier: Apache-2.0
// Two normals from three or four words (Box and Muller, 1958): the operations of wavedp/reference and of
// csrc/cpu/normals.h in their order, each rounded by itself. So nothing may be joined to a fused
// multiply-add, and float32 normals and strict ones have the same bits on every device.
#pragma once

#include <type_traits>

#include "noise_words.h"

namespace wavedp {
namespace {

// Numbers that a block makes, one of each row of a group; and the words of two of them.
template <NormalKind kKind>
constexpr int kRows = kKind == NormalKind::kStrict ? kStrictBlockNormals : kBlockNormals;
template <NormalKind kKind>
constexpr int kWordsOfPair = kKind == NormalKind::kStrict ? 4 : 3;
template <NormalKind kKind>
constexpr uint32_t kDomain = kKind == NormalKind::kStrict ? kStrictDomain : kNoiseDomain;

// sqrt(-2 ln u), u = (2^32 high + low + 1/2) 2^-64; csrc/cpu/normals.h says where the constants come from.
WAVEDP_DEVICE inline float narrow_radius(uint32_t high, uint32_t low) {
  const float upper = static_cast<float>(static_cast<int32_t>(high + (low >> 31)));
  const float w = upper * 0x1p-32f + (static_cast<float>(static_cast<int32_t>(low)) * 0x1p-64f + 0x1p-65f);
  const uint32_t bits = bits_as<uint32_t>(w < 0.0f ? w + 1.0f : w);
  const uint32_t exponent = (bits - 0x3f3504f3u) & 0xff800000u;  // the bits of sqrt(1/2)
  const float g = exponent == 0 ? w * -2.0f : bits_as<float>(bits - exponent) * -2.0f + 2.0f;
  const float e = static_cast<float>(static_cast<int32_t>(exponent));  // times 2^23
  float q = g * 0x1.7685dep-12f + 0x1.2cb56ep-10f;
  q = q * g + 0x1.317110p-9f;
  q = q * g + 0x1.51fb44p-8f;
  q = q * g + 0x1.98b556p-7f;
  q = q * g + 0x1.000f00p-5f;
  q = q * g + 0x1.55579ap-4f;
  q = q * g + 0x1.ffffc8p-3f;
  return std::sqrt(q * g * g + (e * -0x1.62e430p-23f + g));
}

// radius * (cos theta, sin theta), theta = 2 pi (angle + 1/2) 2^-32, from the nearest quarter turn.
WAVEDP_DEVICE inline void narrow_turn(float radius, uint32_t angle, float (&normals)[2]) {
  const uint32_t quarter = (angle + 0x20000000u) >> 30, rest = angle - (quarter << 30);
  const float x = static_cast<float>(static_cast<int32_t>(rest + rest + 1u)) * 0x1p-31f, z = x * x;
  float s = z * -0x1.2d9bb8p-8f + 0x1.465ec6p-4f;
  s = s * z - 0x1.4abbbap-1f;
  s = (s * z + 0x1.921fb6p+0f) * x;
  float c = z * 0x1.d9d57ep-11f - 0x1.55c5e0p-6f;
  c = c * z + 0x1.03c1dep-2f;
  c = (c * z - 0x1.3bd3ccp+0f) * z + 1.0f;
  const bool odd = quarter & 1u;
  const uint32_t cosine = bits_as<uint32_t>(odd ? s : c) ^ ((quarter + 1u) & 2u) << 30;
  const uint32_t sine = bits_as<uint32_t>(odd ? c : s) ^ (quarter & 2u) << 30;
  normals[0] = radius * bits_as<float>(cosine);
  normals[1] = radius * bits_as<float>(sine);
}

// ln 2 in two parts, and the polynomials of wavedp/reference/normals_strict.py, highest coefficient first.
WAVEDP_CONSTANT double kLn2[2] = {0x1.62e42fefa3800p-1, 0x1.ef35793c76730p-45};
WAVEDP_CONSTANT double kLog[7] = {0x1.2f0634596ccf8p-3, 0x1.39a1a70c4652ap-3, 0x1.74663fa07a01fp-3,
                                  0x1.c71c520615de0p-3, 0x1.24924941f4e05p-2, 0x1.999999997fd7ap-2,
                                  0x1.5555555555592p-1};
WAVEDP_CONSTANT double kSine[7] = {0x1.e403d056e4915p-25, -0x1.e300a6598bfb7p-19, 0x1.5078301b61792p-13,
                                   -0x1.32d2cce3332ccp-8, 0x1.466bc67758d85p-4,   -0x1.4abbce625be47p-1,
                                   0x1.921fb54442d18p+0};
WAVEDP_CONSTANT double kCosine[8] = {
    -0x1.b26fe86abf9f6p-28, 0x1.f9cc6acff3cc6p-22, -0x1.a6d1ecb740509p-16, 0x1.e1f50683b42d0p-11,
    -0x1.55d3c7e3c95bcp-6,  0x1.03c1f081b5ab0p-2,  -0x1.3bd3cc9be45dep+0,  1.0};

// sqrt(-2 ln u) in float64 (wavedp/reference/normals_strict.py), where w is u, or its distance from 1 in the
// upper half.
WAVEDP_DEVICE inline double strict_radius(double w, bool upper_half) {
  constexpr double kSqrtHalf = 0x1.6a09e667f3bcdp-1;
  const uint64_t bits = bits_as<uint64_t>(w);  // w is never below 2^-77, and so never subnormal
  const double mantissa = bits_as<double>((bits & 0xfffffffffffffu) | 0x3fe0000000000000u);  // [1/2, 1)
  const bool small = mantissa < kSqrtHalf, near_one = w < 1.0 - kSqrtHalf;
  const double lower = (small ? mantissa + mantissa : mantissa) - 1.0;
  const double upper = near_one ? -w : 1.0 - (w + w);
  const double f = upper_half ? upper : lower;
  const int exponent = static_cast<int>(bits >> 52) - 1022 - (small ? 1 : 0);
  const double e = static_cast<double>(upper_half ? (near_one ? 0 : -1) : exponent);
  const double s = f / (f + 2.0), z = s * s;
  double q = z * kLog[0] + kLog[1];
#pragma unroll
  for (int k = 2; k < 7; ++k) q = q * z + kLog[k];
  const double rest = e * kLn2[1] - s * (f - z * q);
  return std::sqrt((e * kLn2[0] + (f + rest)) * -2.0);
}

// x is the rest behind `quarter` quarter turns, at most half of one either way.
WAVEDP_DEVICE inline void strict_turn(double radius, uint32_t quarter, double x, double (&normals)[2]) {
  const double z = x * x;
  double s = z * kSine[0] + kSine[1], c = z * kCosine[0] + kCosine[1];
#pragma unroll
  for (int k = 2; k < 7; ++k) s = s * z + kSine[k];
#pragma unroll
  for (int k = 2; k < 8; ++k) c = c * z + kCosine[k];
  s *= x;
  const bool odd = quarter & 1u;
  const uint64_t cosine = bits_as<uint64_t>(odd ? s : c) ^ static_cast<uint64_t>((quarter + 1u) & 2u) << 62;
  const uint64_t sine = bits_as<uint64_t>(odd ? c : s) ^ static_cast<uint64_t>(quarter & 2u) << 62;
  normals[0] = radius * bits_as<double>(cosine);
  normals[1] = radius * bits_as<double>(sine);
}

// Three words with a radius of 64 bits and an angle of 32, in float64: as the definition but for its
// logarithm, sine and cosine, which are those of strict noise.
WAVEDP_DEVICE inline void wide_normals(uint32_t high, uint32_t low, uint32_t angle, double (&normals)[2]) {
  const uint32_t mask = high >> 31 ? 0xffffffffu : 0u;
  const double w =
      static_cast<double>(high ^ mask) * 0x1p-32 + (static_cast<double>(low ^ mask) + 0.5) * 0x1p-64;
  const uint32_t quarter = (angle + 0x20000000u) >> 30;
  const double x = (static_cast<double>(static_cast<int32_t>(angle - (quarter << 30))) + 0.5) * 0x1p-30;
  strict_turn(strict_radius(w, high >> 31), quarter, x, normals);
}

// Four words with a radius of 76 bits and an angle of 52.
WAVEDP_DEVICE inline void strict_normals(uint32_t high, uint32_t low, uint32_t angle, uint32_t last,
                                         double (&normals)[2]) {
  const uint32_t mask = high >> 31 ? 0xffffffffu : 0u;
  const double lowest = static_cast<double>((last ^ mask) & 0xfffu) + 0.5;
  const double w = static_cast<double>(high ^ mask) * 0x1p-32 +
                   (static_cast<double>(low ^ mask) * 0x1p-64 + lowest * 0x1p-76);
  const uint32_t quarter = (angle + 0x20000000u) >> 30;
  const double rest = static_cast<double>(static_cast<int32_t>(angle - (quarter << 30)));
  const double x = rest * 0x1p-30 + (static_cast<double>(last >> 12) + 0.5) * 0x1p-50;
  strict_turn(strict_radius(w, high >> 31), quarter, x, normals);
}

template <NormalKind kKind>
using NormalOf = std::conditional_t<kKind == NormalKind::kNarrow, float, double>;

// Numbers 2 pair and 2 pair + 1 of a block.
template <NormalKind kKind>
WAVEDP_DEVICE inline void normal_pair(const uint32_t (&x)[kBlockWords], int pair,
                                      NormalOf<kKind> (&normals)[2]) {
  const int first = kWordsOfPair<kKind> * pair;
  if constexpr (kKind == NormalKind::kNarrow) {
    narrow_turn(narrow_radius(x[first], x[first + 1]), x[first + 2], normals);
  } else if constexpr (kKind == NormalKind::kWide) {
    wide_normals(x[first], x[first + 1], x[first + 2], normals);
  } else {
    strict_normals(x[first], x[first + 1], x[first + 2], x[first + 3], normals);
  }
}

}  // namespace
}  // namespace wavedp
