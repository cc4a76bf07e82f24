// SPDX-License-Identifier: Apache-2.0
// Squared norms of the weight gradients of a linear layer. Compiled once for each instruction set, see
// wavelet.cpp; contraction to fused multiply-adds is on.
#include "tiles.h"
#include "units_per_sample.h"

WAVEDP_DECLARE_PER_SAMPLE(WAVEDP_ISA)

namespace wavedp::WAVEDP_ISA {
namespace {

// Tokens whose dot products with as many others are held at a time, and entries of a row, which with the rows
// of a tile beside it stay in the first-level cache.
constexpr int64_t kBlockTokens = 128, kChunkBytes = 4096;
// Tokens that are summed in the type of the arithmetic.
constexpr int64_t kOuterTokens = 4096;
// Rows that are summed in the type of the arithmetic.
constexpr int64_t kBiasRows = 32;

inline int64_t rounded_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// Asks for the memory of the next record bit by bit while there is work on this one.
class Ahead {
 public:
  Ahead(const void* start, int64_t bytes, int64_t times)
      : next_(static_cast<const char*>(start)),
        end_(start ? next_ + bytes : next_),
        each_(rounded_up(bytes / times, kLineBytes)) {}

  void ask() {
    const char* end = end_ - next_ < each_ ? end_ : next_ + each_;
    for (; next_ < end; next_ += kLineBytes) __builtin_prefetch(next_, 0, 2);
  }

 private:
  const char *next_, *end_;
  int64_t each_;
};

template <class Real>
class LinearNormsOfRecords {
 public:
  LinearNormsOfRecords(const LinearNorms& job, double* parts)
      : job_(job),
        parts_(parts),
        slices_(slice_count(job)),
        gram_(costs_less_as_gram(job)),
        in_place_(gram_ && slices_ == 1 && job.a.tokens <= kBlockTokens && can_stay(job.a) &&
                  can_stay(job.g)),
        tokens_(job.a.tokens),
        sizes_(4 * Scratch<double>::room(tokens_)),
        lengths_{sizes_.take(tokens_), sizes_.take(tokens_)},
        powers_{reinterpret_cast<int*>(sizes_.take(tokens_)), reinterpret_cast<int*>(sizes_.take(tokens_))},
        widest_(job.a.width > job.g.width ? job.a.width : job.g.width),
        scratch_(Scratch<Real>::room(widest_) + 3 * Scratch<Real>::room(job.bias ? job.g.width : 0) +
                 room_of_tiles()),
        row_(scratch_.take(widest_)),
        bias_part_(scratch_.take(job.bias ? job.g.width : 0)),
        bias_total_(reinterpret_cast<double*>(scratch_.take(job.bias ? 2 * job.g.width : 0))) {
    if (gram_) {
      for (Real*& block : blocks_) block = scratch_.take(kBlockTokens * stride());
      for (Real*& dots : dots_) dots = scratch_.take(kBlockTokens * kBlockTokens);
    } else {
      for (int side = 0; side < 2; ++side) {
        panels_[side] = scratch_.take(tokens_ * rounded_up(sequences(side).width, kPanel));
      }
    }
  }

  void run(int64_t unit) {
    record_ = unit / slices_;
    slice_ = unit % slices_;
    if (in_place_ && gram_in_place()) return;
    for (int side = 0; side < 2; ++side) measure(side);
    if (slice_ == 0 && job_.bias) add_up_bias();
    double bound = 0;
    int peak = RowSize::kZero;
    bool finite = true;
    for (int64_t t = 0; t < tokens_; ++t) {
      const int power_a = powers_[0][t], power_g = powers_[1][t];
      finite = finite && power_a != RowSize::kNotFinite && power_g != RowSize::kNotFinite;
      if (!finite || power_a == RowSize::kZero || power_g == RowSize::kZero) continue;
      const int power = power_a + power_g;
      bound += lengths_[0][t] * lengths_[1][t] * power_of_two(power);
      if (power > peak) peak = power;
    }
    if (!finite) bound = NAN;
    if (slice_ == 0) job_.bound[record_] = bound;
    double* parts = parts_ + record_ * part_count(job_);
    if (!finite || peak == RowSize::kZero || tokens_ == 1) {
      if (slice_ == 0) parts[0] = bound * bound;
      return;
    }
    peak_ = peak;
    gram_ ? gram(parts) : products(parts);
  }

