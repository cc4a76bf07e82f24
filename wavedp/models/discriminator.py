# SPDX-License-Identifier: Apache-2.0
"""A patch discriminator: for every overlapping patch, is it of a photograph or of a reconstruction?"""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from wavedp.models.sizes import check_sizes


class PatchDiscriminator(nn.Module):
    """Strided convolutions (PatchGAN, arXiv 1611.07004) with spectral normalisation (arXiv 1802.05957) of each, which
    bounds the slope of the logits; no batch norm, so an image's logits depend on that image alone.

    The number of halvings is three, or fewer where the image is under 32 pixels.
    """

    def __init__(self, channels: int, image_size: int, width: int = 64) -> None:
        super().__init__()
        self.channels, self.image_size, self.width = channels, image_size, width
        check_sizes(self, "channels", "image_size", "width")
        halvings = max(1, min(3, image_size.bit_length() - 3))
        sizes = [channels, *(width * 2**i for i in range(halvings))]
        strided = [nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in pairwise(sizes)]
        last = [nn.Conv2d(sizes[-1], sizes[-1], 3, padding=1), nn.Conv2d(sizes[-1], 1, 3, padding=1)]
        self.layers = nn.ModuleList(spectral_norm(layer) for layer in (*strided, *last))

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1] -> logits [B, 1, h, w], positive for photographs."""
        x = images * 2 - 1
        for layer in self.layers[:-1]:
            x = F.leaky_relu(layer(x), 0.2)
        logits: Tensor = self.layers[-1](x)
        return logits
