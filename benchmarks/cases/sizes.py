# SPDX-License-Identifier: Apache-2.0
"""The images of the wavelet cases."""

from __future__ import annotations

import torch
from torch import Tensor

from wavedp.benchmarks.registry import Size

# 50 MB and 201 MB in float32, past the last-level cache of most processors; on a GPU 400 MB, and feature maps.
SIZES = {
    "quick": [Size((2, 3, 32, 64))],
    "cpu": [
        Size((64, 3, 256, 256)),
        Size((256, 3, 256, 256)),
        Size((64, 3, 256, 256), torch.bfloat16, ours_only=True),
        Size((64, 3, 256, 256), torch.float16, ours_only=True),
    ],
    "cuda": [
        Size((512, 3, 256, 256)),
        Size((256, 3, 512, 512), torch.bfloat16),
        Size((8, 64, 128, 128)),
        Size((8, 64, 128, 128), torch.bfloat16, ours_only=True),
    ],
}
FLOAT32 = {name: [size for size in sizes if size.dtype == torch.float32] for name, sizes in SIZES.items()}
UINT8 = {name: [Size(size.shape, torch.uint8) for size in sizes] for name, sizes in FLOAT32.items()}
SMALL = {name: [Size((1, 3, 32, 32))] for name in SIZES}


def images(size: Size, device: torch.device) -> tuple[Tensor, ...]:
    """Noise of unit variance, or random bytes: no transform is faster on other values."""
    generator = torch.Generator(device).manual_seed(0)
    if size.dtype == torch.uint8:
        return (torch.randint(256, size.shape, generator=generator, device=device, dtype=torch.uint8),)
    return (torch.randn(size.shape, generator=generator, device=device).to(size.dtype),)
