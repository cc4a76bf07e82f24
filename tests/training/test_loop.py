# SPDX-License-Identifier: Apache-2.0
"""The public loop: exact resume, Ctrl-C at a step's end, logs, refusals."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from wavedp.storage import read_json
from wavedp.training import loop
from wavedp.training.checkpoints import load_newest
from wavedp.training.interrupt import DeferredInterrupt
from wavedp.training.loop import TrainingConfig, fit, step_generator
from wavedp.training.runs import CsvLog, RunFolder, read_log

CONFIG = TrainingConfig(steps=12, batch_size=4, learning_rate=1e-2, warmup_steps=2, save_every=5, log_every=2)


class Regression:
    """A tiny task whose loss can be told to interrupt or to fail at one step."""

    def __init__(self, at: int | None = None, action: str = "interrupt") -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 1))
        self.at, self.action, self.calls = at, action, 0

    def losses(self, generator: torch.Generator) -> dict[str, Tensor]:
        x = torch.randn(4, 3, generator=generator)
        loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
        self.calls += 1
        if self.calls == self.at:
            if self.action == "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
            else:
                loss = loss * torch.inf
        return {"loss": loss, "half": loss / 2}

    def fit(self, folder: Path, config: TrainingConfig = CONFIG) -> dict[str, Tensor]:
        fit(self.model, self.losses, config, folder, title="t", progress=False)
        return {k: v.clone() for k, v in self.model.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("at", [1, 4, 9])
def test_an_interrupted_run_ends_where_an_unbroken_one_does(tmp_path: Path, at: int):
    unbroken = Regression().fit(tmp_path / "a")
    broken = Regression(at=at)
    with pytest.raises(KeyboardInterrupt):
        broken.fit(tmp_path / "b")
    assert broken.calls == at  # the step in hand was finished, and no other begun
    resumed = Regression()
    assert_same(resumed.fit(tmp_path / "b"), unbroken)
    assert resumed.calls == 12 - at
    rows = [{k: row[k] for k in row} for row in read_log(tmp_path / "b" / "log.csv")]
    assert [int(r["step"]) for r in rows] == sorted({int(r["step"]) for r in rows})
    assert int(rows[-1]["step"]) == 11


def test_an_interrupt_while_a_step_is_logged_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It comes too late for that step's checkpoint, so the next step is finished too."""
    append, rows = CsvLog.append, 0

    def interrupting(log: CsvLog, **row: float) -> None:
        nonlocal rows
        rows += 1
        if rows == 2:
            os.kill(os.getpid(), signal.SIGINT)
        append(log, **row)

    monkeypatch.setattr(CsvLog, "append", interrupting)
    broken = Regression()
    with pytest.raises(KeyboardInterrupt):
        broken.fit(tmp_path)
    assert broken.calls == 4
    assert load_newest(tmp_path / "checkpoint").config["step"] == 4


def test_the_average_of_the_weights_becomes_the_model(tmp_path: Path):
    """Also where the run was interrupted, and the checkpoint keeps weights and average apart."""
    config = replace(CONFIG, ema_decay=0.6)
    plain = Regression()
    seen: list[dict[str, Tensor]] = []
    step = loop.train_step

    def watched(model: nn.Module, *arguments: object) -> object:
        result = step(model, *arguments)  # type: ignore[arg-type]
        seen.append({k: v.detach().clone() for k, v in model.state_dict().items()})
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", watched)
        got = plain.fit(tmp_path / "a", config)
    expected = {k: v.clone() for k, v in Regression().model.state_dict().items()}
    for t, weights in enumerate(seen):
        decay = min(0.6, (1 + t) / (10 + t))
        expected = {k: decay * v + (1 - decay) * weights[k] for k, v in expected.items()}
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)
        assert not torch.equal(got[name], seen[-1][name])
    found = load_newest(tmp_path / "a" / "checkpoint")
    assert found is not None
    assert torch.equal(found.tensors["model.0.weight"], seen[-1]["0.weight"])
    assert_same(Regression().fit(tmp_path / "a", config), got)  # finished: the average comes from the checkpoint
    broken = Regression(at=4)
    with pytest.raises(KeyboardInterrupt):
        broken.fit(tmp_path / "b", config)
    assert_same(Regression().fit(tmp_path / "b", config), got)
    with pytest.raises(ValueError, match="no average of these weights"):
        Regression().fit(tmp_path / "c") and Regression().fit(tmp_path / "c", config)


def test_a_finished_run_does_nothing_more(tmp_path: Path):
    first = Regression().fit(tmp_path)
    again = Regression()
    again.model.train()
    assert_same(again.fit(tmp_path), first)
    assert again.calls == 0
    assert not again.model.training


