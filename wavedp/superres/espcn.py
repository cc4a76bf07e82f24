# SPDX-License-Identifier: Apache-2.0
"""The project's own small super-resolution network: sub-pixel convolution on top of bicubic interpolation.

After Shi et al. 2016, "Real-Time Single Image and Video Super-Resolution Using an Efficient Sub-Pixel
Convolutional Neural Network" (arXiv 1609.05158): all convolutions run at the low resolution and the last
one's channels are rearranged into pixels. Here the network predicts the difference from bicubic interpolation
and starts at zero, so an untrained one is bicubic. `wavedp.training.superres.train_espcn` trains it.
"""

from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from wavedp import storage
from wavedp.errors import BadFileError, InvalidValueError
from wavedp.superres.base import FORMAT, BatchedSuperResolver, State, check_positive, check_scale

SCALES = (2, 3, 4, 8)


@dataclass(frozen=True)
class EspcnConfig:
    """Shape of an `Espcn`; as in the paper, the layers after the first have half its width."""

    scale: int = 4  # 2, 3, 4 or 8
    channels: int = 3  # 1 or 3
    width: int = 64
    depth: int = 2  # hidden convolutions; one more makes the sub-pixels
    first_kernel: int = 5  # odd; the other kernels are 3

    def __post_init__(self) -> None:
        for field, most in (("width", 4096), ("depth", 64), ("first_kernel", 31)):
            if check_positive(field, getattr(self, field)) > most:
                raise InvalidValueError(f"{field} is at most {most}, not {getattr(self, field)}")
        if self.scale not in SCALES:
            raise InvalidValueError(f"the scale of an espcn is one of {SCALES}, not {self.scale!r}")
        if self.channels not in (1, 3):
            raise InvalidValueError(f"channels is 1 or 3, not {self.channels!r}")
        if self.width % 2 or self.first_kernel % 2 == 0:
            raise InvalidValueError(f"width is even and first_kernel odd, not {self.width} and {self.first_kernel}")


class Espcn(nn.Module):
    """``[B, channels, h, w]`` to ``[B, channels, h * scale, w * scale]``, differentiable, not clamped."""

    def __init__(self, config: EspcnConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.channels, config.width, *[config.width // 2] * (config.depth - 1)]
        layers: list[nn.Module] = []
        for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
            kernel = config.first_kernel if i == 0 else 3
            layers += [_convolution(fan_in, fan_out, kernel), nn.ReLU()]
        subpixels = _convolution(widths[-1], config.channels * config.scale**2, 3)
        nn.init.zeros_(subpixels.weight)
        nn.init.zeros_(subpixels.bias)  # type: ignore[arg-type]
        self.layers = nn.Sequential(*layers, subpixels, nn.PixelShuffle(config.scale))

    def forward(self, images: Tensor) -> Tensor:
        scale = float(self.config.scale)
        base = F.interpolate(images, scale_factor=scale, mode="bicubic", align_corners=False)
        residual: Tensor = self.layers(images - 0.5)
        return base + residual


def _convolution(fan_in: int, fan_out: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(fan_in, fan_out, kernel, padding=kernel // 2, padding_mode="replicate")


class EspcnResolver(BatchedSuperResolver):
    """An `Espcn` as a super-resolver. A grey network takes colour images channel by channel."""

    name = "espcn"

    def __init__(
        self,
        model: Espcn,
        *,
        batch_size: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        training: dict[str, Any] | None = None,  # how the weights came about, kept in the saved config
    ) -> None:
        first = next(model.parameters())
        device, dtype = device or first.device, dtype or first.dtype
        super().__init__(model.config.scale, batch_size=batch_size, device=device, dtype=dtype)
        self.channels = model.config.channels
        self.model = model.to(self.device, self.dtype)
        self.training = dict(training or {})

    @classmethod
    def load(
        cls,
        *,
        scale: int | None,
        path: str | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        pipeline: Espcn | None = None,
        **options: Any,
    ) -> Self:
        if (path is None) == (pipeline is None):
            raise InvalidValueError(
                "espcn has no built-in weights: give path=, a folder its training or save_pretrained wrote, "
                "or pipeline=, an Espcn; not both"
            )
        if path is not None:
            pipeline, options["training"] = read_espcn(path)
        assert pipeline is not None
        check_scale(cls.name, scale, pipeline.config.scale)
        return cls(pipeline, device=device, dtype=dtype, **options)

    def _upscale(self, images: Tensor, generators: list[torch.Generator], condition: dict[str, Any]) -> Tensor:
        result: Tensor = self.model(images)
        return result

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        super().to(device, dtype)
        self.model.to(self.device, self.dtype)
        return self

    def state(self) -> State:
        options = {"batch_size": self.batch_size}
        config = {"options": options, "model": asdict(self.model.config), "training": self.training}
        return config, dict(self.model.state_dict())


def read_espcn(path: str | Path) -> tuple[Espcn, dict[str, Any]]:
    """Reads a saved espcn, on the CPU: (model, how it was trained). ``path`` is its folder or a file in it.

    Raises FileNotFoundError, or ValueError for a damaged file, another model's folder or a wrong
    configuration.
    """
    path = Path(path).expanduser()
    folder = path.parent if path.is_file() else path
    config, tensors = storage.load_folder(folder)
    if config.get("format") != FORMAT or config.get("name") != "espcn":
        raise InvalidValueError(f"{folder} does not hold an espcn but {config.get('name', 'something else')!r}")
    try:
        settings = EspcnConfig(**config["model"])
        with torch.device("meta"):  # sizes without memory
            wanted = {name: value.shape for name, value in Espcn(settings).state_dict().items()}
    except (KeyError, TypeError, ValueError) as error:
        raise BadFileError(f"{folder / storage.CONFIG_FILE} describes no espcn: {error}") from error
    if wanted != {name: value.shape for name, value in tensors.items()}:
        raise BadFileError(f"the weights in {folder} are not those of the espcn in its config: copy the folder again")
    model = Espcn(settings)
    storage.load_weights(model, tensors, folder)
    made_by = config.get("training", {})
    return model, made_by if isinstance(made_by, dict) else {}
