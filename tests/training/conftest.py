# SPDX-License-Identifier: Apache-2.0
"""Images and a tokenizer of 16 pixels."""

import sys
from pathlib import Path

import pytest
import torch

from wavedp.data import TensorImageDataset
from wavedp.models import SpectralTokenizer, SpectralTokenizerConfig

sys.path.insert(0, str(Path(__file__).parent))  # private_runs


@pytest.fixture
def dataset() -> TensorImageDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (20, 1, 16, 16), generator=generator, dtype=torch.uint8)
    return TensorImageDataset(images, torch.arange(20) % 2, classes=("a", "b"), name="tiny")


@pytest.fixture
def tokenizer() -> SpectralTokenizer:
    torch.manual_seed(0)
    return SpectralTokenizer(SpectralTokenizerConfig(image_size=16, levels=2, grid=2, width=16, heads=2)).eval()
