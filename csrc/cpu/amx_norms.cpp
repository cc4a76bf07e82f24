// SPDX-License-Identifier: Apache-2.0
// Squared norms of the weight gradients of linear layers by the tiles of AMX: sums over pairs of tokens,
// where float32's own operations take up to 1.6 times as long. Compiled once.
#include "amx.h"
#include "rows.h"
#include "units_per_sample.h"

WAVEDP_DECLARE_LINEAR_NORMS(avx512)
WAVEDP_DECLARE_LINEAR_NORMS(WAVEDP_ISA)

namespace wavedp::WAVEDP_ISA {
namespace {

// Tiles of tokens whose dot products with as many others are held at a time, and tiles of their entries that
// are taken apart at a time: what two such pieces take stays in the second-level cache.
constexpr int64_t kTilesAcross = 8, kSteps = 4;
constexpr int64_t kTokens = kTilesAcross * kTileRows, kEntries = kSteps * kTileEntries;
// Rows that are summed in float32.
static_assert(kTileRows <= 32);

struct Panel {
  alignas(kLineBytes) uint32_t words[kTilesAcross][kSteps][kTileWords];
};

// Entries [first, first + kEntries) of the tokens from x and from y on, of the inputs or of the gradients.
struct Piece {
  int64_t unit, x, y;
  int side;
  int64_t first;
};

// Takes a piece apart bit by bit, while there is work on the one before.
class Packing {
 public:
  struct Target {
    Panel rows, columns;
  };

  void start(const Sequences& s, int64_t record, const Piece& piece, double* sums, Target* target) {
    rows_ = static_cast<const float*>(s.x) + record * s.stride_batch + piece.first;
    stride_ = s.stride_token;
    count_ = s.width - piece.first < kEntries ? s.width - piece.first : kEntries;
    tokens_ = s.tokens;
    first_ = piece.x;
    second_ = piece.y;
    sums_ = sums && piece.x == piece.y ? sums + piece.first : nullptr;
    target_ = target;
    tile_ = step_ = bit_ = 0;
    of_second_ = piece.x == piece.y;  // which then stands for both
    left_ = steps() * (kBits * tiles(tokens_, second_) + (of_second_ ? 0 : kSplits * tiles(tokens_, first_)));
    begin_tile();
  }

  static int64_t tiles(int64_t tokens, int64_t from) {
    const int64_t rest = tokens - from < kTokens ? tokens - from : kTokens;
    return (rest + kTileRows - 1) / kTileRows;
  }

  // Bits of work that are left.
  int64_t left() const { return left_; }

  void some(int64_t bits) {
    for (; bits > 0 && left_ > 0; --bits) one();
  }

 private:
  static constexpr int64_t kRowsOfBit = 4, kSplits = kTileRows / kRowsOfBit, kBits = kSplits + kTileParts;

  int64_t steps() const { return (count_ + kTileEntries - 1) / kTileEntries; }
  bool same() const { return first_ == second_; }

  void begin_tile() {
    const int64_t token = (of_second_ ? second_ : first_) + tile_ * kTileRows;
    row_ = rows_ + token * stride_ + step_ * kTileEntries;
    row_count_ = tokens_ - token < kTileRows ? tokens_ - token : kTileRows;
    const int64_t count = count_ - step_ * kTileEntries;
    lanes_[0] = lanes(count);
    lanes_[1] = lanes(count - kTileRows);
    words_ = of_second_ && !same() ? scratch_ : target_->rows.words[tile_][step_];
    column_sums_[0] = column_sums_[1] = Floats{};
  }

  __attribute__((noinline)) void one() {
    --left_;
    if (bit_ < kSplits) {
      split(bit_ * kRowsOfBit);
      if (bit_ == kSplits - 1 && sums_) add_sums();
    } else {
      const int64_t part = (bit_ - kSplits) * kPartWords;
      transpose_part(words_ + part, target_->columns.words[tile_][step_] + part);
    }
    if (++bit_ < (of_second_ ? kBits : kSplits)) return;
    bit_ = 0;
    if (++step_ == steps()) {
      step_ = 0;
      if (++tile_ == tiles(tokens_, of_second_ ? second_ : first_)) {
        tile_ = 0;
        of_second_ = true;
      }
    }
    if (left_ > 0) begin_tile();
  }

  static __mmask16 lanes(int64_t count) {
    return static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
  }

