# SPDX-License-Identifier: Apache-2.0
"""Study files: overrides, what is refused, and the digests by which rows share stages."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from small_runs import RECIPE, ROWS, write

from wavedp.cli import main
from wavedp.cli.recipe_file import Stage
from wavedp.cli.recipe_stages import digests
from wavedp.cli.study_file import read_study
from wavedp.errors import BadFileError, MissingFileError

STUDIES = sorted((Path(__file__).parents[2] / "configs").glob("*-study.toml"))


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
    return argparse.Namespace(
        **({"data": "digits", "public": None, "seed": 0, "out": Path("a"), "threads": 1} | changes)
    )


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


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_of_the_project_are_accepted(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["study", str(path), "--data", "fashion", "--out", str(tmp_path / "run"), "--dry-run"]
    assert main(line) == 2
    assert "row 'photographs' needs public images: give --public SOURCE" in capsys.readouterr().err
    assert main([*line, "--rows", "base"]) == 0  # which needs none
    capsys.readouterr()
    assert main([*line, "--public", "photographs"]) == 0
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
