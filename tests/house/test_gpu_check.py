# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu_check.sh up to the point where it needs a GPU; the rest is for a machine that has one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from wavedp.benchmarks.run import chosen_cases

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.sh"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


# Stands for the interpreter of a machine with a GPU: the build fails, the tests fail, the benchmarks pass.
STUB = """#!/bin/sh
case "$*" in
  *get_device_capability*) echo 90 ;;
  *xdist*) exit 1 ;;
  *build_ext*) echo "building for $WAVEDP_CUDA_ARCHS"; exit 7 ;;
  "-m pytest"*) exit 1 ;;
  *run.py* | *noise-law*) echo "$*" ;;
esac
"""


def run(*arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": python, "CUDA_VISIBLE_DEVICES": ""}
    env.pop("WAVEDP_CUDA_ARCHS", None)
    return subprocess.run([SCRIPT, *arguments], env=env, capture_output=True, text=True, timeout=120)


def test_the_script_parses() -> None:
    done = subprocess.run(["bash", "-n", SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("arguments", [(), ("a", "b")])
def test_one_argument_is_expected(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "expected one argument" in done.stderr
    assert done.stdout == ""


def test_a_machine_without_a_gpu_is_told_so(tmp_path: Path) -> None:
    done = run(str(tmp_path / "out"))
    assert done.returncode == 3
    assert "needs a CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_failing_phase_stops_no_other_and_decides_the_status(tmp_path: Path) -> None:
    stub, out = tmp_path / "python", tmp_path / "out"
    stub.write_text(STUB)
    stub.chmod(0o755)
    done = run(str(out), python=str(stub))
    assert done.returncode == 7
    phases = ("build", "tests", "bench", "noise", "law", "dp")
    assert {path.name for path in out.iterdir()} == {"summary.txt", *(f"{phase}.log" for phase in phases)}
    assert (out / "build.log").read_text() == "building for 90\n"
    for phase, suite in (("bench", "wavelet"), ("noise", "noise"), ("dp", "dp")):
        command = (out / f"{phase}.log").read_text().split()
        assert command[:2] == ["benchmarks/run.py", suite]
        assert chosen_cases(command[1], command[2:-4])[suite]
        assert command[-4:] == ["--device", "cuda", "--out", str(out)]
    table = [line.split(maxsplit=3) for line in (out / "summary.txt").read_text().splitlines()[-len(phases) :]]
    assert [row[0] for row in table] == list(phases)
    assert [row[3] for row in table] == ["failed with status 7", "failed with status 1", *["passed"] * 4]
    assert sum(int(row[2]) for row in table) <= 540
