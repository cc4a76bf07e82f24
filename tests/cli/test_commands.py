# SPDX-License-Identifier: Apache-2.0
"""The commands, one after the other on a small image folder, as a user would run them."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import wavedp
from wavedp.cli import COMMANDS, EXIT_ERROR, EXIT_INTERRUPTED, build_parser, main
from wavedp.cli.study_results import trained_parameters
from wavedp.models import load_autoregressive, load_tokenizer
from wavedp.privacy import PrivacyStatement
from wavedp.storage import read_json
from wavedp.training.checkpoints import load_newest
from wavedp.training.private import PrivateTrainingConfig, finetune_private

SIZES = ["--image-size", "16", "--channels", "1"]


def run(*arguments: object) -> int:
    return main([*map(str, arguments), *(["--no-progress"] if arguments[0] != "account" else [])])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bright and dark squares, 40 of each, with a little noise."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, level in (("bright", 220), ("dark", 40)):
        (root / name).mkdir()
        for i in range(40):
            pixels = np.clip(level + rng.normal(0, 10, (20, 20)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer -> pretrain -> finetune, each checked to succeed."""
    out = tmp_path_factory.mktemp("runs")
    small = ["--width", 16, "--encoder-depth", 1, "--decoder-depth", 1, "--grid", 2, "--approximation-codes", 16]
    assert run("tokenizer", "--data", pictures, "--out", out / "tok", *SIZES, *small, "--steps", 60) == 0
    common = ["--data", pictures, "--tokenizer", out / "tok"]
    model = ["--width", 16, "--depth", 1, "--heads", 2, "--steps", 60]
    assert run("pretrain", *common, "--out", out / "pre", *model) == 0
    privacy = ["--epsilon", 8, "--delta", 1e-3, "--max-records", 200, "--sample-rate", 0.25, "--steps", 6]
    privacy += ["--expected-batch-size", 16, "--max-grad-norm", 1]
    assert run("finetune", *common, "--model", out / "pre", "--out", out / "fine", *privacy) == 0
    return out


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: wavedp {command}")
        actions = build_parser()._subparsers._group_actions[0].choices[command]._actions
        assert all(action.help for action in actions), command


def test_training_leaves_models_logs_and_pictures(trained: Path):
    for stage, files in {
        "tok": ["run.json", "log.csv", "log.png", "reconstructions.png", "model/config.json"],
        "pre": ["run.json", "log.csv", "log.png", "samples.png", "model/config.json"],
        "fine": ["run.json", "log.csv", "log.png", "samples.png", "privacy.json", "privacy.txt", "ledger.jsonl"],
    }.items():
        for name in files:
            assert (trained / stage / name).stat().st_size > 0, f"{stage}/{name}"
    statement = json.loads((trained / "fine" / "privacy.json").read_text())
    assert 7.92 <= statement["epsilon"] <= 8.0
    assert statement["steps_charged"] == 6
    given = {"dataset_size_bound": 200, "sample_rate": 0.25, "max_grad_norm": 1.0, "expected_batch_size": 16.0}
    assert given == {name: statement[name] for name in given}


def test_samples_are_images_of_the_asked_classes(trained: Path, tmp_path: Path):
    out = tmp_path / "s"
    arguments = ["--tokenizer", trained / "tok", "--model", trained / "fine", "--out", out]
    assert run("sample", *arguments, "--num-images", 12, "--labels", "dark,bright", "--sr", "haar") == 0
    names = sorted(str(p.relative_to(out)) for p in (out / "images").rglob("*.png"))
    assert len(names) == 12
    assert sum("/dark/" in n for n in names) == 6
    first = Image.open(out / "images" / "dark" / "000000.png")
    assert (first.size, first.mode) == ((16, 16), "L")
    coarse = np.asarray(Image.open(out / "coarse" / "dark" / "000000.png"))
    np.testing.assert_array_equal(np.asarray(first), coarse.repeat(4, 0).repeat(4, 1))
    again = tmp_path / "again"
    assert run("sample", "--pipeline", out, "--num-images", 12, "--labels", "dark,bright", "--out", again) == 0
    for name in names:
        assert (again / name).read_bytes() == (out / name).read_bytes()
    loaded = wavedp.CoarseToFinePipeline.from_pretrained(out / "pipeline")
    assert loaded.classes == ("bright", "dark")


