// SPDX-License-Identifier: Apache-2.0
// Products of float32 matrices by the tiles of AMX, which multiply bfloat16 and add up in float32.
//
// A number is the sum of three of bfloat16, of 8 bits each, and a product the sum of the six products of
// theirs that are not below 2^-23 of it, about the rounding of float32 (Henry, Tang, Heinecke, "Leveraging
// the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations", 2019).
// docs/decisions/0008-amx.md has what it gains.
//
// A tile of 16 rows and 32 entries of them is three blocks of 1 KiB, one for each part: 16 lines of 16 pairs
// of numbers. Which entry a pair holds does not matter, as long as both sides of a product agree.
#pragma once

#include <type_traits>

#include "vector.h"

namespace wavedp::WAVEDP_ISA {
namespace {

constexpr int64_t kTileRows = 16, kTileEntries = 32, kTileParts = 3;
constexpr int64_t kPartWords = kTileRows * kTileRows, kTileWords = kTileParts * kPartWords;

using Words = Vector<uint32_t, kLineBytes>;
using Floats = Vector<float, kLineBytes>;

// The tile registers of this thread, all of 16 rows of 64 bytes, while it lives.
class TileRegisters {
 public:
  TileRegisters() {
    alignas(kLineBytes) uint8_t shape[64] = {1};  // palette 1; then bytes of a row from 16, rows from 48 on
    for (int tile = 0; tile < 8; ++tile) {
      shape[16 + 2 * tile] = kLineBytes;
      shape[48 + tile] = kTileRows;
    }
    asm volatile("ldtilecfg %0" ::"m"(shape) : "memory");
  }
  ~TileRegisters() { asm volatile("tilerelease" ::: "memory"); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

template <int kTile>
inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

template <int kTile>
inline void load_tile(const void* source) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(source), "r"(int64_t(kLineBytes)), "i"(kTile)
               : "memory");
}

template <int kTile>
inline void store_tile(void* target) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(target), "r"(int64_t(kLineBytes)), "i"(kTile)
               : "memory");
}

// tile[sum] += tile[x] tile[y]
template <int kSum, int kX, int kY>
inline void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kX), "i"(kY));
}

// Sums of products of up to 2 x 2 tiles in the first registers; where `kTriangle`, not that below the
// diagonal.
template <int kRows, int kCols, bool kTriangle>
struct TileBlock {
  static constexpr int kX = 4, kY = 6;

  template <class Do>
  static void each(const Do& run) {
    run(std::integral_constant<int, 0>(), std::integral_constant<int, 0>());
    if constexpr (kCols > 1) run(std::integral_constant<int, 0>(), std::integral_constant<int, 1>());
    if constexpr (kRows > 1 && !kTriangle) {
      run(std::integral_constant<int, 1>(), std::integral_constant<int, 0>());
    }
    if constexpr (kRows > 1 && kCols > 1) {
      run(std::integral_constant<int, 1>(), std::integral_constant<int, 1>());
    }
  }

  static void clear() {
    each([](auto i, auto j) { clear_tile<2 * i + j>(); });
  }
  // The sums lie `down` and `across` apart.
  static void load(const float* sums, int64_t down, int64_t across) {
    each([&](auto i, auto j) { load_tile<2 * i + j>(sums + i * down + j * across); });
  }
  static void store(float* sums, int64_t down, int64_t across) {
    each([&](auto i, auto j) { store_tile<2 * i + j>(sums + i * down + j * across); });
  }

  // Of the tiles from x and y on, which lie x_apart and y_apart words apart. A core does other work at the
  // same time only where it finds it among the products: `meanwhile` is called kPauses times.
  static constexpr int kPauses = 6;
  template <class Do>
  static void add(const uint32_t* x, int64_t x_apart, const uint32_t* y, int64_t y_apart,
                  const Do& meanwhile) {
    load_y<0>(y, y_apart);
    load_x<2>(x, x_apart);
    multiply();
    meanwhile();
    load_x<1>(x, x_apart);
    multiply();
    meanwhile();
    load_x<0>(x, x_apart);
    multiply();
    meanwhile();
    load_y<1>(y, y_apart);
    multiply();
    meanwhile();
    load_x<1>(x, x_apart);
    multiply();
    meanwhile();
    load_y<2>(y, y_apart);
    load_x<0>(x, x_apart);
    multiply();
    meanwhile();
  }

 private:
  template <int kPart>
  static void load_x(const uint32_t* x, int64_t apart) {
    load_tile<kX>(x + kPart * kPartWords);
    if constexpr (kRows > 1) load_tile<kX + 1>(x + apart + kPart * kPartWords);
  }
  template <int kPart>
  static void load_y(const uint32_t* y, int64_t apart) {
    load_tile<kY>(y + kPart * kPartWords);
    if constexpr (kCols > 1) load_tile<kY + 1>(y + apart + kPart * kPartWords);
  }
  static void multiply() {
    each([](auto i, auto j) { multiply_tiles<2 * i + j, kX + i, kY + j>(); });
  }
};

// The parts of two vectors of numbers, side by side: first what the first 8 bits are, then the next, rounded,
// and the rest, which is exact. No finite number becomes infinite, and what is not finite stays so.
struct Parts {
  Words words[kTileParts];

  Parts(const Floats& first, const Floats& second) {
    constexpr uint32_t kHigh = 0xffff0000u;
    const Words first_high = (Words)first & kHigh, second_high = (Words)second & kHigh;
    const Floats first_rest = first - (Floats)first_high, second_rest = second - (Floats)second_high;
    const Words first_middle = ((Words)first_rest + 0x8000u) & kHigh;
    const Words second_middle = ((Words)second_rest + 0x8000u) & kHigh;
    const Words first_low = (Words)(first_rest - (Floats)first_middle);
    const Words second_low = (Words)(second_rest - (Floats)second_middle);
    words[0] = second_high | first_high >> 16;
    words[1] = second_middle | first_middle >> 16;
    words[2] = (second_low & kHigh) | first_low >> 16;
  }
};

// target = one part of a tile with rows and pairs exchanged
inline __attribute__((always_inline)) void transpose_part(const uint32_t* part, uint32_t* target) {
  Words rows[kTileRows];
#pragma GCC unroll 16
  for (int64_t r = 0; r < kTileRows; ++r) rows[r] = load<Words>(part + r * kTileRows);
  transpose<kTileRows, 1>(rows);
#pragma GCC unroll 16
  for (int64_t r = 0; r < kTileRows; ++r) store(target + r * kTileRows, rows[r]);
}

}  // namespace
}  // namespace wavedp::WAVEDP_ISA
