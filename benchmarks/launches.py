# SPDX-License-Identifier: Apache-2.0
"""What the Triton launchers launch, compiled for a GPU that need not be there.

The launchers run on meta tensors, which have sizes and strides and no memory. Each launch is caught with its
arguments, specialised by Triton as on a device (divisibility by 16, ones, types, tile), and compiled ahead of time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from wavedp.reference.noise_step import StepConstants, StepTensor

CAPABILITIES = (80, 90, 100)


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, not executed."""

    kernel: Any  # triton.JITFunction
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]  # constexpr arguments and options

    def compile(self, capability: int) -> Any:
        """Machine code for ``sm_<capability>``, as a ``triton.compiler.CompiledKernel`` that no driver has loaded."""
        import triton
        from triton.runtime.jit import create_function_from_signature

        target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
        backend = triton.compiler.make_backend(target)
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialisation, options = bind(*self.arguments, **self.keywords)
        options, signature, constants, attributes = self.kernel._pack_args(
            backend, self.keywords, bound, specialisation, options
        )
        source = triton.compiler.ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(source, target=target, options=options.__dict__)


@contextlib.contextmanager
def caught_launches() -> Iterator[list[Launch]]:
    """Collects launches of this thread's kernels instead of executing them."""
    import triton

    found: list[Launch] = []

    def catch(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        assert all(0 < size < 2**31 for size in grid), grid
        found.append(Launch(kernel, arguments, keywords))

    run = triton.JITFunction.run
    triton.JITFunction.run = catch
    try:
        yield found
    finally:
        triton.JITFunction.run = run


Arguments = Callable[[tuple[int, ...], torch.dtype], tuple[Any, ...]]


@dataclass(frozen=True)
class Case:
    """A call of a launcher, for what it launches."""

    name: str
    stem: str  # of the module in kernels/
    call: Callable[[ModuleType], object]
    main: bool = False  # compiled for every architecture, not only for sm_90
    moved: float = 0.0  # of the noise: bytes that an element must move
    numbers: int = 0  # of the noise: elements of a lane

    def launches(self, kernels: ModuleType) -> list[Launch]:
        """``kernels`` is the module of ``stem``, not interpreted."""
        with caught_launches() as found:
            self.call(kernels)
        return found


NAMES = {  # of pixels and coefficients
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
    torch.uint8: "uint8",
}
IMAGES = (64, 3, 256, 256)
GRID = (16, 16)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = False) -> torch.Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)


def _name(function: str, shape: tuple[int, ...], dtype: torch.dtype, level: int, note: str = "") -> str:
    return " ".join(filter(None, (function, "x".join(map(str, shape)), NAMES[dtype], f"L{level}", note)))


def wavedec2(shape: tuple[int, ...], dtype: torch.dtype, level: int, edge: int = 1, **flags: bool) -> Case:
    layout = flags.get("channels_last", False)
    note = "channels_last" * layout + f"edge {edge}" * (shape[-1] % 2)

    def call(kernels: ModuleType) -> object:
        return kernels.wavedec2_forward(_empty(shape, dtype, layout), level, edge, 0.5)

    return Case(_name("wavedec2", shape, dtype, level, note), "wavelet", call, flags.get("main", False))


def coarse(shape: tuple[int, ...], dtype: torch.dtype, level: int, **flags: bool) -> Case:
    def call(kernels: ModuleType) -> object:
        return kernels.coarse_forward(_empty(shape, dtype), level, 1, 0.5)

    return Case(_name("coarse", shape, dtype, level), "wavelet", call, flags.get("main", False))


