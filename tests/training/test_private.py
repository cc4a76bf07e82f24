# SPDX-License-Identifier: Apache-2.0
"""Private fine-tuning: what it reads, what it charges, how it resumes."""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from wavedp.optim import DPAdam
from wavedp.privacy import LedgerError, PrivacyBudget, PrivacyLedger, PrivacySpec, PrivateOptimizer
from wavedp.storage import save_folder
from wavedp.training.checkpoints import Checkpoint, load_newest
from wavedp.training.private import (
    PrivateTrainingConfig,
    finetune_private,
    load_private_checkpoint,
    save_private_checkpoint,
)
from wavedp.training.public import tokenize
from wavedp.training.trainable import freeze_all_but

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


def newest(folder: Path) -> Checkpoint:
    found = load_newest(folder / "checkpoint")
    assert found is not None
    return found


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


def test_adam_goes_on_where_it_was(dataset: TensorImageDataset, tokenizer: SpectralTokenizer, tmp_path: Path):
    """The moments come back from the checkpoint, and so do the weights that they belong to."""
    finetune_private(dataset, tokenizer, make_model(), SPEC, CONFIG, tmp_path, progress=False)
    model = make_model()
    optimizer = DPAdam(model.parameters(), ema_decay=0.95)
    with PrivacyLedger(tmp_path / "ledger.jsonl", SPEC) as ledger:
        assert load_private_checkpoint(tmp_path / "checkpoint", model, optimizer, ledger) == (8, ())
    tensors = newest(tmp_path).tensors
    for index, (name, parameter) in enumerate(model.named_parameters()):
        state = optimizer.state[parameter]
        assert int(state["step"]) == 8
        assert torch.equal(state["exp_avg"], tensors[f"optimizer.{index}.exp_avg"])
        assert torch.equal(parameter, tensors[f"model.{name}"])
        assert torch.equal(state["average"], tensors[f"optimizer.{index}.average"])
    with PrivacyLedger(tmp_path / "ledger.jsonl", SPEC) as ledger:
        frozen = DPAdam(list(model.parameters())[1:], ema_decay=0.95)
        with pytest.raises(ValueError, match="it trained other parameters"):
            load_private_checkpoint(tmp_path / "checkpoint", model, frozen, ledger)


def test_a_crash_loses_at_most_the_steps_since_the_checkpoint_and_says_so(
    dataset: TensorImageDataset, tokenizer: SpectralTokenizer, tmp_path: Path
):
    """A process that dies in its sixth step, with checkpoints every two."""
    pid = os.fork()
    if pid == 0:
        try:
            original, calls = PrivateOptimizer.step, 0

            def dying(self: PrivateOptimizer, *arguments: object) -> None:
                nonlocal calls
                calls += 1
                if calls == 6:
                    os.kill(os.getpid(), signal.SIGKILL)
                original(self, *arguments)

            PrivateOptimizer.step = dying
            finetune_private(dataset, tokenizer, make_model(), SPEC, CONFIG, tmp_path, progress=False)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)
    assert newest(tmp_path).config["released"] == 4
    statement = finetune_private(dataset, tokenizer, make_model(), SPEC, CONFIG, tmp_path, progress=False)
    assert statement.steps_charged == 8
    released = newest(tmp_path).config["released"]
    assert released <= 7
    assert f"{8 - released} charged steps are not in the model: a crash lost them." in statement.warnings


def test_when_every_charged_step_was_lost_there_is_no_model(
    dataset: TensorImageDataset, tokenizer: SpectralTokenizer, tmp_path: Path
):
    with PrivacyLedger(tmp_path / "ledger.jsonl", SPEC) as ledger:
        ledger.reserve(8)
    with pytest.raises(RuntimeError, match="there is no fine-tuned model"):
        finetune_private(dataset, tokenizer, make_model(), SPEC, CONFIG, tmp_path, progress=False)
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / "privacy.json").exists()


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


