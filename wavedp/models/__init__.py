# SPDX-License-Identifier: Apache-2.0
"""The models of the method: a spectral image tokenizer and an autoregressive transformer over its tokens."""

from wavedp.models.autoregressive import AutoregressiveTransformer
from wavedp.models.autoregressive_config import AutoregressiveConfig
from wavedp.models.compatibility import check_compatible
from wavedp.models.spectral_tokenizer import SpectralTokenizer, TokenizerOutput
from wavedp.models.storage import load_autoregressive, load_model, load_tokenizer, save_model
from wavedp.models.text import T5TextEncoder, TextEmbeddings, TextEncoder
from wavedp.models.tokenizer_config import SpectralTokenizerConfig

__all__ = [
    "AutoregressiveConfig",
    "AutoregressiveTransformer",
    "SpectralTokenizer",
    "SpectralTokenizerConfig",
    "T5TextEncoder",
    "TextEmbeddings",
    "TextEncoder",
    "TokenizerOutput",
    "check_compatible",
    "load_autoregressive",
    "load_model",
    "load_tokenizer",
    "save_model",
]
