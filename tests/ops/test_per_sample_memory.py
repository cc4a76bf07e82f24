# SPDX-License-Identifier: Apache-2.0
"""The per-record ops of the C++ library: what memory they touch, on how many threads, with which instructions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from wavedp.ops import per_sample as ops
from wavedp.ops import use_backend

ROOT = Path(__file__).parents[2]
ISAS = ["baseline", "avx2", "avx512", "amx"]


@pytest.fixture
def native() -> Iterator[Any]:
    """The library, with the instruction set of before put back."""
    library = pytest.importorskip("wavedp._csrc", reason="needs the C++ library")
    before = library.isa()
    with use_backend("native"):
        yield library
    library.set_isa(before)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


NEIGHBOURS = """
import ctypes, itertools, math, mmap, sys
sys.path.insert(0, {root!r})
import torch
from wavedp import _csrc
from wavedp.ops import per_sample as ops

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


_csrc.set_isa({isa!r})
DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16
# Widths around vectors of each instruction set and type, and past a chunk of 1024; tokens around whole tiles.
WIDTHS = (1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 129, 1025)
for T, d, dtype, at_end in itertools.product((1, 3, 4, 9, 131), WIDTHS, DTYPES, (True, False)):
    if T > 100 and d > 100:
        continue
    p = 1 + (7 * d) % 50
    maps.clear()
    a = between_guards((2, T, d), dtype, at_end).copy_(torch.randn(2, T, d))
    g = between_guards((2, T, p), dtype, at_end).copy_(torch.randn(2, T, p))
    factors = between_guards((2,), torch.float64, at_end).copy_(torch.tensor([0.5, 1.0]))
    ids = between_guards((2, T), torch.int64, at_end).copy_(torch.randint(0, 5, (2, T)))
    ops.linear_norms(a, g, True)
    ops.norm_grads(a, a, 1e-5, True)
    ops.embedding_norms(ids, a, 1)
    ops.embedding_weight_grad(ids, a, factors, 5, -1)
    ops.squared_norms(a)
    ops.weighted_sum(a, factors)
    ops.scaled_weight_grad(g, a, factors)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect, to put pages out of bounds")
@pytest.mark.parametrize("isa", ISAS)
def test_nothing_beside_the_inputs_is_read(native: Any, isa: str) -> None:
    """A read outside of a tensor ends the process."""
    choose(native, isa)
    code = NEIGHBOURS.format(root=str(ROOT), isa=isa)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{done.returncode} {done.stderr}"


RESULT = object()  # stands for the address of the result


def surrounded(function: Callable[..., Any], arguments: list[Any], count: int, dtype: torch.dtype) -> Tensor:
    """A result that is written between numbers of the test, which must stay as they are."""
    memory = torch.full((count + 32,), 7.0, dtype=dtype)
    start = memory.data_ptr() + 16 * memory.itemsize
    function(*(start if argument is RESULT else argument for argument in arguments), 1)
    assert (memory[:16] == 7).all()
    assert (memory[-16:] == 7).all()
    return memory[16:-16]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("B", "T", "d", "p"), [(1, 1, 1, 1), (3, 5, 17, 9), (2, 9, 33, 65), (2, 70, 16, 3)])
def test_nothing_beside_the_results_is_written(
    native: Any, isa: str, dtype: torch.dtype, B: int, T: int, d: int, p: int
) -> None:
    choose(native, isa)
    code, wide = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}[dtype], ops.arithmetic_dtype(dtype)
    a, g = torch.randn(B, T, d).to(dtype), torch.randn(B, T, p).to(dtype)
    factors, ids = torch.rand(B, dtype=torch.float64), torch.randint(0, 4, (B, T))
    x, y = ([z.data_ptr(), code, (*z.shape, *z.stride()[:2])] for z in (a, g))
    flat, at, rows = [a.data_ptr(), code, (B, 1, T * d, T * d, T * d)], factors.data_ptr(), ids.data_ptr()
    spare = torch.empty(2, B * max(d, p), dtype=torch.float64)
    one, other = (row.data_ptr() for row in spare)
    f64 = torch.float64
    surrounded(native.linear_norms, [*x, *y, RESULT, other, 0], B, f64)
    surrounded(native.linear_norms, [*x, *y, other, RESULT, 0], B, f64)
    bias = surrounded(native.linear_norms, [*x, *y, one, other, RESULT], B * p, wide)
    assert torch.allclose(bias.view(B, p).double(), g.double().sum(1), rtol=1e-5, atol=1e-5)
    surrounded(native.norm_grads, [*x, *x, 1e-5, True, RESULT, other], B * d, wide)
    surrounded(native.norm_grads, [*x, *x, 1e-5, True, other, RESULT], B * d, wide)
    surrounded(native.embedding_norms, [rows, *x, 1, RESULT], B, f64)
    surrounded(native.embedding_weight_grad, [rows, *x, at, 4, -1, RESULT], 4 * d, wide)
    surrounded(native.squared_norms, [*flat, RESULT], B, f64)
    surrounded(native.weighted_sum, [*flat, at, RESULT], T * d, wide)
    surrounded(native.scale_records, [*x, at, 2.0**-100, RESULT], B * T * d, wide)