  // By variables of its own: what is stored might be any member.
  void split(int64_t from) {
    const int64_t stride = stride_, end = row_count_ < from + kRowsOfBit ? row_count_ : from + kRowsOfBit;
    const float* row = row_ + from * stride;
    uint32_t* words = words_ + from * kTileRows;
    const __mmask16 first = lanes_[0], second = lanes_[1];
    Floats sums[2] = {column_sums_[0], column_sums_[1]};
    int64_t r = from;
    for (; r < end; ++r, row += stride, words += kTileRows) {
      __builtin_prefetch(row + kTileRows * stride, 0, 3);
      __builtin_prefetch(row + kTileRows * stride + kTileRows, 0, 3);
      const Floats x = (Floats)_mm512_maskz_loadu_ps(first, row);
      const Floats y = (Floats)_mm512_maskz_loadu_ps(second, row + kTileRows);
      sums[0] += x;
      sums[1] += y;
      put(Parts(x, y), words);
    }
    for (; r < from + kRowsOfBit; ++r, words += kTileRows) put(Parts(Floats{}, Floats{}), words);
    column_sums_[0] = sums[0];
    column_sums_[1] = sums[1];
  }

  static void put(const Parts& parts, uint32_t* words) {
#pragma GCC unroll 3
    for (int64_t part = 0; part < kTileParts; ++part) store(words + part * kPartWords, parts.words[part]);
  }

  void add_sums() {
    alignas(kLineBytes) float buffer[kTileEntries];
    store(buffer, column_sums_[0]);
    store(buffer + kTileRows, column_sums_[1]);
    const int64_t rest = count_ - step_ * kTileEntries, count = rest < kTileEntries ? rest : kTileEntries;
    for (int64_t c = 0; c < count; ++c) sums_[step_ * kTileEntries + c] += static_cast<double>(buffer[c]);
  }

  alignas(kLineBytes) uint32_t scratch_[kTileWords];
  Floats column_sums_[2];
  const float *rows_ = nullptr, *row_ = nullptr;
  uint32_t* words_ = nullptr;
  int64_t stride_ = 0, count_ = 0, tokens_ = 0, first_ = 0, second_ = 0, row_count_ = 0;
  int64_t tile_ = 0, step_ = 0, bit_ = 0, left_ = 0;
  bool of_second_ = false;
  __mmask16 lanes_[2];
  double* sums_ = nullptr;
  Target* target_ = nullptr;
};

class GramsOfRecords {
 public:
  GramsOfRecords(const LinearNorms& job, double* parts)
      : job_(job), parts_(parts), slices_(slice_count(job)) {
    constexpr int64_t kFixed = 2 * sizeof(Packing::Target) + 2 * kDots * sizeof(float);
    char* memory = static_cast<char*>(lasting_memory(kFixed + job.g.width * sizeof(double)));
    targets_ = reinterpret_cast<Packing::Target*>(memory);
    dots_[0] = reinterpret_cast<float*>(targets_ + 2);
    dots_[1] = dots_[0] + kDots;
    sums_ = reinterpret_cast<double*>(dots_[1] + kDots);
  }

  void run(int64_t begin, int64_t end) {
    Piece now{begin, 0, 0, 0, 0};
    int buffer = 0;
    start(now, buffer);
    packing_.some(packing_.left());
    for (bool more = true; more; buffer = 1 - buffer) {
      Piece next = now;
      more = advance(next, end);
      if (more) start(next, 1 - buffer);
      multiply(now, targets_[buffer]);
      packing_.some(packing_.left());
      conclude(now);
      now = next;
    }
  }

 private:
  static constexpr int64_t kDots = kTilesAcross * kTilesAcross * kPartWords;

  const Sequences& sequences(int side) const { return side == 0 ? job_.a : job_.g; }
  int64_t slice(const Piece& piece) const { return piece.unit % slices_; }
  bool ends_block(const Piece& piece) const {
    return piece.side == 1 && piece.first + kEntries >= job_.g.width;
  }
  bool ends_record(const Piece& piece) const {
    return ends_block(piece) && piece.x + kTokens >= job_.a.tokens;
  }

  bool advance(Piece& piece, int64_t end) const {
    if ((piece.first += kEntries) < sequences(piece.side).width) return true;
    piece.first = 0;
    if (++piece.side < 2) return true;
    piece.side = 0;
    if ((piece.y += kTokens) < job_.a.tokens) return true;
    piece.y = piece.x += kTokens;
    if (piece.x < job_.a.tokens) return true;
    piece.x = piece.y = 0;
    return ++piece.unit < end;
  }

