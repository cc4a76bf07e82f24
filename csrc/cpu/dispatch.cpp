// SPDX-License-Identifier: Apache-2.0
// Chooses the widest instruction set of this CPU, for everything, and computes the transforms.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#ifdef WAVEDP_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "divide.h"
#include "noise_units.h"
#include "units.h"

WAVEDP_DECLARE_UNITS(baseline)
WAVEDP_DECLARE_NOISE_UNITS(baseline)
#ifdef WAVEDP_X86
WAVEDP_DECLARE_UNITS(avx2)
WAVEDP_DECLARE_UNITS(avx512)
WAVEDP_DECLARE_NOISE_UNITS(avx2)
WAVEDP_DECLARE_NOISE_UNITS(avx512)
#endif

namespace wavedp {
namespace {

struct Isa {
  const char* name;
  bool (*supported)();
  void (*wavedec2)(const Wavedec2&, int64_t, int64_t);
  void (*waverec2)(const Waverec2&, int64_t, int64_t);
  void (*wavelet_tokens)(const WaveletTokens&, void*, int64_t, int64_t);
  void (*wavelet_untokens)(const WaveletUntokens&, int64_t, int64_t);
  void (*chacha20_words)(const ChachaWords&, int64_t, int64_t);
  void (*noisy_mean)(const NoisyMean&, int64_t, int64_t);
  void (*noise_step)(const NoiseStep&, int64_t, int64_t);
};

#ifdef WAVEDP_X86
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

#ifdef WAVEDP_AMX
// The registers are large, so the kernel keeps them only for a process that has asked for them.
bool has_amx() {
  unsigned a, b, c, d;
  constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24;
  if (!has_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return (d & kBFloat16) && (d & kTile) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

#define WAVEDP_UNITS(isa)                                                                           \
  isa::wavedec2_units, isa::waverec2_units, isa::wavelet_tokens_units, isa::wavelet_untokens_units, \
      isa::chacha20_words_units, isa::noisy_mean_units, isa::noise_step_units

const Isa kIsas[] = {// widest first
#ifdef WAVEDP_AMX
                     {"amx", has_amx, WAVEDP_UNITS(avx512)},
#endif
#ifdef WAVEDP_X86
                     {"avx512", has_avx512, WAVEDP_UNITS(avx512)},
                     {"avx2", has_avx2, WAVEDP_UNITS(avx2)},
#endif
                     {"baseline", [] { return true; }, WAVEDP_UNITS(baseline)}};

const Isa* widest() {
  return std::find_if(std::begin(kIsas), std::end(kIsas), [](const Isa& isa) { return isa.supported(); });
}

std::atomic<const Isa*> current{nullptr};

const Isa& chosen() {
  const Isa* isa = current.load(std::memory_order_relaxed);
  if (!isa) current.store(isa = widest(), std::memory_order_relaxed);
  return *isa;
}

// A number drawn costs as much as the transform of several samples.
constexpr int64_t kSamplesPerNormal = 8;

// Sums of the rows of the grid, in their order, so that the number of threads does not show.
template <class Real>
void add_up(const WaveletTokens& job, const Real* partial) {
  const int64_t channels = job.images.inner, bands = 3 * job.levels + 1;
  Real* energies = static_cast<Real*>(job.energies);
  for (int64_t batch = 0; batch < job.images.outer; ++batch) {
    for (int64_t channel = 0; channel < channels; ++channel) {
      for (int64_t b = 0; b < bands; ++b) {
        Real sum = 0;
        for (int64_t i = 0; i < job.grid_h; ++i) {
          sum += partial[((batch * job.grid_h + i) * channels + channel) * bands + b];
        }
        // LL of all channels, then LH, HL and HH of all channels of each level.
        energies[batch * channels * bands + b * channels + channel] = sum;
      }
    }
  }
}

template <class Real>
void tokens_with_energies(const WaveletTokens& job, int threads) {
  std::vector<Real> partial(unit_count(job) * (3 * job.levels + 1));
  divide(unit_count(job), sample_count(job), threads,
         [&](int64_t begin, int64_t end) { chosen().wavelet_tokens(job, partial.data(), begin, end); });
  add_up(job, partial.data());
}

}  // namespace

const char* cpu_isa() { return chosen().name; }

int cpu_isa_index() { return static_cast<int>(&chosen() - kIsas); }

bool set_cpu_isa(const char* name) {
  for (const Isa& isa : kIsas) {
    if (std::strcmp(isa.name, name) == 0 && isa.supported()) {
      current.store(&isa, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

void wavedec2_cpu(const Wavedec2& job, int threads) {
  divide(unit_count(job), sample_count(job), threads,
         [&](int64_t begin, int64_t end) { chosen().wavedec2(job, begin, end); });
}

void waverec2_cpu(const Waverec2& job, int threads) {
  divide(unit_count(job), sample_count(job), threads,
         [&](int64_t begin, int64_t end) { chosen().waverec2(job, begin, end); });
}

void wavelet_tokens_cpu(const WaveletTokens& job, int threads) {
  if (job.energies) {
    return job.token_dtype == DType::kFloat64 ? tokens_with_energies<double>(job, threads)
                                              : tokens_with_energies<float>(job, threads);
  }
  divide(unit_count(job), sample_count(job), threads,
         [&](int64_t begin, int64_t end) { chosen().wavelet_tokens(job, nullptr, begin, end); });
}

void wavelet_untokens_cpu(const WaveletUntokens& job, int threads) {
  divide(unit_count(job), sample_count(job), threads,
         [&](int64_t begin, int64_t end) { chosen().wavelet_untokens(job, begin, end); });
}

void chacha20_words_cpu(const ChachaWords& job, int threads) {
  divide(unit_count(job), kSamplesPerNormal * job.count, threads,
         [&](int64_t begin, int64_t end) { chosen().chacha20_words(job, begin, end); });
}

void noisy_mean_cpu(const NoisyMean& job, int threads) {
  divide(unit_count(job), kSamplesPerNormal * job.count, threads,
         [&](int64_t begin, int64_t end) { chosen().noisy_mean(job, begin, end); });
}

void noise_step_cpu(const NoiseStep& job, int threads) {
  divide(unit_count(job), kSamplesPerNormal * job.starts[job.count], threads,
         [&](int64_t begin, int64_t end) { chosen().noise_step(job, begin, end); });
}

}  // namespace wavedp
