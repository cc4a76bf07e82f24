# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a training step above the idle process.

On a CPU it is the resident memory of a process of its own, ``python -m wavedp.benchmarks.memory``, in which nothing but
that step runs; on a GPU it is what torch allocated.
"""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import wavedp

WARM = 2  # steps before the one that is measured: they make what stays, and look at the model more closely
STATUS, CLEAR_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(
    case: str, provider: str, shape: Sequence[int], device: torch.device, step: Callable[[], object]
) -> int | None:
    """Bytes at the peak of the third step above those before the first, so with optimizer state; None: not measured.

    On a GPU ``step`` is called, which was not called before; on a CPU the child process makes its own.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        idle = torch.cuda.memory_allocated(device)
        for _ in range(WARM):
            step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated(device)
        step()  # four in all: an even number, see steps.py
        return peak - idle
    if not can_measure():
        return None
    root = str(Path(wavedp.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    arguments = [case, provider, "x".join(map(str, shape)), str(torch.get_num_threads())]
    command = [sys.executable, "-m", __name__, *arguments]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the memory of {provider} in {case} was not measured:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def can_measure() -> bool:
    """Whether the system keeps a peak of resident memory, and lets it be reset."""
    return os.access(CLEAR_PEAK, os.W_OK) and "VmHWM" in STATUS.read_text()


def resident(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (at the peak), in bytes."""
    found = re.search(rf"{field}:\s*(\d+) kB", STATUS.read_text())
    assert found is not None
    return int(found[1]) * 1024


def measure(step: Callable[[], object]) -> int:
    """Bytes at the peak of the third of three calls, above those of now, in this process."""
    gc.collect()
    idle = resident("VmRSS")
    for _ in range(WARM):
        step()
    CLEAR_PEAK.write_text("5")  # proc(5): resets VmHWM
    step()
    return resident("VmHWM") - idle


def main(case: str, provider: str, shape: str, threads: str) -> None:
    from wavedp.benchmarks.cases import SUITES
    from wavedp.benchmarks.steps import StepCase, make_batch, make_model, take_steps

    torch.set_num_threads(int(threads))
    cpu = torch.device("cpu")
    for found in (found for cases in SUITES.values() for found in cases if found.name == case):
        assert isinstance(found, StepCase)
        for size in (size for sizes in found.sizes.values() for size in sizes):
            if "x".join(map(str, size.shape)) == shape:
                trainer = found.trainers(cpu)[provider]
                step = take_steps(trainer, make_model(size, cpu), make_batch(size, cpu))
                print(measure(step))
                return
    raise SystemExit(f"no training step {case} of {shape}")


if __name__ == "__main__":
    main(*sys.argv[1:])
