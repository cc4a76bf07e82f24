# SPDX-License-Identifier: Apache-2.0
"""Spectral image tokenizer: images <-> discrete tokens, coarse scales first (arXiv 2412.09607)."""

import hashlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavedp.errors import InvalidTypeError, InvalidValueError
from wavedp.models.quantizer import FiniteScalarQuantizer, Quantized, Quantizer, VectorQuantizer
from wavedp.models.sizes import described
from wavedp.models.spectra import image_to_maps, image_to_tokens, num_scales_of, tokens_to_image
from wavedp.models.tokenizer_config import SpectralTokenizerConfig
from wavedp.models.transformer import SpectralBlock, scale_causal_mask


class TokenizerOutput(NamedTuple):
    """What a training step needs: ``images`` [B, C, r, r], ``tokens`` [B, T], scalar losses."""

    images: Tensor
    tokens: Tensor
    loss: Tensor
    reconstruction_loss: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor


class SpectralTokenizer(nn.Module):
    """Encoder, two disjoint codebooks (approximation, details) and decoder over wavelet patches.

    ``encode`` takes images at the resolution of any prefix of the scales and returns that prefix's tokens;
    ``decode`` takes a prefix of the tokens and returns the image at that prefix's resolution.
    """

    coefficient_mean: Tensor
    coefficient_std: Tensor

    def __init__(self, config: SpectralTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.layout = config.layout()
        scales = range(self.layout.num_scales)
        dims = [self.layout.token_dim(s) for s in scales]
        length = self.layout.num_scales * self.layout.tokens_per_scale
        self.embed = nn.ModuleList(nn.Linear(d, config.width) for d in dims)
        decoder_width, decoder_heads = config.decoder_sizes()
        self.unembed = nn.ModuleList(nn.Linear(decoder_width, d) for d in dims)
        self.encoder_position = nn.Parameter(0.02 * torch.randn(length, config.width))
        self.decoder_position = nn.Parameter(0.02 * torch.randn(length, decoder_width))
        of_encoder = (config.width, config.heads, config.mlp_ratio)
        of_decoder = (decoder_width, decoder_heads, config.mlp_ratio)
        self.encoder = nn.ModuleList(SpectralBlock(*of_encoder) for _ in range(config.encoder_depth))
        self.decoder = nn.ModuleList(SpectralBlock(*of_decoder) for _ in range(config.decoder_depth))
        self.encoder_norm = nn.RMSNorm(config.width)
        self.decoder_norm = nn.RMSNorm(decoder_width)
        self.approximation_quantizer = _quantizer(config, config.approximation_codes, config.approximation_levels)
        self.detail_quantizer = _quantizer(config, config.detail_codes, config.detail_levels)
        # Public constants of the normalisation, per scale and coefficient channel; `fit_normalisation` sets them.
        width = max(self.layout.map_channels(s) for s in scales)
        self.register_buffer("coefficient_mean", torch.zeros(self.layout.num_scales, width))
        self.register_buffer("coefficient_std", torch.ones(self.layout.num_scales, width))

    @torch.no_grad()
    def fit_normalisation(self, images: Tensor) -> None:
        """Sets the per-scale mean and standard deviation from *public* images [B, C, H, W] in [0, 1]."""
        for s, m in enumerate(image_to_maps(images, self.layout)):
            channels = m.shape[1]
            self.coefficient_mean[s, :channels] = m.mean(dim=(0, 2, 3))
            self.coefficient_std[s, :channels] = m.std(dim=(0, 2, 3)).clamp_min(1e-3)

    def fingerprint(self) -> str:
        """SHA-256 of sizes and weights, in hexadecimal: two tokenizers that share it give the same tokens."""
        digest = hashlib.sha256(self.config.identity().encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, C, r, r] in [0, 1], at the resolution of k scales -> tokens [B, k * tokens_per_scale], int64.

        A token of the approximation lies in [0, approximation_codes), one of the details in [0, detail_codes).
        Raises ValueError for a coarse image when the encoder is not scale-causal: its tokens would differ from
        those of the full image.
        """
        return torch.cat([q.tokens for q in self._quantize(images)], dim=1)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens [B, k * tokens_per_scale] of the first k scales -> images [B, C, r_k, r_k] in [0, 1]."""
        if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
            raise InvalidTypeError(f"tokens must be an int64 tensor [B, T], got {described(tokens)}")
        if tokens.dim() != 2:
            raise InvalidValueError(f"tokens must have shape [B, T], got {list(tokens.shape)}")
        num_scales = self.layout.scales_of_length(tokens.shape[1])
        self._need_causal("decoder", num_scales)
        n = self.layout.tokens_per_scale
        for name, part, codes in (
            ("approximation", tokens[:, :n], self.config.approximation_codes),
            ("detail", tokens[:, n:], self.config.detail_codes),
        ):
            if part.numel() and not 0 <= int(part.min()) <= int(part.max()) < codes:
                raise InvalidValueError(
                    f"{name} tokens must lie in 0..{codes - 1}; were they made by another tokenizer?"
                )
        hidden = [self.approximation_quantizer.lookup(tokens[:, :n])]
        if num_scales > 1:
            hidden.append(self.detail_quantizer.lookup(tokens[:, n:]))
        return self._reconstruct(torch.cat(hidden, dim=1)).clamp(0, 1)

    def forward(self, images: Tensor) -> TokenizerOutput:
        """Encodes, quantises and decodes images [B, C, r, r]; the loss is taken in pixels, after the inverse
        transform: L2 + codebook + ``commitment_weight`` * commitment."""
        quantized = self._quantize(images)
        reconstruction = self._reconstruct(torch.cat([q.values for q in quantized], dim=1))
        reconstruction_loss = F.mse_loss(reconstruction, images)
        codebook_loss = torch.stack([q.codebook_loss for q in quantized]).mean()
        commitment_loss = torch.stack([q.commitment_loss for q in quantized]).mean()
        loss = reconstruction_loss + codebook_loss + self.config.commitment_weight * commitment_loss
        tokens = torch.cat([q.tokens for q in quantized], dim=1)
        return TokenizerOutput(reconstruction, tokens, loss, reconstruction_loss, codebook_loss, commitment_loss)

    def _quantize(self, images: Tensor) -> list[Quantized]:
        self._need_causal("encoder", num_scales_of(images, self.layout))
        patches = image_to_tokens(images, self.layout, *self._normalisation())
        tokens = [self.embed[s](patch) for s, patch in enumerate(patches)]
        hidden = torch.cat(tokens, dim=1)
        hidden = hidden + self.encoder_position[: hidden.shape[1]]
        hidden = self.encoder_norm(self._run(self.encoder, hidden, self.config.causal in ("encoder", "both")))
        n = self.layout.tokens_per_scale
        quantized = [self.approximation_quantizer(hidden[:, :n])]
        if len(tokens) > 1:
            quantized.append(self.detail_quantizer(hidden[:, n:]))
        return quantized

    def _reconstruct(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.decoder_position[: hidden.shape[1]]
        hidden = self.decoder_norm(self._run(self.decoder, hidden, self.config.causal in ("decoder", "both")))
        dtype = self.coefficient_std.dtype  # autocast makes half precision of the patches, not of the image
        scales = hidden.split(self.layout.tokens_per_scale, dim=1)
        patches = [self.unembed[s](tokens).to(dtype) for s, tokens in enumerate(scales)]
        return tokens_to_image(patches, self.layout, *self._normalisation())

    def _run(self, blocks: nn.ModuleList, hidden: Tensor, causal: bool) -> Tensor:
        n = self.layout.tokens_per_scale
        num_scales = hidden.shape[1] // n
        mask = scale_causal_mask(num_scales, n, hidden.device) if causal and num_scales > 1 else None
        for block in blocks:
            hidden = block(hidden, n, mask)
        return hidden

    def _need_causal(self, side: str, num_scales: int) -> None:
        if num_scales < self.layout.num_scales and self.config.causal not in (side, "both"):
            raise InvalidValueError(
                f"{num_scales} of {self.layout.num_scales} scales need a scale-causal {side}, but this tokenizer has "
                f"causal={self.config.causal!r}; train one with causal='both'"
            )

    def _normalisation(self) -> tuple[list[Tensor], list[Tensor]]:
        """Mean and standard deviation of the coefficients: for each scale [its channels]."""
        counts = [self.layout.map_channels(s) for s in range(self.layout.num_scales)]
        mean, std = (
            [values[s, :count] for s, count in enumerate(counts)]
            for values in (self.coefficient_mean, self.coefficient_std)
        )
        return mean, std


def _quantizer(config: SpectralTokenizerConfig, codes: int, levels: tuple[int, ...]) -> Quantizer:
    width_out, _ = config.decoder_sizes()
    if config.quantizer == "fsq":
        return FiniteScalarQuantizer(config.width, levels, width_out=width_out)
    return VectorQuantizer(config.width, codes, config.code_dim, width_out=width_out)
