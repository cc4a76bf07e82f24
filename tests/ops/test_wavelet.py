# SPDX-License-Identifier: Apache-2.0
"""Values of one level on every backend: those of PyWavelets, and the bits of the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pywt
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import wavedp
from wavedp.ops import use_backend
from wavedp.reference.wavelet import EDGE_OF_MODE, Edge

# dtype: (relative, absolute). Inputs are N(0, 1); PyWavelets works in float64 on the same numbers, so what
# remains is the rounding of at most nine terms, and for half precision the one rounding of the result.
TOLERANCES = {
    torch.float64: (1e-14, 1e-14),
    torch.float32: (1e-6, 2e-6),
    torch.float16: (2**-11, 2e-6),
    torch.bfloat16: (2**-8, 2e-6),
}
DTYPES = list(TOLERANCES)
MODES = list(EDGE_OF_MODE)
# One pixel, one row and one column, even, odd in one axis, odd in both; 31 and 33 end inside a vector of 8 or
# 16, 271 is wider than a Triton tile.
SIZES = [(1, 1), (1, 5), (5, 1), (2, 2), (3, 4), (4, 3), (5, 7), (8, 8), (17, 31), (33, 6), (3, 271)]
# Interpreted, a tile takes 5 ms; on a device, a kernel is compiled for each kind of width.
TRITON_SIZES = [(1, 1), (1, 5), (4, 3), (17, 31), (3, 271)]
MODE_OF_EDGE = {edge: mode for mode, edge in reversed(EDGE_OF_MODE.items())}  # smooth, not antireflect
ONE_SAMPLE = ("reflect", "antireflect")  # modes that refuse an axis of one sample


def noise(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(device)


def sizes_for(target: Any, mode: str) -> list[tuple[int, int]]:
    sizes = TRITON_SIZES if target.backend == "triton" else SIZES
    return [size for size in sizes if not (mode in ONE_SAMPLE and 1 in size)]


def pywt_bands(x: Tensor, mode: str) -> Tensor:
    approximation, details = pywt.dwt2(x.double().cpu().numpy(), "haar", mode)
    return torch.from_numpy(np.stack([approximation, *details]))


def assert_rounded(actual: Tensor, exact: Tensor, target: Any, what: str) -> None:
    relative, absolute = TOLERANCES[actual.dtype]
    if not target.rounds_to_nearest(actual.dtype):
        relative *= 2
    torch.testing.assert_close(
        actual.double().cpu(), exact, rtol=relative, atol=absolute, msg=lambda text: f"{what}: {text}"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_dwt2_is_pywavelets(target: Any, mode: str, dtype: torch.dtype) -> None:
    for height, width in sizes_for(target, mode):
        x = noise(2, height, width, dtype=dtype, device=target.device)
        approximation, details = wavedp.dwt2(x, mode)
        assert approximation.dtype == dtype
        assert approximation.device == x.device
        actual = torch.stack([approximation, *details])
        assert_rounded(actual, pywt_bands(x, mode), target, f"{height} x {width}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_idwt2_is_pywavelets(target: Any, dtype: torch.dtype) -> None:
    for height, width in sizes_for(target, "zero"):
        h, w = (height + 1) // 2, (width + 1) // 2
        bands = noise(4, 2, h, w, dtype=dtype, device=target.device)
        exact = torch.from_numpy(pywt.idwt2((bands[0].double().cpu(), bands[1:].double().cpu()), "haar"))
        coeffs = (bands[0], tuple(bands[1:]))
        assert_rounded(wavedp.idwt2(coeffs), exact, target, f"{height} x {width}")
        cropped = wavedp.idwt2(coeffs, output_size=(height, width))
        assert cropped.is_contiguous()
        assert_rounded(cropped, exact[..., :height, :width], target, f"{height} x {width}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("edge", Edge, ids=lambda edge: edge.name)
def test_every_backend_returns_the_bits_of_the_reference(target: Any, edge: Edge, dtype: torch.dtype) -> None:
    if not target.rounds_to_nearest(dtype):
        pytest.skip("needs a CUDA device: Triton's interpreter cuts bfloat16 off")
    mode = MODE_OF_EDGE[edge]
    for height, width in sizes_for(target, mode):
        x = noise(3, height, width, dtype=dtype, device=target.device)
        bands = noise(4, 3, (height + 1) // 2, (width + 1) // 2, dtype=dtype, device=target.device)
        ops = torch.ops.wavedp
        actual = ops.dwt2(x, mode), ops.dwt2_backward(bands, mode, height, width)
        with use_backend("reference"):
            exact = ops.dwt2(x, mode), ops.dwt2_backward(bands, mode, height, width)
        for one, other in zip(actual, exact):
            assert torch.equal(one, other), (height, width)


def test_absent_bands_are_zeros(target: Any) -> None:
    bands = noise(4, 2, 3, 4, dtype=torch.float64, device=target.device)
    for given_bands in range(1, 16):
        present = [band if given_bands & 1 << k else None for k, band in enumerate(bands)]
        full = [torch.zeros_like(bands[0]) if band is None else band for band in present]
        actual = wavedp.idwt2((present[0], present[1:]), output_size=(5, 7))
        assert torch.equal(actual, wavedp.idwt2((full[0], full[1:]), output_size=(5, 7)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_idwt2_inverts_dwt2(target: Any, dtype: torch.dtype) -> None:
    relative, absolute = TOLERANCES[dtype]
    for mode in MODE_OF_EDGE.values():
        for size in sizes_for(target, mode):
            x = noise(2, *size, dtype=dtype, device=target.device)
            back = wavedp.idwt2(wavedp.dwt2(x, mode), output_size=size)
            # Half the sum of four bands, each rounded once at up to eight times the size of a pixel.
            torch.testing.assert_close(back, x, rtol=16 * relative, atol=16 * max(relative, absolute))


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "offset": lambda x: torch.cat([x[:1], x])[1:],
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "expanded": lambda x: x[:1, :1].expand(x.shape),
    "expanded pixel": lambda x: x[..., :1, :1].expand(x.shape),
    "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "swapped batch": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "padded rows": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 1))[..., 1:-1, 3:-2],
    "negated lazily": lambda x: torch.complex(torch.zeros_like(x), -x).conj().imag,
}


@pytest.mark.parametrize("strides", STRIDES)
def test_any_strides(target: Any, strides: str) -> None:
    for size in ((6, 8), (5, 7)):
        x = STRIDES[strides](noise(2, 3, *size, device=target.device))
        assert torch.equal(torch.ops.wavedp.dwt2(x, "smooth"), torch.ops.wavedp.dwt2(x.contiguous(), "smooth"))
        bands = [STRIDES[strides](noise(2, 3, *size, device=target.device)) for _ in range(4)]
        output = (2 * size[0] - 1, 2 * size[1])
        actual = wavedp.idwt2((bands[0], bands[1:]), output_size=output)
        bands = [band.contiguous() for band in bands]
        assert torch.equal(actual, wavedp.idwt2((bands[0], bands[1:]), output_size=output))


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 3), (0,), (2, 0, 3)], ids=str)
def test_any_leading_axes(target: Any, lead: tuple[int, ...]) -> None:
    x = noise(*lead, 5, 6, device=target.device)
    approximation, details = wavedp.dwt2(x, "reflect")
    assert all(band.shape == (*lead, 3, 3) for band in (approximation, *details))
    one_by_one = [wavedp.dwt2(image, "reflect") for image in x.reshape(-1, 5, 6)]
    for image, (ll, (_, _, hh)) in enumerate(one_by_one):
        assert torch.equal(approximation.reshape(-1, 3, 3)[image], ll)
        assert torch.equal(details[2].reshape(-1, 3, 3)[image], hh)
    back = wavedp.idwt2((approximation, details), output_size=(5, 6))
    torch.testing.assert_close(back, x)


def test_bands_are_contiguous_views_of_one_allocation(target: Any) -> None:
    approximation, details = wavedp.dwt2(noise(2, 3, 8, 6, device=target.device))
    step = approximation.numel() * approximation.element_size()
    for k, band in enumerate((approximation, *details)):
        assert band.is_contiguous()
        assert band.data_ptr() == approximation.data_ptr() + k * step
        assert band.untyped_storage().nbytes() == 4 * step


@pytest.mark.usefixtures("poisoned_memory")
def test_every_output_element_is_written(target: Any) -> None:
    assert torch.empty(3, device=target.device).isnan().all()
    for mode in MODE_OF_EDGE.values():
        for size in sizes_for(target, mode):
            bands = torch.ops.wavedp.dwt2(noise(2, *size, device=target.device), mode)
            assert bands.isfinite().all(), (mode, size)
            assert torch.ops.wavedp.dwt2_backward(bands, mode, *size).isfinite().all(), (mode, size)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_value_stays_in_its_block(target: Any, poison: float) -> None:
    for row, column in ((0, 0), (2, 3), (4, 6)):
        x = torch.ones(5, 7, device=target.device)
        x[row, column] = poison
        bands = torch.ops.wavedp.dwt2(x, "symmetric")
        expected = torch.zeros(4, 3, 4, dtype=torch.bool, device=target.device)
        expected[:, row // 2, column // 2] = True
        assert torch.equal(~bands.isfinite(), expected)

        bands = torch.ones(4, 3, 4, device=target.device)
        bands[0, row // 2, column // 2] = poison
        touched = ~torch.ops.wavedp.dwt2_backward(bands, "symmetric", 5, 7).isfinite()
        expected = torch.zeros(5, 7, dtype=torch.bool, device=target.device)
        expected[row // 2 * 2 :, column // 2 * 2 :][:2, :2] = True
        assert torch.equal(touched, expected)


def test_offsets_past_32_bits(target: Any, tmp_path: Path) -> None:
    """A stride of 2^31 elements between images, and a row stride that passes it on the third row."""
    for stride_n, stride_h in ((2**31, 8), (8, 2**30)):
        elements = stride_n + 3 * stride_h + 8
        if target.device == "cuda":
            memory = torch.empty(elements, dtype=torch.float16, device="cuda")
        else:  # a sparse file: only the pages that are touched exist
            memory = torch.from_file(str(tmp_path / "x"), shared=True, size=elements, dtype=torch.float16)
        x = memory.as_strided((2, 4, 4), (stride_n, stride_h, 1))
        x.copy_(noise(2, 4, 4))
        assert torch.equal(torch.ops.wavedp.dwt2(x, "zero"), torch.ops.wavedp.dwt2(x.contiguous(), "zero"))


def test_the_number_of_threads_does_not_change_the_result() -> None:
    x = noise(16, 65, 130)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        bands = torch.ops.wavedp.dwt2(x, "smooth")
        results.append((bands, torch.ops.wavedp.dwt2_backward(bands, "smooth", 65, 130)))
    torch.set_num_threads(before)
    for bands, gradient in results[1:]:
        assert torch.equal(bands, results[0][0])
        assert torch.equal(gradient, results[0][1])


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lead=st.lists(st.integers(0, 3), max_size=3),
    size=st.tuples(st.integers(2, 70), st.integers(2, 70)),
    mode=st.sampled_from(MODES),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_native_agrees_on_any_shape(
    isa: str, lead: list[int], size: tuple[int, int], mode: str, dtype: torch.dtype, seed: int
) -> None:
    native = pytest.importorskip("wavedp._csrc", reason="needs the C++ library")
    before = native.isa()
    try:
        native.set_isa(isa)
    except ValueError:
        pytest.skip(f"needs a CPU with {isa}")
    torch.manual_seed(seed)
    x = noise(*lead, *size, dtype=dtype)
    results = []
    for backend in ("native", "reference"):
        with use_backend(backend):
            bands = torch.ops.wavedp.dwt2(x, mode)
            results.append((bands, torch.ops.wavedp.dwt2_backward(bands, mode, *size)))
    native.set_isa(before)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


IMAGE = torch.ones(4, 6)
BAND = torch.ones(2, 3)
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "integers": (lambda: wavedp.dwt2(IMAGE.long()), TypeError, "not torch.int64: convert it"),
    "booleans": (lambda: wavedp.dwt2(IMAGE.bool()), TypeError, "not torch.bool"),
    "complex": (lambda: wavedp.dwt2(IMAGE.to(torch.complex64)), TypeError, "not torch.complex64"),
    "numpy": (lambda: wavedp.dwt2(IMAGE.numpy()), TypeError, "takes torch tensors, not a ndarray"),
    "sparse": (lambda: wavedp.dwt2(IMAGE.to_sparse()), TypeError, r"dense tensors.*to_dense\(\)"),
    "a vector": (lambda: wavedp.dwt2(IMAGE[0]), ValueError, r"\[..., H, W\].*shape of \(6,\)"),
    "no pixel": (lambda: wavedp.dwt2(torch.ones(2, 0, 4)), ValueError, r"at least 1 x 1.*\(2, 0, 4\)"),
    "a mode": (
        lambda: wavedp.dwt2(IMAGE, "mirror"),
        ValueError,
        "unknown mode 'mirror'; choose from zero, c",
    ),
    "reflect 1": (lambda: wavedp.dwt2(IMAGE[:1], "reflect"), ValueError, "at least 2 samples.*1 x 6"),
    "antireflect 1": (lambda: wavedp.dwt2(IMAGE[:, :1], "antireflect"), ValueError, "image is 4 x 1"),
    "no pair": (lambda: wavedp.idwt2(BAND), ValueError, r"takes \(cA, \(cH, cV, cD\)\), not a Tensor"),
    "two details": (
        lambda: wavedp.idwt2((BAND, (BAND, BAND))),
        ValueError,
        r"\(cH, cV, cD\), not a tuple of 2",
    ),
    "stacked details": (lambda: wavedp.idwt2((BAND, torch.ones(3, 2, 3))), ValueError, "not a Tensor"),
    "no band": (lambda: wavedp.idwt2((None, (None,) * 3)), ValueError, "at least one band"),
    "a number": (lambda: wavedp.idwt2((BAND, (1.0, None, None))), TypeError, "torch tensors, not a float"),
    "integer bands": (lambda: wavedp.idwt2((BAND.int(), (None,) * 3)), TypeError, "not torch.int32"),
    "shapes": (
        lambda: wavedp.idwt2((BAND, (torch.ones(3, 2), None, None))),
        ValueError,
        r"must agree.*\(2, 3\).*\(3, 2\)",
    ),
    "dtypes": (lambda: wavedp.idwt2((BAND, (BAND.half(), None, None))), ValueError, "float32.*float16"),
    "size": (
        lambda: wavedp.idwt2((BAND, (None,) * 3), output_size=(4, 4)),
        ValueError,
        "4 x 4 has bands of 2 x 2, but these are 2 x 3",
    ),
    "size of one": (lambda: wavedp.idwt2((BAND, (None,) * 3), output_size=(4,)), ValueError, r"\(H, W\)"),
    "op: bands": (
        lambda: torch.ops.wavedp.dwt2_backward(BAND, "zero", 4, 6),
        ValueError,
        r"\[4, ..., h, w\]",
    ),
    "op: size": (
        lambda: torch.ops.wavedp.dwt2_backward(torch.ones(4, 2, 3), "zero", 4, 8),
        ValueError,
        "these are 2 x 3",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()
