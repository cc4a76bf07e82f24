# SPDX-License-Identifier: Apache-2.0
"""Private fine-tuning: what it reads, what it charges, how it resumes."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from wavedp.data import TensorImageDataset
from wavedp.models import (
    AutoregressiveConfig,
    AutoregressiveTransformer,
    SpectralTokenizer,
    SpectralTokenizerConfig,
    load_autoregressive,
)
from wavedp.privacy import PrivacyLedger, PrivacySpec
from wavedp.training.private import PrivateTrainingConfig, finetune_private, freeze_all_but, update_average
from wavedp.training.public import tokenize

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


@pytest.fixture
def dataset() -> TensorImageDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (20, 1, 16, 16), generator=generator, dtype=torch.uint8)
    return TensorImageDataset(images, torch.arange(20) % 2, classes=("a", "b"), name="tiny")


@pytest.fixture
def tokenizer() -> SpectralTokenizer:
    torch.manual_seed(0)
    return SpectralTokenizer(SpectralTokenizerConfig(image_size=16, levels=2, grid=2, width=16, heads=2)).eval()


def make_model() -> AutoregressiveTransformer:
    torch.manual_seed(1)
    return AutoregressiveTransformer(AutoregressiveConfig(2, 4, 1, 256, 256, width=16, depth=1, heads=2))


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


def test_only_chosen_parameters_move(dataset: TensorImageDataset, tokenizer: SpectralTokenizer, tmp_path: Path):
    model = make_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    config = PrivateTrainingConfig(trainable="class_embedding|norm")
    finetune_private(dataset, tokenizer, model, SPEC, config, tmp_path, progress=False)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"class_embedding.weight", "norm.weight"}


def test_a_finished_run_is_not_trained_again(dataset: TensorImageDataset, tokenizer: SpectralTokenizer, tmp_path: Path):
    first = make_model()
    finetune_private(dataset, tokenizer, first, SPEC, CONFIG, tmp_path, progress=False)
    again = make_model()
    statement = finetune_private(dataset, tokenizer, again, SPEC, CONFIG, tmp_path, progress=False)
    assert statement.steps_charged == 8
    for name, value in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_an_interrupted_run_continues_and_charges_every_attempt(
    dataset: TensorImageDataset, tokenizer: SpectralTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, calls = make_model(), 0
    loss = AutoregressiveTransformer.loss

    def interrupting(self: AutoregressiveTransformer, *arguments: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(self, *arguments)

    monkeypatch.setattr(AutoregressiveTransformer, "loss", interrupting)
    with pytest.raises(KeyboardInterrupt):
        finetune_private(dataset, tokenizer, model, SPEC, CONFIG, tmp_path, progress=False)
    monkeypatch.undo()
    checkpoint = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    with PrivacyLedger(tmp_path / "ledger.jsonl", SPEC) as ledger:
        charged = ledger.charged
    assert 1 <= checkpoint["released"] <= 3
    assert charged >= checkpoint["released"]
    statement = finetune_private(dataset, tokenizer, make_model(), SPEC, CONFIG, tmp_path, progress=False)
    assert statement.steps_charged == 8
    final = json.loads((tmp_path / "checkpoint" / "config.json").read_text())["released"]
    assert final == checkpoint["released"] + 8 - charged  # steps that were charged and lost are not had twice


def test_a_ledger_of_another_run_is_refused(dataset: TensorImageDataset, tokenizer: SpectralTokenizer, tmp_path: Path):
    finetune_private(dataset, tokenizer, make_model(), SPEC, CONFIG, tmp_path, progress=False)
    (tmp_path / "ledger.jsonl").unlink()
    with pytest.raises(ValueError, match="its spending is not in"):
        finetune_private(dataset, tokenizer, make_model(), SPEC, CONFIG, tmp_path, progress=False)


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
    with pytest.raises(ValueError, match=r"\['a', 'b'\], are not the model's, \['b', 'a'\]"):
        finetune_private(dataset, tokenizer, AutoregressiveTransformer(config), SPEC, CONFIG, tmp_path, progress=False)


def test_names_that_match_nothing_are_refused():
    with pytest.raises(ValueError, match="matches no parameter"):
        freeze_all_but(make_model(), "lora")
    with pytest.raises(ValueError, match="not a regular expression"):
        freeze_all_but(make_model(), "(")


def test_the_average_of_constant_weights_is_those_weights_and_old_ones_fade():
    model = torch.nn.Linear(1, 1, bias=False)
    average = {"weight": torch.zeros(1, 1)}
    with torch.no_grad():
        model.weight.fill_(1.0)
    for count in range(1, 200):
        update_average(average, model, 0.9, count)
    assert average["weight"].item() == pytest.approx(1.0, abs=1e-6)
