# SPDX-License-Identifier: Apache-2.0
"""The libraries that wavedp.compat stands in for, where they are installed."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="session")
def ptwt() -> ModuleType:
    module: ModuleType = pytest.importorskip("ptwt", reason="needs ptwt, to compare with")
    return module


@pytest.fixture(scope="session")
def pytorch_wavelets() -> ModuleType:
    """pytorch_wavelets 1.3.0 imports pkg_resources, which setuptools 82 removed, for files it reads later or never."""

    def resource_stream(*names: Any) -> None:
        raise NotImplementedError(f"a stand-in for pkg_resources was asked for {names}")

    if "pytorch_wavelets" not in sys.modules and importlib.util.find_spec("pkg_resources") is None:
        stand_in = ModuleType("pkg_resources")
        stand_in.resource_stream = resource_stream  # type: ignore[attr-defined]
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "pkg_resources", stand_in)
            return _original()
    return _original()


def _original() -> ModuleType:
    module: ModuleType = pytest.importorskip("pytorch_wavelets", reason="needs pytorch_wavelets, to compare with")
    return module
