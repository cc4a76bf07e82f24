# SPDX-License-Identifier: Apache-2.0
"""The tokenizer: causality across scales, partial decoding, the quantiser, learning, refusals."""

import pytest
import torch
import torch.nn.functional as F

from wavedp.models import SpectralTokenizer, SpectralTokenizerConfig
from wavedp.models.quantizer import VectorQuantizer

SMALL = {"image_size": 16, "levels": 2, "grid": 2, "width": 16, "encoder_depth": 1, "decoder_depth": 1, "heads": 2}
CODES = {"approximation_codes": 16, "detail_codes": 24, "code_dim": 4}


def make(seed: int = 0, **changes: object) -> SpectralTokenizer:
    torch.manual_seed(seed)
    return SpectralTokenizer(SpectralTokenizerConfig(**{**SMALL, **CODES, **changes})).eval()


def test_tokens_have_the_range_of_their_codebook():
    model = make()
    tokens = model.encode(torch.rand(64, 1, 16, 16))
    assert tokens.shape == (64, 12)
    assert tokens.dtype == torch.int64
    assert int(tokens.min()) >= 0
    assert int(tokens[:, :4].max()) < 16
    assert int(tokens[:, 4:].max()) < 24


@pytest.mark.parametrize("num_scales", [1, 2])
def test_coarse_tokens_do_not_depend_on_detail(num_scales: int):
    model = make()
    images = torch.rand(8, 1, 16, 16)
    coarse = F.avg_pool2d(images, 2 ** (3 - num_scales))
    torch.testing.assert_close(model.encode(coarse), model.encode(images)[:, : 4 * num_scales])


@pytest.mark.parametrize("num_scales", [1, 2])
def test_a_prefix_decodes_to_the_coarse_version_of_the_whole(num_scales: int):
    model = make()
    tokens = torch.stack([torch.randint(16, (12,)) for _ in range(4)])
    # Without the clamp to [0, 1] the block means agree exactly; compare what the decoder computes before it.
    n = 4 * num_scales
    hidden = torch.cat(
        [model.approximation_quantizer.lookup(tokens[:, :4]), model.detail_quantizer.lookup(tokens[:, 4:])], dim=1
    )
    whole, prefix = model._reconstruct(hidden), model._reconstruct(hidden[:, :n])
    assert prefix.shape[-1] == 16 >> (3 - num_scales)
    torch.testing.assert_close(prefix, F.avg_pool2d(whole, 2 ** (3 - num_scales)))
    torch.testing.assert_close(model.decode(tokens[:, :n]), prefix.clamp(0, 1))


def test_the_decoder_of_one_scale_sees_its_whole_scale():
    model = make()
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    changed = tokens.clone()
    changed[0, 3] = 1
    lookup = model.approximation_quantizer.lookup  # before the clamp of `decode`, which could hide the change
    difference = (model._reconstruct(lookup(changed)) - model._reconstruct(lookup(tokens))).abs()
    assert difference[..., :2, :2].max() > 0  # token 0's patch moves when token 3 changes: dense within a scale


@pytest.mark.parametrize(("causal", "fails"), [("none", True), ("encoder", False), ("decoder", True), ("both", False)])
def test_coarse_encoding_needs_a_causal_encoder(causal: str, fails: bool):
    model = make(causal=causal)
    coarse = torch.rand(1, 1, 4, 4)
    if fails:
        with pytest.raises(ValueError, match="scale-causal encoder"):
            model.encode(coarse)
    else:
        assert model.encode(coarse).shape == (1, 4)


def test_partial_decoding_needs_a_causal_decoder():
    with pytest.raises(ValueError, match="scale-causal decoder"):
        make(causal="encoder").decode(torch.zeros(1, 4, dtype=torch.int64))


def test_approximation_and_detail_weights_are_not_shared():
    model = make()
    tokens = torch.randint(16, (2, 12))
    before = model.decode(tokens[:, :4])
    with torch.no_grad():
        for parameter in model.decoder[0].detail.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(model.decode(tokens[:, :4]), before)


