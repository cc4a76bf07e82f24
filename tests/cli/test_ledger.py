# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning runs that share a ledger from the command line, and `wavedp ledger`, which shows what they spent."""

import json
import shutil
from pathlib import Path

import pytest

from wavedp.cli import EXIT_ERROR, main
from wavedp.privacy import PrivacyBudget, PrivacyLedger, PrivacySpec, read_ledger
from wavedp.storage import read_json

PRIVACY = ["--noise-multiplier", 2, "--delta", 1e-5, "--max-records", 2000, "--sample-rate", 0.01, "--steps", 2]
PRIVACY += ["--expected-batch-size", 16, "--trainable", "norm"]


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("public")
    small = ["--width", 16, "--encoder-depth", 1, "--decoder-depth", 1, "--grid", 2, "--approximation-codes", 16]
    data = ["--data", "glyphs", "--image-size", 16, "--channels", 1, "--levels", 2]
    assert run("tokenizer", *data, "--out", out / "tok", *small, "--steps", 2, "--no-progress") == 0
    model = ["--width", 16, "--depth", 1, "--heads", 2, "--steps", 2, "--no-progress"]
    assert run("pretrain", "--data", "glyphs", "--tokenizer", out / "tok", "--out", out / "pre", *model) == 0
    return out


def test_a_third_run_on_the_same_images_is_refused(
    public: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = tmp_path / "digits.jsonl"

    def finetune(out: str, *options: object) -> int:
        models = ["--tokenizer", public / "tok", "--model", public / "pre", "--out", tmp_path / out, "--no-progress"]
        return run("finetune", "--data", "digits", *models, *PRIVACY, *options)

    assert finetune("a", "--ledger", ledger) == EXIT_ERROR
    assert "a new one that runs share needs a budget" in capsys.readouterr().err
    assert finetune("b", "--budget", 2, 1e-5) == EXIT_ERROR
    assert "give --ledger FILE" in capsys.readouterr().err
    one = PrivacySpec(
        noise_multiplier=2.0, delta=1e-5, dataset_size_bound=2000, sample_rate=0.01, steps=2, expected_batch_size=16.0,
        max_grad_norm=1.0,
    ).epsilon()  # fmt: skip
    assert finetune("a", "--ledger", ledger, "--composition", "joint") == EXIT_ERROR
    assert "--composition is chosen with --budget" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert finetune("c", "--ledger", ledger, "--budget", 2.5 * one, 3e-5) == 0
    assert finetune("d", "--ledger", ledger, "--run-name", "second") == 0
    statement = read_json(tmp_path / "d" / "privacy.json")
    assert statement["epsilon"] == pytest.approx(one)
    assert statement["ledger_runs"] == 2
    assert statement["ledger_epsilon"] == pytest.approx(2 * one)
    assert statement["ledger_delta"] == pytest.approx(2e-5)
    assert any(s.startswith("With all 2 runs that the ledger records, added up") for s in statement["charged"])
    assert "The ledger holds every run on these images; others add to it." in statement["assumptions"]
    assert not (tmp_path / "d" / "ledger.jsonl").exists()
    capsys.readouterr()
    assert finetune("e", "--ledger", ledger) == EXIT_ERROR
    assert "privacy budget exhausted" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()
    assert list(read_ledger(ledger).runs) == [str((tmp_path / "c").resolve()), "second"]
    assert finetune("d", "--ledger", ledger, "--run-name", "second") == 0  # finished: nothing more is charged
    assert read_ledger(ledger).runs["second"].charged == 2


@pytest.fixture
def shared(tmp_path: Path) -> tuple[Path, PrivacySpec]:
    spec = PrivacySpec(
        sample_rate=0.1, steps=5, noise_multiplier=2.0, max_grad_norm=1.0, expected_batch_size=8.0, delta=1e-5,
        dataset_size_bound=100, label_noise_multiplier=9.0,
    )  # fmt: skip
    budget = PrivacyBudget(epsilon=20.0, delta=1e-4, composition="joint")
    for name in ("first", "second"):
        with PrivacyLedger(tmp_path / "shared", spec, budget=budget, run=name) as ledger:
            ledger.release("label_histogram")
            ledger.reserve(3)
    return tmp_path / "shared", spec


def test_what_was_spent_is_shown(shared: tuple[Path, PrivacySpec], capsys: pytest.CaptureFixture[str]) -> None:
    path, spec = shared
    assert run("ledger", path) == 0
    text = capsys.readouterr().out
    assert f"second: 3 of 5 steps charged; epsilon {spec.epsilon():.6g} at delta 1e-05" in text
    assert "released once: label_histogram" in text
    assert "budget: epsilon 20 at delta 0.0001, joint composition" in text
    assert run("ledger", path, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert [run["run"] for run in answer["runs"]] == ["first", "second"]
    assert answer["epsilon"] == PrivacyBudget(**answer["budget"]).spent([spec, spec])[0]
    with PrivacyLedger(path.with_name("single"), spec):
        assert run("ledger", path.with_name("single"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["epsilon"] == spec.epsilon()


def test_a_fork_is_an_error(shared: tuple[Path, PrivacySpec], capsys: pytest.CaptureFixture[str]) -> None:
    path, spec = shared
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    with PrivacyLedger(path, spec, run="first") as ledger:
        ledger.reserve(1)
    assert run("ledger", path, "--copy", copy) == 0
    assert "the first 7 lines are the same" in capsys.readouterr().out
    with PrivacyLedger(copy, spec, run="second") as ledger:
        ledger.reserve(1)
    assert run("ledger", path, "--copy", copy) == EXIT_ERROR
    assert "were one ledger up to line 7 and were continued apart" in capsys.readouterr().err
