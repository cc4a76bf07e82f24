# SPDX-License-Identifier: Apache-2.0
"""Whether a tokenizer and an autoregressive model speak the same tokens."""

from wavedp.errors import InvalidValueError
from wavedp.models.autoregressive_config import AutoregressiveConfig
from wavedp.models.spectral_tokenizer import SpectralTokenizer


def check_compatible(tokenizer: SpectralTokenizer, config: AutoregressiveConfig) -> None:
    """Raises ValueError unless a model of ``config`` can use the tokens of ``tokenizer``, and was trained on them.

    A model that was trained on the tokens of another tokenizer of the same sizes would run, and produce noise.
    """
    layout = tokenizer.layout
    if config.num_scales > layout.num_scales:
        raise InvalidValueError(f"the model has {config.num_scales} scales, the tokenizer only {layout.num_scales}")
    sizes = {
        "tokens per scale": (config.tokens_per_scale, layout.tokens_per_scale),
        "approximation codes": (config.approximation_codes, tokenizer.config.approximation_codes),
        "detail codes": (config.detail_codes, tokenizer.config.detail_codes),
    }
    if config.num_scales == 1:
        del sizes["detail codes"]
    for what, (of_model, of_tokenizer) in sizes.items():
        if of_model != of_tokenizer:
            raise InvalidValueError(
                f"the model has {of_model} {what}, the tokenizer {of_tokenizer}; they were not trained together"
            )
    if config.tokenizer_fingerprint not in ("", tokenizer.fingerprint()):
        raise InvalidValueError(
            "the model was trained on the tokens of another tokenizer; give the one it was trained with"
        )
