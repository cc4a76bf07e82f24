# SPDX-License-Identifier: Apache-2.0
"""Who computes a Haar transform: this package, its definition eager and compiled, and other libraries.

Each keeps its coefficients in a layout of its own. ``pack`` and ``unpack`` go there from the flat list of bands that
this package uses (LL of the coarsest level, then LH, HL, HH of each level, coarsest first), and are not timed.
``from_scales`` and ``to_scales`` do so from LL and the details of each level as one tensor [B, 3, C, h, w], which
tokens are made of; they are timed with the tokens, and are views where the layout allows.
"""

from __future__ import annotations

import functools
import importlib.resources
import importlib.util
import os
import shutil
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import wavedp
from wavedp.benchmarks.registry import Size
from wavedp.ops import available_backends, use_backend
from wavedp.reference.wavelet import Edge, waverec2_forward
from wavedp.reference.wavelet import wavedec2_forward as reference_wavedec2

Bands = Sequence[Tensor]


@dataclass(frozen=True)
class Transform:
    """One implementation; its coefficients are tensors in any nesting."""

    forward: Callable[[Tensor], Any]
    inverse: Callable[[Any], Any]
    pack: Callable[[Bands], Any] = list
    unpack: Callable[[Any], list[Tensor]] = list
    image: Callable[[Any], Tensor] = lambda x: x  # what the inverse returns -> a tensor
    differentiable: bool = True
    channels_first: Callable[[Any], list[Tensor]] | None = None  # LL, [B, C, 3, h, w], ...: how it keeps them
    from_channels_first: Callable[[list[Tensor]], Any] = list

    def to_scales(self, coefficients: Any) -> list[Tensor]:
        """LL, then the details of each level, [B, 3, C, h, w], coarse to fine."""
        if self.channels_first is not None:
            low, *details = self.channels_first(coefficients)
            return [low, *(bands.transpose(1, 2) for bands in details)]
        low, *bands = self.unpack(coefficients)
        return [low, *(torch.stack(bands[i : i + 3], dim=1) for i in range(0, len(bands), 3))]

    def from_scales(self, scales: Sequence[Tensor]) -> Any:
        """The inverse of ``to_scales``; never a copy."""
        low, *details = scales
        if self.channels_first is not None:
            return self.from_channels_first([low, *(bands.transpose(1, 2) for bands in details)])
        return self.pack([low, *(band for bands in details for band in bands.unbind(1))])


def transforms(level: int, size: Size, device: torch.device) -> dict[str, Transform]:
    """Those that take the dtype and the device and are installed, this package first."""
    found = {"wavedp": haar(level)}
    if device.type == "cuda":
        found |= {f"wavedp {name}": haar(level, name) for name in ("triton", "cuda") if name in available_backends()}
    if size.ours_only:
        return found
    if is_compiled(device):
        found["torch.compile"] = compiled(level, size)
    found["eager"] = eager(level, size)
    found["F.conv2d"] = convolution(level, size, device)
    if importlib.util.find_spec("ptwt") and size.dtype in (torch.float32, torch.float64):
        found["ptwt"] = ptwt(level)
    if importlib.util.find_spec("pytorch_wavelets"):
        found["pytorch_wavelets"] = pytorch_wavelets(level, size, device)
    if importlib.util.find_spec("pywt") and device.type == "cpu" and size.dtype == torch.float32:
        found["PyWavelets"] = pywavelets(level, 1)
        threads = min(torch.get_num_threads(), size.shape[0])
        if threads > 1:
            found[f"PyWavelets, {threads} threads"] = pywavelets(level, threads)
    return found


def is_compiled(device: torch.device) -> bool:
    """Whether torch.compile is a rival: on a CPU it needs a C++ compiler."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    return device.type == "cuda" or compiler is not None


def flat(coefficients: Any) -> list[Any]:
    """[cA, (cH, cV, cD), ...] as one list."""
    return [coefficients[0], *(band for details in coefficients[1:] for band in details)]


def nested(bands: Sequence[Any]) -> list[Any]:
    """The inverse of ``flat``."""
    return [bands[0], *(tuple(bands[i : i + 3]) for i in range(1, len(bands), 3))]


def by_backend(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` by one of the package's backends; ``"auto"``: as it is."""
    if backend == "auto":
        return function

    @functools.wraps(function)
    def call(*inputs: Any, **options: Any) -> Any:
        with use_backend(backend):
            return function(*inputs, **options)

    return call


def haar(level: int, backend: str = "auto") -> Transform:
    forward = functools.partial(wavedp.wavedec2, level=level)
    return Transform(by_backend(backend, forward), by_backend(backend, wavedp.waverec2), nested, flat)


def eager(level: int, size: Size) -> Transform:
    height, width = size.shape[-2:]

    def forward(x: Tensor) -> list[Tensor]:
        return reference_wavedec2(x, level, Edge.REPEAT, 0.5)

    def inverse(bands: Bands) -> Tensor:
        return waverec2_forward(bands, height, width, Edge.ZERO, 0.5)

    return Transform(forward, inverse)


