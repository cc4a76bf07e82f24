# SPDX-License-Identifier: Apache-2.0
"""The public wavelet functions on odd memory, far apart memory, and from many threads.

Whatever the memory is like, the bits are those of a contiguous image in one thread, whose values the neighbouring
tests check.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pywt
import torch
from torch import Tensor

import wavedp
from wavedp.ops import use_backend

ROOT = Path(__file__).parents[2]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def noise(*shape: int, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).to(device)


def flat(coeffs: Any) -> list[Tensor]:
    return [coeffs[0], *(band for details in coeffs[1:] for band in details)]


def nested(bands: list[Tensor]) -> list[Any]:
    return [bands[0], *(tuple(bands[k : k + 3]) for k in range(1, len(bands), 3))]


def of_a_copy(x: Tensor, level: int) -> list[Tensor]:
    """The bands of the same image in contiguous memory."""
    copy = x.clone(memory_format=torch.contiguous_format)
    assert copy.is_contiguous()
    return flat(wavedp.wavedec2(copy, level))


def assert_equal(actual: list[Tensor], expected: list[Tensor], what: Any = "") -> None:
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other), what


def strange_views(dtype: torch.dtype, device: Any) -> Iterator[tuple[str, Tensor]]:
    """Images of even sizes whose memory is anything but a contiguous block."""
    memory = noise(8192, dtype=dtype, device=device)
    yield "expanded-everywhere", memory[:1].expand(3, 8, 16)
    yield "expanded-rows", memory[:16].expand(2, 8, 16)
    yield "expanded-columns", memory[:16].view(2, 8, 1).expand(2, 8, 16)
    yield "expanded-batch", memory[:128].view(8, 16).expand(5, 3, 8, 16)
    yield "overlapping", memory.as_strided((4, 8, 16), (5, 3, 1))
    yield "overlapping-backwards-looking", memory.as_strided((3, 8, 16), (1, 1, 2), 7)
    yield "one-element-apart", memory.as_strided((3, 8, 16), (1, 3 * 16, 3))
    yield "steps", memory[:4096].view(2, 32, 64)[:, 3:27:3, 1:33:2]
    yield "transposed", memory[:512].view(2, 16, 16).mT
    yield "channels-last", memory[:768].view(2, 8, 16, 3).permute(0, 3, 1, 2)
    yield "scattered-axes", memory[:4096].view(8, 4, 16, 2, 4)[:, 1::2, :, :, ::3].permute(4, 1, 3, 0, 2)
    for offset in (1, 3, 7, 15):
        yield f"unaligned-{offset}", memory[offset : offset + 2 * 8 * 64].view(2, 8, 64)
    yield "sixty-axes", memory[:4096].view(2, 32, 64)[:, ::4, ::4].view(*[1] * 29, 2, *[1] * 28, 8, 16)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strange_views(target: Any, dtype: torch.dtype) -> None:
    # The interpreter takes a second for a view: the three most different ones.
    for name, x in list(strange_views(dtype, target.device))[:: 5 if target.interpreted else 1]:
        before, expected = x.clone(), of_a_copy(x, 3)
        assert_equal(flat(wavedp.wavedec2(x, 3)), expected, name)
        assert_equal([wavedp.coarse(x, 3)], expected[:1], name)
        strided = nested([torch.stack([band, band], -1)[..., 1] for band in expected])
        assert_equal([wavedp.waverec2(strided)], [wavedp.waverec2(nested(expected))], name)
        assert torch.equal(x, before), f"{name}: the input was changed"


@pytest.mark.parametrize("dtype", [*FLOATS, torch.uint8], ids=str)
def test_strange_views_as_tokens(target: Any, dtype: torch.dtype) -> None:
    memory = torch.randint(0, 256, (4096,), dtype=torch.uint8).to(target.device).to(dtype)
    views = {
        "channels-last": memory[:768].view(2, 8, 16, 3).permute(0, 3, 1, 2),
        "overlapping": memory.as_strided((2, 3, 8, 16), (5, 3, 2, 1)),
        "expanded": memory[:1].expand(2, 3, 8, 16),
        "steps": memory.view(2, 1, 32, 64)[:, :, 3:27:3, 1:33:2],
        "unaligned": memory[1 : 1 + 768].view(2, 3, 8, 16),
        "transposed": memory[:768].view(2, 3, 16, 8).mT,
    }
    for name, x in list(views.items())[: 2 if target.interpreted else None]:
        expected = wavedp.wavelet_tokens(x.clone(memory_format=torch.contiguous_format), 2, (1, 2))
        assert_equal(wavedp.wavelet_tokens(x, 2, (1, 2)), expected, name)
        if dtype != torch.uint8:
            strided = [torch.cat([tokens, tokens], -1)[..., : tokens.shape[-1]] for tokens in expected]
            image = wavedp.wavelet_untokens(strided, (1, 2), output_size=(8, 16))
            assert_equal([image], [wavedp.wavelet_untokens(expected, (1, 2), output_size=(8, 16))], name)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("offset", [1, 3])
def test_results_written_to_unaligned_memory(target: Any, offset: int, dtype: torch.dtype) -> None:
    x = noise(2, 16, 64, dtype=dtype, device=target.device)
    expected = of_a_copy(x, 2)
    memory = torch.full((4 * x.numel(),), 7.0, dtype=dtype, device=target.device)
    untouched = torch.ones_like(memory, dtype=torch.bool)
    views, start = [], offset
    for band in expected:
        untouched[start : start + band.numel()] = False
        views.append(memory[start : start + band.numel()].view(band.shape))
        start += band.numel() + 1
    wavedp.wavedec2(x, 2, out=nested(views))
    assert_equal(views, expected)
    assert (memory[untouched] == 7).all(), "something was written beside the results"
    image = memory[-x.numel() - offset :][: x.numel()].view(x.shape)
    wavedp.waverec2(nested(expected), out=image)
    assert_equal([image], [wavedp.waverec2(nested(expected))])
    assert (memory[-offset:] == 7).all(), "something was written behind the image"


NEIGHBOURS = """
import ctypes, itertools, math, mmap, sys
sys.path.insert(0, {root!r})
import torch, wavedp
from wavedp import _csrc

