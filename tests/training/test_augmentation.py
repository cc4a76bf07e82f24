# SPDX-License-Identifier: Apache-2.0
"""Versions of an image in the private stage: what they are, and that a record still contributes its bound at most."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from wavedp.data import TensorImageDataset, to_unit_range
from wavedp.functional import NoiseKey
from wavedp.models import (
    AutoregressiveConfig,
    AutoregressiveTransformer,
    SpectralTokenizer,
    SpectralTokenizerConfig,
    TextEmbeddings,
)
from wavedp.optim import DPAdam
from wavedp.privacy import Entropy, PoissonSampler, PrivacySpec, PrivateOptimizer, physical_batches
from wavedp.training.augmentation import Augmentation, ImageVersions, mirror_and_move
from wavedp.training.private import PrivateTrainingConfig, finetune_private
from wavedp.training.public import tokenize

SPEC = PrivacySpec(
    sample_rate=0.3,
    steps=8,
    noise_multiplier=1.0,
    max_grad_norm=0.5,
    expected_batch_size=6.0,
    delta=1e-3,
    dataset_size_bound=100,
)
WHOLE = replace(SPEC, sample_rate=1.0, steps=1)  # every record is in the only batch
PLAIN = PrivateTrainingConfig(learning_rate=1e-2, physical_batch_size=4, save_every=2)
THREE = replace(PLAIN, augmentations=3, augmentation_flip=True)
TEXT = TextEmbeddings(torch.randn(12, 3, 5, generator=torch.Generator().manual_seed(5)))


@pytest.fixture
def dataset() -> TensorImageDataset:
    """Squares of 4 pixels, so that most versions of an image have other tokens."""
    images = torch.randint(256, (12, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = images.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    return TensorImageDataset(images, torch.arange(12) % 2, classes=("a", "b"), name="tiny")


@pytest.fixture
def tokenizer(dataset: TensorImageDataset) -> SpectralTokenizer:
    torch.manual_seed(0)
    model = SpectralTokenizer(SpectralTokenizerConfig(image_size=16, levels=2, grid=2, width=16, heads=2))
    model.fit_normalisation(to_unit_range(dataset.images))
    return model.eval()


def make_model(**changes: Any) -> AutoregressiveTransformer:
    torch.manual_seed(1)
    return AutoregressiveTransformer(AutoregressiveConfig(2, 4, 1, 256, 256, width=16, depth=1, heads=2, **changes))


def sums_of(*arguments: Any, monkeypatch: pytest.MonkeyPatch, **named: Any) -> dict[str, Tensor]:
    """The sums of the last step of `finetune_private`, without their noise."""
    sums: dict[str, Tensor] = {}
    step = PrivateOptimizer.step

    def looking(self: PrivateOptimizer, *rest: Any) -> None:
        sums.update({name: value.detach().cpu().double() for name, value in self._sums.items()})
        step(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(PrivateOptimizer, "step", looking)
        finetune_private(*arguments, progress=False, **named)
    return sums


def gradients(model: AutoregressiveTransformer, tokens: Tensor, labels: Tensor, *text: Tensor) -> dict[str, Tensor]:
    """Of the mean loss of the versions ``[K, T]`` of one record, by autograd alone."""
    model.zero_grad()
    model.loss(tokens, labels, *text).mean().backward()
    return {name: p.grad.cpu().double() for name, p in model.named_parameters() if p.grad is not None}


def norm_of(grads: dict[str, Tensor]) -> float:
    return float(torch.cat([g.flatten() for g in grads.values()]).norm())


def test_images_are_mirrored_and_moved_as_a_whole() -> None:
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).repeat(200, 1, 1, 1)
    only_flip = mirror_and_move(images, torch.Generator().manual_seed(0), shift=0, flip=True)
    mirrored = (only_flip == images.flip(3)).flatten(1).all(dim=1)
    assert 70 < int(mirrored.sum()) < 130
    assert torch.equal(only_flip[~mirrored], images[~mirrored])
    moved = mirror_and_move(images, torch.Generator().manual_seed(0), shift=1, flip=False)
    inside = {tuple((m[0, 1:7, 1:7] - images[0, 0, 1:7, 1:7].int()).unique().tolist()) for m in moved.int()}
    assert inside == {(8 * rows + columns,) for rows in (-1, 0, 1) for columns in (-1, 0, 1)}


def test_versions_are_the_image_and_others_within_the_shift(dataset: TensorImageDataset):
    settings = Augmentation(augmentations=40, augmentation_shift=2, augmentation_flip=True)
    versions = ImageVersions(dataset, settings)
    assert versions.labels.tolist() == [label for label in dataset.labels.tolist() for _ in range(40)]
    shown = versions.images.unflatten(0, (12, 40))
    assert torch.equal(shown[:, 0], dataset.images)
    drawn = set()
    for image, others in zip(dataset.images, shown[:, 1:]):
        padded = {
            flip: torch.nn.functional.pad(image.float().flip(2) if flip else image.float(), (2, 2, 2, 2), "replicate")
            for flip in (False, True)
        }
        places = {
            padded[flip][:, y : y + 16, x : x + 16].byte().numpy().tobytes(): (flip, y, x)
            for flip in (False, True) for y in range(5) for x in range(5)
        }  # fmt: skip
        found = [places[other.numpy().tobytes()] for other in others]
        assert {flip for flip, _, _ in found} == {False, True}
        assert {y for _, y, _ in found} == {x for _, _, x in found} == {0, 1, 2, 3, 4}
        drawn.add(tuple(found))
    assert len(drawn) == 12  # each image's versions are its own


def test_an_image_keeps_its_versions_wherever_it_stands(dataset: TensorImageDataset):
    """Read in chunks, again, or where a record before it is gone: only pixels and seed count."""
    shown = ImageVersions(dataset, THREE).images.unflatten(0, (12, 3))
    again = ImageVersions(dataset, THREE)
    parts = [again.stack(part) for part in torch.arange(36).split(5)]
    assert torch.equal(torch.cat(parts).unflatten(0, (12, 3)), shown)
    assert torch.equal(again.stack([7, 35, 7, 6]), shown.flatten(0, 1)[[7, 35, 7, 6]])
    assert again.stack([]).shape == (0, 1, 16, 16)
    fewer = ImageVersions(dataset.subset([0, 1, 2, 4, 5]), THREE)
    assert torch.equal(fewer.images.unflatten(0, (5, 3)), shown[[0, 1, 2, 4, 5]])
    other = ImageVersions(dataset, replace(THREE, augmentation_seed=1)).images.unflatten(0, (12, 3))
    assert torch.equal(other[:, 0], shown[:, 0])
    assert not torch.equal(other[:, 1:], shown[:, 1:])


def test_one_version_is_the_stage_without_versions_to_the_bit(
    dataset: TensorImageDataset, tokenizer: SpectralTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Under the same noise and batches, the weights are those of the bare loop over `tokenize`'s tokens."""

    def replayed() -> None:
        noise, batches = Entropy(3, "noise"), Entropy(3, "sampling")
        monkeypatch.setattr(
            Entropy, "key", lambda _: NoiseKey.insecure(int.from_bytes(noise_read(noise, 32), "little"))
        )
        monkeypatch.setattr(Entropy, "read", lambda _, size: noise_read(batches, size))

    noise_read = Entropy.read
    replayed()
    model, bare = make_model(class_dropout=0.0), make_model(class_dropout=0.0)
    finetune_private(dataset, tokenizer, model, SPEC, replace(PLAIN, augmentation_seed=9), tmp_path, progress=False)
    replayed()
    tokens, labels = tokenize(tokenizer, dataset, 1), dataset.labels
    optimizer = DPAdam(bare.train().parameters(), lr=1e-2, ema_decay=PLAIN.ema_decay)
    sampler = PoissonSampler.for_spec(SPEC, 12)
    with PrivateOptimizer(bare, optimizer, SPEC, sampler=sampler) as private:
        for indices in sampler:
            for chunk in physical_batches(indices, 4):
                private.backward(bare.loss(tokens[chunk], labels[chunk]), records=chunk)
            private.step()
    for (name, ours), parameter in zip(model.named_parameters(), bare.parameters()):
        assert torch.equal(ours, optimizer.state[parameter]["average"]), name


