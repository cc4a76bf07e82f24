// SPDX-License-Identifier: Apache-2.0
// Steps of SGD and Adam by the noisy mean: sum, noise, grid, division, moments and parameter in one pass.
#include "noise_units.h"
#include "noisy.h"
#include "normals_strict.h"
#include "rounding.h"

namespace wavedp::WAVEDP_ISA {
namespace {

constexpr int64_t kMostElements = kChunkGroups * kGroupNormals;

// As torch.optim.SGD, with weight decay, momentum, dampening and Nesterov's direction.
template <class Real>
struct Sgd {
  const Real sign, l2, rate, keep_first, first, nesterov, from_first;

  explicit Sgd(const StepConstants& c)
      : sign(Real(c.sign)),
        l2(Real(c.l2)),
        rate(Real(c.rate)),
        keep_first(Real(c.keep_first)),
        first(Real(c.first)),
        nesterov(Real(c.nesterov)),
        from_first(Real(c.from_first)) {}

  void run(const Real* gradient, int64_t count, Real* param) const {
    WAVEDP_INDEPENDENT
    for (int64_t i = 0; i < count; ++i) param[i] -= rate * (sign * gradient[i] + l2 * param[i]);
  }

  void run(const Real* gradient, int64_t count, Real* param, Real* moment) const {
    WAVEDP_INDEPENDENT
    for (int64_t i = 0; i < count; ++i) {
      const Real g = sign * gradient[i] + l2 * param[i];
      const Real m = keep_first * moment[i] + first * g;
      moment[i] = m;
      param[i] -= rate * (nesterov * g + from_first * m);
    }
  }
};

// As torch.optim.Adam and AdamW (Kingma and Ba, arXiv 1412.6980; Loshchilov and Hutter, arXiv 1711.05101),
// with the largest second moment in place of the last where it is kept (Reddi et al., arXiv 1904.09237).
template <class Real>
struct Adam {
  const Real sign, l2, rate, first, keep, keep_second, second, root_scale, eps;
  const Real square_scale, noise_square, least_square;

  explicit Adam(const StepConstants& c)
      : sign(Real(c.sign)),
        l2(Real(c.l2)),
        rate(Real(c.rate)),
        first(Real(c.first)),
        keep(Real(c.keep)),
        keep_second(Real(c.keep_second)),
        second(Real(c.second)),
        root_scale(Real(c.root_scale)),
        eps(Real(c.eps)),
        square_scale(Real(c.root_scale * c.root_scale)),
        noise_square(Real(c.noise_square)),
        least_square(Real(c.least_square)) {}

  // sqrt of the bias-corrected second moment, or of what is left of it without the noise's part.
  template <bool kCorrected>
  Real root(Real v) const {
    if constexpr (!kCorrected) return std::sqrt(v) * root_scale;
    const Real signal = v * square_scale - noise_square;
    return std::sqrt(signal < least_square ? least_square : signal);
  }

