# SPDX-License-Identifier: Apache-2.0
"""Where an op is tested: every backend and instruction set here, the Triton interpreter, the CUDA device."""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

from wavedp.ops import use_backend


def load_fresh_kernels(name: str, interpreted: bool) -> ModuleType:
    """A new copy of ``wavedp.kernels.<name>``, its kernels interpreted or compiled whatever the environment.

    Triton decides when a kernel is defined. Triton itself is imported before, else its own library would stay
    interpreted for every test that follows.
    """
    importlib.import_module("triton.language")
    package = importlib.import_module("wavedp.kernels")
    attributes = dict(vars(package))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1" if interpreted else "0")
        # Kernels of several modules call each other, and an interpreted one cannot call a compiled one.
        for loaded in [module for module in sys.modules if module.startswith("wavedp.kernels.")]:
            patch.delitem(sys.modules, loaded)
        fresh = importlib.import_module(f"wavedp.kernels.{name}")
        for loaded in [module for module in sys.modules if module.startswith("wavedp.kernels.")]:
            del sys.modules[loaded]
    vars(package).clear()
    vars(package).update(attributes)
    return fresh


@dataclass(frozen=True)
class Target:
    backend: str
    device: str = "cpu"
    isa: str | None = None
    interpreted: bool = False

    def __str__(self) -> str:
        return "-".join(filter(None, (self.backend, self.isa or self.device, "interpreted" * self.interpreted)))

    def rounds_to_nearest(self, dtype: torch.dtype) -> bool:
        # Triton's interpreter cuts float32 off to bfloat16; compiled code rounds to nearest even.
        return not (self.interpreted and dtype == torch.bfloat16)


TARGETS = [
    Target("reference"),
    Target("native", isa="baseline"),
    Target("native", isa="avx2"),
    Target("native", isa="avx512"),
    Target("native", isa="amx"),
    Target("triton", interpreted=True),
    *(pytest.param(Target(backend, "cuda"), marks=pytest.mark.cuda) for backend in ("reference", "triton", "cuda")),
]


KERNELS = ("wavelet", "wavelet_tokens", "per_sample", "noise")  # modules that ops choose


@pytest.fixture(scope="session")
def fresh_kernels() -> Callable[..., ModuleType]:
    return load_fresh_kernels


@pytest.fixture(scope="session")
def interpreted_kernels() -> dict[str, ModuleType]:
    return {name: load_fresh_kernels(name, interpreted=True) for name in KERNELS}


@pytest.fixture(params=TARGETS, ids=str)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Each backend in turn, asked for while the test runs."""
    chosen: Target = request.param
    with pytest.MonkeyPatch.context() as patch:
        if chosen.interpreted:
            for name, kernels in request.getfixturevalue("interpreted_kernels").items():
                patch.setitem(sys.modules, f"wavedp.kernels.{name}", kernels)
        if chosen.isa is not None:
            native = pytest.importorskip("wavedp._csrc", reason="needs the C++ library")
            before = native.isa()
            try:
                native.set_isa(chosen.isa)
            except ValueError:
                pytest.skip(f"needs a CPU with {chosen.isa}")
        with use_backend(chosen.backend):
            yield chosen
        if chosen.isa is not None:
            native.set_isa(before)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that is allocated and not written holds NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(params=["reference", "baseline", "avx2", "avx512"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Of what PyTorch has no op for, as noise: the definition, and the C++ library on each instruction set."""
    name: str = request.param
    if name == "reference":
        with use_backend("reference"):
            yield name
        return
    native = pytest.importorskip("wavedp._csrc", reason="needs the C++ library")
    before = native.isa()
    try:
        native.set_isa(name)
    except ValueError:
        pytest.skip(f"needs a CPU with {name}")
    with use_backend("native"):
        yield name
    native.set_isa(before)


# As setup.py compiles the CPU's code: no product and sum becomes one operation, neither here nor by nvcc.
HOST_FLAGS = "-std=c++17 -O2 -ffp-contract=off -shared -fPIC -DWAVEDP_ISA=baseline"
Address = ctypes.c_void_p
HOST_ARGUMENTS = {
    "chacha20_words": [Address, ctypes.c_uint64, Address, ctypes.c_int, ctypes.c_int, Address, ctypes.c_int64],
    "normals": [ctypes.c_int, Address, ctypes.c_int64, Address],
    "noisy_mean": [
        *(Address, ctypes.c_uint32, ctypes.c_uint64, Address, ctypes.c_int, Address, ctypes.c_int, ctypes.c_int),
        *(ctypes.c_double, ctypes.c_double, ctypes.c_double, ctypes.c_int64),
    ],
    "noise_step": [
        *(Address, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int, ctypes.c_int, ctypes.c_int),
        *(ctypes.c_double, ctypes.c_double, ctypes.c_double, ctypes.c_int64),
        *(Address, Address, Address, Address, ctypes.c_int),
    ],
}


@pytest.fixture(scope="session")
def cuda_on_cpu(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The threads of the CUDA kernels of the noise, compiled for the CPU: see noise_cuda_host.cpp."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("needs a C++ compiler, and none is installed")
    source = Path(__file__).with_name("noise_cuda_host.cpp")
    target = tmp_path_factory.mktemp("host") / "noise.so"
    result = subprocess.run(
        [*compiler.split(), *HOST_FLAGS.split(), source, "-o", target], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    library = ctypes.CDLL(str(target))
    for name, arguments in HOST_ARGUMENTS.items():
        getattr(library, name).argtypes = arguments
        getattr(library, name).restype = ctypes.c_int if name == "noise_step" else None
    return library