@pytest.mark.parametrize("physical", [4, 256], ids=["micro-batches", "one-batch"])
@pytest.mark.parametrize("text", [None, TEXT], ids=["classes", "text"])
def test_the_sum_is_that_of_clipped_means_over_versions(
    dataset: TensorImageDataset, tokenizer: SpectralTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    text: TextEmbeddings | None, physical: int, device: torch.device,
):  # fmt: skip
    sizes = {} if text is None else {"text_length": 3, "text_width": 5, "text_dropout": 0.0}
    make = {"class_dropout": 0.0, **sizes}
    model, tokenizer = make_model(**make).to(device), tokenizer.to(device)
    tokens = tokenize(tokenizer, ImageVersions(dataset, THREE), 1).unflatten(0, (12, 3)).to(device)
    assert all(len(versions.unique(dim=0)) > 1 for versions in tokens)
    each = []
    for record in range(12):
        labels = dataset.labels[[record] * 3].to(device)
        each.append(
            gradients(
                model, tokens[record], labels, *(() if text is None else text.rows(torch.tensor([record] * 3), device))
            )
        )
    norms = [norm_of(grads) for grads in each]
    bound = sorted(norms)[6]  # half of the records are clipped
    factors = [min(1.0, bound / norm) for norm in norms]
    expected = {name: sum(f * grads[name] for f, grads in zip(factors, each)) for name in each[0]}
    spec, config = replace(WHOLE, max_grad_norm=bound), replace(THREE, physical_batch_size=physical)
    fresh = make_model(**make).to(device)
    found = sums_of(dataset, tokenizer, fresh, spec, config, tmp_path, text=text, monkeypatch=monkeypatch)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-5 * bound), name


