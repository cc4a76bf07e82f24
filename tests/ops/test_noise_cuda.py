# SPDX-License-Identifier: Apache-2.0
"""The CUDA source of words, normals and noisy means, compiled for the CPU: the threads of its kernels one after the
other. Words, float32 normals and strict normals have the bits of the C++ library; float64 normals have bits of their
own, since the C library makes the others.
"""

from __future__ import annotations

from ctypes import CDLL
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

import wavedp
from wavedp.noise import MAX_DEVIATION
from wavedp.ops import noise, noise_native, use_backend
from wavedp.ops.wavelet_native import DTYPE_CODES
from wavedp.reference import noise as reference
from wavedp.reference.noise import NARROW, STRICT, STRICT_NORMAL_ERROR, WIDE

CORNERS = (0, 1, 2**31, 2**32 - 1)
FLOAT_ULP = 5  # of a float32 normal: 4.54 was the worst of 2e7 pairs, corners included
DOUBLE_ULP = 6  # of a float64 normal of three words
KEY = torch.arange(32, dtype=torch.uint8)
STEP, OFFSET = 7, 2**40 + 61


def words_of(cuda_on_cpu: CDLL, key: bytes, counter: int, nonce: bytes, count: int, rounds: int = 20) -> list[int]:
    secret = torch.frombuffer(bytearray(key), dtype=torch.uint8)
    tail = torch.frombuffer(bytearray(nonce), dtype=torch.uint32)
    out = torch.full((count + 1,), 77, dtype=torch.uint32)
    cuda_on_cpu.chacha20_words(secret.data_ptr(), counter, tail.data_ptr(), tail.numel(), rounds, out.data_ptr(), count)
    assert out[count] == 77  # nothing is written behind the last
    return out[:count].tolist()


def test_block_of_rfc_8439(cuda_on_cpu: CDLL) -> None:
    """Section 2.3.2."""
    words = words_of(cuda_on_cpu, bytes(range(32)), 1, bytes.fromhex("000000090000004a00000000"), 16)
    assert " ".join(f"{word:08x}" for word in words) == (
        "e4e7f110 15593bd1 1fdd0f50 c47120a3 c7f4d1c7 0368c033 9aaa2204 4e6cd4c3 "
        "466482d2 09aa9f07 05d7c214 a2028bd9 d19c12b5 b94e16de e883d0cb 4e3c50a2"
    )


@pytest.mark.parametrize(
    ("key", "counter", "nonce", "stream"),
    [
        (bytes(32), 0, bytes(12), "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"),
        (bytes(32), 1, bytes(12), "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"),
        (bytes(31) + b"\x01", 1, bytes(12), "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"),
        (b"\x00\xff" + bytes(30), 2, bytes(12), "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"),
        (bytes(32), 0, bytes(11) + b"\x02", "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7"),
    ],
)
def test_vectors_of_rfc_8439(cuda_on_cpu: CDLL, key: bytes, counter: int, nonce: bytes, stream: str) -> None:
    """Appendix A.1, test vectors 1 to 5, the first half of each block."""
    words = words_of(cuda_on_cpu, key, counter, nonce, 8)
    assert b"".join(word.to_bytes(4, "little") for word in words).hex() == stream


@pytest.mark.parametrize("rounds", [8, 12, 20])
@pytest.mark.parametrize(
    ("counter", "nonce"),
    [(2**32 - 2, bytes(range(8))), (2**64 - 2, bytes(range(8))), (2**32 - 2, bytes(range(12)))],
    ids=["64-bit carry", "64-bit wrap", "32-bit wrap"],
)
def test_words_of_many_blocks(cuda_on_cpu: CDLL, counter: int, nonce: bytes, rounds: int) -> None:
    key, count = bytes(range(100, 132)), 16 * 5 + 3
    expected, tail = torch.empty(count, dtype=torch.uint32), torch.frombuffer(bytearray(nonce), dtype=torch.uint32)
    secret = torch.frombuffer(bytearray(key), dtype=torch.uint8)
    reference.chacha20_words_forward(secret, counter, tail.tolist(), rounds, expected)
    assert words_of(cuda_on_cpu, key, counter, nonce, count, rounds) == expected.tolist()


