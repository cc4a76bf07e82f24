# SPDX-License-Identifier: Apache-2.0
"""Batches are the Poisson samples that are accounted.

Which records join is compared, word by word, with the definition, and their statistics with the binomial law. Each test
of chance fails with a chance of 1e-8 where sampling is right.
"""

import math
import random
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from wavedp.privacy import PoissonSampler
from wavedp.privacy import noise_law_statistics as statistics
from wavedp.selftest.alarms import require, require_likely

_RECORDS, _STEPS = 2_000, 100


class GivenWords:
    """A source of randomness that returns given words."""

    insecure = False

    def __init__(self, words: list[int]) -> None:
        self.asked = 0
        self._words = np.array(words, dtype="<u8")

    def words(self, count: int, dtype: str = "<u8") -> Any:
        self.asked += 1
        return self._words[:count].copy()


def detect(seed: int) -> None:
    rng = random.Random(f"sampling {seed}")
    for rate in (1e-9, 1e-7 * rng.uniform(1.0, 9.0), rng.uniform(0.01, 0.5), 0.3):
        check_words(rate)
    check_statistics(rng.uniform(0.08, 0.12))
    check_small()
    check_truncation()


def check_words(rate: float) -> None:
    """A record is in when its word is below floor(q 2^64), and in no other case."""
    threshold = int(Fraction(rate) * 2**64)
    words = [threshold - 1, threshold, 0, 2**64 - 1, threshold + 1, threshold // 2, 2**40 - 1, 2**41]
    source = GivenWords(words)
    sampler = PoissonSampler(len(words), rate, 1)
    sampler._entropy = source  # type: ignore[assignment]
    batch = next(iter(sampler), torch.zeros(0)).tolist()
    expected = [i for i, word in enumerate(words) if word < threshold]
    require(batch == expected, f"at rate {rate:.3g} the words of {expected} are below the rate, and {batch} join")
    require(source.asked == 1, "whether records join is not decided by the words of the source")


def _memberships(sampler: PoissonSampler) -> np.ndarray:
    """``[steps, records]``; checks what holds for every batch."""
    rows = np.zeros((sampler.steps, sampler.num_records), dtype=bool)
    drawn = 0
    planned = sampler.steps
    for number, batch in enumerate(sampler):
        indices = batch.numpy()
        rows[number, indices] = True
        require(len(np.unique(indices)) == len(indices), "a record comes twice in a batch")
        drawn += 1
    require(drawn == planned, f"{drawn} batches were drawn in a run of {planned} steps")
    return rows


def check_statistics(rate: float) -> None:
    first, second = (_memberships(PoissonSampler(_RECORDS, rate, _STEPS)) for _ in range(2))
    variance = rate * (1.0 - rate)
    x, y = ((rows - rate) / math.sqrt(variance) for rows in (first, second))
    total = first.size
    require_likely(statistics.both_sides(x.sum() / math.sqrt(total)), "records join more or less often than the rate")
    excess = (1.0 - 6.0 * variance) / variance
    for axis, count, what in ((1, _STEPS, "sizes of batches"), (0, _RECORDS, "how often records join")):
        terms = total / count
        squares = float((x.sum(axis) ** 2 / terms).sum())
        # Of a binomial in place of a normal, the variance is larger by its excess kurtosis.
        scaled = count + (squares - count) / math.sqrt(1.0 + 0.5 * excess / terms)
        p_value = 2 * min(statistics.lower_gamma(count / 2, scaled / 2), statistics.upper_gamma(count / 2, scaled / 2))
        require_likely(p_value, f"{what} vary by {squares / count:.3g} of the binomial variance")
    pairs = {
        "batches depend on the batch before": (x[:-1], x[1:]),
        "records depend on the record before": (x[:, :-1], x[:, 1:]),
        "two samplers draw alike": (x, y),
    }
    for what, (one, other) in pairs.items():
        correlation = float((one * other).sum()) / math.sqrt(one.size)
        require_likely(statistics.both_sides(correlation), what)


def check_small() -> None:
    """Of few records, batches are empty as often as they should be; a prepared batch is the one that comes."""
    rate, records, steps = 0.1, 4, 400
    sampler = PoissonSampler(records, rate, steps)
    prepared = [sampler.ahead(number).tolist() for number in (0, 2, 5)]
    rows = _memberships(sampler)
    drawn = [np.flatnonzero(rows[number]).tolist() for number in (0, 2, 5)]
    chance = (1.0 - rate) ** records
    empty = int((rows.sum(1) == 0).sum())
    z = (empty - steps * chance) / math.sqrt(steps * chance * (1.0 - chance))
    require_likely(statistics.both_sides(z), f"{empty} of {steps} batches are empty, not {steps * chance:.0f}")
    large = PoissonSampler(256, 0.5, 2)
    ahead = large.ahead(1).tolist()
    require(
        prepared == drawn and ahead == [batch.tolist() for batch in large][1],
        "a batch that was prepared is not the one that is drawn",
    )


def check_truncation() -> None:
    """Cut batches have the stated size and hold a random choice."""
    records, rate, most, steps = 40, 0.9, 10, 80
    sampler = PoissonSampler(records, rate, steps, truncated_batch_size=most)
    rows = _memberships(sampler)
    require(int(rows.sum(1).max()) <= most, f"a batch of {int(rows.sum(1).max())} records is larger than {most}")
    share = most / records
    squares = float(((rows.sum(0) - steps * share) ** 2).sum()) / (steps * share * (1.0 - share))
    squares *= (records - 1) / records
    freedom = (records - 1) / 2
    p_value = 2 * min(statistics.lower_gamma(freedom, squares / 2), statistics.upper_gamma(freedom, squares / 2))
    require_likely(p_value, "which records stay in a batch that is cut is no random choice")
