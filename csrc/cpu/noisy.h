// SPDX-License-Identifier: Apache-2.0
// The noisy mean of a stretch of elements, in float64, and its one rounding to a narrower type.
#pragma once

#include "normals.h"

// What the compiler cannot know of a loop: that no turn of it reads what another one writes.
#if defined(__clang__)
#define WAVEDP_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define WAVEDP_INDEPENDENT _Pragma("GCC ivdep")
#else
#define WAVEDP_INDEPENDENT
#endif

namespace wavedp::WAVEDP_ISA {
namespace {

// To the nearest integer, ties to even: float64 has no fractions from 2^52 on.
inline double nearest_integer(double x) {
#if defined(__AVX2__)
  return __builtin_rint(x);
#else
  const double magnitude = std::fabs(x), rounded = (magnitude + 0x1p52) - 0x1p52;
  return magnitude < 0x1p52 ? std::copysign(rounded, x) : x;
#endif
}

// With an odd last bit where it is inexact, so that rounding it once more is as rounding `x` once (Boldo and
// Melquiond, 2008).
inline float rounded_to_odd(double x) {
  const float nearest = static_cast<float>(x);
  const uint32_t bits = bits_as<uint32_t>(nearest);
  const double back = nearest;
  const uint32_t toward_zero = std::fabs(back) > std::fabs(x) ? bits - 1 : bits;
  return bits_as<float>(back < x || back > x ? toward_zero | 1u : bits);
}

// How the mean becomes the result. float64 is divided; a narrower type takes a product with the reciprocal,
// whose error in float64 is far below the rounding that follows, at a fraction of the time.
// `x` counts units: steps of the grid, or 1. `factor` is the unit's share of the divisor.
struct Divided {
  static double apply(double x, double unit, double divisor, double) { return x * unit / divisor; }
};
struct Plain {
  static float apply(double x, double, double, double factor) { return static_cast<float>(x * factor); }
};
struct Odd {
  static float apply(double x, double, double, double factor) { return rounded_to_odd(x * factor); }
};

struct MeanRule {
  double std, grid, divisor;

  MeanRule(double deviation, double step, double denominator)
      : std(deviation), grid(step), divisor(denominator) {}
};

// a b + c where the product is exact.
inline double exact_product_and(double a, double b, double c) {
#if defined(__FMA__) || defined(__AVX512F__)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// The grid is a power of two, so that sums of multiples of 1 / grid are rounded as those of the multiplied.
template <bool kTotal, bool kNoise, bool kGrid, class Finish, class Total, class Normal, class Out>
inline void mean_loop(const MeanRule& rule, const Total* total, const Normal* normals, int64_t count,
                      Out* out) {
  const double unit = kGrid ? rule.grid : 1.0, per_unit = 1.0 / unit, std = rule.std * per_unit;
  const double divisor = rule.divisor, factor = unit * (1.0 / divisor);
  WAVEDP_INDEPENDENT  // `out` may be `total`
      for (int64_t i = 0; i < count; ++i) {
    double x = kTotal ? double(total[i]) : 0.0;
    if constexpr (kNoise) x = exact_product_and(x, per_unit, std * double(normals[i]));
    if constexpr (kGrid) x = nearest_integer(x);
    out[i] = Finish::apply(x, unit, divisor, factor);
  }
}

// With or without a total, noise and a grid.
template <class Finish, class Total, class Normal, class Out>
inline void mean_of(const MeanRule& rule, const Total* total, const Normal* normals, int64_t count,
                    Out* out) {
  const bool noise = rule.std > 0, grid = noise && rule.grid > 0;
  if (!total) {
    if (!noise) return mean_loop<false, false, false, Finish>(rule, total, normals, count, out);
    if (!grid) return mean_loop<false, true, false, Finish>(rule, total, normals, count, out);
    return mean_loop<false, true, true, Finish>(rule, total, normals, count, out);
  }
  if (!noise) return mean_loop<true, false, false, Finish>(rule, total, normals, count, out);
  if (!grid) return mean_loop<true, true, false, Finish>(rule, total, normals, count, out);
  return mean_loop<true, true, true, Finish>(rule, total, normals, count, out);
}

// Strict noise: sum and noise are rounded by themselves, and added as integers.
struct StrictRule : MeanRule {
  using MeanRule::MeanRule;
};

template <bool kTotal, class Finish, class Total, class Out>
inline void strict_loop(const StrictRule& rule, const Total* total, const double* normals, int64_t count,
                        Out* out) {
  const double grid = rule.grid, per_grid = 1.0 / grid, deviation = rule.std * per_grid;
  const double divisor = rule.divisor, factor = grid * (1.0 / divisor);
  WAVEDP_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    const double sum = kTotal ? nearest_integer(double(total[i]) * per_grid) : 0.0;
    out[i] = Finish::apply(sum + nearest_integer(deviation * normals[i]), grid, divisor, factor);
  }
}

template <class Finish, class Total, class Out>
inline void mean_of(const StrictRule& rule, const Total* total, const double* normals, int64_t count,
                    Out* out) {
  if (rule.std == 0) return mean_of<Finish>(static_cast<const MeanRule&>(rule), total, normals, count, out);
  total ? strict_loop<true, Finish>(rule, total, normals, count, out)
        : strict_loop<false, Finish>(rule, total, normals, count, out);
}

template <class Rule, class Total, class Normal>
inline void mean_of(const Rule& rule, const Total* total, const Normal* normals, int64_t count, double* out) {
  mean_of<Divided>(rule, total, normals, count, out);
}

template <class Rule, class Total, class Normal>
inline void mean_of(const Rule& rule, const Total* total, const Normal* normals, int64_t count, float* out) {
  mean_of<Plain>(rule, total, normals, count, out);
}

}  // namespace
}  // namespace wavedp::WAVEDP_ISA
