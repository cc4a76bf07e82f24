# SPDX-License-Identifier: Apache-2.0
"""Sizes of a spectral tokenizer, and the named ones: the paper's (arXiv 2412.09607) and small ones."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from wavedp.errors import InvalidTypeError, InvalidValueError
from wavedp.models.sizes import DEFAULT_MOST, check_real, check_sizes
from wavedp.models.spectra import SpectralLayout

CAUSAL_SIDES = ("none", "encoder", "decoder", "both")
QUANTIZERS = ("vq", "fsq")
FSQ_LEVELS = (8, 6, 5)  # 240 codes, the recommendation of arXiv 2309.15505, table 1, for about 2^8
MAX_FSQ_DIMENSIONS = 16
_LATER = ("decoder_width", "decoder_heads", "quantizer", "approximation_levels", "detail_levels")


@dataclass(frozen=True)
class SpectralTokenizerConfig:
    """Sizes of a spectral tokenizer. Tokens per scale are ``grid ** 2``; scales are ``levels + 1``.

    ``causal``: where the scale-causal mask applies. ``"both"`` is the default, because only then do the tokens of a
    coarse image not depend on detail (encoder) and does a prefix of the scales decode on its own (decoder).

    ``quantizer``: ``"vq"``, codebooks of ``approximation_codes`` and ``detail_codes`` entries of ``code_dim`` numbers;
    or ``"fsq"``, finite scalar quantisation to ``approximation_levels`` and ``detail_levels`` values per dimension,
    whose products then *are* the numbers of codes, whatever was given for those.
    """

    image_size: int = 32  # pixels a side
    channels: int = 1
    levels: int = 2
    grid: int = 4
    width: int = 128  # of the encoder, and of the decoder too unless decoder_width is given
    encoder_depth: int = 2
    decoder_depth: int = 3
    heads: int = 4  # of the encoder, and of the decoder too unless decoder_heads is given
    mlp_ratio: float = 4.0
    approximation_codes: int = 256
    detail_codes: int = 256
    code_dim: int = 8
    causal: str = "both"
    commitment_weight: float = 0.25
    decoder_width: int | None = None
    decoder_heads: int | None = None
    quantizer: str = "vq"
    approximation_levels: tuple[int, ...] = ()  # () with "fsq": FSQ_LEVELS
    detail_levels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.causal not in CAUSAL_SIDES:
            raise InvalidValueError(f"causal must be one of {CAUSAL_SIDES}, got {self.causal!r}")
        if self.quantizer not in QUANTIZERS:
            raise InvalidValueError(f"quantizer must be one of {QUANTIZERS}, got {self.quantizer!r}")
        for part in ("approximation", "detail"):
            self._settle_levels(part)
        sizes = ("width", "encoder_depth", "decoder_depth", "heads", "approximation_codes", "detail_codes", "code_dim")
        check_sizes(self, *sizes, *(name for name in ("decoder_width", "decoder_heads") if self._given(name)))
        check_real("mlp_ratio", self.mlp_ratio, above=0.0, below=1024.0)
        check_real("commitment_weight", self.commitment_weight, below=1e6)
        self.layout()

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "SpectralTokenizerConfig":
        """The sizes called ``name`` (`PRESETS`), with ``changes`` to single fields.

        ``sit-4-256``, ``sit-5-256`` and ``sit-6-512`` have the paper's geometry; its code dimension, width of the
        encoder and numbers of heads are not in the texts at hand and are ViT-VQGAN's (arXiv 2110.04627).
        """
        if name not in PRESETS:
            raise InvalidValueError(f"no preset is called {name!r}; there are {', '.join(PRESETS)}")
        unknown = sorted(set(changes) - {field.name for field in fields(cls)})
        if unknown:
            raise InvalidTypeError(f"a tokenizer has no size called {unknown[0]!r}")
        return replace(PRESETS[name], **changes)

    def layout(self) -> SpectralLayout:
        return SpectralLayout(self.image_size, self.channels, self.levels, self.grid)

    def decoder_sizes(self) -> tuple[int, int]:
        """Width and heads of the decoder."""
        return self.decoder_width or self.width, self.decoder_heads or self.heads

    def to_dict(self) -> dict[str, Any]:
        """The fields by name; those that came after the first saved models are left out at their defaults, so that
        what needs none of them is written, and fingerprinted, as it always was."""
        later = {f.name for f in fields(self) if f.name in _LATER and getattr(self, f.name) == f.default}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in later}

    def identity(self) -> str:
        """`to_dict` as text, part of the fingerprint of a tokenizer."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    def _given(self, name: str) -> bool:
        return getattr(self, name) is not None

    def _settle_levels(self, part: str) -> None:
        """Makes a tuple of ``<part>_levels``, as JSON has a list, and the number of codes that it implies."""
        name = f"{part}_levels"
        levels = getattr(self, name)
        if not isinstance(levels, tuple | list):
            raise InvalidTypeError(f"{name} must be a tuple of integers, got {levels!r}")
        levels = tuple(levels)
        if self.quantizer == "vq":
            if levels:
                raise InvalidValueError(f"{name} must be empty with quantizer='vq'; did you mean quantizer='fsq'?")
        else:
            levels = levels or FSQ_LEVELS
            if not all(type(level) is int and 2 <= level <= DEFAULT_MOST for level in levels):
                raise InvalidValueError(f"{name} must be integers from 2 to {DEFAULT_MOST}, got {levels!r}")
            if len(levels) > MAX_FSQ_DIMENSIONS or math.prod(levels) > DEFAULT_MOST:
                raise InvalidValueError(
                    f"{name} must have at most {MAX_FSQ_DIMENSIONS} dimensions and {DEFAULT_MOST} codes, got {levels!r}"
                )
            object.__setattr__(self, f"{part}_codes", math.prod(levels))
        object.__setattr__(self, name, levels)


_SIT = SpectralTokenizerConfig(
    image_size=256,
    channels=3,
    levels=3,
    grid=16,
    width=512,
    encoder_depth=8,
    heads=8,
    decoder_width=1280,
    decoder_depth=32,
    decoder_heads=16,
    approximation_codes=8192,
    detail_codes=8192,
    code_dim=32,
)
_SMALL = SpectralTokenizerConfig(
    width=64, encoder_depth=2, decoder_depth=2, mlp_ratio=2.0, approximation_codes=256, detail_codes=256
)
PRESETS = {
    "sit-4-256": _SIT,
    "sit-5-256": replace(_SIT, levels=4),
    "sit-6-512": replace(_SIT, levels=5, image_size=512),
    "small-32": _SMALL,
    "small-32-rgb": replace(_SMALL, channels=3),
    "small-64": replace(_SMALL, image_size=64, levels=3),
    "small-64-rgb": replace(_SMALL, image_size=64, levels=3, channels=3),
}
"""Named sizes. The small ones train on a CPU in minutes: 16 tokens a scale, so 48 for 32 px and 64 for 64 px."""