def test_labels_are_drawn_from_the_charged_histogram(
    trained: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    common = ["--data", pictures, "--tokenizer", trained / "tok", "--model", trained / "pre", "--out", tmp_path / "f"]
    privacy = ["--epsilon", 8, "--delta", 1e-3, "--max-records", 200, "--sample-rate", 0.25, "--steps", 2]
    privacy += ["--expected-batch-size", 16, "--label-noise", 3, "--noise-mode", "strict"]
    privacy += ["--truncated-batch-size", 80]
    assert run("finetune", *common, *privacy, "--trainable", "norm") == 0
    statement = read_json(tmp_path / "f" / "privacy.json")
    assert statement["epsilon"] <= 8
    assert statement["noise_mode"].startswith("strict")
    assert "Strict noise on 16 parameters" in statement["charged"][2]
    counts = read_json(tmp_path / "f" / "label_histogram.json")["noised_counts"]
    assert all(abs(count - 40) < 21 for count in counts)  # seven sigma
    (tmp_path / "f" / "label_histogram.json").write_text('{"noised_counts": [300.0, -5.0]}')
    sample = ["sample", "--tokenizer", trained / "tok", "--num-images", 6, "--labels", "histogram", "--sr", "haar"]
    assert run(*sample, "--model", tmp_path / "f", "--out", tmp_path / "s") == 0
    assert len(list((tmp_path / "s" / "images" / "bright").iterdir())) == 6
    assert not list((tmp_path / "s" / "images").glob("dark/*"))
    again = ["sample", "--pipeline", tmp_path / "s", "--labels", "histogram", "--num-images", 3]
    assert run(*again, "--out", tmp_path / "again") == 0
    assert len(list((tmp_path / "again" / "images" / "bright").iterdir())) == 3
    assert run(*sample, "--model", trained / "fine", "--out", tmp_path / "none") == EXIT_ERROR
    assert "'wavedp finetune --label-noise' releases one" in capsys.readouterr().err


def test_sampling_options_reach_the_model(trained: Path, tmp_path: Path):
    def images(*options: object) -> list[bytes]:
        arguments = ["--tokenizer", trained / "tok", "--model", trained / "fine", "--labels", "dark", "--num-images", 6]
        assert run("sample", *arguments, *options, "--out", tmp_path) == 0
        return [p.read_bytes() for p in sorted((tmp_path / "coarse" / "dark").iterdir())]

    assert len(set(images("--temperature", 0))) == 1
    assert images("--top-k", 1) == images("--temperature", 0)
    free = images()
    assert len(set(free)) > 1
    assert images("--seed", 1) != free
    assert images("--guidance-scale", 30) != free


def test_augmentation_reaches_the_private_stage_and_old_runs_go_on_without_it(
    trained: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    configs: list[PrivateTrainingConfig] = []

    def seen(*arguments: Any, **named: Any) -> PrivacyStatement:
        configs.append(arguments[4])
        return finetune_private(*arguments, **named)

    monkeypatch.setattr("wavedp.cli.finetune.finetune_private", seen)
    common = ["--data", pictures, "--tokenizer", trained / "tok", "--model", trained / "pre", "--trainable", "norm"]
    common += ["--noise-multiplier", 2, "--delta", 1e-3, "--max-records", 200, "--sample-rate", 0.25, "--steps", 2]
    common += ["--expected-batch-size", 16]
    several = ["--augmentations", 3, "--augment-shift", 1, "--augment-flip", "--seed", 7]
    assert run("finetune", *common, *several, "--out", tmp_path / "three") == 0
    assert run("finetune", *common, "--out", tmp_path / "one") == 0
    given = [(c.augmentations, c.augmentation_shift, c.augmentation_flip, c.augmentation_seed) for c in configs]
    assert given == [(3, 1, True, 7), (1, 2, False, 0)]
    three, one = (read_json(tmp_path / name / "privacy.json") for name in ("three", "one"))
    assert three == one  # what is guaranteed, and its ledger to the last line
    record = tmp_path / "one" / "run.json"
    old = {key: value for key, value in read_json(record).items() if not key.startswith("augment")}
    assert len(old) == len(read_json(record)) - 3
    record.write_text(json.dumps(old))
    assert run("finetune", *common, "--out", tmp_path / "one") == 0
    capsys.readouterr()
    assert run("finetune", *common, "--augmentations", 2, "--out", tmp_path / "one") == EXIT_ERROR
    assert "started with other settings (augmentations differ)" in capsys.readouterr().err


def test_only_chosen_parameters_are_fine_tuned(trained: Path, pictures: Path, tmp_path: Path):
    common = ["--data", pictures, "--tokenizer", trained / "tok", "--model", trained / "pre", "--out", tmp_path]
    privacy = ["--noise-multiplier", 2, "--delta", 1e-3, "--max-records", 200, "--sample-rate", 0.25, "--steps", 2]
    assert run("finetune", *common, *privacy, "--expected-batch-size", 16, "--trainable", "norm") == 0
    before = load_autoregressive(trained / "pre" / "model").state_dict()
    after = load_autoregressive(tmp_path / "model").state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"norm.weight"}
    assert read_json(tmp_path / "privacy.json")["noise_multiplier"] == 2.0


def test_images_of_other_classes_than_the_model_s_are_fine_tuned(
    trained: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "data").mkdir()
    for name, former in (("cats", "dark"), ("dogs", "bright"), ("eels", "dark")):
        shutil.copytree(pictures / former, tmp_path / "data" / name)
    common = ["--data", tmp_path / "data", "--tokenizer", trained / "tok", "--model", trained / "pre"]
    common += ["--noise-multiplier", 2, "--delta", 1e-3, "--max-records", 200, "--sample-rate", 0.25, "--steps", 2]
    common += ["--expected-batch-size", 16, "--noise-mode", "strict", "--trainable", "class"]
    assert run("finetune", *common, "--out", tmp_path / "out") == EXIT_ERROR
    assert "has 3 classes, the model 2" in capsys.readouterr().err
    assert run("finetune", *common, "--new-classes", "--out", tmp_path / "out") == EXIT_ERROR
    assert "--new-classes: name them by --classes" in capsys.readouterr().err
    names = ["--new-classes", "--classes", "cats,dogs,eels"]
    assert run("finetune", *common, *names, "--out", tmp_path / "new") == 0
    before, after = (load_autoregressive(place / "model") for place in (trained / "pre", tmp_path / "new"))
    assert after.config.class_names == ("cats", "dogs", "eels")
    assert after.config.privately_trained
    weights, old = after.state_dict(), before.with_classes(("cats", "dogs", "eels")).state_dict()
    moved = {name for name, value in old.items() if not torch.equal(value, weights[name])}
    assert moved == {"class_embedding.weight"}
    assert weights["class_embedding.weight"].shape == (4, 16)
    assert len(weights["class_embedding.weight"].unique(dim=0)) > 1, "the classes differ"
    assert run("finetune", *common[:-1], "heads", *names, "--out", tmp_path / "alike") == EXIT_ERROR
    assert "the classes would stay alike" in capsys.readouterr().err
    assert not (tmp_path / "alike").exists()
    private = build_parser().parse_args(["finetune", *map(str, common), *names, "--out", str(tmp_path / "new")])
    assert trained_parameters(private) == 4 * 16, "of the new classes, not of the public model's 3 * 16"
    assert run("sample", "--tokenizer", trained / "tok", "--model", tmp_path / "new", "--num-images", 3, "--out",
               tmp_path / "s") == 0  # fmt: skip


def test_models_with_options_are_trained_and_sampled(trained: Path, pictures: Path, tmp_path: Path):
    common = ["--data", pictures, "--tokenizer", trained / "tok"]
    model = ["--width", 16, "--depth", 1, "--heads", 2, "--steps", 4, "--scales", 2, "--per-scale-heads"]
    model += ["--position", "rotary", "--ema-decay", 0.9, "--precision", "bfloat16"]
    assert run("pretrain", *common, *model, "--out", tmp_path / "pre") == 0
    before = load_autoregressive(tmp_path / "pre" / "model")
    assert (before.config.position, before.config.per_scale_heads) == ("rotary", True)
    privacy = ["--noise-multiplier", 2, "--delta", 1e-3, "--max-records", 200, "--sample-rate", 0.25, "--steps", 2]
    privacy += ["--expected-batch-size", 16, "--lora-rank", 2, "--noise-mode", "strict"]
    assert run("finetune", *common, "--model", tmp_path / "pre", *privacy, "--out", tmp_path / "fine") == 0
    after = load_autoregressive(tmp_path / "fine" / "model").state_dict()
    moved = {name for name, value in before.state_dict().items() if not torch.equal(value, after[name])}
    assert moved == {f"blocks.0.weights.{name}.weight" for name in ("qkv", "projection", "mlp_in", "mlp_out")}
    source = ["--tokenizer", trained / "tok", "--model", tmp_path / "fine"]
    options = ["--num-images", 4, "--top-p", 0.9, "--dtype", "bfloat16"]
    assert run("sample", *source, *options, "--out", tmp_path / "s") == 0
    assert len(list((tmp_path / "s" / "images").rglob("*.png"))) == 4


def test_samples_of_another_run_are_not_mixed_in(trained: Path, tmp_path: Path):
    arguments = ["--tokenizer", trained / "tok", "--model", trained / "fine", "--out", tmp_path]
    assert run("sample", *arguments, "--num-images", 8) == 0
    assert run("sample", *arguments, "--num-images", 2, "--sr", "haar") == 0
    assert len(list((tmp_path / "images").rglob("*.png"))) == 2
    statement = (trained / "fine" / "privacy.json").read_bytes()
    assert (tmp_path / "pipeline" / "privacy.json").read_bytes() == statement


def test_no_command_writes_over_the_run_of_another(trained: Path, pictures: Path, capsys: pytest.CaptureFixture[str]):
    before = {p: p.read_bytes() for p in (trained / "fine").rglob("*.json")}
    sample = ["sample", "--tokenizer", trained / "tok", "--model", trained / "fine", "--num-images", 1]
    assert run(*sample, "--out", trained / "fine") == EXIT_ERROR
    assert "belongs to a run of 'wavedp finetune'" in capsys.readouterr().err
    assert run(*sample, "--out", trained / "fine" / "model") == EXIT_ERROR
    assert "holds a saved model" in capsys.readouterr().err
    assert (
        run("evaluate", "--synthetic", "nowhere", "--data", pictures, *SIZES, "--out", trained / "fine") == EXIT_ERROR
    )
    assert before == {p: p.read_bytes() for p in (trained / "fine").rglob("*.json")}


def test_a_second_budget_on_private_weights_is_refused(
    trained: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    privacy = ["--epsilon", 8, "--delta", 1e-3, "--max-records", 200, "--sample-rate", 0.25, "--steps", 2]
    common = ["--data", pictures, "--tokenizer", trained / "tok", "--model", trained / "fine"]
    assert run("finetune", *common, "--out", tmp_path, *privacy, "--expected-batch-size", 16) == EXIT_ERROR
    assert "already fine-tuned on sensitive images" in capsys.readouterr().err


def test_a_tokenizer_that_the_model_does_not_know_is_refused(
    trained: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    small = ["--width", 16, "--encoder-depth", 1, "--decoder-depth", 1, "--grid", 2, "--approximation-codes", 16]
    other = ["--data", pictures, "--out", tmp_path / "tok", *SIZES, *small, "--steps", 2, "--seed", 1]
    assert run("tokenizer", *other) == 0
    arguments = ["--tokenizer", tmp_path / "tok", "--model", trained / "fine", "--out", tmp_path / "s"]
    assert run("sample", *arguments) == EXIT_ERROR
    assert "another tokenizer" in capsys.readouterr().err


def test_the_demo_trains_on_public_images_and_spends_on_private_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from wavedp.cli import demo

    seen: dict[str, str] = {}

    def spied(name: str) -> None:
        original = getattr(demo, name)

        def call(dataset: Any, *arguments: Any, **options: Any) -> Any:
            seen[name] = dataset.name
            return original(dataset, *arguments, **options)

        monkeypatch.setattr(demo, name, call)

    for name in ("train_tokenizer", "pretrain_autoregressive", "train_espcn", "finetune_private"):
        spied(name)
    assert run("demo", "--quick", "--out", tmp_path) == 0
    assert seen.pop("finetune_private").startswith("digits")
    assert all(name.startswith("glyphs") for name in seen.values()), seen
    statement = read_json(tmp_path / "privacy.json")
    assert demo.TUNED in statement["assumptions"]
    assert 9.9 <= statement["epsilon"] <= 10
    metrics = read_json(tmp_path / "metrics.json")
    assert {"public_model", "private_model", "real_ceiling"} <= metrics.keys()
    assert metrics["quick"] is True
    for name in ("grid.png", "privacy.txt", "samples/images/7", "tokenizer/reconstructions.png"):
        assert (tmp_path / name).exists(), name


def test_upscale_keeps_classes_and_doubles_pixels(pictures: Path, tmp_path: Path):
    arguments = ["--images", pictures, "--from-size", 20, "--to-size", 40, "--channels", 1, "--sr", "haar"]
    assert run("upscale", *arguments, "--out", tmp_path) == 0
    original = np.asarray(Image.open(pictures / "dark" / "0.png"))
    written = sorted((tmp_path / "images" / "dark").glob("*.png"))
    assert len(written) == 40
    np.testing.assert_array_equal(np.asarray(Image.open(written[0])), original.repeat(2, 0).repeat(2, 1))


def test_evaluate_finds_perfect_images_perfect(pictures: Path, tmp_path: Path):
    common = ["--data", pictures, *SIZES, "--epochs", 6, "--num-seeds", 2]
    assert run("evaluate", "--synthetic", pictures, *common, "--out", tmp_path / "good") == 0
    metrics = json.loads((tmp_path / "good" / "metrics.json").read_text())
    assert metrics["synthetic"]["accuracy"] >= 0.9
    assert metrics["real_ceiling"]["accuracy"] >= 0.9
    assert len(metrics["synthetic"]["runs"]) == 2
    assert metrics["private"] is False


def test_espcn_is_trained_and_used(pictures: Path, tmp_path: Path):
    common = ["--data", pictures, *SIZES, "--scale", 2, "--steps", 8, "--batch-size", 4, "--width", 8]
    assert run("espcn", *common, "--out", tmp_path / "sr") == 0
    arguments = ["--images", pictures, "--from-size", 20, "--to-size", 40, "--channels", 1]
    arguments += ["--sr", "espcn", "--sr-path", tmp_path / "sr" / "espcn", "--out", tmp_path / "up"]
    assert run("upscale", *arguments) == 0
    assert Image.open(next((tmp_path / "up" / "images").rglob("*.png"))).size == (40, 40)


@pytest.mark.parametrize(
    ("question", "field", "value"),
    [
        (["--noise-multiplier", 1.0, "--steps", 1000], "epsilon", 1.8282),
        (["--epsilon", 1.8283, "--noise-multiplier", 1.0], "steps", 1000),
        (["--epsilon", 2.0, "--steps", 1000], "epsilon", 2.0),
    ],
)
def test_account_answers(question: list[object], field: str, value: float, capsys: pytest.CaptureFixture[str]):
    assert run("account", "--sample-rate", 0.01, "--delta", 1e-5, "--json", *question) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer[field] == pytest.approx(value, rel=0.01)
    assert answer["epsilon_lower_bound"] <= answer["epsilon"] <= answer["epsilon_rdp"]


def test_a_run_is_repeated_by_its_command_and_refused_with_other_settings(
    trained: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
):
    common = ["--data", pictures, "--tokenizer", trained / "tok", "--out", trained / "pre"]
    model = ["--width", 16, "--depth", 1, "--heads", 2]
    assert run("pretrain", *common, *model, "--steps", 60) == 0
    capsys.readouterr()
    assert run("pretrain", *common, *model, "--steps", 61) == EXIT_ERROR
    assert "steps differ" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokenizer", "--data", "nowhere", "--out", "x"], "nowhere"),
        (["tokenizer", "--data", "digits", "--out", "x", "--grid", "5"], "multiple of grid=5"),
        (["tokenizer", "--data", "digits", "--out", "x", "--device", "cuda:99"], "--device cuda:99"),
        (["pretrain", "--data", "digits", "--tokenizer", "nowhere", "--out", "x"], "holds no config.json"),
        (["sample", "--out", "x"], "give --pipeline, or both"),
        (["account", "--sample-rate", "0.1", "--delta", "1e-5", "--steps", "5"], "exactly two"),
        (
            [
                *["finetune", "--data", "digits", "--tokenizer", "a", "--model", "b", "--out", "x", "--epsilon", "1"],
                *["--delta", "0.01", "--max-records", "1000", "--sample-rate", "0.1", "--steps", "5"],
                *["--expected-batch-size", "10"],
            ],
            "must be below 1/dataset_size_bound",
        ),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == EXIT_ERROR
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith(f"wavedp {arguments[0]}: error: ")
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["account", "--sample-rate", "1.5", "--delta", "1e-5"], "out of range: must be > 0 and <= 1"),
        (["account", "--sample-rate", "nan", "--delta", "1e-5"], "out of range"),
        (["tokenizer", "--data", "digits", "--out", "x", "--steps", "0"], "must be >= 1"),
        (["tokenizer", "--data", "digits", "--out", "x", "--steps", "many"], "not a number of type int"),
        (["tokenizer"], "--data"),
        (["nothing"], "invalid choice"),
    ],
)
def test_the_parser_says_what_was_wrong(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_bad_image_stops_or_is_counted(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "in" / "bright").mkdir(parents=True)
    good = (pictures / "bright" / "0.png").read_bytes()
    (tmp_path / "in" / "bright" / "good.png").write_bytes(good)
    (tmp_path / "in" / "bright" / "cut.png").write_bytes(good[:60])
    arguments = ["--images", tmp_path / "in", "--from-size", 20, "--to-size", 40, "--channels", 1]
    assert run("upscale", *arguments, "--out", tmp_path / "a") == EXIT_ERROR
    assert "cut.png" in capsys.readouterr().err
    assert run("upscale", *arguments, "--out", tmp_path / "b", "--skip-bad") == 0
    assert "skipped 1 unreadable" in capsys.readouterr().out
    assert len(list((tmp_path / "b" / "images").rglob("*.png"))) == 1


def test_ctrl_c_leaves_a_checkpoint_that_the_same_command_continues(pictures: Path, tmp_path: Path):
    """A real process, a real SIGINT in the middle of training."""
    command = [sys.executable, "-m", "wavedp", "tokenizer", "--data", str(pictures), "--out", str(tmp_path / "tok")]
    command += [*SIZES, "--width", "16", "--grid", "2", "--steps", "100000", "--no-progress", "--threads", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "tok" / "log.csv").exists():  # the first step was logged
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == EXIT_INTERRUPTED
    assert "continues from its checkpoint" in error
    assert "Traceback" not in error
    assert load_newest(tmp_path / "tok" / "checkpoint").config["step"] >= 1
    assert read_json(tmp_path / "tok" / "run.json")["steps"] == 100000
    assert load_tokenizer(tmp_path / "tok" / "model").config.width == 16  # usable as it is
