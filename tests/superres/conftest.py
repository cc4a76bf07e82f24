# SPDX-License-Identifier: Apache-2.0
"""Tiny random-weight versions of the public models, built from configuration and saved once per session."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

TEXT_TOKENS, TEXT_DIM = 7, 16


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionUpscalePipeline without text encoder and tokenizer."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        DDPMScheduler,
        StableDiffusionUpscalePipeline,
        UNet2DConditionModel,
    )

    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=16,
        in_channels=7,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_DIM,
        attention_head_dim=8,
        num_class_embeds=300,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=[8, 8, 16],
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        latent_channels=4,
        norm_num_groups=8,
        scaling_factor=0.08333,
    )
    pipeline = StableDiffusionUpscalePipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        low_res_scheduler=DDPMScheduler(),
        scheduler=DDIMScheduler(prediction_type="v_prediction"),
    )
    folder = tmp_path_factory.mktemp("stable-diffusion")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ldm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LDMSuperResolutionPipeline whose UNet halves the size twice."""
    from diffusers import DDIMScheduler, LDMSuperResolutionPipeline, UNet2DModel, VQModel

    torch.manual_seed(2)
    unet = UNet2DModel(
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        sample_size=16,
        in_channels=6,
        out_channels=3,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    vqvae = VQModel(
        block_out_channels=[8, 8, 16],
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        latent_channels=3,
        num_vq_embeddings=32,
        norm_num_groups=8,
    )
    pipeline = LDMSuperResolutionPipeline(vqvae=vqvae, unet=unet, scheduler=DDIMScheduler())
    folder = tmp_path_factory.mktemp("ldm")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def swin2sr_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Folders of Swin2SRForImageSuperResolution, by scale; the attention window is 8."""
    from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution

    folders: dict[int, Path] = {}

    def folder(scale: int) -> Path:
        if scale not in folders:
            torch.manual_seed(scale)
            config = Swin2SRConfig(
                embed_dim=16, depths=[1, 1], num_heads=[2, 2], upscale=scale, upsampler="pixelshuffledirect"
            )
            folders[scale] = tmp_path_factory.mktemp(f"swin2sr-x{scale}")
            Swin2SRForImageSuperResolution(config).save_pretrained(folders[scale])
        return folders[scale]

    return folder


@pytest.fixture
def embeds() -> Callable[[int], Tensor]:
    """Text embeddings [n, tokens, dim] in the shape that ``sd_folder`` takes."""
    generator = torch.Generator().manual_seed(3)
    return lambda count: torch.randn(count, TEXT_TOKENS, TEXT_DIM, generator=generator)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], list[dict[str, Any]]]:
    """``calls = spy(owner, method)`` records the keyword arguments of each call of a method of a class."""

    def install(owner: Any, method: str) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []
        original = getattr(owner, method)

        def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append({**dict(enumerate(args)), **kwargs})
            return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, method, recorded)
        return calls

    return install
