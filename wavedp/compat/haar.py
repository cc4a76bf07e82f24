# SPDX-License-Identifier: Apache-2.0
"""Is a wavelet, in any of the forms the other libraries take, the Haar wavelet?"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from wavedp.errors import InvalidValueError

NAMES = ("haar", "db1", "bior1.1", "rbio1.1")
"""PyWavelets' names of it; their filters are equal."""

_S = 1 / math.sqrt(2)
DEC_LO, DEC_HI, REC_LO, REC_HI = (_S, _S), (-_S, _S), (_S, _S), (_S, -_S)
"""PyWavelets' filters of it."""

_ATOL = 1e-4  # 1/sqrt(2) rounded to half precision is 7.6e-5 off


def check_wavelet(
    library: str,  # to which other wavelets are left
    wavelet: Any,  # a name, an object with PyWavelets' attributes, or a sequence of filters
    expected: Sequence[Sequence[float]],  # the filters of such a sequence
) -> None:
    """Refuses everything but Haar.

    Raises:
        ValueError: another wavelet, or filters that are learned: here nothing would learn them.
    """
    if isinstance(wavelet, str):
        if wavelet.lower() not in NAMES:
            raise InvalidValueError(_refusal(library, repr(wavelet)))
        return
    if hasattr(wavelet, "dec_lo"):
        filters = (wavelet.dec_lo, wavelet.dec_hi, wavelet.rec_lo, wavelet.rec_hi)
        expected = (DEC_LO, DEC_HI, REC_LO, REC_HI)
    elif isinstance(wavelet, (tuple, list)) and len(wavelet) == len(expected):
        filters = tuple(wavelet)
    else:
        raise InvalidValueError(_refusal(library, f"a {type(wavelet).__name__}"))
    if any(isinstance(taps, torch.Tensor) and taps.requires_grad for taps in filters):
        raise InvalidValueError(_refusal(library, "filters that require a gradient"))
    if not all(is_filter(taps, wanted) for taps, wanted in zip(filters, expected)):
        raise InvalidValueError(_refusal(library, getattr(wavelet, "name", "other filters")))


def is_filter(taps: Any, expected: Sequence[float]) -> bool:
    """Whether ``taps`` (a sequence, array or tensor of any shape) are ``expected``, up to half precision."""
    values = torch.as_tensor(taps).flatten().tolist() if hasattr(taps, "shape") else list(taps)
    return len(values) == len(expected) and all(abs(a - b) <= _ATOL for a, b in zip(values, expected))


def _refusal(library: str, wavelet: str) -> str:
    return f"wavedp computes the Haar wavelet ('haar' or 'db1'), not {wavelet}: use {library} itself for others"
