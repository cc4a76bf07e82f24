# SPDX-License-Identifier: Apache-2.0
"""Timing: rivals take turns within each repeat, so that a slow spell of the machine hits all of them."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Thunk = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median over the repeats, with the 20% and 80% quantiles."""

    median: float
    q20: float
    q80: float


def sample(function: Thunk, calls: int, device: torch.device) -> float:
    """Seconds a call, averaged over ``calls`` calls in a row."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    began = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - began) / calls


def time_in_turns(
    functions: Mapping[str, Thunk], device: torch.device, repeats: int, sample_seconds: float
) -> dict[str, Timing]:
    """Times every function ``repeats`` times, in turns; each sample lasts about ``sample_seconds``."""
    calls = {}
    for name, function in functions.items():
        sample(function, 1, device)
        calls[name] = max(1, round(sample_seconds / max(sample(function, 2, device), 1e-7)))
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            taken[name].append(sample(function, calls[name], device))
    return {name: summary(samples) for name, samples in taken.items()}


def summary(samples: list[float]) -> Timing:
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0])
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Timing(statistics.median(samples), fifths[0], fifths[3])


def keep_freed_memory() -> None:
    """Makes glibc reuse freed blocks rather than return them to the system: a caching allocator, as on CUDA.

    Otherwise a fresh 50 MB output costs more in page faults than the transform that fills it.
    """
    if sys.platform == "linux":
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(m_mmap_max, 0)
            libc.mallopt(m_trim_threshold, -1)
