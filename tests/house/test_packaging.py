# SPDX-License-Identifier: Apache-2.0
"""What the sdist and the wheel hold: built offline from a copy of the tree, the wheel from the sdist."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
VERSION = PROJECT["project"]["version"]
LEFT_OUT = (".git", ".venv", "build", "dist", "runs", "*.so", "*.egg-info", "__pycache__", ".*_cache")
COMPILER = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")


def build(tree: Path, out: Path, *what: str, **env: str) -> None:
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--skip-dependency-check",
        "-o",
        str(out),
        *what,
    ]
    done = subprocess.run(
        [*command, *what, str(tree)],
        env={**os.environ, "WAVEDP_BUILD_CUDA": "0", **env},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that a build leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("tree") / "wavedp"
    return Path(shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT)))


@pytest.fixture(scope="module")
def dist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    build(tree, out)
    return out


@pytest.fixture(scope="module")
def sdist_names(dist: Path) -> set[str]:
    with tarfile.open(dist / f"wavedp-{VERSION}.tar.gz") as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


@pytest.fixture(scope="module")
def wheel(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked in a folder of its own."""
    (file,) = dist.glob(f"wavedp-{VERSION}-*.whl")
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder)
    return folder


def sources(tree: Path, folder: str, *suffixes: str) -> set[str]:
    """Paths, relative to the tree, of the files under `folder` with one of `suffixes`."""
    found = {path.relative_to(tree).as_posix() for path in (tree / folder).rglob("*") if path.suffix in suffixes}
    assert found, f"no {suffixes} under {folder}/"
    return found


def beside(tree: Path) -> set[str]:
    """The modules that lie beside wavedp/ and are installed inside it."""
    return sources(tree, "kernels", ".py") | sources(tree, "benchmarks", ".py")


def test_every_package_is_listed(tree: Path) -> None:
    paths = sources(tree, "wavedp", ".py") | {f"wavedp/{path}" for path in beside(tree)}
    packages = {".".join(Path(path).parent.parts) for path in paths}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages


def test_building_does_not_need_torch() -> None:
    names = {requirement.partition(">")[0] for requirement in PROJECT["build-system"]["requires"]}
    assert names == {"setuptools", "pybind11", "ninja"}


def test_the_sdist_holds_all_sources(tree: Path, sdist_names: set[str]) -> None:
    wanted = (
        sources(tree, "wavedp", ".py", ".typed")
        | sources(tree, "kernels", ".py", ".json")
        | sources(tree, "benchmarks", ".py", ".sh")
        | sources(tree, "csrc", ".h", ".cpp", ".cu", ".cuh")
        | {"setup.py", "pyproject.toml", "LICENSE", "README.md", "constraints.txt"}
    )
    assert wanted - sdist_names == set()


def test_the_wheel_holds_the_package_and_nothing_else(tree: Path, wheel: Path) -> None:
    assert {path.name for path in wheel.iterdir()} == {"wavedp", f"wavedp-{VERSION}.dist-info"}
    files = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*.py")}
    assert files == sources(tree, "wavedp", ".py") | {f"wavedp/{name}" for name in beside(tree)}
    assert (wheel / "wavedp" / "py.typed").is_file()


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_the_wheel_holds_the_native_library(wheel: Path) -> None:
    (library,) = (wheel / "wavedp").glob("_csrc*.so")
    assert b"libtorch" not in library.read_bytes()


def test_the_metadata_leaves_heavy_packages_to_the_extras(wheel: Path) -> None:
    metadata = email.message_from_string((wheel / f"wavedp-{VERSION}.dist-info" / "METADATA").read_text("utf-8"))
    assert metadata["Version"] == VERSION
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"data", "sr", "demo", "dev"} <= set(metadata.get_all("Provides-Extra", []))
    plain = {re.split("[<>]", need)[0] for need in metadata.get_all("Requires-Dist", []) if "extra ==" not in need}
    backports = {"tomli"}  # for Python 3.10
    assert plain == {"torch", "numpy", "safetensors", "dp-accounting", "scipy", "tqdm", "typing-extensions"} | backports


def test_the_unpacked_wheel_works(wheel: Path, tmp_path: Path) -> None:
    code = f"""
import pathlib, wavedp, wavedp.kernels
from wavedp.cli import main
here = pathlib.Path({str(wheel)!r})
assert here in pathlib.Path(wavedp.__file__).parents, wavedp.__file__
assert [pathlib.Path(p) for p in wavedp.kernels.__path__] == [here / "wavedp" / "kernels"]
assert wavedp.__version__ == {VERSION!r}, wavedp.__version__
assert main(["bench", "wavelet", "small-dwt2", "--quick", "--device", "cpu"]) == 0
"""
    env = {**os.environ, "PYTHONPATH": str(wheel)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_machine_without_a_compiler_gets_a_pure_wheel(tree: Path, tmp_path: Path) -> None:
    missing = str(tmp_path / "no-such-compiler")
    build(tree, tmp_path, "--wheel", CC=missing, CXX=missing, PATH=str(Path(sys.executable).parent))
    (file,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(file).namelist()
    assert "wavedp/kernels/wavelet.py" in names
    assert [name for name in names if name.endswith(".so")] == []
