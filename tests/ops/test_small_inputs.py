# SPDX-License-Identifier: Apache-2.0
"""What a small image costs: the Python path of each function, counted in calls, which no busy machine changes.

``benchmarks/`` times it. Here it is held that a plain call takes no dispatcher, and that its number of Python
function calls does not grow.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import wavedp

X = torch.rand(3, 32, 32)
IMAGES = X[None]
ONE, THREE = wavedp.dwt2(X), wavedp.wavedec2(X, 3)
TOKENS = wavedp.wavelet_tokens(IMAGES, 3, 4)
# Python frames of one call: about 50 ns each.
CALLS: dict[str, tuple[Callable[[], Any], int]] = {
    "dwt2": (lambda: wavedp.dwt2(X), 14),
    "idwt2": (lambda: wavedp.idwt2(ONE), 20),
    "wavedec2": (lambda: wavedp.wavedec2(X, 3), 14),
    "waverec2": (lambda: wavedp.waverec2(THREE), 19),
    "coarse": (lambda: wavedp.coarse(X, 3), 19),
    "wavelet_tokens": (lambda: wavedp.wavelet_tokens(IMAGES, 3, 4), 23),
    "wavelet_untokens": (lambda: wavedp.wavelet_untokens(TOKENS, 4, channels=3), 27),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_python_path_is_short(name: str) -> None:
    pytest.importorskip("wavedp._csrc", reason="the reference is as long as it is")
    call, most = CALLS[name]
    call()
    frames: list[str] = []

    def count(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            frames.append(frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name)

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    assert 0 < len(frames) <= most, frames


@pytest.mark.parametrize("name", CALLS)
def test_a_plain_call_takes_no_dispatcher(name: str) -> None:
    pytest.importorskip("wavedp._csrc", reason="the reference is made of torch operations")
    call, _ = CALLS[name]
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    assert not [event.name for event in profile.events() if event.name.startswith("wavedp")]
