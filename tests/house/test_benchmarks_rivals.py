# SPDX-License-Identifier: Apache-2.0
"""Who computes a transform: layouts, threads, and what an old library needs."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch
from torch.utils._pytree import tree_leaves

from wavedp.benchmarks import transforms
from wavedp.benchmarks.cases import SUITES, wavelet
from wavedp.benchmarks.registry import Size
from wavedp.ops.backend import requested_backend

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["F.conv2d", "ptwt", "pytorch_wavelets"])
def test_a_rivals_scales_are_views_and_come_back(name: str) -> None:
    size = Size((2, 3, 16, 24))
    found = transforms.transforms(2, size, CPU)
    if name not in found:
        pytest.skip(f"needs {name}, of the extra [bench]")
    transform = found[name]
    x = torch.randn(size.shape)
    want = found["eager"].forward(x)
    low, coarse, fine = transform.to_scales(transform.forward(x))
    for got, expected in zip([low, *coarse.unbind(1), *fine.unbind(1)], want):
        torch.testing.assert_close(got, expected)

    scales = [t.contiguous() for t in (low, coarse, fine)]
    packed = transform.from_scales(scales)
    torch.testing.assert_close(transform.inverse(packed), x)
    addresses = {t.untyped_storage().data_ptr() for t in tree_leaves(packed)}
    assert addresses == {t.untyped_storage().data_ptr() for t in scales}


def test_the_compiled_definition_is_a_rival_on_a_small_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    compared = {
        case.name: set(case.providers(case.sizes["cpu"][0], CPU))
        for case in SUITES["wavelet"]
        if case.name.startswith("small-")
    }
    with_rivals = {name for name, providers in compared.items() if "eager" in providers}
    assert len(with_rivals) == 6
    assert {name for name, providers in compared.items() if "torch.compile" in providers} == with_rivals


def test_pytorch_wavelets_finds_what_setuptools_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pkg_resources", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with transforms.stand_in_for_pkg_resources():
        import pkg_resources

        with pkg_resources.resource_stream("wavedp.data", "__init__.py") as stream:
            assert stream.read().startswith(b"# SPDX")
    assert "pkg_resources" not in sys.modules


def test_the_real_pkg_resources_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    real = types.ModuleType("pkg_resources")
    monkeypatch.setitem(sys.modules, "pkg_resources", real)
    with transforms.stand_in_for_pkg_resources():
        assert sys.modules["pkg_resources"] is real
    assert sys.modules["pkg_resources"] is real


def test_on_a_gpu_each_implementation_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wavelet, "available_backends", lambda: ("reference", "triton", "cuda"))
    asked: list[str] = []

    def by_backend(name: str, call: object) -> object:
        asked.append(name)
        return call

    monkeypatch.setattr(wavelet, "by_backend", by_backend)
    found = wavelet.written(lambda inputs, out: lambda: None, torch.device("cuda"))
    assert list(found) == ["wavedp, out=", "wavedp triton, out=", "wavedp cuda, out="]
    for provider in found.values():
        provider.prepare([], [])
        assert provider.writes_out
    assert asked == ["auto", "triton", "cuda"]


def test_a_backend_is_asked_for_inside_the_call() -> None:
    assert transforms.by_backend("reference", requested_backend)() == "reference"
    assert transforms.by_backend("auto", requested_backend)() == "auto"


def test_threads_of_pywavelets_share_the_batch() -> None:
    pytest.importorskip("pywt", reason="needs PyWavelets, of the extra [bench]")
    x = torch.randn(5, 2, 8, 12, dtype=torch.float64)
    transform = transforms.pywavelets(2, threads=2)
    bands = transform.unpack(transform.forward(x))
    for got, want in zip(bands, transforms.eager(2, Size((5, 2, 8, 12))).forward(x)):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(transform.image(transform.inverse(transform.pack(bands))), x)
