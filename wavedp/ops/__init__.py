# SPDX-License-Identifier: Apache-2.0
"""The ops in ``torch.ops.wavedp`` and the choice of who computes them. Importing this registers the ops."""

from wavedp.ops import per_sample, wavelet, wavelet_autograd, wavelet_tokens, wavelet_tokens_autograd
from wavedp.ops.backend import available_backends, use_backend
from wavedp.ops.instructions import use_instructions

__all__ = [
    "available_backends",
    "per_sample",
    "use_backend",
    "use_instructions",
    "wavelet",
    "wavelet_autograd",
    "wavelet_tokens",
    "wavelet_tokens_autograd",
]
