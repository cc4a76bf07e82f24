# SPDX-License-Identifier: Apache-2.0
"""Private training steps: two small GPTs, the pipeline's fine-tuning, and on a GPU a GPT of twelve layers."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from wavedp.benchmarks.cases.dp_models import FineTuned, Gpt
from wavedp.benchmarks.steps import StepCase, Workload
from wavedp.benchmarks.trainers import trainers

BFLOAT16 = torch.bfloat16


def text(records: int, length: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Random ids and the ids that follow them."""
    ids = torch.randint(vocabulary, (records, length + 1))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def images(records: int, tokens: int, codes: int) -> tuple[Tensor, Tensor]:
    """Random tokens and labels."""
    return torch.randint(codes, (records, tokens)), torch.randint(10, (records,))


def gpt(
    records: int,
    length: int,
    vocabulary: int,
    width: int,
    depth: int,
    heads: int,
    dtype: torch.dtype = torch.float32,
) -> Workload:
    autocast = None if dtype == torch.float32 else dtype
    model = partial(Gpt, vocabulary=vocabulary, length=length, width=width, depth=depth, heads=heads, autocast=autocast)
    return Workload((records, length), model, partial(text, records, length, vocabulary), dtype)


def fine_tuning(records: int, codes: int, grid: int, scales: int, width: int, depth: int, heads: int) -> Workload:
    model = partial(FineTuned, codes=codes, grid=grid, scales=scales, width=width, depth=depth, heads=heads)
    length = grid * grid * scales
    return Workload((records, length), model, partial(images, records, length, codes))


QUICK_GPT = [gpt(4, 8, 32, 16, 2, 2)]
QUICK_PIPELINE = [fine_tuning(4, 8, 2, 2, 16, 1, 2)]
SMALL, WIDE = (16, 128, 1024, 256, 4, 8), (16, 64, 8192, 512, 2, 8)
DEMO = fine_tuning(360, 128, 4, 1, 64, 3, 4)  # `wavedp demo`: a batch, all of it at once
FASHION = fine_tuning(256, 256, 4, 2, 96, 3, 4)  # as in docs/quality.md, with 3 blocks; 256 is its physical batch

CASES = [
    StepCase("gpt-256", trainers, {"quick": QUICK_GPT, "cpu": [gpt(*SMALL)], "cuda": [gpt(*SMALL)]}),
    StepCase("gpt-512", trainers, {"quick": [], "cpu": [gpt(*WIDE)], "cuda": [gpt(*WIDE)]}),
    StepCase("pipeline-demo", trainers, {"quick": QUICK_PIPELINE, "cpu": [DEMO], "cuda": [DEMO]}),
    StepCase("pipeline-fashion", trainers, {"quick": [], "cpu": [FASHION], "cuda": [FASHION]}),
    StepCase(
        "gpt-768",
        trainers,
        {"quick": [], "cpu": [], "cuda": [gpt(16, 256, 50257, 768, 12, 12, BFLOAT16)]},
    ),
]
