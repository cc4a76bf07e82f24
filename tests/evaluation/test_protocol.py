# SPDX-License-Identifier: Apache-2.0
"""The protocol on small images, from the arguments of the command to the files it leaves."""

from __future__ import annotations

import argparse
import csv
import json
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wavedp.cli import EXIT_ERROR, main
from wavedp.cli import arguments as shared
from wavedp.cli import evaluate_dpimagebench as command
from wavedp.data import TensorImageDataset
from wavedp.evaluation import (
    ClassifierRecipe,
    ClassifierResult,
    LabelledImages,
    copying,
    find_neighbours,
    label_source,
    protocol,
    protocol_delta,
    real_split,
    run_classifiers,
    summarise_results,
    synthetic_split,
)
from wavedp.evaluation.fitting import accuracy
from wavedp.storage import read_json

TINY = ClassifierRecipe("quick", epochs=2, batch_size=16, learning_rate=0.01, sizes={"width": 4, "num_features": 8})


def squares(n: int, seed: int, *, wrong: bool = False) -> LabelledImages:
    """Class 0: bright in the left half, class 1: in the right."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    images = torch.randint(0, 60, (n, 1, 8, 8), generator=generator, dtype=torch.uint8)
    images[labels == 0, :, :, :4] += 150
    images[labels == 1, :, :, 4:] += 150
    return LabelledImages(images, 1 - labels if wrong else labels)


def write_idx(folder: Path, **parts: LabelledImages) -> Path:
    folder.mkdir()
    for stem, part in parts.items():
        n, _, s, _ = part.images.shape
        header = b"\0\0\x08\x03" + b"".join(size.to_bytes(4, "big") for size in (n, s, s))
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(header + part.images.numpy().tobytes())
        labels = part.labels.to(torch.uint8).numpy().tobytes()
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + n.to_bytes(4, "big") + labels)
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick recipe and the three classifiers, in sizes that train in a second."""
    sizes = {"resnet": {"depth": 8}, "wideresnet": {"depth": 10, "widen_factor": 1}, "resnext": {"depth": 11}}
    sizes["resnext"] |= {"cardinality": 2, "widen_factor": 1}
    recipes = tuple(replace(TINY, architecture=name, sizes=of) for name, of in sizes.items())
    monkeypatch.setattr(command, "QUICK", TINY)
    monkeypatch.setattr(command, "dpimagebench_recipes", lambda family: recipes)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_idx(tmp_path / "data", train=squares(120, 0), t10k=squares(40, 1))


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """A folder as 'wavedp sample' leaves it, of 16 x 16 images."""
    synthetic = squares(72, 2)
    for number, (image, label) in enumerate(zip(synthetic.images, synthetic.labels, strict=True)):
        folder = tmp_path / "samples" / "images" / str(int(label))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy().repeat(2, 0).repeat(2, 1)).save(folder / f"{number:06d}.png")
    (tmp_path / "samples" / "run.json").write_text('{"command": "sample", "labels": null}')
    return tmp_path / "samples"


def run(*arguments: object) -> int:
    return main(["evaluate", "--protocol", "dpimagebench", "--no-progress", *map(str, arguments)])


