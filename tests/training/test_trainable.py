# SPDX-License-Identifier: Apache-2.0
"""What the private stage trains: presets, LoRA merged into what is published, and texts of the images."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from wavedp.data import TensorImageDataset
from wavedp.models import (
    AutoregressiveConfig,
    AutoregressiveTransformer,
    SpectralTokenizer,
    TextEmbeddings,
    load_autoregressive,
)
from wavedp.privacy import PrivacyLedger, PrivacySpec
from wavedp.training.checkpoints import load_newest
from wavedp.training.loop import TrainingConfig
from wavedp.training.private import PrivateTrainingConfig, finetune_private
from wavedp.training.public import pretrain_autoregressive
from wavedp.training.trainable import choose_trainable

SPEC = PrivacySpec(
    sample_rate=0.3,
    steps=4,
    noise_multiplier=1.0,
    max_grad_norm=0.5,
    expected_batch_size=6.0,
    delta=1e-3,
    dataset_size_bound=100,
)
HEADS = {"approximation_head.weight", "approximation_head.bias", "detail_head.weight", "detail_head.bias"}


def make_model(**changes: Any) -> AutoregressiveTransformer:
    torch.manual_seed(1)
    sizes = {"num_scales": 2, "width": 16, "depth": 3, "heads": 2}
    return AutoregressiveTransformer(
        AutoregressiveConfig(2, 4, approximation_codes=256, detail_codes=256, **{**sizes, **changes})
    )


def trained_names(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_presets_name_blocks_and_heads():
    model = make_model()
    everything = {name for name, _ in model.named_parameters()}
    for name in ("all", ".*"):
        assert choose_trainable(model, name) == sum(p.numel() for p in model.parameters())
        assert trained_names(model) == everything
    choose_trainable(model, "heads")
    assert trained_names(model) == HEADS
    choose_trainable(model, "last-2-blocks")
    blocks = {name for name in everything if name.startswith(("blocks.1.", "blocks.2."))}
    assert trained_names(model) == {*HEADS, "norm.weight", *blocks}
    for wrong in ("last-0-blocks", "last-4-blocks"):
        with pytest.raises(ValueError, match="has 3 blocks"):
            choose_trainable(model, wrong)
    with pytest.raises(ValueError, match="give lora_rank"):
        choose_trainable(model, "all", lora_alpha=2.0)


def test_the_heads_of_scales_are_heads():
    model = make_model(per_scale_heads=True, num_scales=3)
    choose_trainable(model, "heads")
    assert trained_names(model) == {
        f"{head}.{name}"
        for head in ("approximation_head", "detail_heads.0", "detail_heads.1")
        for name in ("weight", "bias")
    }


def test_adapters_are_trained_privately_and_merged(
    dataset: TensorImageDataset, tokenizer: SpectralTokenizer, tmp_path: Path
):
    """With strict noise, whose cost depends on how many parameters are trained."""
    model = make_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    config = PrivateTrainingConfig(lora_rank=2, lora_targets=r".*\.qkv", trainable="heads", learning_rate=0.1)
    count = 3 * 2 * (16 + 48) + 2 * (16 * 256 + 256)
    assert choose_trainable(make_model(), "heads", lora_rank=2, lora_targets=r".*\.qkv") == count
    spec = replace(SPEC, noise_mode="strict", trainable_parameters=count)
    statement = finetune_private(dataset, tokenizer, model, spec, config, tmp_path, progress=False)
    assert statement.steps_charged == 4
    assert any(f"{count} parameters" in sentence for sentence in statement.charged)
    saved = load_autoregressive(tmp_path / "model").state_dict()
    assert list(saved) == list(before)
    moved = {name for name in before if not torch.equal(saved[name], before[name])}
    assert moved == {*HEADS, *(f"blocks.{i}.weights.qkv.weight" for i in range(3))}
    change = saved["blocks.0.weights.qkv.weight"] - before["blocks.0.weights.qkv.weight"]
    assert torch.linalg.matrix_rank(change, atol=1e-5) == 2
    found = load_newest(tmp_path / "checkpoint")
    assert found is not None
    average = {name: value for name, value in found.tensors.items() if name.endswith(".average")}
    assert sum(value.numel() for value in average.values()) == count
    torch.testing.assert_close(
        average["optimizer.1.average"] @ average["optimizer.0.average"], change, atol=1e-5, rtol=0
    )


def test_a_run_with_adapters_goes_on_where_it_was(
    dataset: TensorImageDataset, tokenizer: SpectralTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = PrivateTrainingConfig(lora_rank=2, save_every=1)
    calls = 0
    loss = AutoregressiveTransformer.loss

    def failing(self: AutoregressiveTransformer, *args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return loss(self, *args)

    monkeypatch.setattr(AutoregressiveTransformer, "loss", failing)
    with pytest.raises(KeyboardInterrupt):
        finetune_private(dataset, tokenizer, make_model(), SPEC, config, tmp_path, progress=False)
    monkeypatch.undo()
    statement = finetune_private(dataset, tokenizer, make_model(), SPEC, config, tmp_path, progress=False)
    assert statement.steps_charged == 4
    assert list(load_autoregressive(tmp_path / "model").state_dict()) == list(make_model().state_dict())


def test_images_and_their_texts_are_one_record(
    dataset: TensorImageDataset, tokenizer: SpectralTokenizer, tmp_path: Path
):
    text = TextEmbeddings(torch.randn(20, 3, 5), torch.rand(20, 3) < 0.8)
    model = make_model(text_width=5, text_length=3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    config = PrivateTrainingConfig(learning_rate=1e-2)

    def refused(message: str, model: AutoregressiveTransformer, text: TextEmbeddings | None) -> None:
        with pytest.raises(ValueError, match=message):
            finetune_private(dataset, tokenizer, model, SPEC, config, tmp_path, text=text, progress=False)
        assert not (tmp_path / "ledger.jsonl").exists()

    refused("tiny has none", model, None)
    refused("takes no text", make_model(), text)
    refused("2 texts for the 20 images", model, TextEmbeddings(torch.zeros(2, 3, 5)))
    refused("width 4 for a model of 3 and 5", model, TextEmbeddings(torch.zeros(20, 3, 4)))
    statement = finetune_private(dataset, tokenizer, model, SPEC, config, tmp_path, text=text, progress=False)
    assert any("caption" in sentence for sentence in statement.assumptions)
    assert not torch.equal(model.text_projection.weight, before["text_projection.weight"])
    with PrivacyLedger(tmp_path / "ledger.jsonl", SPEC) as ledger:
        assert ledger.remaining == 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_public_training_learns_what_the_text_says(tokenizer: SpectralTokenizer, tmp_path: Path, precision: str):
    """One image of two kinds, told apart by the text alone: the loss with the right text is the lower one."""
    images = torch.stack([torch.zeros(1, 16, 16), torch.full((1, 16, 16), 255)]).to(torch.uint8)
    dataset = TensorImageDataset(images, torch.zeros(2, dtype=torch.int64), classes=("a", "b"), name="two")
    text = TextEmbeddings(torch.tensor([[[1.0, -1.0]], [[-1.0, 1.0]]]))
    config = make_model(text_width=2, text_length=1, num_scales=1, depth=1).config
    training = TrainingConfig(steps=60, batch_size=8, learning_rate=2e-2, warmup_steps=1, precision=precision)
    model = pretrain_autoregressive(dataset, tokenizer, config, training, tmp_path, text=text, progress=False)
    tokens = tokenizer.encode(images.float() / 255)[:, :4]
    assert not torch.equal(tokens[0], tokens[1])
    labels, mask = torch.zeros(2, dtype=torch.int64), torch.ones(2, 1, dtype=torch.bool)
    right = model.loss(tokens, labels, text.embeddings, mask)
    wrong = model.loss(tokens, labels, text.embeddings.flip(0), mask)
    assert (right < 0.2).all()
    assert (wrong > right + 1).all()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