 private:
  static constexpr int64_t kChunk = kChunkBytes / sizeof(Real), kPanel = kOuterVectors * kLanes<Real>;

  const Sequences& sequences(int side) const { return side == 0 ? job_.a : job_.g; }

  // Whether rows can be multiplied where they are: whole vectors of the type of the arithmetic, and not all
  // on the same sets of the cache.
  static bool can_stay(const Sequences& s) {
    const bool spread = s.tokens <= 4 * kDotRows || s.stride_token * sizeof(Real) % 2048 != 0;
    return s.dtype == kNative<Real> && s.width % kLanes<Real> == 0 && spread;
  }

  const Real* rows_in_place(int side) const {
    const Sequences& s = sequences(side);
    return static_cast<const Real*>(s.x) + record_ * s.stride_batch;
  }

  // Of rows of a block: staggered, so that they do not all fall on the same sets of the cache.
  int64_t stride() const {
    const int64_t chunk = widest_ < kChunk ? rounded_up(widest_, kLanes<Real>) : kChunk;
    return Scratch<Real>::room(chunk);
  }

  int64_t room_of_tiles() const {
    if (gram_) {
      return 2 * Scratch<Real>::room(kBlockTokens * stride()) +
             2 * Scratch<Real>::room(kBlockTokens * kBlockTokens);
    }
    return Scratch<Real>::room(tokens_ * rounded_up(job_.a.width, kPanel)) +
           Scratch<Real>::room(tokens_ * rounded_up(job_.g.width, kPanel));
  }

  void measure(int side) {
    const Sequences& s = sequences(side);
    for (int64_t t = 0; t < tokens_; ++t) {
      const RowSize size = row_size(wide_row(s, record_, t, 0, s.width, row_), s.width);
      powers_[side][t] = size.power;
      lengths_[side][t] = size.length;
    }
  }

  void add_up_bias() {
    const int64_t p = job_.g.width;
    if (in_place_ && tokens_ <= kBiasRows) return add_up_bias_in_place();
    for (int64_t c = 0; c < p; ++c) bias_total_[c] = 0;
    for (int64_t first = 0; first < tokens_; first += kBiasRows) {
      const int64_t end = first + kBiasRows < tokens_ ? first + kBiasRows : tokens_;
      for (int64_t c = 0; c < p; ++c) bias_part_[c] = 0;
      for (int64_t t = first; t < end; ++t) add_row(wide_row(job_.g, record_, t, 0, p, row_), p, bias_part_);
      for (int64_t c = 0; c < p; ++c) bias_total_[c] += static_cast<double>(bias_part_[c]);
    }
    Real* bias = static_cast<Real*>(job_.bias) + record_ * p;
    for (int64_t c = 0; c < p; ++c) bias[c] = static_cast<Real>(bias_total_[c]);
  }

  void add_up_bias_in_place() {
    using V = Lane<Real>;
    constexpr int64_t n = kLanes<Real>;
    const Real* rows = rows_in_place(1);
    const int64_t p = job_.g.width, stride = job_.g.stride_token;
    Real* bias = static_cast<Real*>(job_.bias) + record_ * p;
    int64_t c = 0;
    for (; c + 4 * n <= p; c += 4 * n) {
      V sums[4] = {};
      for (int64_t t = 0; t < tokens_; ++t) {
        for (int u = 0; u < 4; ++u) sums[u] += load<V>(rows + t * stride + c + u * n);
      }
      for (int u = 0; u < 4; ++u) store(bias + c + u * n, sums[u]);
    }
    for (; c < p; c += n) {
      V sum{};
      for (int64_t t = 0; t < tokens_; ++t) sum += load<V>(rows + t * stride + c);
      store(bias + c, sum);
    }
  }

  // Whether the token has a part in the result, and the power of two that its row is multiplied by: a_t is
  // brought to [1, 2), g_t to its share of the largest product.
  bool counts(int64_t t) const { return powers_[0][t] != RowSize::kZero && powers_[1][t] != RowSize::kZero; }
  PowerOfTwo<Real> scale_of(int side, int64_t t) const {
    return PowerOfTwo<Real>(side == 0 ? -powers_[0][t] : powers_[0][t] - peak_);
  }

