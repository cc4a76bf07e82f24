# SPDX-License-Identifier: Apache-2.0
"""Class-conditional autoregressive transformer over spectral tokens, coarse scales first (AR-SIT)."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavedp.errors import InvalidTypeError, InvalidValueError
from wavedp.models.sizes import check_real, check_sizes, described
from wavedp.models.transformer import CausalBlock, KeyValueCache


@dataclass(frozen=True)
class AutoregressiveConfig:
    """Sizes of the model. It covers the first ``num_scales`` scales of a tokenizer: 1 is the approximation alone,
    which is all that the private stage needs."""

    num_classes: int
    tokens_per_scale: int
    num_scales: int
    approximation_codes: int
    detail_codes: int
    width: int = 128
    depth: int = 4
    heads: int = 4
    mlp_ratio: float = 4.0
    class_dropout: float = 0.1  # share of training samples that see no class, for classifier-free guidance
    class_names: tuple[str, ...] = ()  # what the labels mean, in their order; empty: unnamed
    tokenizer_fingerprint: str = ""  # of the tokenizer whose tokens it was trained on; empty: unknown
    privately_trained: bool = False  # whether its weights have already spent a privacy budget

    def __post_init__(self) -> None:
        sizes = ("num_classes", "tokens_per_scale", "num_scales", "approximation_codes", "detail_codes")
        check_sizes(self, *sizes, "width", "depth", "heads")
        check_real("mlp_ratio", self.mlp_ratio, above=0.0, below=1024.0)
        names: Any = self.class_names
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise InvalidTypeError(f"class_names must be a sequence of texts, got {names!r}")
        if not isinstance(self.tokenizer_fingerprint, str) or not isinstance(self.privately_trained, bool):
            raise InvalidTypeError("tokenizer_fingerprint must be a text and privately_trained True or False")
        object.__setattr__(self, "class_names", tuple(self.class_names))
        if self.class_names and len(self.class_names) != self.num_classes:
            raise InvalidValueError(f"{len(self.class_names)} class_names for num_classes={self.num_classes}")
        check_real("class_dropout", self.class_dropout, below=1.0)

    @property
    def length(self) -> int:
        """Tokens in a whole sequence."""
        return self.tokens_per_scale * self.num_scales

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class AutoregressiveTransformer(nn.Module):
    """Predicts token t from the class and tokens before t. Approximation and detail tokens have their own
    embeddings and their own output heads, because their codebooks are disjoint."""

    def __init__(self, config: AutoregressiveConfig) -> None:
        super().__init__()
        self.config = config
        has_detail = config.num_scales > 1
        self.class_embedding = nn.Embedding(config.num_classes + 1, config.width)  # the last row: no class
        self.token_embedding = nn.Embedding(
            config.approximation_codes + (config.detail_codes if has_detail else 0), config.width
        )
        self.position_embedding = nn.Embedding(config.length, config.width)
        self.blocks = nn.ModuleList(
            CausalBlock(config.width, config.heads, config.mlp_ratio) for _ in range(config.depth)
        )
        self.norm = nn.RMSNorm(config.width)
        self.approximation_head = nn.Linear(config.width, config.approximation_codes)
        self.detail_head = nn.Linear(config.width, config.detail_codes) if has_detail else None
        for embedding in (self.class_embedding, self.token_embedding, self.position_embedding):
            nn.init.normal_(embedding.weight, std=0.02)

    @property
    def no_class(self) -> int:
        """The label that stands for 'no class'."""
        return self.config.num_classes

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Per-sample mean negative log-likelihood in nats per token.

        ``tokens``: [B, T] int64, T a whole number of scales up to ``config.length``; ``labels``: [B] int64.
        Returns [B]. In training mode a share ``class_dropout`` of the samples sees no class.
        """
        self._check(tokens, labels)
        if self.training and self.config.class_dropout > 0:
            drop = torch.rand(labels.shape, device=labels.device) < self.config.class_dropout
            labels = torch.where(drop, self.no_class, labels)
        hidden = self._embed(labels, tokens[:, :-1])
        for block in self.blocks:
            hidden = block(hidden)
        losses = [
            F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
            for logits, target in zip(self._heads(self.norm(hidden)), tokens.split(self._head_sizes(tokens), dim=1))
        ]
        return torch.cat(losses, dim=1).mean(dim=1)

    @torch.no_grad()
    def generate(
        self,
        labels: Tensor,
        *,
        num_scales: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Samples tokens [B, num_scales * tokens_per_scale], int64, for class labels [B].

        ``temperature`` divides the logits (0 takes the most likely token); ``top_k`` keeps the k most likely;
        ``guidance_scale`` g mixes logits as none + g (class - none), so 1 is no guidance. Uses a key-value cache.
        """
        config = self.config
        num_scales = config.num_scales if num_scales is None else num_scales
        if not 1 <= num_scales <= config.num_scales:
            raise InvalidValueError(f"num_scales must lie in 1..{config.num_scales}, got {num_scales}")
        check_real("temperature", temperature, below=1e6)
        check_real("guidance_scale", guidance_scale, at_least=-1e3, below=1e3)
        if top_k is not None and (type(top_k) is not int or top_k < 1):
            raise InvalidValueError(f"top_k must be a positive integer, got {top_k!r}")
        self._check_labels(labels)
        self._check_range(labels)
        length = num_scales * config.tokens_per_scale
        guided = guidance_scale != 1.0
        rows = torch.cat([labels, torch.full_like(labels, self.no_class)]) if guided else labels
        weight = self.class_embedding.weight
        caches = [
            KeyValueCache(len(rows), config.heads, length, config.width // config.heads, weight) for _ in self.blocks
        ]
        tokens = labels.new_empty((len(labels), length))
        for t in range(length):
            if t == 0:
                x = self.class_embedding(rows)
            else:
                previous = tokens[:, t - 1] + self._offset(t - 1)
                x = self.token_embedding(previous.repeat(2) if guided else previous)
            hidden = (x + self.position_embedding.weight[t])[:, None]
            for block, cache in zip(self.blocks, caches):
                hidden = block(hidden, cache)
            logits = self._head(t)(self.norm(hidden[:, 0])).float()
            if guided:
                with_class, without = logits.chunk(2)
                logits = without + guidance_scale * (with_class - without)
            tokens[:, t] = sample_tokens(logits, temperature, top_k, generator)
        return tokens

    def _embed(self, labels: Tensor, previous: Tensor) -> Tensor:
        """[B] labels, [B, T - 1] tokens -> [B, T, D]: position t holds the class (t = 0) or token t - 1."""
        B, T = previous.shape[0], previous.shape[1] + 1
        n = self.config.tokens_per_scale
        positions = torch.arange(T, device=labels.device)
        ids = previous + torch.where(positions[:-1] < n, 0, self.config.approximation_codes)
        x = torch.cat([self.class_embedding(labels)[:, None], self.token_embedding(ids)], dim=1)
        position: Tensor = self.position_embedding(positions.expand(B, T))
        return x + position

    def _head_sizes(self, tokens: Tensor) -> list[int]:
        n = self.config.tokens_per_scale
        return [n] if tokens.shape[1] == n else [n, tokens.shape[1] - n]

    def _heads(self, hidden: Tensor) -> list[Tensor]:
        parts = hidden.split(self._head_sizes(hidden), dim=1)
        heads = [self.approximation_head, self.detail_head]
        return [head(part) for head, part in zip(heads, parts) if head is not None]

    def _head(self, position: int) -> nn.Module:
        if position < self.config.tokens_per_scale or self.detail_head is None:
            return self.approximation_head
        return self.detail_head

    def _offset(self, position: int) -> int:
        return 0 if position < self.config.tokens_per_scale else self.config.approximation_codes

    def _check_labels(self, labels: Tensor) -> None:
        if not isinstance(labels, Tensor):
            raise InvalidTypeError(f"labels must be an int64 tensor [B], got {described(labels)}")
        if labels.dim() != 1 or labels.dtype != torch.int64:
            raise InvalidValueError(f"labels must be int64 of shape [B], got {labels.dtype} {list(labels.shape)}")

    def _check_range(self, labels: Tensor) -> None:
        """Reads the labels, so it is left out of training steps."""
        if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) <= self.no_class):
            raise InvalidValueError(
                f"labels must lie in 0..{self.config.num_classes - 1} (or {self.no_class} for no class)"
            )

    def _check(self, tokens: Tensor, labels: Tensor) -> None:
        self._check_labels(labels)
        n = self.config.tokens_per_scale
        if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
            raise InvalidTypeError(f"tokens must be an int64 tensor [B, T], got {described(tokens)}")
        if tokens.dim() != 2 or tokens.shape[1] % n or not n <= tokens.shape[1] <= self.config.length:
            raise InvalidValueError(
                f"tokens must have shape [B, k * {n}] with k in 1..{self.config.num_scales}, got {list(tokens.shape)}"
            )
        if len(tokens) != len(labels):
            raise InvalidValueError(f"{len(tokens)} token sequences but {len(labels)} labels")


def sample_tokens(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None = None
) -> Tensor:
    """One token per row of ``logits`` [B, K]; see `AutoregressiveTransformer.generate`."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # the largest stays 0 however cold it is
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
