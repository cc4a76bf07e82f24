# SPDX-License-Identifier: Apache-2.0
"""Timing: rivals take turns within each repeat, so that a slow spell of the machine hits all of them."""

from __future__ import annotations

import ctypes
import gc
import random
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from wavedp.benchmarks.registry import Progress, Thunk, silent


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median over the samples, with the 20% and 80% quantiles."""

    median: float
    q20: float
    q80: float
    calls: int = 1  # in a sample
    samples: tuple[float, ...] = ()  # one a repeat


def sample(function: Thunk, calls: int, device: torch.device) -> float:
    """Seconds a call, averaged over ``calls`` calls in a row."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / calls
    began = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - began) / calls


def calls_for(function: Thunk, device: torch.device, sample_seconds: float) -> int:
    """How many calls last about ``sample_seconds``; one where a call alone lasts longer."""
    calls, seconds = 1, sample(function, 1, device)
    if 10 * seconds < sample_seconds:  # too short to be timed alone
        calls = 10
        seconds = sample(function, calls, device)
    return max(1, round(sample_seconds / max(seconds, 1e-7)))


def time_in_turns(
    functions: Mapping[str, Thunk],
    device: torch.device,
    repeats: int,
    sample_seconds: float,
    progress: Progress = silent,
) -> dict[str, Timing]:
    """Takes ``repeats`` samples of every function, in turns, in an order that is shuffled for each repeat.

    Functions have been called once before. A sample lasts about ``sample_seconds``, or one call, and follows an untimed
    call: the caches are then as the function itself leaves them. The orders are the same in every run.
    """
    names = list(functions)
    calls = {name: calls_for(functions[name], device, sample_seconds) for name in names}
    taken: dict[str, list[float]] = {name: [] for name in names}
    shuffled = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for repeat in range(repeats):
            progress(f"repeat {repeat + 1} of {repeats}")
            for name in shuffled.sample(names, len(names)):
                functions[name]()
                taken[name].append(sample(functions[name], calls[name], device))
    finally:
        gc.enable()
    return {name: summary(taken[name], calls[name]) for name in names}


def summary(samples: list[float], calls: int = 1) -> Timing:
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], calls, tuple(samples))
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Timing(statistics.median(samples), fifths[0], fifths[3], calls, tuple(samples))


def paired_ratio(floor: Timing, timing: Timing) -> float:
    """The median of the ratios within each repeat, whose samples were taken within seconds of each other."""
    return statistics.median(a / b for a, b in zip(floor.samples, timing.samples, strict=True))


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


def release_memory() -> None:
    """Returns what is free to the system: between cases, whose sizes differ."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
