# SPDX-License-Identifier: Apache-2.0
"""What every test gets: no network, pinned threads and seed, and the fixtures `device` and `wavedp_data`."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The number of threads decides the order in which CPU sums are taken: one, so that a tolerance met on one machine
# is met on the next. Read by OpenMP when torch is imported, here and in every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
LOOPBACK = ("127.", "::1", "localhost")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(skip)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device this machine has: the CPU, and the CUDA device where there is one."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to anything but this machine fails the test that tries it."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(LOOPBACK):
            raise RuntimeError(f"a test tried to reach {address[0]}:{address[1]}; tests use no network")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture
def wavedp_data() -> Path:
    """The folder of public data sets named by WAVEDP_DATA (for example with `fashion-mnist/` in it)."""
    folder = os.environ.get("WAVEDP_DATA")
    if not folder:
        pytest.skip("needs WAVEDP_DATA, the path of a folder of public data sets")
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"WAVEDP_DATA names {folder!r}, which is not a folder")
    return Path(folder)
