# SPDX-License-Identifier: Apache-2.0
"""`import wavedp` is cheap, silent and needs nothing but torch: each check runs in a process of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS_ABOVE_TORCH = 0.5

HEAVY = {"triton", "diffusers", "transformers", "accelerate", "PIL", "matplotlib", "sklearn", "scipy"} | {
    "dp_accounting",
    "tqdm",
    "HersheyFonts",
    "pywt",
    "opacus",
}

# Puts triton and the native library out of reach, as on a machine that has neither.
BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton" or name in ("wavedp._csrc", "wavedp._csrc_cuda"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
"""

# [[1, 2], [3, 4]]: (1+2+3+4)/2, (1+2-3-4)/2, (1-2+3-4)/2, (1-2-3+4)/2.
DWT2_OF_A_BLOCK = """
import torch, wavedp
a, (h, v, d) = wavedp.dwt2(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
assert [t.tolist() for t in (a, h, v, d)] == [[[5.0]], [[-2.0]], [[-1.0]], [[0.0]]], (a, h, v, d)
"""


def python(code: str, *flags: str, tree: Path = ROOT, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(tree), "PYTHONWARNINGS": "default"}
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], env=env, cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def bare_checkout(tmp_path: Path) -> Path:
    """The sources alone, elsewhere: nothing installed, nothing built."""
    tree = tmp_path / "checkout"
    for name in ("wavedp", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tree


def test_import_prints_nothing_and_leaves_cuda_alone(tmp_path: Path) -> None:
    done = python("import wavedp, torch; assert not torch.cuda.is_initialized()", cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("", "")


def test_import_brings_in_nothing_heavy(tmp_path: Path) -> None:
    code = """
import json, sys, torch
before = set(sys.modules)
import wavedp
print(json.dumps([name.split(".")[0] for name in set(sys.modules) - before]))
"""
    imported = set(json.loads(python(code, cwd=tmp_path).stdout))
    assert "wavedp" in imported
    assert HEAVY & imported == set()


def test_import_is_quick(tmp_path: Path) -> None:
    """The time of `import wavedp` on top of `import torch`; the best of three, since machines are busy."""

    def seconds() -> float:
        report = python("import torch, wavedp", "-X", "importtime", cwd=tmp_path).stderr
        found = re.search(r"\|\s*(\d+) \| wavedp$", report, flags=re.MULTILINE)
        assert found, report[-2000:]
        return int(found[1]) / 1e6

    assert any(seconds() < SECONDS_ABOVE_TORCH for _ in range(3))


def test_a_bare_checkout_imports(tmp_path: Path, bare_checkout: Path) -> None:
    code = """
import pathlib, wavedp, wavedp.kernels
tree = pathlib.Path(wavedp.__file__).parents[1]
assert tree.name == "checkout", tree
assert pathlib.Path(wavedp.kernels.__path__[0]).resolve() == (tree / "kernels").resolve()
"""
    python(code + DWT2_OF_A_BLOCK, tree=bare_checkout, cwd=tmp_path)


def test_the_reference_serves_where_nothing_else_is_there(tmp_path: Path, bare_checkout: Path) -> None:
    python(BLOCKED + DWT2_OF_A_BLOCK, tree=bare_checkout, cwd=tmp_path)
