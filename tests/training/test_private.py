# SPDX-License-Identifier: Apache-2.0
"""Private fine-tuning: what it reads and what it charges."""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from private_runs import CONFIG, LABELLED, SPEC, make_model, newest

from wavedp.data import TensorImageDataset
from wavedp.models import AutoregressiveConfig, AutoregressiveTransformer, SpectralTokenizer, load_autoregressive
from wavedp.optim import DPAdam
from wavedp.privacy import PrivacyLedger, PrivacySpec, PrivateOptimizer
from wavedp.training.private import PrivateTrainingConfig, finetune_private
from wavedp.training.public import tokenize
from wavedp.training.trainable import freeze_all_but


def test_tokens_come_from_the_coarse_image_alone(dataset: TensorImageDataset, tokenizer: SpectralTokenizer):
    """Detail that leaves every 4 x 4 block mean as it is leaves the tokens as they are."""
    tokens = tokenize(tokenizer, dataset, 1)
    images = dataset.images.clone().clamp(10, 245)
    flat = TensorImageDataset(images, dataset.labels, classes=dataset.classes, name="flat")
    images = images.clone()
    images[..., 0::4, 0::4] += 10
    images[..., 0::4, 1::4] -= 10
    detailed = TensorImageDataset(images, dataset.labels, classes=dataset.classes, name="detailed")
    assert tokens.shape == (20, 4)
    assert torch.equal(tokenize(tokenizer, flat, 1), tokenize(tokenizer, detailed, 1))
    assert not torch.equal(tokenize(tokenizer, flat, 3), tokenize(tokenizer, detailed, 3))
    assert torch.equal(tokenize(tokenizer, dataset, 1, batch_size=3), tokens)


def test_a_run_leaves_model_ledger_and_statement(
    dataset: TensorImageDataset, tokenizer: SpectralTokenizer, tmp_path: Path, device: torch.device
):
    model, tokenizer = make_model().to(device), tokenizer.to(device)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    statement = finetune_private(dataset, tokenizer, model, SPEC, CONFIG, tmp_path, progress=False)
    assert statement.steps_charged == statement.steps_planned == 8
    assert statement.epsilon == SPEC.epsilon()
    assert json.loads((tmp_path / "privacy.json").read_text())["epsilon"] == statement.epsilon
    assert "The list of classes is public." in statement.assumptions
    assert "Privacy statement" in (tmp_path / "privacy.txt").read_text()
    saved = load_autoregressive(tmp_path / "model").state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(saved[name], value.cpu()), name
        assert not torch.equal(value, before[name]), name
    with PrivacyLedger(tmp_path / "ledger.jsonl", SPEC) as ledger:
        assert ledger.remaining == 0