def test_a_crash_costs_at_most_the_steps_since_the_checkpoint(tmp_path: Path):
    with pytest.raises(RuntimeError, match="not finite at step 7"):
        Regression(at=8, action="diverge").fit(tmp_path / "a")
    resumed = Regression()
    assert_same(resumed.fit(tmp_path / "a"), Regression().fit(tmp_path / "b"))
    assert resumed.calls == 12 - 5


def test_the_global_generator_is_left_alone(tmp_path: Path):
    task = Regression()
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    task.fit(tmp_path)
    assert torch.equal(torch.get_rng_state(), expected)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path):
    Regression().fit(tmp_path)
    other = Regression()
    other.model = nn.Sequential(nn.Linear(3, 1))
    with pytest.raises(ValueError, match="does not fit this model"):
        other.fit(tmp_path)


def test_the_rate_warms_up_and_falls_to_zero():
    config = TrainingConfig(steps=100, learning_rate=1.0, warmup_steps=10)
    assert config.rate(0) == pytest.approx(0.1)
    assert max(config.rate(s) for s in range(100)) == config.rate(9)
    assert config.rate(50) == pytest.approx(0.5)
    assert config.rate(99) < 1e-3


def test_steps_and_seeds_give_different_batches():
    draws = {
        tuple(torch.randint(1000, (8,), generator=step_generator(s, t)).tolist()) for s in range(5) for t in range(50)
    }
    assert len(draws) == 250


def test_a_second_interrupt_is_immediate():
    before = signal.getsignal(signal.SIGINT)
    with DeferredInterrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        interrupt.requested = False
    assert signal.getsignal(signal.SIGINT) is before


def test_the_log_drops_what_a_resumed_run_repeats(tmp_path: Path):
    log = CsvLog(tmp_path / "log.csv", ("step", "loss"))
    for step in range(5):
        log.append(step=step, loss=step / 3)
    CsvLog(tmp_path / "log.csv", ("step", "loss"), resume_before=3).append(step=3, loss=9.0)
    assert [(r["step"], r["loss"]) for r in read_log(tmp_path / "log.csv")] == [
        ("0", "0"),
        ("1", "0.333333"),
        ("2", "0.666667"),
        ("3", "9"),
    ]


def test_a_row_that_a_crash_tore_is_left_out(tmp_path: Path):
    log = tmp_path / "log.csv"
    for torn in (",0.5\n", "7", "\0\0\0\0", "7,\n", "x,1\n"):
        log.write_text("step,loss\n0,1.5\n1,1.25\n" + torn)
        assert [r["step"] for r in read_log(log)] == ["0", "1"], torn
        CsvLog(log, ("step", "loss"), resume_before=9).append(step=2, loss=1.0)
        assert [r["step"] for r in read_log(log)] == ["0", "1", "2"], torn


def test_a_run_folder_belongs_to_one_command(tmp_path: Path):
    RunFolder(tmp_path, {"command": "finetune", "n": 1})
    with pytest.raises(ValueError, match="belongs to a run of 'wavedp finetune'"):
        RunFolder(tmp_path, {"command": "sample", "n": 1}, overwrite=True)
    RunFolder(tmp_path / "s", {"command": "sample", "n": 1})
    RunFolder(tmp_path / "s", {"command": "sample", "n": 2}, overwrite=True)


def test_a_run_folder_refuses_other_settings(tmp_path: Path):
    RunFolder(tmp_path, {"steps": 3, "seed": 0})
    RunFolder(tmp_path, {"steps": 3, "seed": 0})
    with pytest.raises(ValueError, match=r"other settings \(steps differ\)"):
        RunFolder(tmp_path, {"steps": 4, "seed": 0})


def test_a_run_folder_refuses_models_that_were_replaced(tmp_path: Path):
    config = {"command": "finetune", "model": "public"}
    old = tmp_path / "of a version that did not look"
    RunFolder(old, config)
    assert "reads" not in RunFolder(old, config, reads={"model": "a"}).config, "it may have been another"
    assert "reads" not in read_json(old / "run.json")
    RunFolder(tmp_path, config, reads={"model": "a", "tokenizer": "t"})
    RunFolder(tmp_path, config, reads={"model": "a", "tokenizer": "t"})
    with pytest.raises(ValueError, match="made from another model, which was replaced since"):
        RunFolder(tmp_path, config, reads={"model": "b", "tokenizer": "t"})
    with pytest.raises(ValueError, match="made from another model and tokenizer"):
        RunFolder(tmp_path, config, reads={"model": "b", "tokenizer": "u"})
    RunFolder(tmp_path, config, reads={"model": "a", "tokenizer": "t"})


@pytest.mark.parametrize("changes", [{"steps": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"save_every": 0}])
def test_bad_training_settings_are_refused(changes: dict[str, float]):
    with pytest.raises(ValueError, match=next(iter(changes))):
        TrainingConfig(**{"steps": 1, **changes})