def waverec2(shape: tuple[int, ...], dtype: torch.dtype, level: int, edge: int = 1, **flags: bool) -> Case:
    ll_alone = flags.get("ll_alone", False)
    note = "LL alone" * ll_alone + f"edge {edge}" * (shape[-1] % 2)

    def call(kernels: ModuleType) -> object:
        *lead, height, width = shape
        bands: list[torch.Tensor | None] = []
        for _ in range(level):
            height, width = -(-height // 2), -(-width // 2)
            bands = [None if ll_alone else _empty((*lead, height, width), dtype) for _ in range(3)] + bands
        bands = [_empty((*lead, height, width), dtype), *bands]
        return kernels.waverec2_forward(bands, *shape[-2:], edge, 0.5)

    return Case(_name("waverec2", shape, dtype, level, note), "wavelet", call, flags.get("main", False))


def _constants(channels: int, level: int, dtype: torch.dtype) -> torch.Tensor:
    return _empty((channels * (3 * level + 1),), torch.float64 if dtype == torch.float64 else torch.float32)


def wavelet_tokens(shape: tuple[int, ...], dtype: torch.dtype, level: int, **flags: bool) -> Case:
    energies, plain = flags.get("energies", False), flags.get("plain", False)
    layout = flags.get("channels_last", False)
    note = "energies" * energies + "not normalised" * plain + "channels_last" * layout

    def call(kernels: ModuleType) -> object:
        constants = None if plain else _constants(shape[1], level, dtype)
        image = _empty(shape, dtype, layout)
        return kernels.wavelet_tokens_forward(image, level, GRID, 0.5, constants, constants, energies=energies)

    return Case(_name("wavelet_tokens", shape, dtype, level, note), "wavelet_tokens", call, flags.get("main", False))


def wavelet_untokens(shape: tuple[int, ...], dtype: torch.dtype, level: int, **flags: bool) -> Case:
    plain = flags.get("plain", False)

    def call(kernels: ModuleType) -> object:
        batch, channels, height, width = shape
        pixels = channels * height * width // (GRID[0] * GRID[1])
        values = [pixels >> 2 * level, *(3 * pixels >> 2 * k for k in range(level, 0, -1))]
        tokens = [_empty((batch, GRID[0] * GRID[1], n), dtype) for n in values]
        constants = None if plain else _constants(channels, level, dtype)
        return kernels.wavelet_untokens_forward(tokens, *shape[1:], GRID, 0.5, constants, constants)

    note = "not normalised" * plain
    return Case(_name("wavelet_untokens", shape, dtype, level, note), "wavelet_tokens", call, flags.get("main", False))


def per_sample(
    function: str, shape: tuple[int, ...], dtype: torch.dtype, arguments: Arguments, note: str, **flags: bool
) -> Case:
    """A function of ``kernels/per_sample.py``; ``arguments`` makes them from ``shape`` and ``dtype``."""

    def call(kernels: ModuleType) -> object:
        return getattr(kernels, function)(*arguments(shape, dtype))

    name = " ".join(filter(None, (function, "x".join(map(str, shape)), NAMES[dtype], note)))
    return Case(name, "per_sample", call, flags.get("main", False))


def linear_norms(shape: tuple[int, ...], dtype: torch.dtype, bias: bool = True, **flags: bool) -> Case:
    def arguments(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, ...]:
        B, T, d, p = shape
        return _empty((B, T, d), dtype), _empty((B, T, p), dtype), bias

    return per_sample("linear_norms", shape, dtype, arguments, "bias" * bias, **flags)


def scaled_weight_grad(shape: tuple[int, ...], dtype: torch.dtype, **flags: bool) -> Case:
    def arguments(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, ...]:
        B, T, d, p = shape
        return _empty((B, T, p), dtype), _empty((B, T, d), dtype), _empty((B,), torch.float32)

    return per_sample("scaled_weight_grad", shape, dtype, arguments, "", **flags)


def norm_grads(shape: tuple[int, ...], dtype: torch.dtype, subtract_mean: bool = True, **flags: bool) -> Case:
    def arguments(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, ...]:
        return _empty(shape, dtype), _empty(shape, dtype), 1e-5, subtract_mean

    return per_sample("norm_grads", shape, dtype, arguments, "" if subtract_mean else "RMS", **flags)


def records(function: str, shape: tuple[int, ...], dtype: torch.dtype, **flags: bool) -> Case:
    """``squared_norms`` and ``weighted_sum``."""

    def arguments(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, ...]:
        factors = [_empty(shape[:1], torch.float32)] if function == "weighted_sum" else []
        return _empty(shape, dtype), *factors

    return per_sample(function, shape, dtype, arguments, "", **flags)


def embedding(function: str, shape: tuple[int, ...], dtype: torch.dtype, **flags: bool) -> Case:
    """``embedding_norms`` and ``embedding_weight_grad`` of the vocabulary of GPT-2."""

    def arguments(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, ...]:
        ids, g = _empty(shape[:2], torch.int64), _empty(shape, dtype)
        others = (_empty(shape[:1], torch.float32), 50257) if function == "embedding_weight_grad" else ()
        return ids, g, *others, -1

    return per_sample(function, shape, dtype, arguments, "", **flags)


def chacha20_words(count: int, rounds: int, **flags: bool) -> Case:
    def call(kernels: ModuleType) -> object:
        return kernels.chacha20_words_forward(_KEY, 0, (0, 0), rounds, _empty((count,), torch.uint32))

    return Case(f"chacha20_words {count} rounds {rounds}", "noise", call, flags.get("main", False), 4.0, 16)


NARROW, WIDE, STRICT = range(3)


def noisy_mean(count: int, dtype: torch.dtype, out_dtype: torch.dtype, kind: int, **flags: bool) -> Case:
    """With a grid; without a total it is noise alone."""
    grid, noise_alone = flags.get("grid", True), flags.get("noise_alone", False)

    def call(kernels: ModuleType) -> object:
        total = None if noise_alone else _empty((count,), dtype)
        step = 2.0**-20 if grid else 0.0
        return kernels.noisy_mean_forward(total, 1.0, step, 4.0, _KEY, 0, 0, kind, _empty((count,), out_dtype))

    notes = ("", "wide", "strict")[kind], "noise alone" * noise_alone, "no grid" * (not grid)
    types = NAMES[dtype] if out_dtype == dtype else f"{NAMES[dtype]} to {NAMES[out_dtype]}"
    name = " ".join(filter(None, ("noisy_mean", str(count), types, *notes)))
    moved = out_dtype.itemsize + (0 if noise_alone else dtype.itemsize)
    return Case(name, "noise", call, flags.get("main", False), moved, 8 if kind == STRICT else 10)


SGD, ADAM = range(2)


def noise_step(rule: int, dtypes: tuple[torch.dtype, ...], note: str = "", **flags: bool) -> Case:
    """A parameter of 2^24 elements of each type, with sums of float32, or of float64 for float64."""

    noise, strict = flags.get("noise", True), flags.get("strict", False)
    given = [flags.get("momentum", rule == ADAM), rule == ADAM, *(flags.get(n) for n in ("amsgrad", "average"))]
    moved = 0.0
    for dtype in dtypes:
        real = torch.promote_types(dtype, torch.float32).itemsize
        # A master is read and written in place of the parameter, which is written alone.
        param = dtype.itemsize + 8 if flags.get("master") and dtype.itemsize == 2 else 2 * dtype.itemsize
        moved += (param + real + 2 * real * sum(map(bool, given))) / len(dtypes)

    def call(kernels: ModuleType) -> object:
        tensors = []
        for dtype in dtypes:
            real = torch.promote_types(dtype, torch.float32)
            first, second, largest, average = (_empty((1 << 24,), real) if there else None for there in given)
            master = _empty((1 << 24,), torch.float32) if flags.get("master") and dtype.itemsize == 2 else None
            constants = StepConstants(least_square=1.0 if flags.get("corrected") else 0.0)
            stochastic = flags.get("stochastic", False)
            total = _empty((1 << 24,), real)
            param = _empty((1 << 24,), dtype)
            moments = first, second, largest, average
            tensors.append(StepTensor(param, total, *moments, master, stochastic, constants))
        std, grid = (1.0, 2.0**-12) if noise else (0.0, 0.0)
        return kernels.noise_step_forward(rule, tensors, std, grid, 4.0, _KEY, 0, 0, strict)

    name = ("SGD", "Adam")[rule]
    types = "+".join(NAMES[dtype] for dtype in dtypes)
    name = f"noise_step {name} {types} {note}".rstrip()
    return Case(name, "noise", call, flags.get("main", False), moved, 8 if strict else 10)


_KEY = torch.zeros(32, dtype=torch.uint8)
F32, BF16, F16, F64, U8 = NAMES
ODD = (64, 3, 253, 255)
OVER_2_31 = (48, 3, 4096, 4096)
"""More elements than 32 bits count, so that offsets and some strides need 64."""
PATCHES_OF_3 = (64, 3, 384, 384)
"""3 x 3 coefficients of the third LL in a patch, which is no power of two."""
LINEAR = (16, 256, 768, 3072)
"""B, T, d and p of a layer of a 12-layer GPT."""
LONG = (4, 4096, 768, 768)
LINEAR_OVER_2_31 = (4096, 1024, 768, 768)

CASES = [
    *(wavedec2(IMAGES, dtype, 3, main=True) for dtype in (F32, BF16)),
    *(wavedec2(IMAGES, dtype, 3) for dtype in (F16, F64)),
    *(wavedec2(IMAGES, dtype, level) for dtype in (F32, BF16) for level in (1, 2)),
    wavedec2(IMAGES, BF16, 5),
    *(wavedec2(ODD, BF16, 1, edge) for edge in range(6)),
    wavedec2((1, 1), F32, 1, 5),
    wavedec2(IMAGES, F32, 3, channels_last=True),
    wavedec2(OVER_2_31, F32, 3),
    *(coarse(IMAGES, dtype, 3, main=True) for dtype in (F32, U8)),
    coarse(IMAGES, BF16, 3),
    coarse(ODD, U8, 1),
    *(waverec2(IMAGES, dtype, 3, main=True) for dtype in (F32, BF16)),
    *(waverec2(IMAGES, dtype, 3) for dtype in (F16, F64)),
    *(waverec2(IMAGES, dtype, level) for dtype in (F32, BF16) for level in (1, 2)),
    waverec2(IMAGES, BF16, 5),
    *(waverec2(ODD, BF16, 1, edge) for edge in range(6)),
    waverec2((1, 1), F32, 1, 5),
    waverec2(IMAGES, F32, 3, ll_alone=True),
    waverec2(OVER_2_31, F32, 3),
    *(wavelet_tokens(IMAGES, dtype, 3, main=True) for dtype in (F32, BF16)),
    *(wavelet_tokens(IMAGES, dtype, 3) for dtype in (F16, F64, U8)),
    *(wavelet_tokens(IMAGES, BF16, level) for level in (1, 2, 4)),
    wavelet_tokens(IMAGES, F32, 3, plain=True),
    wavelet_tokens(IMAGES, F32, 3, energies=True),
    wavelet_tokens(IMAGES, F32, 3, channels_last=True),
    wavelet_tokens(PATCHES_OF_3, F32, 3),
    wavelet_tokens(OVER_2_31, F32, 3),
    *(wavelet_untokens(IMAGES, dtype, 3, main=True) for dtype in (F32, BF16)),
    *(wavelet_untokens(IMAGES, dtype, 3) for dtype in (F16, F64)),
    *(wavelet_untokens(IMAGES, BF16, level) for level in (1, 2, 4)),
    wavelet_untokens(IMAGES, F32, 3, plain=True),
    wavelet_untokens(PATCHES_OF_3, F32, 3),
    wavelet_untokens(OVER_2_31, F32, 3),
    *(linear_norms(LINEAR, dtype, main=True) for dtype in (BF16, F32)),
    *(linear_norms(LINEAR, dtype) for dtype in (F16, F64)),
    linear_norms(LINEAR, BF16, bias=False),
    *(linear_norms(LONG, dtype) for dtype in (BF16, F32, F64)),
    linear_norms((5, 33, 1, 3), BF16),
    linear_norms(LINEAR_OVER_2_31, BF16),
    *(scaled_weight_grad(LINEAR, dtype, main=True) for dtype in (BF16, F32)),
    *(scaled_weight_grad(LINEAR, dtype) for dtype in (F16, F64)),
    *(scaled_weight_grad((4096, 1, 768, 768), dtype) for dtype in (BF16, F32)),
    scaled_weight_grad((5, 33, 1, 3), BF16),
    scaled_weight_grad(LINEAR_OVER_2_31, BF16),
    norm_grads((16, 256, 768), BF16, main=True),
    *(norm_grads((16, 256, 768), dtype, subtract_mean=False) for dtype in (F32, F64)),
    norm_grads((16, 256, 8192), BF16),
    records("squared_norms", (16, 256, 768), BF16, main=True),
    records("weighted_sum", (16, 256, 768), BF16, main=True),
    records("weighted_sum", (4096, 768), F32),
    embedding("embedding_norms", (16, 256, 768), BF16, main=True),
    *(embedding("embedding_weight_grad", (16, 256, 768), dtype, main=dtype == BF16) for dtype in (BF16, F32)),
    chacha20_words(1 << 24, 20),
    chacha20_words(1 << 24, 8),
    noisy_mean(1 << 24, F32, F32, NARROW, main=True),
    noisy_mean(1 << 24, F32, F32, NARROW, noise_alone=True, grid=False),
    noisy_mean(1 << 24, F32, BF16, NARROW),
    noisy_mean(1 << 24, F64, F64, WIDE),
    noisy_mean(1 << 24, F32, F32, STRICT),
    noisy_mean(1 << 32, F32, F32, NARROW),
    noise_step(SGD, (F32,), main=True),
    noise_step(SGD, (F32,), "no noise", noise=False),
    noise_step(SGD, (F32,), "momentum", momentum=True),
    noise_step(ADAM, (F32,), main=True),
    noise_step(ADAM, (F32,), "no noise", noise=False),
    noise_step(ADAM, (F32,), "strict", strict=True),
    noise_step(ADAM, (F32,), "amsgrad corrected average", amsgrad=True, corrected=True, average=True),
    noise_step(ADAM, (F32, BF16, F16)),
    noise_step(ADAM, (BF16,), "master", master=True),
    noise_step(ADAM, (BF16,), "rounded at random", stochastic=True),
    noise_step(ADAM, (F64,)),
]
