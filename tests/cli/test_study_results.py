# SPDX-License-Identifier: Apache-2.0
"""The figures of a study's rows: of a small one that was killed and went on, and of made-up results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_runs import COMMON, RECIPE, read_csv, write

from wavedp.cli import main
from wavedp.cli.study_results import FIGURES, accuracies, spent, table
from wavedp.data import load_digits_dataset, to_unit_range
from wavedp.functional import coarse
from wavedp.models import load_autoregressive, load_tokenizer
from wavedp.training.runs import read_log

ROOT = Path(__file__).parents[2]


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


def by_hand(model_folder: Path, tokenizer_folder: Path, *, given_class: bool = True) -> tuple[float, int]:
    """Nats per image of the last 150 images of the training split, and parameters, from logits."""
    images = load_digits_dataset(32, split="train")
    last = range(len(images) - 150, len(images))
    model = load_autoregressive(model_folder / "model")
    tokenizer = load_tokenizer(tokenizer_folder / "model")
    config, n = model.config, model.config.tokens_per_scale
    pixels = to_unit_range(images.stack(last))
    skipped = tokenizer.layout.num_scales - config.num_scales
    labels = images.labels[torch.tensor(last)] if given_class else torch.full((150,), config.num_classes)
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
        assert row["nats_given_class"] == "True"
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


def test_a_public_model_of_other_classes_is_measured_without_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many of other names, which labels would be taken for, or fewer."""
    rows = 'recipe = "recipe.toml"\n[all]\nsample = false\nevaluate = false\n'
    for name in ("abcdefghij", "abc"):
        rows += f'[[row]]\nname = "{name}"\nfinetune = false\npretrain = {{ classes = "{",".join(name)}" }}\n'
    command = ["study", str(write(tmp_path, rows)), "--data", "digits", *COMMON, "--out", str(tmp_path / "run")]
    assert main(command) == 0
    shown = capsys.readouterr().out
    stages = json.loads((tmp_path / "run" / "summary.json").read_text())["rows"]
    for row in read_csv(tmp_path / "run" / "results.csv"):
        folders = {name: tmp_path / "run" / "stages" / folder for name, folder in stages[row["row"]]["stages"].items()}
        nats, _ = by_hand(folders["pretrain"], folders["tokenizer"], given_class=False)
        assert float(row["nats_per_image"]) == pytest.approx(nats, rel=1e-4)
        assert row["nats_given_class"] == "False"
        assert row["held_out_images"] == "150"
    assert shown.count(" (no class)") == 2


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
