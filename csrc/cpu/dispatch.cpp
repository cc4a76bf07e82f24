// SPDX-License-Identifier: Apache-2.0
// Chooses the widest instruction set of this CPU and divides the rows among threads. Threads live for one
// call: a pool would not survive fork().
#include <algorithm>
#include <atomic>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#include "rows.h"

WAVEDP_DECLARE_ROWS(baseline)
#ifdef WAVEDP_X86
WAVEDP_DECLARE_ROWS(avx2)
WAVEDP_DECLARE_ROWS(avx512)
#endif

namespace wavedp {
namespace {

struct Isa {
  const char* name;
  bool (*supported)();
  void (*dwt2_rows)(const Dwt2&, int64_t, int64_t);
  void (*idwt2_rows)(const Idwt2&, int64_t, int64_t);
};

#ifdef WAVEDP_X86
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx2() { return __builtin_cpu_supports("avx2"); }
#endif

const Isa kIsas[] = {// widest first
#ifdef WAVEDP_X86
                     {"avx512", has_avx512, avx512::dwt2_rows, avx512::idwt2_rows},
                     {"avx2", has_avx2, avx2::dwt2_rows, avx2::idwt2_rows},
#endif
                     {"baseline", [] { return true; }, baseline::dwt2_rows, baseline::idwt2_rows}};

const Isa* widest() {
  return std::find_if(std::begin(kIsas), std::end(kIsas), [](const Isa& isa) { return isa.supported(); });
}

std::atomic<const Isa*> current{nullptr};

const Isa& chosen() {
  const Isa* isa = current.load(std::memory_order_relaxed);
  if (!isa) current.store(isa = widest(), std::memory_order_relaxed);
  return *isa;
}

// Starting and joining a thread was measured at 30 us, in which a core with AVX-512 transforms this many
// float32 samples that lie in its cache.
constexpr int64_t kSamplesPerThread = 1 << 18;

template <class Job>
void for_rows(const Job& job, int threads, void (*run)(const Job&, int64_t, int64_t)) {
  if (job.n == 0 || job.height == 0 || job.width == 0) return;
  const int64_t rows = job.n * band_length(job.height);
  const int64_t worth = rows * band_length(job.width) * kBands / kSamplesPerThread;
  const int64_t parts = std::max<int64_t>(1, std::min({static_cast<int64_t>(threads), worth, rows}));
  const auto bound = [&](int64_t part) { return rows / parts * part + std::min(part, rows % parts); };

  std::vector<std::thread> team;
  team.reserve(parts - 1);
  int64_t part = 0;
  try {
    for (; part < parts - 1; ++part) team.emplace_back(run, std::cref(job), bound(part), bound(part + 1));
  } catch (const std::system_error&) {
    // No thread to be had: the rows not yet given away are done below.
  }
  run(job, bound(part), rows);
  for (std::thread& member : team) member.join();
}

}  // namespace

const char* cpu_isa() { return chosen().name; }

bool set_cpu_isa(const char* name) {
  for (const Isa& isa : kIsas) {
    if (std::strcmp(isa.name, name) == 0 && isa.supported()) {
      current.store(&isa, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

void wavedp_dwt2_cpu(const Dwt2& job, int threads) { for_rows(job, threads, chosen().dwt2_rows); }

void wavedp_idwt2_cpu(const Idwt2& job, int threads) { for_rows(job, threads, chosen().idwt2_rows); }

}  // namespace wavedp
