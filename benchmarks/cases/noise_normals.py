# SPDX-License-Identifier: Apache-2.0
"""Who makes normals, and who makes a noisy mean of a sum: this package, torch, NumPy, and Opacus' secure mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor

import wavedp
from wavedp.benchmarks.cases.noise_checks import (
    FILL,
    IN_PLACE,
    TWO_TO_ONE,
    Moments,
    NoiseProvider,
    Sweeps,
    check_digits,
    normal_sweeps,
)
from wavedp.benchmarks.registry import Size, Thunk
from wavedp.benchmarks.transforms import is_compiled
from wavedp.functional import grid_step
from wavedp.ops import use_backend

PREFIX = 1 << 14  # numbers that are compared with the definition
STD, DIVISOR = 1.5, 256.0
MOST_COMPILED = 1 << 24  # on a CPU the compiler's own generator takes 0.1 us a number


def filler(fill: Callable[[Tensor], object], out: Tensor, sweeps: Sweeps | None) -> NoiseProvider:
    """``fill`` writes standard normals into ``out``."""

    def check(label: str) -> None:
        out.fill_(torch.nan)
        fill(out)
        moments = Moments()
        moments.add(out)
        moments.check(label)

    return NoiseProvider(lambda: partial(fill, out), check, sweeps)


def ours(out: Tensor) -> NoiseProvider:
    """Under a fresh key for each call; checked under one that the definition has too."""

    def check(label: str) -> None:
        out.fill_(torch.nan)
        key = wavedp.NoiseKey.insecure(0)
        wavedp.gaussian_noise(out.shape, key=key, out=out)
        moments = Moments()
        moments.add(out)
        moments.check(label)
        with use_backend("reference"):
            wanted = wavedp.gaussian_noise((min(PREFIX, out.numel()),), key=key, device=out.device)
        check_digits(label, out[:PREFIX], wanted)

    return NoiseProvider(lambda: partial(wavedp.gaussian_noise, out.shape, out=out), check, (FILL,))


def normals(size: Size, device: torch.device) -> Mapping[str, NoiseProvider]:
    """Standard normals into an existing tensor, which all share."""
    out = torch.empty(size.shape, dtype=size.dtype, device=device)
    count = torch.get_num_threads()
    made = normal_sweeps(device)
    found = {
        "Tensor.normal_": filler(Tensor.normal_, out, made),
        "wavedp": ours(out),
        "torch.randn, out=": filler(lambda x: torch.randn(x.shape, out=x), out, made),
    }
    if is_compiled(device) and math.prod(size.shape) <= MOST_COMPILED:
        compiled = torch.compile(lambda x: x.copy_(torch.randn_like(x)), dynamic=False)
        found["torch.compile of randn"] = filler(compiled, out, (FILL,))
    if device.type == "cpu":
        if count > 1:
            found[f"Tensor.normal_, {count} threads"] = filler(in_parts(torch_generators(count)), out, made)
        found["NumPy"] = filler(in_parts(numpy_generators(1)), out, (FILL,))
        if count > 1:
            found[f"NumPy, {count} threads"] = filler(in_parts(numpy_generators(count)), out, (FILL,))
    found["Opacus secure mode"] = filler(sum_of_four, out, (FILL, *(4 * (*made, TWO_TO_ONE)), IN_PLACE))
    return found


def torch_generators(count: int) -> list[Callable[[Tensor], object]]:
    def fill(generator: torch.Generator, part: Tensor) -> None:
        part.normal_(generator=generator)

    return [partial(fill, torch.Generator().manual_seed(seed)) for seed in range(count)]


def numpy_generators(count: int) -> list[Callable[[Tensor], object]]:
    """PCG64 and a ziggurat."""

    def fill(generator: np.random.Generator, part: Tensor) -> None:
        generator.standard_normal(dtype=np.float32, out=part.numpy())

    return [partial(fill, np.random.default_rng(seed)) for seed in range(count)]


def in_parts(fills: list[Callable[[Tensor], object]]) -> Callable[[Tensor], object]:
    """Each of ``fills`` takes a part of the tensor, at the same time."""
    if len(fills) == 1:
        return fills[0]
    pool = ThreadPoolExecutor(len(fills))

    def fill(out: Tensor) -> None:
        list(pool.map(lambda both: both[0](both[1]), zip(fills, out.chunk(len(fills)), strict=True)))

    return fill


def sum_of_four(out: Tensor) -> None:
    """Half the sum of four normals, as Opacus makes noise with ``secure_mode=True`` (arXiv 2107.10138, section 5.1);
    the generator is torch's, since torchcsprng is no longer installable."""
    total = torch.zeros_like(out)
    for _ in range(4):
        total += torch.normal(mean=0.0, std=1.0, size=out.shape, device=out.device)
    torch.div(total, 2, out=out)


def noisy_means(size: Size, device: torch.device) -> Mapping[str, NoiseProvider]:
    """``round((total + noise) / grid) * grid / divisor`` of one large sum."""
    total = torch.randn(size.shape, generator=torch.Generator(device).manual_seed(0), device=device)
    buffer = torch.empty_like(total)
    grid = grid_step(STD)

    def checked(mean: Callable[[], Tensor]) -> Callable[[str], None]:
        def check(label: str) -> None:
            buffer.fill_(torch.nan)
            moments = Moments()
            moments.add((mean() * DIVISOR - total) / STD, total)
            moments.check(label, grid / STD)

        return check

    def exact(label: str) -> None:
        """Under a known key, besides: half a grid apart, where the two round in different ways."""
        key = wavedp.NoiseKey.insecure(0)
        got = wavedp.noisy_mean(total, STD, divisor=DIVISOR, key=key)[:PREFIX]
        with use_backend("reference"):
            wanted = wavedp.noisy_mean(total[:PREFIX], STD, divisor=DIVISOR, key=key)
        check_digits(label, got, wanted, 1.01 * grid / DIVISOR)
        checked(partial(wavedp.noisy_mean, total, STD, divisor=DIVISOR, key=key))(label)

    def plain() -> Tensor:
        return buffer.normal_(0.0, STD).add_(total).mul_(1 / grid).round_().mul_(grid / DIVISOR)

    def written() -> Tensor:
        return buffer.copy_(total)

    made = normal_sweeps(device)
    mean = partial(wavedp.noisy_mean, total, STD, divisor=DIVISOR)
    found = {
        "copy_": NoiseProvider(lambda: written, lambda label: None, (IN_PLACE,)),
        "wavedp": NoiseProvider(lambda: mean, exact, (IN_PLACE,)),
        "plain torch": NoiseProvider(lambda: plain, checked(plain), (*made, TWO_TO_ONE, IN_PLACE, IN_PLACE, IN_PLACE)),
    }
    if is_compiled(device) and math.prod(size.shape) <= MOST_COMPILED:
        compiled = torch.compile(fused_mean, dynamic=False)
        call: Thunk = partial(compiled, total, grid)
        found["torch.compile"] = NoiseProvider(lambda: call, checked(call), (IN_PLACE,))
    return found


def fused_mean(total: Tensor, grid: float) -> Tensor:
    return torch.round((total + STD * torch.randn_like(total)) * (1 / grid)) * (grid / DIVISOR)