def test_the_learning_rate_follows_the_charged_steps(
    dataset: TensorImageDataset, tokenizer: SpectralTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A cosine over all steps of the specification, also where a crash lost some of them."""
    rates: list[float] = []
    step = DPAdam.step

    def recorded(self: DPAdam, *arguments: Any, **named: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        if len(rates) == 4:
            raise RuntimeError("power cut")
        return step(self, *arguments, **named)

    monkeypatch.setattr(DPAdam, "step", recorded)
    config = replace(CONFIG, schedule="cosine", warmup_steps=2)
    with pytest.raises(RuntimeError, match="power cut"):
        finetune_private(dataset, tokenizer, make_model(), SPEC, config, tmp_path, progress=False)
    finetune_private(dataset, tokenizer, make_model(), SPEC, config, tmp_path, progress=False)
    cosine = [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    assert rates == pytest.approx([1e-2 * c * w for c, w in zip(cosine, [0.5, *[1.0] * 7])])
    constant = replace(CONFIG, warmup_steps=4)
    assert [constant.rate(i, 8) for i in range(6)] == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2, 1e-2, 1e-2])
    with pytest.raises(ValueError, match="schedule must be one of constant, cosine, got 'linear'"):
        replace(CONFIG, schedule="linear")


def test_the_model_holds_the_average_of_the_released_weights(
    dataset: TensorImageDataset, tokenizer: SpectralTokenizer, tmp_path: Path
):
    model = make_model()
    finetune_private(dataset, tokenizer, model, SPEC, CONFIG, tmp_path, progress=False)
    config, tensors = newest(tmp_path).config, newest(tmp_path).tensors
    assert config["released"] == 8
    for index, (name, value) in enumerate(model.named_parameters()):
        assert torch.equal(value, tensors[f"optimizer.{index}.average"]), name
        assert not torch.equal(value, tensors[f"model.{name}"]), name
    assert model.config.privately_trained


def test_what_does_not_fit_is_refused_before_anything_is_charged(
    dataset: TensorImageDataset, tokenizer: SpectralTokenizer, tmp_path: Path
):
    def refused(message: str, spec: PrivacySpec = SPEC, **sizes: object) -> None:
        values = {"num_classes": 2, "tokens_per_scale": 4, "num_scales": 1, "approximation_codes": 256}
        config = AutoregressiveConfig(**{**values, "detail_codes": 256, "width": 16, "heads": 2, **sizes})
        with pytest.raises(ValueError, match=message):
            finetune_private(
                dataset, tokenizer, AutoregressiveTransformer(config), spec, CONFIG, tmp_path / "x", progress=False
            )
        assert not (tmp_path / "x").exists()

    refused("the model has 16 tokens per scale, the tokenizer 4", tokens_per_scale=16)
    refused("the model has 9 approximation codes", approximation_codes=9)
    refused("the model has 7 scales, the tokenizer only 3", num_scales=7)
    refused("another tokenizer", tokenizer_fingerprint="0" * 64)
    refused("already fine-tuned on sensitive images", privately_trained=True)
    refused("has 2 classes, the model 3", num_classes=3)
    refused("no finite epsilon", spec=replace(SPEC, noise_multiplier=0.04))
    with pytest.raises(ValueError, match=r"call \.eval\(\) first"):
        tokenize(tokenizer.train(), dataset, 1)


def test_nobody_can_know_what_the_model_drops(
    dataset: TensorImageDataset, tokenizer: SpectralTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Masks go by the place in the batch: from a known seed, one record less would give others to all behind it."""
    seeds: list[int] = []
    loss = AutoregressiveTransformer.loss

    def noted(self: AutoregressiveTransformer, *arguments: torch.Tensor) -> torch.Tensor:
        seeds.append(torch.initial_seed())
        return loss(self, *arguments)

    monkeypatch.setattr(AutoregressiveTransformer, "loss", noted)
    for run in ("a", "b"):
        model = make_model()
        torch.manual_seed(3)
        before = torch.get_rng_state()
        finetune_private(dataset, tokenizer, model, SPEC, CONFIG, tmp_path / run, progress=False)
        assert torch.equal(torch.get_rng_state(), before), "the caller's generator is left as it was"
    by_step = dict.fromkeys(seeds)
    assert 3 not in by_step
    assert SPEC.steps < len(by_step) <= 2 * SPEC.steps, "a seed for each step of both runs, but for empty batches"


def test_only_chosen_parameters_move(dataset: TensorImageDataset, tokenizer: SpectralTokenizer, tmp_path: Path):
    model = make_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    config = PrivateTrainingConfig(trainable="class_embedding|norm")
    finetune_private(dataset, tokenizer, model, SPEC, config, tmp_path, progress=False)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"class_embedding.weight", "norm.weight"}


def test_more_records_than_the_public_bound_are_refused(tokenizer: SpectralTokenizer, tmp_path: Path):
    images = torch.zeros(101, 1, 16, 16, dtype=torch.uint8)
    many = TensorImageDataset(images, torch.zeros(101, dtype=torch.int64), classes=("a", "b"), name="many")
    with pytest.raises(ValueError, match="dataset_size_bound=100"):
        finetune_private(many, tokenizer, make_model(), SPEC, CONFIG, tmp_path, progress=False)


