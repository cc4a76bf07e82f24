# SPDX-License-Identifier: Apache-2.0
"""`make sanitize`: what the sanitizers have to report, each fault in a child that has to die of it.

A check that cannot fail is none: the functions of the library, on every instruction set, are given a tensor that claims
more memory than it has, or one that is not aligned. Skipped where the library was built without sanitizers.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import wavedp
from wavedp.ops import use_backend, use_instructions
from wavedp.optim import DPSGD, DPAdam

SIZE = 64  # of an image; a record, a row, a batch are as large
COUNT = SIZE * SIZE
LARGE = 1024  # of float32 it is written past the caches
ISAS = ("baseline", "avx2", "avx512")


def is_sanitized() -> bool:
    try:
        native = importlib.import_module("wavedp._csrc")
    except ImportError:
        return False
    return b"__asan_report_load" in Path(str(native.__file__)).read_bytes()


pytestmark = pytest.mark.skipif(not is_sanitized(), reason="needs the C++ library as `make sanitize` builds it")


def whole(*shape: int, dtype: Any = np.float32) -> Tensor:
    return torch.from_numpy(np.ones(shape, dtype))


def short(*shape: int, dtype: Any = np.float32) -> Tensor:
    """One element more than there is memory for."""
    count = int(np.prod(shape))
    memory = np.ones(count - 1, dtype)
    return torch.from_numpy(np.lib.stride_tricks.as_strided(memory, (count,), writeable=True)).view(shape)


def shifted(*shape: int, dtype: Any = np.float32) -> Tensor:
    """A byte off the alignment of its type."""
    count = int(np.prod(shape))
    memory = np.zeros(count * np.dtype(dtype).itemsize + 1, np.uint8)
    return torch.from_numpy(memory[1:].view(dtype)).view(shape)


Make = Callable[..., Tensor]


def aligned(make: Make) -> Tensor:
    """What ``make`` makes behind some elements more, such that it begins a line of a cache."""
    half = LARGE // 2
    for skipped in range(16):
        memory = make(half * half + skipped)
        if (memory.data_ptr() + 4 * skipped) % 64 == 0:
            return memory[skipped:].view(half, half)
    raise AssertionError("no element of float32 begins a line")


def step(optimizer: Any, total: Tensor, param: Tensor) -> None:
    optimizer([param]).step(sums=[total], std=1.0, denominator=1.0)


def halves(make: Make) -> Any:
    """The bands of a large image, on the lines of a cache, so that they are written past it; the last is short."""
    bands = [aligned(whole), aligned(whole), aligned(whole), aligned(make)]
    return bands[0], tuple(bands[1:])


CALLS: dict[str, Callable[[Make], Any]] = {
    "wavedec2": lambda make: wavedp.wavedec2(make(1, SIZE, SIZE), level=3),
    "wavedec2, odd": lambda make: wavedp.wavedec2(make(1, SIZE - 1, SIZE - 1), level=2),
    "dwt2, out": lambda make: wavedp.dwt2(
        whole(SIZE, SIZE),
        out=(whole(SIZE // 2, SIZE // 2), tuple(m(SIZE // 2, SIZE // 2) for m in (whole, whole, make))),
    ),
    "coarse": lambda make: wavedp.coarse(make(1, SIZE, SIZE), 3),
    "waverec2": lambda make: wavedp.waverec2(
        [whole(SIZE, SIZE), (whole(SIZE, SIZE), whole(SIZE, SIZE), make(SIZE, SIZE))]
    ),
    "wavelet_tokens": lambda make: wavedp.wavelet_tokens(make(1, 1, SIZE, SIZE), 2, 4),
    "wavelet_untokens": lambda make: wavedp.wavelet_untokens(
        [make(1, 16, 16), whole(1, 16, 48), whole(1, 16, 192)], 4, output_size=(SIZE, SIZE)
    ),
    "dwt2, past the caches": lambda make: wavedp.dwt2(whole(LARGE, LARGE), out=halves(make)),
    "gaussian_noise": lambda make: wavedp.gaussian_noise((COUNT,), 1.0, out=make(COUNT)),
    "noisy_mean": lambda make: wavedp.noisy_mean(make(COUNT), 1.0),
    "noisy_mean, strict": lambda make: wavedp.noisy_mean(make(COUNT, dtype=np.float64), 1.0, mode="strict"),
    "add_gaussian_noise_": lambda make: wavedp.add_gaussian_noise_(make(COUNT), 1.0),
    "DPSGD, sum": lambda make: step(DPSGD, make(COUNT), whole(COUNT)),
    "DPAdam, parameter": lambda make: step(DPAdam, whole(COUNT), make(COUNT)),
    "ghost_norm": lambda make: wavedp.ghost_norm(make(2, SIZE, SIZE), whole(2, SIZE, SIZE)),
    "ghost_norm, gradients": lambda make: wavedp.ghost_norm(whole(2, 5, SIZE), make(2, 5, SIZE)),
    "embedding_grad_norm": lambda make: wavedp.embedding_grad_norm(
        torch.arange(SIZE).view(2, -1), make(2, SIZE // 2, SIZE)
    ),
    "per_sample_norm": lambda make: wavedp.per_sample_norm([make(2, COUNT)]),
    "clip_and_sum": lambda make: wavedp.clip_and_sum([make(2, COUNT)], 1.0),
    "scaled_weight_grad": lambda make: wavedp.scaled_weight_grad(
        make(2, SIZE, SIZE), whole(2, SIZE, SIZE), torch.ones(2)
    ),
}


def death_of(fault: Callable[[], Any]) -> tuple[int, str]:
    """What a child that does it ends with, and what it said last."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        os.dup2(writing, 2)
        try:
            fault()
        except BaseException as error:
            os.write(2, f"raised {error!r}".encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    return os.waitpid(child, 0)[1], said


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    try:
        with use_instructions(name):
            pass
    except ValueError:
        pytest.skip(f"needs a CPU with {name}")
    return name


@pytest.mark.parametrize("name", CALLS)
def test_memory_past_the_end_is_reported(isa: str, name: str) -> None:
    with use_backend("native"), use_instructions(isa):
        CALLS[name](whole)
        status, said = death_of(lambda: CALLS[name](short))
    assert status != 0, said
    assert re.search(r"AddressSanitizer: (heap-buffer-overflow|unknown-crash) on address", said), said[:1500]
    assert re.search(r"#[01] .*/csrc/cpu/", said), said[:1500]


# The others take what is not aligned by memcpy, which is right.
NEED_ALIGNMENT = (
    "wavedec2, odd",
    "gaussian_noise",
    "noisy_mean",
    "DPSGD, sum",
    "DPAdam, parameter",
    "scaled_weight_grad",
)


@pytest.mark.parametrize("name", NEED_ALIGNMENT)
def test_memory_off_its_alignment_is_reported(isa: str, name: str) -> None:
    with use_backend("native"), use_instructions(isa):
        status, said = death_of(lambda: CALLS[name](shifted))
    assert status != 0, said
    assert re.search(r"/csrc/cpu/.*: runtime error: .* misaligned address", said), said[:1500]
