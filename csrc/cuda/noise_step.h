// SPDX-License-Identifier: Apache-2.0
// What one thread of a step does, and the table of tensors that it reads.
//
// A thread makes one block of the noise of each of its groups, and of every row of sixteen the number in its
// column. So the sixteen threads of a group read and write whole rows, which are two sectors of float32 or
// one of 16 bits, and no number goes from one thread to another, to shared memory or to memory. Wider
// accesses would spare a few of some two hundred instructions an element, and cost a transposition. Registers
// that held the key or its noise are not wiped: CUDA has no means to.
#pragma once

#include "noise_rules.h"

namespace wavedp {
namespace {

// Whether all tensors of a step are of one kind, for which there is a kernel without branches: parameters of
// float32, or of bfloat16 rounded to nearest, sums of float32, all or none with a first moment, and nothing
// else.
enum class StepForm : int { kFloat32, kBFloat16, kAny, kAnyAtRandom };
constexpr int kMomentum = 4;  // added to the form's number

template <class Real>
struct StepRow {
  void* param;
  const void* total;
  Real *first, *second, *largest, *average;
  float* master;
  DType dtype, total_dtype;
  bool taken;  // not of the other precision
  bool stochastic, has_total, momentum;
  RuleConstants<Real> constants;
};

// In device memory: starts[tensors + 1], then the rows.
constexpr int64_t kTableAlignment = 16;
inline int64_t rows_offset(int64_t tensors) {
  return ((tensors + 1) * static_cast<int64_t>(sizeof(int64_t)) + kTableAlignment - 1) / kTableAlignment *
         kTableAlignment;
}

template <class Real>
void fill_table(const NoiseStep& job, char* table) {
  std::memcpy(table, job.starts, (job.count + 1) * sizeof(int64_t));
  for (int64_t t = 0; t < job.count; ++t) {
    const StepTensor& from = job.tensors[t];
    StepRow<Real> row{};
    row.param = from.param;
    row.total = from.total;
    row.first = static_cast<Real*>(from.first);
    row.second = static_cast<Real*>(from.second);
    row.largest = static_cast<Real*>(from.largest);
    row.average = static_cast<Real*>(from.average);
    row.master = from.master;
    row.dtype = from.dtype;
    row.total_dtype = from.total_dtype;
    row.taken = (from.dtype == DType::kFloat64) == job.wide;
    row.stochastic = from.stochastic;
    row.has_total = from.total != nullptr;
    row.momentum = from.first != nullptr;
    row.constants = RuleConstants<Real>(from.constants);
    std::memcpy(table + rows_offset(job.count) + t * sizeof row, &row, sizeof row);
  }
}

// The form of a job's tensors, and kMomentum.
inline int form_of(const NoiseStep& job) {
  bool random = false, plain = !job.wide, momentum = false, seen = false;
  DType dtype = DType::kFloat32;
  for (int64_t t = 0; t < job.count; ++t) {
    const StepTensor& one = job.tensors[t];
    if (job.starts[t] == job.starts[t + 1]) continue;
    random = random || one.stochastic;
    plain = plain && (!seen || (one.dtype == dtype && (one.first != nullptr) == momentum)) &&
            (one.dtype == DType::kFloat32 || one.dtype == DType::kBFloat16) && one.total &&
            one.total_dtype == DType::kFloat32 && !one.largest && !one.average && !one.master &&
            !one.stochastic && !(one.constants.least_square > 0);
    dtype = one.dtype;
    momentum = one.first != nullptr;
    seen = true;
  }
  const StepForm form = random                      ? StepForm::kAnyAtRandom
                        : !plain                    ? StepForm::kAny
                        : dtype == DType::kBFloat16 ? StepForm::kBFloat16
                                                    : StepForm::kFloat32;
  return static_cast<int>(form) + (plain && momentum ? kMomentum : 0);
}

struct StepGrid {
  const uint32_t* key;
  uint64_t offset;
  uint32_t step;
  int run;                  // groups of a thread, one after the other
  int64_t groups, skipped;  // numbers of the first group before the first element
  const int64_t* starts;
  const void* rows;
  int64_t tensors;
  bool momentum;  // of all, in a kernel without branches
  MeanRule mean;
};

// From so many groups on a thread takes several, one after the other: it spares blocks of random bits.
constexpr int64_t kManyGroups = 1 << 17;

// Of a job whose key and table are in device memory.
inline StepGrid step_grid(const NoiseStep& job, const void* table, int64_t elements, int form) {
  const int64_t group = job.strict ? kStrictGroupNormals : kGroupNormals;
  const bool random = static_cast<StepForm>(form % kMomentum) == StepForm::kAnyAtRandom;
  StepGrid grid{};
  grid.key = reinterpret_cast<const uint32_t*>(job.stream.key);
  grid.offset = job.stream.offset;
  grid.step = job.stream.step;
  grid.skipped = static_cast<int64_t>(grid.offset % static_cast<uint64_t>(group));
  grid.groups = elements / group + (elements % group + grid.skipped + group - 1) / group;
  grid.run = grid.groups < kManyGroups ? 1 : random ? 16 : 2;
  grid.starts = static_cast<const int64_t*>(table);
  grid.rows = static_cast<const char*>(table) + rows_offset(job.count);
  grid.tensors = job.count;
  grid.momentum = form >= kMomentum;
  grid.mean = MeanRule(job.std, job.grid, job.divisor);
  return grid;
}

// The tensor that holds `element`, from tensor `low` on.
WAVEDP_DEVICE inline int64_t holder(const StepGrid& grid, int64_t low, int64_t element) {
  int64_t high = grid.tensors - 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (grid.starts[middle + 1] <= element) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The row of a tensor, with what the form tells of it for the compiler.
template <StepForm kForm, class Real>
WAVEDP_DEVICE inline StepRow<Real> row_of(const StepGrid& grid, int64_t tensor) {
  StepRow<Real> row = static_cast<const StepRow<Real>*>(grid.rows)[tensor];
  if constexpr (kForm == StepForm::kFloat32 || kForm == StepForm::kBFloat16) {
    row.largest = row.average = nullptr;
    row.master = nullptr;
    row.dtype = kForm == StepForm::kFloat32 ? DType::kFloat32 : DType::kBFloat16;
    row.total_dtype = DType::kFloat32;
    row.taken = row.has_total = true;
    row.stochastic = false;
    row.momentum = grid.momentum;
    row.constants.least_square = 0;
  } else if constexpr (kForm == StepForm::kAny) {
    row.stochastic = false;
  }
  return row;
}

// What a step reads of one element, before it is widened: so nothing waits for memory yet.
template <class Real>
struct Element {
  Real param, first, second;
  uint16_t half;
  float total;
  double wide_total;
};

template <StepRule kRule, class Real>
WAVEDP_DEVICE inline void read(const StepRow<Real>& row, int64_t i, Element<Real>& x) {
  if (sizeof(Real) == 8 || row.dtype == DType::kFloat32) {
    x.param = read_once(static_cast<const Real*>(row.param) + i);
  } else if (row.master) {
    x.param = static_cast<Real>(read_once(row.master + i));
  } else {
    x.half = read_once(static_cast<const uint16_t*>(row.param) + i);
  }
  if (row.has_total) {
    if (row.total_dtype == DType::kFloat64) {
      x.wide_total = read_once(static_cast<const double*>(row.total) + i);
    } else {
      x.total = read_once(static_cast<const float*>(row.total) + i);
    }
  }
  if (kRule == StepRule::kAdam || row.momentum) x.first = read_once(row.first + i);
  if (kRule == StepRule::kAdam) x.second = read_once(row.second + i);
}

template <NormalKind kKind, StepRule kRule, class Real>
WAVEDP_DEVICE inline void update(const StepGrid& grid, const StepRow<Real>& row, int64_t i, Element<Real>& x,
                                 double normal, uint32_t random) {
  const bool wide_total = row.total_dtype == DType::kFloat64;
  const double total = !row.has_total ? 0.0 : wide_total ? x.wide_total : static_cast<double>(x.total);
  const bool half = sizeof(Real) == 4 && row.dtype != DType::kFloat32;
  Real mean, param = half && !row.master ? static_cast<Real>(widened(row.dtype, x.half)) : x.param;
  divide(grid.mean, noisy_sum<kKind>(grid.mean, total, normal), mean);
  if constexpr (kRule == StepRule::kSgd) {
    param = sgd(row.constants, param, mean, row.momentum, x.first);
    if (row.momentum) write_once(row.first + i, x.first);
  } else {
    Real largest = row.largest ? read_once(row.largest + i) : Real(0);
    param = adam(row.constants, param, mean, x.first, x.second, row.largest != nullptr, largest);
    write_once(row.first + i, x.first);
    write_once(row.second + i, x.second);
    if (row.largest) write_once(row.largest + i, largest);
  }
  if (row.average) {
    const Real average = read_once(row.average + i);
    write_once(row.average + i, average + row.constants.average_weight * (param - average));
  }
  if (!half) return write_once(static_cast<Real*>(row.param) + i, param);
  const float value = static_cast<float>(param);
  if (row.master) write_once(row.master + i, value);
  write_once(static_cast<uint16_t*>(row.param) + i,
             row.stochastic ? rounded_at_random(value, random) : narrowed(row.dtype, value));
}

// The bits that round a thread's elements of one group at random: word p holds those of rows 2 p and 2 p + 1.
// A block of them serves 32 rows, and is kept for the group that follows.
class RoundingWords {
 public:
  template <int kPairs>
  WAVEDP_DEVICE inline void make(const StepGrid& grid, uint64_t row, int column, uint32_t (&bits)[kPairs]) {
    const int first = static_cast<int>(row % 32 / 2);
#pragma unroll 1
    for (int part = 0; part <= (first + kPairs - 1) / kBlockWords; ++part) {
      const uint64_t block = (row / 32 + part) * kGroupBlocks + column;
      if (block != made_) stream_block<2>(grid.key, made_ = block, grid.step, kRoundingDomain, words_);
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        const int word = first + p - part * kBlockWords;
        if (word >= 0 && word < kBlockWords) bits[p] = word_at(words_, word);
      }
    }
  }

 private:
  uint32_t words_[kBlockWords] = {};
  uint64_t made_ = ~uint64_t(0);
};

// A group that lies in one tensor: no searches, and two rows are read before the first is changed.
template <NormalKind kKind, StepRule kRule, class Real>
WAVEDP_DEVICE inline void step_inside(const StepGrid& grid, const StepRow<Real>& row, int64_t element,
                                      const uint32_t (&x)[kBlockWords]) {
#pragma unroll
  for (int pair = 0; pair < kRows<kKind> / 2; ++pair) {
    const int64_t i = element + 2 * pair * kGroupBlocks;
    Element<Real> even, odd;
    read<kRule>(row, i, even);
    read<kRule>(row, i + kGroupBlocks, odd);
    NormalOf<kKind> normals[2];
    normal_pair<kKind>(x, pair, normals);
    update<kKind, kRule>(grid, row, i, even, normals[0], 0);
    update<kKind, kRule>(grid, row, i + kGroupBlocks, odd, normals[1], 0);
  }
}

// Any group. Words and bits are moved on to where the next pair's are read.
template <NormalKind kKind, StepRule kRule, StepForm kForm, class Real>
WAVEDP_DEVICE inline void step_across(const StepGrid& grid, int64_t tensor, int64_t element,
                                      uint32_t (&x)[kBlockWords], uint32_t (&bits)[kRows<kKind> / 2]) {
  const int64_t elements = grid.starts[grid.tensors];
  int64_t begin = 0, end = 0;  // of the tensor whose row is held
  StepRow<Real> row{};
  NormalOf<kKind> normals[2];
#pragma unroll 1
  for (int k = 0; k < kRows<kKind>; ++k, element += kGroupBlocks) {
    if (k % 2 == 0) {
      normal_pair<kKind>(x, 0, normals);
#pragma unroll
      for (int w = 0; w + kWordsOfPair<kKind> < kBlockWords; ++w) x[w] = x[w + kWordsOfPair<kKind>];
    }
    const double normal = k % 2 ? normals[1] : normals[0];
    const uint32_t random = k % 2 ? bits[0] >> 16 : bits[0] & 0xffffu;
    if (k % 2) {
#pragma unroll
      for (int p = 0; p + 1 < kRows<kKind> / 2; ++p) bits[p] = bits[p + 1];
    }
    if (element < 0 || element >= elements) continue;
    if (element >= end) {
      tensor = holder(grid, tensor, element);
      begin = grid.starts[tensor];
      end = grid.starts[tensor + 1];
      row = row_of<kForm, Real>(grid, tensor);
    }
    if (!row.taken) continue;
    Element<Real> value;
    read<kRule>(row, element - begin, value);
    update<kKind, kRule>(grid, row, element - begin, value, normal, random);
  }
}

template <NormalKind kKind, StepRule kRule, StepForm kForm, class Real>
WAVEDP_DEVICE inline void step_thread(const StepGrid& grid, int64_t thread) {
  constexpr int kGroup = kRows<kKind> * kGroupBlocks;
  const int column = static_cast<int>(thread % kGroupBlocks);
  const int64_t from = thread / kGroupBlocks * grid.run, most = grid.groups - from;
  const int64_t until = from + (most < grid.run ? most : grid.run);
  RoundingWords rounding;
  int64_t tensor = 0;
#pragma unroll 1
  for (int64_t group = from; group < until; ++group) {
    const uint64_t number = grid.offset / kGroup + static_cast<uint64_t>(group);
    const int64_t element = group * kGroup - grid.skipped + column;  // of the first row
    uint32_t x[kBlockWords] = {}, bits[kRows<kKind> / 2] = {};
    if (grid.mean.std > 0) {
      stream_block<20>(grid.key, number * kGroupBlocks + column, grid.step, kDomain<kKind>, x);
    }
    tensor = holder(grid, tensor, element < 0 ? 0 : element);
    if constexpr (kForm == StepForm::kFloat32 || kForm == StepForm::kBFloat16) {
      const int64_t begin = grid.starts[tensor], last = element + (kRows<kKind> - 1) * kGroupBlocks;
      if (begin <= element && last < grid.starts[tensor + 1]) {
        step_inside<kKind, kRule>(grid, row_of<kForm, Real>(grid, tensor), element - begin, x);
        continue;
      }
    }
    if constexpr (kForm == StepForm::kAnyAtRandom) rounding.make(grid, number * kRows<kKind>, column, bits);
    step_across<kKind, kRule, kForm, Real>(grid, tensor, element, x, bits);
  }
}

}  // namespace
}  // namespace wavedp
