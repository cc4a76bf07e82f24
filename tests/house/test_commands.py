# SPDX-License-Identifier: Apache-2.0
"""The two commands of the README: what they run, that CI runs the same, and that every install is pinned."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parents[2]


def planned(target: str, venv: Path, *settings: str) -> list[str]:
    """The commands that `make TARGET` would run where the environment is missing."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("needs make")
    env = {"PATH": os.environ["PATH"]}  # and not what an outer `make PYTHON=... test` exports
    command = [make, "--dry-run", "--no-print-directory", f"VENV={venv}", target, *settings]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.replace("\\\n", " ").splitlines()


@pytest.mark.parametrize(
    ("target", "extra", "command"),
    [("demo", "demo", "{bin}/wavedp demo --out runs/demo"), ("test", "dev", "OMP_NUM_THREADS=1 {bin}/pytest -n auto ")],
)
def test_the_environment_is_made_then_the_command_runs(tmp_path: Path, target: str, extra: str, command: str) -> None:
    make_venv, *installs, stamp, last = planned(target, tmp_path / "venv")
    assert make_venv == f"python3 -m venv {tmp_path}/venv"
    assert all(" -m pip install " in line and " -c constraints.txt " in line for line in installs)
    assert installs[-1].endswith(f"-e '.[{extra}]'")
    assert stamp.startswith("touch ")
    assert last.startswith(command.format(bin=f"{tmp_path}/venv/bin"))


def test_every_test_is_run_once_and_the_covering_ones_are_measured(tmp_path: Path) -> None:
    rest, measured = planned("test", tmp_path / "venv")[-1].split("; rest=$?; ")
    command = f"OMP_NUM_THREADS=1 {tmp_path}/venv/bin/pytest -n auto "
    left_out = [word.removeprefix("--ignore=") for word in rest.removeprefix(command).split()]
    flags, _, status = measured.strip().removeprefix(command).partition(" && ")
    assert flags.split() == ["--cov", "--cov-report=term-missing", *left_out]
    assert status == "exit $rest"  # both parts are run, whichever fails
    assert len(left_out) > 25
    assert all((ROOT / path).exists() for path in left_out)
    alone = planned("test", tmp_path / "venv", "PYTEST_FLAGS=-k ledger")[-1]
    assert alone == f"{command}-k ledger"


def test_coverage_is_of_the_modules_that_there_are() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["coverage"]
    assert settings["report"]["fail_under"] == 100
    assert settings["run"]["branch"]
    found = {pattern: list(ROOT.glob(pattern)) for pattern in settings["run"]["include"]}
    assert all(found.values()), found
    assert sum(map(len, found.values())) > 30


def test_the_sanitized_library_is_built_apart_and_tested(tmp_path: Path) -> None:
    """It must not end up beside the code, where every other test would load it."""
    *_, build, test = (line for line in planned("sanitize", tmp_path / "venv") if "fsanitize" in line)
    assert "-fsanitize=address,undefined" in build
    assert " build --build-lib build/sanitize/lib " in build
    assert "--inplace" not in build
    assert f"PYTHONPATH={ROOT}/build/sanitize/lib " in test
    assert "libasan.so" in test
    assert " tests/sanitize " in test
    for name in ("wavelet", "wavelet_tokens", "noise", "noise_step", "per_sample", "small_inputs"):
        assert f" tests/ops/test_{name}.py" in test


def test_ci_runs_the_readme_command() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert commands == ["set -eu", 'cd "$(dirname "$0")/.."', "exec make test"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert {"make demo", "make test"} <= {line.split("#")[0].strip() for line in readme}
