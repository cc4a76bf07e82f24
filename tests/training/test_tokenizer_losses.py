# SPDX-License-Identifier: Apache-2.0
"""The tokenizer's losses: their values, whom their gradients reach, exact resume with a discriminator, saying 'off'."""

import os
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from wavedp.data import TensorImageDataset
from wavedp.models import SpectralTokenizer, SpectralTokenizerConfig, load_tokenizer
from wavedp.models.discriminator import PatchDiscriminator
from wavedp.models.perceptual import PerceptualDistance, load_perceptual
from wavedp.training.checkpoints import load_newest
from wavedp.training.loop import TrainingConfig
from wavedp.training.public import train_tokenizer
from wavedp.training.reconstruction import reconstruction_quality
from wavedp.training.runs import read_log
from wavedp.training.tokenizer_losses import Adversary, TokenizerLossConfig, multiscale_loss, tokenizer_losses

SIZES = SpectralTokenizerConfig(
    image_size=16, levels=2, grid=2, width=16, encoder_depth=1, decoder_depth=1, heads=2, mlp_ratio=1.0,
    approximation_codes=16, detail_codes=16,
)  # fmt: skip
CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


def vgg(prefix: str = "features.") -> dict[str, torch.Tensor]:
    """Random weights of VGG-16's shape, of four channels, under torchvision's names."""
    generator = torch.Generator().manual_seed(0)
    weights = {"classifier.0.weight": torch.zeros(3, 3)}
    for i, layer in enumerate(CONVOLUTIONS):
        shape = (4, 3 if i == 0 else 4, 3, 3)
        weights[f"{prefix}{layer}.weight"] = 0.3 * torch.randn(shape, generator=generator)
        weights[f"{prefix}{layer}.bias"] = 0.1 * torch.randn(4, generator=generator)
    return weights


def pictures(count: int = 24, channels: int = 1) -> TensorImageDataset:
    generator = torch.Generator().manual_seed(1)
    small = torch.randint(256, (count, channels, 4, 4), generator=generator, dtype=torch.uint8)
    return TensorImageDataset(small.repeat_interleave(4, 2).repeat_interleave(4, 3), torch.zeros(count).long(), ["a"])


def model(seed: int = 0, **changes: object) -> SpectralTokenizer:
    torch.manual_seed(seed)
    return SpectralTokenizer(SpectralTokenizerConfig(**{**SIZES.to_dict(), **changes}))


@pytest.mark.parametrize("causal", ["decoder", "both"])
def test_the_coarse_losses_are_those_of_decoding_each_prefix(causal: str):
    """The claim that lets one decoding serve all: values and gradients, with nothing decoded but the prefixes."""
    tokenizer = model(causal=causal).eval()
    images = torch.rand(3, 1, 16, 16)
    hidden = torch.cat([q.values for q in tokenizer._quantize(images)], dim=1).detach()
    by_pooling = multiscale_loss(tokenizer._reconstruct(hidden), images, 3)
    prefixes = [tokenizer._reconstruct(hidden[:, : 4 * k]) for k in (1, 2)]
    targets = [F.avg_pool2d(images, 2 ** (3 - k)) for k in (1, 2)]
    by_prefix = (F.mse_loss(prefixes[0], targets[0]) + F.mse_loss(prefixes[1], targets[1])) / 2
    torch.testing.assert_close(by_pooling, by_prefix)
    parameters = [p for p in tokenizer.decoder.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (by_pooling, by_prefix))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_one_scale_has_no_coarser_one():
    assert float(multiscale_loss(torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4), 1)) == 0.0


def test_the_perceptual_distance_is_that_of_unit_features():
    network = PerceptualDistance(vgg())
    a, b = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    x = (torch.cat([a, b]) - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    expected, weights = 0.0, vgg()
    for stage in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)):
        if stage[0]:
            x = F.max_pool2d(x, 2)
        for n in stage:
            x = F.conv2d(x, weights[f"features.{n}.weight"], weights[f"features.{n}.bias"], padding=1).relu()
        unit = x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)
        expected += float((unit[:2] - unit[2:]).square().sum(1).mean())
    assert float(network(a, b)) == pytest.approx(expected, rel=1e-4)
    assert float(network(a, a)) == 0.0
    grey = torch.rand(2, 1, 32, 32), torch.rand(2, 1, 32, 32)
    three = (one.expand(-1, 3, -1, -1) for one in grey)
    torch.testing.assert_close(network(*grey), network(*three))
    assert not any(p.requires_grad for p in network.parameters())


