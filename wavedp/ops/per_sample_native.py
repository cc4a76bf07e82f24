# SPDX-License-Identifier: Apache-2.0
"""The per-record ops of the C++ library: tensors to addresses. ``csrc/per_sample.h`` says what they expect."""

from wavedp.reference.per_sample import embedding_norms as embedding_norms
from wavedp.reference.per_sample import embedding_weight_grad as embedding_weight_grad
from wavedp.reference.per_sample import linear_norms as linear_norms
from wavedp.reference.per_sample import norm_grads as norm_grads
from wavedp.reference.per_sample import scaled_weight_grad as scaled_weight_grad
from wavedp.reference.per_sample import squared_norms as squared_norms
from wavedp.reference.per_sample import weighted_sum as weighted_sum
