# SPDX-License-Identifier: Apache-2.0
"""What a program can check of the style: licence lines, formatting, one pinned version of each linter."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("wavedp", "kernels", "csrc", "tests", "benchmarks")
SUFFIXES = {".py", ".h", ".cpp", ".cu", ".cuh", ".sh"}
SPDX = "SPDX-License-Identifier: Apache-2.0"
NATIVE = sorted(str(path) for path in (ROOT / "csrc").rglob("*") if path.suffix in SUFFIXES)


def test_every_source_names_its_licence() -> None:
    files = [ROOT / "setup.py", *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    sources = [path for path in files if path.suffix in SUFFIXES]
    assert len(sources) > 20
    missing = [path for path in sources if SPDX not in "".join(path.open(encoding="utf-8").readlines()[:2])]
    assert missing == []


@pytest.mark.parametrize(
    "command",
    [("ruff", "check"), ("ruff", "format", "--check"), ("clang-format", "--dry-run", "-Werror", *NATIVE)],
    ids=["ruff", "ruff-format", "clang-format"],
)
def test_the_linter_has_no_complaint(command: tuple[str, ...]) -> None:
    program = shutil.which(command[0], path=Path(sys.executable).parent)
    if program is None:
        pytest.skip(f"needs {command[0]}, of the extra [dev]")
    done = subprocess.run([program, *command[1:]], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pre_commit_uses_the_pinned_versions() -> None:
    pins = dict(re.findall(r"^([\w-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    config = (ROOT / ".pre-commit-config.yaml").read_text()
    revisions = dict(re.findall(r"repo: \S+/(\S+)\n\s+rev: v(\S+)", config))
    assert revisions == {"ruff-pre-commit": pins["ruff"], "mirrors-clang-format": pins["clang-format"]}
