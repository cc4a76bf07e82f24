# SPDX-License-Identifier: Apache-2.0
"""`wavedp recipe`: the file, the order of the stages, what is run again and what is not."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from small_runs import public_stages

from wavedp.cli import build_parser, main
from wavedp.cli.recipe_file import Stage, read_recipe
from wavedp.cli.recipe_stages import command_line
from wavedp.errors import BadFileError, MissingFileError
from wavedp.storage import weights_digest

CONFIGS = [path for path in sorted((Path(__file__).parents[2] / "configs").glob("*.toml")) if "study" not in path.stem]

SMALL = (
    'summary = "digits in seconds"'
    + public_stages(1)
    + """
[finetune]
data = "@data"
tokenizer = "@tokenizer"
model = "@pretrain"
epsilon = 8
delta = 1e-5
max-records = 2000
sample-rate = 0.01
steps = 2
expected-batch-size = 14
[sample]
tokenizer = "@tokenizer"
model = "@finetune"
num-images = 20
"""
)


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def test_values_become_a_command_line() -> None:
    options = {
        "steps": 3,
        "no-ceiling": True,
        "skip-bad": False,
        "budget": [8, 1e-5],
        "data": "@data",
        "sr": "@espcn/x",
    }
    line = Stage("final", "evaluate", options).arguments(Path("runs"), {"data": "there", "public": "elsewhere"})
    assert line == [
        "evaluate",
        "--steps=3",
        "--no-ceiling",
        "--budget",
        "8",
        "1e-05",
        "--data=there",
        "--sr=runs/espcn/x",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no stage"),
        ("[tokenizer", "not a recipe in TOML"),
        ("summary = 3\n[tokenizer]", "summary must be a text"),
        ("tokenizer = 3", "must be a table"),
        ('[final]\nsteps = 1', "none of"),
        ('[demo]', "none of"),
        ('[tokenizer]\nout = "x"', "sets out"),
        ('[tokenizer]\nsteps = {a = 1}', "must be a text"),
        ('[sample]\nmodel = "@finetune"\n[finetune]', "no stage before it"),
        ('[data]\ncommand = "sample"', r"\[data\] cannot name a stage: @data stands for the images of --data; give"),
        ('[public]\ncommand = "sample"', r"\[public\] cannot name a stage: @public stands for the images of --public"),
        ('["../x"]\ncommand = "sample"', "cannot name a stage, whose folder it is: use letters"),
    ],
)  # fmt: skip
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BadFileError, match=message):
        read_recipe(write(tmp_path, text))


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such recipe"):
        read_recipe(tmp_path / "none.toml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_recipes_of_the_project_are_accepted(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipe", str(path), "--data", "digits", "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed] == [stage.command for stage in read_recipe(path).stages]
    assert not (tmp_path / "run").exists()


def test_an_unknown_option_is_refused_before_the_first_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write(tmp_path, SMALL.replace("num-images", "number-of-images"))
    assert main(["recipe", str(recipe), "--data", "digits", "--out", str(tmp_path / "run")]) == 2
    assert "number-of-images" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("max-records = 200000", "delta"),
        ("sample-rate = 0.01\naugment-shift = 1", "give --augmentations 2"),
    ],
)
def test_constants_of_the_private_stage_are_refused_before_the_first(
    option: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = option.split(" = ")[0]
    lines = [line for line in SMALL.splitlines() if not line.startswith(name)]
    lines.insert(lines.index("[finetune]") + 1, option)
    recipe = write(tmp_path, "\n".join(lines))
    assert main(["recipe", str(recipe), "--data", "digits", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert str(recipe) in said
    assert message in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("names", ["0,0", "", "a,,b"])
def test_class_names_that_are_none_are_refused_before_the_first_stage(
    names: str, stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = "new-classes = true\n" if stage == "finetune" else ""
    recipe = write(tmp_path, SMALL.replace(f"[{stage}]\n", f'[{stage}]\nclasses = "{names}"\n{new}'))
    line = ["recipe", str(recipe), "--data", "digits", "--out", str(tmp_path / "run")]
    for command in ([*line, "--dry-run"], line):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert f"{recipe}: wavedp {stage}: error: argument --classes: class names must be distinct, none of" in said
        assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_public_images_must_be_given_where_the_recipe_asks_for_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write(tmp_path, SMALL.replace('data = "glyphs"\nnum-generated = 40', 'data = "@public"'))
    line = ["recipe", str(recipe), "--data", "digits", "--out", str(tmp_path / "run"), "--dry-run"]
    assert main(line) == 2
    assert f"{recipe} needs public images: give --public SOURCE" in capsys.readouterr().err
    assert main([*line, "--public", "photographs"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in printed[:3]] == ["--data=photographs", "--data=photographs", "--data=digits"]


@pytest.mark.parametrize(
    ("data", "public"),
    [
        ("digits", "digits"),
        ("faces", "faces"),
        ("faces", "./faces/"),
        ("faces", "{}/other/../faces"),
        ("faces", "link"),
        ("link", "faces"),
        ("faces/adults", "faces"),
        ("faces", "."),
    ],
)
def test_the_private_images_are_refused_as_public_ones(
    data: str, public: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "faces" / "adults").mkdir(parents=True)
    (tmp_path / "link").symlink_to("faces")
    monkeypatch.chdir(tmp_path)
    public = public.format(tmp_path)
    study = tmp_path / "study.toml"
    study.write_text('recipe = "recipe.toml"\n[[row]]\nname = "a"\nfinetune = { hold-out = 9 }\n')
    for command in (["recipe", str(write(tmp_path, SMALL))], ["study", str(study)]):
        assert main([*command, "--data", data, "--public", public, "--out", "run", "--dry-run"]) == 2
        assert f"--public {public} holds the sensitive images, --data {data}" in capsys.readouterr().err


@pytest.mark.parametrize(("data", "public"), [("digits", "./digits"), ("faces", "faces-2"), ("faces", "faces/drawn")])
def test_other_public_images_are_taken(data: str, public: str, tmp_path: Path) -> None:
    recipe = str(write(tmp_path, SMALL))
    assert main(["recipe", recipe, "--data", data, "--public", public, "--out", str(tmp_path / "a"), "--dry-run"]) == 0


@pytest.mark.parametrize("name", ["data", "public"])
def test_an_empty_name_of_images_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = {"data": "digits", "public": "photographs", name: ""}
    line = [f"--{key}={value}" for key, value in sources.items()]
    recipe = write(tmp_path, SMALL.replace('data = "glyphs"\nnum-generated = 40', 'data = "@public"'))
    assert main(["recipe", str(recipe), *line, "--out", str(tmp_path / "run"), "--dry-run"]) == 2
    assert f"--{name} is empty: give a path, or one of digits, glyphs, silhouettes" in capsys.readouterr().err


def test_private_data_must_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", str(write(tmp_path, SMALL)), "--out", str(tmp_path / "run")]) == 2
    assert "give --data" in capsys.readouterr().err


def test_a_recipe_runs_and_finished_stages_are_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = write(tmp_path, SMALL), tmp_path / "run"
    command = ["recipe", str(recipe), "--data", "digits", "--out", str(out), "--no-progress", "--threads", "1"]
    assert main(command) == 0
    summary = json.loads((out / "summary.json").read_text())["stages"]
    assert list(summary) == ["tokenizer", "pretrain", "finetune", "sample"]
    assert summary["finetune"]["result"] == json.loads((out / "finetune" / "privacy.json").read_text())
    assert 7.9 < summary["finetune"]["result"]["epsilon"] <= 8
    assert len(list((out / "sample" / "images").rglob("*.png"))) == 20

    model = out / "finetune" / "model" / "model.safetensors"
    before = model.stat().st_mtime_ns
    capsys.readouterr()
    write(tmp_path, SMALL.replace("num-images = 20", "num-images = 10"))
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert printed.count("finished before") == 3
    assert "4/4 sample\n" in printed
    assert model.stat().st_mtime_ns == before
    assert len(list((out / "sample" / "images").rglob("*.png"))) == 10


def test_finished_stages_are_known_in_a_moved_folder_and_by_a_former_digest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write(tmp_path, SMALL[: SMALL.index("[finetune]")])
    common = ["--no-progress", "--threads", "1"]
    assert main(["recipe", str(recipe), "--out", str(tmp_path / "run"), *common]) == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    out = tmp_path / "moved"
    capsys.readouterr()
    assert main(["recipe", str(recipe), "--out", str(out), *common]) == 0
    assert capsys.readouterr().out.count("finished before") == 2

    summary = json.loads((out / "summary.json").read_text())
    digest = hashlib.sha256()  # of the lines so far, --out in them, as summaries had it
    for stage in read_recipe(recipe).stages:
        line = [*stage.arguments(out, {}), f"--out={out / stage.name}", "--seed=0"]
        digest.update(json.dumps(line).encode())
        summary["stages"][stage.name]["settings"] = digest.hexdigest()
    del summary["command"]
    (out / "summary.json").write_text(json.dumps(summary))
    assert main(["recipe", str(recipe), "--out", str(out), *common]) == 0
    assert capsys.readouterr().out.count("finished before") == 2
    summary["stages"]["tokenizer"]["settings"] = "0" * 64
    (out / "summary.json").write_text(json.dumps(summary))
    assert main(["recipe", str(recipe), "--out", str(out), *common]) == 0
    assert capsys.readouterr().out.count("finished before") == 1


def test_a_stage_that_fails_is_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = SMALL[: SMALL.index("[pretrain]")]
    recipe, out = (
        write(tmp_path, tokenizer + '[upscale]\nimages = "missing"\nfrom-size = 8\nto-size = 16\n'),
        tmp_path / "run",
    )
    command = ["recipe", str(recipe), "--out", str(out), "--no-progress", "--threads", "1"]
    assert main(command) == 2
    stages = json.loads((out / "summary.json").read_text())["stages"]
    assert stages["tokenizer"]["finished"]
    assert "finished" not in stages["upscale"]
    assert stages["upscale"]["seconds"] >= 0
    capsys.readouterr()
    assert main(command) == 2
    assert "1/2 tokenizer: finished before" in capsys.readouterr().out


def test_a_public_model_that_is_gone_is_made_again_and_one_that_was_replaced_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = write(tmp_path, SMALL[: SMALL.index("[sample]")]), tmp_path / "run"
    command = ["recipe", str(recipe), "--data", "digits", "--out", str(out), "--no-progress", "--threads", "1"]
    assert main(command) == 0
    private = out / "finetune" / "model"
    before = weights_digest(private)

    stages, given = read_recipe(recipe).stages, build_parser().parse_args(command)
    shutil.rmtree(out / "pretrain")
    capsys.readouterr()
    assert main(command) == 0  # the same seed makes the same model, and the private one stands
    assert capsys.readouterr().out.count("finished before") == 2
    assert weights_digest(private) == before

    shutil.rmtree(out / "pretrain")
    assert main([*command_line(stages[1], out, given), "--seed=1"]) == 0
    capsys.readouterr()
    assert main(command) == 2
    printed = capsys.readouterr()
    assert printed.out.count("finished before") == 2
    assert "was made from another model, which was replaced since" in printed.err
    assert weights_digest(private) == before


def test_a_private_stage_is_not_run_again_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = write(tmp_path, SMALL), tmp_path / "run"
    command = ["recipe", str(recipe), "--data", "digits", "--out", str(out), "--no-progress", "--threads", "1"]
    assert main(command) == 0
    (out / "finetune").rename(tmp_path / "elsewhere")
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().out.count("finished before") == 4
    assert not (out / "finetune").exists()
    (tmp_path / "elsewhere").rename(out / "finetune")

    shutil.rmtree(out / "pretrain")
    run = json.loads((out / "finetune" / "run.json").read_text())
    del run["reads"]
    for damaged in (run, [], {**run, "reads": ["model"]}):
        (out / "finetune" / "run.json").write_text(json.dumps(damaged))
        capsys.readouterr()
        assert main(command) == 2
        assert "does not say from which models, and pretrain has to be run again" in capsys.readouterr().err
        assert not (out / "pretrain").exists()


def test_what_reads_a_stage_that_is_run_again_is_run_after_an_interruption_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    second = SMALL[SMALL.index("[sample]") :].replace("[sample]", '[again]\ncommand = "sample"')
    recipe, out = write(tmp_path, SMALL + second), tmp_path / "run"
    command = ["recipe", str(recipe), "--data", "digits", "--out", str(out), "--no-progress", "--threads", "1"]
    assert main(command) == 0
    shutil.rmtree(out / "tokenizer")
    with monkeypatch.context() as patch:
        patch.setattr("wavedp.cli.sample.build_pipeline", lambda *_: (_ for _ in ()).throw(BadFileError("stopped")))
        assert main(command) == 2
    capsys.readouterr()
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.endswith("finished before")] == [
        f"{number}/5 {name}: finished before" for number, name in enumerate(["tokenizer", "pretrain", "finetune"], 1)
    ]
