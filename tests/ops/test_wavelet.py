# SPDX-License-Identifier: Apache-2.0
"""Values on every backend: those of PyWavelets, and the bits of the reference."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pywt
import torch
from torch import Tensor

import wavedp
from wavedp.ops import use_backend
from wavedp.reference.wavelet import EDGE_OF_MODE, Edge, band_sizes

# dtype: (relative, absolute) for each level. Inputs are N(0, 1); PyWavelets works in float64 on the same numbers,
# so what remains is the rounding of at most nine terms a level, and for half precision one rounding of the result.
TOLERANCES = {
    torch.float64: (1e-14, 1e-14),
    torch.float32: (1e-6, 2e-6),
    torch.float16: (2**-11, 2e-6),
    torch.bfloat16: (2**-8, 2e-6),
}
DTYPES = list(TOLERANCES)
MODES = list(EDGE_OF_MODE)
# One pixel, one row and one column, even, odd in one axis, odd in both; 31 and 33 end inside a vector of 8 or 16,
# 271 is wider than a tile; 16 x 24 is even at three levels, 26 x 44 at one and two; 64 x 96 at five.
SIZES = [(1, 1), (1, 5), (5, 1), (2, 2), (3, 4), (5, 7), (16, 24), (17, 31), (33, 6), (3, 271), (26, 44), (64, 96)]
# On a device, a kernel is compiled for each kind of width; interpreted, a tile takes 5 ms.
TRITON_SIZES = [(1, 1), (1, 5), (5, 7), (16, 24), (26, 44)]
INTERPRETED = [(1, 5, 1), (5, 7, 2), (16, 24, 3), (13, 22, 1)]
LEVELS = (1, 2, 3, 5)
MODE_OF_EDGE = {edge: mode for mode, edge in reversed(EDGE_OF_MODE.items())}  # smooth, not antireflect


def noise(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(device)


def flat(coeffs: Any) -> list[Any]:
    return [coeffs[0], *(band for details in coeffs[1:] for band in details)]


def nested(bands: Any) -> list[Any]:
    return [bands[0], *(tuple(bands[k : k + 3]) for k in range(1, len(bands), 3))]


def cases_for(target: Any, mode: str, levels: tuple[int, ...] = LEVELS) -> Iterator[tuple[int, int, int]]:
    """Height, width and level; a reflecting mode needs two samples at each level."""
    sizes = TRITON_SIZES if target.backend == "triton" else SIZES
    every = INTERPRETED if target.interpreted else [(*size, level) for size in sizes for level in levels]
    for height, width, level in every:
        if mode not in ("reflect", "antireflect") or all(1 not in s for s in band_sizes(height, width, level - 1)):
            yield height, width, level


def bands_of(x: Tensor, level: int, mode: str) -> list[Tensor]:
    """The transform by PyWavelets, in float64."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Level value")
        return [torch.from_numpy(b) for b in flat(pywt.wavedec2(x.double().cpu().numpy(), "haar", mode, level))]


