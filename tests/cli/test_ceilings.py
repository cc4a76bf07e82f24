# SPDX-License-Identifier: Apache-2.0
"""`wavedp ceilings`: every stage is measured, once, with as many images."""

import csv
from pathlib import Path

import pytest
from small_runs import public_stages

from wavedp.cli import main
from wavedp.errors import InvalidValueError
from wavedp.models import load_autoregressive
from wavedp.privacy import PrivacySpec
from wavedp.training.private import PrivateTrainingConfig, finetune_private

RECIPE = (
    public_stages(2, num_generated=30, steps=1)
    + """
[espcn]
data = "glyphs"
num-generated = 30
scale = 2
width = 4
steps = 1
"""
)
STAGES = [
    "real",
    "coarse, bicubic",
    "coarse, super-resolved",
    "tokens, super-resolved",
    "public model",
    "fine-tuned without privacy",
    "private, run",
]


def test_every_stage_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    common = ["--no-progress", "--threads", "1"]
    assert main(["recipe", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run"), *common]) == 0
    command = ["ceilings", "--data", "digits", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    command += [
        "--also",
        str(tmp_path / "run" / "pretrain"),
        "--num-images",
        "60",
        "--epochs",
        "1",
        "--steps",
        "1",
        *common,
    ]
    assert main(command) == 0
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["stage"] for row in rows] == STAGES
    assert {row["images"] for row in rows} == {"60"}
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows)

    from PIL import Image

    with Image.open(tmp_path / "out" / "grid.png") as picture:
        assert picture.width >= 10 * 64
        assert picture.height >= len(STAGES) * 64

    model = load_autoregressive(tmp_path / "out" / "fine-tuned" / "model")
    assert model.config.privately_trained, "what learnt from real images must not pass for a public model"
    spec = PrivacySpec(
        noise_multiplier=1.0, sample_rate=0.1, steps=1, max_grad_norm=1.0, expected_batch_size=1.0, delta=1e-5,
        dataset_size_bound=10,
    )  # fmt: skip
    from wavedp.data import load_digits_dataset
    from wavedp.models import load_tokenizer

    with pytest.raises(InvalidValueError, match="already fine-tuned"):
        finetune_private(
            load_digits_dataset(32, split="train"), load_tokenizer(tmp_path / "run" / "tokenizer" / "model"), model,
            spec, PrivateTrainingConfig(), tmp_path / "finetune", progress=False,
        )  # fmt: skip

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "classifiers").rglob("result.json")}
    assert len(before) == len(STAGES)
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
