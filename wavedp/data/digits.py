# SPDX-License-Identifier: Apache-2.0
"""Scikit-learn's handwritten digits: 1,797 real scans, 8 x 8 pixels, values 0..16.

The set is the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, UCI
Machine Learning Repository, 1998): 32 x 32 bitmaps of 43 people's digits, scaled to fill the box,
reduced by counting the inked pixels of every 4 x 4 block.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wavedp.data.catalog import Split
from wavedp.data.dataset import TensorImageDataset
from wavedp.data.resize import Fit, check_geometry, fit_pixels
from wavedp.errors import InvalidValueError
from wavedp.extras import import_extra

SCAN_SIZE = 8
NUM_TEST = 360
SPLIT_SEED = 2026


def load_digits_dataset(
    image_size: int = 32,
    channels: int = 1,
    *,
    split: Split = "train",
    fit: Fit = "crop",
    background: int = 0,
) -> TensorImageDataset:
    """The digits as white ink on black, each class split in the same proportion.

    Args:
        image_size: 8 gives the scans as they are. Larger multiples of 8 are interpolated such that the
            mean of each block of pixels is the scan's pixel, as it was in the original bitmaps; so the
            coarse image at 8 x 8 is the scan again. Other sizes follow :mod:`wavedp.data.resize`.
        channels: 1, or 3 for the same value three times.
        split: ``"train"`` (1,437 images), ``"test"`` (360) or ``"all"``. The two never share an image,
            and which image is where depends on nothing but this version of the code.
        fit, background: without effect on square images; accepted as every source accepts them.

    Returns:
        Images with the values 0..16 mapped to ``round(255 * value / 16)``; classes "0".."9".

    Raises:
        ValueError: for an unknown split or geometry.
        ImportError: if scikit-learn is missing (``pip install 'wavedp[demo]'``).
    """
    check_geometry(image_size, channels, fit, background)
    scans, labels = native_digits()
    if split == "all":
        chosen = torch.arange(len(labels))
    elif split in ("train", "test"):
        chosen = _split_indices(labels)[split]
    else:
        raise InvalidValueError(f'split must be "train", "test" or "all", got {split!r}')
    grey = (scans[chosen].to(torch.float32) * 255 / 16).round().to(torch.uint8)
    if image_size > SCAN_SIZE and image_size % SCAN_SIZE == 0:
        images = _enlarge(grey, image_size // SCAN_SIZE).expand(-1, channels, -1, -1).contiguous()
    else:
        images = fit_pixels(grey, image_size, channels, fit=fit, background=background)
    return TensorImageDataset(images, labels[chosen], [str(d) for d in range(10)], name=f"digits/{split}")


def native_digits() -> tuple[Tensor, Tensor]:
    """The scans as published: uint8 ``[1797, 1, 8, 8]`` with values 0..16, and int64 labels ``[1797]``.

    Raises:
        ImportError: if scikit-learn is missing (``pip install 'wavedp[demo]'``).
    """
    bunch = import_extra("sklearn.datasets", "demo").load_digits()
    scans = torch.from_numpy(np.asarray(bunch.images, dtype=np.uint8))[:, None]
    return scans, torch.from_numpy(np.asarray(bunch.target, dtype=np.int64))


def _enlarge(grey: Tensor, factor: int, rounds: int = 20) -> Tensor:
    """Bicubic interpolation, then back-projection (M. Irani and S. Peleg, 1991) of what the block means lack.

    y <- clamp(y + bicubic(x - mean_over_blocks(y)))
    """
    scans = grey.to(torch.float32)
    enlarged = torch.zeros(len(grey), 1, *(side * factor for side in grey.shape[-2:]))
    for _ in range(1 + rounds):
        lacking = scans - F.avg_pool2d(enlarged, factor)
        enlarged = (enlarged + F.interpolate(lacking, scale_factor=factor, mode="bicubic")).clamp(0, 255)
    return enlarged.round().to(torch.uint8)


def _split_indices(labels: Tensor) -> dict[str, Tensor]:
    """Largest-remainder shares of the 360 test images, drawn per class from a fixed public seed."""
    counts = torch.bincount(labels, minlength=10)
    exact = counts.to(torch.float64) * NUM_TEST / len(labels)
    shares = exact.floor().to(torch.int64)
    remainders = (exact - shares).argsort(descending=True, stable=True)
    shares[remainders[: NUM_TEST - int(shares.sum())]] += 1
    generator = np.random.Generator(np.random.PCG64(SPLIT_SEED))
    test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        members = torch.nonzero(labels == digit).flatten().numpy()
        test[torch.from_numpy(generator.permutation(members)[: int(shares[digit])])] = True
    return {"train": torch.nonzero(~test).flatten(), "test": torch.nonzero(test).flatten()}
