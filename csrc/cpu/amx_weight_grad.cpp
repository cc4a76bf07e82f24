// SPDX-License-Identifier: Apache-2.0
// Clipped sums of the weight gradients of linear layers by the tiles of AMX. Compiled once.
//
// Of a chunk of rows both sides are taken apart, then multiplied two by two tiles: both stay in the
// second-level cache, and the sums of a panel beside them.
#include <algorithm>

#include "amx.h"
#include "rows.h"
#include "units_per_sample.h"

WAVEDP_DECLARE_WEIGHT_GRAD(WAVEDP_ISA)

namespace wavedp::WAVEDP_ISA {
namespace {

constexpr int64_t kStepRows = kTileEntries, kPairs = kStepRows / 2;
constexpr int64_t kChunkSteps = 4, kChunkRows = kChunkSteps * kStepRows;
constexpr int64_t kTwoTiles = 2 * kTileRows;

// Columns [first, first + count) of one side, in tiles of 16.
struct Columns {
  int64_t first, count;
  int64_t tiles() const { return (count + kTileRows - 1) / kTileRows; }
};

// The columns of a step of rows; those that are not there are masked.
struct StepRows {
  const float* x[kStepRows];
  float factors[kStepRows];
  __mmask16 there[kStepRows];
};

class PanelOfWeightGrad {
 public:
  PanelOfWeightGrad(const WeightGrad& job, const Columns& down, const Columns& across)
      : job_(job),
        down_(down),
        across_(across),
        sum_count_(down.tiles() * across.tiles() * kPartWords),
        rows_(static_cast<StepRows (*)[kChunkSteps]>(lasting_memory(bytes()))),
        x_(reinterpret_cast<uint32_t*>(rows_ + 2)),
        y_(x_ + kChunkSteps * down.tiles() * kTileWords),
        sums_(reinterpret_cast<float*>(y_ + kChunkSteps * across.tiles() * kTileWords)),
        total_(reinterpret_cast<double*>(sums_ + sum_count_)) {}

  // Adds up blocks [begin, end). False where a row is so large or small that parts of its entries might be
  // lost.
  bool run(int64_t begin, int64_t end, float* target) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = job_.records * block / job_.blocks * job_.g.tokens;
      const int64_t last = job_.records * (block + 1) / job_.blocks * job_.g.tokens;
      for (int64_t row = first; row < last; row += kChunkRows) {
        if (!set_rows(row, std::min(last - row, kChunkRows))) return false;
        multiply((std::min(last - row, kChunkRows) + kStepRows - 1) / kStepRows, row == first);
      }
      for (int64_t k = 0; end - begin > 1 && k < sum_count_; ++k) {
        total_[k] = (block > begin ? total_[k] : 0) + static_cast<double>(sums_[k]);
      }
    }
    for (int64_t k = 0; end - begin > 1 && k < sum_count_; ++k) sums_[k] = static_cast<float>(total_[k]);
    write(target);
    return true;
  }

 private:
  int64_t bytes() const {
    return 2 * sizeof(*rows_) + 12 * sum_count_ +
           4 * kChunkSteps * kTileWords * (down_.tiles() + across_.tiles());
  }

  // The rows from `row` of those that are kept on, up to whole steps. The wider side is scaled.
  bool set_rows(int64_t row, int64_t count) {
    const Sequences &down = job_.narrow(), &across = job_.wide();
    const int64_t tokens = down.tokens;
    int64_t kept = row / tokens, token = row % tokens;
    bool ordinary = true;
    for (int64_t r = 0; r < (count + kStepRows - 1) / kStepRows * kStepRows; ++r) {
      const bool there = r < count;
      const int64_t record = job_.kept[there ? kept : row / tokens], t = there ? token : 0;
      StepRows &down_rows = rows_[0][r / kStepRows], &across_rows = rows_[1][r / kStepRows];
      const int64_t k = r % kStepRows;
      down_rows.x[k] = row_of(down, record, t, down_);
      across_rows.x[k] = row_of(across, record, t, across_);
      down_rows.factors[k] = 1;
      across_rows.factors[k] = static_cast<float>(job_.factors[record]);
      down_rows.there[k] = across_rows.there[k] = there ? 0xffff : 0;
      if (!there) continue;
      ordinary = ordinary && is_ordinary(down_rows.x[k], down_.count, 1) &&
                 is_ordinary(across_rows.x[k], across_.count, across_rows.factors[k]);
      if (++token == tokens) token = 0, ++kept;
    }
    return ordinary;
  }

  static const float* row_of(const Sequences& s, int64_t record, int64_t token, const Columns& columns) {
    return static_cast<const float*>(s.x) + record * s.stride_batch + token * s.stride_token + columns.first;
  }

  // Also has the row brought to the second-level cache.
  bool is_ordinary(const float* row, int64_t count, float factor) const {
    Floats largest[2] = {};
    int64_t c = 0;
    for (; c + kTwoTiles <= count; c += kTwoTiles) {
      for (int64_t u = 0; u < 2; ++u) largest[u] = larger(largest[u], load<Floats>(row + c + u * kTileRows));
    }
    for (; c < count; c += kTileRows) {
      largest[0] = larger(largest[0], load_first(row + c, std::min(count - c, kTileRows)));
    }
    const double most = static_cast<double>(lane_max(larger(largest[0], largest[1])));
    const double scaled = most * static_cast<double>(factor);
    return most == 0 || (scaled >= job_.smallest && scaled <= 1 / job_.smallest);
  }

  // The larger of the absolute values of either.
  static Floats larger(const Floats& x, const Floats& y) {
    return (Floats)_mm512_range_ps((__m512)x, (__m512)y, 0b1011);
  }