def test_the_counter_carries_into_its_upper_half(cuda_on_cpu: CDLL) -> None:
    """Blocks 2^32 - 1 and 2^32, whose state has the halves of the counter as words 12 and 13."""
    key = bytes(range(32))
    words = words_of(cuda_on_cpu, key, 2**32 - 1, bytes(8), 32)
    assert words[:16] == words_of(cuda_on_cpu, key, 2**32 - 1, bytes(12), 16)
    assert words[16:] == words_of(cuda_on_cpu, key, 0, (1).to_bytes(4, "little") + bytes(8), 16)


def normals_of(cuda_on_cpu: CDLL, kind: int, words: Tensor) -> Tensor:  # [N, 4] int64 -> [N, 2] float64
    pairs = torch.empty(len(words), 2, dtype=torch.float64)
    raw = words.to(torch.uint32).contiguous()
    cuda_on_cpu.normals(kind, raw.data_ptr(), len(words), pairs.data_ptr())
    return pairs


def corner_words() -> Tensor:
    """All quadruples of the corners, and their neighbours."""
    near = sorted({(word + by) % 2**32 for word in (*CORNERS, 2**29, 2**30) for by in (-1, 0, 1)})
    return torch.cartesian_prod(*[torch.tensor(near)] * 4)


def random_words(count: int) -> Tensor:
    return torch.randint(0, 2**32, (count, 4), generator=torch.Generator().manual_seed(5))


def in_ulp(found: Tensor, exact: Tensor, digits: int) -> Tensor:
    _, exponent = torch.frexp(exact)
    return (found - exact).abs() / torch.ldexp(torch.ones_like(exact), exponent - digits)


def test_float32_normals(cuda_on_cpu: CDLL) -> None:
    words = torch.cat([corner_words(), random_words(400_000)])
    found = normals_of(cuda_on_cpu, NARROW, words)
    # Not the definition's, whose angle of 2 pi (1 - 2^-33) has lost digits that the sine needs.
    exact = normals_of(cuda_on_cpu, WIDE, words)
    assert in_ulp(found, exact, 24).max() <= FLOAT_ULP
    assert found.isfinite().all()
    assert 9.4 < found.abs().max() <= MAX_DEVIATION * (1 + 2.0**-22)


def test_float64_normals(cuda_on_cpu: CDLL) -> None:
    words = torch.cat([corner_words(), random_words(100_000)])
    found = normals_of(cuda_on_cpu, WIDE, words)
    near = torch.stack(reference.normals_from_words(*words.T[:3]), dim=1)
    assert (found - near).abs().max() <= 2 * STRICT_NORMAL_ERROR
    some = torch.cat([corner_words()[::7], random_words(2000)])
    found = normals_of(cuda_on_cpu, WIDE, some)
    with mpmath.workprec(120):
        for (high, low, angle, _), pair in zip(some.tolist(), found.tolist()):
            u = mpmath.ldexp(2**32 * high + low + mpmath.mpf(0.5), -64)
            theta = mpmath.ldexp(angle + mpmath.mpf(0.5), -31)
            radius = mpmath.sqrt(-2 * mpmath.log(u))
            for value, exact in zip(pair, (radius * mpmath.cospi(theta), radius * mpmath.sinpi(theta))):
                ulp = mpmath.ldexp(1, mpmath.frexp(exact)[1] - 53)
                assert abs(value - exact) <= DOUBLE_ULP * ulp