PAGE, maps = mmap.PAGESIZE, []
protect = ctypes.CDLL(None, use_errno=True).mprotect


def between_guards(shape, dtype, at_end):
    "A tensor that begins or ends with a page of its own, between two pages that nobody may touch."
    size = math.prod(shape) * dtype.itemsize
    inner = -(-size // PAGE) * PAGE
    maps.append(mmap.mmap(-1, inner + 2 * PAGE))
    start = ctypes.addressof(ctypes.c_char.from_buffer(maps[-1]))
    for guard in (start, start + PAGE + inner):
        assert protect(ctypes.c_void_p(guard), PAGE, 0) == 0
    offset = PAGE + (inner - size if at_end else 0)
    return torch.frombuffer(maps[-1], dtype=dtype, count=math.prod(shape), offset=offset).view(shape)


def halved(size, level):
    return [tuple(-(-side // 2**k) for side in size) for k in range(level, 0, -1)]


_csrc.set_isa({isa!r})
DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16
# Widths around one and two vectors of each instruction set and type; heights around the rows of a unit of work.
for size in itertools.product((1, 2, 5, 16), (1, 2, 7, 15, 16, 31, 32, 33, 63, 64, 65, 127, 129)):
    for dtype, (level, mode), at_end in itertools.product(DTYPES, ((1, "zero"), (3, "smooth")), (True, False)):
        maps.clear()
        x = between_guards((2, *size), dtype, at_end)
        x.copy_(torch.randn(2, *size))
        bands = [between_guards((2, *h), dtype, at_end) for h in halved(size, level) for _ in range(3)]
        approximation = between_guards(bands[0].shape, dtype, at_end)
        out = [approximation, *(tuple(bands[k : k + 3]) for k in range(0, len(bands), 3))]
        wavedp.wavedec2(x, level, mode, out=out)
        wavedp.coarse(x, level, mode, out=approximation)
        wavedp.waverec2(out, output_size=size, out=x)
        last = between_guards((2, *size, 3), dtype, at_end).permute(0, 3, 1, 2)
        wavedp.wavedec2(last.zero_(), level, mode)
for grid, patch, levels in itertools.product(((1, 1), (2, 3)), ((1, 1), (2, 3), (3, 4)), (1, 2, 3)):
    size = tuple(g * p * 2**levels for g, p in zip(grid, patch))
    for dtype, at_end in itertools.product((*DTYPES, torch.uint8), (True, False)):
        maps.clear()
        x = between_guards((2, 3, *size), dtype, at_end)
        expected = wavedp.wavelet_tokens(x.copy_(torch.randint(0, 99, x.shape)), levels, grid)
        tokens = [between_guards(one.shape, one.dtype, at_end) for one in expected]
        wavedp.wavelet_tokens(x, levels, grid, out=tokens)
        assert all(torch.equal(one, other) for one, other in zip(tokens, expected))
        image = between_guards((2, 3, *size), tokens[0].dtype, at_end)
        wavedp.wavelet_untokens(tokens, grid, output_size=size, out=image)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect, to put pages out of bounds")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_nothing_beside_the_memory_is_touched(isa: str) -> None:
    """A read or write outside of a tensor ends the process."""
    native = pytest.importorskip("wavedp._csrc", reason="needs the C++ library")
    before = native.isa()
    try:
        native.set_isa(isa)
    except ValueError:
        pytest.skip(f"needs a CPU with {isa}")
    native.set_isa(before)
    code = NEIGHBOURS.format(root=str(ROOT), isa=isa)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{done.returncode} {done.stderr}"


def test_out_that_overlaps_is_refused() -> None:
    memory = noise(3, 16, 16)
    x = memory[0]
    fresh = wavedp.dwt2(x)
    with pytest.raises(ValueError, match="overlap"):
        wavedp.dwt2(x, out=(x[:8, :8], fresh[1]))
    with pytest.raises(ValueError, match="overlap"):
        wavedp.coarse(x, 1, out=memory.view(-1)[192:].as_strided((8, 8), (8, 1)))  # its head is in x
    band = torch.empty(8, 8)
    with pytest.raises(ValueError, match="overlap"):
        wavedp.dwt2(x, out=(band, (band, fresh[1][1], fresh[1][2])))
    with pytest.raises(ValueError, match="overlap"):
        wavedp.waverec2([x, (None, None, None)], out=memory.view(-1)[128:640].as_strided((32, 32), (1, 1)))
    with pytest.raises((ValueError, RuntimeError)):
        wavedp.coarse(x, 1, out=torch.empty(1).expand(8, 8))
    interleaved = torch.empty(8, 16)
    halves = interleaved[:, 0::2], interleaved[:, 1::2]
    wavedp.dwt2(x, out=(halves[0], (halves[1], fresh[1][1], fresh[1][2])))
    assert_equal(list(halves), of_a_copy(x, 1)[:2])


def test_inputs_are_left_alone() -> None:
    x, coeffs = noise(2, 3, 16, 16), wavedp.wavedec2(noise(2, 3, 16, 16), 2)
    tokens = wavedp.wavelet_tokens(x, 2, 2)
    inputs = [x, *flat(coeffs), *tokens]
    copies, versions = [one.clone() for one in inputs], [one._version for one in inputs]
    wavedp.dwt2(x), wavedp.wavedec2(x, 3, "smooth"), wavedp.coarse(x, 2), wavedp.waverec2(coeffs)
    wavedp.wavelet_tokens(x, 2, 2, [0.5, 1.0, 2.0], [0.5, 1.0, 2.0], energies=True)
    wavedp.wavelet_untokens(tokens, 2, [0.5, 1.0, 2.0], [0.5, 1.0, 2.0], channels=3)
    for one, copy, version in zip(inputs, copies, versions, strict=True):
        assert torch.equal(one, copy)
        assert one._version == version


def test_lazy_tensors() -> None:
    x = noise(2, 8, 8)
    expected = of_a_copy(-x, 2)
    assert_equal(flat(wavedp.wavedec2(torch._neg_view(x), 2)), expected)
    imaginary = torch.complex(x, x).conj().imag  # a negative view of interleaved memory
    assert imaginary.is_neg()
    assert_equal(flat(wavedp.wavedec2(imaginary, 2)), expected)
    zeros = torch._efficientzerotensor((2, 8, 8))
    assert all(band.eq(0).all() for band in flat(wavedp.wavedec2(zeros, 2)))
    with torch.inference_mode():
        inferred = wavedp.wavedec2(x * 1, 2)
    assert_equal(flat(inferred), of_a_copy(x, 2))


def test_read_only_numpy_memory() -> None:
    array = np.random.default_rng(0).normal(size=(2, 9, 12))
    array.setflags(write=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        x = torch.from_numpy(array)
    expected = flat(pywt.wavedec2(array, "haar", "reflect", 2))
    for band, wanted in zip(flat(wavedp.wavedec2(x, 2, "reflect")), expected, strict=True):
        torch.testing.assert_close(band, torch.from_numpy(wanted), rtol=0, atol=1e-13)


# Sizes beyond 2^31 elements: the memory is only named, and few of its pages are touched.


def distant(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    reach = sum((size - 1) * stride for size, stride in zip(shape, strides)) + 1
    assert reach > 2**31
    memory = torch.empty(reach, dtype=dtype)
    x = memory.as_strided(shape, strides)
    x.copy_(torch.randint(0, 200, shape))
    return x


DISTANCES = [
    pytest.param((2, 8, 16), (2**31 + 64, 16, 1), id="planes"),
    pytest.param((1, 3, 8, 16), (0, 2**30 + 64, 16, 1), id="channels"),
    pytest.param((2, 2, 8, 16), (2**31 + 64, 2**30, 16, 1), id="images-and-channels"),
    pytest.param((1, 8, 16), (0, 2**29, 1), id="rows"),
    pytest.param((1, 8, 16), (0, 1, 2**28), id="columns"),
]


@pytest.mark.parametrize(("shape", "strides"), DISTANCES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16], ids=str)
def test_offsets_beyond_two_to_the_31(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> None:
    x = distant(shape, strides, dtype)
    near = x.contiguous()
    if dtype == torch.uint8:
        actual = wavedp.coarse(x, 2, affine=(1.0, 0.0))
        expected = of_a_copy(near.float(), 2)[0]
        assert_equal([actual], [expected])
    else:
        assert_equal(flat(wavedp.wavedec2(x, 2)), of_a_copy(near, 2))
        assert_equal([wavedp.coarse(x, 2)], of_a_copy(near, 2)[:1])
    if len(shape) == 4:
        for one, other in zip(wavedp.wavelet_tokens(x, 2, 2), wavedp.wavelet_tokens(near, 2, 2), strict=True):
            assert torch.equal(one, other)


def test_an_image_of_more_than_two_to_the_31_samples() -> None:
    row = torch.randint(0, 256, (65_538,), dtype=torch.uint8)
    x = row.expand(32_770, 65_538)
    assert x.numel() > 2**31
    # 65,538 = 256 * 256 + 2: the last coefficient of level 1 is repeated at each level after it.
    means = torch.cat([row[:-2].double().view(-1, 256).mean(1), row[-2:].double().mean(0, keepdim=True)])
    expected = (256 * means).expand(129, 257)
    actual = wavedp.coarse(x, 8, affine=(1.0, 0.0))
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=0)


# Threads and processes


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype) -> None:
    # 2.4 million samples: enough work for eight threads, in planes that eight does not divide.
    x, odd = noise(2, 3, 640, 640, dtype=dtype), noise(5, 677, 733, dtype=dtype)

    def everything() -> list[Tensor]:
        coeffs, tokens = wavedp.wavedec2(x, 3), wavedp.wavelet_tokens(x, 3, 16, energies=True)
        odd_coeffs = wavedp.wavedec2(odd, 5, "periodic")
        results = [*flat(coeffs), *flat(odd_coeffs), *tokens[0], tokens[1], wavedp.coarse(x, 4), wavedp.coarse(odd, 3)]
        back = [wavedp.waverec2(coeffs), wavedp.waverec2(odd_coeffs, output_size=(677, 733))]
        return [*results, *back, wavedp.wavelet_untokens(tokens[0], 16, channels=3)]

    torch.set_num_threads(1)
    expected = everything()
    for threads in range(2, 9):
        torch.set_num_threads(threads)
        for one, other in zip(everything(), expected, strict=True):
            assert torch.equal(one, other), threads


def test_many_python_threads_at_once() -> None:
    images = [noise(2, 3, 8 * (1 + k % 5), 8 * (1 + k % 3)) for k in range(40)]

    def work(x: Tensor) -> list[Tensor]:
        with use_backend("reference" if x.shape[-1] == 8 else "auto"):
            y = x.clone().requires_grad_()
            coeffs = wavedp.wavedec2(y, 3)
            sum(band.square().sum() for band in flat(coeffs)).backward()
            tokens, energies = wavedp.wavelet_tokens(x, 3, 1, energies=True)
            return [
                *(band.detach() for band in flat(coeffs)),
                y.grad,
                wavedp.waverec2(coeffs).detach(),
                *tokens,
                energies,
            ]

    expected = [work(x) for x in images]
    start = threading.Barrier(8)
    with ThreadPoolExecutor(8, initializer=start.wait) as pool:
        for actual, wanted in zip(pool.map(work, images * 5), expected * 5, strict=True):
            for one, other in zip(actual, wanted, strict=True):
                assert torch.equal(one, other)


def test_a_process_that_forks_after_use() -> None:
    """A child inherits no threads: a library that waits for its pool there hangs, as PyTorch's own ops do, which
    therefore run on one thread here."""
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, wavedp
torch.set_num_threads(4)
x = torch.randn(8, 3, 512, 512)
before = wavedp.wavedec2(x, 3)
child = os.fork()
if child == 0:
    signal.alarm(60)
    torch.set_num_threads(4)
    after, image = wavedp.wavedec2(x, 3), wavedp.waverec2(before)
    torch.set_num_threads(1)
    same = all(torch.equal(a, b) for one, other in zip(before[1:], after[1:]) for a, b in zip(one, other))
    os._exit(0 if same and (image - x).abs().max() < 1e-5 else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(wavedp.wavedec2(x, 3)[0], before[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_child_that_uses_the_library_first() -> None:
    """PyTorch's pool ran in the parent before anything of the library was loaded."""
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, wavedp
torch.set_num_threads(4)
x = torch.rand(8, 3, 512, 512)
x = x + 1
child = os.fork()
if child == 0:
    signal.alarm(60)
    coeffs = wavedp.wavedec2(x, 3)
    torch.set_num_threads(1)
    os._exit(0 if (wavedp.waverec2(coeffs) - x).abs().max() < 1e-5 else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
