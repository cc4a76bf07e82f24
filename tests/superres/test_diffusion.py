# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from wavedp import superres

Embeds = Callable[[int], Tensor]
Spy = Callable[[Any, str], list[dict[str, Any]]]
SD = "stable-diffusion-x4-upscaler"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def load_sd(folder: Path, embeds: Embeds, **options: Any) -> superres.BatchedSuperResolver:
    return superres.load(
        SD,
        path=folder,
        **{"prompt_embeds": embeds(1), "guidance_scale": 1, "num_inference_steps": 2, **options},
    )


def load_ldm(folder: Path, **options: Any) -> superres.BatchedSuperResolver:
    return superres.load("ldm-4x", path=folder, **{"num_inference_steps": 2, **options})


@pytest.fixture(params=[SD, "ldm-4x"])
def resolver(
    request: pytest.FixtureRequest, sd_folder: Path, ldm_folder: Path, embeds: Embeds
) -> superres.BatchedSuperResolver:
    return load_sd(sd_folder, embeds) if request.param == SD else load_ldm(ldm_folder)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 14), (1, 3)])
def test_enlarges_any_size_by_exactly_four(resolver: superres.BatchedSuperResolver, height: int, width: int) -> None:
    result = resolver(torch.rand(2, 3, height, width), generator=seeded())
    assert resolver.scale == 4
    assert result.shape == (2, 3, 4 * height, 4 * width)
    assert result.dtype == torch.float32
    assert result.min() >= 0
    assert result.max() <= 1
    assert result.std() > 0.01


def test_the_generator_decides_and_the_batch_size_does_not(resolver: superres.BatchedSuperResolver) -> None:
    images = torch.rand(3, 3, 8, 8)
    first = resolver(images, generator=seeded())
    assert torch.equal(resolver(images, generator=seeded()), first)
    torch.testing.assert_close(resolver(images, generator=seeded(), batch_size=1), first, atol=1e-4, rtol=0)
    assert (resolver(images, generator=seeded(1)) - first).abs().mean() > 0.01
    torch.manual_seed(5)
    unseeded = resolver(images)
    torch.manual_seed(5)
    assert torch.equal(resolver(images), unseeded)


def test_equal_images_of_one_batch_get_noise_of_their_own(resolver: superres.BatchedSuperResolver) -> None:
    result = resolver(torch.full((2, 3, 8, 8), 0.5), generator=seeded())
    assert (result[0] - result[1]).abs().mean() > 0.01


def test_torch_s_global_generator_is_left_alone(resolver: superres.BatchedSuperResolver) -> None:
    before = torch.get_rng_state()
    resolver(torch.rand(1, 3, 8, 8, generator=seeded()), generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)


def test_grey_is_repeated_and_averaged(resolver: superres.BatchedSuperResolver) -> None:
    grey = torch.rand(2, 1, 8, 8)
    expected = resolver(grey.expand(-1, 3, -1, -1), generator=seeded()).mean(1, keepdim=True)
    torch.testing.assert_close(resolver(grey, generator=seeded()), expected)


def test_latent_diffusion_is_handed_minus_1_to_1(ldm_folder: Path, spy: Spy) -> None:
    from diffusers import LDMSuperResolutionPipeline

    calls = spy(LDMSuperResolutionPipeline, "__call__")
    images = torch.linspace(0, 1, 3 * 8 * 8).view(1, 3, 8, 8)
    load_ldm(ldm_folder)(images)
    assert torch.equal(calls[0]["image"], images * 2 - 1)


def test_latent_diffusion_equals_the_pipeline_it_wraps(ldm_folder: Path) -> None:
    from diffusers import LDMSuperResolutionPipeline

    images = torch.rand(2, 3, 8, 8)
    seeds = torch.randint(2**63 - 1, (2,), generator=seeded()).tolist()
    expected = LDMSuperResolutionPipeline.from_pretrained(ldm_folder)(
        images * 2 - 1, num_inference_steps=2, generator=[seeded(s) for s in seeds], output_type="np"
    ).images
    result = load_ldm(ldm_folder)(images, generator=seeded())
    torch.testing.assert_close(result, torch.from_numpy(expected).permute(0, 3, 1, 2))


