# SPDX-License-Identifier: Apache-2.0
"""The classifiers' sizes against published counts, their recipes, and the loop that trains them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from wavedp.evaluation import (
    QUICK,
    ClassifierRecipe,
    LabelledImages,
    build_classifier,
    dpimagebench_recipes,
    fit_classifier,
    fitting,
)
from wavedp.evaluation.fitting import _rate
from wavedp.training.checkpoints import load_newest

TINY = ClassifierRecipe("quick", epochs=4, batch_size=16, learning_rate=0.01, sizes={"width": 4, "num_features": 8})


def bars(n: int, seed: int, size: int = 8) -> LabelledImages:
    """Class 0: a horizontal bar at a random height; class 1: a vertical one."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    images = torch.randint(0, 80, (n, 1, size, size), generator=generator, dtype=torch.uint8)
    for image, label, place in zip(images, labels, torch.randint(1, size - 1, (n,), generator=generator), strict=True):
        if label == 0:
            image[:, place] = 255
        else:
            image[:, :, place] = 255
    return LabelledImages(images, labels)


def count(architecture: str, channels: int, **sizes: float) -> int:
    return sum(p.numel() for p in build_classifier(architecture, channels, 10, **sizes).parameters())


def test_sizes_are_those_of_the_papers() -> None:
    # He et al. 2016, table 6: ResNet-110 has 1.7 M; the two 1 x 1 projections of type B add 2,752
    assert count("resnet", 3, depth=110) == 1_727_962 + 2_752
    assert round(count("wideresnet", 3) / 1e6, 1) == 8.9  # Zagoruyko and Komodakis, table 4: WRN-40-4, 8.9 M
    assert round(count("wideresnet", 3, depth=28, widen_factor=10) / 1e6, 1) == 36.5  # the same: WRN-28-10
    assert round(count("resnext", 3) / 1e6, 1) == 34.4  # Xie et al., table 7: ResNeXt-29, 8 x 64d


@pytest.mark.parametrize("architecture", ["quick", "resnet", "wideresnet", "resnext"])
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32)])
def test_every_classifier_takes_28_and_32_pixels(architecture: str, channels: int, size: int) -> None:
    sizes = {"quick": {}, "resnet": {"depth": 8}, "wideresnet": {"depth": 10}, "resnext": {"depth": 11}}[architecture]
    torch.manual_seed(0)
    model = build_classifier(architecture, channels, 7, **sizes).eval()
    images = torch.rand(2, channels, size, size)
    features = model.embed(images)
    assert features.shape == (2, model.num_features)
    assert torch.equal(model(images), model.head(features))
    assert not torch.equal(features[0], features[1])


def test_recipes_are_the_benchmarks() -> None:
    mnist = dpimagebench_recipes()
    assert [r.architecture for r in mnist] == ["resnet", "wideresnet", "resnext"]
    assert {(r.optimizer, r.learning_rate, r.batch_size, r.epochs, r.ema_decay) for r in mnist} == {
        ("adam", 0.01, 256, 50, 0.9999)
    }
    assert [_rate(mnist[0], 215 * epoch, 215) for epoch in (0, 19, 20, 49)] == pytest.approx(
        [0.01, 0.01, 0.002, 0.0004]
    )
    cifar = dpimagebench_recipes("cifar")
    assert {(r.optimizer, r.learning_rate, r.batch_size, r.epochs) for r in cifar} == {("sgd", 0.1, 126, 200)}
    rates = [_rate(QUICK, step, 100) for step in range(100 * QUICK.epochs)]
    assert max(rates) == pytest.approx(QUICK.learning_rate, rel=0.01)
    assert rates[-1] < 1e-4 * QUICK.learning_rate < rates[0]


def test_a_learnable_set_is_learned_and_repeats_exactly() -> None:
    torch.manual_seed(3)
    expected_next = torch.rand(2)
    torch.manual_seed(3)
    fits = [fit_classifier(TINY, bars(200, 0), bars(40, 1), num_classes=2, seed=1) for _ in range(2)]
    assert torch.equal(torch.rand(2), expected_next)
    assert fits[0].validation_accuracy == max(fits[0].history) >= 0.95
    assert fits[0].history == fits[1].history
    assert len(fits[0].history) == 4
    states = [fit.model.state_dict() for fit in fits]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    other = fit_classifier(TINY, bars(200, 0), bars(40, 1), num_classes=2, seed=2)
    assert not torch.equal(other.model.head.weight, fits[0].model.head.weight)


