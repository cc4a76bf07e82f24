# SPDX-License-Identifier: Apache-2.0
"""`wavedp study`: overrides, stages that rows share, what is run again and what is not, the figures of every row."""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from wavedp.cli import main, study
from wavedp.cli.recipe_file import Stage
from wavedp.cli.recipe_stages import digests
from wavedp.cli.study_file import read_study
from wavedp.cli.study_results import FIGURES, accuracies, spent, table
from wavedp.data import load_digits_dataset, to_unit_range
from wavedp.errors import BadFileError, InvalidValueError, MissingFileError
from wavedp.functional import coarse
from wavedp.models import load_autoregressive, load_tokenizer
from wavedp.training.runs import read_log

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "configs").glob("*-study.toml"))

RECIPE = """
summary = "digits in seconds"
[tokenizer]
data = "glyphs"
num-generated = 40
steps = 2
width = 16
encoder-depth = 1
decoder-depth = 1
heads = 2
[pretrain]
data = "glyphs"
num-generated = 40
tokenizer = "@tokenizer"
scales = 2
steps = 2
width = 16
depth = 1
heads = 2
[finetune]
data = "@data"
hold-out = 150
tokenizer = "@tokenizer"
model = "@pretrain"
epsilon = 8
delta = 1e-5
max-records = 2000
sample-rate = 0.01
steps = 4
expected-batch-size = 13
[sample]
tokenizer = "@tokenizer"
model = "@finetune"
num-images = 40
[evaluate]
protocol = "dpimagebench"
quick = true
epochs = 1
num-seeds = 2
no-distances = true
synthetic = "@sample"
data = "@data"
"""
ROWS = """
summary = "four rows"
recipe = "recipe.toml"
[all]
finetune = { max-grad-norm = 0.5 }
[[row]]
name = "base"
[[row]]
name = "wide"
note = "twice as wide"
pretrain = { width = 32 }
[[row]]
name = "guided"
sample = { guidance-scale = 2.0 }
[[row]]
name = "one scale"
pretrain = { scales = 1 }
finetune = { trainable = "heads" }
evaluate = false
"""
COMMON = ["--no-progress", "--threads", "1"]


def write(folder: Path, rows: str = ROWS, recipe: str = RECIPE) -> Path:
    (folder / "recipe.toml").write_text(recipe)
    (folder / "study.toml").write_text(rows)
    return folder / "study.toml"


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def options(stages: tuple[Stage, ...], name: str) -> dict[str, Any]:
    return dict(next(stage.options for stage in stages if stage.name == name))


