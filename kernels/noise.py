# SPDX-License-Identifier: Apache-2.0
"""ChaCha20 noise in Triton; ``wavedp.reference.noise`` defines it. Each function is in the file of its kernels."""

import triton
from wavedp.kernels.noise_mean import chacha20_words_forward, noisy_mean_forward
from wavedp.kernels.noise_step import noise_step_forward

__all__ = ["INTERPRETED", "chacha20_words_forward", "noise_step_forward", "noisy_mean_forward"]

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""True if this module was imported under ``TRITON_INTERPRET=1``: its kernels then take CPU tensors."""
