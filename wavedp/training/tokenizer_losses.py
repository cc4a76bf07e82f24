# SPDX-License-Identifier: Apache-2.0
"""What a tokenizer is trained for: L2, and on request coarse L2, a perceptual distance and a discriminator.

The paper (arXiv 2412.09607) has 1.0 L2 + 0.1 perceptual + 0.1 adversarial + 0.25 commitment, in pixels, after the
inverse transform. L2, codebook and commitment come from `SpectralTokenizer.forward`; this adds the others.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavedp.errors import InvalidValueError
from wavedp.models import SpectralTokenizer
from wavedp.models.discriminator import PatchDiscriminator
from wavedp.models.perceptual import PerceptualDistance
from wavedp.privacy.validation import check_integer, check_real
from wavedp.training.loop import Losses

ADVERSARIES = ("hinge", "non-saturating")


@dataclass(frozen=True)
class TokenizerLossConfig:
    """Weights of the losses beside L2 (1.0), the codebooks' (1.0) and the commitment's (the model's). 0 is off.

    ``adversary``: how discriminator and tokenizer are judged. ``"hinge"``: max(0, 1 - D(real)) + max(0, 1 + D(fake))
    against -D(fake); ``"non-saturating"``: softplus(-D(real)) + softplus(D(fake)) against softplus(-D(fake)).
    """

    perceptual: float = 0.0
    adversarial: float = 0.0
    multiscale: float = 0.0  # mean over the prefixes of the scales of the L2 at their resolution
    adversary: str = "hinge"
    adversarial_start: int = 0  # step at which the discriminator and its loss begin
    discriminator_width: int = 64
    discriminator_learning_rate: float = 2e-4  # constant: Adam with betas 0.5, 0.9

    def __post_init__(self) -> None:
        for name in ("perceptual", "adversarial", "multiscale"):
            check_real(name, getattr(self, name), at_least=0.0)
        if self.adversary not in ADVERSARIES:
            raise InvalidValueError(f"adversary must be one of {ADVERSARIES}, got {self.adversary!r}")
        check_integer("adversarial_start", self.adversarial_start, at_least=0)
        check_integer("discriminator_width", self.discriminator_width, at_least=1)
        check_real("discriminator_learning_rate", self.discriminator_learning_rate, above=0.0)

    @classmethod
    def for_preset(cls, name: str | None) -> "TokenizerLossConfig":
        """The paper's weights for the paper's geometries, L2 alone for the others."""
        return cls(perceptual=0.1, adversarial=0.1) if name is not None and name.startswith("sit-") else cls()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Adversary:
    """A discriminator with an optimizer of its own, an `Opponent` of the loop: it is trained after each step of the
    tokenizer, on that step's images and reconstructions."""

    column = "discriminator"

    def __init__(self, module: PatchDiscriminator, config: TokenizerLossConfig) -> None:
        self.module: nn.Module = module
        self.config = config
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(
            module.parameters(), lr=config.discriminator_learning_rate, betas=(0.5, 0.9)
        )
        self._active = False
        self._pair: tuple[Tensor, Tensor] | None = None

    def begin(self, step: int) -> None:
        self._active = step >= self.config.adversarial_start
        self._pair = None

    def against(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """The tokenizer's loss, whose gradient reaches the reconstructions and not the discriminator; 0 before the
        start."""
        if not self._active:
            return reconstructions.new_zeros(())
        self._pair = images, reconstructions.detach()
        self.module.requires_grad_(False)
        try:
            logits = self.module(reconstructions)
        finally:
            self.module.requires_grad_(True)
        return -logits.mean() if self.config.adversary == "hinge" else F.softplus(-logits).mean()

    def loss(self) -> Tensor | None:
        """The discriminator's own loss on the pair that `against` saw last."""
        if self._pair is None:
            return None
        real, fake = (self.module(images) for images in self._pair)
        self._pair = None
        if self.config.adversary == "hinge":
            return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        return F.softplus(-real).mean() + F.softplus(fake).mean()


def multiscale_loss(reconstructions: Tensor, images: Tensor, num_scales: int) -> Tensor:
    """Mean over k = 1 .. num_scales - 1 of the L2 between the images [B, C, r, r] that the first k scales give.

    With a scale-causal decoder the first k scales decode to exactly the 2^(num_scales - k) block means of the whole
    reconstruction, because finer Haar details have mean zero in every block; so nothing is decoded again.
    """
    if num_scales == 1:
        return reconstructions.new_zeros(())
    error = reconstructions - images
    losses = []
    for _ in range(num_scales - 1):
        error = F.avg_pool2d(error, 2)
        losses.append(error.square().mean())
    return torch.stack(losses).mean()


def tokenizer_losses(
    model: SpectralTokenizer,
    images: Tensor,  # [B, C, r, r] in [0, 1]
    config: TokenizerLossConfig,
    perceptual: PerceptualDistance | None = None,
    adversary: Adversary | None = None,
) -> Losses:
    """``"loss"`` for the optimizer, and what the log shows. A weighted loss without its network is left out."""
    output = model(images)
    loss = output.loss
    losses = {"reconstruction": output.reconstruction_loss, "codebook": output.codebook_loss}
    if config.multiscale:
        losses["multiscale"] = multiscale_loss(output.images, images, model.layout.num_scales)
        loss = loss + config.multiscale * losses["multiscale"]
    if config.perceptual and perceptual is not None:
        losses["perceptual"] = perceptual(output.images, images)
        loss = loss + config.perceptual * losses["perceptual"]
    if config.adversarial and adversary is not None:
        losses["adversarial"] = adversary.against(images, output.images)
        loss = loss + config.adversarial * losses["adversarial"]
    for name in ("approximation", "detail"):
        losses[f"{name}_perplexity"], losses[f"{name}_used"] = getattr(model, f"{name}_quantizer").use_of_codes()
    return {"loss": loss, **losses}
