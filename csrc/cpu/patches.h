// SPDX-License-Identifier: Apache-2.0
// Rows of coefficients to the patches of a row of tokens, and back. A patch is a run of consecutive elements
// of a token. As many of its rows are moved at a time as make a line of the cache, from its first byte to its
// last.
#pragma once

#include <type_traits>

#include "convert.h"
#include "haar_rows.h"

namespace wavedp::WAVEDP_ISA {
namespace {

constexpr int kMaxBatch = 8;
// Whether vectors are wide enough for analyse_to_tokens and its reverse.
constexpr bool kPairs = kVectorBytes >= kLineBytes / 2;

// The patches of one channel of one row of tokens.
struct Patches {
  int64_t count;          // tokens in the row
  int64_t height, width;  // of a patch
  int64_t token_stride;   // elements from one token to the next

  // Rows of a patch that are moved at a time: more than one where a vector holds a row and a line holds them
  // all.
  int64_t batch(int64_t element) const {
    const int64_t bytes = width * element;
    int64_t rows = 1;
    if (bytes > kVectorBytes || (bytes & (bytes - 1)) != 0) return rows;
    while (rows < kMaxBatch && height % (2 * rows) == 0 && 2 * rows * bytes <= kLineBytes) rows *= 2;
    return rows;
  }
};

// How many of the rows of a batch are transposed at a time: as many as a vector holds rows of patches, so
// that each row of patches of the image turns into a piece of a token in registers. A store and a load of
// other widths would make each load wait for the store.
template <int kBytes, int kRows>
constexpr int kSquare = kRows < kVectorBytes / kBytes ? kRows : kVectorBytes / kBytes;

// A batch of kRows rows, kBytes wide each in a patch (where kRows is 1, a multiple of it), to tokens.
// `change` maps a vector of T to what is stored.
template <int kBytes, int kRows, bool kStream, class T, class Change>
inline void write_rows(const T* rows, int64_t row_stride, const Patches& p, T* tokens, const Change& change) {
  constexpr int64_t kLanes = kBytes / sizeof(T);
  const int64_t count = p.count, width = p.width, token_stride = p.token_stride;
  int64_t i = 0;
  if constexpr (kRows > 1) {
    using V = Vector<T, kVectorBytes>;
    constexpr int kSide = kSquare<kBytes, kRows>, kPiece = kSide * kBytes, kPieces = kVectorBytes / kPiece;
    for (; i + kSide * kPieces <= count; i += kSide * kPieces) {
      V part[kRows];
      for (int r = 0; r < kRows; ++r) part[r] = change(load<V>(rows + r * row_stride + i * width));
      for (int r = 0; r < kRows; r += kSide) transpose<kSide, kLanes>(part + r);
      for (int cell = 0; cell < kSide; ++cell) {
        for (int piece = 0; piece < kPieces; ++piece) {
          T* to = tokens + (i + piece * kSide + cell) * token_stride;
          for (int r = 0; r < kRows; r += kSide, to += kPiece / sizeof(T)) {
            if constexpr (kPieces == 1) {
              put<kStream>(to, part[r + cell]);
            } else {
              std::memcpy(to, reinterpret_cast<const char*>(part + r + cell) + piece * kPiece, kPiece);
            }
          }
        }
      }
    }
  }
  for (; i < count; ++i) {
    for (int r = 0; r < kRows; ++r) {
      const T* from = rows + r * row_stride + i * width;
      T* to = tokens + i * token_stride + r * width;
      for (int64_t c = 0; c < width; c += kLanes) {
        put<kStream>(to + c, change(load<Vector<T, kBytes>>(from + c)));
      }
    }
  }
}

// The reverse, which also asks for the line `ahead` elements on: tokens are too far from one another for the
// hardware to see where they go.
template <int kBytes, int kRows, class T, class Change>
inline void read_rows(const T* tokens, const Patches& p, T* rows, int64_t row_stride, int64_t ahead,
                      const Change& change) {
  constexpr int64_t kLanes = kBytes / sizeof(T);
  const int64_t count = p.count, width = p.width, token_stride = p.token_stride;
  int64_t i = 0;
  if constexpr (kRows > 1 && kSquare<kBytes, kRows> * kBytes == kVectorBytes) {
    using V = Vector<T, kVectorBytes>;
    constexpr int kSide = kSquare<kBytes, kRows>;
    for (; i + kSide <= count; i += kSide) {
      V part[kRows];
      for (int cell = 0; cell < kSide; ++cell) {
        const T* from = tokens + (i + cell) * token_stride;
        __builtin_prefetch(from + ahead, 0, 2);
        for (int r = 0; r < kRows; r += kSide, from += kVectorBytes / sizeof(T)) {
          part[r + cell] = change(load<V>(from));
        }
      }
      for (int r = 0; r < kRows; r += kSide) transpose<kSide, kLanes>(part + r);
      for (int r = 0; r < kRows; ++r) store(rows + r * row_stride + i * width, part[r]);
    }
  }
  for (; i < count; ++i) {
    for (int r = 0; r < kRows; ++r) {
      const T* from = tokens + i * token_stride + r * width;
      T* to = rows + r * row_stride + i * width;
      for (int64_t c = 0; c < width; c += kLanes) {
        __builtin_prefetch(from + c + ahead, 0, 2);
        store(to + c, change(load<Vector<T, kBytes>>(from + c)));
      }
    }
  }
}

// Where the details of one level lie, LH, HL and HH.
template <class T>
struct DetailPatches {
  T* tokens[3];
  std::remove_const_t<T> shift[3], scaling[3];
  int64_t token_stride;
};

// Two rows of level 1 from four rows of an image, to tokens whose patches have rows of half a line: a line is
// written as soon as it is known. `cells` is a multiple of what one step takes. Written from rows in memory,
// as write_rows does it, lines come in bursts that the core has to wait for.
template <bool kStream, class Real>
void analyse_to_tokens(const Real* image, int64_t row_stride, int64_t cells, Real factor, Real* low,
                       Real* next_low, const DetailPatches<Real> to) {
  using V = Vector<Real, kVectorBytes>;
  constexpr int64_t kLanes = kVectorBytes / sizeof(Real), kWidth = kLineBytes / 2 / sizeof(Real);
  constexpr int kSide = kPairs ? kVectorBytes / (kLineBytes / 2) : 1;
  const int64_t ahead = 8 * row_stride;  // half that was 5 % slower, and the first-level cache 50 %
  Real *lh = to.tokens[0], *hl = to.tokens[1], *hh = to.tokens[2];
  for (int64_t j = 0; j < cells; j += kLanes) {
    V part[3][2];
    for (int pair = 0; pair < 2; ++pair) {
      const Real *t = image + 2 * pair * row_stride + 2 * j, *b = t + row_stride;
      for (int64_t c = 0; c < 2 * kLanes; c += kLineBytes / sizeof(Real)) {
        __builtin_prefetch(t + ahead + c, 0, 2);
        __builtin_prefetch(b + ahead + c, 0, 2);
      }
      const V t0 = load<V>(t), t1 = load<V>(t + kLanes), b0 = load<V>(b), b1 = load<V>(b + kLanes);
      const auto [low_even, low_odd] = parted<V>(t0 + b0, t1 + b1);
      const auto [high_even, high_odd] = parted<V>(t0 - b0, t1 - b1);
      store(pair == 0 ? low + j : next_low + j, factor * (low_even + low_odd));
      part[0][pair] = (factor * (high_even + high_odd) - to.shift[0]) * to.scaling[0];
      part[1][pair] = (factor * (low_even - low_odd) - to.shift[1]) * to.scaling[1];
      part[2][pair] = (factor * (high_even - high_odd) - to.shift[2]) * to.scaling[2];
    }
    for (int b = 0; b < 3; ++b) transpose<kSide, kWidth>(part[b]);
    for (int cell = 0; cell < kSide; ++cell) {
      for (int v = 0; v < 2 / kSide; ++v) put<kStream>(lh + v * kLanes, part[0][cell + v]);
      for (int v = 0; v < 2 / kSide; ++v) put<kStream>(hl + v * kLanes, part[1][cell + v]);
      for (int v = 0; v < 2 / kSide; ++v) put<kStream>(hh + v * kLanes, part[2][cell + v]);
      lh += to.token_stride;
      hl += to.token_stride;
      hh += to.token_stride;
    }
  }
}

// The reverse: four rows of an image from two rows of LL of level 1 and the tokens of its details. The next
// row of tokens lies `ahead` elements on.
template <bool kStream, class Real>
void synthesise_from_tokens(const Real* low, const Real* next_low, const DetailPatches<const Real> from,
                            int64_t ahead, int64_t cells, Real factor, Real* image, int64_t row_stride) {
  using V = Vector<Real, kVectorBytes>;
  constexpr int64_t kLanes = kVectorBytes / sizeof(Real), kWidth = kLineBytes / 2 / sizeof(Real);
  constexpr int kSide = kPairs ? kVectorBytes / (kLineBytes / 2) : 1;
  const Real* tokens[3] = {from.tokens[0], from.tokens[1], from.tokens[2]};
  for (int64_t j = 0; j < cells; j += kLanes) {
    V part[3][2];
    for (int b = 0; b < 3; ++b) {
      for (int cell = 0; cell < kSide; ++cell, tokens[b] += from.token_stride) {
        __builtin_prefetch(tokens[b] + ahead, 0, 2);
        for (int v = 0; v < 2 / kSide; ++v) {
          part[b][cell + v] = load<V>(tokens[b] + v * kLanes) * from.scaling[b] + from.shift[b];
        }
      }
      transpose<kSide, kWidth>(part[b]);
    }
    for (int pair = 0; pair < 2; ++pair) {
      const Block<V> x = synthesise(
          Bands<V>{load<V>((pair == 0 ? low : next_low) + j), part[0][pair], part[1][pair], part[2][pair]},
          factor);
      Real *top = image + 2 * pair * row_stride + 2 * j, *bottom = top + row_stride;
      const auto [a, b] = joined<V>(x.a, x.b);
      put<kStream>(top, a);
      put<kStream>(top + kLanes, b);
      const auto [c, d] = joined<V>(x.c, x.d);
      put<kStream>(bottom, c);
      put<kStream>(bottom + kLanes, d);
    }
  }
}

// Calls with(bytes, rows) for what a batch of rows of patches of this width is moved by: where there are more
// rows than one, `bytes` is the whole width.
template <class T, int kBytes = kVectorBytes, class With>
inline void by_shape(int64_t width, int64_t rows, const With& with) {
  if constexpr (kBytes < static_cast<int>(sizeof(T))) {
    __builtin_unreachable();
  } else {
    constexpr std::integral_constant<int, kBytes> bytes;
    const int64_t size = width * sizeof(T);
    if (size % kBytes) return by_shape<T, kBytes / 2>(width, rows, with);
    if (rows == 1) return with(bytes, std::integral_constant<int, 1>());
    if (size != kBytes) return by_shape<T, kBytes / 2>(width, rows, with);
    if (rows == 2) return with(bytes, std::integral_constant<int, 2>());
    if (rows == 4) return with(bytes, std::integral_constant<int, 4>());
    return with(bytes, std::integral_constant<int, kMaxBatch>());
  }
}

}  // namespace
}  // namespace wavedp::WAVEDP_ISA
