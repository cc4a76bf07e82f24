// SPDX-License-Identifier: Apache-2.0
// The threads of the CUDA kernels of the noise, one after the other on the CPU. For test_noise_cuda.py, which
// compiles it; no part of the package.
#include "../../csrc/cuda/noise_mean.h"
#include "../../csrc/cuda/noise_step.h"

#include <vector>

using namespace wavedp;

template <NormalKind kKind>
static auto thread_of(const NoisyMean& job) {
  return is_single(job) ? mean_thread<kKind, true> : mean_thread<kKind, false>;
}

extern "C" {

void chacha20_words(const unsigned char* key, uint64_t counter, const uint32_t* nonce, int nonce_words,
                    int rounds, uint32_t* words, int64_t count) {
  ChachaWords job{key, counter, {}, nonce_words, rounds, words, count};
  std::memcpy(job.nonce, nonce, nonce_words * sizeof *nonce);
  for (int64_t thread = 0; thread * kBlockWords < count; ++thread) words_thread(job, thread);
}

// Of `count` quadruples of words; of the first three where the kind takes no more.
void normals(int kind, const uint32_t* words, int64_t count, double* pairs) {
  for (int64_t n = 0; n < count; ++n, words += 4, pairs += 2) {
    float narrow[2];
    double wide[2];
    uint32_t x[kBlockWords] = {words[0], words[1], words[2], words[3]};
    if (kind == static_cast<int>(NormalKind::kNarrow)) {
      normal_pair<NormalKind::kNarrow>(x, 0, narrow);
      wide[0] = narrow[0], wide[1] = narrow[1];
    } else if (kind == static_cast<int>(NormalKind::kWide)) {
      normal_pair<NormalKind::kWide>(x, 0, wide);
    } else {
      normal_pair<NormalKind::kStrict>(x, 0, wide);
    }
    pairs[0] = wide[0], pairs[1] = wide[1];
  }
}

void noisy_mean(const unsigned char* key, uint32_t step, uint64_t offset, const void* total, int total_dtype,
                void* out, int out_dtype, int kind, double std, double grid, double divisor, int64_t count) {
  NoisyMean job{{key, step, offset},
                total,
                static_cast<DType>(total_dtype),
                out,
                static_cast<DType>(out_dtype),
                static_cast<NormalKind>(kind),
                std,
                grid,
                divisor,
                count};
  const MeanGrid launch(job);
  const auto run = job.kind == NormalKind::kNarrow ? thread_of<NormalKind::kNarrow>(job)
                   : job.kind == NormalKind::kWide ? thread_of<NormalKind::kWide>(job)
                                                   : thread_of<NormalKind::kStrict>(job);
  for (int64_t thread = 0; thread < launch.groups * kGroupBlocks; ++thread) run(launch, thread);
}
}

namespace {

template <NormalKind kKind, StepRule kRule, StepForm kForm, class Real>
void run(const StepGrid& grid) {
  const int64_t threads = (grid.groups + grid.run - 1) / grid.run * kGroupBlocks;
  for (int64_t thread = 0; thread < threads; ++thread) step_thread<kKind, kRule, kForm, Real>(grid, thread);
}

template <NormalKind kKind, StepRule kRule, class Real>
void run(const StepGrid& grid, StepForm form) {
  if constexpr (sizeof(Real) == 4) {
    if (form == StepForm::kFloat32) return run<kKind, kRule, StepForm::kFloat32, Real>(grid);
    if (form == StepForm::kBFloat16) return run<kKind, kRule, StepForm::kBFloat16, Real>(grid);
    if (form == StepForm::kAnyAtRandom) return run<kKind, kRule, StepForm::kAnyAtRandom, Real>(grid);
  }
  run<kKind, kRule, StepForm::kAny, Real>(grid);
}

template <NormalKind kKind, class Real>
void run(StepRule rule, const StepGrid& grid, StepForm form) {
  rule == StepRule::kSgd ? run<kKind, StepRule::kSgd, Real>(grid, form)
                         : run<kKind, StepRule::kAdam, Real>(grid, form);
}

}  // namespace

// As the binding: of every tensor seven addresses, its size, two types and whether it is rounded at random,
// and its constants. `run_of` is how many groups a thread takes, or 0 for the launcher's choice.
extern "C" int noise_step(const unsigned char* key, uint32_t step, uint64_t offset, int rule, int wide,
                          int strict, double std, double grid, double divisor, int64_t count,
                          void* const* addresses, const int64_t* sizes, const int* kinds,
                          const double* constants, int run_of) {
  std::vector<StepTensor> tensors(count);
  std::vector<int64_t> starts(count + 1, 0);
  for (int64_t t = 0; t < count; ++t, addresses += 7, kinds += 3, constants += kStepConstants) {
    starts[t + 1] = starts[t] + sizes[t];
    tensors[t] = {addresses[0],
                  static_cast<DType>(kinds[0]),
                  addresses[1],
                  static_cast<DType>(kinds[1]),
                  addresses[2],
                  addresses[3],
                  addresses[4],
                  addresses[5],
                  static_cast<float*>(addresses[6]),
                  kinds[2] != 0,
                  {}};
    std::memcpy(&tensors[t].constants, constants, sizeof(StepConstants));
  }
  NoiseStep job{{key, step, offset},
                static_cast<StepRule>(rule),
                wide != 0,
                strict != 0,
                std,
                grid,
                divisor,
                tensors.data(),
                starts.data(),
                count};
  std::vector<char> table(rows_offset(count) + count * sizeof(StepRow<double>));
  job.wide ? fill_table<double>(job, table.data()) : fill_table<float>(job, table.data());
  const int code = form_of(job);
  const StepForm form = static_cast<StepForm>(code % kMomentum);
  StepGrid launch = step_grid(job, table.data(), starts[count], code);
  if (run_of > 0) launch.run = run_of;
  if (job.wide) {
    job.strict ? run<NormalKind::kStrict, double>(job.rule, launch, form)
               : run<NormalKind::kWide, double>(job.rule, launch, form);
  } else {
    job.strict ? run<NormalKind::kStrict, float>(job.rule, launch, form)
               : run<NormalKind::kNarrow, float>(job.rule, launch, form);
  }
  return code;
}
