# SPDX-License-Identifier: Apache-2.0
"""With a sampler, every drawn batch is stepped in order and whole, or the run stops."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wavedp.privacy import PoissonSampler, PrivacySpec, PrivacyStatement, PrivateOptimizer, physical_batches

MakeSpec = Callable[..., PrivacySpec]
RECORDS = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))


def make(
    spec: PrivacySpec, sampler: PoissonSampler | None = None, *, consent: bool = False
) -> tuple[nn.Linear, PrivateOptimizer, Iterator[Tensor]]:
    model = nn.Linear(3, 2)
    sampler = sampler or PoissonSampler.for_spec(spec, 60)
    private = PrivateOptimizer(
        model, torch.optim.SGD(model.parameters()), spec, sampler=sampler, without_privacy=consent
    )
    return model, private, iter(sampler)


def backward(model: nn.Module, private: PrivateOptimizer, records: Tensor) -> None:
    private.backward(model(RECORDS[records]).sum(1), records=records)


def test_whole_batches_in_any_chunks_are_stepped(spec: MakeSpec) -> None:
    model, private, batches = make(spec(sample_rate=0.01, steps=40))
    sizes = set()
    for batch in batches:
        sizes.add(batch.numel())
        for chunk in physical_batches(batch.flip(0), 2):
            backward(model, private, chunk)
        private.step()
    assert 0 in sizes  # none in 40 has a chance of 2e-14
    assert PrivacyStatement.from_run(private).steps_charged == 40


def test_records_are_required(spec: MakeSpec) -> None:
    model, private, batches = make(spec(sample_rate=1.0))
    next(batches)
    with pytest.raises(TypeError, match="pass records="):
        private.backward(model(RECORDS).sum(1))
    assert private.steps_charged == 0


def test_a_chunk_lost_to_an_exception_is_missed(spec: MakeSpec) -> None:
    model, private, batches = make(spec(sample_rate=1.0))
    first, second = physical_batches(next(batches), 40)
    backward(model, private, first)
    with pytest.raises(RuntimeError, match="20 of the 60 records"):
        private.step()
    backward(model, private, second)
    private.step()
    assert private.steps_charged == 1


def test_records_that_were_not_drawn_are_refused(spec: MakeSpec) -> None:
    """All records at every step, whatever the sampler says, is another mechanism."""
    model, private, batches = make(spec())
    next(batches)
    with pytest.raises(ValueError, match="not in the batch"):
        backward(model, private, torch.arange(60))  # 60 of 60 are drawn with probability 1e-60
    assert private.steps_charged == 0


def test_records_of_several_rows_are_named_once(spec: MakeSpec) -> None:
    """``records`` has an entry for each record, ``sample_id`` one for each row; every record is clipped once."""
    model, private, batches = make(spec(sample_rate=1.0, noise_multiplier=0.0, max_grad_norm=0.5), consent=True)
    weight = model.weight.detach().clone()
    next(batches)
    shown = torch.stack([RECORDS, 3 * RECORDS, -RECORDS], dim=1)  # [60, 3, 3]: three rows a record
    for chunk in torch.arange(60).flip(0).split(25):
        rows = chunk.repeat_interleave(3)

        def losses(rows: Tensor, chunk: Tensor = chunk) -> Tensor:
            return model(shown[chunk].flatten(0, 1))[: len(rows)].sum(1)

        with pytest.raises(ValueError, match=f"records has shape .{3 * len(chunk)},., losses are of {len(chunk)} rec"):
            private.backward(losses(rows), records=rows, sample_id=rows)
        with pytest.raises(ValueError, match=f"losses are of {3 * len(chunk)} records"):
            private.backward(losses(rows), records=chunk)
        private.backward(losses(rows), records=chunk, sample_id=rows)
        with pytest.raises(ValueError, match="a record comes twice"):
            private.backward(losses(rows), records=chunk, sample_id=rows)
    private.step()
    # The mean of x, 3x and -x is x; the gradient of the record is x for each row of the weight and 1 for each bias.
    factors = (0.5 / (2 * RECORDS.square().sum(1) + 2).sqrt()).clamp(max=1.0)
    expected = (factors[:, None] * RECORDS).sum(0).expand(2, 3) / private.spec.expected_batch_size
    assert torch.allclose((weight - model.weight.detach()) / 1e-3, expected, rtol=1e-3, atol=1e-4)


def test_a_step_needs_a_drawn_batch(spec: MakeSpec) -> None:
    _, private, batches = make(spec(sample_rate=1e-9))
    with pytest.raises(RuntimeError, match="drew no batch"):
        private.step()
    next(batches)
    private.step()
    with pytest.raises(RuntimeError, match="drew no batch"):
        private.step()
    assert private.steps_charged == 1


def test_a_skipped_empty_batch_stops_the_run(spec: MakeSpec) -> None:
    """`if len(batch) == 0: continue`."""
    _, private, batches = make(spec(sample_rate=1e-9))
    next(batches)
    next(batches)
    with pytest.raises(RuntimeError, match="for empty ones too"):
        private.step()
    assert private.steps_charged == 0


def test_a_batch_abandoned_half_way_is_not_merged_into_the_next(spec: MakeSpec) -> None:
    """`except OutOfMemoryError: continue`."""
    model, private, batches = make(spec(sample_rate=1.0))
    backward(model, private, next(batches)[:20])
    following = next(batches)
    for call in (private.step, lambda: backward(model, private, following)):
        with pytest.raises(RuntimeError, match="2 batches were drawn"):
            call()
    private.discard()
    with pytest.raises(RuntimeError, match="drew no batch"):
        backward(model, private, following)
    backward(model, private, next(batches))
    private.step()
    with pytest.raises(RuntimeError, match="after a batch was discarded"):
        PrivacyStatement.from_run(private)


def test_batches_cannot_be_drawn_ahead(spec: MakeSpec) -> None:
    model, private, batches = make(spec(sample_rate=1.0))
    first, *_ = list(batches)
    with pytest.raises(RuntimeError, match="20 batches were drawn"):
        backward(model, private, first)


class EveryRecord(PoissonSampler):
    def __iter__(self) -> Iterator[Tensor]:
        for _ in super().__iter__():
            yield torch.arange(self.num_records)


@pytest.mark.parametrize(
    ("sampler", "error", "message"),
    [
        (lambda: EveryRecord(60, 0.1, 20), TypeError, "no subclass"),
        (lambda: [torch.arange(3)], TypeError, "no subclass"),
        (lambda: PoissonSampler(60, 0.2, 20), ValueError, "draws at 0.2"),
        (lambda: PoissonSampler(101, 0.1, 20), ValueError, "dataset_size_bound"),
        (lambda: PoissonSampler(60, 0.1, 21), ValueError, "build it with steps=20"),
        (lambda: _used(PoissonSampler(60, 0.1, 20)), ValueError, "already drew 1"),
        (lambda: PoissonSampler(60, 0.1, 20, truncated_batch_size=9), ValueError, "cuts batches to 9"),
    ],
    ids=["subclass", "list", "rate", "records", "steps", "used", "truncated"],
)
def test_samplers_that_do_not_fit(
    spec: MakeSpec, sampler: Callable[[], Any], error: type[Exception], message: str
) -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(error, match=message):
        PrivateOptimizer(model, torch.optim.SGD(model.parameters()), spec(), sampler=sampler())
    assert "forward" not in vars(model)


def _used(sampler: PoissonSampler) -> PoissonSampler:
    next(iter(sampler))
    return sampler
