# SPDX-License-Identifier: Apache-2.0
"""Per-record norms and clipped sums in Triton; ``wavedp.reference.per_sample`` defines them.

Each function is in the file of its kernels.
"""

import triton
from wavedp.kernels.per_sample_embedding import embedding_norms, embedding_weight_grad
from wavedp.kernels.per_sample_gemm import scaled_weight_grad
from wavedp.kernels.per_sample_linear import linear_norms
from wavedp.kernels.per_sample_rows import norm_grads, squared_norms, weighted_sum

__all__ = [
    "INTERPRETED",
    "embedding_norms",
    "embedding_weight_grad",
    "linear_norms",
    "norm_grads",
    "scaled_weight_grad",
    "squared_norms",
    "weighted_sum",
]

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""True if this module was imported under ``TRITON_INTERPRET=1``: its kernels then take CPU tensors."""
