# SPDX-License-Identifier: Apache-2.0
"""Every launch of a Triton kernel, compiled ahead of time for sm_90, and the main ones for sm_80 and sm_100 too: no GPU
is needed to see that they compile, how wide their accesses are and that 2^31 elements are not too many.

A new kernel gets a line in ``benchmarks/launches.py``; a test fails until it has one.
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import wavedp.kernels

triton: Any = pytest.importorskip("triton", reason="needs Triton")

from wavedp.benchmarks import kernel_report  # noqa: E402
from wavedp.benchmarks.launches import (  # noqa: E402
    CAPABILITIES,
    CASES,
    GRID,
    LINEAR,
    LONG,
    Case,
    Launch,
    caught_launches,
    embedding,
    linear_norms,
    norm_grads,
    records,
    scaled_weight_grad,
    wavedec2,
    wavelet_tokens,
    wavelet_untokens,
    waverec2,
)
from wavedp.benchmarks.machine_code import MachineCode, cuobjdump, kernels_of  # noqa: E402

STEMS = [module.name for module in pkgutil.iter_modules(wavedp.kernels.__path__)]
IMAGES = (64, 3, 256, 256)
REPORT = Path(__file__).parents[2] / "benchmarks" / "results" / "kernels.txt"


@pytest.fixture(scope="module")
def kernels(fresh_kernels: Callable[..., ModuleType]) -> dict[str, ModuleType]:
    return {stem: fresh_kernels(stem, interpreted=False) for stem in STEMS}


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


def machine_code(compiled: Any, capability: int, folder: Path) -> MachineCode:
    if cuobjdump() is None:
        pytest.skip("needs cuobjdump")
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    (code,) = kernels_of(path, capability).values()
    return code


COMPILED = [(case, capability) for case in CASES for capability in CAPABILITIES if case.main or capability == 90]


@pytest.mark.parametrize(
    ("case", "capability"), COMPILED, ids=[f"{case.name.replace(' ', '-')}-sm_{c}" for case, c in COMPILED]
)
def test_compiles(kernels: dict[str, ModuleType], case: Case, capability: int, tmp_path: Path) -> None:
    launches = case.launches(kernels[case.stem])
    assert launches
    for launch in launches:
        compiled = launch.compile(capability)
        assert f".target sm_{capability}" in compiled.asm["ptx"]

        # An offset of 32 bits overflows at 2^31 elements, and nothing would say so.
        additions = [line for line in compiled.asm["ttir"].splitlines() if "tt.addptr" in line]
        assert additions
        for line in additions:
            offset_type = line.partition(" loc(")[0].rpartition(",")[2]
            assert "i64" in offset_type, line

        code = machine_code(compiled, capability, tmp_path)
        assert code.registers > 0
        assert (code.spills, code.stack) == (0, 0)


# Shares of the bytes loaded and stored that move 16 at a time in a large image. What is left at three levels are the
# coarsest bands, of which a lane holds little: at level 3, 4 of its 64 coefficients.
VECTORS = [
    (wavedec2(IMAGES, torch.float32, 1), 1.0, 1.0),
    (wavedec2(IMAGES, torch.bfloat16, 1), 1.0, 1.0),
    (wavedec2(IMAGES, torch.float32, 3), 1.0, 0.93),
    (wavedec2(IMAGES, torch.bfloat16, 3), 1.0, 0.75),
    (waverec2(IMAGES, torch.float32, 1), 1.0, 1.0),
    (waverec2(IMAGES, torch.bfloat16, 1), 1.0, 1.0),
    (waverec2(IMAGES, torch.float32, 3), 0.93, 1.0),
    (waverec2(IMAGES, torch.bfloat16, 3), 0.75, 1.0),
    (wavelet_tokens(IMAGES, torch.float32, 3, plain=True), 1.0, 0.93),
    (wavelet_tokens(IMAGES, torch.bfloat16, 3, plain=True), 1.0, 0.75),
    (wavelet_untokens(IMAGES, torch.float32, 3, plain=True), 0.93, 1.0),
    (wavelet_untokens(IMAGES, torch.bfloat16, 3, plain=True), 0.75, 1.0),
]


@pytest.mark.parametrize(
    ("case", "loaded", "stored"), VECTORS, ids=[case.name.replace(" ", "-") for case, _, _ in VECTORS]
)
def test_large_images_move_as_vectors(
    kernels: dict[str, ModuleType], case: Case, loaded: float, stored: float, tmp_path: Path
) -> None:
    """Indexing with stride 2, or a width whose divisibility is lost, would make these scalar accesses."""
    (launch,) = case.launches(kernels[case.stem])
    found = machine_code(launch.compile(90), 90, tmp_path).bytes_in_16()
    assert found[0] >= loaded
    assert found[1] >= stored


@pytest.mark.parametrize(
    ("case", "loaded"),
    [
        pytest.param(linear_norms(LINEAR, torch.bfloat16, bias=False), 1.0, id="linear_norms Gram"),
        pytest.param(linear_norms(LONG, torch.bfloat16, bias=False), 1.0, id="linear_norms products"),
        pytest.param(scaled_weight_grad(LINEAR, torch.bfloat16), 0.98, id="scaled_weight_grad"),  # besides a factor
        pytest.param(norm_grads((16, 256, 768), torch.bfloat16), 1.0, id="norm_grads"),
        pytest.param(records("squared_norms", (16, 256, 768), torch.bfloat16), 1.0, id="squared_norms"),
        pytest.param(records("weighted_sum", (16, 256, 768), torch.bfloat16), 0.8, id="weighted_sum"),
        pytest.param(embedding("embedding_norms", (16, 256, 768), torch.bfloat16), 0.4, id="embedding_norms"),
    ],
)
def test_rows_move_as_vectors(kernels: dict[str, ModuleType], case: Case, loaded: float, tmp_path: Path) -> None:
    """What is read of activations and gradients moves 16 bytes at a time; factors, ids and partial sums do not."""
    for launch in case.launches(kernels["per_sample"]):
        if launch.kernel.__name__ != "_linear_norms_kernel":  # adds up numbers
            assert machine_code(launch.compile(90), 90, tmp_path).bytes_in_16()[0] >= loaded


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", [linear_norms(LINEAR, torch.bfloat16), scaled_weight_grad(LINEAR, torch.bfloat16)])
def test_half_precision_is_multiplied_on_tensor_cores(
    kernels: dict[str, ModuleType], case: Case, capability: int, tmp_path: Path
) -> None:
    """Operands go to them as they are in memory: asynchronous copies, and the instructions of the architecture."""
    instruction = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability]
    launch = case.launches(kernels["per_sample"])[0]
    compiled = launch.compile(capability)
    assert instruction in compiled.asm["ptx"]
    assert "cp.async" in compiled.asm["ptx"]
    assert machine_code(compiled, capability, tmp_path).tensor > 0


@pytest.mark.parametrize("case", [linear_norms(LINEAR, torch.float32), scaled_weight_grad(LINEAR, torch.float32)])
def test_float32_is_not_rounded_to_tf32(kernels: dict[str, ModuleType], case: Case) -> None:
    for launch in case.launches(kernels["per_sample"]):
        assert "tf32" not in launch.compile(90).asm["ptx"]


def launches_of(kernels: dict[str, ModuleType], case: Case) -> list[Launch]:
    return case.launches(kernels["per_sample"])


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        pytest.param((8, 256, 768, 768), ["_gram_norms_kernel", "_linear_norms_kernel"], id="Gram"),
        pytest.param(
            (8, 1024, 768, 768), ["_row_lengths_kernel", "_product_norms_kernel", "_linear_norms_kernel"], id="products"
        ),
    ],
)
def test_norms_take_the_way_of_fewer_multiplications(
    kernels: dict[str, ModuleType], shape: tuple[int, ...], names: list[str]
) -> None:
    launches = launches_of(kernels, linear_norms(shape, torch.bfloat16))
    assert [launch.kernel.__name__ for launch in launches] == names


def test_nothing_of_the_size_of_a_gram_matrix_is_allocated(kernels: dict[str, ModuleType]) -> None:
    B, T, d, p = 4, 4096, 8192, 8192  # Gram way; a matrix would be T T = 2^24 numbers a record
    (gram, _) = launches_of(kernels, linear_norms((B, T, d, p), torch.bfloat16))
    sizes = [x.numel() for x in gram.arguments if isinstance(x, torch.Tensor) and x.shape not in [(B, T, d), (B, T, p)]]
    assert max(sizes) <= B * (T // 128) * max(T // 128, p)


@pytest.mark.parametrize(
    ("B", "T", "splits"),
    [
        pytest.param(16, 256, 3, id="few records: parted to fill the device"),
        pytest.param(1024, 256, 32, id="blocks of 8192 rows"),
        pytest.param(1024, 16, 16, id="blocks of 64 records"),
        pytest.param(2, 20000, 6, id="records of many blocks"),
    ],
)
def test_sums_in_float32_stay_short(kernels: dict[str, ModuleType], B: int, T: int, splits: int) -> None:
    launches = launches_of(kernels, scaled_weight_grad((B, T, 768, 768), torch.bfloat16))
    assert [launch.kernel.__name__ for launch in launches] == ["_scaled_records_kernel", "_add_splits_kernel"]
    assert launches[0].arguments[3].shape == (splits, 768, 768)


def sample(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=torch.float16)


@pytest.mark.parametrize(
    ("shape", "level", "levels"),
    [
        pytest.param((64, 64), 3, [3], id="even at every level"),
        pytest.param((64, 64), 5, [3, 2], id="more than a launch holds"),
        pytest.param((64, 100), 4, [2, 1, 1], id="odd from level 3 on"),
        pytest.param((65, 64), 2, [1, 1], id="odd at once"),
        pytest.param((1, 1), 3, [1, 1, 1], id="one pixel"),
    ],
)
def test_levels_share_a_launch_while_sizes_are_even(
    kernels: dict[str, ModuleType], shape: tuple[int, int], level: int, levels: list[int]
) -> None:
    with caught_launches() as forward:
        bands = kernels["wavelet"].wavedec2_forward(sample(2, *shape), level, 1, 0.5)
    with caught_launches() as inverse:
        kernels["wavelet"].waverec2_forward(bands, *shape, 1, 0.5)
    assert [launch.keywords["LEVELS"] for launch in forward] == levels
    assert [launch.keywords["LEVELS"] for launch in inverse] == levels[::-1]

    # Half precision is rounded once: what passes from launch to launch is wider.
    passed_on = [launch.arguments[1][0].dtype for launch in forward]
    assert passed_on == [torch.float32] * (len(levels) - 1) + [torch.float16]
    assert [launch.arguments[1].dtype for launch in inverse] == passed_on


def test_images_are_read_where_they_lie(kernels: dict[str, ModuleType]) -> None:
    """Leading dimensions that collapse into two are not copied; three that do not, are."""
    nchw = sample(4, 3, 16, 16)
    for x in (
        nchw,
        nchw.to(memory_format=torch.channels_last),
        nchw[:, 1:],
        nchw.mT,
        sample(1, 16, 16).expand(9, 16, 16),
    ):
        with caught_launches() as launches:
            kernels["wavelet"].wavedec2_forward(x, 2, 1, 0.5)
        assert launches[0].arguments[0] is x
    x = sample(5, 4, 3, 16, 16).permute(1, 0, 2, 3, 4)[:, :, :2]
    with caught_launches() as launches:
        kernels["wavelet"].wavedec2_forward(x, 2, 1, 0.5)
    assert launches[0].arguments[0].is_contiguous()


def test_tokens_read_channels_last_where_it_lies(kernels: dict[str, ModuleType]) -> None:
    x = sample(2, 3, 256, 256).to(memory_format=torch.channels_last)
    with caught_launches() as launches:
        kernels["wavelet_tokens"].wavelet_tokens_forward(x, 3, GRID, 0.5, None, None)
    assert launches[0].arguments[0] is x


def test_every_kernel_is_in_the_registry(kernels: dict[str, ModuleType]) -> None:
    """A kernel is a jitted function that no other jitted function calls."""
    jitted = {n: f for m in kernels.values() for n, f in vars(m).items() if isinstance(f, triton.JITFunction)}
    bodies = [f.src.partition(":\n")[2] for f in jitted.values()]
    called = {n for n in jitted if any(re.search(rf"\b{n}\b", body) for body in bodies)}
    registered = {launch.kernel.__name__ for case in CASES for launch in case.launches(kernels[case.stem])}
    assert set(jitted) - called == registered


def test_the_report_is_of_these_kernels(kernels: dict[str, ModuleType]) -> None:
    """``python benchmarks/kernel_report.py`` has been run since the last change that shows in it."""
    text = REPORT.read_text()
    assert [case.name for case in CASES if case.name not in text] == []
    if f"Triton {triton.__version__};" not in text:
        pytest.skip("the report is of another version of Triton")
    for case, _, _ in VECTORS[::4]:
        (launch,) = case.launches(kernels[case.stem])
        cells = kernel_report.row(case.name, kernel_report.tile_of(launch), *kernel_report.compiled_code(launch, 90))
        assert " ".join(" ".join(cells).split()) in " ".join(text.split())
