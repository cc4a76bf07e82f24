# SPDX-License-Identifier: Apache-2.0
"""How a token is chosen from logits: one uniform number a row, by the inverse of the distribution function.

On a CPU `torch.multinomial` draws an exponential for every code of every row; that is more work than the step of the
model that made the logits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from wavedp.errors import InvalidValueError
from wavedp.models.sizes import check_real


@dataclass(frozen=True)
class SamplingOptions:
    """See `AutoregressiveTransformer.generate`."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        check_real("temperature", self.temperature, below=1e6)
        check_real("guidance_scale", self.guidance_scale, at_least=-1e3, below=1e3)
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise InvalidValueError(f"top_k must be a positive integer, got {self.top_k!r}")
        if self.top_p is not None:
            check_real("top_p", self.top_p, above=0.0, below=1.0 + 2**-30)

    @property
    def guided(self) -> bool:
        return self.guidance_scale != 1.0


def guided_logits(logits: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """``logits`` [2 B, K], the first half with class and text, the other without: none + g (given - none), [B, K]."""
    given, none = logits.chunk(2)
    return none + guidance_scale * (given - none)


def sample_tokens(
    logits: Tensor,  # [B, K] float32
    uniforms: Tensor | None,  # [B] float32 in [0, 1); None: the likeliest token
    temperature: float | Tensor,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """One token a row, int64 [B]: the first whose distribution function exceeds the row's uniform number.

    Exact up to the rounding of a sum of float32 and the 24 bits of a uniform number.
    """
    if uniforms is None:
        return logits.argmax(dim=-1)
    # The largest becomes 0 however cold it is.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    order = None
    if top_k is not None and top_k < logits.shape[-1]:
        logits, order = logits.topk(top_k, dim=-1)
    elif top_p is not None and top_p < 1.0:
        logits, order = logits.sort(dim=-1, descending=True)
    below = logits.exp().cumsum(dim=-1)  # the distribution function, times its last value
    total = below[:, -1:]
    if top_p is not None and top_p < 1.0:
        # The first sum that reaches the share; a code is as likely as before among those up to it.
        kept = (below < top_p * total).sum(dim=-1, keepdim=True).clamp(max=below.shape[-1] - 1)
        total = below.gather(1, kept)
    drawn = torch.searchsorted(below, uniforms[:, None] * total, right=True).clamp(max=below.shape[-1] - 1)
    return (drawn if order is None else order.gather(1, drawn))[:, 0]
