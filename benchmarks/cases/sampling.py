# SPDX-License-Identifier: Apache-2.0
"""Sampling of tokens by the autoregressive model: the coarse prefix and all scales, at batch 1, 64 and 1,024."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from wavedp.benchmarks.registry import Progress, Shape, Thunk, Timed, WrongResult, silent
from wavedp.models import AutoregressiveConfig, AutoregressiveTransformer
from wavedp.models.sampling import sample_tokens

FLOOR = "wavedp"
CLASSES = 10
SLACK = 1e-3  # largest gap of a greedy token's logit to the largest one, in deviations of the logits
SLACK_BFLOAT16 = 0.3

Sampler = Callable[[Tensor, float], Tensor]  # labels [B], temperature -> tokens [B, T]
Scorer = Callable[[Tensor, Tensor], list[Tensor]]  # labels, tokens -> logits [B, K] in float64, one for each token


@dataclass(frozen=True)
class Batch:
    """How many images, by which model."""

    shape: Shape  # [B]
    width: int
    depth: int
    heads: int
    scales: int  # of the model
    tokens_per_scale: int
    codes: int
    dtype: torch.dtype = torch.float32  # of the model; a provider may say another
    recomputed: bool = True  # whether the provider without a cache is timed


@dataclass(frozen=True)
class SamplingProvider:
    """``sample`` is timed at temperature 1 and checked at temperature 0 by ``score``, a full pass in float64."""

    sample: Sampler
    score: Scorer
    slack: float = SLACK


def make_model(size: Batch, device: torch.device) -> AutoregressiveTransformer:
    """Weights far from the near-uniform start, so that what is drawn depends on what was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoregressiveConfig(
            num_classes=CLASSES,
            tokens_per_scale=size.tokens_per_scale,
            num_scales=size.scales,
            approximation_codes=size.codes,
            detail_codes=size.codes,
            width=size.width,
            depth=size.depth,
            heads=size.heads,
        )
        model = AutoregressiveTransformer(config)
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.3)
        return model.to(device).eval()


def score(model: AutoregressiveTransformer, labels: Tensor, tokens: Tensor) -> list[Tensor]:
    hidden = model.hidden(labels, tokens[:, :-1])
    return [model.head(t)(hidden[:, t]) for t in range(tokens.shape[1])]


def without_cache(model: AutoregressiveTransformer, length: int, labels: Tensor, temperature: float) -> Tensor:
    """Every token by a full pass over those before, as one would write it first."""
    tokens = labels.new_empty((len(labels), length))
    for t in range(length):
        logits = model.head(t)(model.hidden(labels, tokens[:, :t])[:, -1])
        uniforms = torch.rand(len(labels), device=labels.device) if temperature else None
        tokens[:, t] = sample_tokens(logits, uniforms, temperature)
    return tokens


