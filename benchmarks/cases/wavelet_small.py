# SPDX-License-Identifier: Apache-2.0
"""What a call costs: each public function on one 3 x 32 x 32 image, beside ``torch.mul`` on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial

import torch
from torch.utils._pytree import tree_leaves

import wavedp
from wavedp.benchmarks.cases import wavelet, wavelet_tokens
from wavedp.benchmarks.cases.sizes import SMALL, images
from wavedp.benchmarks.registry import Case, Provider, Size

FLOOR = "torch.mul"
NAMES = ("wavedec2-L3", "waverec2-L3", "coarse-L3", "coarse_uint8-L3", "wavelet_tokens-L3", "wavelet_untokens-L3")
UINT8 = {name: [dataclasses.replace(size, dtype=torch.uint8) for size in sizes] for name, sizes in SMALL.items()}


def small(case: Case) -> Case:
    """The same case on the small image, every provider compared with one multiplication."""

    def providers(size: Size, device: torch.device) -> Mapping[str, Provider]:
        found = case.providers(size, device)
        return {name: dataclasses.replace(provider, floor=FLOOR) for name, provider in found.items()}

    sizes = UINT8 if "uint8" in case.name else SMALL
    return dataclasses.replace(case, name=f"small-{case.name}", providers=providers, sizes=sizes, floors=(FLOOR,))


def dwt2(size: Size, device: torch.device) -> Mapping[str, Provider]:
    found = wavelet.written(lambda inputs, out: partial(wavedp.dwt2, inputs[0], out=(out[0], tuple(out[1:]))), device)
    found["wavedp"] = Provider(lambda inputs, out: partial(wavedp.dwt2, inputs[0]), tree_leaves)
    return found


def idwt2(size: Size, device: torch.device) -> Mapping[str, Provider]:
    found = wavelet.written(lambda bands, out: partial(wavedp.idwt2, (bands[0], bands[1:]), out=out[0]), device)
    found["wavedp"] = Provider(lambda bands, out: partial(wavedp.idwt2, (bands[0], bands[1:])), wavelet_tokens.alone)
    return found


def plain_tokens(size: Size, device: torch.device) -> Mapping[str, Provider]:
    """Tokens without mean and deviation."""
    call = partial(wavedp.wavelet_tokens, levels=wavelet_tokens.LEVEL, grid=wavelet_tokens.grid_of(size.shape))
    found = wavelet.written(lambda inputs, out: partial(call, inputs[0], out=list(out)), device)
    found["wavedp"] = Provider(lambda inputs, out: partial(call, inputs[0]))
    return found


def expected_plain_tokens(size: Size, x: torch.Tensor) -> list[torch.Tensor]:
    return wavelet_tokens.tokens_of(x, None, None)


ONE_LEVEL = [
    Case("dwt2", images, partial(wavelet.decompose, level=1), dwt2, SMALL),
    Case("idwt2", partial(wavelet.bands_of, 1), wavelet.recompose, idwt2, SMALL),
]
PLAIN = [Case("wavelet_tokens_plain-L3", images, expected_plain_tokens, plain_tokens, SMALL)]
LARGE = [case for case in [*wavelet.CASES, *wavelet_tokens.CASES] if case.name in NAMES]
CASES = [small(case) for case in [*ONE_LEVEL, *LARGE, *PLAIN]]