def compiled(level: int, size: Size) -> Transform:
    plain = eager(level, size)
    return Transform(
        torch.compile(plain.forward, dynamic=False, fullgraph=True),
        torch.compile(plain.inverse, dynamic=False, fullgraph=True),
    )


def convolution(level: int, size: Size, device: torch.device) -> Transform:
    """A strided convolution per level with four filters for each channel, and its transpose."""
    channels = size.shape[1]
    signs = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]], device=device)
    filters = (signs / 2).view(4, 1, 2, 2).repeat(channels, 1, 1, 1).to(size.dtype)

    def forward(x: Tensor) -> list[Tensor]:  # LL, then [B, C, 3, h, w] from coarse to fine
        coefficients: list[Tensor] = []
        for _ in range(level):
            bands = F.conv2d(x, filters, stride=2, groups=channels).unflatten(1, (channels, 4))
            x, details = bands[:, :, 0], bands[:, :, 1:]
            coefficients.insert(0, details)
        return [x, *coefficients]

    def inverse(coefficients: Sequence[Tensor]) -> Tensor:
        x, *details = coefficients
        for bands in details:
            bands = torch.cat([x.unsqueeze(2), bands], dim=2).flatten(1, 2)
            x = F.conv_transpose2d(bands, filters, stride=2, groups=channels)
        return x

    return Transform(forward, inverse, stacked, unstacked, channels_first=list)


def stacked(bands: Bands) -> list[Tensor]:
    """LL, then the three details of each level as one tensor [B, C, 3, h, w], coarse to fine."""
    return [bands[0], *(torch.stack(list(bands[i : i + 3]), dim=2) for i in range(1, len(bands), 3))]


def unstacked(coefficients: Sequence[Tensor]) -> list[Tensor]:
    return [coefficients[0], *(band for details in coefficients[1:] for band in details.unbind(2))]


def ptwt(level: int) -> Transform:
    library: Any = importlib.import_module("ptwt")

    def pack(bands: Bands) -> tuple[Any, ...]:
        return (bands[0], *(library.WaveletDetailTuple2d(*bands[i : i + 3]) for i in range(1, len(bands), 3)))

    forward = functools.partial(library.wavedec2, wavelet="haar", mode="zero", level=level)
    return Transform(forward, functools.partial(library.waverec2, wavelet="haar"), pack, flat)


def pytorch_wavelets(level: int, size: Size, device: torch.device) -> Transform:
    """``(Yl, [Yh_1, ...])``, finest first."""
    with stand_in_for_pkg_resources():
        from pytorch_wavelets import DWTForward, DWTInverse
    forward = DWTForward(J=level, wave="haar", mode="zero").to(device, size.dtype)
    inverse = DWTInverse(wave="haar", mode="zero").to(device, size.dtype)

    def coarse_to_fine(coefficients: tuple[Tensor, list[Tensor]]) -> list[Tensor]:
        low, details = coefficients
        return [low, *details[::-1]]

    def fine_to_coarse(coefficients: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        low, *details = coefficients
        return low, details[::-1]

    return Transform(
        forward,
        inverse,
        pack=lambda bands: fine_to_coarse(stacked(bands)),
        unpack=lambda coefficients: unstacked(coarse_to_fine(coefficients)),
        channels_first=coarse_to_fine,
        from_channels_first=fine_to_coarse,
    )


@contextmanager
def stand_in_for_pkg_resources() -> Iterator[None]:
    """Lets pytorch_wavelets 1.3.0 be imported where setuptools >= 82 has no ``pkg_resources`` any more.

    It wants one function from there, to read the filters of another transform (DTCWT) when that one is used.
    """
    name = "pkg_resources"
    if name in sys.modules or importlib.util.find_spec(name):
        yield
        return

    def resource_stream(package: str, resource: str) -> Any:
        return importlib.resources.files(package).joinpath(resource).open("rb")

    module = types.ModuleType(name)
    module.resource_stream = resource_stream  # type: ignore[attr-defined]
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]


def pywavelets(level: int, threads: int) -> Transform:
    """PyWavelets on the memory of the tensors; with threads, each takes a part of the batch."""
    import pywt

    def forward(x: Any) -> Any:
        return pywt.wavedec2(x, "haar", level=level)

    def inverse(coefficients: Any) -> Any:
        return pywt.waverec2(coefficients, "haar")

    def parts(tensor: Tensor) -> list[Any]:
        return [part.numpy() for part in tensor.chunk(threads)]

    def joined(arrays: Sequence[Any]) -> Tensor:
        return torch.cat([torch.from_numpy(array) for array in arrays])

    pool = ThreadPoolExecutor(threads)

    def in_parts(function: Callable[[Any], Any], pieces: Sequence[Any]) -> list[Any]:
        return [function(pieces[0])] if threads == 1 else list(pool.map(function, pieces))

    return Transform(
        forward=lambda x: in_parts(forward, parts(x)),
        inverse=lambda pieces: in_parts(inverse, pieces),
        pack=lambda bands: [nested(piece) for piece in zip(*map(parts, bands))],
        unpack=lambda pieces: [joined(arrays) for arrays in zip(*map(flat, pieces))],
        image=joined,
        differentiable=False,
    )
