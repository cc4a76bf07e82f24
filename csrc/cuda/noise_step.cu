// SPDX-License-Identifier: Apache-2.0
// The launch of a step over all tensors of one precision.
#include "noise_step.h"
#include "number.cuh"

namespace wavedp {
namespace {

// Blocks that the registers of a multiprocessor should hold at once: as many as leave the compiler no reason
// to spill.
template <NormalKind kKind, StepForm kForm>
constexpr int kResident = kForm == StepForm::kAny || kForm == StepForm::kAnyAtRandom     ? 4
                          : kKind == NormalKind::kStrict || kForm == StepForm::kBFloat16 ? 5
                                                                                         : 6;

template <NormalKind kKind, StepRule kRule, StepForm kForm, class Real>
__global__ void __launch_bounds__(kThreads, (kResident<kKind, kForm>))
    noise_step_kernel(const __grid_constant__ StepGrid grid) {
  step_thread<kKind, kRule, kForm, Real>(grid, int64_t(blockIdx.x) * kThreads + threadIdx.x);
}

template <NormalKind kKind, StepRule kRule, class Real>
void (*kernel_of(StepForm form))(StepGrid) {
  if constexpr (sizeof(Real) == 4) {
    if (form == StepForm::kFloat32) return noise_step_kernel<kKind, kRule, StepForm::kFloat32, Real>;
    if (form == StepForm::kBFloat16) return noise_step_kernel<kKind, kRule, StepForm::kBFloat16, Real>;
    if (form == StepForm::kAnyAtRandom) return noise_step_kernel<kKind, kRule, StepForm::kAnyAtRandom, Real>;
  }
  return noise_step_kernel<kKind, kRule, StepForm::kAny, Real>;
}

template <NormalKind kKind, class Real>
int launch_step(const NoiseStep& job, const StepGrid& grid, int form, void* stream) {
  const StepForm of = static_cast<StepForm>(form % kMomentum);
  const auto kernel = job.rule == StepRule::kSgd ? kernel_of<kKind, StepRule::kSgd, Real>(of)
                                                 : kernel_of<kKind, StepRule::kAdam, Real>(of);
  const int64_t threads = (grid.groups + grid.run - 1) / grid.run * kGroupBlocks;
  return launch(kernel, (threads + kThreads - 1) / kThreads, 0, stream, grid);
}

}  // namespace

int64_t noise_step_table_bytes(bool wide, int64_t tensors) {
  return rows_offset(tensors) + tensors * (wide ? sizeof(StepRow<double>) : sizeof(StepRow<float>));
}

int noise_step_table(const NoiseStep& job, void* table) {
  job.wide ? fill_table<double>(job, static_cast<char*>(table))
           : fill_table<float>(job, static_cast<char*>(table));
  return form_of(job);
}

int noise_step_cuda(const NoiseStep& job, const void* table, int64_t elements, int form, void* stream) {
  if (elements == 0) return cudaSuccess;
  const StepGrid grid = step_grid(job, table, elements, form);
  if (job.strict) {
    return job.wide ? launch_step<NormalKind::kStrict, double>(job, grid, form, stream)
                    : launch_step<NormalKind::kStrict, float>(job, grid, form, stream);
  }
  return job.wide ? launch_step<NormalKind::kWide, double>(job, grid, form, stream)
                  : launch_step<NormalKind::kNarrow, float>(job, grid, form, stream);
}

}  // namespace wavedp
