# SPDX-License-Identifier: Apache-2.0
"""The registry's cases under pytest-benchmark, for its statistics and ``--benchmark-compare``.

Sizes are middling, since a call is repeated many times; run.py times the sizes that are reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from wavedp.benchmarks.cases import SUITES
from wavedp.benchmarks.registry import Benchmark, Case

SHAPE = (16, 3, 256, 256)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def sizes_of(suite: str, case: Benchmark) -> tuple[Any, Any]:
    """What is timed, and what is cheap, for the names of the providers."""
    first = case.sizes[DEVICE.type][0]
    if suite != "wavelet" or case.name.startswith("small-"):
        return first, (case.sizes["quick"] or [first])[0]
    size = dataclasses.replace(first, shape=SHAPE)
    return size, dataclasses.replace(size, shape=(*SHAPE[:2], 32, 32))


def providers() -> Iterator[Any]:
    for suite, cases in SUITES.items():
        for case in (case for case in cases if case.sizes[DEVICE.type]):
            size, cheap = sizes_of(suite, case)
            for name in case.providers(cheap, DEVICE):
                yield pytest.param(case, size, name, id=f"{case.name}-{name}")


@pytest.mark.benchmark(max_time=0.2)
@pytest.mark.parametrize(("case", "size", "name"), list(providers()))
def test_throughput(benchmark: Any, case: Benchmark, size: Any, name: str) -> None:
    found = case.timed(size, DEVICE, quick=not isinstance(case, Case), only=name)  # memory is run.py's to measure
    if name not in found:
        pytest.skip(f"{name} does not take {case.name}")
    timed = found[name].call

    def call() -> None:
        timed()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = case.name
    benchmark(call)
