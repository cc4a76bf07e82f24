# SPDX-License-Identifier: Apache-2.0
"""`wavedp study`: stages that rows share, what is run again, what is spent; with stages that do nothing."""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from small_runs import COMMON, ROWS, read_csv, write

from wavedp.cli import main, study
from wavedp.cli.study_results import FIGURES
from wavedp.errors import InvalidValueError


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


def test_a_row_stays_where_its_images_are_not_named_and_goes_where_they_are_others(
    tmp_path: Path, calls: Calls
) -> None:
    photographs = '[[row]]\nname = "photographs"\npretrain = { data = "@public", num-generated = false }\n'
    file, out = write(tmp_path, ROWS + photographs), tmp_path / "run"
    command = ["study", str(file), "--data", "digits", *COMMON, "--out", str(out)]

    def shown(*extra: str) -> list[str]:
        assert main([*command, *extra]) == 0
        summary = json.loads((out / "summary.json").read_text())["rows"]
        assert "photographs" in summary, "it was measured, whatever is shown"
        return [row["row"] for row in read_csv(out / "results.csv")]

    both = ["base", "photographs"]
    assert shown("--public", "photos", "--rows", "base,photographs") == both
    calls.clear()
    assert shown("--rows", "base") == both
    assert shown("--public", "photos", "--rows", "base") == both
    assert shown("--public", "others", "--rows", "base") == ["base"]
    assert shown("--rows", "base") == both
    assert calls == []
    write(tmp_path, ROWS + photographs.replace("false }", "false, depth = 2 }"))
    assert shown("--rows", "base") == ["base"], "another row of this name"
    rows = json.loads((out / "summary.json").read_text())["rows"]
    assert [rows[name]["sources"] for name in both] == [{"data": "digits"}, {"data": "digits", "public": "photos"}]


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


def test_a_row_of_an_earlier_version_is_shown_and_measured_anew_when_it_is_run(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    command = ["study", str(write(tmp_path)), "--data", "digits", *COMMON, "--out", str(out), "--rows"]
    assert main([*command, "base,wide"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    for row in summary["rows"].values():
        del row["figures"]["nats_given_class"], row["sources"]
    (out / "summary.json").write_text(json.dumps(summary))
    monkeypatch.setattr(study, "measure", lambda *_: dict.fromkeys(FIGURES) | {"nats_given_class": True})
    calls.clear()
    assert main([*command, "base"]) == 0
    assert calls == []
    rows = read_csv(out / "results.csv")
    assert [(row["row"], row["nats_given_class"]) for row in rows] == [("base", "True"), ("wide", "")]
    assert [row["nats_per_token"] for row in rows] == ["", "2.0"]
