# SPDX-License-Identifier: Apache-2.0
"""The cases, by suite; a suite's name begins the name of its CSV."""

from wavedp.benchmarks.cases import dp, dp_ops, noise, sampling, wavelet, wavelet_small, wavelet_tokens
from wavedp.benchmarks.registry import Benchmark

SUITES: dict[str, list[Benchmark]] = {
    "wavelet": [*wavelet.CASES, *wavelet_tokens.CASES, *wavelet_small.CASES],
    "dp": [*dp.CASES, *dp_ops.CASES],
    "noise": [*noise.CASES],
    "sampling": [*sampling.CASES],
}