def choose(native: Any, isa: str) -> None:
    try:
        native.set_isa(isa)
    except ValueError:
        pytest.skip(f"needs a CPU with {isa}")


def everything(dtype: torch.dtype) -> list[Tensor]:
    """Results of inputs that are enough work for several threads, and of one record that several share."""
    torch.manual_seed(0)
    results: list[Tensor] = []
    for B, T, d, p in ((9, 60, 200, 300), (1, 260, 600, 520), (2, 700, 130, 60), (1, 1000, 257, 130)):
        a, g = torch.randn(B, T, d).to(dtype), torch.randn(B, T, p).to(dtype)
        factors, ids = torch.rand(B), torch.randint(0, 50, (B, T))
        results += ops.linear_norms(a, g, True)
        results += ops.norm_grads(a, a, 1e-5, True)
        results += [ops.embedding_norms(ids, a, 1), ops.embedding_weight_grad(ids, a, factors, 50, 1)]
        results += [ops.squared_norms(a), ops.weighted_sum(a, factors)]
    return results


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(threads: Callable[[int], None], dtype: torch.dtype) -> None:
    threads(1)
    expected = everything(dtype)
    for count in (2, 3, 5, 8):
        threads(count)
        for one, other in zip(everything(dtype), expected, strict=True):
            assert torch.equal(one, other), count


def test_instruction_sets_agree(native: Any) -> None:
    found = {}
    for isa in ISAS:
        try:
            native.set_isa(isa)
        except ValueError:
            continue
        found[isa] = everything(torch.float32)
    assert "baseline" in found
    for results in found.values():
        for one, other in zip(results, found["baseline"], strict=True):
            assert torch.allclose(one, other, rtol=2e-5, atol=2e-5)


def test_a_record_does_not_depend_on_its_batch(native: Any) -> None:
    """Slices of a record that several units share are put together in the same order as those of one."""
    a, g = torch.randn(40, 200, 300), torch.randn(40, 200, 280)
    many = ops.linear_norms(a, g, True)
    for one, other in zip(ops.linear_norms(a[7:8], g[7:8], True), many):
        assert torch.equal(one[0], other[7])


@pytest.mark.usefixtures("native")
def test_arguments_of_the_library_are_checked() -> None:
    import wavedp._csrc as library

    x = torch.ones(2, 3, 4)
    good = x.data_ptr(), 0, (2, 3, 4, 12, 4)
    out = torch.empty(100, dtype=torch.float64).data_ptr()
    for call, message in (
        (lambda: library.linear_norms(0, *good[1:], *good, out, out, 0, 1), "a_ptr is a null pointer"),
        (lambda: library.linear_norms(*good, *good, 0, out, 0, 1), "squared_ptr is a null pointer"),
        (lambda: library.linear_norms(*good, x.data_ptr(), 0, (2, 2, 4, 12, 4), out, out, 0, 1), "as many records"),
        (lambda: library.linear_norms(*good, *good, out, out, 0, 0), "threads is 0"),
        (lambda: library.squared_norms(x.data_ptr(), 4, (2, 1, 4, 4, 4), out, 1), "dtype is 4"),
        (lambda: library.squared_norms(x.data_ptr(), 0, (2, 3, 4, 12, 4), out, 1), "tokens is 3"),
        (lambda: library.squared_norms(x.data_ptr(), 0, (2, 1, 4, -4, 4), out, 1), "a size or stride is -4"),
        (
            lambda: library.norm_grads(*good, x.data_ptr(), 0, (2, 3, 2, 12, 4), 0.1, True, out, out, 1),
            "the width of g",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
