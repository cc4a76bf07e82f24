// SPDX-License-Identifier: Apache-2.0
// ChaCha20 noise on raw pointers. The definition is wavedp/reference/noise.py.
//
// Normal number i of a stream is made from block 16 (i / 160) + i % 16: the words 3p, 3p + 1, 3p + 2 of its
// first fifteen, for k = i % 160 / 16 and p = k / 2, are the upper and the lower half of a radius and an
// angle; the cosine is taken where k is even, the sine where it is odd. So sixteen blocks make 160 numbers,
// each row of sixteen of them from one triple of words, and a number does not depend on how calls, threads or
// vectors part the range. All sizes are in elements, not bytes.
#pragma once

#include "wavelet.h"

namespace wavedp {

constexpr int kBlockWords = 16;
constexpr int kGroupBlocks = 16;
constexpr int kBlockNormals = 10;
constexpr int kGroupNormals = kGroupBlocks * kBlockNormals;

// The domain of the noise: the upper byte of the last word of the nonce. Others are left to other uses of a
// key.
constexpr uint32_t kNoiseDomain = 1, kRoundingDomain = 2, kStrictDomain = 3;

// Strict noise takes four words for two numbers, all sixteen of a block: see
// wavedp/reference/normals_strict.py.
constexpr int kStrictBlockNormals = 8;
constexpr int kStrictGroupNormals = kGroupBlocks * kStrictBlockNormals;

// Rounding at random takes 16 bits for a number. That of element i has, with k = i % 512 / 16, those of word
// k / 2 of block 16 (i / 512) + i % 16: the lower ones where k is even, the upper where it is odd.
constexpr int kGroupRoundings = 2 * kBlockWords * kGroupBlocks;

// What the blocks of a stream have in common. `key` is read, and never kept: its owner wipes it.
struct NoiseStream {
  const unsigned char* key;  // 32 bytes
  uint32_t step;
  uint64_t offset;  // of the first number
};

// Words of the raw stream from the beginning of block `counter`. With three words of nonce, as in RFC 8439,
// the counter has 32 bits, with two 64.
struct ChachaWords {
  const unsigned char* key;
  uint64_t counter;
  uint32_t nonce[3];
  int nonce_words, rounds;
  uint32_t* words;
  int64_t count;
};

// out = round(total + std * normal) / divisor, rounded once to the type of `out`; the sum is taken in
// float64, and rounded to multiples of `grid`, to nearest even, unless that is 0. Without `total` it is std *
// normal, and with std = 0 there is neither noise nor grid. Normals are those of float32, of float64 from the
// same words, or of strict noise, which is (round(total / grid) + round(std / grid * normal)) * grid /
// divisor.
enum class NormalKind : int { kNarrow, kWide, kStrict };

struct NoisyMean {
  NoiseStream stream;
  const void* total;  // null, or contiguous, of kFloat32 or kFloat64
  DType total_dtype;
  void* out;
  DType out_dtype;
  NormalKind kind;
  double std, grid, divisor;
  int64_t count;
};

enum class StepRule : int { kSgd, kAdam };

// What a rule multiplies by; those that the other rule has are not read.
struct StepConstants {
  double sign;               // -1 to ascend
  double l2;                 // gradient += l2 * parameter
  double rate;               // parameter -= rate * direction
  double keep_first, first;  // moment = keep * moment + new * gradient
  double nesterov;           // kSgd: direction = nesterov * gradient + from_first * moment
  double from_first;
  double keep;  // kAdam: parameter *= keep, before
  double keep_second, second;
  double root_scale, eps;  // direction = moment / (root_scale * sqrt(second moment) + eps)
  // kAdam, where least_square > 0 (Tang et al., arXiv 2312.14334): direction = moment /
  // (sqrt(max(root_scale^2 * second moment - noise_square, least_square)) + eps)
  double noise_square, least_square;
  double average_weight;  // average += average_weight * (parameter - average), after
};
constexpr int kStepConstants = sizeof(StepConstants) / sizeof(double);

// One contiguous parameter. Moments are of float32, or float64 for a parameter of float64.
struct StepTensor {
  void* param;
  DType dtype;
  const void* total;  // null: zero
  DType total_dtype;
  void* first;      // kSgd: null without momentum
  void* second;     // kAdam
  void* largest;    // kAdam: null without amsgrad
  void* average;    // null: none; as the moments; of the parameter before it is rounded
  float* master;    // null: none; stands for a parameter of kBFloat16 or kFloat16, which is its rounding
  bool stochastic;  // a parameter of kBFloat16 without a master is rounded at random
  StepConstants constants;
};

// A step of an optimizer by the noisy mean of clipped sums; see NoisyMean. The tensors lie one after the
// other in the stream, tensor t at starts[t] behind its offset. A call takes those of float64, where `wide`,
// or the others.
struct NoiseStep {
  NoiseStream stream;
  StepRule rule;
  bool wide, strict;
  double std, grid, divisor;
  const StepTensor* tensors;
  const int64_t* starts;  // [count + 1]
  int64_t count;
};

void chacha20_words_cpu(const ChachaWords& job, int threads);
void noisy_mean_cpu(const NoisyMean& job, int threads);
void noise_step_cpu(const NoiseStep& job, int threads);

// Launch on a cudaStream_t and return at once with the launch's cudaError_t. Keys and tensors are in device
// memory.
int chacha20_words_cuda(const ChachaWords& job, void* stream);
int noisy_mean_cuda(const NoisyMean& job, void* stream);
// A step reads its tensors and starts from a table in device memory. noise_step_table writes it to the
// host's, from those of the job alone, and returns their form. noise_step_cuda reads what else the job has;
// `elements` is starts[count].
int64_t noise_step_table_bytes(bool wide, int64_t tensors);
int noise_step_table(const NoiseStep& job, void* table);
int noise_step_cuda(const NoiseStep& job, const void* table, int64_t elements, int form, void* stream);

}  // namespace wavedp
