# SPDX-License-Identifier: Apache-2.0
"""The public transform against PyWavelets on 500 fixed cases drawn from all shapes, modes, dtypes and strides."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import pywt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import wavedp
from wavedp.reference.wavelet import EDGE_OF_MODE

TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
STRIDES = ["contiguous", "channels_last", "transposed", "sliced", "expanded", "offset"]


def strided(x: Tensor, strides: str) -> Tensor:
    """The values of ``x`` [A, B, H, W] in other memory; ``"expanded"`` repeats one channel."""
    if strides == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if strides == "transposed":
        return x.mT.contiguous().mT
    if strides == "sliced":
        return torch.nn.functional.pad(x, (2, 3, 1, 0)).repeat_interleave(2, -1)[..., 1:, 4:-6:2]
    if strides == "expanded":
        return x[:, :1].expand(x.shape)
    if strides == "offset":
        return torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape)
    return x


def flat(coeffs: Any) -> list[Any]:
    return [coeffs[0], *(band for details in coeffs[1:] for band in details)]


@settings(derandomize=True, max_examples=500, deadline=None, database=None)
@given(
    lead=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    level=st.integers(1, 6),
    mode=st.sampled_from(list(EDGE_OF_MODE)),
    dtype=st.sampled_from(list(TOLERANCES)),
    strides=st.sampled_from(STRIDES),
    seed=st.integers(0, 2**31),
)
def test_any_case_is_pywavelets(
    lead: tuple[int, int],
    size: tuple[int, int],
    level: int,
    mode: str,
    dtype: torch.dtype,
    strides: str,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*lead, *size, dtype=torch.float64, generator=generator).to(dtype)
    x = strided(values, strides)
    assert x.shape == values.shape
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Level value")
            exact = pywt.wavedec2(x.double().contiguous().numpy(), "haar", mode, level)
    except ValueError:
        assert mode in ("reflect", "antireflect")  # of an axis of one sample
        with pytest.raises(ValueError, match="at least 2 samples"):
            wavedp.wavedec2(x, level, mode)
        return
    actual = wavedp.wavedec2(x, level, mode)
    tolerance = TOLERANCES[dtype]
    for one, other in zip(flat(actual), flat(exact), strict=True):
        # What is summed up to here, not what is left of it: details are small differences of large numbers. Modes
        # that extrapolate grow an edge by up to 3 a level and axis.
        scale = max(abs(exact[0]).max(), x.abs().max().item()) * (3**level if mode in ("smooth", "antireflect") else 1)
        wide = TOLERANCES[torch.float32 if dtype != torch.float64 else dtype]
        torch.testing.assert_close(one.double(), torch.from_numpy(other), rtol=tolerance, atol=4 * wide * scale)
    assert torch.equal(wavedp.coarse(x, level, mode), actual[0])

    bands = [band.double().numpy() for band in flat(actual)]
    coeffs = [bands[0], *(tuple(bands[k : k + 3]) for k in range(1, len(bands), 3))]
    rebuilt = torch.from_numpy(pywt.waverec2(coeffs, "haar", mode))
    back = wavedp.waverec2(actual)
    limit = {"rtol": tolerance, "atol": 4 * level * wide * max(abs(band).max() for band in bands)}
    torch.testing.assert_close(back.double(), rebuilt, **limit)
    cropped = wavedp.waverec2(actual, output_size=size)
    torch.testing.assert_close(cropped.double(), rebuilt[..., : size[0], : size[1]], **limit)
