# SPDX-License-Identifier: Apache-2.0
"""The geometry of a spectral token sequence: which scale has which map, patch and resolution.

Scale 0 is the approximation LL_L; scale s >= 1 holds the details (cH, cV, cD) of level L - s + 1, stacked on
channels. Every scale has the same grid of tokens, because patches grow with frequency (arXiv 2412.09607).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wavedp.errors import InvalidTypeError, InvalidValueError
from wavedp.functional import wavedec2, wavelet_tokens, wavelet_untokens
from wavedp.models.sizes import check_sizes, described


@dataclass(frozen=True)
class SpectralLayout:
    """Sizes of every scale of an ``image_size`` square image with ``levels`` Haar levels and a ``grid`` x ``grid``
    map of tokens per scale."""

    image_size: int
    channels: int
    levels: int
    grid: int

    def __post_init__(self) -> None:
        check_sizes(self, "image_size", "channels", "levels", "grid")
        coarsest = self.image_size >> self.levels
        if coarsest << self.levels != self.image_size or coarsest % self.grid:
            raise InvalidValueError(
                f"image_size={self.image_size} with levels={self.levels} gives a coarsest map of "
                f"{self.image_size / 2**self.levels:g} pixels a side, which must be a multiple of grid={self.grid}"
            )

    @property
    def num_scales(self) -> int:
        return self.levels + 1

    @property
    def tokens_per_scale(self) -> int:
        return self.grid**2

    def map_size(self, scale: int) -> int:
        """Side of the coefficient map of ``scale``, in coefficients."""
        return self.image_size >> (self.levels - max(scale - 1, 0))

    def map_channels(self, scale: int) -> int:
        return self.channels if scale == 0 else 3 * self.channels

    def patch_size(self, scale: int) -> int:
        return self.map_size(scale) // self.grid

    def token_dim(self, scale: int) -> int:
        """Coefficients per token: map_channels * patch_size**2."""
        return self.map_channels(scale) * self.patch_size(scale) ** 2

    def resolution(self, num_scales: int) -> int:
        """Side in pixels of the image that the first ``num_scales`` scales describe."""
        if not 1 <= num_scales <= self.num_scales:
            raise InvalidValueError(f"num_scales must lie in 1..{self.num_scales}, got {num_scales}")
        return self.image_size >> (self.num_scales - num_scales)

    def scales_of_resolution(self, side: int) -> int:
        """Number of scales whose image has ``side`` pixels; the inverse of `resolution`."""
        for num_scales in range(1, self.num_scales + 1):
            if self.resolution(num_scales) == side:
                return num_scales
        known = [self.resolution(k) for k in range(1, self.num_scales + 1)]
        raise InvalidValueError(f"an image of {side} pixels a side fits no prefix of the scales; sides are {known}")

    def scales_of_length(self, length: int) -> int:
        """Number of whole scales in a sequence of ``length`` tokens."""
        num_scales, rest = divmod(length, self.tokens_per_scale)
        if rest or not 1 <= num_scales <= self.num_scales:
            raise InvalidValueError(
                f"a sequence of {length} tokens is not 1 to {self.num_scales} scales of {self.tokens_per_scale}"
            )
        return num_scales


def num_scales_of(images: Tensor, layout: SpectralLayout) -> int:
    """Number of scales that images [B, C, r, r] are made of; r is one of the resolutions of the layout."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise InvalidTypeError(f"images must be a floating-point tensor in [0, 1], got {described(images)}")
    if images.dim() != 4 or images.shape[1] != layout.channels or images.shape[2] != images.shape[3]:
        raise InvalidValueError(
            f"images must have shape [B, {layout.channels}, r, r], got {list(images.shape)}; resize or convert first"
        )
    return layout.scales_of_resolution(images.shape[-1])


def image_to_maps(images: Tensor, layout: SpectralLayout) -> list[Tensor]:
    """Coefficient maps of an image at any resolution of the layout, coarse first.

    ``images``: [B, C, r, r] in [0, 1] with r = ``layout.resolution(k)``. Returns k maps [B, C_s, m_s, m_s] with the
    values that the full-resolution image's transform would have: the coarse image of k scales is
    LL / 2^(L + 1 - k), so its own coefficients are scaled back by that power of two.
    """
    num_scales = num_scales_of(images, layout)
    full = images * 2.0 ** (layout.num_scales - num_scales)
    coefficients = wavedec2(full, num_scales - 1)
    return [torch.cat(bands, dim=1) if isinstance(bands, tuple) else bands for bands in coefficients]


def image_to_tokens(
    images: Tensor,  # [B, C, r, r] in [0, 1], r = layout.resolution(k)
    layout: SpectralLayout,
    mean: Sequence[Tensor] | None = None,  # [C_s] of every scale of the layout
    std: Sequence[Tensor] | None = None,
) -> list[Tensor]:  # k of [B, grid^2, token_dim(s)], coarse first, in the wider dtype of images and mean
    """Tokens of an image at any resolution of the layout: the patches of its maps, ``(coefficient - mean) / std``."""
    num_scales = num_scales_of(images, layout)
    dtype = images.dtype if mean is None else torch.promote_types(images.dtype, mean[0].dtype)
    tokens: list[Tensor] = wavelet_tokens(images, layout.levels, layout.grid, mean, std, scales=num_scales, dtype=dtype)
    return tokens


def tokens_to_image(
    tokens: Sequence[Tensor],  # k of [B, grid^2, token_dim(s)], coarse first
    layout: SpectralLayout,
    mean: Sequence[Tensor] | None = None,
    std: Sequence[Tensor] | None = None,
) -> Tensor:  # [B, C, r, r], r = layout.resolution(k)
    """The image that a prefix of the scales describes; the inverse of `image_to_tokens`."""
    return wavelet_untokens(tokens, layout.grid, mean, std, levels=layout.levels, channels=layout.channels)
