# SPDX-License-Identifier: Apache-2.0
"""What the tests of the benchmarks share: their scripts, and the results of a quick run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
Script = Callable[..., "subprocess.CompletedProcess[str]"]


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "benchmarks" / name), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="session")
def script() -> Script:
    """Runs a script of benchmarks/ on the CPU."""
    return run_script


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The CSV of a quick run of all cases, by suite."""
    out = tmp_path_factory.mktemp("results")
    done = run_script("run.py", "--quick", "--repeats", "3", "--out", str(out))
    assert done.returncode == 0, done.stderr
    return {file.name.partition("-")[0]: file for file in out.glob("*.csv")}
