# SPDX-License-Identifier: Apache-2.0
"""The native code compiles without a warning, and setup.py copes with every toolchain it may meet."""

import ast
import ctypes
import importlib.util
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CXX = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
NVCC = shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin:{os.environ['PATH']}")

needs_compiler = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler, and none is installed")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc, the CUDA compiler, and none is installed")


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("source", sorted(CSRC.rglob("*.cu")), ids=lambda source: source.name)
def test_cuda_source_compiles_to_a_cubin(source: Path, arch: str, tmp_path: Path) -> None:
    known = subprocess.run([NVCC, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout
    if arch not in known.split():
        pytest.skip(f"needs a newer nvcc: this one does not know {arch}")
    cubin = tmp_path / "out.cubin"
    flags = ["-std=c++17", "-O3", "--fmad=false", f"-arch={arch}", "-Werror=all-warnings", "-cubin"]
    if source.stem.startswith("noise"):  # the registers that spill could be words of the noise
        flags.append("-Xptxas=-warn-spills")
    result = subprocess.run([NVCC, *flags, source, "-o", cubin], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    code = cubin.read_bytes()
    assert code.startswith(b"\x7fELF")
    kernels = re.findall(r"__global__ [^{]*?(\w+_kernel)\(", source.read_text())
    assert kernels
    assert all(kernel.encode() in code for kernel in kernels)


@needs_compiler
@pytest.mark.parametrize("source", sorted(CSRC.rglob("*.cpp")), ids=lambda source: source.name)
def test_cpp_source_compiles_without_a_warning(source: Path) -> None:
    import pybind11

    includes = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    if source.stem.startswith("amx"):
        if platform.machine().lower() not in {"x86_64", "amd64"}:
            pytest.skip("needs a compiler for x86")
        flags += [*(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")), "-mamx-tile", "-mamx-bf16"]
        flags += ["-DWAVEDP_ISA=amx"]
    else:
        flags += ["-DWAVEDP_ISA=baseline"]
    result = subprocess.run([*CXX.split(), *flags, *includes, source], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_native_code_and_its_build_know_nothing_of_torch() -> None:
    sources = [path for path in CSRC.rglob("*") if path.suffix in {".h", ".cpp", ".cu"}]
    assert len(sources) >= 5
    for source in sources:
        included = re.findall(r'#include\s*[<"]([^>"]+)', source.read_text())
        assert not [name for name in included if name.startswith(("torch/", "ATen/", "c10/"))], source
    imports = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Import)]
    assert "torch" not in {alias.name.partition(".")[0] for node in imports for alias in node.names}


def copy_tree(target: Path) -> Path:
    """What setup.py reads, without anything that was built."""
    skip = shutil.ignore_patterns("*.so", "__pycache__")
    for folder in ("csrc", "kernels", "wavedp"):
        shutil.copytree(ROOT / folder, target / folder, ignore=skip)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / file).exists():
            shutil.copy(ROOT / file, target)
    return target


def build(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WAVEDP_BUILD_")}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", "lib", "--build-temp", "temp"]
    return subprocess.run(command, cwd=tree, env=inherited | environment, capture_output=True, text=True)


def built_modules(tree: Path) -> set[str]:
    return {path.name.partition(".")[0] for path in (tree / "lib").rglob("*.so")}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources to build in; its second build has nothing left to compile."""
    return copy_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def build_without_nvcc(tree: Path) -> subprocess.CompletedProcess[str]:
    return build(tree, CUDA_HOME=str(tree / "absent"))


@needs_compiler
def test_without_nvcc_only_the_cpu_module_is_built(
    tree: Path, build_without_nvcc: subprocess.CompletedProcess[str]
) -> None:
    assert build_without_nvcc.returncode == 0, build_without_nvcc.stderr
    assert built_modules(tree) == {"_csrc"}
    assert "wavedp._csrc_cuda is left out" in build_without_nvcc.stderr
    assert "wavedp._csrc is left out" not in build_without_nvcc.stderr
    assert "warning:" not in build_without_nvcc.stdout


@needs_compiler
@pytest.mark.usefixtures("build_without_nvcc")
def test_built_module_transforms_a_block(tree: Path) -> None:
    spec = importlib.util.spec_from_file_location("wavedp._csrc", next((tree / "lib").rglob("_csrc.*so")))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    x, bands = (ctypes.c_double * 4)(1, 2, 3, 5), (ctypes.c_double * 4)()
    addresses = [ctypes.addressof(bands) + 8 * band for band in range(4)]
    module.wavedec2(ctypes.addressof(x), 1, 1.0, 0.0, (1, 1, 2, 2, 4, 4, 2, 1), addresses, 1, 0, 1, 0.5, 1)
    assert list(bands) == [5.5, -2.5, -1.5, 0.5]
    assert module.isa() in {"amx", "avx512", "avx2", "baseline"}
    with pytest.raises(ValueError, match="isa 'sse9' is not available"):
        module.set_isa("sse9")


@needs_compiler
def test_a_failing_nvcc_costs_only_the_cuda_module(
    tree: Path, build_without_nvcc: subprocess.CompletedProcess[str]
) -> None:
    nvcc = tree / "broken" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    result = build(tree, CUDA_HOME=str(tree / "broken"))
    assert result.returncode == 0, result.stderr
    assert "ninja: no work to do." in result.stdout
    assert built_modules(tree) == {"_csrc"}
    assert "wavedp._csrc_cuda is left out" in result.stderr
    assert build(tree, CUDA_HOME=str(tree / "broken"), WAVEDP_BUILD_CUDA="1").returncode != 0


@needs_compiler
@pytest.mark.usefixtures("build_without_nvcc")
def test_a_changed_header_rebuilds_what_includes_it(tree: Path) -> None:
    import ninja

    os.utime(tree / "csrc" / "haar.h")
    command = [Path(ninja.BIN_DIR) / "ninja", "-n", "-v", "-C", tree / "temp" / "wavedp._csrc"]
    plan = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "-o wavelet-baseline.o" in plan
    assert "-o wavelet_tokens-baseline.o" in plan
    assert "-o module.so" in plan
    assert "-o bindings.o" not in plan


@needs_compiler
@pytest.mark.usefixtures("build_without_nvcc")
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm of the binutils to list an object's symbols")
def test_objects_of_an_instruction_set_share_no_code(tree: Path) -> None:
    """A shared inline function compiled for AVX-512 could be the copy that the linker keeps for every CPU."""
    functions = {
        "noise": ("chacha20_words", "noisy_mean"),
        "noise_step": ("noise_step",),
        "per_sample_layers": (
            "embedding_norms",
            "embedding_weight_grad",
            "norm_grads",
            "scale_records",
            "squared_norms",
            "weighted_sum",
        ),
        "per_sample_linear": ("linear_norms",),
        "wavelet": ("wavedec2", "waverec2"),
        "wavelet_tokens": ("wavelet_tokens", "wavelet_untokens"),
    }
    objects = sorted((tree / "temp" / "wavedp._csrc").glob("*-*.o"))
    assert {path.stem.partition("-")[0] for path in objects if path.stem.endswith("-baseline")} == set(functions)
    for path in objects:
        kernel, _, isa = path.stem.partition("-")
        command = ["nm", "--demangle", "--defined-only", "--extern-only", path]
        symbols = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        listed = [line.split(maxsplit=2)[2].partition("(")[0] for line in symbols.splitlines()]
        names = sorted(name for name in listed if not name.startswith("DW.ref."))  # the unwinder's data
        assert names == [f"wavedp::{isa}::{function}_units" for function in functions[kernel]]


def test_without_a_compiler_nothing_is_built_and_nothing_fails(tmp_path: Path) -> None:
    result = build(copy_tree(tmp_path), CXX="/bin/false", CUDA_HOME=str(tmp_path / "absent"))
    assert result.returncode == 0, result.stderr
    assert built_modules(tmp_path) == set()
    assert "wavedp._csrc is left out" in result.stderr
    assert "wavedp._csrc_cuda is left out" in result.stderr
    assert build(tmp_path, CXX="/bin/false", WAVEDP_BUILD_NATIVE="1").returncode != 0


def test_native_code_can_be_turned_off(tmp_path: Path) -> None:
    result = build(copy_tree(tmp_path), CXX="/bin/false", WAVEDP_BUILD_NATIVE="0")
    assert result.returncode == 0, result.stderr
    assert built_modules(tmp_path) == set()
    assert "left out" not in result.stderr
