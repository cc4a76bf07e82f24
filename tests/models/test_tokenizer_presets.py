# SPDX-License-Identifier: Apache-2.0
"""Named tokenizers: the paper's geometry exactly, on no memory; the small ones really; the page that lists them."""

import functools
import hashlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from wavedp.models import SpectralTokenizer, SpectralTokenizerConfig
from wavedp.models.tokenizer_config import PRESETS

DOCS = Path(__file__).parents[2] / "docs" / "models.md"

# (coefficient map's side, channels, patch's side) of every scale; the paper's, arXiv 2412.09607
GEOMETRY = {
    "sit-4-256": [(32, 3, 2), (32, 9, 2), (64, 9, 4), (128, 9, 8)],
    "sit-5-256": [(16, 3, 1), (16, 9, 1), (32, 9, 2), (64, 9, 4), (128, 9, 8)],
    "sit-6-512": [(16, 3, 1), (16, 9, 1), (32, 9, 2), (64, 9, 4), (128, 9, 8), (256, 9, 16)],
    "small-32": [(8, 1, 2), (8, 3, 2), (16, 3, 4)],
    "small-32-rgb": [(8, 3, 2), (8, 9, 2), (16, 9, 4)],
    "small-64": [(8, 1, 2), (8, 3, 2), (16, 3, 4), (32, 3, 8)],
    "small-64-rgb": [(8, 3, 2), (8, 9, 2), (16, 9, 4), (32, 9, 8)],
}
RESOLUTIONS = {
    "sit-4-256": [32, 64, 128, 256],
    "sit-5-256": [16, 32, 64, 128, 256],
    "sit-6-512": [16, 32, 64, 128, 256, 512],
    "small-32": [8, 16, 32],
    "small-32-rgb": [8, 16, 32],
    "small-64": [8, 16, 32, 64],
    "small-64-rgb": [8, 16, 32, 64],
}


@functools.cache
def on_no_memory(name: str) -> SpectralTokenizer:
    with torch.device("meta"):
        return SpectralTokenizer(SpectralTokenizerConfig.preset(name)).eval()


def count_by_hand(config: SpectralTokenizerConfig) -> int:
    """Parameters from the sizes alone, part by part."""

    def blocks(width: int, depth: int) -> int:
        hidden = int(width * config.mlp_ratio)
        one = 2 * width + 3 * width**2 + width**2 + 2 * width * hidden + hidden + width  # norms, QKV, projection, MLP
        return 2 * one * depth  # approximation and details

    encoder, decoder = config.width, config.decoder_width or config.width
    layout = config.layout()
    dims = [layout.token_dim(s) for s in range(layout.num_scales)]
    length = layout.num_scales * layout.tokens_per_scale
    count = blocks(encoder, config.encoder_depth) + blocks(decoder, config.decoder_depth) + encoder + decoder
    count += sum(d * encoder + encoder + decoder * d + d for d in dims) + length * (encoder + decoder)
    factors = encoder * config.code_dim + config.code_dim + config.code_dim * decoder + decoder
    return count + 2 * factors + (config.approximation_codes + config.detail_codes) * config.code_dim


@pytest.mark.parametrize("name", PRESETS)
def test_the_geometry_is_the_papers(name: str):
    layout = SpectralTokenizerConfig.preset(name).layout()
    scales = range(layout.num_scales)
    assert [(layout.map_size(s), layout.map_channels(s), layout.patch_size(s)) for s in scales] == GEOMETRY[name]
    assert [layout.resolution(k + 1) for k in scales] == RESOLUTIONS[name]
    assert layout.tokens_per_scale == (256 if name.startswith("sit") else 16)


@pytest.mark.parametrize("name", PRESETS)
def test_the_parameters_are_as_many_as_the_sizes_say(name: str):
    model = on_no_memory(name)
    assert sum(p.numel() for p in model.parameters()) == count_by_hand(model.config)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("sit")])
def test_the_papers_depths_widths_and_codes(name: str):
    model = on_no_memory(name)
    assert [len(model.encoder), len(model.decoder)] == [8, 32]
    assert [model.encoder_position.shape[1], model.decoder_position.shape[1]] == [512, 1280]
    assert [len(model.approximation_quantizer.codebook), len(model.detail_quantizer.codebook)] == [8192, 8192]