def gpt2(size: Batch, length: int, device: torch.device) -> SamplingProvider:
    """GPT-2 of the same width, depth and codes; the class is a token more."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=size.codes + CLASSES + 1,
            n_positions=length + 1,
            n_embd=size.width,
            n_layer=size.depth,
            n_head=size.heads,
            bos_token_id=size.codes,
            eos_token_id=None,
            pad_token_id=size.codes + CLASSES,
            initializer_range=0.3,
        )
        model: Any = transformers.GPT2LMHeadModel(config)
        model = model.to(device).eval()
    banned = list(range(size.codes, size.codes + CLASSES + 1))

    def sample(labels: Tensor, temperature: float) -> Tensor:
        prompt = size.codes + labels[:, None]
        options: dict[str, Any] = {"do_sample": False}
        if temperature:
            options = {"do_sample": True, "top_k": 0, "top_p": 1.0}
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=length,
            min_new_tokens=length,
            suppress_tokens=banned,
            **options,
        )
        tokens: Tensor = out[:, 1:]
        return tokens

    def full_pass(labels: Tensor, tokens: Tensor) -> list[Tensor]:
        wide = model.double()
        logits = wide(torch.cat([size.codes + labels[:, None], tokens], dim=1)).logits[:, :-1, : size.codes]
        model.float()
        return list(logits.unbind(1))

    return SamplingProvider(sample, full_pass)


@dataclass(frozen=True)
class SamplingCase:
    """Tokens of the first ``scales`` scales for a batch of classes; a row's shape is the batch alone."""

    name: str
    scales: int
    sizes: Mapping[str, Sequence[Batch]]  # by "quick", "cpu" and "cuda"
    floors: ClassVar[tuple[str, ...]] = (FLOOR,)
    paired: ClassVar[bool] = True

    def providers(self, size: Batch, device: torch.device) -> dict[str, SamplingProvider]:
        model = make_model(size, device)
        wide = make_model(size, device).double()
        for module in wide.modules():
            if isinstance(module, nn.RMSNorm):
                module.eps = torch.finfo(torch.float32).eps
        length = self.scales * size.tokens_per_scale

        def ours(labels: Tensor, temperature: float, **how: Any) -> Tensor:
            return model.generate(labels, num_scales=self.scales, temperature=temperature, **how)

        scored = partial(score, wide)
        found = {
            FLOOR: SamplingProvider(ours, scored),
            "wavedp, torch.compile": SamplingProvider(partial(ours, compiled=True), scored),
            "wavedp, bfloat16": SamplingProvider(partial(ours, dtype=torch.bfloat16), scored, SLACK_BFLOAT16),
        }
        if size.recomputed:
            found["no cache"] = SamplingProvider(partial(without_cache, model, length), scored)
        if importlib.util.find_spec("transformers"):
            found["transformers GPT-2"] = gpt2(size, length, device)
        return found

    def timed(
        self, size: Batch, device: torch.device, *, quick: bool, progress: Progress = silent, only: str | None = None
    ) -> dict[str, Timed]:
        """See ``registry.Benchmark``. Greedy tokens are checked, sampling is timed."""
        torch.compiler.reset()
        labels = torch.arange(math.prod(size.shape), device=device) % CLASSES
        found = {}
        for name, provider in self.providers(size, device).items():
            if only not in (None, name) or (quick and "torch.compile" in name):
                continue
            progress(f"check {name}")
            check(f"{self.name}, {name}", provider, labels, self.scales * size.tokens_per_scale, size.codes)
            call: Thunk = torch.no_grad()(partial(provider.sample, labels, 1.0))
            call()
            found[name] = Timed(call, FLOOR)
        return found


@torch.no_grad()
def check(label: str, provider: SamplingProvider, labels: Tensor, length: int, codes: int) -> None:
    """Raises WrongResult unless greedy tokens are the likeliest of a full pass and sampled ones are codes that vary."""
    for temperature in (0.0, 1.0):
        tokens = provider.sample(labels, temperature)
        if tokens.shape != (len(labels), length):
            raise WrongResult(f"{label}: {list(tokens.shape)} tokens instead of {[len(labels), length]}")
        if not bool(((tokens >= 0) & (tokens < codes)).all()):
            raise WrongResult(f"{label}: tokens that are no codes")
    if length > 8 and len(tokens.unique()) < 4:
        raise WrongResult(f"{label}: sampled tokens do not vary")
    few = labels[:64]
    greedy = provider.sample(labels, 0.0)[:64]
    for t, logits in enumerate(provider.score(few, greedy)):
        gap = (logits.amax(1) - logits.gather(1, greedy[:, t : t + 1])[:, 0]).max().item()
        allowed = provider.slack * logits.std().item()
        if not gap <= allowed:  # also true for NaN
            raise WrongResult(f"{label}: token {t} is {gap:.3g} from the likeliest, more than {allowed:.3g}")


def batches(*counts: int, recomputed_to: int = 64, **sizes: int) -> list[Batch]:
    made: Callable[[Shape], Batch] = partial(Batch, **sizes)  # type: ignore[arg-type]
    return [replace(made((n,)), recomputed=n <= recomputed_to) for n in counts]


QUICK = {"width": 16, "depth": 1, "heads": 2, "scales": 3, "tokens_per_scale": 4, "codes": 8}
OF_32_PX = {"width": 96, "depth": 3, "heads": 4, "scales": 3, "tokens_per_scale": 16, "codes": 256}
OF_64_PX = {"width": 768, "depth": 12, "heads": 12, "scales": 4, "tokens_per_scale": 64, "codes": 1024}


def cases(model: str, sizes: Mapping[str, Sequence[Batch]], scales: Sequence[int]) -> list[SamplingCase]:
    """A case for each prefix; the last has all scales."""
    return [SamplingCase(f"{model}-scales-{count}", count, sizes) for count in scales]


CASES = [
    *cases(
        "32px",
        {
            "quick": batches(2, **QUICK),
            "cpu": batches(1, 64, 1024, **OF_32_PX),
            "cuda": batches(1, 64, 1024, recomputed_to=1024, **OF_32_PX),
        },
        (1, 2, 3),
    ),
    *cases("64px", {"quick": [], "cpu": [], "cuda": batches(1, 64, 1024, **OF_64_PX)}, (1, 2, 4)),
]
