// SPDX-License-Identifier: Apache-2.0
// Steps of SGD and Adam by the noisy mean: sum, noise, grid, division, moments and parameter in one pass.
#include "noise_units.h"
#include "noisy.h"

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

  explicit Adam(const StepConstants& c)
      : sign(Real(c.sign)),
        l2(Real(c.l2)),
        rate(Real(c.rate)),
        first(Real(c.first)),
        keep(Real(c.keep)),
        keep_second(Real(c.keep_second)),
        second(Real(c.second)),
        root_scale(Real(c.root_scale)),
        eps(Real(c.eps)) {}

  template <bool kLargest>
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
      param[i] = keep * p - rate * (m / (std::sqrt(v) * root_scale + eps));
    }
  }
};

template <class Real>
void update(StepRule rule, const StepTensor& tensor, int64_t element, const Real* gradient, int64_t count,
            Real* param) {
  Real *first = static_cast<Real*>(tensor.first), *second = static_cast<Real*>(tensor.second);
  Real* largest = static_cast<Real*>(tensor.largest);
  if (rule == StepRule::kSgd) {
    const Sgd<Real> sgd(tensor.constants);
    return first ? sgd.run(gradient, count, param, first + element) : sgd.run(gradient, count, param);
  }
  const Adam<Real> adam(tensor.constants);
  if (largest) {
    adam.template run<true>(gradient, count, param, first + element, second + element, largest + element);
  } else {
    adam.template run<false>(gradient, count, param, first + element, second + element, nullptr);
  }
}

template <class Real>
void step_units(const NoiseStep& job, int64_t begin, int64_t end) {
  const MeanRule rule(job.std, job.grid, job.divisor);
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
  };
  const auto step = [&](int64_t t, int64_t element, int64_t count, const Real* normals) {
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
    if (tensor.dtype == kNative<Real>) {
      return update(job.rule, tensor, element, gradient, count, static_cast<Real*>(param));
    }
    widen_row(tensor.dtype, param, 1, count, Real(1), Real(0), widened);
    update(job.rule, tensor, element, gradient, count, widened);
    narrow_row(tensor.dtype, widened, count, param, false);
  };
  over_elements<Real>(job.stream, job.std > 0, {job.starts, job.count}, begin, end, ahead, step);
}

}  // namespace

void noise_step_units(const NoiseStep& job, int64_t begin, int64_t end) {
  job.wide ? step_units<double>(job, begin, end) : step_units<float>(job, begin, end);
}

}  // namespace wavedp::WAVEDP_ISA
