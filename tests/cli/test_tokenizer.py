# SPDX-License-Identifier: Apache-2.0
"""`wavedp tokenizer`: presets and what replaces parts of them, losses, what the run records."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from wavedp.cli import EXIT_ERROR, build_parser, main
from wavedp.cli.tokenizer import loss_weights, sizes
from wavedp.models import SpectralTokenizerConfig, load_tokenizer
from wavedp.storage import read_json
from wavedp.training.runs import read_log
from wavedp.training.tokenizer_losses import TokenizerLossConfig

SMALL = ["--image-size", 16, "--grid", 2, "--width", 16, "--encoder-depth", 1, "--decoder-depth", 1, "--steps", 3]


def run(out: Path, *arguments: object) -> int:
    common = ["tokenizer", "--data", "glyphs", "--num-generated", 40, "--batch-size", 4, "--no-progress", "--out", out]
    return main([*map(str, (*common, *arguments))])


def parsed(*arguments: object):
    return build_parser().parse_args(["tokenizer", "--data", "glyphs", "--out", "x", *map(str, arguments)])


def test_sizes_are_the_presets_where_nothing_else_is_said():
    assert sizes(parsed("--preset", "sit-5-256")) == SpectralTokenizerConfig.preset("sit-5-256")
    changed = sizes(parsed("--preset", "small-32", "--channels", 3, "--detail-codes", 64, "--causal", "decoder"))
    assert changed == SpectralTokenizerConfig.preset("small-32", channels=3, detail_codes=64, causal="decoder")
    plain = sizes(parsed())
    assert (plain.image_size, plain.width, plain.approximation_codes, plain.quantizer) == (32, 64, 128, "vq")
    assert sizes(parsed("--quantizer", "fsq", "--detail-levels", "8,5,5,5")).detail_codes == 1000


def test_losses_are_the_papers_for_its_presets_only():
    assert loss_weights(parsed("--preset", "sit-4-256")) == TokenizerLossConfig(perceptual=0.1, adversarial=0.1)
    assert loss_weights(parsed("--preset", "small-64")) == TokenizerLossConfig()
    given = loss_weights(parsed("--preset", "sit-4-256", "--perceptual-weight", 0, "--adversary", "non-saturating"))
    assert given == TokenizerLossConfig(adversarial=0.1, adversary="non-saturating")


def test_every_loss_trains_and_is_logged(tmp_path: Path):
    weights = {}
    for i, layer in enumerate((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)):
        weights[f"features.{layer}.weight"] = torch.randn(2, 2 if i else 3, 3, 3)
        weights[f"features.{layer}.bias"] = torch.zeros(2)
    safetensors.torch.save_file(weights, tmp_path / "vgg.safetensors")
    losses = ["--perceptual-weight", 0.1, "--perceptual-network", tmp_path / "vgg.safetensors"]
    losses += ["--adversarial-weight", 0.1, "--adversarial-start", 1, "--multiscale-weight", 0.5]
    more = ["--quantizer", "fsq", "--decoder-width", 24, "--precision", "bfloat16"]
    assert run(tmp_path / "r", *SMALL, *losses, *more) == 0
    last = read_log(tmp_path / "r" / "log.csv")[-1]
    assert all(float(last[name]) != 0 for name in ("perceptual", "adversarial", "discriminator", "multiscale"))
    assert load_tokenizer(tmp_path / "r" / "model").config.decoder_width == 24
    recorded = read_json(tmp_path / "r" / "run.json")
    assert (recorded["quantizer"], recorded["approximation_codes"], recorded["grid"]) == ("fsq", 240, 2)


def test_a_perceptual_loss_without_a_network_is_off_and_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(tmp_path / "r", *SMALL, "--perceptual-weight", 0.1) == 0
    out = capsys.readouterr().out
    assert "perceptual loss: off; it has the weight 0.1, and no --perceptual-network is given" in out
    assert "reconstruction at 16 px:" in out
    assert "perceptual" not in read_log(tmp_path / "r" / "log.csv")[0]
    recorded = read_json(tmp_path / "r" / "run.json")
    assert (recorded["perceptual_weight"], recorded["perceptual_network"]) == (0.1, "off")
    assert run(tmp_path / "r", *SMALL, "--perceptual-weight", 0.1) == 0  # the same run again


def test_a_run_of_the_first_version_is_taken_up(tmp_path: Path):
    """Its record lacks the newer options and has the older ones' defaults."""
    assert run(tmp_path, *SMALL) == 0
    path = tmp_path / "run.json"
    recorded = {name: value for name, value in read_json(path).items() if value is not None or name == "classes"}
    names = {
        "command", "data", "split", "classes", "fit", "skip_bad", "num_generated", "image_size", "channels", "levels",
        "grid", "width", "encoder_depth", "decoder_depth", "heads", "mlp_ratio", "approximation_codes", "detail_codes",
        "code_dim", "steps", "batch_size", "learning_rate", "weight_decay", "seed",
    }  # fmt: skip
    assert set(recorded) == names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--detail-levels", "8,5"], "did you mean quantizer='fsq'"),
        (["--perceptual-weight", "0.1", "--perceptual-network", "none.safetensors"], "none.safetensors is missing"),
    ],
)
def test_mistakes_are_one_sentence(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert run(tmp_path / "r", *SMALL, *arguments) == EXIT_ERROR
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_levels_that_are_no_numbers_are_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parsed("--quantizer", "fsq", "--detail-levels", "8;5")
    assert "'8;5' is no list of integers such as 8,6,5" in capsys.readouterr().err
