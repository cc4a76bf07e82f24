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
from wavedp.benchmarks.registry import Case, Size, check, poisoned, result_dtype

SHAPE = (16, 3, 256, 256)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def size_of(case: Case) -> Size:
    first = case.sizes[DEVICE.type][0]
    return first if case.name.startswith("small-") else dataclasses.replace(first, shape=SHAPE)


def providers() -> Iterator[Any]:
    for case in (case for cases in SUITES.values() for case in cases):
        size = size_of(case)
        cheap = dataclasses.replace(size, shape=(*size.shape[:2], 32, 32))  # only for the names
        for name in case.providers(cheap, DEVICE):
            yield pytest.param(case, name, id=f"{case.name}-{name}")


@pytest.mark.benchmark(max_time=0.2)
@pytest.mark.parametrize(("case", "name"), list(providers()))
def test_throughput(benchmark: Any, case: Case, name: str) -> None:
    size = size_of(case)
    torch.compiler.reset()
    provider = case.providers(size, DEVICE)[name]
    inputs = case.inputs(size, DEVICE)
    expected, results = case.expected(size, *(x.double() for x in inputs)), result_dtype(size.dtype)
    out = poisoned(expected, results)
    timed = provider.prepare(inputs, out)
    result = timed()
    check(f"{case.name}, {name}", out if provider.writes_out else provider.unpack(result), expected, results)

    def call() -> None:
        timed()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = case.name
    benchmark(call)