def test_strict_normals_have_the_bits_of_the_definition(cuda_on_cpu: CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch's square root of float64 is not always the nearest number.
    monkeypatch.setattr(torch, "sqrt", lambda x: torch.from_numpy(np.sqrt(x.numpy())))
    words = torch.cat([corner_words(), random_words(400_000)])
    expected = torch.stack(reference.strict_normals_from_words(*words.T), dim=1)
    assert torch.equal(normals_of(cuda_on_cpu, STRICT, words), expected)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("total_dtype", [None, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", [NARROW, WIDE, STRICT])
@pytest.mark.parametrize(("std", "grid"), [(1.5, 2.0**-12), (1.5, 0.0), (0.0, 0.0)])
def test_noisy_mean(
    cuda_on_cpu: CDLL, kind: int, total_dtype: torch.dtype | None, out_dtype: torch.dtype, std: float, grid: float
) -> None:
    if kind == STRICT and std > 0.0 and grid == 0.0:
        grid = 2.0**-20
    for count, offset in ((1, 0), (700, OFFSET), (161, 159)):
        total = None if total_dtype is None else torch.linspace(-40, 40, count, dtype=total_dtype)
        out = torch.full((count + 1,), 77, dtype=out_dtype)
        source = (None, 0) if total is None else (total.data_ptr(), DTYPE_CODES[total.dtype])
        stream = KEY.data_ptr(), STEP, offset
        cuda_on_cpu.noisy_mean(*stream, *source, out.data_ptr(), DTYPE_CODES[out_dtype], kind, std, grid, 3.0, count)
        expected = torch.empty(count, dtype=out_dtype)
        noisy_mean_forward = reference_or_native(kind).noisy_mean_forward
        noisy_mean_forward(total, std, grid, 3.0, KEY, STEP, offset, kind, expected)
        assert out[count] == 77
        if kind == WIDE and grid == 0.0:  # the definition's logarithm is the C library's
            tolerance = 1e-14 if out_dtype == torch.float64 else torch.finfo(out_dtype).eps
            torch.testing.assert_close(out[:count], expected, rtol=0.0 if out_dtype == torch.float64 else tolerance,
                                       atol=tolerance)  # fmt: skip
        else:
            assert torch.equal(out[:count], expected)


def reference_or_native(kind: int) -> Any:
    """Who has the same bits: the C++ library for float32 normals, else the definition."""
    if kind != NARROW:
        return reference
    pytest.importorskip("wavedp._csrc", reason="needs the C++ library")
    return noise_native


@pytest.mark.cuda
def test_noise_on_a_device_has_the_cpus_bits() -> None:
    pytest.importorskip("wavedp._csrc_cuda", reason="needs the CUDA library")
    pytest.importorskip("wavedp._csrc", reason="needs the C++ library")
    key, count = wavedp.NoiseKey.insecure(3), 100_003
    found = {}
    for backend, device in (("cuda", "cuda"), ("native", "cpu")):
        with use_backend(backend):
            words = torch.empty(count, dtype=torch.uint32, device=device)
            noise.chacha20_words(KEY, 2**32 - 5, (1, 2), 20, words)
            narrow = wavedp.gaussian_noise((count,), 1.5, key=key, offset=OFFSET, device=device)
            strict = torch.linspace(-9, 9, count, device=device)
            noise.noisy_mean(strict, 1.5, 2.0**-20, 3.0, KEY, STEP, OFFSET, STRICT, strict)
        found[backend] = [words.cpu().to(torch.int64), narrow.cpu(), strict.cpu()]
    for x, y in zip(*found.values()):
        assert torch.equal(x, y)


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What is allocated for a device; on the CPU where there is none."""
    made: list[Tensor] = []
    empty, there = torch.empty, torch.cuda.is_available()

    def recorded(*size: int, **options: Any) -> Tensor:
        made.append(empty(*size, **options) if there else empty(*size, dtype=options["dtype"]))
        return made[-1]

    monkeypatch.setattr(torch, "empty", recorded)
    if not there:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return made


def test_copies_of_the_key_are_zeros_after_its_use(allocated: list[Tensor]) -> None:
    key = KEY.clone()
    with noise_native.key_on(torch.device("cuda"), key) as address:
        staged, memory = allocated
        assert address == memory.data_ptr()
        assert torch.equal(memory.cpu(), KEY)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    assert not staged.any()
    assert not memory.any()
    assert torch.equal(key, KEY)  # its owner's part


def test_no_key_goes_into_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with (
        pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"),
        noise_native.key_on(torch.device("cuda"), KEY),
    ):
        pass