def assert_rounded(actual: Tensor, exact: Tensor, target: Any, level: int, what: Any) -> None:
    relative, absolute = TOLERANCES[actual.dtype]
    if not target.rounds_to_nearest(actual.dtype):
        relative *= 2
    # LL grows by 2 a level and so does its rounding; a half-precision result is rounded once whatever the level.
    torch.testing.assert_close(
        actual.double().cpu(), exact, rtol=relative, atol=absolute * 2**level, msg=lambda text: f"{what}: {text}"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_wavedec2_and_coarse_are_pywavelets(target: Any, mode: str, dtype: torch.dtype) -> None:
    for height, width, level in cases_for(target, mode):
        x = noise(2, height, width, dtype=dtype, device=target.device)
        exact = bands_of(x, level, mode)
        actual = flat(wavedp.wavedec2(x, level, mode))
        for k, (one, other) in enumerate(zip(actual, exact, strict=True)):
            assert (one.dtype, one.device) == (dtype, x.device)
            assert_rounded(one, other, target, level, (height, width, level, k))
        assert torch.equal(wavedp.coarse(x, level, mode), actual[0])
        if level == 1:
            approximation, details = wavedp.dwt2(x, mode)
            assert all(map(torch.equal, (approximation, *details), actual))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_waverec2_is_pywavelets(target: Any, dtype: torch.dtype) -> None:
    for height, width, level in cases_for(target, "zero"):
        sizes = band_sizes(height, width, level)
        shapes = [sizes[level]] + [sizes[k] for k in range(level, 0, -1) for _ in range(3)]
        bands = [noise(2, *shape, dtype=dtype, device=target.device) for shape in shapes]
        exact = torch.from_numpy(pywt.waverec2(nested([b.double().cpu().numpy() for b in bands]), "haar"))
        what = (height, width, level)
        assert_rounded(wavedp.waverec2(nested(bands)), exact, target, level, what)
        cropped = wavedp.waverec2(nested(bands), output_size=(height, width))
        assert cropped.is_contiguous()
        assert_rounded(cropped, exact[..., :height, :width], target, level, what)
        if level == 1:
            assert torch.equal(wavedp.idwt2((bands[0], bands[1:]), output_size=(height, width)), cropped)


@pytest.mark.parametrize("norm", ["ortho", "mean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("edge", Edge, ids=lambda edge: edge.name)
def test_every_backend_returns_the_bits_of_the_reference(
    target: Any, edge: Edge, dtype: torch.dtype, norm: str
) -> None:
    if not target.rounds_to_nearest(dtype):
        pytest.skip("needs a CUDA device: Triton's interpreter cuts bfloat16 off")
    mode, ops = MODE_OF_EDGE[edge], torch.ops.wavedp
    for height, width, level in cases_for(target, mode, (1, 3, 5)):
        x = noise(3, height, width, dtype=dtype, device=target.device)
        factors = (0.5, 0.5) if norm == "ortho" else (0.25, 1.0)
        results = []
        for backend in (target.backend, "reference"):
            with use_backend(backend):
                bands = ops.wavedec2(x, level, mode, factors[0])
                given = [True] * len(bands)
                adjoint = ops.waverec2(bands, given, height, width, mode, factors[1])
                inverse = ops.waverec2(bands, given, height, width, "zero", factors[1])
                low = ops.coarse(x, level, mode, factors[0], 1.0, 0.0, None)
                results.append([*bands, adjoint, inverse, low])
        for k, (one, other) in enumerate(zip(*results, strict=True)):
            assert torch.equal(one, other), (height, width, level, k)


@pytest.mark.parametrize("mode", ["antisymmetric", "smooth"])
def test_bytes_become_samples_before_edges_are_completed(target: Any, mode: str) -> None:
    for height, width, level in cases_for(target, mode, (1, 3)):
        x = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8).to(target.device)
        samples = x.double() * 2 / 255 - 1
        for dtype in (None, torch.float16):
            actual = wavedp.coarse(x, level, mode, affine=(2 / 255, -1), dtype=dtype)
            assert actual.dtype == (dtype or torch.float32)
            assert_rounded(actual, bands_of(samples, level, mode)[0], target, level, (height, width, level, dtype))
        assert torch.equal(
            wavedp.coarse(x, level, mode), wavedp.coarse(x, level, mode, affine=(1 / 255, 0), dtype=torch.float32)
        )


def test_coarse_in_another_dtype_is_rounded_once(target: Any) -> None:
    for dtype in DTYPES:
        for other in DTYPES:
            x = noise(2, 5, 6, dtype=dtype, device=target.device)
            actual = wavedp.coarse(x, 2, dtype=other)
            assert actual.dtype == other
            exact = bands_of(x, 2, "symmetric")[0]
            relative, absolute = max(TOLERANCES[other], TOLERANCES[torch.float32 if dtype != torch.float64 else dtype])
            if not target.rounds_to_nearest(other):
                relative *= 2
            torch.testing.assert_close(actual.double().cpu(), exact, rtol=relative, atol=4 * absolute)


@pytest.mark.parametrize("level", [1, 3])
def test_absent_bands_are_zeros(target: Any, level: int) -> None:
    bands = torch.ops.wavedp.wavedec2(noise(2, 11, 14, dtype=torch.float64, device=target.device), level, "zero", 0.5)
    generator = torch.Generator().manual_seed(1)
    for pattern in range(1, 16 if level == 1 else 25):
        flags = torch.rand(len(bands), generator=generator).lt(0.5).tolist()
        present = [bool(pattern & 1 << k) for k in range(4)] if level == 1 else flags
        if not any(present):
            continue
        sparse = [band if there else None for band, there in zip(bands, present)]
        full = [band if there else torch.zeros_like(band) for band, there in zip(bands, present)]
        compute = torch.ops.wavedp.waverec2
        given = [band for band in sparse if band is not None]
        actual = compute(given, present, 11, 14, "smooth", 0.5)
        assert torch.equal(actual, compute(full, [True] * len(full), 11, 14, "smooth", 0.5)), present
        if level == 1 or sparse[0] is not None:
            call = wavedp.idwt2 if level == 1 else wavedp.waverec2
            coeffs: Any = (sparse[0], sparse[1:]) if level == 1 else nested(sparse)
            expected = compute(full, [True] * len(full), 11, 14, "zero", 0.5)
            assert torch.equal(call(coeffs, output_size=(11, 14)), expected), present


@pytest.mark.parametrize("norm", ["ortho", "mean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_inverse_inverts(target: Any, dtype: torch.dtype, norm: str) -> None:
    relative, absolute = TOLERANCES[dtype]
    for mode in MODE_OF_EDGE.values():
        for height, width, level in cases_for(target, mode, (1, 3)):
            x = noise(2, height, width, dtype=dtype, device=target.device)
            coeffs = wavedp.wavedec2(x, level, mode, norm=norm)
            back = wavedp.waverec2(coeffs, output_size=(height, width), norm=norm)
            # A sum of bands, each rounded once at up to eight times the size of a pixel.
            torch.testing.assert_close(back, x, rtol=32 * relative, atol=32 * max(relative, absolute))


def test_the_mean_norm_is_the_orthonormal_one_scaled(target: Any) -> None:
    x = noise(2, 3, 16, 24, device=target.device)
    means = torch.nn.functional.avg_pool2d(x, 8)
    torch.testing.assert_close(wavedp.coarse(x, 3, norm="mean"), means, rtol=1e-5, atol=1e-6)
    ortho, mean = wavedp.wavedec2(x, 3), wavedp.wavedec2(x, 3, norm="mean")
    for k, (one, other) in enumerate(zip(flat(ortho), flat(mean))):
        level = 3 - max(k - 1, 0) // 3
        assert torch.equal(one * 0.5**level, other), k


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "offset": lambda x: torch.cat([x[:1], x])[1:],
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "expanded": lambda x: x[:1, :1].expand(x.shape),
    "expanded channels": lambda x: x[:, :1].expand(x.shape),
    "expanded pixel": lambda x: x[..., :1, :1].expand(x.shape),
    "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "every other channel": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "swapped batch": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "padded rows": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 1))[..., 1:-1, 3:-2],
    "negated lazily": lambda x: torch.complex(torch.zeros_like(x), -x).conj().imag,
}


@pytest.mark.parametrize("strides", STRIDES)
def test_any_strides(target: Any, strides: str) -> None:
    for height, width, level in ((6, 8, 1), (5, 7, 2), (16, 8, 3)):
        x = STRIDES[strides](noise(2, 3, height, width, device=target.device))
        actual, expected = wavedp.wavedec2(x, level, "smooth"), wavedp.wavedec2(x.clone().contiguous(), level, "smooth")
        assert all(map(torch.equal, flat(actual), flat(expected)))
        assert torch.equal(wavedp.coarse(x, level, "smooth"), actual[0])
        bands = [STRIDES[strides](band) for band in flat(expected)]
        back = wavedp.waverec2(nested(bands), output_size=(height, width))
        contiguous = [band.clone().contiguous() for band in bands]
        assert torch.equal(back, wavedp.waverec2(nested(contiguous), output_size=(height, width)))


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 3), (2, 3, 1, 2), (0,), (2, 0, 3)], ids=str)
def test_any_leading_axes(target: Any, lead: tuple[int, ...]) -> None:
    x = noise(*lead, 5, 6, device=target.device)
    for images in (x, x.transpose(0, -3) if len(lead) > 1 else x):
        coeffs: Any = wavedp.wavedec2(images, 2, "reflect")
        assert [tuple(b.shape) for b in flat(coeffs)] == [(*images.shape[:-2], *s) for s in [(2, 2)] * 4 + [(3, 3)] * 3]
        one_by_one = [wavedp.wavedec2(image, 2, "reflect") for image in images.reshape(-1, 5, 6)]
        for k, image in enumerate(one_by_one):
            for actual, expected in zip(flat(coeffs), flat(image)):
                assert torch.equal(actual.reshape(-1, *expected.shape)[k], expected)
        torch.testing.assert_close(wavedp.waverec2(coeffs, output_size=(5, 6)), images)


