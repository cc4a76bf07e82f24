# SPDX-License-Identifier: Apache-2.0
"""Autoregressive transformer over spectral tokens, coarse scales first (AR-SIT), conditioned on class and text."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavedp.errors import InvalidTypeError, InvalidValueError
from wavedp.models.autoregressive_config import AutoregressiveConfig, check_class_names
from wavedp.models.generation import generate_tokens
from wavedp.models.positions import RotaryPositions, coordinates
from wavedp.models.sampling import SamplingOptions
from wavedp.models.sizes import described
from wavedp.models.transformer import CausalBlock


class AutoregressiveTransformer(nn.Module):
    """Predicts token t from the text, the class and the tokens before t. Approximation and detail tokens have their own
    embeddings and their own output heads, because their codebooks are disjoint.

    A sequence has a slot for each text token, one for the class, and one for each token but the last. Slots of texts
    that are shorter, left out or dropped hold a learned vector that says so, so that shapes never depend on texts.
    """

    def __init__(self, config: AutoregressiveConfig) -> None:
        super().__init__()
        self.config = config
        has_detail = config.num_scales > 1
        self.class_embedding = nn.Embedding(config.num_classes + 1, config.width)  # the last row: no class
        self.token_embedding = nn.Embedding(
            config.approximation_codes + (config.detail_codes if has_detail else 0), config.width
        )
        embeddings = [self.class_embedding, self.token_embedding]
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.length, config.width)
            embeddings += [self.position_embedding]
        elif config.position == "factorised":
            self.scale_embedding = nn.Embedding(config.num_scales, config.width)
            self.row_embedding = nn.Embedding(config.grid, config.width)
            self.column_embedding = nn.Embedding(config.grid, config.width)
            embeddings += [self.scale_embedding, self.row_embedding, self.column_embedding]
        else:
            self.rotary = RotaryPositions(config)
        self.blocks = nn.ModuleList(
            CausalBlock(config.width, config.heads, config.mlp_ratio) for _ in range(config.depth)
        )
        self.norm = nn.RMSNorm(config.width)
        self.approximation_head = nn.Linear(config.width, config.approximation_codes)
        shared = has_detail and not config.per_scale_heads
        self.detail_head = nn.Linear(config.width, config.detail_codes) if shared else None
        if config.per_scale_heads:
            self.detail_heads = nn.ModuleList(
                nn.Linear(config.width, config.detail_codes) for _ in range(config.num_scales - 1)
            )
        if config.text_length:
            self.text_projection = nn.Linear(config.text_width, config.width)
            self.no_text_embedding = nn.Embedding(1, config.width)
            self.text_position_embedding = nn.Embedding(config.text_length, config.width)
            embeddings += [self.no_text_embedding, self.text_position_embedding]
        for embedding in embeddings:
            nn.init.normal_(embedding.weight, std=0.02)

    @property
    def no_class(self) -> int:
        """The label that stands for 'no class'."""
        return self.config.num_classes

    def with_classes(self, names: Sequence[str]) -> "AutoregressiveTransformer":
        """A copy for other classes, each of which begins as 'no class': what a model of public images of other things
        knows, with nothing of their classes. LoRA adapters are copied too, and what is frozen stays so.

        Raises:
            InvalidTypeError: the names are no sequence of texts, or are one text.
            InvalidValueError: there are none, one is empty, or one comes twice.
        """
        names = check_class_names(names)
        model = deepcopy(self)
        model.config = replace(self.config, num_classes=len(names), class_names=names)
        table, rows = model.class_embedding, len(names) + 1
        table.weight = nn.Parameter(table.weight.detach()[-1:].repeat(rows, 1), table.weight.requires_grad)
        table.num_embeddings = rows
        return model

    def loss(
        self, tokens: Tensor, labels: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None
    ) -> Tensor:
        """Per-sample mean negative log-likelihood in nats per token.

        ``tokens``: [B, T] int64, T a whole number of scales up to ``config.length``; ``labels``: [B] int64; ``text``:
        embeddings [B, L, text_width] with L up to ``text_length``, and ``text_mask`` [B, L], True where there is text.
        Returns [B]. In training mode a share ``class_dropout`` of the samples sees neither class nor text, and of the
        others a share ``text_dropout`` the class alone.
        """
        self._check(tokens, labels)
        text_mask = self._checked_text(text, text_mask, len(labels))
        if self.training and self.config.class_dropout > 0:
            drop = torch.rand(labels.shape, device=labels.device) < self.config.class_dropout
            labels = torch.where(drop, self.no_class, labels)
            text_mask = None if text_mask is None else text_mask & ~drop[:, None]
        if self.training and text_mask is not None and self.config.text_dropout > 0:
            drop = torch.rand(labels.shape, device=labels.device) < self.config.text_dropout
            text_mask = text_mask & ~drop[:, None]
        hidden = self.hidden(labels, tokens[:, :-1], text, text_mask)
        targets = tokens.split(self._head_sizes(tokens.shape[1]), dim=1)
        losses = [
            F.cross_entropy(head(part).flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
            for head, part, target in zip(self._heads(), hidden.split([t.shape[1] for t in targets], dim=1), targets)
        ]
        return torch.cat(losses, dim=1).mean(dim=1)

    def hidden(
        self, labels: Tensor, previous: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None
    ) -> Tensor:
        """[B] labels, [B, T - 1] tokens -> [B, T, D]: what the output heads get to predict tokens 0 to T - 1."""
        x = self._embed(labels, previous)
        if self.config.text_length:
            x = torch.cat([self.text_prefix(len(labels), text, text_mask), x], dim=1)
        rotation = self.rotary(0, x.shape[1]) if self.config.position == "rotary" else None
        for block in self.blocks:
            x = block(x, rotation)
        normed: Tensor = self.norm(x[:, self.config.text_length :])
        return normed

    def generate(
        self,
        labels: Tensor,
        *,
        num_scales: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float = 1.0,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        compiled: bool = False,
    ) -> Tensor:
        """Samples tokens [B, num_scales * tokens_per_scale], int64, for class labels [B] and texts as in `loss`.

        ``temperature`` divides the logits (0 takes the most likely token); ``top_k`` keeps the k most likely, ``top_p``
        the fewest whose probabilities add up to at least that; ``guidance_scale`` g mixes logits as none + g (given -
        none), where 'none' sees neither class nor text, so 1 is no guidance. ``dtype`` is that of weights, keys and
        values, such as torch.bfloat16 (default: the model's own); sums, norms and logits stay float32. ``compiled``
        runs a step by torch.compile, on a GPU as a CUDA graph: the first call of each batch size takes long.
        """
        config = self.config
        num_scales = config.num_scales if num_scales is None else num_scales
        if type(num_scales) is not int or not 1 <= num_scales <= config.num_scales:
            raise InvalidValueError(f"num_scales must lie in 1..{config.num_scales}, got {num_scales}")
        if dtype is not None and not dtype.is_floating_point:
            raise InvalidValueError(f"dtype must be a floating-point one, such as torch.bfloat16, got {dtype}")
        options = SamplingOptions(temperature, top_k, top_p, guidance_scale)
        self._check_labels(labels)
        self._check_range(labels)
        text_mask = self._checked_text(text, text_mask, len(labels))
        length = num_scales * config.tokens_per_scale
        return generate_tokens(self, labels, text, text_mask, length, options, generator, dtype, compiled)

    def text_prefix(self, batch: int, text: Tensor | None, text_mask: Tensor | None) -> Tensor:
        """[B, text_length, D]: the projected text, and where there is none, the vector that says so."""
        device = self.no_text_embedding.weight.device
        slots = torch.arange(self.config.text_length, device=device).expand(batch, -1)
        x = self.no_text_embedding(torch.zeros_like(slots))
        if text is not None and text_mask is not None:
            missing = self.config.text_length - text.shape[1]
            projected = self.text_projection(F.pad(text.to(self.text_projection.weight.dtype), (0, 0, 0, missing)))
            x = torch.where(F.pad(text_mask, (0, missing))[..., None], projected.to(x.dtype), x)
        prefix: Tensor = x + self.text_position_embedding(slots)
        return prefix

    def positions(self, ids: Tensor) -> Tensor | None:
        """What is added to the slots that predict the tokens ``ids`` [..., T]; None where position is rotary."""
        if self.config.position == "learned":
            learned: Tensor = self.position_embedding(ids)
            return learned
        if self.config.position == "rotary":
            return None
        place = coordinates(self.config.num_scales, self.config.grid).to(ids.device)[ids]
        scale, row, column = place.unbind(-1)
        summed: Tensor = self.scale_embedding(scale) + self.row_embedding(row) + self.column_embedding(column)
        return summed

    def head(self, position: int) -> nn.Module:
        """The output head of a token."""
        return self._heads()[min(position // self.config.tokens_per_scale, len(self._heads()) - 1)]

    def offset(self, position: int) -> int:
        """Where the codes of a token begin in the table of token embeddings."""
        return 0 if position < self.config.tokens_per_scale else self.config.approximation_codes

    def _embed(self, labels: Tensor, previous: Tensor) -> Tensor:
        """[B] labels, [B, T - 1] tokens -> [B, T, D]: position t holds the class (t = 0) or token t - 1."""
        B, T = previous.shape[0], previous.shape[1] + 1
        n = self.config.tokens_per_scale
        positions = torch.arange(T, device=labels.device)
        ids = previous + torch.where(positions[:-1] < n, 0, self.config.approximation_codes)
        x = torch.cat([self.class_embedding(labels)[:, None], self.token_embedding(ids)], dim=1)
        position = self.positions(positions.expand(B, T))
        return x if position is None else x + position

    def _head_sizes(self, length: int) -> list[int]:
        """How many of ``length`` tokens each head predicts; heads that have none are left out."""
        n = self.config.tokens_per_scale
        if self.config.per_scale_heads:
            return [n] * (length // n)
        return [n] if length == n else [n, length - n]

    def _heads(self) -> list[nn.Module]:
        """In the order of the scales; the last serves all that follow."""
        if self.config.per_scale_heads:
            return [self.approximation_head, *self.detail_heads]
        return [self.approximation_head] if self.detail_head is None else [self.approximation_head, self.detail_head]

    def _checked_text(self, text: Tensor | None, mask: Tensor | None, batch: int) -> Tensor | None:
        """The mask of a text that fits; None where there is no text."""
        config = self.config
        if text is None:
            if mask is not None:
                raise InvalidValueError("text_mask was given without text")
            return None
        if not config.text_length:
            raise InvalidValueError("this model takes no text: it was made with text_length=0; leave text out")
        if not isinstance(text, Tensor) or not text.is_floating_point():
            raise InvalidTypeError(f"text must be a floating-point tensor [B, L, D], got {described(text)}")
        longest = [batch, config.text_length, config.text_width]
        if text.dim() != 3 or [len(text), text.shape[2]] != longest[::2] or text.shape[1] > config.text_length:
            raise InvalidValueError(f"text must have shape {longest} or shorter texts, got {list(text.shape)}")
        if mask is None:
            return torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise InvalidTypeError(f"text_mask must be a tensor of torch.bool, got {described(mask)}")
        if mask.shape != text.shape[:2]:
            raise InvalidValueError(f"text_mask must have shape {list(text.shape[:2])}, got {list(mask.shape)}")
        return mask

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
