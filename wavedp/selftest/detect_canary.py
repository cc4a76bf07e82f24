# SPDX-License-Identifier: Apache-2.0
"""Gradient canaries: records whose gradients point in directions of their own (Nasr et al. 2023, arXiv 2302.07956).

Half of them are in the batch, at random. What a step releases along their directions has two normal laws, which lie
1 / z deviations apart if clipping and noise are right; a z-test on their distance fails with a chance of 1e-8 if so.
"""

import math
import random

import torch
from torch import nn

from wavedp.privacy import PrivateOptimizer
from wavedp.selftest.alarms import LEVEL, Alarm, require
from wavedp.selftest.cases import EXPECTED_BATCH_SIZE, Recorder, specification

_CANARIES = 4096
_QUANTILE = 5.73
"""Of the normal law: beyond it lies 5e-9, half of the level."""


def detect(seed: int) -> None:
    rng = random.Random(f"canary {seed}")
    multiplier, bound = rng.uniform(0.5, 2.0), 10.0 ** rng.uniform(-2, 2)
    table = nn.Embedding(_CANARIES, 1)
    recorder = Recorder(table.parameters())
    spec = specification(noise_multiplier=multiplier, max_grad_norm=bound)
    inside = torch.tensor([rng.random() < 0.5 for _ in range(_CANARIES)])
    records = torch.nonzero(inside).flatten()
    with PrivateOptimizer(table, recorder, spec) as private:
        # Gradients far above C, which clipping has to bring down to it.
        private.backward(1e3 * bound * table(records[:, None]).sum((1, 2)), records=records)
        private.step()
    if len(recorder.seen) != 1:
        raise Alarm(f"one batch made {len(recorder.seen)} steps")
    scores = recorder.seen[0][0].double().flatten() * EXPECTED_BATCH_SIZE
    require(bool(torch.isfinite(scores).all()), "what is released is not finite")
    has, lacks = scores[inside], scores[~inside]
    deviation = float(lacks.std())
    if deviation == 0.0:
        raise Alarm("the release has no noise where there are no canaries")
    # Two means and a deviation are estimated; the distance's own error is little more than sqrt(1/n + 1/m + mu^2/2m).
    distance = float(has.mean() - lacks.mean()) / deviation
    claimed = 1.0 / multiplier
    error = math.sqrt(1.0 / len(has) + 1.0 / len(lacks) + claimed**2 / (2.0 * len(lacks)))
    require(
        distance <= claimed + _QUANTILE * error,
        f"canaries show a mechanism of {distance:.4g} deviations, stated are {claimed:.4g} (level {LEVEL:.0e})",
    )
