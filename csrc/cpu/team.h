// SPDX-License-Identifier: Apache-2.0
// A team of threads for one call.
#pragma once

#include <cstdint>

namespace wavedp {

// Calls work(context, part) for every part in [0, parts) on at most `threads` threads, of which the caller is
// one. `work` must not throw.
void run_in_team(int64_t parts, int threads, void (*work)(void* context, int64_t part), void* context);

// From now on threads are started for each call: a pool does not survive fork(). A library that was loaded
// before the fork knows by itself.
void leave_pool();

}  // namespace wavedp
