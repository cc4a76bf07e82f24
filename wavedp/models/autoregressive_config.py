# SPDX-License-Identifier: Apache-2.0
"""What an autoregressive model is made of."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from wavedp.errors import InvalidTypeError, InvalidValueError
from wavedp.models.sizes import check_real, check_sizes

POSITIONS = ("learned", "factorised", "rotary")
MOST_TEXT = {"text_width": 2**16, "text_length": 2**12}


def check_class_names(names: Any) -> tuple[str, ...]:
    """The names that a list of classes is made of, in label order.

    Raises:
        InvalidTypeError: ``names`` is no sequence of texts, or is a text itself.
        InvalidValueError: there are none, one is empty, or one comes twice.
    """
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise InvalidTypeError(f"class names must be a sequence of texts, such as ['cat', 'dog'], got {names!r}")
    if not names or not all(name.strip() for name in names) or len({*names}) < len(names):
        raise InvalidValueError(f"class names must be distinct, none of them empty and at least one, got {list(names)}")
    return tuple(names)


@dataclass(frozen=True)
class AutoregressiveConfig:
    """Sizes of the model. It covers the first ``num_scales`` scales of a tokenizer: 1 is the approximation alone,
    which is all that the private stage needs."""

    num_classes: int
    tokens_per_scale: int
    num_scales: int
    approximation_codes: int
    detail_codes: int
    width: int = 128
    depth: int = 4
    heads: int = 4
    mlp_ratio: float = 4.0
    class_dropout: float = 0.1  # share of training samples that see no class and no text, for guidance
    class_names: tuple[str, ...] = ()  # what the labels mean, in their order; empty: unnamed
    tokenizer_fingerprint: str = ""  # of the tokenizer whose tokens it was trained on; empty: unknown
    privately_trained: bool = False  # whether its weights have already spent a privacy budget
    position: str = "learned"  # one of POSITIONS: a table; scale + row + column; rotations of queries and keys by them
    per_scale_heads: bool = False  # an output head for each detail scale; otherwise they share one
    text_width: int = 0  # of the text embeddings; 0: the model takes no text
    text_length: int = 0  # slots of the text prefix, in text tokens
    text_dropout: float = 0.1  # of the samples that see their class, the share that sees it alone

    def __post_init__(self) -> None:
        sizes = ("num_classes", "tokens_per_scale", "num_scales", "approximation_codes", "detail_codes")
        check_sizes(self, *sizes, "width", "depth", "heads")
        check_real("mlp_ratio", self.mlp_ratio, above=0.0, below=1024.0)
        names: Any = self.class_names
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise InvalidTypeError(f"class_names must be a sequence of texts, got {names!r}")
        if not isinstance(self.tokenizer_fingerprint, str) or not isinstance(self.privately_trained, bool):
            raise InvalidTypeError("tokenizer_fingerprint must be a text and privately_trained True or False")
        object.__setattr__(self, "class_names", tuple(self.class_names))
        if self.class_names and len(self.class_names) != self.num_classes:
            raise InvalidValueError(f"{len(self.class_names)} class_names for num_classes={self.num_classes}")
        check_real("class_dropout", self.class_dropout, below=1.0)
        self._check_text()
        self._check_positions()

    def _check_text(self) -> None:
        for name, most in MOST_TEXT.items():
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= most:
                raise InvalidValueError(f"{name} must be an integer in 0..{most}, got {value!r}")
        if (self.text_width > 0) != (self.text_length > 0):
            raise InvalidValueError(
                f"text_width={self.text_width} and text_length={self.text_length}: a model takes text if both are "
                "positive, and none if both are 0"
            )
        check_real("text_dropout", self.text_dropout, below=1.0)

    def _check_positions(self) -> None:
        if not isinstance(self.per_scale_heads, bool):
            raise InvalidTypeError(f"per_scale_heads must be True or False, got {self.per_scale_heads!r}")
        if self.position not in POSITIONS:
            raise InvalidValueError(f"position must be one of {', '.join(POSITIONS)}, got {self.position!r}")
        if self.position != "learned" and self.grid**2 != self.tokens_per_scale:
            raise InvalidValueError(
                f"position={self.position!r} needs the rows and columns of a square grid, and {self.tokens_per_scale} "
                "tokens per scale are no square; take 'learned'"
            )
        if self.position == "rotary" and (self.width % (2 * self.heads) or self.width // self.heads < 6):
            raise InvalidValueError(
                "position='rotary' needs an even number of at least 6 dimensions a head, not "
                f"width / heads = {self.width / self.heads:g}"
            )

    @property
    def length(self) -> int:
        """Tokens in a whole sequence."""
        return self.tokens_per_scale * self.num_scales

    @property
    def grid(self) -> int:
        """Side of the grid of a scale's tokens, where they have one."""
        return math.isqrt(self.tokens_per_scale)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