def test_forward_agrees_with_encode_and_decode():
    model = make()
    images = torch.rand(4, 1, 16, 16)
    output = model(images)
    torch.testing.assert_close(output.tokens, model.encode(images))
    torch.testing.assert_close(output.images.clamp(0, 1), model.decode(output.tokens))
    expected = F.mse_loss(output.images, images) + output.codebook_loss + 0.25 * output.commitment_loss
    torch.testing.assert_close(output.loss, expected)


def test_normalisation_standardises_every_coefficient_channel():
    model = make(channels=3)
    images = torch.rand(500, 3, 16, 16) * torch.tensor([0.2, 0.5, 1.0])[:, None, None]
    model.fit_normalisation(images)
    from wavedp.models.spectra import image_to_maps

    mean, std = model._normalisation()
    for s, m in enumerate(image_to_maps(images, model.layout)):
        normalised = (m - mean[s][:, None, None]) / std[s][:, None, None]
        torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(m.shape[1]), atol=1e-4, rtol=0)
        torch.testing.assert_close(normalised.std((0, 2, 3)), torch.ones(m.shape[1]), atol=1e-3, rtol=0)


def test_quantizer_takes_the_nearest_code_and_passes_gradients_straight_through():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(width=6, num_codes=32, code_dim=3).eval()
    hidden = torch.randn(5, 7, 6, requires_grad=True)
    result = quantizer(hidden)
    z = F.normalize(quantizer.reduce(hidden), dim=-1)
    codes = F.normalize(quantizer.codebook, dim=-1)
    distances = (z[:, :, None] - codes).square().sum(-1)
    torch.testing.assert_close(result.tokens, distances.argmin(-1))
    torch.testing.assert_close(result.values, quantizer.lookup(result.tokens))
    (through,) = torch.autograd.grad(result.values.sum(), hidden, retain_graph=True)
    (without,) = torch.autograd.grad(quantizer.expand(z).sum(), hidden)
    torch.testing.assert_close(through, without)


def test_dead_codes_come_back():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(width=4, num_codes=16, code_dim=4).train()
    with torch.no_grad():
        quantizer.usage.fill_(1 / 16)
        quantizer.usage[5] = 0.0
        quantizer.codebook[5] = torch.tensor([100.0, 0, 0, 0])
    before = quantizer.codebook.detach().clone()
    quantizer(torch.randn(8, 4, 4))
    changed = (quantizer.codebook != before).any(dim=1)
    assert changed.tolist() == [i == 5 for i in range(16)]
    torch.testing.assert_close(quantizer.codebook[5].norm(), torch.tensor(1.0))


def test_it_learns_to_reconstruct():
    torch.manual_seed(0)
    model = make().train()
    ramps = torch.linspace(0, 1, 16)
    images = torch.stack([(ramps * a + b).clamp(0, 1).expand(16, 16) for a in (-1, 0, 1) for b in (0, 0.5, 1)])[:, None]
    model.fit_normalisation(images)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        model(images).loss.backward()
        optimizer.step()
    error = (model.eval().decode(model.encode(images)) - images).square().mean()
    assert error < 0.1 * images.var()


def test_every_device_gives_the_same_tokens_and_images(device: torch.device):
    model = make()
    images = torch.rand(8, 1, 16, 16)
    tokens = model.encode(images)
    decoded = model.decode(tokens)
    model.to(device)
    agree = (model.encode(images.to(device)).cpu() == tokens).float().mean()
    assert agree > 0.95  # a tie between two codes may fall the other way by rounding
    torch.testing.assert_close(model.decode(tokens.to(device)).cpu(), decoded, rtol=1e-4, atol=1e-4)


def test_a_batch_of_none_is_a_batch_of_none():
    model = make()
    tokens = model.encode(torch.empty(0, 1, 16, 16))
    assert tokens.shape == (0, 12)
    assert model.decode(tokens).shape == (0, 1, 16, 16)


@pytest.mark.parametrize("changes", [{"causal": "sometimes"}, {"width": 0}, {"heads": 3}, {"image_size": 18}])
def test_bad_configurations_are_refused(changes: dict[str, object]):
    with pytest.raises(ValueError, match="must"):
        make(**changes)