@pytest.mark.parametrize("level", [1, 3])
def test_bands_are_contiguous_views_of_one_allocation(target: Any, level: int) -> None:
    bands = flat(wavedp.wavedec2(noise(2, 3, 24, 20, device=target.device), level))
    assert all(band.is_contiguous() for band in bands)
    if target.backend == "reference":  # each band is an allocation of its own
        return
    address = bands[0].data_ptr()
    for band in bands:
        assert band.data_ptr() == address
        address += band.numel() * band.element_size()
    assert {band.untyped_storage().nbytes() for band in bands} == {4 * sum(band.numel() for band in bands)}


@pytest.mark.usefixtures("poisoned_memory")
def test_every_output_element_is_written(target: Any) -> None:
    assert torch.empty(3, device=target.device).isnan().all()
    for mode in MODE_OF_EDGE.values():
        for height, width, level in cases_for(target, mode, (1, 3)):
            bands = torch.ops.wavedp.wavedec2(noise(2, height, width, device=target.device), level, mode, 0.5)
            assert all(band.isfinite().all() for band in bands), (mode, height, width, level)
            adjoint = torch.ops.wavedp.waverec2(bands, [True] * len(bands), height, width, mode, 0.5)
            assert adjoint.isfinite().all(), (mode, height, width, level)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_value_stays_in_its_block(target: Any, poison: float) -> None:
    for row, column in ((0, 0), (2, 3), (4, 6)):
        x = torch.ones(5, 7, device=target.device)
        x[row, column] = poison
        for level in (1, 2):
            bands = torch.ops.wavedp.wavedec2(x, level, "symmetric", 0.5)
            for k, band in enumerate(bands):
                expected = torch.zeros_like(band, dtype=torch.bool)
                block = 2 ** (level - max(k - 1, 0) // 3)
                expected[row // block, column // block] = True
                assert torch.equal(~band.isfinite(), expected), (level, k)

        bands = [torch.ones(3, 4, device=target.device) for _ in range(4)]
        bands[0][row // 2, column // 2] = poison
        touched = ~torch.ops.wavedp.waverec2(bands, [True] * 4, 5, 7, "symmetric", 0.5).isfinite()
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
        for level in (1, 2):
            actual, expected = wavedp.wavedec2(x, level), wavedp.wavedec2(x.contiguous(), level)
            assert all(map(torch.equal, flat(actual), flat(expected)))


def test_the_number_of_threads_does_not_change_the_result() -> None:
    x = noise(16, 65, 130)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        bands = torch.ops.wavedp.wavedec2(x, 3, "smooth", 0.5)
        results.append([*bands, torch.ops.wavedp.waverec2(bands, [True] * len(bands), 65, 130, "smooth", 0.5)])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.parametrize("level", [3, 5])
@pytest.mark.parametrize("size", [(256, 320), (201, 263)], ids=str)
def test_bfloat16_is_rounded_once(target: Any, size: tuple[int, int], level: int) -> None:
    """The finest details of a smooth image are small differences of large numbers: intermediate roundings would cost
    ten times this error. The input is what bfloat16 holds of the image, as PyWavelets then gets it too."""
    if target.interpreted:
        size = (size[0] // 4, size[1] // 4)
    rows, columns = (torch.linspace(0, 1, n, dtype=torch.float64) for n in size)
    smooth = 2 + torch.sin(5 * rows)[:, None] * torch.cos(4 * columns) + 0.02 * noise(*size, dtype=torch.float64)
    x = smooth.to(torch.bfloat16).to(target.device)
    limit = 1.2e-3 if target.rounds_to_nearest(torch.bfloat16) else 2.4e-3
    for norm in ("ortho", "mean"):
        actual = torch.stack(list(wavedp.wavedec2(x, level, norm=norm)[-1])).double().cpu()
        exact = torch.stack(bands_of(x, level, "symmetric")[-3:]) * (0.5 if norm == "mean" else 1)
        assert (actual - exact).norm() / exact.norm() <= limit
        approximation = wavedp.coarse(x, level, norm=norm).double().cpu()
        exact_low = bands_of(x, level, "symmetric")[0] * (0.5**level if norm == "mean" else 1)
        assert (approximation - exact_low).norm() / exact_low.norm() <= 2 * limit


def test_a_read_only_array_is_an_input() -> None:
    """PyWavelets takes read-only arrays; torch.from_numpy warns of them, and nothing is written to them."""
    array = np.random.default_rng(0).standard_normal((6, 8))
    array.setflags(write=False)
    before = array.copy()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        x = torch.from_numpy(array)
    for one, other in zip(flat(wavedp.wavedec2(x, 2)), bands_of(torch.from_numpy(before), 2, "symmetric")):
        torch.testing.assert_close(one, other)
    assert np.array_equal(array, before)