def test_the_best_epoch_by_validation_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measured values are replaced: the weights that come back are those of the epoch with the best one."""
    seen: list[torch.Tensor] = []
    told = iter([0.5, 0.9, 0.9, 0.4])

    def measured(model, data, device):  # type: ignore[no-untyped-def]
        seen.append(model.head.weight.detach().clone())
        return next(told)

    monkeypatch.setattr(fitting, "accuracy", measured)
    fit = fit_classifier(TINY, bars(60, 0), bars(40, 1), num_classes=2, seed=1)
    assert (fit.epoch, fit.validation_accuracy) == (3, 0.9)
    assert torch.equal(fit.model.head.weight, seen[2])
    assert not torch.equal(seen[2], seen[3])


def test_the_averaged_weights_are_a_weighted_mean_of_the_visited_ones() -> None:
    recipe = replace(TINY, epochs=1, batch_size=20, ema_decay=0.9)
    data = bars(60, 0)
    model = build_classifier("quick", 1, 2, **recipe.sizes)
    fit = fitting._Fit(recipe, model, data, data, 0, torch.device("cpu"))
    expected = model.head.weight.detach().clone()
    for step in fit.epoch(0):
        decay = min(0.9, (2 + step) / (11 + step))
        expected = decay * expected + (1 - decay) * model.head.weight.detach()
    assert torch.allclose(fit.average["head.weight"], expected, atol=1e-6)


@pytest.mark.parametrize("stopped_after", [1, 3])
def test_a_killed_training_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_after: int
) -> None:
    train, validation = bars(100, 0), bars(40, 1)
    recipe = replace(TINY, flip=True, shift=1)
    whole = fit_classifier(recipe, train, validation, num_classes=2, seed=1)
    save = fitting._Fit.save

    def die(self: fitting._Fit, folder: Path) -> None:
        save(self, folder)
        if len(self.history) == stopped_after:
            raise MemoryError

    monkeypatch.setattr(fitting._Fit, "save", die)
    with pytest.raises(MemoryError):
        fit_classifier(recipe, train, validation, num_classes=2, seed=1, folder=tmp_path)
    monkeypatch.setattr(fitting._Fit, "save", save)
    steps = []
    step = fitting._Fit.step
    monkeypatch.setattr(fitting._Fit, "step", lambda self, *a: (steps.append(a[2]), step(self, *a))[1])
    resumed = fit_classifier(recipe, train, validation, num_classes=2, seed=1, folder=tmp_path)
    assert steps[0] == 7 * stopped_after
    assert resumed.history == whole.history
    assert resumed.epoch == whole.epoch
    states = [fit.model.state_dict() for fit in (resumed, whole)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    with pytest.raises(ValueError, match=r"other settings or images \(training_images differ\)"):
        fit_classifier(recipe, bars(100, 5), validation, num_classes=2, seed=1, folder=tmp_path)
    with pytest.raises(ValueError, match="recipe differ"):
        fit_classifier(replace(recipe, epochs=9), train, validation, num_classes=2, seed=1, folder=tmp_path)
    assert load_newest(tmp_path / "checkpoint").config["best_epoch"] == whole.epoch


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"optimizer": "lion"}, "optimizer"),
        ({"architecture": "vgg"}, "no classifier is called 'vgg'"),
        ({"architecture": "resnet", "sizes": {"depth": 9}}, "depth must be 6 n"),
    ],
)
def test_a_recipe_that_means_nothing_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_classifier(replace(TINY, **change), bars(20, 0), bars(8, 1), num_classes=2, seed=0)


def test_images_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"uint8 \[N, C, S, S\]"):
        LabelledImages(torch.zeros(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels must be int64 \[3\]"):
        LabelledImages(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels span 0\.\.1, not 0\.\.0"):
        fit_classifier(TINY, bars(20, 0), bars(8, 1), num_classes=1, seed=0)
    with pytest.raises(ValueError, match=r"\[1, 8, 8\], validation images \[1, 9, 9\]"):
        fit_classifier(TINY, bars(20, 0), bars(8, 1, size=9), num_classes=2, seed=0)
