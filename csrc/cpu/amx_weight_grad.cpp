// SPDX-License-Identifier: Apache-2.0
// Clipped sums of the weight gradients of linear layers by the tiles of AMX. Compiled once.
#include <algorithm>

#include "amx.h"
#include "rows.h"
#include "units_per_sample.h"

WAVEDP_DECLARE_WEIGHT_GRAD(WAVEDP_ISA)

namespace wavedp::WAVEDP_ISA {
namespace {

// Rows that are taken apart at a time: with the widest panels of both sides and their sums they stay in the
// second-level cache.
constexpr int64_t kSteps = 2, kRows = kSteps * kTileEntries;
constexpr int64_t kPairs = kTileEntries / 2;

// Columns [first, first + count) of one side, in tiles of 16.
struct Columns {
  int64_t first, count;
  int64_t tiles() const { return (count + kTileRows - 1) / kTileRows; }
};

class PanelOfWeightGrad {
 public:
  PanelOfWeightGrad(const WeightGrad& job, const Columns& down, const Columns& across)
      : job_(job),
        down_(down),
        across_(across),
        blocks_((job.records + job.records_in_block - 1) / job.records_in_block),
        x_(static_cast<uint32_t*>(lasting_memory(bytes()))),
        y_(x_ + words_of(down)),
        sums_(reinterpret_cast<float*>(y_ + words_of(across))),
        total_(blocks_ > 1 ? reinterpret_cast<double*>(sums_ + sum_count()) : nullptr) {}

  // Whether every row keeps its precision as float32.
  bool run() {
    const int64_t tokens = job_.g.tokens, count = sum_count();
    for (int64_t k = 0; total_ && k < count; ++k) total_[k] = 0;
    for (int64_t first = 0; first < job_.records; first += job_.records_in_block) {
      const int64_t records = std::min(job_.records - first, job_.records_in_block);
      for (int64_t row = 0; row < records * tokens; row += kRows) {
        const int64_t rows = std::min(records * tokens - row, kRows);
        pack(first * tokens + row, rows);
        multiply((rows + kTileEntries - 1) / kTileEntries, row == 0);
      }
      for (int64_t k = 0; total_ && k < count; ++k) total_[k] += static_cast<double>(sums_[k]);
    }
    write();
    return precise_;
  }

 private:
  static int64_t words_of(const Columns& columns) { return columns.tiles() * kSteps * kTileWords; }
  int64_t sum_count() const { return down_.tiles() * across_.tiles() * kPartWords; }
  int64_t bytes() const {
    return 4 * (words_of(down_) + words_of(across_) + sum_count()) + (blocks_ > 1 ? 8 * sum_count() : 0);
  }

  const float* row_of(const Sequences& s, int64_t row, const Columns& columns) const {
    const int64_t record = job_.kept[row / s.tokens], token = row % s.tokens;
    return static_cast<const float*>(s.x) + record * s.stride_batch + token * s.stride_token + columns.first;
  }

  // Rows in pairs that follow one another, and of zeros to a whole step.
  void pack(int64_t row, int64_t rows) {
    for (int64_t step = 0; step * kTileEntries < rows; ++step) {
      for (int64_t pair = 0; pair < kPairs; ++pair) {
        const int64_t at = step * kTileEntries + 2 * pair, there = std::clamp<int64_t>(rows - at, 0, 2);
        pack_pair<true>(row + at, there, job_.g, down_, x_ + step * kTileWords + pair * kTileRows);
        pack_pair<false>(row + at, there, job_.a, across_, y_ + step * kTileWords + pair * kTileRows);
      }
      for (int64_t tile = 0; tile < down_.tiles(); ++tile) {
        for (int64_t part = 0; part < kTileParts; ++part) {
          uint32_t* words = x_ + (tile * kSteps + step) * kTileWords + part * kPartWords;
          transpose_part(words, words);
        }
      }
    }
  }

