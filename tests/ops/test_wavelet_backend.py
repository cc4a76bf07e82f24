# SPDX-License-Identifier: Apache-2.0
"""The choice of a backend: what is taken when nothing is asked for, and what is said when it cannot be had."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import wavedp
from wavedp.ops import available_backends, backend, use_backend

ROOT = Path(__file__).parents[2]


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Modules set to None in ``sys.modules`` cannot be imported; what was found out before is forgotten."""
    backend.forget_imports()
    yield monkeypatch
    monkeypatch.undo()
    backend.forget_imports()


def chosen(device: str) -> str:
    return backend.implementation("wavelet", torch.device(device)).__name__


def test_the_device_chooses(missing: pytest.MonkeyPatch) -> None:
    assert chosen("cuda") == "wavedp.kernels.wavelet"
    missing.setitem(sys.modules, "triton", None)
    missing.setitem(sys.modules, "wavedp._csrc", None)
    missing.setitem(sys.modules, "wavedp._csrc_cuda", None)
    backend.forget_imports()
    assert {chosen(device) for device in ("cpu", "cuda", "mps")} == {"wavedp.reference.wavelet"}
    assert available_backends() == ("reference",)
    assert torch.equal(wavedp.dwt2(torch.ones(2, 2))[0], torch.full((1, 1), 2.0))


def test_the_native_library_computes_on_the_cpu() -> None:
    pytest.importorskip("wavedp._csrc", reason="needs the C++ library")
    assert chosen("cpu") == "wavedp.ops.wavelet_native"


@pytest.mark.parametrize(
    ("name", "module", "advice"),
    [
        ("native", "wavedp._csrc", "compiler"),
        ("triton", "triton", "pip install triton"),
        ("cuda", "wavedp._csrc_cuda", "nvcc"),
    ],
)
def test_a_missing_backend_is_named(missing: pytest.MonkeyPatch, name: str, module: str, advice: str) -> None:
    missing.setitem(sys.modules, module, None)
    with (
        pytest.raises(RuntimeError, match=f"{name!r} was asked for, but {module} cannot be.*{advice}"),
        use_backend(name),
    ):
        pass
    assert name not in available_backends()


def test_a_broken_library_is_not_passed_over_in_silence(missing: pytest.MonkeyPatch) -> None:
    find = importlib.import_module

    def broken(name: str, package: str | None = None) -> object:
        if name == "wavedp._csrc":
            raise ImportError("version `GLIBCXX_9' not found")
        return find(name, package)

    missing.setattr(importlib, "import_module", broken)
    with pytest.warns(RuntimeWarning, match="_csrc is installed but cannot be loaded: version `GLIBCXX_9'"):
        assert chosen("cpu") == "wavedp.reference.wavelet"
    with pytest.raises(RuntimeError, match="GLIBCXX_9"), use_backend("native"):
        pass


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown backend 'cupy'; choose from auto, native"), use_backend("cupy"):
        pass


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_backend_refuses_another_device(name: str, missing: pytest.MonkeyPatch) -> None:
    missing.setattr(backend, "_import_error", lambda module: None)
    backend._choice.cache_clear()
    backend._implementation.cache_clear()
    with use_backend(name), pytest.raises(RuntimeError, match=f"{name!r} takes cuda tensors, but these are on cpu"):
        backend.implementation("wavelet", torch.device("cpu"))


def test_the_choice_nests_and_ends_with_its_block() -> None:
    assert backend.requested_backend() == "auto"
    with use_backend("reference"):
        with use_backend("auto"):
            assert backend.requested_backend() == "auto"
        assert backend.requested_backend() == "reference"
        with pytest.raises(ZeroDivisionError), use_backend("auto"):
            _ = 1 // 0
        assert backend.requested_backend() == "reference"
    assert backend.requested_backend() == "auto"


def test_the_choice_is_the_threads_own() -> None:
    seen: list[str] = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backend.requested_backend()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def python(code: str, **environment: str) -> str:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_cpu_op_imports_no_triton() -> None:
    code = """
import sys, torch, wavedp
assert "wavedp._csrc" not in sys.modules
wavedp.dwt2(torch.ones(2, 2))
print("triton" in sys.modules)
"""
    assert python(code) == "False"


def test_triton_interprets_its_kernels_where_the_environment_says_so() -> None:
    code = """
import torch, wavedp
from wavedp.ops import use_backend
with use_backend("triton"):
    x = torch.arange(15.0).reshape(3, 5)
    approximation, details = wavedp.dwt2(x, "zero")
    assert torch.equal(wavedp.idwt2((approximation, details), output_size=(3, 5)), x)
    print(approximation.tolist())
"""
    assert python(code, TRITON_INTERPRET="1") == "[[6.0, 10.0, 6.5], [10.5, 12.5, 7.0]]"