def test_a_stochastic_scheduler_is_repeatable_too(ldm_folder: Path) -> None:
    from diffusers import DDPMScheduler, LDMSuperResolutionPipeline

    pipeline = LDMSuperResolutionPipeline.from_pretrained(ldm_folder)
    pipeline.scheduler = DDPMScheduler()
    resolver = superres.load("ldm-4x", pipeline=pipeline, num_inference_steps=3)
    images = torch.rand(2, 3, 8, 8)
    first = resolver(images, generator=seeded())
    assert torch.equal(resolver(images, generator=seeded()), first)
    assert (resolver(images, generator=seeded(1)) - first).abs().mean() > 0.01


def test_stable_diffusion_is_handed_0_to_1_in_a_size_it_does_not_change(
    sd_folder: Path, embeds: Embeds, spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import StableDiffusionUpscalePipeline
    from diffusers.image_processor import VaeImageProcessor

    calls = spy(StableDiffusionUpscalePipeline, "__call__")
    normalised: list[Tensor] = []
    original = VaeImageProcessor.preprocess

    def preprocess(self: VaeImageProcessor, image: Tensor) -> Tensor:
        normalised.append(original(self, image))
        return normalised[-1]

    monkeypatch.setattr(VaeImageProcessor, "preprocess", preprocess)
    images = torch.linspace(0, 1, 3 * 9 * 14).view(1, 3, 9, 14)
    load_sd(sd_folder, embeds, noise_level=33)(images)
    handed = calls[0]["image"]
    assert handed.shape == (1, 3, 12, 16)
    assert torch.equal(handed[:, :, :9, :14], images)
    torch.testing.assert_close(normalised[0], handed * 2 - 1)
    assert calls[0]["noise_level"] == 33
    assert calls[0]["num_inference_steps"] == 2


def test_text_embeddings_of_the_call_replace_those_of_the_constructor(sd_folder: Path, embeds: Embeds) -> None:
    images, other = torch.rand(2, 3, 8, 8), embeds(2) * 3
    resolver = load_sd(sd_folder, embeds)
    first = resolver(images, generator=seeded())
    second = resolver(images, generator=seeded(), prompt_embeds=other)
    assert (first - second).abs().max() > 1e-4
    one_by_one = resolver(images, generator=seeded(), prompt_embeds=other, batch_size=1)
    torch.testing.assert_close(one_by_one, second, atol=1e-4, rtol=0)


def test_guidance_uses_the_negative_embeddings(sd_folder: Path, embeds: Embeds) -> None:
    images = torch.rand(2, 3, 8, 8)
    positive, negative = embeds(1), embeds(1)
    options = {"prompt_embeds": positive, "guidance_scale": 7.5}
    guided = load_sd(sd_folder, embeds, negative_prompt_embeds=negative, **options)
    same = load_sd(sd_folder, embeds, negative_prompt_embeds=positive, **options)
    unguided = load_sd(sd_folder, embeds, prompt_embeds=positive)
    result = unguided(images, generator=seeded())
    assert (guided(images, generator=seeded()) - result).abs().max() > 1e-3
    # u + g (p - u) = p when both sides are the same
    torch.testing.assert_close(same(images, generator=seeded()), result, atol=1e-3, rtol=0)


class Encoder:
    """Stands for a text encoder and its pipeline: records what would be sampled."""

    def __init__(self, sd_folder: Path) -> None:
        from diffusers import StableDiffusionUpscalePipeline

        real = StableDiffusionUpscalePipeline.from_pretrained(sd_folder, text_encoder=None, tokenizer=None)
        self.unet, self.vae, self.config, self.device = real.unet, real.vae, real.config, real.device
        self.text_encoder = object()
        self.calls: list[dict[str, Any]] = []

    def to(self, *placement: Any) -> None:
        return None

    def __call__(self, **arguments: Any) -> Any:
        self.calls.append(arguments)
        image = arguments["image"]
        return type("Output", (), {"images": image.repeat(1, 1, 4, 4)})


def test_prompts_are_cut_to_each_batch(sd_folder: Path) -> None:
    pipeline = Encoder(sd_folder)
    resolver = superres.load(SD, pipeline=pipeline, prompt="a digit", negative_prompt="blur", batch_size=2)
    resolver(torch.rand(3, 3, 8, 8))
    assert [call["prompt"] for call in pipeline.calls] == [["a digit"] * 2, ["a digit"]]
    assert [call["negative_prompt"] for call in pipeline.calls] == [["blur"] * 2, ["blur"]]
    assert all(call["guidance_scale"] == 9.0 for call in pipeline.calls)
    pipeline.calls.clear()
    resolver(torch.rand(3, 3, 8, 8), prompt=["one", "two", "three"])
    assert [call["prompt"] for call in pipeline.calls] == [["one", "two"], ["three"]]
    assert [call["negative_prompt"] for call in pipeline.calls] == [["", ""], [""]]


def test_the_empty_prompt_is_sampled_without_guidance(sd_folder: Path) -> None:
    pipeline = Encoder(sd_folder)
    superres.load(SD, pipeline=pipeline)(torch.rand(1, 3, 8, 8))
    call = pipeline.calls[0]
    assert (call["prompt"], call["guidance_scale"]) == ([""], 1.0)
    assert "negative_prompt" not in call


def test_stable_diffusion_saves_its_text_and_options(sd_folder: Path, embeds: Embeds, tmp_path: Path) -> None:
    images = torch.rand(1, 3, 8, 8)
    resolver = load_sd(
        sd_folder, embeds, noise_level=5, guidance_scale=3.0, negative_prompt_embeds=embeds(1), batch_size=2
    )
    resolver.save_pretrained(tmp_path)
    again = superres.from_pretrained(tmp_path)
    assert isinstance(again, superres.BatchedSuperResolver)
    assert again.batch_size == 2
    assert torch.equal(again(images, generator=seeded()), resolver(images, generator=seeded()))
    changed = superres.from_pretrained(tmp_path, noise_level=200)
    assert not torch.equal(changed(images, generator=seeded()), resolver(images, generator=seeded()))


def test_refusals_of_stable_diffusion(sd_folder: Path, embeds: Embeds) -> None:
    images = torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"noise_level is an integer in \[0, 299\], not 300"):
        load_sd(sd_folder, embeds, noise_level=300)
    with pytest.raises(ValueError, match="guidance_scale is at least 1"):
        load_sd(sd_folder, embeds, guidance_scale=0.5)
    with pytest.raises(ValueError, match="num_inference_steps is a positive integer"):
        load_sd(sd_folder, embeds, num_inference_steps=0)
    with pytest.raises(ValueError, match="enlarges x4, not x2"):
        load_sd(sd_folder, embeds, scale=2)
    with pytest.raises(ValueError, match="no text encoder: give prompt_embeds"):
        load_sd(sd_folder, embeds, guidance_scale=5)(images)
    with pytest.raises(ValueError, match="no text encoder: give prompt_embeds"):
        load_sd(sd_folder, embeds)(images, prompt="a cat")
    with pytest.raises(ValueError, match="prompt or prompt_embeds, not both"):
        load_sd(sd_folder, embeds)(images, prompt="a cat", prompt_embeds=embeds(1))
    with pytest.raises(ValueError, match=r"\[1 or 2, tokens, dim\], not \[3, 7, 16\]"):
        load_sd(sd_folder, embeds)(images, prompt_embeds=embeds(3))
    with pytest.raises(ValueError, match="3 entries of prompt for 2 images"):
        superres.load(SD, pipeline=Encoder(sd_folder))(images, prompt=["a", "b", "c"])
    with pytest.raises(TypeError, match="takes no option promt"):
        load_sd(sd_folder, embeds)(images, promt="a cat")


def test_a_dtype_reaches_the_weights(ldm_folder: Path) -> None:
    images = torch.rand(1, 3, 8, 8)
    half = load_ldm(ldm_folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.isfinite(half(images, generator=seeded())).all()
    moved = load_ldm(ldm_folder).to(dtype=torch.bfloat16)
    assert torch.equal(moved(images, generator=seeded()), half(images, generator=seeded()))