  void start(const Piece& piece, int buffer) {
    double* sums = job_.bias && piece.side == 1 && slice(piece) == 0 ? sums_ : nullptr;
    if (sums && piece.x == 0 && piece.y == 0 && piece.first == 0) {
      for (int64_t c = 0; c < job_.g.width; ++c) sums[c] = 0;
    }
    packing_.start(sequences(piece.side), piece.unit / slices_, piece, sums, targets_ + buffer);
  }

  // Dot products of the tokens from x on with those from y on, those above the diagonal alone where they are
  // the same; of those that this unit has to do.
  void multiply(const Piece& piece, const Packing::Target& target) {
    const int64_t width = sequences(piece.side).width - piece.first;
    const int64_t steps = width < kEntries ? (width + kTileEntries - 1) / kTileEntries : kSteps;
    const int64_t down = Packing::tiles(job_.a.tokens, piece.x),
                  across = Packing::tiles(job_.a.tokens, piece.y);
    const bool same = piece.x == piece.y;
    const int64_t tall_blocks = (down + 1) / 2, wide_blocks = (across + 1) / 2;
    const int64_t blocks = same ? wide_blocks * (wide_blocks + 1) / 2 : tall_blocks * wide_blocks;
    const int64_t pauses = (blocks + slices_ - 1) / slices_ * steps * TileBlock<1, 1, false>::kPauses;
    bits_ = (packing_.left() + pauses - 1) / pauses;
    int64_t block = 0;
    for (int64_t i = 0; i < down; i += 2) {
      for (int64_t j = same ? i : 0; j < across; j += 2) {
        if (block++ % slices_ != slice(piece)) continue;
        const uint32_t *x = target.rows.words[i][0], *y = target.columns.words[j][0];
        float* dots = dots_[piece.side] + (i * kTilesAcross + j) * kPartWords;
        const bool first = piece.first == 0, tall = i + 1 < down, wide = j + 1 < across;
        if (tall && wide) {
          same&& i == j ? multiply<2, 2, true>(x, y, steps, first, dots)
                        : multiply<2, 2, false>(x, y, steps, first, dots);
        } else if (tall) {
          multiply<2, 1, false>(x, y, steps, first, dots);
        } else {
          wide ? multiply<1, 2, false>(x, y, steps, first, dots)
               : multiply<1, 1, false>(x, y, steps, first, dots);
        }
      }
    }
  }

  template <int kRows, int kCols, bool kTriangle>
  void multiply(const uint32_t* x, const uint32_t* y, int64_t steps, bool first, float* dots) {
    using Block = TileBlock<kRows, kCols, kTriangle>;
    constexpr int64_t kApart = kSteps * kTileWords, kDown = kTilesAcross * kPartWords;
    Block::clear();
    for (int64_t step = 0; step < steps; ++step) {
      Block::add(x + step * kTileWords, kApart, y + step * kTileWords, kApart, [&] { packing_.some(bits_); });
    }
    if (first) return Block::store(dots, kDown, kPartWords);
    alignas(kLineBytes) float more[4 * kPartWords];
    Block::store(more, 2 * kPartWords, kPartWords);
    Block::each([&](auto i, auto j) {
      float* sums = dots + i * kDown + j * kPartWords;
      const float* terms = more + (2 * i + j) * kPartWords;
      for (int64_t k = 0; k < kPartWords; k += kTileRows) {
        wavedp::WAVEDP_ISA::store(sums + k, load<Floats>(sums + k) + load<Floats>(terms + k));
      }
    });
  }

  // What the dot products of both sides come to, once they are there.
  void conclude(const Piece& piece) {
    if (!ends_block(piece)) return;
    if (piece.x == 0 && piece.y == 0) {
      squared_ = bound_ = 0;
      ordinary_ = slices_ == 1 || rows_are_ordinary(piece.unit);
    }
    squared_ += sum_of_products(piece);
    if (piece.x == piece.y && slices_ == 1) take_diagonal(piece);
    if (!ends_record(piece)) return;
    if (!ordinary_) return avx512::linear_norms_units(job_, parts_, piece.unit, piece.unit + 1);
    const int64_t record = piece.unit / slices_, count = part_count(job_);
    double* parts = parts_ + record * count;
    for (int64_t k = slice(piece); k < count; k += slices_) parts[k] = 0;
    parts[slice(piece)] = squared_;
    if (slice(piece) != 0) return;
    job_.bound[record] = bound_;
    float* bias = static_cast<float*>(job_.bias) + record * job_.g.width;
    for (int64_t c = 0; job_.bias && c < job_.g.width; ++c) bias[c] = static_cast<float>(sums_[c]);
  }