  // Entries [first, first + count) of the tokens from `token` on, and rows of zeros to a whole tile.
  void pack(int side, int64_t token, int64_t rows, int64_t first, int64_t count, Real* block) {
    const int64_t padded = rounded_up(rows, kDotRows);
    for (int64_t r = 0; r < padded; ++r) {
      Real* target = block + r * stride();
      if (r < rows && counts(token + r)) {
        const Real* source = wide_row(sequences(side), record_, token + r, first, count, row_);
        scale_row(source, count, scale_of(side, token + r), target);
      } else {
        clear_row(target, count);
      }
    }
  }

  bool is_mine(int64_t part) const { return part % slices_ == slice_; }

  // Dot products of the rows from `x_token` on with those from `y_token` on, those above the diagonal alone
  // where they are the same. A tile's are together, tiles of a row of tiles follow one another.
  void dot_products(int side, int64_t x_token, int64_t x_rows, int64_t y_token, int64_t y_rows, Real* dots) {
    const int64_t width = sequences(side).width;
    for (int64_t first = 0; first < width; first += kChunk) {
      const int64_t count = width - first < kChunk ? width - first : kChunk;
      const int64_t padded = rounded_up(count, kLanes<Real>);
      pack(side, x_token, x_rows, first, count, blocks_[0]);
      const bool same = x_token == y_token;
      if (!same) pack(side, y_token, y_rows, first, count, blocks_[1]);
      const Real* columns = blocks_[same ? 0 : 1];
      for (int64_t i = 0; i < x_rows; i += kDotRows) {
        if (!is_mine((x_token + i) / kDotRows)) continue;
        const Real* rows = blocks_[0] + i * stride();
        for (int64_t j = same ? i : 0; j < y_rows; j += kDotCols) {
          Real* tile = dots + i * kBlockTokens + j * kDotRows;
          if (first == 0) {
            dot_tile<false>(rows, columns + j * stride(), stride(), padded, tile);
          } else {
            dot_tile<true>(rows, columns + j * stride(), stride(), padded, tile);
          }
        }
      }
    }
  }

  // sum_ts (a_t . a_s) (g_t . g_s): once for t = s, twice for t < s.
  void gram(double* parts) {
    for (int64_t x = 0; x < tokens_; x += kBlockTokens) {
      const int64_t x_rows = tokens_ - x < kBlockTokens ? tokens_ - x : kBlockTokens;
      for (int64_t i = 0; i < x_rows; i += kDotRows) {
        if (is_mine((x + i) / kDotRows)) parts[(x + i) / kDotRows] = 0;
      }
      for (int64_t y = x; y < tokens_; y += kBlockTokens) {
        const int64_t y_rows = tokens_ - y < kBlockTokens ? tokens_ - y : kBlockTokens;
        for (int side = 0; side < 2; ++side) dot_products(side, x, x_rows, y, y_rows, dots_[side]);
        for (int64_t i = 0; i < x_rows; i += kDotRows) {
          if (is_mine((x + i) / kDotRows)) parts[(x + i) / kDotRows] += row_of_tiles(i, x == y, y_rows);
        }
      }
    }
    const int64_t count = part_count(job_);
    for (int64_t k = 0; k < count; ++k) {
      if (is_mine(k)) parts[k] = ldexp(parts[k], 2 * peak_);
    }
  }

  double row_of_tiles(int64_t i, bool diagonal, int64_t y_rows) const {
    double sum = 0;
    int64_t j = 0;
    if (diagonal) {
      for (j = i; j < i + kDotRows && j < y_rows; j += kDotCols) {
        const int64_t tile = i * kBlockTokens + j * kDotRows;
        for (int64_t r = 0; r < kDotRows; ++r) {
          for (int64_t c = 0; c < kDotCols; ++c) {
            const int64_t k = tile + r * kDotCols + c;
            const double product = static_cast<double>(dots_[0][k]) * static_cast<double>(dots_[1][k]);
            if (j + c >= i + r) sum += j + c == i + r ? product : 2 * product;
          }
        }
      }
    }
    if (j >= y_rows) return sum;
    const int64_t first = i * kBlockTokens + j * kDotRows;
    const int64_t count = rounded_up(y_rows - j, kDotCols) * kDotRows;
    return sum + 2 * dot_in_double(dots_[0] + first, dots_[1] + first, count);
  }