def test_rows_are_the_recipe_with_overrides(tmp_path: Path) -> None:
    rows = """
        recipe = "recipe.toml"
        [all]
        finetune = { steps = 9, save-every = 3 }
        [[row]]
        name = "base"
        [[row]]
        name = "changed"
        note = "several"
        finetune = { steps = 1, epsilon = false, noise-multiplier = 2.5, save-every = false }
        sample = false
        evaluate = { synthetic = "elsewhere", quick = false }
    """
    found = read_study(write(tmp_path, rows))
    base, changed = found.rows
    assert (base.name, base.note, changed.note) == ("base", "", "several")
    assert base.recipe.stages == found.base.stages
    assert options(base.recipe.stages, "finetune")["steps"] == 9
    assert options(base.recipe.stages, "finetune")["epsilon"] == 8
    assert [stage.name for stage in changed.recipe.stages] == ["tokenizer", "pretrain", "finetune", "evaluate"]
    private = options(changed.recipe.stages, "finetune")
    assert private["steps"] == 1
    assert private["noise-multiplier"] == 2.5
    assert private["delta"] == 1e-5
    assert not {"epsilon", "save-every"} & set(private)
    assert "quick" not in options(changed.recipe.stages, "evaluate")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("[[row]", "not a study in TOML"),
        ('[[row]]\nname = "a"', "recipe must be a text"),
        ('recipe = "recipe.toml"', "needs tables \\[\\[row\\]\\]"),
        ('recipe = "recipe.toml"\nrow = 3', "needs tables"),
        ('recipe = "recipe.toml"\nrow = [3]', "a row must be a table"),
        ('recipe = "recipe.toml"\nsummary = 3\n[[row]]\nname = "a"', "summary must be a text"),
        ('recipe = "recipe.toml"\n[rows]\na = 1\n[[row]]\nname = "a"', "'rows' is none of"),
        ('recipe = "recipe.toml"\n[[row]]\npretrain = false', "name of a row must be a text"),
        ('recipe = "recipe.toml"\n[[row]]\nname = "a, b"', "no comma"),
        ('recipe = "recipe.toml"\n[[row]]\nname = "a"\nnote = 3', "note must be a text"),
        ('recipe = "recipe.toml"\n[[row]]\nname = "a"\n[[row]]\nname = "a"', "two rows are called 'a'"),
        ('recipe = "recipe.toml"\n[[row]]\nname = "a"\npretraining = { width = 8 }', "has no stage 'pretraining"),
        ('recipe = "recipe.toml"\n[all]\npretraining = false\n[[row]]\nname = "a"', "all: the recipe has no stage"),
        ('recipe = "recipe.toml"\nall = 3\n[[row]]\nname = "a"', "all must be a table of overrides"),
        ('recipe = "recipe.toml"\n[[row]]\nname = "a"\npretrain = 3', "pretrain must be a table of options, or false"),
        ('recipe = "recipe.toml"\n[[row]]\nname = "a"\npretrain = { wide = false }', "\\[pretrain\\] has no wide"),
        ('recipe = "recipe.toml"\n[[row]]\nname = "a"\npretrain = { out = "x" }', "sets out"),
        ('recipe = "recipe.toml"\n[[row]]\nname = "a"\npretrain = { width = { a = 1 } }', "must be a text, a number"),
        ('recipe = "recipe.toml"\n[[row]]\nname = "a"\npretrain = false', "'a': \\[finetune\\] refers to @pretrain"),
    ],
)  # fmt: skip
def test_what_is_no_study_is_refused(tmp_path: Path, rows: str, message: str) -> None:
    with pytest.raises(BadFileError, match=message):
        read_study(write(tmp_path, rows))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such study"):
        read_study(tmp_path / "none.toml")
    with pytest.raises(MissingFileError, match=r"no such recipe: .*other\.toml"):
        read_study(write(tmp_path, 'recipe = "other.toml"\n[[row]]\nname = "a"'))


@pytest.mark.parametrize(
    ("change", "extra", "message"),
    [
        (("width = 32", "breadth = 32"), [], "row 'wide', pretrain: wavedp: error: unrecognized arguments: --bread"),
        (("width = 32", "width = -1"), [], "row 'wide', pretrain: wavedp pretrain: error: argument --width: -1 is out"),
        (("", ""), ["--rows", "base,narrow"], "no row 'narrow'; there are base, wide, guided, one scale"),
        (("", ""), ["--rows", ""], "no row ''"),
    ],
)  # fmt: skip
def test_nothing_is_run_where_one_row_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: tuple[str, str], extra: list[str], message: str
) -> None:
    file = write(tmp_path, ROWS.replace(*change))
    assert main(["study", str(file), "--data", "digits", "--out", str(tmp_path / "run"), *extra]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_private_data_must_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", str(write(tmp_path)), "--out", str(tmp_path / "run")]) == 2
    assert "give --data SOURCE" in capsys.readouterr().err


def test_a_row_that_would_tell_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, recipe=RECIPE.replace("hold-out = 150\n", ""))
    assert main(["study", str(file), "--data", "digits", "--out", str(tmp_path / "run"), "--dry-run"]) == 2
    assert "row 'one scale' has nothing to compare" in capsys.readouterr().err


