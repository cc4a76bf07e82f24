# SPDX-License-Identifier: Apache-2.0
"""Detectors have more than one way to see a bug: where a sharper check sees it first, the others see it too."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wavedp.selftest import (
    BUGS,
    detect_canary,
    detect_ledger,
    detect_noise,
    detect_replay,
    detect_sampling,
    detect_uniqueness,
)
from wavedp.selftest.alarms import Alarm, require_close, require_likely, require_refusal


@pytest.mark.parametrize(
    ("bug", "said"),
    [
        ("shuffled_epochs", "sizes of batches vary by"),
        ("fixed_batch_size", "sizes of batches vary by"),
        ("records_join_in_pairs", "records depend on the record before|vary by"),
        ("same_batch_every_step", "vary by|batches depend on|more or less often"),
        ("same_batches_after_resume", "two samplers draw alike"),
        ("rate_two_percent_high", ""),
    ],
)
def test_statistics_of_batches_see_what_their_words_do(bug: str, said: str) -> None:
    with BUGS[bug].planted() as planted:
        if bug == "rate_two_percent_high":  # 2 % of 0.1 is too little for 200,000 draws, so the words have to show it
            detect_sampling.check_statistics(0.1)
            with pytest.raises(Alarm, match="are below the rate"):
                detect_sampling.check_words(0.3)
        else:
            with pytest.raises(Alarm, match=said):
                detect_sampling.check_statistics(0.1)
    assert planted.runs > 0


@pytest.mark.parametrize("bug", ["no_noise", "noise_scaled_for_mean", "no_clip", "clipped_copy_unused"])
def test_canaries_and_replay_or_law_agree(bug: str) -> None:
    other = detect_noise if bug.startswith("noise") or bug == "no_noise" else detect_replay
    with BUGS[bug].planted():
        for detector in (detect_canary, other):
            with pytest.raises(Alarm):
                detector.detect(3)


def test_one_key_for_all_steps_shows_in_correlations() -> None:
    with BUGS["one_key_for_all_steps"].planted(), pytest.raises(Alarm, match="is in that of"):
        detect_uniqueness.detect(5)


def law(noise: Tensor) -> None:
    detect_noise.check_law("it", [noise], 1.0)


def test_law_sees_what_is_wrong_by_little() -> None:
    torch.manual_seed(0)
    normal = torch.randn(1 << 19, dtype=torch.float64)
    law(normal)
    for wrong, said in (
        (normal * 0.99, "of its variance"),
        (normal + 0.01, "has the mean"),
        (normal.clamp(-4, 4), "is beyond 4 deviations 0 times"),
        (torch.where(torch.rand(1 << 19) < 0.5, normal * math.sqrt(0.6), normal * math.sqrt(1.4)), "is off a Gaussian"),
    ):
        with pytest.raises(Alarm, match=said):
            law(wrong)


def test_the_grid_is_that_of_the_deviation() -> None:
    step = 2.0**-12
    whole = torch.arange(1 << 14, dtype=torch.float64)
    detect_noise.check_grid("it", [[whole * step]], 1.0)
    with pytest.raises(Alarm, match="off the public grid"):
        detect_noise.check_grid("it", [[whole * step / 2]], 1.0)
    with pytest.raises(Alarm, match="last bits"):
        detect_noise.check_grid("it", [[whole * step * 2]], 1.0)


def test_charges_on_disk_are_read_without_the_package(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"kind": "create"}\n{"kind": "reserve", "steps": 3}\n{"kind": "reserve", "steps": 2}\n')
    assert detect_ledger.on_disk(path) == 5


def test_alarms() -> None:
    require_likely(0.5, "it")
    require_close(1.0, 1.0, 0.0, "it")
    require_refusal("it", lambda: int("x"))
    for wrong in (
        lambda: require_likely(1e-9, "it"),
        lambda: require_likely(math.nan, "it"),
        lambda: require_close(math.nan, 1.0, 0.5, "it"),
        lambda: require_close(1.2, 1.0, 0.1, "it"),
        lambda: require_refusal("it", lambda: None),
    ):
        with pytest.raises(Alarm, match="it"):
            wrong()
    with pytest.raises(KeyError):
        require_refusal("it", lambda: {}["x"])