def test_an_empty_private_set_runs_the_same_path(tokenizer: SpectralTokenizer, tmp_path: Path):
    empty = TensorImageDataset(
        torch.zeros(0, 1, 16, 16, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), classes=("a", "b"), name="none"
    )
    assert finetune_private(empty, tokenizer, make_model(), SPEC, CONFIG, tmp_path, progress=False).steps_charged == 8


def test_classes_in_another_order_are_refused(
    dataset: TensorImageDataset, tokenizer: SpectralTokenizer, tmp_path: Path
):
    config = AutoregressiveConfig(2, 4, 1, 256, 256, width=16, depth=1, heads=2, class_names=("b", "a"))
    remedies = r"in the same order \(--classes\); if not, .*--new-classes.* from nothing, on the private budget"
    with pytest.raises(ValueError, match=rf"\['a', 'b'\], are not the model's, \['b', 'a'\]; .*{remedies}"):
        finetune_private(dataset, tokenizer, AutoregressiveTransformer(config), SPEC, CONFIG, tmp_path, progress=False)


def test_names_that_match_nothing_are_refused():
    with pytest.raises(ValueError, match="matches no parameter"):
        freeze_all_but(make_model(), "lora")
    with pytest.raises(ValueError, match="not a regular expression"):
        freeze_all_but(make_model(), "(")


def test_the_label_histogram_is_charged_saved_and_drawn_once(
    dataset: TensorImageDataset, tokenizer: SpectralTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Interrupted after three steps, continued, and run again: one histogram, and epsilon that covers it."""
    step, calls = PrivateOptimizer.step, 0

    def interrupting(self: PrivateOptimizer, *arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGINT)
        step(self, *arguments)

    monkeypatch.setattr(PrivateOptimizer, "step", interrupting)
    with pytest.raises(KeyboardInterrupt):
        finetune_private(dataset, tokenizer, make_model(), LABELLED, CONFIG, tmp_path, progress=False)
    monkeypatch.undo()
    saved = (tmp_path / "label_histogram.json").read_bytes()
    for _ in range(2):
        statement = finetune_private(dataset, tokenizer, make_model(), LABELLED, CONFIG, tmp_path, progress=False)
        assert (tmp_path / "label_histogram.json").read_bytes() == saved
        assert statement.epsilon == LABELLED.epsilon() > SPEC.epsilon()
        assert statement.steps_charged == 8
        assert any("drawn from the charged histogram" in sentence for sentence in statement.assumptions)
        assert statement.warnings == ()
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert kinds.count("release") == 1
    assert kinds.index("release") < kinds.index("reserve")


def test_a_run_ends_at_its_target_with_everything_that_can_be_charged(
    dataset: TensorImageDataset, tokenizer: SpectralTokenizer, tmp_path: Path
):
    model = make_model()
    spec = PrivacySpec.for_target_epsilon(
        4.0, sample_rate=0.3, steps=8, max_grad_norm=0.5, expected_batch_size=6.0, delta=1e-3, dataset_size_bound=20,
        label_noise_multiplier=5.0, truncated_batch_size=9, noise_mode="strict",
        trainable_parameters=sum(p.numel() for p in model.parameters()),
    )  # fmt: skip
    for _ in range(2):  # the second has nothing left to spend
        statement = finetune_private(dataset, tokenizer, make_model(), spec, CONFIG, tmp_path, progress=False)
        assert 0.99 * 4.0 <= statement.epsilon <= 4.0
        assert statement.epsilon_charged <= 4.0
        assert (statement.steps_charged, len(statement.charged)) == (8, 3)
    with PrivacyLedger(tmp_path / "ledger.jsonl", spec) as ledger:
        assert ledger.remaining == 0
