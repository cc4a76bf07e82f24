// SPDX-License-Identifier: Apache-2.0
// The noisy sum, its rounding to a stored type, and the rules of the optimizers: wavedp/reference/noise.py
// and noise_step.py, one number at a time, in the order of csrc/cpu.
#pragma once

#include "noise_normals.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include "../cpu/convert.h"
#endif

namespace wavedp {
namespace {

// The two types of 16 bits, by their bits.
WAVEDP_DEVICE inline float widened(DType dtype, uint16_t bits) {
#ifdef __CUDACC__
  if (dtype == DType::kFloat16) return __half2float(__ushort_as_half(bits));
#else
  if (dtype == DType::kFloat16) return WAVEDP_ISA::OneByOne<WAVEDP_ISA::Float16>()(bits);
#endif
  return bits_as<float>(static_cast<uint32_t>(bits) << 16);
}

WAVEDP_DEVICE inline uint16_t narrowed(DType dtype, float x) {
#ifdef __CUDACC__
  if (dtype == DType::kFloat16) return __half_as_ushort(__float2half_rn(x));
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  if (dtype == DType::kFloat16) return WAVEDP_ISA::OneByOne<WAVEDP_ISA::Float16>()(x);
  return WAVEDP_ISA::OneByOne<WAVEDP_ISA::BFloat16>()(x);
#endif
}

// To bfloat16 by the random bits below those that are kept. What is not finite is rounded to nearest.
WAVEDP_DEVICE inline uint16_t rounded_at_random(float x, uint32_t random) {
  const uint32_t bits = bits_as<uint32_t>(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return narrowed(DType::kBFloat16, x);
  return static_cast<uint16_t>((bits + random) >> 16);
}

// With an odd last bit where it is inexact, so that rounding it once more is as rounding `x` once (Boldo and
// Melquiond, 2008).
WAVEDP_DEVICE inline float rounded_to_odd(double x) {
  const float nearest = static_cast<float>(x);
  const uint32_t bits = bits_as<uint32_t>(nearest);
  const double back = nearest;
  const uint32_t toward_zero = std::fabs(back) > std::fabs(x) ? bits - 1 : bits;
  return bits_as<float>(back < x || back > x ? toward_zero | 1u : bits);
}

// A quotient by a power of two is as exact as a product.
struct MeanRule {
  double std, grid, per_grid, deviation, divisor, reciprocal;

  MeanRule() = default;
  MeanRule(double std_of_sum, double step, double denominator)
      : std(std_of_sum),
        grid(step),
        per_grid(step > 0 ? 1 / step : 0),
        deviation(std_of_sum * per_grid),
        divisor(denominator),
        reciprocal(1 / denominator) {}
};

template <NormalKind kKind>
WAVEDP_DEVICE inline double noisy_sum(const MeanRule& rule, double total, double normal) {
  if (!(rule.std > 0)) return total;
  if constexpr (kKind == NormalKind::kStrict) {
    return (std::rint(total * rule.per_grid) + std::rint(rule.deviation * normal)) * rule.grid;
  } else {
    const double x = total + rule.std * normal;
    return rule.grid > 0 ? std::rint(x * rule.per_grid) * rule.grid : x;
  }
}

WAVEDP_DEVICE inline void divide(const MeanRule& rule, double sum, double& mean) {
  mean = sum / rule.divisor;
}
// The reciprocal's error is far below the rounding.
WAVEDP_DEVICE inline void divide(const MeanRule& rule, double sum, float& mean) {
  mean = static_cast<float>(sum * rule.reciprocal);
}

// StepConstants as they are multiplied by.
template <class Real>
struct RuleConstants {
  Real sign, l2, rate, keep_first, first, nesterov, from_first, keep, keep_second, second, root_scale, eps,
      square_scale, noise_square, least_square, average_weight;

  RuleConstants() = default;
  explicit RuleConstants(const StepConstants& c)
      : sign(Real(c.sign)),
        l2(Real(c.l2)),
        rate(Real(c.rate)),
        keep_first(Real(c.keep_first)),
        first(Real(c.first)),
        nesterov(Real(c.nesterov)),
        from_first(Real(c.from_first)),
        keep(Real(c.keep)),
        keep_second(Real(c.keep_second)),
        second(Real(c.second)),
        root_scale(Real(c.root_scale)),
        eps(Real(c.eps)),
        square_scale(Real(c.root_scale * c.root_scale)),
        noise_square(Real(c.noise_square)),
        least_square(Real(c.least_square)),
        average_weight(Real(c.average_weight)) {}
};

// As torch.optim.SGD, with a moment where there is momentum; the new parameter.
template <class Real>
WAVEDP_DEVICE inline Real sgd(const RuleConstants<Real>& c, Real param, Real mean, bool momentum,
                              Real& moment) {
  const Real g = c.sign * mean + c.l2 * param;
  if (!momentum) return param - c.rate * g;
  moment = c.keep_first * moment + c.first * g;
  return param - c.rate * (c.nesterov * g + c.from_first * moment);
}

// As torch.optim.Adam and AdamW (Kingma and Ba, arXiv 1412.6980; Loshchilov and Hutter, arXiv 1711.05101).
// The largest second moment in place of the last where it is kept (Reddi et al., arXiv 1904.09237), and
// without the noise's part where there is a floor (Tang et al., arXiv 2312.14334).
template <class Real>
WAVEDP_DEVICE inline Real adam(const RuleConstants<Real>& c, Real param, Real mean, Real& moment,
                               Real& square, bool amsgrad, Real& largest) {
  const Real g = c.sign * mean + c.l2 * param;
  moment = moment + (g - moment) * c.first;
  square = c.keep_second * square + c.second * (g * g);
  Real v = square, root;
  if (amsgrad) largest = v = v > largest ? v : largest;
  if (c.least_square > 0) {
    const Real signal = v * c.square_scale - c.noise_square;
    root = std::sqrt(signal < c.least_square ? c.least_square : signal);
  } else {
    root = std::sqrt(v) * c.root_scale;
  }
  return c.keep * param - c.rate * (moment / (root + c.eps));
}

}  // namespace
}  // namespace wavedp
