// SPDX-License-Identifier: Apache-2.0
// Rows of sequences: their sizes, and copies divided by powers of two.
#pragma once

#include <math.h>

#include <climits>
#include <type_traits>

#include "../per_sample.h"
#include "convert.h"
#include "scratch.h"

namespace wavedp::WAVEDP_ISA {
namespace {

template <class Real>
constexpr int64_t kLanes = kVectorBytes / sizeof(Real);

template <class Real>
using Lane = Vector<Real, kVectorBytes>;

// `count` entries of a row from `first` on, in the type of the arithmetic: in place, or in `buffer`.
template <class Real>
inline const Real* wide_row(const Sequences& s, int64_t record, int64_t token, int64_t first, int64_t count,
                            Real* buffer) {
  const void* row = address_of(s.x, s.dtype, record * s.stride_batch + token * s.stride_token + first);
  if (s.dtype == kNative<Real>) return static_cast<const Real*>(row);
  widen_row(s.dtype, row, 1, count, Real(1), Real(0), buffer);
  return buffer;
}

// The lanes of a vector of which `count` are there; the others are 0.
template <class Real>
inline Lane<Real> load_first(const Real* source, int64_t count) {
  Lane<Real> v{};
  std::memcpy(&v, source, count * sizeof(Real));
  return v;
}

// A row's largest absolute entry lies in [2^power, 2^(power + 1)), and its length is length * 2^power.
struct RowSize {
  static constexpr int kZero = INT_MIN, kNotFinite = INT_MAX;
  int power;
  double length;
};

// 2^power in float64, where ldexp is a call.
inline double power_of_two(int power) {
  if (power < -1022 || power > 1023) return ldexp(1.0, power);
  return bits_as<double>(static_cast<int64_t>(power + 1023) << 52);
}

// 2^power as a product of two, either of which is in range where entries times it are.
template <class Real>
struct PowerOfTwo {
  Real first, second;

