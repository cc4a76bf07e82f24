# SPDX-License-Identifier: Apache-2.0
"""Twenty steps of fine-tuning by the engine and by the plain definition: the same losses, with noise and without."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from wavedp import PrivacyEngine
from wavedp.functional import clip_and_sum, noisy_mean
from wavedp.models import AutoregressiveConfig, AutoregressiveTransformer
from wavedp.optim import DPAdamW
from wavedp.privacy import Entropy, FlatClipping

STEPS, RECORDS, BOUND, EXPECTED, SEED = 20, 12, 0.5, 12.0, 3


class Losses(nn.Module):
    """The pipeline's model, called for its per-record losses."""

    def __init__(self) -> None:
        super().__init__()
        config = AutoregressiveConfig(
            num_scales=2,
            tokens_per_scale=4,
            approximation_codes=8,
            detail_codes=6,
            num_classes=3,
            width=16,
            depth=2,
            heads=2,
            class_dropout=0.0,
        )
        self.model = AutoregressiveTransformer(config)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return self.model.loss(tokens, labels)


def made() -> tuple[Losses, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Losses().double()
    tokens = torch.cat([torch.randint(0, 8, (RECORDS, 4)), torch.randint(0, 6, (RECORDS, 4))], 1)
    return model, tokens, torch.randint(0, 3, (RECORDS,))


def by_definition(noise_multiplier: float) -> list[float]:
    """Per-record gradients by vmap, clipped and summed as materialised, noised, and stepped."""
    model, tokens, labels = made()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    entropy = Entropy(SEED, "noise")
    names = [name for name, _ in model.named_parameters()]

    def loss(parameters: dict[str, Tensor], tokens: Tensor, label: Tensor) -> Tensor:
        return functional_call(model, parameters, (tokens[None], label[None]))[0]

    std = noise_multiplier * FlatClipping(BOUND).sensitivity()
    losses = []
    for _ in range(STEPS):
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        grads = vmap(grad(loss), (None, 0, 0))(parameters, tokens, labels)
        losses.append(vmap(loss, (None, 0, 0))(parameters, tokens, labels).mean().item())
        sums = dict(zip(names, clip_and_sum([grads[name] for name in names], BOUND)))
        offset = 0
        with entropy.key() as key:
            for name, parameter in model.named_parameters():
                parameter.grad = noisy_mean(sums[name], std, divisor=EXPECTED, key=key, offset=offset)
                offset += parameter.numel()
        optimizer.step()
    return losses


def by_the_engine(
    noise_multiplier: float, make: type[torch.optim.Optimizer] = torch.optim.AdamW, **settings: Any
) -> list[float]:
    model, tokens, labels = made()
    _, optimizer, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=make(model.parameters(), lr=1e-2),  # type: ignore[call-arg]
        data_loader=None,
        sample_rate=0.1,
        noise_multiplier=noise_multiplier,
        max_grad_norm=BOUND,
        expected_batch_size=EXPECTED,
        insecure_seed=SEED,
        without_privacy=noise_multiplier == 0.0,
        **settings,
    )
    losses = []
    for _ in range(STEPS):
        rows: Tensor = model(tokens, labels)
        losses.append(rows.mean().item())
        if settings:
            optimizer.backward(rows)
        else:
            rows.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("noise_multiplier", [0.0, 0.3])
@pytest.mark.parametrize("settings", [{}, {"two_backwards": True}], ids=["ordinary", "two_backwards"])
def test_the_same_losses(noise_multiplier: float, settings: dict[str, Any]) -> None:
    expected = by_definition(noise_multiplier)
    assert by_the_engine(noise_multiplier, **settings) == pytest.approx(expected, rel=1e-7)
    assert expected[-1] < expected[0] - 0.1 or noise_multiplier


@pytest.mark.parametrize("rule", ["per_layer", "automatic", "normalised", "adaptive"])
def test_every_rule_trains(rule: str) -> None:
    model, tokens, labels = made()
    _, optimizer, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        data_loader=None,
        sample_rate=0.1,
        noise_multiplier=0.05,
        max_grad_norm=BOUND,
        expected_batch_size=EXPECTED,
        clipping=rule,
        insecure_seed=SEED,
    )
    losses: list[float] = []
    for _ in range(STEPS):
        loss: Tensor = model(tokens, labels).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("noise_multiplier", [0.0, 0.3])
def test_the_fused_optimizer_takes_the_same_steps(noise_multiplier: float) -> None:
    assert by_the_engine(noise_multiplier, make=DPAdamW) == pytest.approx(by_the_engine(noise_multiplier), rel=1e-9)