def test_the_papers_sizes_run_through():
    """Shapes only: the tokens of the whole and of the coarsest scale, and what they decode to."""
    model = on_no_memory("sit-5-256")
    for side, scales in ((256, 5), (16, 1)):
        images = torch.empty(2, 3, side, side, device="meta")
        output = model(images)
        assert output.tokens.shape == (2, 256 * scales)
        assert output.images.shape == images.shape


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("small")])
@pytest.mark.parametrize("quantizer", ["vq", "fsq"])
def test_the_small_ones_encode_and_decode_every_prefix(name: str, quantizer: str):
    torch.manual_seed(0)
    config = SpectralTokenizerConfig.preset(name, quantizer=quantizer)
    model = SpectralTokenizer(config).eval()
    images = torch.rand(3, config.channels, config.image_size, config.image_size)
    tokens = model.encode(images)
    assert int(tokens.max()) < config.approximation_codes == config.detail_codes == (256 if quantizer == "vq" else 240)
    for k, side in enumerate(RESOLUTIONS[name], start=1):
        coarse = F.avg_pool2d(images, config.image_size // side)
        assert torch.equal(model.encode(coarse), tokens[:, : 16 * k])
        assert model.decode(tokens[:, : 16 * k]).shape == coarse.shape


def test_a_preset_takes_changes():
    changed = SpectralTokenizerConfig.preset("sit-4-256", approximation_codes=512, causal="decoder")
    assert (changed.approximation_codes, changed.detail_codes, changed.causal) == (512, 8192, "decoder")
    with pytest.raises(ValueError, match="no preset is called 'sit-9'; there are sit-4-256"):
        SpectralTokenizerConfig.preset("sit-9")
    with pytest.raises(TypeError, match="no size called 'dept'"):
        SpectralTokenizerConfig.preset("small-32", dept=3)


def test_a_wider_decoder_has_its_own_width_and_heads():
    model = SpectralTokenizer(
        SpectralTokenizerConfig(image_size=16, grid=2, width=16, heads=2, decoder_width=24, decoder_heads=3)
    )
    assert model.encoder[0].detail.qkv.weight.shape == (48, 16)
    assert model.decoder[0].detail.qkv.weight.shape == (72, 24)
    assert (model.encoder[0].detail.heads, model.decoder[0].detail.heads) == (2, 3)
    assert model(torch.rand(2, 1, 16, 16)).images.shape == (2, 1, 16, 16)


def test_a_model_of_the_first_version_keeps_its_configuration_and_fingerprint():
    stored = {
        "image_size": 16, "channels": 1, "levels": 2, "grid": 2, "width": 16, "encoder_depth": 2, "decoder_depth": 3,
        "heads": 2, "mlp_ratio": 4.0, "approximation_codes": 256, "detail_codes": 256, "code_dim": 8,
        "causal": "both", "commitment_weight": 0.25,
    }  # fmt: skip
    config = SpectralTokenizerConfig(**stored)
    assert config.to_dict() == stored
    text = (
        "SpectralTokenizerConfig(image_size=16, channels=1, levels=2, grid=2, width=16, encoder_depth=2, "
        "decoder_depth=3, heads=2, mlp_ratio=4.0, approximation_codes=256, detail_codes=256, code_dim=8, "
        "causal='both', commitment_weight=0.25)"
    )
    model = SpectralTokenizer(config)
    digest = hashlib.sha256(text.encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    assert model.fingerprint() == digest.hexdigest()
    assert SpectralTokenizerConfig(quantizer="fsq").identity() != SpectralTokenizerConfig().identity()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantizer": "lfq"}, "quantizer must be one of"),
        ({"detail_levels": (8, 5)}, "did you mean quantizer='fsq'"),
        ({"quantizer": "fsq", "detail_levels": (8, 1)}, "detail_levels must be integers from 2"),
        ({"quantizer": "fsq", "detail_levels": (8, 2.0)}, "detail_levels must be integers from 2"),
        ({"quantizer": "fsq", "approximation_levels": (2,) * 17}, "at most 16 dimensions"),
        ({"quantizer": "fsq", "approximation_levels": (2**13, 2**13)}, "16777216 codes"),
        ({"quantizer": "fsq", "approximation_levels": 8}, "must be a tuple"),
        ({"decoder_width": 0}, "decoder_width must be a positive integer"),
        ({"decoder_heads": 2**11}, "decoder_heads must be at most 1024"),
        ({"decoder_width": 2**17}, "decoder_width must be at most 65536"),
    ],
)
def test_sizes_without_a_meaning_are_refused(changes: dict[str, object], message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        SpectralTokenizerConfig(**changes)


def table() -> list[str]:
    rows = ["| preset | tokens a scale | scales: map -> patch (numbers a token) | pixels by prefix | parameters |"]
    rows.append("|---|---|---|---|---|")
    for name in PRESETS:
        model = on_no_memory(name)
        layout = model.layout
        scales = range(layout.num_scales)
        maps = ", ".join(
            f"{layout.map_size(s)}x{layout.map_size(s)}x{layout.map_channels(s)} -> {layout.patch_size(s)} "
            f"({layout.token_dim(s)})"
            for s in scales
        )
        prefixes = ", ".join(f"{layout.tokens_per_scale * (k + 1)}: {layout.resolution(k + 1)}" for k in scales)
        count = sum(p.numel() for p in model.parameters())
        rows.append(f"| `{name}` | {layout.tokens_per_scale} | {maps} | {prefixes} | {count:,} |")
    return rows


def test_the_page_lists_the_presets():
    text = DOCS.read_text(encoding="utf-8")
    assert "\n".join(table()) in text
