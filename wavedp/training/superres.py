# SPDX-License-Identifier: Apache-2.0
"""Training of the project's own super-resolution network on public images.

A low-resolution input is made from each public image by the operator that makes the method's coarse images,
so that the network inverts what the sampled images went through.
"""

import tempfile
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from wavedp.errors import InvalidValueError
from wavedp.functional import coarse
from wavedp.superres.base import check_images
from wavedp.superres.espcn import Espcn, EspcnConfig, EspcnResolver
from wavedp.training.loop import Losses, TrainingConfig, fit
from wavedp.training.runs import read_log

DEGRADATIONS = ("haar", "bicubic")
LARGEST_DEFAULT_PATCH = 96


class ImageSource(Protocol):
    """A map-style data set: index -> (image ``[C, H, W]``, label), as `wavedp.data.ImageDataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]: ...


class TrainingRecord(NamedTuple):
    """One logged step: mean absolute error and PSNR (dB, peak 1) of its batch of full-resolution patches."""

    step: int
    loss: float
    psnr: float


def train_espcn(
    images: ImageSource | Tensor,  # public; uint8, or floating point in [0, 1]; a tensor is [N, C, H, W]
    *,
    scale: int = 4,
    config: EspcnConfig | None = None,  # None: the defaults for this scale and the images' channels
    steps: int = 2000,
    batch_size: int = 32,
    lr: float = 2e-3,
    seed: int = 0,
    out_dir: str | Path | None = None,
    degradation: str = "haar",
    patch_size: int | None = None,
    input_noise_std: float = 0.0,
    input_blur_std: float = 0.0,
    device: torch.device | str = "cpu",
    progress: bool = True,
    save_every: int = 500,
    log_every: int = 25,
) -> tuple[EspcnResolver, list[TrainingRecord]]:
    """Trains an `Espcn` with the L1 loss and returns it as a super-resolver, with the log.

    ``degradation``: ``"haar"`` is LL / 2^L with ``scale`` = 2^L, what the private stage reads; ``"bicubic"``
    is antialiased bicubic reduction, for any scale. ``patch_size``: side of the random crops in pixels, a
    multiple of ``scale``; by default the whole image up to 96. So that imperfect sampled inputs do not hurt,
    each input may be blurred by a Gaussian of up to ``input_blur_std`` low-resolution pixels and then get
    noise of a standard deviation of up to ``input_noise_std``, both drawn uniformly from zero.

    With ``out_dir``: ``log.csv``, ``checkpoint/`` from which the same call continues, and ``espcn/``, the
    folder that `wavedp.superres.load` takes. On Ctrl-C both are written before KeyboardInterrupt goes on.

    Raises ValueError for images of another channel count, range, or smaller than a patch.
    """
    channels = _image(images, 0).shape[0]
    config = config or EspcnConfig(scale=scale, channels=channels)
    if config.scale != scale:
        raise InvalidValueError(f"config is for x{config.scale}, but scale is {scale}")
    if config.channels != channels:
        raise InvalidValueError(f"config is for {config.channels} channels, but the images have {channels}")
    if not (input_noise_std >= 0 and input_blur_std >= 0):
        raise InvalidValueError(
            f"input_noise_std and input_blur_std are >= 0, not {input_noise_std} and {input_blur_std}"
        )
    patch = _patch_size(images, scale, patch_size)
    degrade(torch.zeros(1, channels, patch, patch), scale, degradation)

    torch.manual_seed(seed)
    model = Espcn(config).to(device)
    plan = TrainingConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=lr,
        weight_decay=0.0,
        seed=seed,
        save_every=save_every,
        log_every=log_every,
    )

    def batch_losses(generator: torch.Generator) -> Losses:
        high = draw_patches(images, batch_size, patch, generator)
        low = degrade(high, scale, degradation)
        low = perturb(low, input_blur_std, input_noise_std, generator)
        error = model(low.to(device)) - high.to(device)
        return {"loss": error.abs().mean(), "psnr": -10 * error.detach().square().mean().log10()}

    made_by = {"steps": steps, "batch_size": batch_size, "lr": lr, "seed": seed, "degradation": degradation}
    made_by |= {"patch_size": patch, "input_noise_std": input_noise_std, "input_blur_std": input_blur_std}
    resolver = EspcnResolver(model, training=made_by)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(out_dir or scratch)
        try:
            fit(model, batch_losses, plan, folder, title="espcn", progress=progress)
        except KeyboardInterrupt:
            resolver.save_pretrained(folder / "espcn")
            raise
        resolver.save_pretrained(folder / "espcn")
        history = [
            TrainingRecord(int(row["step"]), float(row["loss"]), float(row["psnr"]))
            for row in read_log(folder / "log.csv")
        ]
    return resolver, history


def degrade(images: Tensor, scale: int, degradation: str) -> Tensor:
    """``[B, C, H, W]`` to ``[B, C, H / scale, W / scale]`` in [0, 1]; `train_espcn` says how."""
    if images.shape[2] % scale or images.shape[3] % scale:
        raise InvalidValueError(f"images of {tuple(images.shape[2:])} do not divide by the scale {scale}")
    if degradation == "haar":
        level = scale.bit_length() - 1
        if scale != 1 << level:
            raise InvalidValueError(
                f"degradation 'haar' needs a scale that is a power of two, not {scale}; take 'bicubic'"
            )
        return (coarse(images, level) / scale).clamp(0, 1)
    if degradation == "bicubic":
        size = (images.shape[2] // scale, images.shape[3] // scale)
        return F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    raise InvalidValueError(f"degradation is one of {DEGRADATIONS}, not {degradation!r}")


def perturb(images: Tensor, blur_std: float, noise_std: float, generator: torch.Generator) -> Tensor:
    """Gaussian blur of a random width up to ``blur_std`` pixels, then noise of a random strength an image."""
    if blur_std > 0:
        width = blur_std * float(torch.rand((), generator=generator))
        images = gaussian_blur(images, width)
    if noise_std > 0:
        strength = noise_std * torch.rand(images.shape[0], 1, 1, 1, generator=generator)
        images = images + strength * torch.randn(images.shape, generator=generator)
    return images.clamp(0, 1)


def gaussian_blur(images: Tensor, std: float) -> Tensor:
    """Separable Gaussian filter of standard deviation ``std`` pixels, cut at 3 std, edges repeated."""
    radius = int(3 * std + 0.5)
    if radius == 0:
        return images
    offsets = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    weights = torch.exp(-0.5 * (offsets / std) ** 2)
    weights = (weights / weights.sum()).view(1, 1, 1, -1)
    batch, channels, height, width = images.shape
    x = images.reshape(batch * channels, 1, height, width)
    x = F.conv2d(F.pad(x, (radius, radius, 0, 0), mode="replicate"), weights)
    x = F.conv2d(F.pad(x, (0, 0, radius, radius), mode="replicate"), weights.transpose(2, 3))
    return x.reshape(images.shape)


def draw_patches(images: ImageSource | Tensor, count: int, size: int, generator: torch.Generator) -> Tensor:
    """``count`` random crops of random images: float32 ``[count, C, size, size]`` in [0, 1]."""
    crops = []
    for index in torch.randint(len(images), (count,), generator=generator).tolist():
        image = _image(images, index)
        if min(image.shape[1:]) < size:
            raise InvalidValueError(
                f"image {index} is {list(image.shape)}, smaller than the patches of {size}; lower patch_size"
            )
        top = int(torch.randint(image.shape[1] - size + 1, (), generator=generator))
        left = int(torch.randint(image.shape[2] - size + 1, (), generator=generator))
        crops.append(image[:, top : top + size, left : left + size])
    batch = torch.stack(crops)
    batch = batch.float() / 255 if batch.dtype == torch.uint8 else batch.float()
    check_images(batch)
    return batch


def _image(images: ImageSource | Tensor, index: int) -> Tensor:
    if len(images) == 0:
        raise InvalidValueError("there are no images to train on")
    return images[index] if isinstance(images, Tensor) else images[index][0]


def _patch_size(images: ImageSource | Tensor, scale: int, wanted: int | None) -> int:
    if wanted is not None:
        if wanted < scale or wanted % scale:
            raise InvalidValueError(f"patch_size is a positive multiple of the scale {scale}, not {wanted}")
        return wanted
    smallest = min(_image(images, 0).shape[1:])
    if smallest < scale:
        raise InvalidValueError(f"images of {smallest} pixels are too small for x{scale}")
    return min(smallest, LARGEST_DEFAULT_PATCH) // scale * scale