  void multiply(int64_t steps, bool first) {
    for (int64_t step = 0; step < steps; ++step) {
      uint32_t *x = x_ + step * down_.tiles() * kTileWords, *y = y_ + step * across_.tiles() * kTileWords;
      take_apart(rows_[0][step], down_, x);
      for (uint32_t* part = x; part < x + down_.tiles() * kTileWords; part += kPartWords)
        transpose_part(part, part);
      take_apart(rows_[1][step], across_, y);
    }
    for (int64_t j = 0; j < across_.tiles(); j += 2) {
      for (int64_t i = 0; i < down_.tiles(); i += 2) {
        const bool tall = i + 1 < down_.tiles(), wide = j + 1 < across_.tiles();
        if (tall) {
          wide ? multiply_block<2, 2>(i, j, steps, first) : multiply_block<2, 1>(i, j, steps, first);
        } else {
          wide ? multiply_block<1, 2>(i, j, steps, first) : multiply_block<1, 1>(i, j, steps, first);
        }
      }
    }
  }

  static void take_apart(const StepRows& rows, const Columns& columns, uint32_t* tiles) {
    for (int64_t pair = 0; pair < kPairs; ++pair) {
      const float *first = rows.x[2 * pair], *second = rows.x[2 * pair + 1];
      const float first_factor = rows.factors[2 * pair], second_factor = rows.factors[2 * pair + 1];
      const __mmask16 first_there = rows.there[2 * pair], second_there = rows.there[2 * pair + 1];
      uint32_t* words = tiles + pair * kTileRows;
      for (int64_t rest = columns.count; rest > 0; rest -= kTileRows, words += kTileWords) {
        const auto lanes = static_cast<__mmask16>(rest >= kTileRows ? 0xffff : (1 << rest) - 1);
        const Floats x = (Floats)_mm512_maskz_loadu_ps(lanes & first_there, first);
        const Floats y = (Floats)_mm512_maskz_loadu_ps(lanes & second_there, second);
        const Parts parts(x * first_factor, y * second_factor);
#pragma GCC unroll 3
        for (int64_t part = 0; part < kTileParts; ++part) store(words + part * kPartWords, parts.words[part]);
        first += kTileRows;
        second += kTileRows;
      }
    }
  }

  template <int kDown, int kAcross>
  void multiply_block(int64_t i, int64_t j, int64_t steps, bool first) {
    using Block = TileBlock<kDown, kAcross, false>;
    const uint32_t *x = x_ + i * kTileWords, *y = y_ + j * kTileWords;
    float* sums = sums_ + (i * across_.tiles() + j) * kPartWords;
    const int64_t apart = across_.tiles() * kPartWords;
    first ? Block::clear() : Block::load(sums, apart, kPartWords);
    for (int64_t step = 0; step < steps; ++step) {
      Block::add(x, kTileWords, y, kTileWords, [] {});
      x += down_.tiles() * kTileWords;
      y += across_.tiles() * kTileWords;
    }
    Block::store(sums, apart, kPartWords);
  }

  // The sums, of the gradient [g.width, a.width].
  void write(float* grad) const {
    const bool exchanged = job_.is_transposed();
    const int64_t width = job_.a.width;
    for (int64_t i = 0; i < down_.tiles(); ++i) {
      for (int64_t j = 0; j < across_.tiles(); ++j) {
        const float* tile = sums_ + (i * across_.tiles() + j) * kPartWords;
        Floats rows[kTileRows];
        for (int64_t r = 0; r < kTileRows; ++r) rows[r] = load<Floats>(tile + r * kTileRows);
        if (exchanged) transpose<kTileRows, 1>(rows);
        const Columns &down = exchanged ? across_ : down_, &across = exchanged ? down_ : across_;
        const int64_t row = (exchanged ? j : i) * kTileRows, column = (exchanged ? i : j) * kTileRows;
        const int64_t count = std::min(across.count - column, kTileRows);
        for (int64_t r = 0; r < std::min(down.count - row, kTileRows); ++r) {
          float* target = grad + (down.first + row + r) * width + across.first + column;
          std::memcpy(target, rows + r, count * sizeof(float));
        }
      }
    }
  }

  const WeightGrad& job_;
  const Columns down_, across_;
  const int64_t sum_count_;
  StepRows (*const rows_)[kChunkSteps];
  uint32_t *const x_, *const y_;
  float* const sums_;
  double* const total_;
};

// One of `panels` of about as many columns, in whole tiles two at a time as far as they go.
Columns columns_of(int64_t width, int64_t panels, int64_t panel) {
  const int64_t units = (width + kTwoTiles - 1) / kTwoTiles;
  const int64_t first = units * panel / panels * kTwoTiles;
  return {first, std::min(units * (panel + 1) / panels * kTwoTiles, width) - first};
}

}  // namespace

bool weight_grad_units(const WeightGrad& job, int64_t begin, int64_t end) {
  const TileRegisters registers;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t group = unit / (job.panels_down * job.panels_across),
                  panel = unit % (job.panels_down * job.panels_across);
    const Columns down = columns_of(job.narrow().width, job.panels_down, panel / job.panels_across);
    const Columns across = columns_of(job.wide().width, job.panels_across, panel % job.panels_across);
    float* sums = static_cast<float*>(job.sums) + group * job.g.width * job.a.width;
    if (!PanelOfWeightGrad(job, down, across)
             .run(job.blocks * group / job.groups, job.blocks * (group + 1) / job.groups, sums)) {
      return false;
    }
  }
  return true;
}

}  // namespace wavedp::WAVEDP_ISA
