# SPDX-License-Identifier: Apache-2.0
"""Private fine-tuning that broke off: what is lost, what is charged, and what is refused."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from private_runs import CONFIG, LABELLED, SPEC, make_model, newest

from wavedp.data import TensorImageDataset
from wavedp.models import SpectralTokenizer, load_autoregressive
from wavedp.optim import DPAdam
from wavedp.privacy import LedgerError, PrivacyBudget, PrivacyLedger, PrivateOptimizer
from wavedp.storage import save_folder
from wavedp.training.private import finetune_private, load_private_checkpoint, save_private_checkpoint


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


def test_a_lost_histogram_is_not_drawn_again(dataset: TensorImageDataset, tokenizer: SpectralTokenizer, tmp_path: Path):
    """Killed between charging and saving: the charge stays, and the statement says that there is no histogram."""
    with PrivacyLedger(tmp_path / "ledger.jsonl", LABELLED) as ledger:
        ledger.release("label_histogram")
    statement = finetune_private(dataset, tokenizer, make_model(), LABELLED, CONFIG, tmp_path, progress=False)
    assert any("a crash lost it, and it is not drawn again" in warning for warning in statement.warnings)
    assert not (tmp_path / "label_histogram.json").exists()
    assert statement.epsilon == LABELLED.epsilon()


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