def test_a_perceptual_network_is_read_from_a_file_or_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images = torch.rand(1, 1, 16, 16), torch.rand(1, 1, 16, 16)
    expected = PerceptualDistance(vgg())(*images)
    for prefix in ("features.", ""):
        safetensors.torch.save_file(vgg(prefix), tmp_path / "model.safetensors")
        torch.testing.assert_close(load_perceptual(tmp_path / "model.safetensors")(*images), expected)
    hub = pytest.importorskip("huggingface_hub")
    asked = []
    monkeypatch.setattr(hub, "hf_hub_download", lambda *what: asked.append(what) or str(tmp_path / "model.safetensors"))
    torch.testing.assert_close(load_perceptual("hub:timm/vgg16.tv_in1k")(*images), expected)
    assert asked == [("timm/vgg16.tv_in1k", "model.safetensors")]


def test_what_is_no_vgg_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="is missing; give the safetensors file of a VGG-16"):
        load_perceptual(tmp_path / "none.safetensors")
    torch.save(vgg(), tmp_path / "vgg16-397923af.pth")
    with pytest.raises(ValueError, match="never opened; convert it once: python -c"):
        load_perceptual(tmp_path / "vgg16-397923af.pth")
    (tmp_path / "vgg16-397923af.pth").rename(tmp_path / "renamed.safetensors")
    with pytest.raises(ValueError, match=r"a zip archive, as torch\.save writes"):
        load_perceptual(tmp_path / "renamed.safetensors")
    short = {name: value for name, value in vgg().items() if name != "features.28.bias"}
    safetensors.torch.save_file(short, tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match=r"features\.28\.weight or \.bias is missing"):
        load_perceptual(tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match=r"features\.5\.weight has shape"):
        PerceptualDistance({**vgg(), "features.5.weight": torch.zeros(4, 5, 3, 3)})
    with pytest.raises(ValueError, match="16 pixels a side or more"):
        PerceptualDistance(vgg())(torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 8))


def test_the_discriminator_bounds_its_slope():
    torch.manual_seed(0)
    network = PatchDiscriminator(1, 32, width=8).train()
    images = torch.rand(4, 1, 32, 32)
    for _ in range(30):  # the power iteration of every pass
        assert network(images).shape == (4, 1, 4, 4)
    for layer in network.layers:
        assert float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("kind", ["hinge", "non-saturating"])
def test_each_side_of_the_adversarial_loss_reaches_its_own_network(kind: str):
    torch.manual_seed(0)
    adversary = Adversary(PatchDiscriminator(1, 16, 4), TokenizerLossConfig(adversarial=0.1, adversary=kind))
    real, fake = torch.rand(3, 1, 16, 16), torch.rand(3, 1, 16, 16, requires_grad=True)
    adversary.module.eval()  # keeps the power iteration still, so that the values can be compared
    adversary.begin(0)
    against = adversary.against(real, fake)
    against.backward()
    assert fake.grad.abs().sum() > 0
    assert all(p.grad is None for p in adversary.module.parameters())
    fake.grad = None
    own = adversary.loss()
    own.backward()
    assert fake.grad is None
    assert all(p.grad is not None for p in adversary.module.parameters())
    with torch.no_grad():
        r, f = adversary.module(real), adversary.module(fake)
    if kind == "hinge":
        expected = -f.mean(), (1 - r).clamp_min(0).mean() + (1 + f).clamp_min(0).mean()
    else:
        expected = (1 + (-f).exp()).log().mean(), (1 + (-r).exp()).log().mean() + (1 + f.exp()).log().mean()
    torch.testing.assert_close((against.detach(), own.detach()), expected)
    assert adversary.loss() is None


def test_a_weight_without_its_network_says_that_it_is_off(tmp_path: Path):
    training = TrainingConfig(steps=2, batch_size=4)
    with pytest.warns(RuntimeWarning, match=r"the perceptual loss is off: it has the weight 0\.1"):
        train_tokenizer(
            pictures(), SIZES, training, tmp_path / "off", loss=TokenizerLossConfig(perceptual=0.1), progress=False
        )
    assert "perceptual" not in read_log(tmp_path / "off" / "log.csv")[0]
    train_tokenizer(pictures(), SIZES, training, tmp_path / "none", progress=False)
    a, b = (load_tokenizer(tmp_path / name / "model").fingerprint() for name in ("off", "none"))
    assert a == b


def test_the_losses_add_up():
    tokenizer = model().eval()
    images = torch.rand(3, 1, 16, 16)
    weights = TokenizerLossConfig(perceptual=0.5, adversarial=0.25, multiscale=2.0)
    adversary = Adversary(PatchDiscriminator(1, 16, 4).eval(), weights)
    adversary.begin(0)
    losses = tokenizer_losses(tokenizer, images, weights, PerceptualDistance(vgg()), adversary)
    plain = tokenizer_losses(tokenizer, images, TokenizerLossConfig())
    torch.testing.assert_close(plain["loss"], tokenizer(images).loss)
    extra = 0.5 * losses["perceptual"] + 0.25 * losses["adversarial"] + 2.0 * losses["multiscale"]
    torch.testing.assert_close(losses["loss"], plain["loss"] + extra)
    assert {"perceptual", "adversarial", "multiscale"}.isdisjoint(plain)


