// SPDX-License-Identifier: Apache-2.0
// The threads are those of the OpenMP runtime that PyTorch has loaded, where there is one (its symbols are
// global). A thread of PyTorch's pool spins for milliseconds after each of its ops; on two cores, threads of
// our own ran beside it, and a transform right after a copy_ took half as long again. Otherwise threads are
// started for one call.
#include "team.h"

#include <pthread.h>

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

extern "C" void GOMP_parallel(void (*run)(void*), void* data, unsigned threads, unsigned flags)
    __attribute__((weak));

namespace wavedp {
namespace {

struct Work {
  void (*work)(void*, int64_t);
  void* context;
  int64_t parts;
  std::atomic<int64_t> next{0};

  static void run(void* self) {
    Work& shared = *static_cast<Work*>(self);
    for (int64_t part; (part = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.parts;) {
      shared.work(shared.context, part);
    }
  }
};

// A pool does not survive fork(): the child would wait for threads that it does not have.
std::atomic<bool> forked{false};
const bool watched = pthread_atfork(nullptr, nullptr, [] { forked.store(true); }) == 0;

bool has_pool() { return watched && GOMP_parallel && !forked.load(); }

}  // namespace

void leave_pool() { forked.store(true); }

void run_in_team(int64_t parts, int threads, void (*work)(void*, int64_t), void* context) {
  Work shared{work, context, parts};
  const int64_t size = parts < threads ? parts : threads;
  if (size <= 1) return Work::run(&shared);
  if (has_pool()) return GOMP_parallel(Work::run, &shared, static_cast<unsigned>(size), 0);
  std::vector<std::thread> team;
  team.reserve(size - 1);
  try {
    for (int64_t member = 1; member < size; ++member) team.emplace_back(Work::run, &shared);
  } catch (const std::system_error&) {
    // No thread to be had: those that there are do all the parts.
  }
  Work::run(&shared);
  for (std::thread& member : team) member.join();
}

}  // namespace wavedp
