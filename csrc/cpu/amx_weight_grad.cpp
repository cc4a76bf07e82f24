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
// Steps of a chunk: as many as have their tiles in the second-level cache, so that sums seldom go in and out.
constexpr int64_t kFewestSteps = 2, kMostSteps = 16, kChunkBytes = 768 << 10;
// Steps whose rows are asked for ahead.
constexpr int64_t kStepsAhead = 2;
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
        most_steps_(std::clamp(kChunkBytes / bytes_of_step(), kFewestSteps, kMostSteps)),
        chunk_rows_(most_steps_ * kStepRows),
        rows_(static_cast<StepRows (*)[kMostSteps + kStepsAhead]>(lasting_memory(bytes()))),
        x_(reinterpret_cast<uint32_t*>(rows_ + 2)),
        y_(x_ + most_steps_ * down.tiles() * kTileWords),
        sums_(reinterpret_cast<float*>(y_ + most_steps_ * across.tiles() * kTileWords)),
        total_(reinterpret_cast<double*>(sums_ + sum_count_)) {}

  // Adds up blocks [begin, end). False where a row is so large or small that parts of its entries might be
  // lost.
  bool run(int64_t begin, int64_t end, float* target) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = job_.records * block / job_.blocks * job_.g.tokens;
      const int64_t last = job_.records * (block + 1) / job_.blocks * job_.g.tokens;
      for (int64_t row = first; row < last; row += chunk_rows_) {
        const int64_t count = std::min(last - row, chunk_rows_);
        set_rows(row, count);
        if (!take_apart(steps_of(count))) return false;
        multiply(steps_of(count), row == first);
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
  int64_t bytes() const { return 2 * sizeof(*rows_) + 12 * sum_count_ + most_steps_ * bytes_of_step(); }
  int64_t bytes_of_step() const { return 4 * kTileWords * (down_.tiles() + across_.tiles()); }

  static int64_t steps_of(int64_t rows) { return (rows + kStepRows - 1) / kStepRows; }

  // The rows from `row` of those that are kept on, up to whole steps, and those ahead. The wider side is
  // scaled.
  void set_rows(int64_t row, int64_t count) {
    const Sequences &down = job_.narrow(), &across = job_.wide();
    const int64_t tokens = down.tokens, total = job_.records * tokens;
    int64_t kept = row / tokens, token = row % tokens;
    for (int64_t r = 0; r < (steps_of(count) + kStepsAhead) * kStepRows; ++r) {
      const int64_t record = job_.kept[kept];
      StepRows &down_rows = rows_[0][r / kStepRows], &across_rows = rows_[1][r / kStepRows];
      const int64_t k = r % kStepRows;
      down_rows.x[k] = row_of(down, record, token, down_);
      across_rows.x[k] = row_of(across, record, token, across_);
      down_rows.factors[k] = 1;
      across_rows.factors[k] = static_cast<float>(job_.factors[record]);
      down_rows.there[k] = across_rows.there[k] = r < count ? 0xffff : 0;
      if (row + r + 1 < total && ++token == tokens) token = 0, ++kept;
    }
  }

  static const float* row_of(const Sequences& s, int64_t record, int64_t token, const Columns& columns) {
    return static_cast<const float*>(s.x) + record * s.stride_batch + token * s.stride_token + columns.first;
  }

  // Of a row, of whose entries `largest` are the largest of every lane.
  bool is_ordinary(const Floats& largest, float factor) const {
    const __m512 least = _mm512_set1_ps(static_cast<float>(job_.smallest));
    const __m512 most = _mm512_set1_ps(static_cast<float>(1 / job_.smallest));
    const __m512 scaled = (__m512)(largest * factor);
    const bool is_zero = _mm512_cmp_ps_mask((__m512)largest, _mm512_setzero_ps(), _CMP_NEQ_UQ) == 0;
    return (is_zero || _mm512_cmp_ps_mask(scaled, least, _CMP_GE_OQ) != 0) &&
           _mm512_cmp_ps_mask(scaled, most, _CMP_GT_OQ) == 0;
  }

  // The larger of the absolute values of either.
  static Floats larger(const Floats& x, const Floats& y) {
    return (Floats)_mm512_range_ps((__m512)x, (__m512)y, 0b1011);
  }

  bool take_apart(int64_t steps) {
    for (int64_t step = 0; step < steps; ++step) {
      uint32_t *x = x_ + step * down_.tiles() * kTileWords, *y = y_ + step * across_.tiles() * kTileWords;
      if (!take_apart(rows_[0] + step, down_, x)) return false;
      for (uint32_t* part = x; part < x + down_.tiles() * kTileWords; part += kPartWords)
        transpose_part(part, part);
      if (!take_apart(rows_[1] + step, across_, y)) return false;
    }
    return true;
  }

  void multiply(int64_t steps, bool first) {
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

  // Also asks for rows ahead, which by then are in the second-level cache.
  bool take_apart(const StepRows* rows, const Columns& columns, uint32_t* tiles) const {
    bool ordinary = true;
    for (int64_t pair = 0; pair < kPairs; ++pair) {
      const float *first = rows->x[2 * pair], *second = rows->x[2 * pair + 1];
      const float *next_first = rows[kStepsAhead].x[2 * pair],
                  *next_second = rows[kStepsAhead].x[2 * pair + 1];
      const float first_factor = rows->factors[2 * pair], second_factor = rows->factors[2 * pair + 1];
      const __mmask16 first_there = rows->there[2 * pair], second_there = rows->there[2 * pair + 1];
      Floats first_largest{}, second_largest{};
      uint32_t* words = tiles + pair * kTileRows;
      for (int64_t rest = columns.count; rest > 0; rest -= kTileRows, words += kTileWords) {
        __builtin_prefetch(next_first, 0, 2);
        __builtin_prefetch(next_second, 0, 2);
        const auto lanes = static_cast<__mmask16>(rest >= kTileRows ? 0xffff : (1 << rest) - 1);
        const Floats x = (Floats)_mm512_maskz_loadu_ps(lanes & first_there, first);
        const Floats y = (Floats)_mm512_maskz_loadu_ps(lanes & second_there, second);
        first_largest = larger(first_largest, x);
        second_largest = larger(second_largest, y);
        const Parts parts(x * first_factor, y * second_factor);
#pragma GCC unroll 3
        for (int64_t part = 0; part < kTileParts; ++part) store(words + part * kPartWords, parts.words[part]);
        first += kTileRows;
        second += kTileRows;
        next_first += kTileRows;
        next_second += kTileRows;
      }
      ordinary =
          ordinary && is_ordinary(first_largest, first_factor) && is_ordinary(second_largest, second_factor);
    }
    return ordinary;
  }

  template <int kDown, int kAcross>
  void multiply_block(int64_t i, int64_t j, int64_t steps, bool first) {
    using Block = TileBlock<kDown, kAcross, false>;
    const uint32_t *x = x_ + i * kTileWords, *y = y_ + j * kTileWords;
    float* sums = sums_ + (i * across_.tiles() + j) * kPartWords;
    const int64_t apart = across_.tiles() * kPartWords;
    first ? Block::clear() : Block::load(sums, apart, kPartWords);
    const bool down_ends = i + 2 >= down_.tiles();
    const int64_t next_i = down_ends ? 0 : i + 2, next_j = down_ends ? j + 2 : j;
    // What comes next is brought to the first-level cache meanwhile: tiles from the second take longer than
    // their products.
    for (int64_t step = 0; step < steps; ++step) {
      const bool last = step + 1 == steps;
      const uint32_t* next_x = last ? x_ + next_i * kTileWords : x + down_.tiles() * kTileWords;
      const uint32_t* next_y = last ? y_ + next_j * kTileWords : y + across_.tiles() * kTileWords;
      int64_t line = 0;
      Block::add(x, kTileWords, y, kTileWords, [&] {
#pragma GCC unroll 16
        for (int64_t k = 0; k < 16; ++k, line += 16) {
          __builtin_prefetch(next_x + line, 0, 3);
          __builtin_prefetch(next_y + line, 0, 3);
        }
      });
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
  const int64_t sum_count_, most_steps_, chunk_rows_;
  StepRows (*const rows_)[kMostSteps + kStepsAhead];
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
