# SPDX-License-Identifier: Apache-2.0
"""Swin2SR (Conde et al. 2022, arXiv 2209.11345) through transformers: x2 or x4, one deterministic pass."""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from wavedp.errors import InvalidValueError
from wavedp.superres.base import BatchedSuperResolver, State, check_scale
from wavedp.superres.hub import fetch, import_extra, location

DEFAULT_PATHS = {4: "caidas/swin2SR-classical-sr-x4-64", 2: "caidas/swin2SR-classical-sr-x2-64"}


class Swin2sr(BatchedSuperResolver):
    """``Swin2SRForImageSuperResolution``, on images padded to multiples of its attention window (8)."""

    name = "swin2sr"

    def __init__(
        self,
        model: Any,  # a built Swin2SRForImageSuperResolution
        *,
        path: str | None = None,
        batch_size: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> None:
        config = model.config
        if config.upscale < 2:
            raise InvalidValueError(
                f"this Swin2SR restores at the same size (upscale={config.upscale}); take one that enlarges"
            )
        super().__init__(
            config.upscale, batch_size=batch_size, device=device or model.device, dtype=dtype or model.dtype
        )
        self.channels = config.num_channels
        self.size_multiple = config.window_size
        self.path, self.revision = path, revision
        self.model = model.to(self.device, self.dtype).eval()

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
        transformers = import_extra("transformers", cls.name)
        if pipeline is None:
            if path is None and scale not in (None, *DEFAULT_PATHS):
                raise InvalidValueError(f"swin2sr enlarges x2 or x4, not x{scale}; to_size chains to a wanted size")
            path = path or DEFAULT_PATHS[scale or 4]
            loader = transformers.Swin2SRForImageSuperResolution.from_pretrained
            revision = {"revision": options["revision"]} if options.get("revision") else {}
            pipeline = fetch(loader, path, needed_by=cls.name, **revision)
            device, dtype = device or "cpu", dtype or torch.float32
        elif path is not None:
            raise InvalidValueError(f"{cls.name}: give path= or pipeline=, not both")
        resolver = cls(pipeline, path=path, device=device, dtype=dtype, **options)
        check_scale(cls.name, scale, resolver.scale)
        return resolver

    def _upscale(self, images: Tensor, generators: list[torch.Generator], condition: dict[str, Any]) -> Tensor:
        result: Tensor = self.model(pixel_values=images).reconstruction
        return result

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        super().to(device, dtype)
        self.model.to(self.device, self.dtype)
        return self

    def state(self) -> State:
        options = {"batch_size": self.batch_size, "revision": self.revision}
        return {"path": location(self.path, self.name), "options": options}, {}
