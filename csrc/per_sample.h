// SPDX-License-Identifier: Apache-2.0
// Norms and sums of the gradients of single records on raw pointers. The definition is
// wavedp/reference/per_sample.py. All sizes and strides are in elements, not bytes.
//
// 16-bit types are computed in float32. A job is of float64, here "wide", where one of its inputs is; results
// are then float64, else float32.
#pragma once

#include <cstdint>

#include "wavelet.h"

namespace wavedp {

// [batch, tokens, width], the last axis contiguous; other strides may be 0.
struct Sequences {
  const void* x;
  DType dtype;
  int64_t batch, tokens, width;
  int64_t stride_batch, stride_token;

  bool wide() const { return dtype == DType::kFloat64; }
};

// squared[b] = |sum_t g_bt a_bt^T|^2 and bound[b] = sum_t |g_bt| |a_bt|.
struct LinearNorms {
  Sequences a, g;
  double *squared, *bound;  // [batch]
  void* bias;               // null, or [batch, g.width]: sum_t g_bt

  bool wide() const { return a.wide() || g.wide(); }
};

// weight[b] = sum_t g_bt * n(x_bt) and bias[b] = sum_t g_bt, both [batch, width], of LayerNorm or, without
// the mean, RMSNorm.
struct NormGrads {
  Sequences x, g;
  double eps;
  bool subtract_mean;
  void *weight, *bias;

  bool wide() const { return x.wide() || g.wide(); }
};

// squared[b] = sum over v of |sum of g_bt with ids_bt = v|^2, without the tokens with padding_idx.
struct EmbeddingNorms {
  const int64_t* ids;  // contiguous [batch, tokens]
  Sequences g;
  int64_t padding_idx;
  double* squared;
};

// grad[v] = sum_b factors[b] * sum of g_bt with ids_bt = v, without records of the factor 0.
struct EmbeddingWeightGrad {
  const int64_t* ids;  // contiguous [batch, tokens]
  Sequences g;
  const double* factors;  // [batch]
  int64_t num_embeddings, padding_idx;
  void* grad;  // [num_embeddings, g.width]
};

// Of records that are one token each.
struct SquaredNorms {
  Sequences x;
  double* squared;
};

// sum[k] = sum_b factors[b] * x[b, k], without records of the factor 0, added up in float64.
struct WeightedSum {
  Sequences x;
  const double* factors;
  void* sum;  // [width]
};

// scaled[b] = factors[b] * x[b], contiguous [batch, tokens, width].
struct ScaledRecords {
  Sequences x;
  const double* factors;
  double smallest;
  void* scaled;
};

// sums = sum_b factors[b] g_b^T a_b over the records in `kept`, of float32: in blocks of about as many
// records, and groups of about as many blocks, which are added up in float64.
struct WeightGrad {
  Sequences g, a;
  const double* factors;  // [batch], positive
  const int64_t* kept;    // [records]
  int64_t records, blocks;
  // All rows of factors[b] times the wider side, and of the other, that are not 0 have an entry of at least
  // `smallest`, and none over 1 / smallest.
  double smallest;
  int64_t panels_down, panels_across, groups;  // of the narrower side, of the wider, of blocks
  void* sums;                                  // [groups, g.width, a.width]

  bool is_transposed() const { return a.width < g.width; }
  const Sequences& narrow() const { return is_transposed() ? a : g; }
  const Sequences& wide() const { return is_transposed() ? g : a; }
};

void linear_norms_cpu(const LinearNorms& job, int threads);
void norm_grads_cpu(const NormGrads& job, int threads);
void embedding_norms_cpu(const EmbeddingNorms& job, int threads);
// False, and nothing written, where an id is out of range.
bool embedding_weight_grad_cpu(const EmbeddingWeightGrad& job, int threads);
void squared_norms_cpu(const SquaredNorms& job, int threads);
void weighted_sum_cpu(const WeightedSum& job, int threads);
// Whether every row of the result has an entry of at least `smallest`, apart from rows that were 0.
bool scale_records_cpu(const ScaledRecords& job, int threads);
// Adds up in blocks of at most so many records; `blocks`, `panels`, `groups` and `sums` are set. False, and
// nothing written, where the processor has no instructions that gain by it, or rows are not as they have to
// be.
bool weight_grad_cpu(WeightGrad job, int64_t records_in_block, float* grad, int threads);

}  // namespace wavedp