ALL = TokenizerLossConfig(perceptual=0.1, adversarial=0.1, multiscale=0.5, adversarial_start=3, discriminator_width=4)


def train(folder: Path, interrupt_at: int | None = None, **changes: object) -> SpectralTokenizer:
    """Eight steps with every loss; an interrupt is sent while the perceptual network is at its n-th batch."""
    network = PerceptualDistance(vgg())
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)

    network.register_forward_hook(count)
    training = TrainingConfig(**{"steps": 8, "batch_size": 4, "save_every": 100, "log_every": 1, **changes})
    return train_tokenizer(pictures(), SIZES, training, folder, loss=ALL, perceptual=network, progress=False)


@pytest.mark.parametrize("at", [2, 6])  # before and after the discriminator has begun
def test_a_run_with_a_discriminator_resumes_exactly(tmp_path: Path, at: int):
    unbroken = train(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", interrupt_at=at)
    assert load_newest(tmp_path / "b" / "checkpoint").config["step"] == at
    assert train(tmp_path / "b").fingerprint() == unbroken.fingerprint()
    last = [load_newest(tmp_path / name / "checkpoint").tensors for name in "ab"]
    assert last[0].keys() == last[1].keys()
    assert any(name.startswith("opponent.optimizer.") for name in last[0])
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])
    rows = [read_log(tmp_path / name / "log.csv") for name in "ab"]
    assert rows[0] == rows[1]
    assert [float(row["discriminator"]) > 0 for row in rows[0]] == [False] * 3 + [True] * 5
    assert [float(row["adversarial"]) != 0 for row in rows[0]] == [False] * 3 + [True] * 5


def test_a_checkpoint_with_a_discriminator_is_not_continued_without(tmp_path: Path):
    train(tmp_path, steps=2)
    with pytest.raises(ValueError, match="has a discriminator, and none is asked for"):
        train_tokenizer(pictures(), SIZES, TrainingConfig(steps=4, batch_size=4), tmp_path, progress=False)
    train_tokenizer(pictures(), SIZES, TrainingConfig(steps=1, batch_size=4), tmp_path / "plain", progress=False)
    with pytest.raises(ValueError, match="does not fit this model"):
        train(tmp_path / "plain")


def test_half_precision_trains_to_about_the_same(tmp_path: Path):
    folders = {name: tmp_path / name for name in ("float32", "bfloat16")}
    for name, folder in folders.items():
        train_tokenizer(
            pictures(),
            SIZES,
            TrainingConfig(steps=5, batch_size=8, log_every=1, precision=name),
            folder,
            progress=False,
        )
    full, half = ([float(row["reconstruction"]) for row in read_log(f / "log.csv")] for f in folders.values())
    assert full != half
    assert half == pytest.approx(full, rel=0.1)
    weights = load_tokenizer(folders["bfloat16"] / "model").state_dict().values()
    assert {w.dtype for w in weights} == {torch.float32}
    with pytest.raises(ValueError, match="precision must be one of"):
        TrainingConfig(steps=1, precision="float16")


def test_quality_is_the_psnr_of_every_prefix():
    tokenizer, dataset = model().eval(), pictures()
    images = dataset.stack(torch.arange(24)) / 255
    found = reconstruction_quality(tokenizer, dataset, batch_size=7)
    assert list(found) == [4, 8, 16]
    for k, (side, psnr) in enumerate(found.items(), start=1):
        target = F.avg_pool2d(images, 16 // side)
        decoded = tokenizer.decode(tokenizer.encode(images)[:, : 4 * k])
        assert psnr == pytest.approx(float(-10 * (decoded - target).square().mean().log10()), abs=1e-3)
    assert list(reconstruction_quality(model(causal="encoder").eval(), dataset)) == [16]
    with pytest.raises(ValueError, match=r"call \.eval\(\) first"):
        reconstruction_quality(model(), dataset)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"perceptual": -0.1}, "perceptual must be >= 0"),
        ({"adversary": "wasserstein"}, "adversary must be one of"),
        ({"adversarial_start": -1}, "adversarial_start must be >= 0"),
        ({"discriminator_learning_rate": 0.0}, "discriminator_learning_rate must be > 0"),
    ],
)
def test_weights_without_a_meaning_are_refused(changes: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        TokenizerLossConfig(**changes)


def test_the_papers_weights_belong_to_its_sizes():
    assert TokenizerLossConfig.for_preset("sit-4-256") == TokenizerLossConfig(perceptual=0.1, adversarial=0.1)
    assert TokenizerLossConfig.for_preset("small-32") == TokenizerLossConfig.for_preset(None) == TokenizerLossConfig()