def test_a_record_contributes_its_bound_at_most(
    dataset: TensorImageDataset, tokenizer: SpectralTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The third record is left out, so that all behind it move up: the sum changes by its clipped gradient alone."""
    spec = replace(WHOLE, max_grad_norm=0.01)  # far below every norm
    config = replace(THREE, physical_batch_size=12)
    keep = [i for i in range(12) if i != 2]
    with_it, without = (
        sums_of(
            data, tokenizer, make_model(class_dropout=0.0), spec, config, tmp_path / name, monkeypatch=monkeypatch
        )
        for name, data in (("with", dataset), ("without", dataset.subset(keep)))
    )  # fmt: skip
    change = {name: with_it[name] - without[name] for name in with_it}
    tokens = tokenize(tokenizer, ImageVersions(dataset, THREE), 1).unflatten(0, (12, 3))
    own = gradients(make_model(class_dropout=0.0), tokens[2], dataset.labels[[2, 2, 2]])
    assert norm_of(own) > 1
    assert norm_of(change) == pytest.approx(0.01, rel=1e-3)
    for name, value in own.items():
        assert torch.allclose(change[name], value * (0.01 / norm_of(own)), rtol=1e-2, atol=1e-6), name


def test_a_resumed_run_shows_the_same_versions_and_states_the_same(
    dataset: TensorImageDataset, tokenizer: SpectralTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    expected = tokenize(tokenizer, ImageVersions(dataset, THREE), 1).unflatten(0, (12, 3))
    seen: list[tuple[Tensor, Tensor, Tensor | None]] = []
    batch: list[Tensor] = []
    loss, backward, step = AutoregressiveTransformer.loss, PrivateOptimizer.backward, PrivateOptimizer.step
    steps = 0

    def shown(self: AutoregressiveTransformer, tokens: Tensor, *rest: Any) -> Tensor:
        batch.append(tokens)
        return loss(self, tokens, *rest)

    def booked(self: PrivateOptimizer, losses: Tensor, records: Tensor, *, sample_id: Tensor | None) -> None:
        seen.append((records, batch.pop(), sample_id))
        backward(self, losses, records, sample_id=sample_id)

    def interrupting(self: PrivateOptimizer, *rest: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 3:
            os.kill(os.getpid(), signal.SIGINT)
        step(self, *rest)

    monkeypatch.setattr(AutoregressiveTransformer, "loss", shown)
    monkeypatch.setattr(PrivateOptimizer, "backward", booked)
    monkeypatch.setattr(PrivateOptimizer, "step", interrupting)
    with pytest.raises(KeyboardInterrupt):
        finetune_private(dataset, tokenizer, make_model(), SPEC, THREE, tmp_path / "k", progress=False)
    before = len(seen)
    statement = finetune_private(dataset, tokenizer, make_model(), SPEC, THREE, tmp_path / "k", progress=False)
    assert 0 < before < len(seen)
    for records, tokens, sample_id in seen:
        assert len(records) == 1  # 4 images at once are one record's three versions
        assert sample_id is not None
        assert sample_id.tolist() == records.tolist() * 3
        assert torch.equal(tokens, expected[records].flatten(0, 1))
    monkeypatch.undo()
    plain = finetune_private(dataset, tokenizer, make_model(), SPEC, PLAIN, tmp_path / "plain", progress=False)
    assert statement == plain


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"augmentations": 0}, ValueError, "augmentations must be >= 1, got 0"),
        ({"augmentations": 2.0}, TypeError, "augmentations must be an integer"),
        ({"augmentations": 2, "augmentation_shift": -1}, ValueError, "augmentation_shift must be >= 0, got -1"),
        ({"augmentations": 2, "augmentation_seed": -1}, ValueError, "augmentation_seed must be >= 0, got -1"),
        ({"augmentations": 2, "augmentation_flip": 1}, TypeError, "augmentation_flip must be True or False, got 1"),
        ({"augmentation_flip": True}, ValueError, "set augmentations to 2 or more"),
        ({"augmentations": 2, "augmentation_shift": 0}, ValueError, "are copies of one image"),
        ({"augmentations": 5}, ValueError, "physical_batch_size=4 has no room for the 5 versions of one image"),
    ],
)
def test_settings_without_sense_are_refused(settings: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        replace(PLAIN, **settings)


def test_a_shift_by_a_whole_image_is_refused_before_anything_is_charged(
    dataset: TensorImageDataset, tokenizer: SpectralTokenizer, tmp_path: Path
):
    config = replace(THREE, augmentation_shift=16)
    with pytest.raises(ValueError, match="augmentation_shift=16 would move images of 16 pixels out of their frame"):
        finetune_private(dataset, tokenizer, make_model(), SPEC, config, tmp_path / "x", progress=False)
    assert not (tmp_path / "x").exists()
    ImageVersions(dataset, replace(PLAIN, augmentation_shift=16))  # nothing is moved


def test_an_empty_private_set_has_no_versions(tokenizer: SpectralTokenizer, tmp_path: Path):
    empty = TensorImageDataset(
        torch.zeros(0, 1, 16, 16, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), classes=("a", "b"), name="none"
    )
    assert finetune_private(empty, tokenizer, make_model(), SPEC, THREE, tmp_path, progress=False).steps_charged == 8
