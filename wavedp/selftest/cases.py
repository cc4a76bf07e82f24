# SPDX-License-Identifier: Apache-2.0
"""Small random models and batches, one private step on them by a route of choice, and what it should give."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavedp.optim import DPSGD
from wavedp.privacy import PrivacySpec, PrivateOptimizer

VOCABULARY = 7
DELTA = 1e-5
EXPECTED_BATCH_SIZE = 8.0
SLACK = 2.0**-9
"""What rounding may add to a record's contribution, as a share of C: what docs/privacy.md states."""


def specification(**changes: Any) -> PrivacySpec:
    fields: dict[str, Any] = {
        "sample_rate": 0.1,
        "steps": 20,
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
        "expected_batch_size": EXPECTED_BATCH_SIZE,
        "delta": DELTA,
        "dataset_size_bound": 10_000,
    }
    return PrivacySpec(**{**fields, **changes})


class Recorder(torch.optim.Optimizer):
    """An optimizer that notes the gradients which it is given, and leaves the parameters as they are."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self.seen: list[list[Tensor]] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.seen.append(
            [
                torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
                for group in self.param_groups
                for p in group["params"]
            ]
        )


KINDS = ("linear", "bias", "embedding", "norm", "group_norm", "conv", "tied", "twice", "bare", "attention")


class TokenModel(nn.Module):
    """``[rows, T, width]`` and ids ``[rows, T]`` to ``[rows, T, *]``, with what its kind says."""

    def __init__(self, kind: str, width: int, rng: random.Random) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Linear(width, width, bias=kind == "bias" or rng.random() < 0.5)
        self.last = nn.Linear(width, 3, bias=kind == "bias" or rng.random() < 0.5)
        if kind in ("embedding", "tied"):
            padding = rng.choice([None, 0]) if kind == "embedding" else None
            self.token = nn.Embedding(VOCABULARY, width, padding_idx=padding)
        if kind == "norm":
            self.norm = rng.choice([nn.LayerNorm, nn.RMSNorm])(width)
        if kind == "group_norm":
            self.norm = nn.GroupNorm(1, width)
        if kind == "conv":
            self.conv = nn.Conv1d(width, width, 3, padding=1, stride=rng.choice([1, 2]))
        if kind == "bare":
            self.matrix = nn.Parameter(torch.randn(width, width) / math.sqrt(width))
        if kind == "attention":
            self.attention = nn.MultiheadAttention(width, 1, batch_first=True)
        if kind == "bias":
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(name.endswith("bias"))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        if self.kind in ("embedding", "tied"):
            x = x + self.token(ids)
        h = torch.tanh(self.first(x))
        if self.kind == "norm":
            h = self.norm(h)
        if self.kind == "group_norm":
            h = self.norm(h.mT).mT
        if self.kind == "conv":
            h = self.conv(h.mT).mT
        if self.kind == "twice":
            h = torch.tanh(self.first(h))
        if self.kind == "bare":
            h = h @ self.matrix
        if self.kind == "attention":
            h = self.attention(h, x, x, need_weights=False)[0]
        if self.kind == "tied":
            return torch.cat([self.last(h), F.linear(h, self.token.weight)], -1)
        return torch.as_tensor(self.last(h))


@dataclass(frozen=True)
class Route:
    """How a batch gets into the optimizer."""

    backward: str = "losses"
    """``losses``, ``mean`` or ``sum`` (a plain backward), ``two`` (two backwards), ``records`` (two rows a record)."""
    micro_batches: int = 1
    fused: bool = False
    noise_multiplier: float = 0.0
    seed: int | None = None


@dataclass
class Outcome:
    """What a step released, times the expected batch size, and what it did besides."""

    sums: list[Tensor]
    trace: tuple[Any, ...]
    clipping_state: dict[str, Any]

    def distance(self, other: "Outcome | Sequence[Tensor]") -> float:
        theirs = other.sums if isinstance(other, Outcome) else other
        return norm([a - b for a, b in zip(self.sums, theirs)])

    @property
    def finite(self) -> bool:
        return all(bool(torch.isfinite(total).all()) for total in self.sums)


def norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([tensor.double().norm() for tensor in tensors]).norm())


@dataclass
class Case:
    """A model and records for it. Row r of ``x``, ``ids`` and ``scales`` is a record, or half of one."""

    kind: str
    rng: random.Random
    records: int
    dtype: torch.dtype = torch.float64
    rule: Any = "flat"
    rows_per_record: int = 1
    model: TokenModel = field(init=False)
    bound: float = field(init=False)

    def __post_init__(self) -> None:
        rng = self.rng
        torch.manual_seed(rng.getrandbits(32))
        tokens, width = rng.randint(2, 5), rng.choice([2, 4, 6])
        rows = self.records * self.rows_per_record
        self.model = TokenModel(self.kind, width, rng).to(self.dtype)
        self.x = torch.randn(rows, tokens, width, dtype=self.dtype)
        self.ids = torch.randint(0, VOCABULARY, (rows, tokens))
        self.ids[:, -1] = self.ids[:, 0]  # a token that comes twice
        spread = rng.uniform(0.0, 3.0)
        size = 10.0 ** rng.uniform(-4, 4)
        self.scales = size * 10.0 ** torch.empty(rows, 1, dtype=self.dtype).uniform_(-spread, spread).expand(
            rows, tokens
        )
        self.scales = self.scales.clone()
        self.bound = 1.0
        self.grads = self._grads()
        norms = torch.stack([grad.flatten(1).square().sum(1) for grad in self.grads.values()]).sum(0).sqrt()
        # Half of the records are clipped, and by a factor that is no power of two.
        self.bound = min(max(float(norms.median()) * rng.uniform(0.3, 0.9), 1e-8), 1e8)
        if isinstance(self.rule, dict) and self.rule["name"] == "per_group":
            share = self.bound / math.sqrt(2.0)
            self.rule = {"name": "per_group", "bounds": {"first.*": share, "(?!first).*": share}}
            self.bound = math.hypot(share, share)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def spec(self, noise_multiplier: float, **changes: Any) -> PrivacySpec:
        return specification(
            noise_multiplier=noise_multiplier,
            max_grad_norm=self.bound,
            clipping_rule=self.rule,
            sample_rate=1.0,
            **changes,
        )

    def losses(self, rows: Tensor) -> Tensor:
        out = self.model(self.x[rows], self.ids[rows])
        scales = self.scales[rows]
        if out.shape[1] != scales.shape[1]:
            scales = scales[:, : out.shape[1]]
        return torch.as_tensor((out.square().sum(-1) * scales).sum(1))

    def rows_of(self, records: Sequence[int]) -> Tensor:
        k = self.rows_per_record
        return torch.tensor([record * k + i for record in records for i in range(k)], dtype=torch.int64)

    @contextmanager
    def run(self, route: Route) -> Iterator[Callable[[Sequence[int]], Outcome]]:
        """Attach an optimizer; yields a function that takes one private step on the records that it is given."""
        params = list(self.parameters.values())
        before = [p.detach().clone() for p in params]
        optimizer: Any = DPSGD(params, lr=1.0) if route.fused else Recorder(params)
        private = PrivateOptimizer(
            self.model,
            optimizer,
            self.spec(route.noise_multiplier),
            without_privacy=route.noise_multiplier == 0.0,
            insecure_seed=route.seed,
            loss_reduction=route.backward if route.backward in ("mean", "sum") else None,
            two_backwards=route.backward == "two",
        )

        def release(records: Sequence[int]) -> Outcome:
            charged, started = private.steps_charged, private.steps_started
            for chunk in (records[i :: route.micro_batches] for i in range(route.micro_batches)):
                if chunk:
                    self._backward(private, chunk, route)
            private.step()
            steps = 1 if route.fused else len(optimizer.seen)
            trace = (private.steps_charged - charged, private.steps_started - started, private.pending, steps)
            if route.fused:
                means = [b - p.detach() for b, p in zip(before, params)]
            else:
                means = optimizer.seen.pop() if optimizer.seen else [torch.zeros_like(b) for b in before]
            state = private.state_dict()["clipping"]
            return Outcome([mean * EXPECTED_BATCH_SIZE for mean in means], trace, state)

        with private:
            yield release
        if route.fused:
            with torch.no_grad():
                for p, b in zip(params, before):
                    p.copy_(b)

    def releases(self, batches: Sequence[Sequence[int]], route: Route) -> list[Outcome]:
        """One private step on each of ``batches``: in one run, unless the noise has to be the same or weights move."""
        if route.fused or route.seed is not None or self.rule_name == "adaptive":
            found = []
            for records in batches:
                with self.run(route) as release:
                    found.append(release(records))
            return found
        with self.run(route) as release:
            return [release(records) for records in batches]

    def _backward(self, private: PrivateOptimizer, chunk: Sequence[int], route: Route) -> None:
        rows = self.rows_of(chunk)
        indices = torch.tensor(chunk, dtype=torch.int64)
        sample_id = indices.repeat_interleave(self.rows_per_record) if self.rows_per_record > 1 else None
        if route.backward in ("mean", "sum"):
            private.announce(indices)
            private.set_sample_id(sample_id)
            losses = self.losses(rows)
            torch.autograd.backward(losses.mean() if route.backward == "mean" else losses.sum())
        else:
            private.backward(self.losses(rows), records=indices, sample_id=sample_id)

    def _grads(self) -> dict[str, Tensor]:
        """Every record's gradient, by one ordinary backward for each."""
        grads: dict[str, list[Tensor]] = {name: [] for name in self.parameters}
        for record in range(self.records):
            loss = self.losses(self.rows_of([record])).mean()
            found = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
            for (name, parameter), grad in zip(self.parameters.items(), found):
                grads[name].append(torch.zeros_like(parameter) if grad is None else grad)
        return {name: torch.stack(rows).double() for name, rows in grads.items()}

    def expected(self, records: Sequence[int]) -> list[Tensor]:
        """The clipped sum by its definition, in float64."""
        squares = {name: grad.flatten(1).square().sum(1) for name, grad in self.grads.items()}
        groups: dict[str, str] = {name: self._group(name) for name in self.grads}
        factors = {}
        for group in set(groups.values()):
            total = torch.stack([squares[name] for name in squares if groups[name] == group]).sum(0).sqrt()
            factors[group] = self._factors(total, len(set(groups.values())))
        chosen = torch.tensor(list(records), dtype=torch.int64)
        return [
            torch.tensordot(factors[groups[name]][chosen], grad[chosen], 1)
            if len(chosen)
            else torch.zeros_like(grad[0])
            for name, grad in self.grads.items()
        ]

    @property
    def rule_name(self) -> str:
        return self.rule if isinstance(self.rule, str) else str(self.rule["name"])

    def _group(self, name: str) -> str:
        if self.rule_name == "per_layer":
            return name.rpartition(".")[0]
        return (name.partition(".")[0] == "first" and "first") or "other" if self.rule_name == "per_group" else ""

    def _factors(self, norms: Tensor, groups: int) -> Tensor:
        if self.rule_name == "automatic":
            return self.bound / (norms + 0.01)
        if self.rule_name == "normalised":
            return torch.where(norms > 0.0, self.bound / norms, 0.0)
        share = {"per_layer": math.sqrt(groups), "per_group": math.sqrt(2.0)}.get(self.rule_name, 1.0)
        return (self.bound / share / norms).clamp_max(1.0)
