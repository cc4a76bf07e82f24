// SPDX-License-Identifier: Apache-2.0
// Which coefficients a thread block owns: those of 2^cell_bits neighbouring cells. A cell is what one
// coefficient of the coarsest level covers, or more. The block's LL_k are a strip, one cell beside the other:
// 2^side rows of 2^(cell_bits + side) values, side = the levels from k up to a cell. So the 2 x 2 block below
// (row, column) of a strip is at (2 row, 2 column) of the next finer one, in whatever cell.
#pragma once

#include "layout.h"

namespace wavedp {
namespace {

constexpr int kThreadBits = 7;
constexpr int kThreads = 1 << kThreadBits;

struct Cell {
  int64_t n, i, j;  // the image, and the cell in it
  bool exists;
};

struct Strip {
  int64_t first, cells, down, across;  // the block's first cell; how many there are, and in one image
  int cell_bits;

  WAVEDP_HOST_DEVICE int rows(int side) const { return 1 << side; }
  WAVEDP_HOST_DEVICE int columns(int side) const { return 1 << (cell_bits + side); }
  WAVEDP_HOST_DEVICE int items(int side) const { return 1 << (cell_bits + 2 * side); }

  WAVEDP_HOST_DEVICE Cell cell(int column, int side) const {
    const int64_t index = first + (column >> side);
    const int64_t row = quotient(index, across), n = quotient(row, down);
    return {n, row - n * down, index - row * across, index < cells};
  }
};

// One finest value of the strip for each thread, or several where a cell alone has more.
WAVEDP_HOST_DEVICE inline int cell_bits(int finest_side) {
  return 2 * finest_side < kThreadBits ? kThreadBits - 2 * finest_side : 0;
}

// The values of the strips of sides finest_side to 0.
WAVEDP_HOST_DEVICE constexpr int strip_values(int cells, int finest_side) {
  return finest_side == 0 ? cells : cells * (1 << (2 * finest_side)) + strip_values(cells, finest_side - 1);
}

WAVEDP_HOST_DEVICE inline int64_t blocks_of(int64_t cells, int cell_bits) {
  return ((cells - 1) >> cell_bits) + 1;
}

}  // namespace
}  // namespace wavedp
