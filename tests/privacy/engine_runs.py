# SPDX-License-Identifier: Apache-2.0
"""A small language model under the engine, for the tests of the ordinary training loop."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from wavedp import PrivacyEngine
from wavedp.privacy import EngineOptimizer, clip_and_sum

Make = Callable[..., Any]
RECORDS, RATE, EXPECTED = 40, 0.25, 10.0


class TinyGPT(nn.Module):
    """An embedding whose weight is used again, by the module or by the function, for the logits."""

    def __init__(self, tying: str = "none") -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(11, 6), nn.Embedding(5, 6)
        self.mix, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.tying = tying
        if tying in ("none", "module"):
            self.head = nn.Linear(6, 11, bias=False)
        if tying == "module":
            self.head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]).expand(ids.shape))
        x = self.norm(x + torch.tanh(self.mix(x)).cumsum(1))
        if self.tying == "function":
            return F.linear(x, self.wte.weight)
        if self.tying == "product":
            return x @ self.wte.weight.T
        return self.head(x)


def token_loss(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())


def tokens(records: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 11, (records, 5), generator=generator)
    return ids, torch.randint(0, 11, (records, 5), generator=generator)


def private(model: nn.Module, **changes: Any) -> tuple[PrivacyEngine, EngineOptimizer, Any]:
    engine = PrivacyEngine()
    settings: dict[str, Any] = {
        "module": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=1.0),
        "data_loader": None,
        "sample_rate": RATE,
        "noise_multiplier": 0.0,
        "max_grad_norm": 0.5,
        "expected_batch_size": EXPECTED,
        "without_privacy": changes.get("noise_multiplier", 0.0) == 0.0,
    }
    same, optimizer, loader = engine.make_private(**{**settings, **changes})
    assert same is model
    return engine, optimizer, loader


def clipped_by_loop(model: nn.Module, ids: Tensor, targets: Tensor, bound: float = 0.5) -> dict[str, Tensor]:
    """The definition: one record at a time."""
    rows: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for i in range(len(ids)):
        model.zero_grad()
        token_loss(model, ids[i : i + 1], targets[i : i + 1]).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            rows[name].append(parameter.grad.clone())
    model.zero_grad()
    return dict(zip(rows, clip_and_sum([torch.stack(grads) for grads in rows.values()], bound)))


def moved(model: nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: (before[name] - p.detach()) * EXPECTED for name, p in model.named_parameters()}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    scale = torch.stack([value.norm() for value in expected.values()]).norm()
    for name, value in expected.items():
        assert (got[name] - value).norm() <= 1e-10 * scale, name


def loader_of(records: int = RECORDS, **settings: Any) -> DataLoader[Any]:
    ids, targets = tokens(records)
    return DataLoader(TensorDataset(ids, targets, torch.arange(records)), batch_size=4, **settings)


def start(**changes: Any) -> tuple[nn.Module, EngineOptimizer, Any]:
    model = TinyGPT()
    _, optimizer, loader = private(model, data_loader=loader_of(), noise_multiplier=1.0, **changes)
    return model, optimizer, loader