def test_a_finished_run_is_not_trained_again(dataset: TensorImageDataset, tokenizer: SpectralTokenizer, tmp_path: Path):
    first = make_model()
    finetune_private(dataset, tokenizer, first, SPEC, CONFIG, tmp_path, progress=False)
    again = make_model()
    statement = finetune_private(dataset, tokenizer, again, SPEC, CONFIG, tmp_path, progress=False)
    assert statement.steps_charged == 8
    for name, value in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_an_interrupted_run_leaves_a_usable_model_and_continues_at_no_cost(
    dataset: TensorImageDataset, tokenizer: SpectralTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    step, calls = PrivateOptimizer.step, 0

    def interrupting(self: PrivateOptimizer, *arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGINT)
        step(self, *arguments)

    monkeypatch.setattr(PrivateOptimizer, "step", interrupting)
    with pytest.raises(KeyboardInterrupt):
        finetune_private(dataset, tokenizer, make_model(), SPEC, CONFIG, tmp_path, progress=False)
    monkeypatch.undo()
    assert newest(tmp_path).config["released"] == 3
    assert load_autoregressive(tmp_path / "model").config.privately_trained
    assert json.loads((tmp_path / "privacy.json").read_text())["steps_charged"] == 3
    statement = finetune_private(dataset, tokenizer, make_model(), SPEC, CONFIG, tmp_path, progress=False)
    assert statement.steps_charged == 8
    assert statement.warnings == ()
    assert newest(tmp_path).config["released"] == 8


def test_a_ledger_of_another_run_is_refused(dataset: TensorImageDataset, tokenizer: SpectralTokenizer, tmp_path: Path):
    finetune_private(dataset, tokenizer, make_model(), SPEC, CONFIG, tmp_path, progress=False)
    (tmp_path / "ledger.jsonl").unlink()
    with pytest.raises(ValueError, match=r"lacks a charge that was made: it has . lines and had"):
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


LABELLED = replace(SPEC, label_noise_multiplier=4.0)


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


def test_a_lost_histogram_is_not_drawn_again(dataset: TensorImageDataset, tokenizer: SpectralTokenizer, tmp_path: Path):
    """Killed between charging and saving: the charge stays, and the statement says that there is no histogram."""
    with PrivacyLedger(tmp_path / "ledger.jsonl", LABELLED) as ledger:
        ledger.release("label_histogram")
    statement = finetune_private(dataset, tokenizer, make_model(), LABELLED, CONFIG, tmp_path, progress=False)
    assert any("a crash lost it, and it is not drawn again" in warning for warning in statement.warnings)
    assert not (tmp_path / "label_histogram.json").exists()
    assert statement.epsilon == LABELLED.epsilon()


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


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before_and_is_named(
    dataset: TensorImageDataset, tokenizer: SpectralTokenizer, tmp_path: Path
):
    finetune_private(dataset, tokenizer, make_model(), SPEC, CONFIG, tmp_path, progress=False)
    path = newest(tmp_path).path
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    previous = newest(tmp_path).config["released"]
    statement = finetune_private(dataset, tokenizer, make_model(), SPEC, CONFIG, tmp_path, progress=False)
    assert statement.steps_charged == 8
    assert any(f"checkpoint {path.name} was skipped: " in warning for warning in statement.warnings)
    if previous < 8:
        assert f"{8 - previous} charged steps are not in the model: a crash lost them." in statement.warnings


def test_a_step_that_broke_off_is_not_saved(
    dataset: TensorImageDataset, tokenizer: SpectralTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Weights of which a failed step changed some are neither those before it nor those after."""
    step, calls = PrivateOptimizer.step, 0

    def breaking(self: PrivateOptimizer, *arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            with torch.no_grad():
                next(iter(self.optimizer.param_groups[0]["params"])).add_(100.0)
            raise RuntimeError("out of memory")
        step(self, *arguments)

    monkeypatch.setattr(PrivateOptimizer, "step", breaking)
    with pytest.raises(RuntimeError, match="out of memory"):
        finetune_private(dataset, tokenizer, make_model(), SPEC, CONFIG, tmp_path, progress=False)
    found = newest(tmp_path)
    assert found.config["released"] == 2
    assert all(value.abs().max() < 50 for value in found.tensors.values())


def test_a_checkpoint_of_another_run_or_history_is_refused(tmp_path: Path):
    budget = PrivacyBudget(epsilon=1e4, delta=9e-3)
    model = make_model()
    optimizer = DPAdam(model.parameters(), ema_decay=0.95)
    path = tmp_path / "shared"

    def saved(run: str, released: int) -> Path:
        with PrivacyLedger(path, SPEC, budget=budget, run=run) as ledger:
            ledger.reserve(released)
            save_private_checkpoint(tmp_path / run, model, optimizer, released, ledger)
        return tmp_path / run

    first, second = saved("a", 2), saved("b", 3)
    with PrivacyLedger(path, SPEC, run="a") as ledger:
        with pytest.raises(ValueError, match=r"it holds 3 steps of the run 'b', and .* charged 2 to 'a'"):
            load_private_checkpoint(second, model, optimizer, ledger)
        copy = path.read_bytes()
        ledger.reserve(1)
        head, lines = ledger.head, ledger.lines
        save_private_checkpoint(first, model, optimizer, 3, ledger)
    path.write_bytes(copy)
    with PrivacyLedger(path, SPEC, run="a") as ledger:
        with pytest.raises(ValueError, match=f"it has {lines - 1} lines and had {lines}: an older copy"):
            load_private_checkpoint(first, model, optimizer, ledger)
        ledger.reserve(2)
        assert (ledger.lines, ledger.head == head) == (lines, False)
        with pytest.raises(ValueError, match=f"its line {lines} is another one: two copies"):
            load_private_checkpoint(first, model, optimizer, ledger)


def test_runs_that_share_a_ledger_leave_it_open_and_their_statements_add_up(
    dataset: TensorImageDataset, tokenizer: SpectralTokenizer, tmp_path: Path
):
    budget = PrivacyBudget(epsilon=2.1 * SPEC.epsilon(), delta=3e-3, composition="joint")
    spent = []
    for run in ("a", "b"):
        with PrivacyLedger(tmp_path / "shared", SPEC, budget=budget, run=run) as ledger:
            statement = finetune_private(
                dataset, tokenizer, make_model(), SPEC, CONFIG, tmp_path / run, ledger=ledger, progress=False
            )
            assert ledger.remaining == 0
            ledger.check_history(statement.ledger_head, ledger.lines)
        assert statement.epsilon == SPEC.epsilon()
        assert (
            sum("were fixed without looking at what earlier runs" in sentence for sentence in statement.assumptions)
            == 1
        )
        assert not (tmp_path / run / "ledger.jsonl").exists()
        spent.append((statement.ledger_runs, statement.ledger_epsilon, statement.ledger_delta))
    assert spent == [(n, *budget.spent([SPEC] * n)) for n in (1, 2)]
    other = replace(SPEC, noise_multiplier=2.0)
    with (
        PrivacyLedger(tmp_path / "shared", other, budget=budget, run="c") as ledger,
        pytest.raises(LedgerError, match="another specification than the run's"),
    ):
        finetune_private(dataset, tokenizer, make_model(), SPEC, CONFIG, tmp_path / "c", ledger=ledger, progress=False)


def test_a_checkpoint_from_before_generations_is_continued(
    dataset: TensorImageDataset, tokenizer: SpectralTokenizer, tmp_path: Path
):
    finetune_private(dataset, tokenizer, make_model(), SPEC, CONFIG, tmp_path, progress=False)
    found = newest(tmp_path)
    old = {key: value for key, value in found.config.items() if key not in ("run", "ledger_lines")}
    save_folder(tmp_path / "old", old, found.tensors)
    model = make_model()
    optimizer = DPAdam(model.parameters(), ema_decay=0.95)
    with PrivacyLedger(tmp_path / "ledger.jsonl", SPEC) as ledger:
        assert load_private_checkpoint(tmp_path / "old", model, optimizer, ledger) == (8, ())
    with (
        PrivacyLedger(tmp_path / "other", SPEC) as ledger,
        pytest.raises(ValueError, match="its spending is not in"),
    ):
        load_private_checkpoint(tmp_path / "old", model, optimizer, ledger)