  explicit PowerOfTwo(int power)
      : first(static_cast<Real>(power_of_two(power / 2))),
        second(static_cast<Real>(power_of_two(power - power / 2))) {}
};

// What joins all lanes of a vector two by two, in its first lane.
template <int kCount, class V, class Join>
inline V joined_lanes(const V& v, const Join& join) {
  if constexpr (kCount > 1) {
    constexpr int kHalf = kCount / 2;
    return joined_lanes<kHalf>(
        join(merged<kHalf, false>(v, v, Lanes<V>()), merged<kHalf, true>(v, v, Lanes<V>())), join);
  }
  return v;
}

template <class V>
inline auto lane_sum(const V& v) {
  return joined_lanes<sizeof(V) / sizeof(v[0])>(v, [](const V& a, const V& b) { return a + b; })[0];
}

template <class V>
inline auto lane_max(const V& v) {
  return joined_lanes<sizeof(V) / sizeof(v[0])>(v, [](const V& a, const V& b) { return a > b ? a : b; })[0];
}

template <class Real>
inline RowSize row_size(const Real* row, int64_t count) {
  using V = Lane<Real>;
  using Int = std::conditional_t<sizeof(Real) == 8, int64_t, int32_t>;
  using Bits = Vector<Int, kVectorBytes>;
  constexpr int64_t n = kLanes<Real>;
  // Bits of absolute values are ordered as they are, and NaN above infinity above the rest.
  constexpr Int kMagnitude = sizeof(Real) == 8 ? Int(INT64_MAX) : Int(INT32_MAX);
  V sums[4] = {};
  Bits largest[4] = {};
  int64_t c = 0;
  for (; c + 4 * n <= count; c += 4 * n) {
    for (int u = 0; u < 4; ++u) {
      const V v = load<V>(row + c + u * n);
      const Bits bits = bits_as<Bits>(v) & kMagnitude;
      largest[u] = bits > largest[u] ? bits : largest[u];
      sums[u] += v * v;
    }
  }
  for (int u = 0; c < count; c += n, ++u) {
    const V v = load_first(row + c, count - c < n ? count - c : n);
    const Bits bits = bits_as<Bits>(v) & kMagnitude;
    largest[u] = bits > largest[u] ? bits : largest[u];
    sums[u] += v * v;
  }
  for (int u = 1; u < 4; ++u) largest[0] = largest[u] > largest[0] ? largest[u] : largest[0];
  const Int bits = lane_max(largest[0]);
  const double sum = static_cast<double>(lane_sum((sums[0] + sums[1]) + (sums[2] + sums[3])));
  if (bits == 0) return {RowSize::kZero, 0.0};
  // Between these powers no square overflows, and those that vanish do not matter beside the largest.
  constexpr int kOrdinary = sizeof(Real) == 8 ? 400 : 40, kMantissa = sizeof(Real) == 8 ? 52 : 23;
  constexpr int kBias = sizeof(Real) == 8 ? 1023 : 127;
  const int exponent = static_cast<int>(bits >> kMantissa) - kBias;
  if (-kOrdinary <= exponent && exponent <= kOrdinary) {
    return {exponent, sqrt(sum) * power_of_two(-exponent)};
  }
  if (exponent > kBias) return {RowSize::kNotFinite, 0.0};
  const int power = ilogb(static_cast<double>(bits_as<Real>(bits)));
  const PowerOfTwo<double> scale(-power);
  double squares = 0;
  for (c = 0; c < count; ++c) {
    const double entry = static_cast<double>(row[c]) * scale.first * scale.second;
    squares += entry * entry;
  }
  return {power, sqrt(squares)};
}

// target = source * scale, and zeros up to a whole vector. May be in place.
template <class Real>
inline void scale_row(const Real* source, int64_t count, const PowerOfTwo<Real>& scale, Real* target) {
  using V = Lane<Real>;
  constexpr int64_t n = kLanes<Real>;
  int64_t c = 0;
  for (; c + n <= count; c += n) store(target + c, load<V>(source + c) * scale.first * scale.second);
  if (c < count) store(target + c, load_first(source + c, count - c) * scale.first * scale.second);
}

// Zeros up to a whole vector.
template <class Real>
inline void clear_row(Real* target, int64_t count) {
  std::memset(target, 0, (count + kLanes<Real> - 1) / kLanes<Real> * kVectorBytes);
}

// total += row
template <class Real>
inline void add_row(const Real* row, int64_t count, Real* total) {
  using V = Lane<Real>;
  int64_t c = 0;
  for (; c + kLanes<Real> <= count; c += kLanes<Real>)
    store(total + c, load<V>(total + c) + load<V>(row + c));
  for (; c < count; ++c) total[c] += row[c];
}

using Doubles = Lane<double>;

inline Doubles load_doubles(const double* source) { return load<Doubles>(source); }
inline Doubles load_doubles(const float* source) {
#if defined(__AVX512F__)  // GCC 12 would convert two halves, and join them
  return (Doubles)_mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(source));
#else
  if constexpr (kVectorBytes >= 32) {
    return __builtin_convertvector(load<Vector<float, kVectorBytes / 2> >(source), Doubles);
  } else {
    return Doubles{source[0], source[1]};
  }
#endif
}

// sum_k term(x_k, y_k) in float64, for terms of vectors. Inlined, so that a row with itself is read once.
template <class Real, class Term>
WAVEDP_INLINED double sum_in_double(const Real* x, const Real* y, int64_t count, const Term& term) {
  constexpr int64_t n = kLanes<double>;
  const int64_t rest = count % (4 * n), whole = count - rest;
  Doubles sums[4] = {};
  for (int64_t k = 0; k < whole; k += 4 * n) {
    for (int u = 0; u < 4; ++u) sums[u] += term(load_doubles(x + k + u * n), load_doubles(y + k + u * n));
  }
  double sum = 0;
  const Doubles lanes = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (int64_t lane = 0; lane < n; ++lane) sum += lanes[lane];
  x += whole;
  y += whole;
  for (int64_t k = 0; k < rest; ++k) {
    sum += term(Doubles{} + static_cast<double>(x[k]), Doubles{} + static_cast<double>(y[k]))[0];
  }
  return sum;
}

template <class Real>
WAVEDP_INLINED double dot_in_double(const Real* x, const Real* y, int64_t count) {
  return sum_in_double(x, y, count, [](const Doubles& a, const Doubles& b) { return a * b; });
}

}  // namespace
}  // namespace wavedp::WAVEDP_ISA
