# SPDX-License-Identifier: Apache-2.0
"""Recipes and a study that run in seconds, for the tests of the commands that run several stages."""

from __future__ import annotations

import csv
from pathlib import Path

COMMON = ["--no-progress", "--threads", "1"]


def public_stages(scales: int, *, num_generated: int = 40, steps: int = 2) -> str:
    """A tokenizer and a model of so many scales, of glyphs."""
    return f"""
[tokenizer]
data = "glyphs"
num-generated = {num_generated}
steps = {steps}
width = 16
encoder-depth = 1
decoder-depth = 1
heads = 2
[pretrain]
data = "glyphs"
num-generated = {num_generated}
tokenizer = "@tokenizer"
scales = {scales}
steps = {steps}
width = 16
depth = 1
heads = 2
"""


PRIVATE = """
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
RECIPE = 'summary = "digits in seconds"' + public_stages(2) + PRIVATE
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


def write(folder: Path, rows: str = ROWS, recipe: str = RECIPE) -> Path:
    """A study and its recipe; the study's file."""
    (folder / "recipe.toml").write_text(recipe)
    (folder / "study.toml").write_text(rows)
    return folder / "study.toml"


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
