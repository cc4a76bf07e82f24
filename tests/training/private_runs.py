# SPDX-License-Identifier: Apache-2.0
"""The settings and the model of small private stages."""

from dataclasses import replace
from pathlib import Path

import torch

from wavedp.models import AutoregressiveConfig, AutoregressiveTransformer
from wavedp.privacy import PrivacySpec
from wavedp.training.checkpoints import Checkpoint, load_newest
from wavedp.training.private import PrivateTrainingConfig

SPEC = PrivacySpec(
    sample_rate=0.3,
    steps=8,
    noise_multiplier=1.0,
    max_grad_norm=0.5,
    expected_batch_size=6.0,
    delta=1e-3,
    dataset_size_bound=100,
)
CONFIG = PrivateTrainingConfig(learning_rate=1e-2, physical_batch_size=4, save_every=2)
LABELLED = replace(SPEC, label_noise_multiplier=4.0)


def newest(folder: Path) -> Checkpoint:
    found = load_newest(folder / "checkpoint")
    assert found is not None
    return found


def make_model() -> AutoregressiveTransformer:
    torch.manual_seed(1)
    return AutoregressiveTransformer(AutoregressiveConfig(2, 4, 1, 256, 256, width=16, depth=1, heads=2))