  template <bool kScaled>
  void pack_pair(int64_t row, int64_t there, const Sequences& s, const Columns& columns, uint32_t* words) {
    constexpr int64_t kApart = kSteps * kTileWords;
    const int64_t tiles = columns.tiles();
    if (there == 0) {
      for (int64_t tile = 0; tile < tiles; ++tile, words += kApart) put(Parts(Floats{}, Floats{}), words);
      return;
    }
    const float* first = row_of(s, row, columns);
    const float* second = there > 1 ? row_of(s, row + 1, columns) : first;
    const float first_factor = kScaled ? factor_of(row) : 1, second_factor = there < 2 ? 0 : kScaled ? factor_of(row + 1) : 1;
    Floats largest[2] = {};
    for (int64_t tile = 0; tile < tiles; ++tile, words += kApart) {
      const int64_t rest = columns.count - tile * kTileRows;
      const auto lanes = static_cast<__mmask16>(rest >= kTileRows ? 0xffff : (1 << rest) - 1);
      const auto second_lanes = static_cast<__mmask16>(there > 1 ? lanes : 0);
      Floats x = (Floats)_mm512_maskz_loadu_ps(lanes, first + tile * kTileRows);
      Floats y = (Floats)_mm512_maskz_loadu_ps(second_lanes, second + tile * kTileRows);
      if constexpr (kScaled) {
        x *= first_factor;
        y *= second_factor;
        largest[0] = larger(largest[0], x);
        largest[1] = larger(largest[1], y);
      }
      put(Parts(x, y), words);
    }
    if constexpr (kScaled) {
      for (const Floats& row_largest : largest) {
        const float most = lane_max(row_largest);
        precise_ = precise_ && (most == 0 || most >= static_cast<float>(job_.smallest));
      }
    }
  }

  float factor_of(int64_t row) const {
    return static_cast<float>(job_.factors[job_.kept[row / job_.g.tokens]]);
  }

  // The larger of the absolute values of either.
  static Floats larger(const Floats& x, const Floats& y) {
    return (Floats)_mm512_range_ps((__m512)x, (__m512)y, 0b1011);
  }

  static void put(const Parts& parts, uint32_t* words) {
#pragma GCC unroll 3
    for (int64_t part = 0; part < kTileParts; ++part) store(words + part * kPartWords, parts.words[part]);
  }

  void multiply(int64_t steps, bool first) {
    const int64_t down = down_.tiles(), across = across_.tiles();
    for (int64_t j = 0; j < across; j += 2) {
      for (int64_t i = 0; i < down; i += 2) {
        const bool tall = i + 1 < down, wide = j + 1 < across;
        if (tall) {
          wide ? multiply<2, 2>(i, j, steps, first) : multiply<2, 1>(i, j, steps, first);
        } else {
          wide ? multiply<1, 2>(i, j, steps, first) : multiply<1, 1>(i, j, steps, first);
        }
      }
    }
  }

  template <int kDown, int kAcross>
  void multiply(int64_t i, int64_t j, int64_t steps, bool first) {
    using Block = TileBlock<kDown, kAcross, false>;
    constexpr int64_t kApart = kSteps * kTileWords;
    const uint32_t *x = x_ + i * kApart, *y = y_ + j * kApart;
    float* sums = sums_ + (i * across_.tiles() + j) * kPartWords;
    const int64_t down = across_.tiles() * kPartWords;
    first ? Block::clear() : Block::load(sums, down, kPartWords);
    for (int64_t step = 0; step < steps; ++step) {
      Block::add(x + step * kTileWords, kApart, y + step * kTileWords, kApart, [] {});
    }
    Block::store(sums, down, kPartWords);
  }

  void write() const {
    float* grad = static_cast<float*>(job_.grad);
    for (int64_t r = 0; r < down_.count; ++r) {
      float* row = grad + (down_.first + r) * job_.a.width + across_.first;
      for (int64_t tile = 0; tile < across_.tiles(); ++tile) {
        const int64_t k = ((r / kTileRows) * across_.tiles() + tile) * kPartWords + r % kTileRows * kTileRows;
        const int64_t rest = across_.count - tile * kTileRows, count = rest < kTileRows ? rest : kTileRows;
        for (int64_t c = 0; c < count; ++c) {
          row[tile * kTileRows + c] = total_ ? static_cast<float>(total_[k + c]) : sums_[k + c];
        }
      }
    }
  }

  const WeightGrad& job_;
  const Columns down_, across_;
  const int64_t blocks_;
  uint32_t *const x_, *const y_;
  float* const sums_;
  double* const total_;
  bool precise_ = true;
};

Columns columns_of(int64_t width, int64_t panels, int64_t panel) {
  // Whole tiles, two at a time, as far as they go.
  const int64_t unit = 2 * kTileRows, units = (width + unit - 1) / unit;
  const int64_t first = units * panel / panels * unit, end = std::min(units * (panel + 1) / panels * unit, width);
  return {first, end - first};
}

}  // namespace

bool weight_grad_units(const WeightGrad& job, int64_t begin, int64_t end) {
  const TileRegisters registers;
  bool precise = true;
  for (int64_t unit = begin; unit < end; ++unit) {
    const Columns down = columns_of(job.g.width, job.panels_down, unit / job.panels_across);
    const Columns across = columns_of(job.a.width, job.panels_across, unit % job.panels_across);
    precise = PanelOfWeightGrad(job, down, across).run() && precise;
  }
  return precise;
}

}  // namespace wavedp::WAVEDP_ISA
