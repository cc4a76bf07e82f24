# SPDX-License-Identifier: Apache-2.0
"""Poisson sampling: exact threshold, law of membership, empty batches. Thresholds are at 1e-7 or below."""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats

from wavedp.privacy import PoissonSampler, PrivacySpec, physical_batches
from wavedp.privacy.sampling import membership_threshold


@pytest.mark.parametrize("rate", [0.1, 1e-7, 2e-8, 0.5, 1 / 3, 1.0, 5e-324])
def test_threshold_is_exact(rate: float) -> None:
    threshold = membership_threshold(rate)
    assert threshold <= Fraction(rate) * 2**64 < threshold + 1


def test_membership_by_injected_words(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = PoissonSampler(5, 0.25, 1)
    limit = 1 << 62
    words = np.array([limit - 1, limit, 0, 2**64 - 1, limit + 1], dtype=np.uint64)
    monkeypatch.setattr(sampler._entropy, "words", lambda count: words[:count])
    assert next(iter(sampler)).tolist() == [0, 2]


def test_membership_law() -> None:
    records, steps, rate = 500, 2000, 0.03
    joined = np.zeros((steps, records), dtype=bool)
    for step, indices in enumerate(PoissonSampler(records, rate, steps)):
        joined[step, indices.numpy()] = True
    variance = rate * (1 - rate)
    per_record = (joined.sum(0) - steps * rate) ** 2 / (steps * variance)
    assert 1e-7 < stats.chi2.sf(per_record.sum(), records) < 1 - 1e-7
    # Independent records: the batch size is binomial, whose variance a fixed-size sampler would not have.
    per_step = (joined.sum(1) - records * rate) ** 2 / (records * variance)
    assert 1e-7 < stats.chi2.sf(per_step.sum(), steps) < 1 - 1e-7
    # Independent steps: joint membership in consecutive batches happens at rate^2.
    together = int((joined[1:] & joined[:-1]).sum())
    expected = (steps - 1) * records * rate**2
    assert abs(together - expected) < 5.5 * math.sqrt(expected)


def test_every_step_is_yielded_and_empty_batches_are_batches() -> None:
    batches = list(PoissonSampler(10, 1e-9, 50))
    assert len(batches) == 50
    assert sum(batch.numel() for batch in batches) == 0
    assert all(batch.dtype == torch.int64 for batch in batches)
    assert [batch.tolist() for batch in PoissonSampler(0, 0.5, 2)] == [[], []]


def test_rate_one_takes_everyone() -> None:
    assert next(iter(PoissonSampler(7, 1.0, 1))).tolist() == list(range(7))


def test_large_sets_are_drawn_in_chunks() -> None:
    records = (1 << 20) + 1000
    indices = next(iter(PoissonSampler(records, 0.5, 1)))
    assert torch.equal(indices, torch.unique(indices))
    late = int((indices >= 1 << 20).sum())
    assert abs(indices.numel() - records / 2) < 5.5 * math.sqrt(records / 4)
    assert abs(late - 500) < 5.5 * math.sqrt(250)


def test_steps_are_drawn_once() -> None:
    sampler = PoissonSampler(10, 0.5, 3)
    next(iter(sampler))
    assert sampler.drawn == 1
    assert len(list(sampler)) == 2
    assert list(sampler) == []
    assert len(sampler) == 3


def test_the_last_batch_is_kept_apart_from_what_was_given_out() -> None:
    sampler = PoissonSampler(50, 0.5, 3)
    assert sampler.last_batch is None
    batch = next(iter(sampler))
    drawn = batch.tolist()
    batch.zero_()
    assert sampler.last_batch is not None
    assert sampler.last_batch.tolist() == drawn
    sampler.last_batch.zero_()
    assert sampler.last_batch.tolist() == drawn


@pytest.mark.parametrize("name", ["sample_rate", "num_records", "steps", "drawn", "last_batch"])
def test_a_sampler_cannot_be_changed(name: str) -> None:
    with pytest.raises(AttributeError):
        setattr(PoissonSampler(50, 0.5, 3), name, 1)


def test_batches_differ_between_samplers_unless_seeded() -> None:
    def draw(seed: int | None) -> list[int]:
        return next(iter(PoissonSampler(1000, 0.5, 1, insecure_seed=seed))).tolist()

    assert draw(None) != draw(None)
    assert draw(3) == draw(3) != draw(4)
    assert PoissonSampler(2, 0.5, 1, insecure_seed=3).insecure
    assert not PoissonSampler(2, 0.5, 1).insecure


def test_for_spec(spec: Callable[..., PrivacySpec]) -> None:
    sampler = PoissonSampler.for_spec(spec(), 60)
    assert (sampler.sample_rate, sampler.steps, sampler.num_records) == (0.1, 20, 60)
    assert PoissonSampler.for_spec(spec(), 60, steps=5).steps == 5
    with pytest.raises(ValueError, match="dataset_size_bound"):
        PoissonSampler.for_spec(spec(), 101)
    with pytest.raises(ValueError, match="steps"):
        PoissonSampler.for_spec(spec(), 60, steps=21)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((10, 0.0, 1), ValueError),
        ((10, 1.5, 1), ValueError),
        ((-1, 0.5, 1), ValueError),
        ((10, 0.5, -1), ValueError),
        ((10.0, 0.5, 1), TypeError),
        ((10, "0.5", 1), TypeError),
    ],
)
def test_bad_arguments(arguments: tuple[object, ...], error: type[Exception]) -> None:
    with pytest.raises(error):
        PoissonSampler(*arguments)  # type: ignore[arg-type]


