# SPDX-License-Identifier: Apache-2.0
"""Positions by scale, row and column; the text prefix; embeddings on disk; a T5 encoder made of random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from wavedp.models import (
    AutoregressiveConfig,
    AutoregressiveTransformer,
    T5TextEncoder,
    TextEmbeddings,
    load_autoregressive,
    save_model,
)
from wavedp.models.positions import RotaryPositions, coordinates, rotated

SIZES = {"num_classes": 3, "tokens_per_scale": 4, "num_scales": 3, "approximation_codes": 10, "detail_codes": 7}


def make(**changes: Any) -> AutoregressiveTransformer:
    torch.manual_seed(0)
    model = AutoregressiveTransformer(AutoregressiveConfig(**{**SIZES, "width": 16, "depth": 2, "heads": 2, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def test_the_default_model_has_the_names_it_always_had():
    blocks = ["attention_norm.weight", "qkv.weight", "projection.weight", "mlp_norm.weight"]
    blocks += ["mlp_in.weight", "mlp_in.bias", "mlp_out.weight", "mlp_out.bias"]
    assert list(make(depth=1).state_dict()) == [
        *(f"{name}_embedding.weight" for name in ("class", "token", "position")),
        *(f"blocks.0.weights.{name}" for name in blocks),
        "norm.weight",
        *(f"{head}_head.{name}" for head in ("approximation", "detail") for name in ("weight", "bias")),
    ]


def test_coordinates_are_in_raster_order_within_a_scale():
    assert coordinates(2, 2).tolist() == [
        [0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [1, 0, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1],
    ]  # fmt: skip


def test_factorised_positions_are_sums():
    model = make(position="factorised")
    got = model.positions(torch.tensor([[6]]))[0, 0]  # scale 1, row 1, column 0
    expected = model.scale_embedding.weight[1] + model.row_embedding.weight[1] + model.column_embedding.weight[0]
    torch.testing.assert_close(got, expected)
    assert not any(name.startswith("position_embedding") for name in model.state_dict())


def test_rotary_attention_depends_on_how_far_apart_tokens_are():
    """The query that predicts a token, and keys of tokens one row up: one number wherever the pair stands."""
    config = AutoregressiveConfig(**{**SIZES, "tokens_per_scale": 16}, width=24, depth=1, heads=1)
    cos_q, sin_q, cos_k, sin_k = RotaryPositions(config)(0, config.length)
    query, key = torch.randn(2, 24, dtype=torch.float64)

    def score(predicted: int, seen: int) -> float:  # token `seen` lies in the slot that predicts the next
        q = rotated(query, cos_q[predicted], sin_q[predicted])
        return float(q @ rotated(key, cos_k[seen + 1], sin_k[seen + 1]))

    assert score(5, 1) == pytest.approx(score(10, 6), abs=1e-5)
    assert score(5, 1) == pytest.approx(score(16 + 5, 16 + 1), abs=1e-5)  # in another scale
    assert abs(score(5, 1) - score(5, 2)) > 1e-3  # another column
    assert abs(score(16 + 5, 1) - score(5, 1)) > 1e-3  # across scales
    assert float(rotated(key, cos_k[9], sin_k[9]).norm()) == pytest.approx(float(key.norm()), rel=1e-6)


@pytest.mark.parametrize("changes", [{"position": "rotary"}, {"position": "factorised", "per_scale_heads": True}])
def test_models_with_options_are_causal_and_come_back(tmp_path: Path, changes: dict[str, Any]):
    model = make(text_width=5, text_length=2, **changes)
    labels, text = torch.tensor([1]), torch.randn(1, 2, 5)
    tokens = torch.randint(7, (1, 12))
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 7
    before, after = (
        model.hidden(labels, x[:, :-1], text, torch.ones(1, 2, dtype=torch.bool)) for x in (tokens, changed)
    )
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7], after[:, 7])
    save_model(model, tmp_path / "m")
    loaded = load_autoregressive(tmp_path / "m")
    assert loaded.config == model.config
    assert torch.equal(loaded.loss(tokens, labels, text), model.loss(tokens, labels, text))


def test_each_detail_scale_has_its_own_head():
    model = make(per_scale_heads=True)
    heads = [model.head(t) for t in (0, 4, 8)]
    assert heads == [model.approximation_head, *model.detail_heads]
    tokens, labels = torch.randint(7, (2, 12)), torch.tensor([0, 1])
    before = model.loss(tokens[:, :8], labels)
    with torch.no_grad():
        model.detail_heads[1].weight.mul_(2)
    assert torch.equal(model.loss(tokens[:, :8], labels), before)


def test_dropout_hides_text_alone_or_with_the_class():
    model = make(text_width=5, text_length=2, class_dropout=0.3, text_dropout=0.5)
    tokens, text = torch.randint(7, (1, 12)), torch.randn(1, 2, 5)
    label, none = torch.tensor([1]), torch.tensor([model.no_class])
    cases = {
        "both": model.loss(tokens, label, text),
        "class": model.loss(tokens, label),
        "none": model.loss(tokens, none),
    }
    torch.manual_seed(0)
    n = 4000
    losses = model.train().loss(tokens.repeat(n, 1), label.repeat(n), text.repeat(n, 1, 1))
    shares = {name: torch.isclose(losses, loss, rtol=1e-4).float().mean().item() for name, loss in cases.items()}
    assert shares == pytest.approx({"both": 0.35, "class": 0.35, "none": 0.3}, abs=0.04)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": "absolute"}, "position must be one of"),
        ({"position": "rotary", "tokens_per_scale": 5}, "no square"),
        ({"position": "rotary", "width": 8}, "at least 6 dimensions"),
        ({"text_width": 4}, "both"),
        ({"text_width": -1, "text_length": 1}, "text_width"),
    ],
)
def test_bad_configurations_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("text", "mask", "message"),
    [
        (torch.zeros(1, 3, 5), None, r"\[1, 2, 5\]"),
        (torch.zeros(2, 2, 5), None, r"\[1, 2, 5\]"),
        (torch.zeros(1, 2, 4), None, r"\[1, 2, 5\]"),
        (torch.zeros(1, 2, 5), torch.ones(1, 1, dtype=torch.bool), "text_mask must have shape"),
    ],
)
def test_texts_that_do_not_fit_are_refused(text: torch.Tensor, mask: torch.Tensor | None, message: str):
    with pytest.raises(ValueError, match=message):
        make(text_width=5, text_length=2).generate(torch.tensor([0]), text=text, text_mask=mask)


def test_embeddings_come_back_from_disk(tmp_path: Path):
    text = TextEmbeddings(torch.randn(3, 2, 5), torch.tensor([[True, True], [True, False], [False, False]]))
    text.save(tmp_path / "t.safetensors")
    loaded = TextEmbeddings.load(tmp_path / "t.safetensors")
    assert torch.equal(loaded.embeddings, text.embeddings)
    assert torch.equal(loaded.mask, text.mask)
    (tmp_path / "bad").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="bad"):
        TextEmbeddings.load(tmp_path / "bad")
    with pytest.raises(FileNotFoundError, match="there is no"):
        TextEmbeddings.load(tmp_path / "none")
    with pytest.raises(ValueError, match="not finite"):
        TextEmbeddings(torch.full((1, 1, 1), torch.nan))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 encoder of random weights with a word-level tokenizer, as save_pretrained writes them."""
    transformers = pytest.importorskip("transformers", reason="needs transformers, of the extra [sr]")
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers, which transformers brings")
    folder = tmp_path_factory.mktemp("t5")
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "shoe", "shirt"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=7, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(folder, safe_serialization=True)
    return folder


def test_a_t5_encoder_embeds_each_text_by_itself(t5: Path):
    encoder = T5TextEncoder(str(t5), length=4)
    text = encoder(["a red shoe", "a shirt", "a"])
    assert text.embeddings.shape == (3, 4, 8)
    assert text.mask.tolist() == [[True] * 3 + [False], [True] * 2 + [False] * 2, [True] + [False] * 3]
    assert (text.embeddings[~text.mask] == 0).all()
    torch.testing.assert_close(encoder(["a shirt"]).embeddings[0], text.embeddings[1])
    torch.testing.assert_close(encoder(["a red shoe", "a shirt", "a"], batch_size=2).embeddings, text.embeddings)
    assert not torch.allclose(text.embeddings[0, 1], text.embeddings[1, 1])
    states = encoder.model(torch.tensor([[3, 4, 5]])).last_hidden_state[0]
    torch.testing.assert_close(text.embeddings[0, :3], states, rtol=1e-4, atol=1e-5)


def test_an_encoder_that_is_not_there_is_named(tmp_path: Path):
    pytest.importorskip("transformers", reason="needs transformers, of the extra [sr]")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        T5TextEncoder(str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="cannot load a T5 encoder"):
        T5TextEncoder(str(tmp_path))
