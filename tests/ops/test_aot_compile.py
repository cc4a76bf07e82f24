# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel, compiled ahead of time for sm_80, sm_90 and sm_100: no GPU is needed to see that it compiles.

A new kernel gets a line in ``REGISTRY``; a test fails until it has one.
"""

from __future__ import annotations

import pkgutil
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import wavedp.kernels

triton: Any = pytest.importorskip("triton", reason="needs Triton")

CAPABILITIES = (80, 90, 100)
POINTER_TYPES = ("fp32", "fp64", "bf16", "fp16")


@dataclass(frozen=True)
class Variant:
    """One kernel with the types and the specialisation that a launch would give it."""

    module: str
    kernel: str
    dtype: str  # of what the pointers point to
    constants: dict[str, Any] = field(default_factory=dict)  # constexpr arguments, and those specialised to 1 or None
    divisible_by_16: tuple[str, ...] = ()  # arguments known to be so
    num_warps: int = 1

    def __str__(self) -> str:
        constants = "-".join(f"{name}{value}" for name, value in self.constants.items())
        return f"{self.kernel.strip('_')}-{self.dtype}-{constants}"


TILE = {"BLOCK_H": 1, "BLOCK_W": 128}
LARGE_IMAGE = ("x_ptr", "bands_ptr", "stride_xn", "stride_xh", "W", "w")
LARGE_BANDS = ("ll_ptr", "lh_ptr", "hl_ptr", "hh_ptr", "x_ptr", "W", "w")
ONE_COLUMN = {"W": 1, "w": 1}


def dwt2(dtype: str, edge: int, *divisible: str, **constants: Any) -> Variant:
    return Variant("wavelet", "_dwt2_forward_kernel", dtype, {"EDGE": edge, **TILE, **constants}, divisible)


def idwt2(dtype: str, edge: int, *divisible: str, **constants: Any) -> Variant:
    return Variant("wavelet", "_idwt2_forward_kernel", dtype, {"EDGE": edge, **TILE, **constants}, divisible)


REGISTRY = [
    *(dwt2(dtype, 0, *LARGE_IMAGE, stride_xw=1) for dtype in POINTER_TYPES),
    *(idwt2(dtype, 0, *LARGE_BANDS) for dtype in POINTER_TYPES),
    *(dwt2("bf16", edge) for edge in range(1, 6)),
    *(idwt2("bf16", edge) for edge in range(1, 6)),
    dwt2("fp32", 5, stride_xn=1, stride_xh=1, stride_xw=1, **ONE_COLUMN),
    idwt2("fp32", 5, **ONE_COLUMN),
    idwt2("fp64", 5, lh_ptr=None, hl_ptr=None, hh_ptr=None),
    idwt2("fp32", 0, ll_ptr=None, hl_ptr=None),
]


def compile_variant(kernels: ModuleType, variant: Variant, capability: int) -> Any:
    kernel = getattr(kernels, variant.kernel)
    signature = {name: f"*{variant.dtype}" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
    signature |= dict.fromkeys(variant.constants, "constexpr")
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible_by_16}
    source = triton.compiler.ASTSource(kernel, signature, variant.constants, attributes)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": variant.num_warps})


@pytest.fixture(scope="module")
def compiled_kernels(fresh_kernels: Any) -> dict[str, ModuleType]:
    names = [module.name for module in pkgutil.iter_modules(wavedp.kernels.__path__)]
    return {name: fresh_kernels(name, interpreted=False) for name in names}


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("capability", CAPABILITIES, ids="sm_{}".format)
@pytest.mark.parametrize("variant", REGISTRY, ids=str)
def test_compiles(compiled_kernels: dict[str, ModuleType], variant: Variant, capability: int) -> None:
    compiled = compile_variant(compiled_kernels[variant.module], variant, capability)
    assert len(compiled.asm["cubin"]) > 0
    assert f".target sm_{capability}" in compiled.asm["ptx"]

    # An offset of 32 bits overflows at 2^31 elements, and nothing would say so.
    additions = [line for line in compiled.asm["ttir"].splitlines() if "tt.addptr" in line]
    assert additions
    for line in additions:
        offset_type = line.partition(" loc(")[0].rpartition(",")[2]
        assert "i64" in offset_type, line


@pytest.mark.parametrize("make", [dwt2, idwt2])
def test_large_images_move_as_vectors(compiled_kernels: dict[str, ModuleType], make: Any) -> None:
    """Indexing with stride 2, or a width whose divisibility is lost, would make these scalar accesses."""
    variant = next(v for v in REGISTRY if v.kernel == f"_{make.__name__}_forward_kernel" and v.dtype == "fp32")
    ptx = compile_variant(compiled_kernels["wavelet"], variant, 90).asm["ptx"]
    accesses = re.findall(r"(?:ld|st)\.global\S*", ptx)
    assert len(accesses) == 8
    assert all(".v4." in access for access in accesses), accesses


def test_every_kernel_is_in_the_registry(compiled_kernels: dict[str, ModuleType]) -> None:
    """A kernel is a jitted function that no other jitted function calls."""
    registered = {(variant.module, variant.kernel) for variant in REGISTRY}
    found = set()
    for name, module in compiled_kernels.items():
        jitted = {n: f for n, f in vars(module).items() if isinstance(f, triton.JITFunction)}
        bodies = {n: f.src.partition(":\n")[2] for n, f in jitted.items()}
        called = {n for n in jitted for body in bodies.values() if re.search(rf"\b{n}\(", body)}
        found |= {(name, n) for n in jitted if n not in called}
    assert found == registered