  // Tiles on the diagonal have both halves, the others stand for those below it too.
  double sum_of_products(const Piece& piece) const {
    const int64_t down = Packing::tiles(job_.a.tokens, piece.x),
                  across = Packing::tiles(job_.a.tokens, piece.y);
    const bool same = piece.x == piece.y;
    double sum = 0;
    int64_t block = 0;
    for (int64_t i = 0; i < down; i += 2) {
      for (int64_t j = same ? i : 0; j < across; j += 2) {
        if (block++ % slices_ != slice(piece)) continue;
        for (int64_t r = i; r < i + 2 && r < down; ++r) {
          for (int64_t c = same && i == j ? r : j; c < j + 2 && c < across; ++c) {
            const int64_t k = (r * kTilesAcross + c) * kPartWords;
            const double product = dot_in_double(dots_[0] + k, dots_[1] + k, kPartWords);
            sum += same && r == c ? product : 2 * product;
          }
        }
      }
    }
    return sum;
  }

  // Squared lengths between which no product that counts overflows or vanishes, and rows of zeros.
  void take_diagonal(const Piece& piece) {
    constexpr double kLeast = 0x1p-60, kMost = 0x1p60;
    const int64_t rest = job_.a.tokens - piece.x, rows = rest < kTokens ? rest : kTokens;
    for (int64_t t = 0; ordinary_ && t < rows; ++t) {
      const int64_t tile = t / kTileRows, row = t % kTileRows;
      const int64_t k = tile * (kTilesAcross + 1) * kPartWords + row * (kTileRows + 1);
      for (int side = 0; side < 2; ++side) {
        const double squared = static_cast<double>(dots_[side][k]);
        ordinary_ =
            ordinary_ && ((squared >= kLeast && squared <= kMost) ||
                          (squared == 0 && size_of(side, piece.unit, piece.x + t).power == RowSize::kZero));
      }
      bound_ += sqrt(static_cast<double>(dots_[0][k]) * static_cast<double>(dots_[1][k]));
    }
  }

  // The same for all rows, and their bound, where units share a record.
  bool rows_are_ordinary(int64_t unit) {
    constexpr int kMost = 30;
    for (int64_t t = 0; t < job_.a.tokens; ++t) {
      const RowSize a = size_of(0, unit, t), g = size_of(1, unit, t);
      for (const int power : {a.power, g.power}) {
        if (power != RowSize::kZero && (power < -kMost || power > kMost)) return false;
      }
      if (a.power == RowSize::kZero || g.power == RowSize::kZero) continue;
      bound_ += a.length * g.length * power_of_two(a.power + g.power);
    }
    return true;
  }

  RowSize size_of(int side, int64_t unit, int64_t token) const {
    const Sequences& s = sequences(side);
    const float* x = static_cast<const float*>(s.x);
    return row_size(x + unit / slices_ * s.stride_batch + token * s.stride_token, s.width);
  }

  const LinearNorms& job_;
  double* const parts_;
  const int64_t slices_;
  Packing::Target* targets_;
  float* dots_[2];
  double* sums_;
  Packing packing_;
  double squared_ = 0, bound_ = 0;
  bool ordinary_ = true;
  int64_t bits_ = 0;
};

// Whether tiles are faster: rows are taken apart first, which pays where each meets many others, or where
// those of per_sample_linear.cpp would be copied as well.
bool gains_by_tiles(const LinearNorms& job) {
  constexpr int64_t kFewestTokens = 80, kFewestOfCopied = 32;
  const auto is_copied = [](const Sequences& s) {
    return s.width % kTileRows != 0 || s.stride_token % 512 == 0;
  };
  const int64_t fewest = is_copied(job.a) || is_copied(job.g) ? kFewestOfCopied : kFewestTokens;
  return costs_less_as_gram(job) && job.a.tokens >= fewest && job.a.dtype == DType::kFloat32 &&
         job.g.dtype == DType::kFloat32;
}

}  // namespace

void linear_norms_units(const LinearNorms& job, double* parts, int64_t begin, int64_t end) {
  if (!gains_by_tiles(job)) return avx512::linear_norms_units(job, parts, begin, end);
  const TileRegisters registers;
  GramsOfRecords(job, parts).run(begin, end);
}

}  // namespace wavedp::WAVEDP_ISA