@pytest.mark.usefixtures("small")
def test_a_quick_evaluation_leaves_its_figures(
    data: Path, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    common = ["--data", data, "--image-size", 8, "--out", out]
    assert run("--quick", "--synthetic", samples, *common) == 0
    metrics = read_json(out / "metrics.json")
    (result,) = metrics["classifiers"]
    assert (result["num_train"], result["num_validation"], result["num_test"]) == (66, 6, 40)
    assert result["accuracy"] == metrics["accuracy"]["mean"] == metrics["accuracy"]["maximum"] > 0.9
    assert metrics["private"] is False
    assert metrics["labels"] == "balanced: the classes in turn"
    assert sum(metrics["label_counts"]) == 66
    assert metrics["num_real_train"] == 110
    assert metrics["delta_of_the_benchmark"] == protocol_delta(110)
    found = metrics["distances"]["in_trained_features"]
    assert found["name"] == "FD (features of the quick CNN trained on the real training split)"
    assert (found["num_real"], found["num_synthetic"], found["num_neighbourhoods"]) == (110, 72, 72)
    assert 0 <= found["frechet_distance"] < 50
    (row,) = csv.DictReader((out / "metrics.csv").open())
    assert row["protocol"] == "dpimagebench-quick"
    assert (row["classifier"], row["seed"], row["private"]) == ("quick", "0", "False")
    assert float(row["accuracy"]) == result["accuracy"]
    assert stat.S_IMODE((out / "neighbours.png").stat().st_mode) == 0o600
    assert "NOT PRIVATE" in (out / "features" / "NOT_PRIVATE.txt").read_text()
    assert not list(out.rglob("checkpoint"))
    said = capsys.readouterr().out
    assert "mean " in said
    assert "maximum " in said
    assert "NOT private" in said
    # a second seed and other distances: what is there is not trained again
    before = (out / "classifiers" / "quick-0" / "result.json").stat().st_mtime_ns
    weights = (out / "features" / "config.json").stat().st_mtime_ns
    assert run("--quick", "--synthetic", samples, *common, "--num-seeds", 2) == 0
    assert (out / "classifiers" / "quick-0" / "result.json").stat().st_mtime_ns == before
    assert (out / "features" / "config.json").stat().st_mtime_ns == weights
    assert [c["seed"] for c in read_json(out / "metrics.json")["classifiers"]] == [0, 1]
    # the images of the folder changed meanwhile
    next((samples / "images" / "0").iterdir()).unlink()
    assert run("--quick", "--synthetic", samples, *common) == EXIT_ERROR
    assert "is of other images; use another folder" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_three_classifiers_on_an_archive_and_on_the_real_split(data: Path, tmp_path: Path) -> None:
    synthetic = squares(60, 3)
    np.savez(tmp_path / "gen.npz", x=synthetic.images.numpy() / np.float32(255), y=synthetic.labels.numpy())
    common = ["--data", data, "--image-size", 8, "--no-distances"]
    assert run("--synthetic", tmp_path / "gen.npz", *common, "--out", tmp_path / "a") == 0
    metrics = read_json(tmp_path / "a" / "metrics.json")
    assert list(metrics["accuracy"]["by_classifier"]) == ["resnet", "wideresnet", "resnext"]
    assert metrics["labels"] == "unknown"
    values = [c["accuracy"] for c in metrics["classifiers"]]
    assert metrics["accuracy"]["maximum"] == max(values)
    assert metrics["accuracy"]["std"] == pytest.approx(np.std(values))
    assert len(list(csv.DictReader((tmp_path / "a" / "metrics.csv").open()))) == 3
    one = ["--classifiers", "wideresnet", "--epochs", 1, "--reference", "real", *common]
    assert run(*one, "--out", tmp_path / "b") == 0
    (result,) = read_json(tmp_path / "b" / "metrics.json")["classifiers"]
    assert (result["trained_on"], result["num_train"], result["num_validation"]) == ("real", 110, 10)
    assert (result["classifier"], result["epochs"]) == ("wideresnet", 1)


def test_the_test_set_changes_no_choice(tmp_path: Path) -> None:
    """With every test label wrong, the same epoch of the same weights is chosen: the accuracy is the rest to 1."""
    train, validation = squares(80, 0), squares(20, 4)
    results = {
        wrong: run_classifiers(
            [TINY], [0, 1], train, validation, squares(50, 1, wrong=wrong), num_classes=2, folder=tmp_path / str(wrong)
        )
        for wrong in (False, True)
    }
    for right, poisoned in zip(results[False], results[True], strict=True):
        assert (right.epoch, right.validation_accuracy) == (poisoned.epoch, poisoned.validation_accuracy)
        assert right.accuracy == pytest.approx(1 - poisoned.accuracy)
        assert right.accuracy > 0.9
    histories = [
        json.loads((tmp_path / w / "quick-0" / "result.json").read_text())["history"] for w in ("False", "True")
    ]
    assert histories[0] == histories[1]
    # and the validation labels do: all wrong, the worst epoch looks best
    poisoned = run_classifiers(
        [TINY], [0], train, squares(20, 4, wrong=True), squares(50, 1), num_classes=2, folder=tmp_path / "c"
    )
    assert poisoned[0].validation_accuracy == pytest.approx(1 - min(histories[0]))


def test_a_killed_evaluation_repeats_no_finished_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = squares(60, 0), squares(12, 4), squares(30, 1)
    whole = run_classifiers([TINY], [0, 1], *sets, num_classes=2, folder=tmp_path / "whole")
    fit = protocol.fit_classifier
    calls = []

    def killed(*arguments, **options):  # type: ignore[no-untyped-def]
        calls.append(options["seed"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fit(*arguments, **options)

    monkeypatch.setattr(protocol, "fit_classifier", killed)
    with pytest.raises(KeyboardInterrupt):
        run_classifiers([TINY], [0, 1], *sets, num_classes=2, folder=tmp_path / "killed")
    resumed = run_classifiers([TINY], [0, 1], *sets, num_classes=2, folder=tmp_path / "killed")
    assert calls == [0, 1, 1]
    assert [replace(r, seconds=0) for r in resumed] == [replace(r, seconds=0) for r in whole]
    with pytest.raises(ValueError, match=r"result\.json is of other recipe"):
        run_classifiers([replace(TINY, epochs=3)], [0], *sets, num_classes=2, folder=tmp_path / "killed")
    (tmp_path / "killed" / "quick-0" / "result.json").write_text("{}")
    with pytest.raises(ValueError, match="no result of a classifier"):
        run_classifiers([TINY], [0], *sets, num_classes=2, folder=tmp_path / "killed")


def test_splits_have_the_benchmarks_sizes() -> None:
    n = 60_000
    images, labels = torch.zeros(n, 1, 1, 1, dtype=torch.uint8), torch.arange(n) % 10
    dataset = TensorImageDataset(images, labels, list("abcdefghij"))
    train, held_out = real_split(dataset)
    assert torch.equal(train.labels, labels[:55_000])
    assert torch.equal(held_out.labels, labels[55_000:])
    by_class = TensorImageDataset(images, labels.sort().values, list("abcdefghij"))
    train, validation = synthetic_split(by_class)  # a folder lists class after class
    assert (len(train), len(validation)) == (55_000, 5_000)
    assert torch.equal(train.labels.bincount() + validation.labels.bincount(), torch.full((10,), 6000))
    assert validation.labels.bincount().min() > 400
    assert protocol_delta(55_000) == pytest.approx(1.666e-6, abs=1e-9)
    assert protocol_delta(145_064) == pytest.approx(5.80e-7, abs=1e-9)
    with pytest.raises(ValueError, match="at least 24"):
        real_split(dataset.subset(range(23)))


def test_hold_out_leaves_out_what_the_protocol_holds_out(data: Path) -> None:
    arguments = argparse.Namespace(
        data=str(data), split="train", fit="crop", skip_bad=False, classes=None, num_generated=1, seed=0, hold_out=10
    )
    kept = shared.open_data(arguments, image_size=8, channels=1)
    arguments.hold_out = None
    everything = shared.open_data(arguments, image_size=8, channels=1)
    train, held_out = real_split(everything)
    assert torch.equal(kept.images, train.images)
    assert len(held_out) == 10
    arguments.hold_out = 120
    with pytest.raises(ValueError, match="--hold-out 120 leaves nothing of the 120 images"):
        shared.open_data(arguments, image_size=8, channels=1)


def test_mean_deviation_and_maxima() -> None:
    def result(classifier: str, seed: int, accuracy: float) -> ClassifierResult:
        return ClassifierResult(classifier, seed, "synthetic", accuracy, 0.9, 1, 1, 1, 1, 1, 1, 0.0, ())

    found = summarise_results([result("a", 0, 0.5), result("b", 0, 0.75), result("a", 1, 0.875), result("b", 1, 0.125)])
    assert found["mean"] == 0.5625
    assert found["std"] == pytest.approx(np.std([0.5, 0.75, 0.875, 0.125]))
    assert found["maximum"] == 0.875
    assert found["maximum_by_seed"] == (0.75 + 0.875) / 2
    assert found["by_classifier"]["a"]["mean"] == 0.6875


@pytest.mark.parametrize(
    ("settings", "source"),
    [
        ({"command": "sample", "labels": None}, "balanced: the classes in turn"),
        ({"command": "sample", "labels": "histogram"}, "drawn from the released label histogram"),
        ({"command": "sample", "labels": "cat,dog"}, "chosen: cat,dog, in turn"),
        ({"command": "demo"}, "unknown"),
        ([1], "unknown"),
        (None, "unknown"),
    ],
)
def test_where_the_labels_come_from(tmp_path: Path, settings: object, source: str) -> None:
    if settings is not None:
        (tmp_path / "run.json").write_text(json.dumps(settings))
    assert label_source(tmp_path) == source


def test_neighbours_take_turns_and_copies_are_near() -> None:
    real = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 1, 0, 0, 0])
    found = find_neighbours(real, real[10:15], labels, num_samples=4, k=2)
    assert found.samples.tolist() == [2, 0, 3, 1]
    assert found.indices[:, 0].tolist() == [12, 10, 13, 11]
    medians = copying(real, real + 0.5, real[:20])["median_distance_to_nearest_real"]
    assert medians["samples"] < 1e-6 < 0.1 < medians["held_out_real"]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--protocol", "small", "--quick"], "--quick: only with --protocol dpimagebench"),
        (["--protocol", "small"], "give --synthetic"),
        ([], "give either --synthetic or --reference real"),
        (["--quick", "--classifiers", "resnet"], "--quick is one classifier"),
        (["--classifiers", "vgg"], "no 'vgg'; there are resnet, wideresnet, resnext"),
        (["--reference", "real", "--features", "nowhere", "--epochs", 1], "nowhere holds no feature network"),
    ],
)
def test_what_does_not_go_together_is_said(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[object], message: str
) -> None:
    command_line = ["--data", data, "--image-size", 8, "--out", tmp_path / "out", *arguments]
    assert run(*command_line) == EXIT_ERROR
    assert message in capsys.readouterr().err


def test_the_accuracy_is_a_share_of_the_images() -> None:
    class Left(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.stack([images[..., :4].mean((1, 2, 3)), images[..., 4:].mean((1, 2, 3))], dim=1)

    data = squares(40, 0)
    half_wrong = LabelledImages(data.images, torch.zeros(40, dtype=torch.int64))
    assert accuracy(Left(), data) == 1.0  # type: ignore[arg-type]
    assert accuracy(Left(), half_wrong) == 0.5  # type: ignore[arg-type]
