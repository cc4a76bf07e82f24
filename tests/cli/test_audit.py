# SPDX-License-Identifier: Apache-2.0
"""`wavedp audit`: a run's folder in, a table, JSON, a picture and an exit status out; nothing of the run changes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from wavedp.audit import open_run
from wavedp.cli import EXIT_ERROR, main
from wavedp.data import TensorImageDataset
from wavedp.models import (
    AutoregressiveConfig,
    AutoregressiveTransformer,
    SpectralTokenizer,
    SpectralTokenizerConfig,
)
from wavedp.privacy import PrivacySpec
from wavedp.storage import write_json
from wavedp.training.private import PrivateTrainingConfig, finetune_private

SPEC = PrivacySpec(
    sample_rate=0.3,
    steps=6,
    noise_multiplier=1.0,
    max_grad_norm=0.5,
    expected_batch_size=6.0,
    delta=1e-3,
    dataset_size_bound=150,
)
FAST = ["--canaries", "60", "--no-progress", "--confidence", "0.999999"]  # fresh keys: no false alarm by chance


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small private run, of the heads alone."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (20, 1, 16, 16), generator=generator, dtype=torch.uint8)
    dataset = TensorImageDataset(images, torch.arange(20) % 2, classes=("a", "b"), name="tiny")
    tokenizer = SpectralTokenizer(SpectralTokenizerConfig(image_size=16, levels=2, grid=2, width=16, heads=2)).eval()
    model = AutoregressiveTransformer(AutoregressiveConfig(2, 4, 1, 256, 256, width=16, depth=1, heads=2))
    config = PrivateTrainingConfig(trainable="approximation_head")
    finetune_private(dataset, tokenizer, model, SPEC, config, folder, progress=False)
    write_json(folder / "run.json", {"command": "finetune", "trainable": "approximation_head"})
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "mine"))


def answer(capsys: pytest.CaptureFixture[str], run: Path, *options: str) -> dict[str, Any]:
    assert main(["audit", str(run), *FAST, "--json", *options]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_a_run_is_audited_and_left_as_it_was(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["audit", str(run), *FAST, "--repeats", "2", "--confidence", "0.999"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Audit of 6 of the run's 6 steps: 2 runs of 60 canaries, ")
    assert "the run's data were not opened, and nothing was charged to its ledger" in shown
    assert f"claimed by the run:      epsilon <= {SPEC.epsilon():.4f}" in shown
    assert [line.split()[0] for line in shown.splitlines() if "99.97 %" in line] == ["z-test", "guesses", "one"]
    assert shown.rstrip().splitlines()[-1].startswith("No violation: ")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_the_runs_own_specification_and_parameters_are_used(run: Path) -> None:
    found = open_run(run)
    assert found.spec == SPEC
    assert found.claimed == SPEC.epsilon()
    trained = {name for name, p in found.model.named_parameters() if p.requires_grad}
    assert trained == {"approximation_head.weight", "approximation_head.bias"}


def test_json_has_every_bound_beside_the_claim(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, run, "--steps", "2", "--confidence", "0.97")
    assert [bound["method"] for bound in found["bounds"]] == ["z-test", "guesses", "one run"]
    assert found["bounds"][0]["confidence"] == pytest.approx(0.99)
    assert found["epsilon_at_least"] == max(bound["epsilon"] for bound in found["bounds"])
    assert found["claimed"] == SPEC.epsilon(steps=2) < found["claimed_by_run"] == SPEC.epsilon()
    assert (found["steps"], found["steps_of_run"], found["canaries"], found["violation"]) == (2, 6, 60, False)


def test_as_many_canaries_as_the_bound_allows_unless_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(run), *FAST[2:], "--json", "--steps", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["canaries"] == 150


def test_the_picture_is_one(run: Path, tmp_path: Path) -> None:
    assert main(["audit", str(run), *FAST, "--steps", "2", "--plot", str(tmp_path / "a.png")]) == 0
    with Image.open(tmp_path / "a.png") as image:
        colors = image.convert("RGB").getcolors(1 << 20)
        assert image.size == (1300, 546)
    assert colors is not None
    assert len(colors) > 100
    assert main(["audit", str(run), *FAST, "--plot", str(tmp_path / "a.gif")]) == EXIT_ERROR


def test_half_the_noise_exits_with_1(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = PrivacySpec.stddev_with
    monkeypatch.setattr(PrivacySpec, "stddev_with", lambda self, clipping: 0.5 * right(self, clipping))
    plot = str(tmp_path / "a.png")
    assert main(["audit", str(run), "--canaries", "150", "--repeats", "2", "--no-progress", "--plot", plot]) == 1
    assert "VIOLATION: epsilon is at least" in capsys.readouterr().out


def test_a_statement_that_claims_too_little_is_a_violation(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    statement = json.loads((run / "privacy.json").read_text())
    write_json(run / "privacy.json", {**statement, "epsilon": 0.5})
    assert main(["audit", str(run), "--canaries", "150", "--repeats", "2", "--no-progress"]) == 1
    assert "VIOLATION" in capsys.readouterr().out


def test_a_small_noise_multiplier_in_the_ledger_is_not_the_statements(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = run / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace('"noise_multiplier": 1.0', '"noise_multiplier": 2.0'))
    assert main(["audit", str(run), *FAST]) == EXIT_ERROR
    assert "another specification" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("privacy.json", None, "has no privacy.json: give the folder of a finished 'wavedp finetune'"),
        ("ledger.jsonl", None, "has no ledger.jsonl"),
        ("privacy.json", "[]", "is not a privacy statement"),
        ("privacy.json", "{", "is not valid JSON"),
        ("ledger.jsonl", "", "does not begin with a specification"),
        ("ledger.jsonl", "[1]\n", "does not begin with a specification"),
        ("run.json", '{"trainable": "nothing"}', "matches no parameter"),
    ],
)
def test_a_spoiled_folder_is_one_sentence(
    run: Path, file: str, content: str | None, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / file).unlink()
    if content is not None:
        (run / file).write_text(content)
    assert main(["audit", str(run), *FAST]) == EXIT_ERROR
    assert complaint in capsys.readouterr().err


def test_a_folder_above_the_run_is_told_apart(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(run.parent), *FAST]) == EXIT_ERROR
    assert f"{run} has a ledger" in capsys.readouterr().err
