# SPDX-License-Identifier: Apache-2.0
"""The registry's cases under pytest-benchmark, for its statistics and ``--benchmark-compare``.

Sizes are middling, since a call is repeated many times; run.py times the sizes that are reported.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from registry import Case, Function, all_cases, check

SHAPE = (16, 3, 256, 256)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def providers() -> Iterator[object]:
    for case in (case for cases in all_cases().values() for case in cases):
        for name, provider in case.providers(DEVICE, torch.float32).items():
            yield pytest.param(case, name, provider, id=f"{case.name}-{name}")


@pytest.mark.parametrize(("case", "name", "provider"), providers())
def test_throughput(benchmark, case: Case, name: str, provider: Function) -> None:
    inputs = case.inputs(SHAPE, torch.float32, DEVICE)
    check(f"{case.name}, {name}", provider(*inputs), case.expected(*(x.double() for x in inputs)))

    def call() -> None:
        provider(*inputs)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = case.name
    benchmark(call)
