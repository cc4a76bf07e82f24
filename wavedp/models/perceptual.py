# SPDX-License-Identifier: Apache-2.0
"""A perceptual distance: squared differences of the features of VGG-16, at five depths (arXiv 1801.03924)."""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavedp.errors import BadFileError, InvalidValueError, MissingFileError
from wavedp.extras import import_extra
from wavedp.storage import load_tensors

HUB = "hub:"
# VGG-16's convolutions by their place in torchvision's `features`, a ReLU after each; None is 2 x 2 max pooling.
_LAYERS = (0, 2, None, 5, 7, None, 10, 12, 14, None, 17, 19, 21, None, 24, 26, 28)
_COMPARED = (2, 7, 14, 21, 28)  # the last of each resolution: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what the published weights expect, per RGB channel
_STRIDE = 16


class PerceptualDistance(nn.Module):
    """Distance of two batches of images in the features of a frozen VGG-16.

    As LPIPS without its learned weights: at each of five depths the features are scaled to unit length over the
    channels, and their squared difference is summed over channels and averaged over positions; the five are added. Grey
    images stand for three equal channels. The network is in no checkpoint and takes no gradient.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        """``weights``: ``features.<n>.weight`` and ``.bias`` for VGG-16's thirteen convolutions, as torchvision and
        timm name them, the prefix being optional; others (the classifier) are ignored. Any numbers of channels will do.

        Raises ValueError naming a tensor that is missing or does not fit.
        """
        super().__init__()
        prefix = "features." if any(name.startswith("features.") for name in weights) else ""
        self.convolutions = nn.ModuleDict()
        channels = 3
        for layer in _LAYERS:
            if layer is None:
                continue
            weight, bias = (weights.get(f"{prefix}{layer}.{kind}") for kind in ("weight", "bias"))
            if weight is None or bias is None:
                raise InvalidValueError(f"{prefix}{layer}.weight or .bias is missing: these are not VGG-16's features")
            if weight.dim() != 4 or tuple(weight.shape[1:]) != (channels, 3, 3) or bias.shape != weight.shape[:1]:
                raise InvalidValueError(
                    f"{prefix}{layer}.weight has shape {list(weight.shape)} where [*, {channels}, 3, 3] and a bias of "
                    "the first size are VGG-16's"
                )
            convolution = nn.Conv2d(channels, len(weight), 3, padding=1)
            with torch.no_grad():
                convolution.weight.copy_(weight)
                convolution.bias.copy_(bias)  # type: ignore[union-attr]  # Conv2d types its bias as optional
            self.convolutions[str(layer)] = convolution
            channels = len(weight)
        self.register_buffer("mean", torch.tensor(_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(_STD)[:, None, None])
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """Images [B, 1 or 3, H, W] in [0, 1], H and W at least 16 -> scalar, the mean over the batch."""
        if images.shape != target.shape or images.shape[1] not in (1, 3) or min(images.shape[-2:]) < _STRIDE:
            raise InvalidValueError(
                f"images must have one shape [B, 1 or 3, H, W] with {_STRIDE} pixels a side or more, got "
                f"{list(images.shape)} and {list(target.shape)}"
            )
        distances = [
            (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(dim=1).mean()
            for a, b in zip(self.features(images), self.features(target), strict=True)
        ]
        return torch.stack(distances).sum()

    def features(self, images: Tensor) -> list[Tensor]:
        """Five maps [B, C_i, H / 2^i, W / 2^i]."""
        x = (images.expand(-1, 3, -1, -1) - self.mean) / self.std
        found = []
        for layer in _LAYERS:
            if layer is None:
                x = F.max_pool2d(x, 2)
                continue
            x = F.relu(self.convolutions[str(layer)](x))
            if layer in _COMPARED:
                found.append(x)
        return found


def load_perceptual(source: str | Path, device: torch.device | str = "cpu") -> PerceptualDistance:
    """The distance in a VGG-16 from a safetensors file, or from ``hub:OWNER/NAME`` (its ``model.safetensors``).

    ``hub:timm/vgg16.tv_in1k`` names torchvision's ImageNet weights; huggingface_hub downloads it once. A ``.pth`` file
    is a pickle and is not opened; the error has the line that converts it.

    Raises FileNotFoundError, ValueError for a file that is not safe or not VGG-16, ImportError without huggingface_hub.
    """
    if str(source).startswith(HUB):
        hub = import_extra("huggingface_hub", "sr")
        path = Path(hub.hf_hub_download(str(source).removeprefix(HUB), "model.safetensors"))
    else:
        path = Path(source)
    if not path.is_file():
        raise MissingFileError(f"{path} is missing; give the safetensors file of a VGG-16, or {HUB}OWNER/NAME")
    if path.suffix in (".pth", ".pt"):
        raise BadFileError(
            f"{path} is a pickle by its name, which is never opened; convert it once: python -c 'import torch, "
            f'safetensors.torch as s; s.save_file(torch.load("{path.name}", weights_only=True), "vgg16.safetensors")\''
        )
    try:
        return PerceptualDistance(load_tensors(path)).to(device)
    except InvalidValueError as error:
        raise BadFileError(f"{path} holds no VGG-16: {error}") from error
