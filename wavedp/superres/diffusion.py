# SPDX-License-Identifier: Apache-2.0
"""Two public diffusion upscalers through diffusers: stable-diffusion-x4-upscaler and LDM super-resolution.

Both sample: the noise of an image comes from a generator of its own, seeded from the ``generator`` of the
call, so the same call gives the same images whatever the batch size.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from wavedp import storage
from wavedp.errors import InvalidValueError
from wavedp.superres.base import BatchedSuperResolver, State, check_positive, check_scale
from wavedp.superres.hub import fetch, import_extra, location


class DiffusersUpscaler(BatchedSuperResolver):
    """A diffusers pipeline as a super-resolver; RGB, grey images are repeated and averaged back."""

    channels = 3
    stochastic = True
    pipeline_class: ClassVar[str]
    default_path: ClassVar[str]

    def __init__(
        self,
        pipeline: Any,  # a built diffusers pipeline
        *,
        scale: int,
        path: str | None = None,  # where it was loaded from
        num_inference_steps: int,
        batch_size: int,
        revision: str | None = None,
        variant: str | None = None,
    ) -> None:
        unet = pipeline.unet
        super().__init__(scale, batch_size=batch_size, device=pipeline.device, dtype=unet.dtype)
        self.num_inference_steps = check_positive("num_inference_steps", num_inference_steps)
        self.pipeline = pipeline
        self.path, self.revision, self.variant = path, revision, variant
        # every block of the UNet but the last halves height and width
        self.size_multiple = 2 ** (len(unet.config.block_out_channels) - 1)

    @classmethod
    def load(
        cls,
        *,
        scale: int | None,
        path: str | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        pipeline: Any = None,
        **options: Any,
    ) -> Self:
        diffusers = import_extra("diffusers", cls.name)
        import_extra("transformers", cls.name)
        if pipeline is None:
            path = path or cls.default_path
            components = {key: options[key] for key in ("revision", "variant") if options.get(key)}
            components |= dict.fromkeys(cls._absent_components(path, options))
            if dtype is not None:
                # diffusers 0.40 renamed the argument
                renamed = [int(part) for part in diffusers.__version__.split(".")[:2]] >= [0, 40]
                components["dtype" if renamed else "torch_dtype"] = dtype
            loader = getattr(diffusers, cls.pipeline_class).from_pretrained
            pipeline = fetch(loader, path, needed_by=cls.name, **components)
            pipeline.set_progress_bar_config(disable=True)
        elif path is not None:
            raise InvalidValueError(f"{cls.name}: give path= or pipeline=, not both")
        resolver = cls(pipeline, path=path, **options)
        check_scale(cls.name, scale, resolver.scale)
        return resolver.to(device, None if dtype == resolver.dtype else dtype)

    @classmethod
    @abstractmethod
    def _absent_components(cls, path: str, options: dict[str, Any]) -> list[str]:
        """Components that the folder does not hold or the options make needless."""

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        super().to(device, dtype)
        self.pipeline.to(self.device, *([dtype] if dtype else []))
        return self

    def state(self) -> State:
        options = {
            "num_inference_steps": self.num_inference_steps,
            "batch_size": self.batch_size,
            "revision": self.revision,
            "variant": self.variant,
        }
        return {"path": location(self.path, self.name), "options": options}, {}


class StableDiffusionUpscaler(DiffusersUpscaler):
    """``StableDiffusionUpscalePipeline``: x4, text-guided, RGB in [0, 1].

    Options, of the constructor and of each call (``prompt`` ... ``negative_prompt_embeds``): a string for all
    images or a list of one per image; embeddings ``[1 or B, tokens, dim]`` instead of text, and then the text
    encoder is not loaded. Prompts must be public: a caption of a private image is private data.
    ``noise_level`` is how much noise the low-resolution image gets (0 to 350), ``guidance_scale`` 1 switches
    guidance off.
    """

    name = "stable-diffusion-x4-upscaler"
    pipeline_class = "StableDiffusionUpscalePipeline"
    default_path = "stabilityai/stable-diffusion-x4-upscaler"

    def __init__(
        self,
        pipeline: Any,
        *,
        prompt: str | Sequence[str] | None = None,  # None: the empty prompt
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        noise_level: int = 20,
        guidance_scale: float = 9.0,
        num_inference_steps: int = 75,
        batch_size: int = 4,
        **source: Any,
    ) -> None:
        scale = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
        super().__init__(
            pipeline, scale=scale, num_inference_steps=num_inference_steps, batch_size=batch_size, **source
        )
        # the pipeline silently shrinks an image to multiples of the scale
        self.size_multiple = max(self.size_multiple, scale)
        highest = pipeline.config.max_noise_level
        if pipeline.unet.config.num_class_embeds:  # the UNet embeds the level as a class
            highest = min(highest, pipeline.unet.config.num_class_embeds - 1)
        if not isinstance(noise_level, int) or not 0 <= noise_level <= highest:
            raise InvalidValueError(f"noise_level is an integer in [0, {highest}], not {noise_level!r}")
        if not guidance_scale >= 1:
            raise InvalidValueError(f"guidance_scale is at least 1 (no guidance), not {guidance_scale}")
        self.noise_level, self.guidance_scale = noise_level, float(guidance_scale)
        self.text: dict[str, Any] = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
        }

    @classmethod
    def _absent_components(cls, path: str, options: dict[str, Any]) -> list[str]:
        text = ["text_encoder", "tokenizer"]
        if options.get("prompt_embeds") is not None:
            return text
        index = Path(path).expanduser() / "model_index.json"
        if not index.is_file():
            return []
        held = storage.read_json(index)
        return [component for component in text if held.get(component, [None])[0] is None]

    def _condition(
        self,
        count: int,
        *,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        super()._condition(count, **options)
        given = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
        }
        # the text of a call replaces the text of the constructor as a whole
        text = given if any(value is not None for value in given.values()) else self.text
        positive = self._per_image(count, "prompt", text)
        negative = self._per_image(count, "negative_prompt", text)
        if not positive:
            positive = {"prompt": self._encodable([""] * count)}
        if self.guidance_scale == 1:
            return positive
        if not negative:
            negative = {"negative_prompt": self._encodable([""] * count)}
        return {**positive, **negative}

    def _per_image(self, count: int, role: str, text: dict[str, Any]) -> dict[str, Any]:
        """``{role: [strings]}``, ``{role_embeds: [B, tokens, dim]}`` or nothing."""
        prompt, embeds = text[role], text[f"{role}_embeds"]
        if prompt is not None and embeds is not None:
            raise InvalidValueError(f"give {role} or {role}_embeds, not both")
        if embeds is not None:
            if embeds.ndim != 3 or embeds.shape[0] not in (1, count):
                raise InvalidValueError(f"{role}_embeds is [1 or {count}, tokens, dim], not {list(embeds.shape)}")
            return {f"{role}_embeds": embeds.expand(count, -1, -1)}
        if prompt is None:
            return {}
        prompts = [prompt] * count if isinstance(prompt, str) else list(prompt)
        if len(prompts) != count:
            raise InvalidValueError(
                f"{len(prompts)} entries of {role} for {count} images; give one string or one per image"
            )
        return {role: self._encodable(prompts)}

    def _encodable(self, prompts: list[str]) -> list[str]:
        if self.pipeline.text_encoder is None:
            raise InvalidValueError(
                f"this {self.name} has no text encoder: give prompt_embeds, and negative_prompt_embeds "
                f"unless guidance_scale is 1 (it is {self.guidance_scale})"
            )
        return prompts

    def _upscale(self, images: Tensor, generators: list[torch.Generator], condition: dict[str, Any]) -> Tensor:
        guidance_scale, prompt = self.guidance_scale, condition.get("prompt")
        if prompt is not None and prompt == condition.get("negative_prompt"):
            # guided by its own text a prediction stays what it is, at twice the work
            guidance_scale, condition = 1.0, {"prompt": prompt}
        result: Tensor = self.pipeline(
            image=images,
            generator=generators,
            noise_level=self.noise_level,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=guidance_scale,
            output_type="pt",
            **condition,
        ).images
        return result

    def state(self) -> State:
        config, _ = super().state()
        embeds = {key: value for key, value in self.text.items() if isinstance(value, Tensor)}
        words = {key: value for key, value in self.text.items() if value is not None and key not in embeds}
        config["options"] |= {"noise_level": self.noise_level, "guidance_scale": self.guidance_scale, **words}
        return config, embeds


class LatentDiffusionUpscaler(DiffusersUpscaler):
    """``LDMSuperResolutionPipeline``: x4, no text; the pipeline itself takes images in [-1, 1]."""

    name = "ldm-4x"
    pipeline_class = "LDMSuperResolutionPipeline"
    default_path = "CompVis/ldm-super-resolution-4x-openimages"

    def __init__(self, pipeline: Any, *, num_inference_steps: int = 100, batch_size: int = 4, **source: Any) -> None:
        scale = 2 ** (len(pipeline.vqvae.config.block_out_channels) - 1)
        super().__init__(
            pipeline, scale=scale, num_inference_steps=num_inference_steps, batch_size=batch_size, **source
        )

    @classmethod
    def _absent_components(cls, path: str, options: dict[str, Any]) -> list[str]:
        return []

    def _upscale(self, images: Tensor, generators: list[torch.Generator], condition: dict[str, Any]) -> Tensor:
        # the pipeline's generator makes the first noise only; a stochastic scheduler draws from torch's own
        with seeded_globally(generators[0].initial_seed(), self.device):
            result: Tensor = self.pipeline(
                image=images * 2 - 1,
                generator=generators,
                num_inference_steps=self.num_inference_steps,
                output_type="pt",
            ).images
        return result


@contextmanager
def seeded_globally(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's own generators of the CPU and of ``device``, and puts them back afterwards."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