def settings(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**({"data": "digits", "seed": 0, "out": Path("a"), "threads": 1} | changes))


def test_digests_are_of_what_decides_a_result(tmp_path: Path) -> None:
    stages = read_study(write(tmp_path)).base.stages
    known = digests(stages, settings())
    assert all(len(digest) == 64 for digest in known.values())
    assert digests(stages, settings(out=Path("/b/c"), threads=9)) == known
    assert not set(digests(stages, settings(seed=1)).values()) & set(known.values())

    def changed(name: str, **new: Any) -> set[str]:
        """The stages that have another digest when options of one are ``new``."""
        other = [
            Stage(s.name, s.command, {**s.options, **{k.replace("_", "-"): v for k, v in new.items()}})
            if s.name == name
            else s
            for s in stages
        ]
        return {key for key, digest in digests(other, settings()).items() if digest != known[key]}

    assert changed("finetune", save_every=1, physical_batch_size=8) == set()
    assert changed("sample", top_k=3) == {"sample", "evaluate"}
    assert changed("pretrain", width=32) == {"pretrain", "finetune", "sample", "evaluate"}
    assert {key for key, digest in digests(stages, settings(data="faces/")).items() if digest != known[key]} == {
        "finetune",
        "sample",
        "evaluate",
    }
    reversed_options = [Stage(s.name, s.command, dict(reversed(s.options.items()))) for s in stages]
    assert digests(reversed_options, settings()) == known
    renamed = [Stage("again", s.command, s.options) if s.name == "finetune" else s for s in stages]
    assert digests(renamed, settings())["again"] != known["finetune"], "two private runs are not the same run"


class Calls(list[tuple[str, str]]):
    """Stands for the stages' commands: notes command and folder of each that is run; ``failing`` raises there."""

    failing: BaseException | None = None
    at = -1
    pause = 0.0  # seconds

    def __call__(self, parsed: argparse.Namespace) -> None:
        if len(self) == self.at and self.failing is not None:
            self.at = -1
            raise self.failing
        time.sleep(self.pause)
        self.append((parsed.command, parsed.out.name))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    made = Calls()
    for command in ("tokenizer", "pretrain", "finetune", "sample", "evaluate"):
        monkeypatch.setattr(importlib.import_module(f"wavedp.cli.{command}"), "run", made)
    figures = dict.fromkeys(FIGURES) | {"nats_per_token": 2.0}
    monkeypatch.setattr(study, "measure", lambda stages, base, device: figures | {"parameters": len(stages)})
    return made


def test_stages_that_agree_are_run_once(tmp_path: Path, calls: Calls) -> None:
    command = ["study", str(write(tmp_path)), "--data", "digits", *COMMON, "--out"]
    assert main([*command, str(tmp_path / "run")]) == 0
    ran = [name for name, _ in calls]
    assert {name: ran.count(name) for name in ran} == {
        "tokenizer": 1, "pretrain": 3, "finetune": 3, "sample": 4, "evaluate": 3,
    }  # fmt: skip
    assert len(set(calls)) == len(calls)
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())["rows"]
    assert rows["base"]["stages"]["finetune"] == rows["guided"]["stages"]["finetune"]
    assert len({rows[name]["stages"]["finetune"] for name in rows}) == 3
    assert [row["row"] for row in read_csv(tmp_path / "run" / "results.csv")] == ["base", "wide", "guided", "one scale"]

    folders = [folder for _, folder in calls]
    calls.clear()
    assert main([*command, str(tmp_path / "run")]) == 0
    assert calls == []
    (tmp_path / "run").rename(tmp_path / "moved")
    assert main([*command, str(tmp_path / "moved")]) == 0
    assert calls == [], "folders are named independently of --out"
    assert main([*command, str(tmp_path / "moved"), "--seed", "5"]) == 0
    assert len(calls) == 14
    assert not set(folders) & {folder for _, folder in calls}


