# SPDX-License-Identifier: Apache-2.0
"""Noise: normals alone, a noisy mean, and optimizer steps from clipped sums of 50 million parameters."""

from __future__ import annotations

from functools import partial

from wavedp.benchmarks.cases.noise_checks import NoiseCase
from wavedp.benchmarks.cases.noise_normals import noisy_means, normals
from wavedp.benchmarks.cases.noise_steps import ADAM, SGD, plain_name, steps_of, transformer
from wavedp.benchmarks.registry import Size

# 64 and 200 MB in float32, past the last-level cache of most processors.
FLAT = {
    "quick": [Size((40_000,))],
    "cpu": [Size((1 << 24,)), Size((50_000_000,))],
    "cuda": [Size((50_000_000,)), Size((1 << 28,))],
}
GPT = transformer(24_576, 512, 12)  # 50.4 million in 147 tensors
MODELS = {"quick": [transformer(64, 32, 2)], "cpu": [GPT], "cuda": [GPT, transformer(50_257, 1_280, 36)]}

CASES = [
    NoiseCase("normals", "Tensor.normal_", normals, FLAT),
    NoiseCase("noisy_mean", "copy_", noisy_means, FLAT),
    NoiseCase("step-adamw", plain_name(ADAM), partial(steps_of, ADAM), MODELS),
    NoiseCase("step-sgd", plain_name(SGD), partial(steps_of, SGD), MODELS),
]
