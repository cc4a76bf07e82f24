// SPDX-License-Identifier: Apache-2.0
// The row loops of wavelet.cpp, which is compiled once for each instruction set under a namespace of its own.
#pragma once

#include "../wavelet.h"

// Rows [begin, end) of the n * band_length(height) rows of every band.
#define WAVEDP_DECLARE_ROWS(isa)                                 \
  namespace wavedp::isa {                                        \
  void dwt2_rows(const Dwt2& job, int64_t begin, int64_t end);   \
  void idwt2_rows(const Idwt2& job, int64_t begin, int64_t end); \
  }
