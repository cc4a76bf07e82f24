# SPDX-License-Identifier: Apache-2.0
"""What wavelet_tokens and wavelet_untokens refuse, and what they say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import wavedp

IMAGE = torch.ones(1, 2, 8, 8)
TOKENS = [torch.ones(1, 4, 8), torch.ones(1, 4, 24)]
tokens, untokens = wavedp.wavelet_tokens, wavedp.wavelet_untokens
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "numpy": (lambda: tokens(IMAGE.numpy(), 1, 2), TypeError, "wavelet_tokens takes torch tensors, not a ndarray"),
    "integers": (lambda: tokens(IMAGE.int(), 1, 2), TypeError, "images of uint8, not torch.int32"),
    "three axes": (lambda: tokens(IMAGE[0], 1, 2), ValueError, r"images \[B, C, H, W\].*\(2, 8, 8\)"),
    "no channel": (lambda: tokens(IMAGE[:, :0], 1, 2), ValueError, "at least one channel"),
    "a height": (
        lambda: tokens(IMAGE[:, :, :6], 1, 2),
        ValueError,
        r"height that is a multiple of 4 = 2 tokens \* 2\^1, not 6",
    ),
    "a width": (
        lambda: tokens(IMAGE, 2, (2, 3)),
        ValueError,
        r"width that is a multiple of 12 = 3 tokens \* 2\^2, not 8",
    ),
    "levels": (lambda: tokens(IMAGE, -1, 2), ValueError, "number of levels of at least 0, not -1"),
    "a grid": (lambda: tokens(IMAGE, 1, 0), ValueError, "grid of at least 1 x 1 tokens.*not 0"),
    "a grid of three": (lambda: tokens(IMAGE, 1, (1, 2, 2)), ValueError, r"one number, not \(1, 2, 2\)"),
    "scales": (lambda: tokens(IMAGE, 1, 2, scales=3), ValueError, "1 to 2 scales of 1 levels, not 3"),
    "a norm": (lambda: tokens(IMAGE, 1, 2, norm="l2"), ValueError, "norm 'ortho' or 'mean', not 'l2'"),
    "an affine": (lambda: tokens(IMAGE, 1, 2, affine=(1, 0)), ValueError, "uint8 images alone.*torch.float32"),
    "a dtype": (lambda: tokens(IMAGE, 1, 2, dtype=torch.int8), TypeError, "floating-point dtype.*torch.int8"),
    "one mean": (
        lambda: tokens(IMAGE, 1, 2, 0.5),
        ValueError,
        "mean as a list of 2 entries, one for each scale, not a float",
    ),
    "three means": (lambda: tokens(IMAGE, 1, 2, [0.0] * 3), ValueError, "list of 2 entries.*not a list of 3"),
    "a mean's shape": (
        lambda: tokens(IMAGE, 1, 2, [0.0, torch.ones(2)]),
        ValueError,
        r"mean of scale 1.*\(6,\), not of shape \(2,\)",
    ),
    "a mean's gradient": (
        lambda: tokens(IMAGE, 1, 2, [0.0, torch.ones(6, requires_grad=True)]),
        ValueError,
        "mean of scale 1 requires grad",
    ),
    "a mean's type": (lambda: tokens(IMAGE, 1, 2, [0.0, "1"]), TypeError, "numbers or tensors in mean, not a str"),
    "no deviation": (
        lambda: tokens(IMAGE, 1, 2, None, [1.0, 0.0]),
        ValueError,
        "std of scale 1 must be positive, not 0.0",
    ),
    "nan": (lambda: tokens(IMAGE, 1, 2, None, [float("nan"), 1.0]), ValueError, "std of scale 0 must be positive"),
    "one tensor": (lambda: untokens(TOKENS[0], 2, channels=2), ValueError, "in a list, not a Tensor"),
    "no tokens": (lambda: untokens([], 2, channels=2), ValueError, "at least one scale"),
    "integer tokens": (lambda: untokens([TOKENS[0].int()], 2, channels=2), TypeError, "not torch.int32"),
    "no channels": (lambda: untokens(TOKENS, 2), ValueError, r"channels=, or output_size=\(H, W\)"),
    "another grid": (
        lambda: untokens(TOKENS, 3, channels=2),
        ValueError,
        r"\[B, 9, D\] of a grid of 3 x 3.*\(1, 4, 8\)",
    ),
    "other channels": (
        lambda: untokens(TOKENS, 2, channels=3),
        ValueError,
        "8 values are not square patches of 3 channels",
    ),
    "another size": (
        lambda: untokens(TOKENS, 2, output_size=(24, 8)),
        ValueError,
        "24 x 8 has approximation tokens of 12 values.*have 8",
    ),
    "size and channels": (
        lambda: untokens(TOKENS, 2, channels=1, output_size=(8, 8)),
        ValueError,
        "have 8 for 1 channels",
    ),
    "a size between": (lambda: untokens(TOKENS, 2, output_size=(8, 6)), ValueError, "width that is a multiple of 4"),
    "a scale's shape": (
        lambda: untokens([TOKENS[0]] * 2, 2, channels=2),
        ValueError,
        r"scale 1 of images \[2, 8, 8\].*\[B, 4, 24\].*\(1, 4, 8\)",
    ),
    "batches": (
        lambda: untokens([TOKENS[0], TOKENS[1].repeat(2, 1, 1)], 2, channels=2),
        ValueError,
        r"one batch B.*\(2, 4, 24\)",
    ),
    "dtypes": (
        lambda: untokens([TOKENS[0], TOKENS[1].half()], 2, channels=2),
        ValueError,
        "scale 0 is torch.float32 on cpu and scale 1 torch.float16",
    ),
    "too many scales": (
        lambda: untokens(TOKENS, 2, channels=2, levels=0),
        ValueError,
        "at most 1 scales of 0 levels, not 2",
    ),
    "a mean of a prefix": (
        lambda: untokens(TOKENS, 2, [0.0] * 2, channels=2, levels=2),
        ValueError,
        "list of 3 entries",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()