  // gram() of rows as they are, with the bound from the diagonal, and the bias: few short rows are read once.
  // False where a row is so large or small that it has to be scaled, or not finite; nothing is written then.
  bool gram_in_place() {
    double bound = 0;
    for (int side = 0; side < 2; ++side) dot_products_in_place(side);
    for (int64_t t = 0; t < tokens_; ++t) {
      const int64_t k = place_of(t, t);
      if (!is_ordinary(0, t, dots_[0][k]) || !is_ordinary(1, t, dots_[1][k])) return false;
      bound += sqrt(static_cast<double>(dots_[0][k]) * static_cast<double>(dots_[1][k]));
    }
    double* parts = parts_ + record_ * part_count(job_);
    const int64_t count = part_count(job_);
    parts[0] = tokens_ == 1 ? bound * bound : sum_of_products();
    for (int64_t k = 1; k < count; ++k) parts[k] = 0;
    job_.bound[record_] = bound;
    if (job_.bias) add_up_bias();
    return true;
  }

  static int64_t place_of(int64_t t, int64_t s) {
    return t / kDotRows * kDotRows * kBlockTokens + s / kDotCols * kDotTile + t % kDotRows * kDotCols +
           s % kDotCols;
  }

  // Squared lengths between which no product that counts overflows or vanishes, and rows of zeros.
  bool is_ordinary(int side, int64_t t, Real squared) {
    constexpr int kPower = sizeof(Real) == 8 ? 400 : 60;
    if (squared >= power_of_two(-kPower) && squared <= power_of_two(kPower)) return true;
    if (squared != 0) return false;
    const Sequences& s = sequences(side);
    return row_size(rows_in_place(side) + t * s.stride_token, s.width).power == RowSize::kZero;
  }

  void dot_products_in_place(int side) {
    const Sequences& s = sequences(side);
    const Real* rows = rows_in_place(side);
    Real* dots = dots_[side];
    const int64_t across = rounded_up(tokens_, kDotRows) / kDotRows;
    const int64_t tiles = across * (across + 1) / 2 * (kDotRows / kDotCols);
    Ahead next(record_ + 1 < s.batch ? rows + s.stride_batch : nullptr, tokens_ * s.width * sizeof(Real),
               tiles);
    for (int64_t first = 0; first < s.width; first += kChunk) {
      const int64_t count = s.width - first < kChunk ? s.width - first : kChunk;
      for (int64_t i = 0; i < tokens_; i += kDotRows) {
        const Real *x[kDotRows], *y[kDotCols];
        for (int64_t r = 0; r < kDotRows; ++r) x[r] = rows + clamped(i + r) * s.stride_token + first;
        for (int64_t j = i; j < tokens_; j += kDotCols) {
          for (int64_t c = 0; c < kDotCols; ++c) y[c] = rows + clamped(j + c) * s.stride_token + first;
          Real* tile = dots + i * kBlockTokens + j * kDotRows;
          first == 0 ? dot_tile<false>(x, y, count, tile) : dot_tile<true>(x, y, count, tile);
          next.ask();
        }
      }
    }
    if (tokens_ % kDotRows == 0) return;
    // What rows beyond the last gave, which were taken from it.
    for (int64_t t = 0; t < rounded_up(tokens_, kDotRows); ++t) {
      const int64_t begin = t / kDotRows * kDotRows, end = rounded_up(tokens_, kDotCols);
      for (int64_t u = begin; u < end; ++u) {
        if (t >= tokens_ || u >= tokens_) dots[place_of(t, u)] = 0;
      }
    }
  }

  int64_t clamped(int64_t t) const { return t < tokens_ ? t : tokens_ - 1; }

