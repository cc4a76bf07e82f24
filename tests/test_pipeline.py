# SPDX-License-Identifier: Apache-2.0
"""The pipeline: labels in, images out, repeatable, saved without pickles."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import wavedp
from wavedp import superres
from wavedp.models import AutoregressiveConfig, AutoregressiveTransformer, SpectralTokenizer, SpectralTokenizerConfig

CLASSES = ("cat", "dog", "owl")


@pytest.fixture
def pipeline() -> wavedp.CoarseToFinePipeline:
    torch.manual_seed(0)
    tokenizer = SpectralTokenizer(SpectralTokenizerConfig(image_size=16, levels=2, grid=2, width=16, heads=2))
    config = AutoregressiveConfig(3, 4, 1, tokenizer.config.approximation_codes, 1, width=16, depth=1, heads=2)
    return wavedp.CoarseToFinePipeline(
        tokenizer, AutoregressiveTransformer(config), superres.load("haar", scale=4), classes=CLASSES
    )


def test_coarse_and_fine_images_agree(pipeline: wavedp.CoarseToFinePipeline, device: torch.device):
    output = pipeline.to(device)(num_images=7, generator=torch.Generator(device).manual_seed(0))
    assert output.coarse.shape == (7, 1, 4, 4)
    assert output.images.shape == (7, 1, 16, 16)
    assert output.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    torch.testing.assert_close(output.images, output.coarse.repeat_interleave(4, 2).repeat_interleave(4, 3))
    assert 0 <= output.images.min() <= output.images.max() <= 1


def test_coarse_images_are_decoded_tokens(pipeline: wavedp.CoarseToFinePipeline):
    output = pipeline("dog", 2, temperature=0)
    tokens = pipeline.autoregressive.generate(torch.tensor([1, 1]), temperature=0)
    torch.testing.assert_close(output.coarse, pipeline.tokenizer.decode(tokens))


@pytest.mark.parametrize(
    ("labels", "count", "expected"),
    [
        (None, None, [0, 1, 2]),
        (2, 3, [2, 2, 2]),
        ("owl", None, [2]),
        (["owl", 0], 3, [2, 0, 2]),
        (torch.tensor([1, 1, 0]), None, [1, 1, 0]),
    ],
)
def test_labels_by_name_number_and_turn(pipeline: wavedp.CoarseToFinePipeline, labels, count, expected):
    assert pipeline(labels, count).labels.tolist() == expected


def test_a_generator_repeats_and_batches_differ_only_in_the_draw(pipeline: wavedp.CoarseToFinePipeline):
    def draw(seed: int) -> torch.Tensor:
        return pipeline(num_images=6, generator=torch.Generator().manual_seed(seed)).images

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    greedy = pipeline(num_images=6, temperature=0).images
    assert torch.equal(greedy, pipeline(num_images=6, temperature=0, batch_size=4).images)


def test_super_resolution_can_be_left_out(pipeline: wavedp.CoarseToFinePipeline):
    output = pipeline(num_images=2, super_resolve=False)
    assert torch.equal(output.images, output.coarse)


def test_it_comes_back_from_disk_the_same(pipeline: wavedp.CoarseToFinePipeline, tmp_path: Path):
    pipeline.save_pretrained(tmp_path / "p")
    assert {f.suffix for f in (tmp_path / "p").rglob("*") if f.is_file()} == {".json", ".safetensors"}
    loaded = wavedp.CoarseToFinePipeline.from_pretrained(tmp_path / "p")
    assert loaded.classes == CLASSES
    seeds = [torch.Generator().manual_seed(5) for _ in range(2)]
    assert torch.equal(
        pipeline(num_images=4, generator=seeds[0]).images, loaded(num_images=4, generator=seeds[1]).images
    )
    replaced = wavedp.CoarseToFinePipeline.from_pretrained(
        tmp_path / "p", super_resolver=superres.load("bicubic", scale=2)
    )
    assert replaced(num_images=1).images.shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"class_labels": "cow"}, "unknown class 'cow'"),
        ({"class_labels": 3}, "unknown class 3"),
        ({"class_labels": -1}, "unknown class -1"),
        ({"class_labels": True}, "unknown class True"),
        ({"class_labels": []}, "class_labels is empty"),
        ({"num_images": 0}, "num_images"),
        ({"num_images": 2, "batch_size": 0}, "batch_size"),
    ],
)
def test_bad_calls_are_refused(pipeline: wavedp.CoarseToFinePipeline, call: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        pipeline(**call)


def test_classes_are_the_models_own_names_or_numbers(pipeline: wavedp.CoarseToFinePipeline):
    unnamed = wavedp.CoarseToFinePipeline(pipeline.tokenizer, pipeline.autoregressive, pipeline.super_resolver)
    assert unnamed.classes == ("0", "1", "2")
    config = replace(pipeline.autoregressive.config, class_names=("x", "y", "z"))
    named = AutoregressiveTransformer(config)
    assert wavedp.CoarseToFinePipeline(pipeline.tokenizer, named, pipeline.super_resolver).classes == ("x", "y", "z")


def test_parts_that_do_not_belong_together_are_refused(pipeline: wavedp.CoarseToFinePipeline, tmp_path: Path):
    with pytest.raises(ValueError, match="2 class names for a model of 3 classes"):
        wavedp.CoarseToFinePipeline(
            pipeline.tokenizer, pipeline.autoregressive, pipeline.super_resolver, classes=("a", "b")
        )
    other = SpectralTokenizer(SpectralTokenizerConfig(image_size=32, levels=2, grid=4, width=16, heads=2))
    with pytest.raises(ValueError, match="not trained together"):
        wavedp.CoarseToFinePipeline(other, pipeline.autoregressive, pipeline.super_resolver, classes=CLASSES)
    with pytest.raises(FileNotFoundError, match=r"model_index\.json"):
        wavedp.CoarseToFinePipeline.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text('{"pipeline": "Other"}')
    with pytest.raises(ValueError, match="does not describe a CoarseToFinePipeline"):
        wavedp.CoarseToFinePipeline.from_pretrained(tmp_path)