  template <bool kCorrected, bool kLargest>
  void run(const Real* gradient, int64_t count, Real* param, Real* moment, Real* square,
           Real* largest) const {
    WAVEDP_INDEPENDENT
    for (int64_t i = 0; i < count; ++i) {
      const Real p = param[i], g = sign * gradient[i] + l2 * p;
      const Real m = moment[i] + (g - moment[i]) * first;
      Real v = keep_second * square[i] + second * (g * g);
      moment[i] = m;
      square[i] = v;
      if constexpr (kLargest) {
        v = v > largest[i] ? v : largest[i];
        largest[i] = v;
      }
      param[i] = keep * p - rate * (m / (root<kCorrected>(v) + eps));
    }
  }
};

template <class Real, bool kCorrected>
void update_adam(const StepTensor& tensor, int64_t element, const Real* gradient, int64_t count,
                 Real* param) {
  Real *first = static_cast<Real*>(tensor.first), *second = static_cast<Real*>(tensor.second);
  Real* largest = static_cast<Real*>(tensor.largest);
  const Adam<Real> adam(tensor.constants);
  if (largest) {
    adam.template run<kCorrected, true>(gradient, count, param, first + element, second + element,
                                        largest + element);
  } else {
    adam.template run<kCorrected, false>(gradient, count, param, first + element, second + element, nullptr);
  }
}

template <class Real>
void update(StepRule rule, const StepTensor& tensor, int64_t element, const Real* gradient, int64_t count,
            Real* param) {
  if (rule == StepRule::kSgd) {
    const Sgd<Real> sgd(tensor.constants);
    Real* first = static_cast<Real*>(tensor.first);
    return first ? sgd.run(gradient, count, param, first + element) : sgd.run(gradient, count, param);
  }
  tensor.constants.least_square > 0 ? update_adam<Real, true>(tensor, element, gradient, count, param)
                                    : update_adam<Real, false>(tensor, element, gradient, count, param);
}

template <class Real>
void follow(const Real* param, Real weight, int64_t count, Real* average) {
  WAVEDP_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) average[i] += weight * (param[i] - average[i]);
}

// Real is what parameters and moments are computed in.
template <class Real, class Source, class Rule>
void step_units(const NoiseStep& job, int64_t begin, int64_t end) {
  const Rule rule(job.std, job.grid, job.divisor);
  RoundingBits bits(job.stream);
  alignas(kLineBytes) Real gradient[kMostElements], widened[kMostElements];
  const auto ahead = [&](int64_t t, int64_t element, int64_t count) {
    const StepTensor& tensor = job.tensors[t];
    const auto fetch = [=](const void* base, DType dtype) {
      if (base) prefetch(address_of(base, dtype, element), count * size_of(dtype));
    };
    fetch(tensor.param, tensor.dtype);
    fetch(tensor.total, tensor.total_dtype);
    fetch(tensor.first, kNative<Real>);
    fetch(tensor.second, kNative<Real>);
    fetch(tensor.largest, kNative<Real>);
    fetch(tensor.average, kNative<Real>);
    fetch(tensor.master, DType::kFloat32);
  };
  const auto step = [&](int64_t t, int64_t element, int64_t count, const typename Source::Real* normals) {
    const StepTensor& tensor = job.tensors[t];
    if ((tensor.dtype == DType::kFloat64) != job.wide) return;
    if (tensor.total_dtype == DType::kFloat64) {
      const double* total = static_cast<const double*>(tensor.total);
      mean_of(rule, total ? total + element : nullptr, normals, count, gradient);
    } else {
      const float* total = static_cast<const float*>(tensor.total);
      mean_of(rule, total ? total + element : nullptr, normals, count, gradient);
    }
    void* param = address_of(tensor.param, tensor.dtype, element);
    const bool native = tensor.dtype == kNative<Real>;
    Real* values = native ? static_cast<Real*>(param) : widened;
    if constexpr (sizeof(Real) == 4) {
      if (tensor.master) values = tensor.master + element;
    }
    if (values == widened) widen_row(tensor.dtype, param, 1, count, Real(1), Real(0), widened);
    update(job.rule, tensor, element, gradient, count, values);
    if (tensor.average) {
      const Real weight = Real(tensor.constants.average_weight);
      follow(values, weight, count, static_cast<Real*>(tensor.average) + element);
    }
    if (native) return;
    if constexpr (sizeof(Real) == 4) {
      if (tensor.stochastic) {
        uint16_t* target = static_cast<uint16_t*>(param);
        return bits.each(job.stream.offset + job.starts[t] + element, count,
                         [&](int64_t from, const uint16_t* random, int64_t here) {
                           round_at_random(values + from, random, here, target + from);
                         });
      }
    }
    narrow_row(tensor.dtype, values, count, param, false);
  };
  over_elements<Source>(job.stream, job.std > 0, {job.starts, job.count}, begin, end, ahead, step);
}

}  // namespace

void noise_step_units(const NoiseStep& job, int64_t begin, int64_t end) {
  if (job.strict) {
    job.wide ? step_units<double, StrictNormals, StrictRule>(job, begin, end)
             : step_units<float, StrictNormals, StrictRule>(job, begin, end);
  } else {
    job.wide ? step_units<double, Normals<double>, MeanRule>(job, begin, end)
             : step_units<float, Normals<float>, MeanRule>(job, begin, end);
  }
}

}  // namespace wavedp::WAVEDP_ISA