  // Tiles on the diagonal have both halves, the others stand for those below it too.
  double sum_of_products() const {
    constexpr int64_t n = kLanes<double>;
    static_assert(kDotRows * kDotRows % n == 0 && kDotTile % n == 0);
    Doubles once{}, twice{};
    for (int64_t i = 0; i < tokens_; i += kDotRows) {
      const int64_t first = i * kBlockTokens, end = first + rounded_up(tokens_, kDotCols) * kDotRows;
      int64_t k = first + i * kDotRows;
      const int64_t square = k + kDotRows * kDotRows < end ? k + kDotRows * kDotRows : end;
      for (; k < square; k += n) once += load_doubles(dots_[0] + k) * load_doubles(dots_[1] + k);
      for (; k < end; k += n) twice += load_doubles(dots_[0] + k) * load_doubles(dots_[1] + k);
    }
    return lane_sum(once) + 2 * lane_sum(twice);
  }

  // The sum of squares of sum_t g_t a_t^T, by tiles with the narrower side down.
  void products(double* parts) {
    const int down = job_.a.width < job_.g.width ? 0 : 1, across = 1 - down;
    for (int side = 0; side < 2; ++side) pack_panels(side);
    const int64_t rows = sequences(down).width, columns = sequences(across).width;
    const int64_t each = kOuterRows / kRowsPerPart, count = part_count(job_);
    for (int64_t i = 0; i < rows; i += kOuterRows) {
      const int64_t part = i / kRowsPerPart;
      if (!is_mine(part / each)) continue;
      double sum = 0;
      const Real* x = panels_[down] + i / kPanel * kPanel * tokens_ + i % kPanel;
      for (int64_t j = 0; j < columns; j += kPanel) sum += squares(x, panels_[across] + j * tokens_);
      parts[part] = ldexp(sum, 2 * peak_);
      for (int64_t k = part + 1; k < part + each && k < count; ++k) parts[k] = 0;
    }
  }

  void pack_panels(int side) {
    const Sequences& s = sequences(side);
    for (int64_t t = 0; t < tokens_; ++t) {
      const Real* row = counts(t) ? wide_row(s, record_, t, 0, s.width, row_) : nullptr;
      const PowerOfTwo<Real> scale = counts(t) ? scale_of(side, t) : PowerOfTwo<Real>(0);
      for (int64_t c = 0; c < s.width; c += kPanel) {
        Real* target = panels_[side] + c * tokens_ + t * kPanel;
        const int64_t count = s.width - c < kPanel ? s.width - c : kPanel;
        if (!row || count < kPanel) clear_row(target, kPanel);
        if (row) scale_row(row + c, count, scale, target);
      }
    }
  }

  double squares(const Real* x, const Real* y) const {
    constexpr int64_t kTile = kOuterRows * kPanel;
    alignas(kLineBytes) Real tile[kTile];
    if (tokens_ <= kOuterTokens) {
      outer_tile(x, y, tokens_, tile);
      return dot_in_double(tile, tile, kTile);
    }
    double total[kTile] = {};
    for (int64_t t = 0; t < tokens_; t += kOuterTokens) {
      outer_tile(x + t * kPanel, y + t * kPanel, tokens_ - t < kOuterTokens ? tokens_ - t : kOuterTokens,
                 tile);
      for (int64_t k = 0; k < kTile; ++k) total[k] += static_cast<double>(tile[k]);
    }
    return dot_in_double(total, total, kTile);
  }

  const LinearNorms& job_;
  double* const parts_;
  const int64_t slices_;
  const bool gram_, in_place_;
  const int64_t tokens_;
  Scratch<double> sizes_;
  double* const lengths_[2];
  int* const powers_[2];
  const int64_t widest_;
  Scratch<Real> scratch_;
  Real* const row_;
  Real* const bias_part_;
  double* const bias_total_;
  Real *blocks_[2], *dots_[2], *panels_[2];
  int64_t record_ = 0, slice_ = 0;
  int peak_ = 0;
};

template <class Real>
void run_units(const LinearNorms& job, double* parts, int64_t begin, int64_t end) {
  LinearNormsOfRecords<Real> records(job, parts);
  for (int64_t unit = begin; unit < end; ++unit) records.run(unit);
}

}  // namespace

void linear_norms_units(const LinearNorms& job, double* parts, int64_t begin, int64_t end) {
  job.wide() ? run_units<double>(job, parts, begin, end) : run_units<float>(job, parts, begin, end);
}

}  // namespace wavedp::WAVEDP_ISA
