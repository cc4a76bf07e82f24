# SPDX-License-Identifier: Apache-2.0
"""The Haar transform under the names and layouts of other libraries: move code over by changing an import.

``docs/compat.md`` says what is the same and what differs. Neither library is needed.

=================================== ====================== =================================
instead of                          names                  module
=================================== ====================== =================================
pytorch_wavelets                    DWTForward, DWTInverse wavedp.compat.pytorch_wavelets
ptwt, PyTorch Wavelet Toolbox       wavedec2, waverec2     wavedp.compat.ptwt
=================================== ====================== =================================
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wavedp.compat.ptwt import WaveletDetailTuple2d, wavedec2, waverec2
    from wavedp.compat.pytorch_wavelets import DWTForward, DWTInverse

_LAZY_ATTRIBUTES = {
    "DWTForward": "wavedp.compat.pytorch_wavelets",
    "DWTInverse": "wavedp.compat.pytorch_wavelets",
    "WaveletDetailTuple2d": "wavedp.compat.ptwt",
    "wavedec2": "wavedp.compat.ptwt",
    "waverec2": "wavedp.compat.ptwt",
}
_LAZY_MODULES = ("ptwt", "pytorch_wavelets")

__all__ = ["DWTForward", "DWTInverse", "WaveletDetailTuple2d", "wavedec2", "waverec2"]


def __getattr__(name: str) -> Any:
    if name in _LAZY_ATTRIBUTES:
        return getattr(importlib.import_module(_LAZY_ATTRIBUTES[name]), name)
    if name in _LAZY_MODULES:
        return importlib.import_module(f"wavedp.compat.{name}")
    raise AttributeError(f"module 'wavedp.compat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY_ATTRIBUTES, *_LAZY_MODULES])
