// SPDX-License-Identifier: Apache-2.0
// The launches of the raw stream and of the noisy mean of one tensor.
#include "noise_mean.h"
#include "number.cuh"

namespace wavedp {
namespace {

__global__ void __launch_bounds__(kThreads) chacha20_words_kernel(const __grid_constant__ ChachaWords job) {
  words_thread(job, int64_t(blockIdx.x) * kThreads + threadIdx.x);
}

template <NormalKind kKind, bool kSingle>
__global__ void __launch_bounds__(kThreads) noisy_mean_kernel(const __grid_constant__ MeanGrid grid) {
  mean_thread<kKind, kSingle>(grid, int64_t(blockIdx.x) * kThreads + threadIdx.x);
}

template <NormalKind kKind>
void (*kernel_of(bool single))(MeanGrid) {
  return single ? noisy_mean_kernel<kKind, true> : noisy_mean_kernel<kKind, false>;
}

int64_t blocks_for(int64_t threads) { return (threads - 1) / kThreads + 1; }

}  // namespace

int chacha20_words_cuda(const ChachaWords& job, void* stream) {
  if (job.count == 0) return cudaSuccess;
  return launch(chacha20_words_kernel, blocks_for((job.count - 1) / kBlockWords + 1), 0, stream, job);
}

int noisy_mean_cuda(const NoisyMean& job, void* stream) {
  if (job.count == 0) return cudaSuccess;
  const MeanGrid grid(job);
  const bool single = is_single(job);
  const auto kernel = job.kind == NormalKind::kNarrow ? kernel_of<NormalKind::kNarrow>(single)
                      : job.kind == NormalKind::kWide ? kernel_of<NormalKind::kWide>(single)
                                                      : kernel_of<NormalKind::kStrict>(single);
  return launch(kernel, blocks_for(grid.groups * kGroupBlocks), 0, stream, grid);
}

}  // namespace wavedp
