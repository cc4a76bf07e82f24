# SPDX-License-Identifier: Apache-2.0
"""Fused Haar-wavelet and differential-privacy kernels for PyTorch, and coarse-to-fine private image generation.

The functions on tensors are imported eagerly; everything else loads on first use, so that ``import wavedp``
stays light, compiles nothing and never initialises CUDA.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "kernels" / "wavelet.py").is_file() and (_CHECKOUT / "csrc").is_dir():
    # A checkout that is not installed: kernels/ lies beside wavedp/ instead of inside it.
    __path__.append(str(_CHECKOUT))

from wavedp.errors import WavedpError  # noqa: E402
from wavedp.functional import (  # noqa: E402
    NoiseKey,
    add_gaussian_noise_,
    chacha20_words,
    clip_and_sum,
    clip_factors,
    coarse,
    dwt2,
    embedding_grad_norm,
    gaussian_noise,
    ghost_norm,
    idwt2,
    noisy_mean,
    per_sample_norm,
    scaled_weight_grad,
    wavedec2,
    wavelet_tokens,
    wavelet_untokens,
    waverec2,
)

if TYPE_CHECKING:
    from wavedp.pipeline import CoarseToFineOutput, CoarseToFinePipeline
    from wavedp.privacy.engine import PrivacyEngine
    from wavedp.privacy.spec import PrivacySpec

__version__ = "0.1.0"

_LAZY_ATTRIBUTES = {
    "PrivacyEngine": "wavedp.privacy.engine",
    "PrivacySpec": "wavedp.privacy.spec",
    "CoarseToFinePipeline": "wavedp.pipeline",
    "CoarseToFineOutput": "wavedp.pipeline",
}
_LAZY_MODULES = (
    "compat",
    "data",
    "errors",
    "functional",
    "models",
    "ops",
    "optim",
    "pipeline",
    "privacy",
    "superres",
    "training",
)

__all__ = [
    "CoarseToFineOutput",
    "CoarseToFinePipeline",
    "NoiseKey",
    "PrivacyEngine",
    "PrivacySpec",
    "WavedpError",
    "add_gaussian_noise_",
    "chacha20_words",
    "clip_and_sum",
    "clip_factors",
    "coarse",
    "dwt2",
    "embedding_grad_norm",
    "gaussian_noise",
    "ghost_norm",
    "idwt2",
    "noisy_mean",
    "per_sample_norm",
    "scaled_weight_grad",
    "wavedec2",
    "wavelet_tokens",
    "wavelet_untokens",
    "waverec2",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY_ATTRIBUTES:
        return getattr(importlib.import_module(_LAZY_ATTRIBUTES[name]), name)
    if name in _LAZY_MODULES:
        return importlib.import_module(f"wavedp.{name}")
    raise AttributeError(f"module 'wavedp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY_ATTRIBUTES, *_LAZY_MODULES])
