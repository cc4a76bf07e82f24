// SPDX-License-Identifier: Apache-2.0
// Divides units of work among the threads of a team.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <vector>

#include "team.h"

namespace wavedp {

// What a core transforms in several times the 5 us that it costs to set a thread of a pool to work.
constexpr int64_t kSamplesPerPart = 1 << 17;
// Parts of a thread, so that one that is held up leaves the rest to others.
constexpr int64_t kPartsPerThread = 4;

// Runs run(begin, end) over all units, which take as long as to transform `samples`. What a part throws is
// thrown here once all have ended.
template <class Run>
void divide(int64_t units, int64_t samples, int threads, const Run& run) {
  if (units == 0 || samples == 0) return;
  const int64_t most = threads > 1 ? threads * kPartsPerThread : 1;
  const int64_t parts = std::max<int64_t>(1, std::min({most, samples / kSamplesPerPart, units}));
  if (parts == 1) return run(int64_t(0), units);

  struct Job {
    const Run& run;
    int64_t units, parts;
    std::vector<std::exception_ptr> thrown;

    int64_t bound(int64_t part) const { return units / parts * part + std::min(part, units % parts); }
    static void work(void* self, int64_t part) {
      Job& job = *static_cast<Job*>(self);
      try {
        job.run(job.bound(part), job.bound(part + 1));
      } catch (...) {
        job.thrown[part] = std::current_exception();
      }
    }
  } job{run, units, parts, std::vector<std::exception_ptr>(parts)};
  run_in_team(parts, threads, Job::work, &job);
  for (const std::exception_ptr& error : job.thrown) {
    if (error) std::rethrow_exception(error);
  }
}

// The place of the instruction set in use among those that are built, widest first: amx, avx512, avx2,
// baseline; or the last alone.
int cpu_isa_index();

}  // namespace wavedp