def test_physical_batches() -> None:
    parts = [part.tolist() for part in physical_batches(torch.arange(7), 3)]
    assert parts == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(physical_batches(torch.arange(0), 3)) == []
    with pytest.raises(ValueError, match="size"):
        next(physical_batches(torch.arange(3), 0))


def test_truncated_batches_are_never_larger() -> None:
    sampler = PoissonSampler(200, 0.1, 400, truncated_batch_size=20)
    sizes = [len(batch) for batch in sampler]
    assert max(sizes) == 20
    assert min(sizes) < 20  # 400 times at least 20 of 200 at 0.1 have a chance below 1e-90
    assert sampler.truncated_batch_size == 20
    assert len(next(iter(PoissonSampler(50, 1.0, 1, truncated_batch_size=7)))) == 7
    assert len(next(iter(PoissonSampler(50, 1.0, 1, truncated_batch_size=50)))) == 50


@pytest.mark.parametrize("rate", [0.9, 1.0])
def test_who_stays_in_a_truncated_batch_is_uniform(rate: float) -> None:
    """At most 1e-16 of the batches have less than 12 records, so each holds a uniform choice of 12 of 40."""
    from scipy.stats import chi2

    steps, records, most = 6000, 40, 12
    alone, together = torch.zeros(records), torch.zeros(records, records)
    for batch in PoissonSampler(records, rate, steps, truncated_batch_size=most):
        assert torch.equal(batch, batch.unique())
        assert len(batch) == most
        alone[batch] += 1
        together[batch[:, None], batch] += 1
    share = most / records
    statistic = ((alone - steps * share) ** 2).sum() / (steps * share * (1 - share)) * (records - 1) / records
    assert chi2.sf(float(statistic), records - 1) > 1e-8
    pairs = together[torch.triu(torch.ones(records, records), diagonal=1).bool()]
    share *= (most - 1) / (records - 1)
    # The largest of 780 deviations of counts that are binomial each: a false alarm below 780 * 2e-10.
    assert (pairs - steps * share).abs().max() <= 6.4 * (steps * share * (1 - share)) ** 0.5


def test_truncated_batches_may_be_empty_and_seeded() -> None:
    assert [len(batch) for batch in PoissonSampler(100, 1e-9, 5, truncated_batch_size=3)] == [0] * 5
    assert [len(batch) for batch in PoissonSampler(0, 0.5, 2, truncated_batch_size=3)] == [0] * 2

    def draw(seed: int | None) -> list[int]:
        return next(iter(PoissonSampler(1000, 0.5, 1, truncated_batch_size=9, insecure_seed=seed))).tolist()

    assert draw(None) != draw(None)
    assert draw(3) == draw(3) != draw(4)
    assert PoissonSampler(2, 0.5, 1, truncated_batch_size=1, insecure_seed=3).insecure


def test_truncation_comes_from_the_specification(spec: Callable[..., PrivacySpec]) -> None:
    assert PoissonSampler.for_spec(spec(truncated_batch_size=4), 60).truncated_batch_size == 4
    assert PoissonSampler.for_spec(spec(), 60).truncated_batch_size is None
    with pytest.raises(ValueError, match="truncated_batch_size"):
        PoissonSampler(10, 0.5, 1, truncated_batch_size=0)
