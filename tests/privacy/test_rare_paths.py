# SPDX-License-Identifier: Apache-2.0
"""What clipping, sampling, ledgers and loaders do in cases that hardly come up."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import wavedp
from wavedp import PrivacyEngine, optim
from wavedp.privacy import (
    AdaptiveClipping,
    Entropy,
    LedgerError,
    PoissonSampler,
    PrivacyLedger,
    PrivacySpec,
    PrivateLoader,
    PrivateOptimizer,
    label_probabilities,
    physical_batches,
    release_label_histogram,
)
from wavedp.privacy.clipping import FLAT_GROUP, accumulation_dtype
from wavedp.privacy.strict import MOST_CLASSES
from wavedp.privacy.validation import check_real

MakeSpec = Callable[..., PrivacySpec]


def private_sgd(model: nn.Module, spec: PrivacySpec, **options: Any) -> PrivateOptimizer:
    return PrivateOptimizer(model, torch.optim.SGD(model.parameters(), lr=1.0), spec, **options)


def exact(spec: MakeSpec, **changes: Any) -> PrivacySpec:
    return spec(noise_multiplier=0.0, **changes)


# Clipping


def test_no_rows_are_an_empty_batch(spec: MakeSpec, linear: nn.Linear) -> None:
    before = linear.weight.detach().clone()
    private = private_sgd(linear, exact(spec), without_privacy=True)
    private.backward(linear(torch.zeros(0, 3)).sum(1))
    assert private.pending
    private.step()
    assert torch.equal(linear.weight, before)
    assert private.steps_charged == private.steps_started == 1


def test_an_input_that_is_a_parameter_is_one_like_any(spec: MakeSpec, linear: nn.Linear) -> None:
    x, before = torch.randn(1, 3), linear.weight.detach().clone()
    private = private_sgd(linear, exact(spec, max_grad_norm=1e6), without_privacy=True)
    private.backward(linear(nn.Parameter(x)).sum(1))
    private.step()
    assert torch.allclose((before - linear.weight) * 8.0, x.expand(2, 3), atol=1e-5)


def test_tiny_gradients_that_are_scaled_up_do_not_overflow(spec: MakeSpec) -> None:
    """A normalised record comes out as long as C, also where its factor is above what float32 products take."""
    model = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(model.weight)
    made = exact(spec, clipping_rule="normalised", max_grad_norm=2.0, expected_batch_size=1.0)
    private = private_sgd(model, made, without_privacy=True)
    private.backward(model(torch.tensor([[3e-12, 0.0, 4e-12]])).sum(1))
    private.step()
    assert torch.allclose(model.weight, torch.tensor([[-1.2, 0.0, -1.6]]), rtol=1e-5)


def test_shared_rows_that_fit_no_batch_are_refused(spec: MakeSpec) -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position, self.out = nn.Embedding(5, 3), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:  # [B, 2, 3]
            ids = torch.arange(2).expand(2, 2)  # neither [T] nor [1, T] nor [B, T]
            result: Tensor = self.out(x + self.position(ids).sum(0))
            return result

    model = Positions()
    private = private_sgd(model, spec())
    with pytest.raises(RuntimeError, match="first axis must be the record axis"):
        private.backward(model(torch.randn(4, 2, 3)).sum((1, 2)))


def test_sums_of_integers_have_no_type() -> None:
    with pytest.raises(TypeError, match=r"real floating point, got torch\.int64"):
        accumulation_dtype(torch.int64)


def test_an_adaptive_session_speaks_for_its_rule_and_may_see_nothing() -> None:
    rule = AdaptiveClipping(1.0, 100.0)
    session = rule.session(Entropy())
    assert session.describe() == rule.describe()
    assert session.extra_charge(1.0) == rule.extra_charge(1.0)
    session.observe({})
    assert session._votes == 0.0
    session.drop_step()
    session.observe({FLAT_GROUP: torch.tensor([0.25, 4.0, 0.0], dtype=torch.float64)})
    assert session._votes == 0.5


def test_a_map_of_rows_is_a_vector_of_integers(spec: MakeSpec, linear: nn.Linear) -> None:
    private = private_sgd(linear, spec())
    with pytest.raises(TypeError, match=r"sample_id must be an int64 tensor \[rows\], got torch\.float32 \(2,\)"):
        private.backward(linear(torch.randn(2, 3)).sum(1), sample_id=torch.zeros(2))


def test_a_step_may_leave_weights_of_another_type(spec: MakeSpec, linear: nn.Linear) -> None:
    """What the step of the optimizer makes of them is released: it is remembered, and what comes after is found."""
    private = private_sgd(linear, spec())
    private.optimizer.register_step_post_hook(lambda *_: linear.double() and None)
    private.step()
    assert linear.weight.dtype == torch.float64
    private.step()
    linear.float()
    with pytest.raises(RuntimeError, match="changed outside of private steps"):
        private.step()


def test_public_functions_name_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"activations of scaled_weight_grad need the axes \[B, ..., width\]"):
        wavedp.scaled_weight_grad(torch.zeros(2, 3), torch.zeros(2), torch.ones(2))
    with pytest.raises(ValueError, match="max_grad_norm that is positive and finite, not inf"):
        wavedp.clip_and_sum([torch.zeros(2, 3)], 10**400)


def test_runs_that_cannot_be_are_refused_first(spec: MakeSpec, linear: nn.Linear) -> None:
    with pytest.raises(ValueError, match="loss_reduction must be 'mean', 'sum' or None, got 'max'"):
        private_sgd(linear, spec(), loss_reduction="max")
    frozen = nn.Sequential(linear, nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ValueError, match="leave frozen ones out of it"):
        PrivateOptimizer(frozen, optim.DPSGD(frozen.parameters(), lr=1.0), spec())
    with pytest.raises(ValueError, match=r"delta=0.001 is not below 1 / \(number of records\)"):
        PrivacyEngine().make_private_with_spec(
            spec=spec(),
            module=linear,
            optimizer=torch.optim.SGD(linear.parameters()),
            data_loader=DataLoader(TensorDataset(torch.zeros(101, 3))),
        )
    assert "forward" not in vars(linear)
    private = private_sgd(linear, spec())
    private.step()
    with pytest.raises(RuntimeError, match="batches were not checked"):
        private.check_regular()


# Sampling and batches


def test_what_is_drawn_is_not_ahead() -> None:
    sampler = PoissonSampler(9, 0.5, 3)
    ahead = sampler.ahead(1)
    batches = iter(sampler)
    next(batches)
    assert torch.equal(next(batches), ahead)
    for number in (0, 1, 3):
        with pytest.raises(IndexError, match=f"batch {number} is not ahead: 2 of 3 are drawn"):
            sampler.ahead(number)


def test_equal_words_are_drawn_again() -> None:
    """Whoever has the smallest words stays; two records with one word would not be alike."""
    sampler = PoissonSampler(4, 1.0, 1, truncated_batch_size=2)
    words = iter([[7, 7, 1, 9], [5, 3, 8, 1]])
    sampler._entropy.words = lambda *_: np.array(next(words), dtype=np.uint64)  # type: ignore[method-assign]
    assert next(iter(sampler)).tolist() == [1, 3]
    assert next(words, None) is None


def test_indices_are_what_a_sampler_yields() -> None:
    with pytest.raises(TypeError, match="indices must be a tensor, as a sampler yields it, got list"):
        list(physical_batches([1, 2], 1))  # type: ignore[arg-type]


def test_losses_of_announced_records_need_no_names(spec: MakeSpec, linear: nn.Linear) -> None:
    made = spec(sample_rate=1.0)
    sampler = PoissonSampler.for_spec(made, 4)
    private = private_sgd(linear, made, sampler=sampler)
    private.announce(next(iter(sampler)))
    with pytest.raises(RuntimeError, match="a backward of 3 records, where 4 are next"):
        private.backward(linear(torch.randn(3, 3)).sum(1))
    private.backward(linear(torch.randn(4, 3)).sum(1))
    private.step()


def test_another_process_is_refused_before_anything_happens(
    spec: MakeSpec, linear: nn.Linear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = private_sgd(linear, spec())
    ledger = PrivacyLedger(tmp_path / "ledger", spec())
    before = (tmp_path / "ledger").read_bytes()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(RuntimeError, match="another process; build it after forking"):
        private.step()
    with pytest.raises(LedgerError, match="open the ledger after forking"):
        ledger.reserve(1)
    assert private.steps_charged == 0
    assert (tmp_path / "ledger").read_bytes() == before


def test_closing_twice_gives_the_model_back_once(spec: MakeSpec, linear: nn.Linear) -> None:
    private = private_sgd(linear, spec())
    private.close()
    own = private_sgd(linear, spec())
    private.close()
    assert "forward" in vars(linear)
    own.close()
    assert "forward" not in vars(linear)


# Loaders


def test_loaders_that_cannot_be_driven(spec: MakeSpec, linear: nn.Linear) -> None:
    data = TensorDataset(torch.randn(4, 3))
    with pytest.raises(ValueError, match="the optimizer has no sampler"):
        PrivateLoader(DataLoader(data), private_sgd(linear, spec()))
    model = nn.Linear(3, 2)
    private = private_sgd(model, spec(), sampler=PoissonSampler.for_spec(spec(), 5))
    with pytest.raises(ValueError, match="yields single records: give it a batch_size"):
        PrivateLoader(DataLoader(data, batch_size=None), private)
    with pytest.raises(ValueError, match="another number of records than the data set has"):
        PrivateLoader(DataLoader(data), private)


# Ledger, histogram, numbers


def test_a_disk_that_does_not_take_the_missing_newline(
    spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger"
    with PrivacyLedger(path, spec()) as ledger:
        ledger.reserve(2)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda *_: 0)
        with pytest.raises(LedgerError, match="takes no more bytes; is the disk full"):
            PrivacyLedger(path, spec())
    assert path.read_bytes() == whole[:-1]
    with PrivacyLedger(path, spec()) as ledger:
        assert ledger.charged == 2
    assert path.read_bytes() == whole


def test_more_classes_than_strict_noise_is_charged_for(spec: MakeSpec) -> None:
    made = spec(noise_mode="strict", trainable_parameters=8, label_noise_multiplier=2.0)
    with pytest.raises(ValueError, match=f"at most {MOST_CLASSES} classes, got {MOST_CLASSES + 1}"):
        release_label_histogram(torch.zeros(3, dtype=torch.int64), MOST_CLASSES + 1, made)


def test_probabilities_are_of_finite_counts() -> None:
    for counts in ([1.0], torch.ones(2, 2), torch.ones(2, dtype=torch.complex64)):
        with pytest.raises(TypeError, match=r"a tensor \[num_classes\]"):
            label_probabilities(counts)  # type: ignore[arg-type]
    for values in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="finite, and of at least one class"):
            label_probabilities(torch.tensor(values))


def test_a_number_beyond_floats_is_not_finite() -> None:
    with pytest.raises(ValueError, match="std must be finite, got a number beyond"):
        check_real("std", 10**400)
    assert check_real("std", 10**300) == 1e300