def test_an_interrupted_study_goes_on(tmp_path: Path, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["study", str(write(tmp_path)), "--data", "digits", *COMMON, "--out", str(tmp_path / "run")]
    calls.failing, calls.at = KeyboardInterrupt(), 6  # the private stage of the second row
    assert main(command) == 130
    assert [name for name, _ in calls] == ["tokenizer", "pretrain", "finetune", "sample", "evaluate", "pretrain"]
    assert [row["row"] for row in read_csv(tmp_path / "run" / "results.csv")] == ["base"]
    calls.failing, calls.at = InvalidValueError("a loss that is not finite"), 6
    assert main(command) == 2
    assert "a loss that is not finite" in capsys.readouterr().err
    assert main(command) == 0
    assert [name for name, _ in calls[6:9]] == ["finetune", "sample", "evaluate"]
    assert len(calls) == 14
    rows = read_csv(tmp_path / "run" / "results.csv")
    assert [row["finetune_attempts"] for row in rows] == ["1", "3", "1", "1"]
    assert [row["evaluate_attempts"] for row in rows] == ["1", "1", "1", ""]


def test_chosen_rows_are_added_to_those_there(tmp_path: Path, calls: Calls) -> None:
    file, out = write(tmp_path), tmp_path / "run"
    command = ["study", str(file), "--data", "digits", *COMMON, "--out", str(out)]
    assert main([*command, "--rows", "guided"]) == 0
    assert main([*command, "--rows", "base"]) == 0
    assert len(calls) == 7
    assert [row["row"] for row in read_csv(out / "results.csv")] == ["base", "guided"]
    write(tmp_path, ROWS.replace("guidance-scale = 2.0", "guidance-scale = 3.0"))
    assert main([*command, "--rows", "base"]) == 0
    assert [row["row"] for row in read_csv(out / "results.csv")] == ["base"], "the other is of another study now"


def test_two_runs_at_once_share_the_stages(tmp_path: Path, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["study", str(write(tmp_path)), "--data", "digits", *COMMON, "--out", str(tmp_path / "run")]
    calls.pause = 0.2
    with ThreadPoolExecutor() as pool:
        assert set(pool.map(main, [[*command, "--rows", rows] for rows in ("base,wide", "guided,one scale")])) == {0}
    assert len(set(calls)) == len(calls) == 14
    assert "waiting for the process that runs it" in capsys.readouterr().out
    rows = read_csv(tmp_path / "run" / "results.csv")
    assert [row["row"] for row in rows] == ["base", "wide", "guided", "one scale"]
    assert {row["tokenizer_attempts"] for row in rows} == {"1"}


def test_a_study_and_a_recipe_keep_out_of_each_other_s_folder(
    tmp_path: Path, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    file, common = write(tmp_path), ["--data", "digits", *COMMON]
    assert main(["study", str(file), *common, "--out", str(tmp_path / "study")]) == 0
    assert main(["recipe", str(tmp_path / "recipe.toml"), *common, "--out", str(tmp_path / "recipe")]) == 0
    before = (tmp_path / "recipe" / "summary.json").read_bytes()
    capsys.readouterr()
    assert main(["recipe", str(tmp_path / "recipe.toml"), *common, "--out", str(tmp_path / "study")]) == 2
    assert "belongs to a run of 'wavedp study'" in capsys.readouterr().err
    assert main(["study", str(file), *common, "--out", str(tmp_path / "recipe")]) == 2
    assert "belongs to a run of 'wavedp recipe'" in capsys.readouterr().err
    assert (tmp_path / "recipe" / "summary.json").read_bytes() == before
    assert not (tmp_path / "recipe" / "stages").exists()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study whose process was killed in its first private stage and whose command was repeated."""
    folder = tmp_path_factory.mktemp("study")
    long = RECIPE.replace("steps = 4\n", "steps = 60\nsave-every = 2\n")
    out = folder / "run"
    command = ["study", str(write(folder, recipe=long)), "--data", "digits", *COMMON, "--out", str(out)]
    process = subprocess.Popen([sys.executable, "-m", "wavedp", *command], stdout=subprocess.DEVNULL, cwd=ROOT)
    deadline = time.monotonic() + 120
    while not list(out.glob("stages/finetune-*/checkpoint/*")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "results.csv").exists()
    assert main(command) == 0
    return out


def test_a_killed_private_stage_is_taken_up(done: Path) -> None:
    summary = json.loads((done / "summary.json").read_text())
    times = summary["rows"]["base"]["times"]
    assert times["finetune"]["attempts"] == 2
    assert times["tokenizer"]["attempts"] == 1
    private = done / "stages" / summary["rows"]["base"]["stages"]["finetune"]
    statement = json.loads((private / "privacy.json").read_text())
    assert statement["steps_charged"] == statement["steps_planned"] == 60, "charged once, not anew"
    assert 60 - 4 <= len(read_log(private / "log.csv")) <= 60  # without steps that the kill took before their line


def by_hand(model_folder: Path, tokenizer_folder: Path) -> tuple[float, int]:
    """Nats per image of the last 150 images of the training split, and parameters, from logits."""
    images = load_digits_dataset(32, split="train")
    last = range(len(images) - 150, len(images))
    model = load_autoregressive(model_folder / "model")
    tokenizer = load_tokenizer(tokenizer_folder / "model")
    config, n = model.config, model.config.tokens_per_scale
    pixels = to_unit_range(images.stack(last))
    skipped = tokenizer.layout.num_scales - config.num_scales
    labels = images.labels[torch.tensor(last)]
    with torch.no_grad():
        tokens = tokenizer.encode(coarse(pixels, skipped) * 0.5**skipped)
        hidden = model.hidden(labels, tokens[:, :-1])
        nats = torch.zeros(150)
        for position in range(config.length):
            logits = model.head(position)(hidden[:, position])
            nats += F.cross_entropy(logits, tokens[:, position], reduction="none")
    assert tokens.shape[1] == config.num_scales * n
    return float(nats.mean()), sum(p.numel() for p in model.state_dict().values())


def test_the_figures_are_those_of_the_folders(done: Path) -> None:
    rows = {row["row"]: row for row in read_csv(done / "results.csv")}
    stages = {name: row["stages"] for name, row in json.loads((done / "summary.json").read_text())["rows"].items()}
    assert list(rows) == ["base", "wide", "guided", "one scale"]
    for name, row in rows.items():
        folders = {stage: done / "stages" / folder for stage, folder in stages[name].items()}
        nats, parameters = by_hand(folders["finetune"], folders["tokenizer"])
        assert float(row["nats_per_image"]) == pytest.approx(nats, rel=1e-4)
        assert float(row["nats_per_token"]) == pytest.approx(nats / int(row["tokens"]), rel=1e-4)
        assert int(row["parameters"]) == parameters
        assert row["held_out_images"] == "150"
        statement = json.loads((folders["finetune"] / "privacy.json").read_text())
        for figure in ("epsilon", "delta", "noise_multiplier"):
            assert float(row[figure]) == statement[figure]
        total = 0.0
        for stage, folder in folders.items():
            record = json.loads((folder / "stage.json").read_text())
            assert float(row[f"{stage}_seconds"]) == record["seconds"]
            assert float(row[f"{stage}_cpu_seconds"]) == record["cpu_seconds"]
            total += record["seconds"]
        assert float(row["seconds"]) == pytest.approx(total, abs=0.051)
        assert row["private"] == "False"
        if name == "one scale":
            assert row["accuracy_mean"] == row["evaluate_seconds"] == ""
            continue
        tested = json.loads((folders["evaluate"] / "metrics.json").read_text())["classifiers"]
        values = [result["accuracy"] for result in tested]
        assert len(values) == 2
        assert float(row["accuracy_mean"]) == pytest.approx(sum(values) / 2)
        assert float(row["accuracy_std"]) == pytest.approx(abs(values[0] - values[1]) / 2)
        assert float(row["accuracy_max"]) == max(values)
    assert (rows["base"]["tokens"], rows["one scale"]["tokens"]) == ("32", "16")
    assert rows["base"]["trained_parameters"] == rows["base"]["parameters"]
    assert int(rows["one scale"]["trained_parameters"]) == 17 * 128  # the approximation head: width 16, 128 codes
    assert rows["base"]["nats_per_token"] == rows["guided"]["nats_per_token"]


def test_what_is_spent_is_the_sum_of_the_private_runs(done: Path) -> None:
    summary = json.loads((done / "summary.json").read_text())
    statements = [json.loads(path.read_text()) for path in (done / "stages").glob("*/privacy.json")]
    assert summary["spent"]["private_runs"] == len(statements) == 3
    assert summary["spent"]["epsilon"] == pytest.approx(sum(statement["epsilon"] for statement in statements))
    assert summary["spent"]["delta"] == pytest.approx(3e-5)
    assert summary["private"] is False
    assert "NOT private" in summary["note"]
    assert "budget of its own" in summary["note"]


def test_the_picture_has_a_dot_for_every_row(done: Path) -> None:
    from PIL import Image

    with Image.open(done / "results.png") as picture:
        colours = {colour: count for count, colour in picture.convert("RGB").getcolors(2**24)}
    assert colours[31, 119, 180] > 4 * 20


def test_a_public_model_is_measured_on_the_private_images_held_out(done: Path, tmp_path: Path) -> None:
    rows = 'recipe = "recipe.toml"\n[[row]]\nname = "public"\nfinetune = false\nsample = false\nevaluate = false\n'
    command = ["study", str(write(tmp_path, rows)), "--data", "digits", *COMMON, "--out", str(tmp_path / "run")]
    assert main(command) == 0
    (row,) = read_csv(tmp_path / "run" / "results.csv")
    folders = json.loads((tmp_path / "run" / "summary.json").read_text())["rows"]["public"]["stages"]
    nats, _ = by_hand(*(tmp_path / "run" / "stages" / folders[name] for name in ("pretrain", "tokenizer")))
    assert float(row["nats_per_image"]) == pytest.approx(nats, rel=1e-4)
    assert row["epsilon"] == ""
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["spent"]["private_runs"] == 0
    base = json.loads((done / "summary.json").read_text())["rows"]["base"]["stages"]
    assert base["pretrain"] == folders["pretrain"], "the digest is the same in another folder"


def spending(out: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((out / "summary.json").read_text())["spent"]
    return found


def test_what_began_stays_spent(tmp_path: Path, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    """Whether it broke off, was removed, was charged elsewhere, or is in the study no more."""
    shared = ROWS.replace("max-grad-norm = 0.5", 'max-grad-norm = 0.5, ledger = "l.jsonl", budget = [30, 1e-3]')
    file, out = write(tmp_path, shared), tmp_path / "run"
    command = ["study", str(file), "--data", "digits", *COMMON, "--out", str(out)]
    calls.failing, calls.at = InvalidValueError("broken off"), 2
    assert main([*command, "--rows", "base"]) == 2
    assert "1 private runs" in capsys.readouterr().out
    assert spending(out)["private_runs"] == 1
    assert 7.9 < spending(out)["epsilon"] <= 8
    assert main([*command, "--rows", "base"]) == 0
    assert spending(out)["private_runs"] == 1, "the same run, taken up"
    one = spending(out)
    write(tmp_path)
    assert main([*command, "--rows", "wide"]) == 0
    assert spending(out)["private_runs"] == 2
    assert spending(out)["epsilon"] == pytest.approx(2 * one["epsilon"], rel=1e-2)
    (folder,) = {name for command_name, name in calls if command_name == "finetune"} - {
        json.loads((out / "summary.json").read_text())["rows"]["base"]["stages"]["finetune"]
    }
    shutil.rmtree(out / "stages" / folder)
    capsys.readouterr()
    assert main([*command, "--rows", "wide"]) == 2
    assert "another stage that is gone" in capsys.readouterr().err, (
        "samples of the removed model are not its successor's"
    )
    assert spending(out)["private_runs"] == 3
    assert spending(out)["delta"] == pytest.approx(3e-5)


def test_a_row_is_measured_anew_after_its_model_was_replaced(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 'recipe = "recipe.toml"\n[[row]]\nname = "a"\nsample = false\nevaluate = false\n'
    command = ["study", str(write(tmp_path, rows)), "--data", "digits", *COMMON, "--out", str(tmp_path / "run")]
    assert main(command) == 0
    monkeypatch.setattr(study, "measure", lambda *_: dict.fromkeys(FIGURES) | {"nats_per_token": 3.0})
    assert main(command) == 0
    assert [row["nats_per_token"] for row in read_csv(tmp_path / "run" / "results.csv")] == ["2.0"]
    shutil.rmtree(next((tmp_path / "run" / "stages").glob("finetune-*")))
    assert main(command) == 0
    assert [row["nats_per_token"] for row in read_csv(tmp_path / "run" / "results.csv")] == ["3.0"]
    assert spending(tmp_path / "run")["private_runs"] == 2


def test_the_cost_of_all_runs_is_their_sum() -> None:
    assert spent([{"epsilon": 8.0, "delta": 1e-5}, {"epsilon": 1.5, "delta": 2e-5}]) == {
        "private_runs": 2, "epsilon": 9.5, "delta": pytest.approx(3e-5),
    }  # fmt: skip
    assert spent([]) == {"private_runs": 0, "epsilon": 0.0, "delta": 0.0}


def test_accuracies_of_both_protocols() -> None:
    small = {"synthetic": {"accuracy": 0.5, "std": 0.1, "runs": [{"accuracy": 0.4}, {"accuracy": 0.6}]}}
    assert accuracies(small) == {"accuracy_mean": 0.5, "accuracy_std": 0.1, "accuracy_max": 0.6}
    bench = {
        "accuracy": {"mean": 0.5, "std": 0.1, "maximum": 0.7},
        "distances": {"in_trained_features": {"frechet_distance": 8.5}},
    }
    assert accuracies(bench) == {
        "accuracy_mean": 0.5,
        "accuracy_std": 0.1,
        "accuracy_max": 0.7,
        "frechet_distance": 8.5,
    }


def test_the_table_is_aligned_and_shows_what_is_missing() -> None:
    row = dict.fromkeys(FIGURES) | {"row": "base", "seconds": 90.0, "parameters": 12345}
    full = row | {"row": "b", "epsilon": 9.95, "nats_per_token": 2.5, "accuracy_mean": 0.5, "accuracy_std": 0.01}
    lines = table([row, full | {"accuracy_max": 0.625}]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["base", "-", "12,345", "-", "-", "-", "-", "-", "1.5"]
    assert lines[2].split() == ["b", "9.95", "12,345", "-", "2.5000", "-", "50.00", "+-", "1.00", "62.50", "1.5"]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_of_the_project_are_accepted(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", str(path), "--data", "fashion", "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    printed = capsys.readouterr().out.splitlines()
    found = read_study(path)
    assert [line for line in printed if line.startswith("# base")]
    private = [line for line in printed if line.startswith("wavedp finetune")]
    assert len(private) == len(set(private)) > 20
    assert f"# {len(found.rows)} rows" in printed[-1]
    assert f"; {len(private)} are private runs, each with its own budget" in printed[-1]
    assert sum(line.startswith("wavedp") for line in printed) < 4.5 * len(found.rows)
    assert not (tmp_path / "run").exists()


def test_there_is_a_study() -> None:
    assert STUDIES
