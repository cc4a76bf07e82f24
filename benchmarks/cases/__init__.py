# SPDX-License-Identifier: Apache-2.0
"""The cases, by suite; a suite's name begins the name of its CSV."""

from wavedp.benchmarks.cases import wavelet, wavelet_small, wavelet_tokens

SUITES = {"wavelet": [*wavelet.CASES, *wavelet_tokens.CASES, *wavelet_small.CASES]}
