# SPDX-License-Identifier: Apache-2.0
"""Ten experiments on private training, each on this package and on Opacus; page.py writes what they find.

A function of this package starts with ``our_``, one of Opacus with ``their_``. Every one takes its size, so that tests
run it small, and uses public functions alone, but for Opacus' ``add_noise``.
"""

from __future__ import annotations

import csv
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import wavedp
from wavedp.optim import DPAdam
from wavedp.privacy import accounting
from wavedp.reference.noise import normals_from_words

ROOT = Path(__file__).parents[2]
DELTA = 1e-5
WORD = (1 << 32) - 1


def opacus() -> Any:
    """The package, without what it says about secure mode."""
    import opacus.optimizers

    warnings.filterwarnings("ignore", module="opacus")
    warnings.filterwarnings("ignore", message=".*([Ff]ull backward hook|GDP accounting|[Ss]ecure RNG|PRV).*")
    return opacus


# 2. Noise in the type of the parameters


@dataclass(frozen=True)
class Values:
    """Of ``count`` draws of noise of deviation 1 for a parameter of bfloat16."""

    distinct: int
    largest: float
    beyond: int  # how many are farther out than LIMIT


LIMIT = math.sqrt(2 * 24 * math.log(2))  # where a radius of 24 bits ends: 5.77


def our_values(count: int) -> Values:
    """The noisy sum that a step makes of zeros: with beta1 = 0 it is Adam's first moment."""
    weight = torch.zeros(count, dtype=torch.bfloat16)
    optimizer = DPAdam([weight], betas=(0.0, 0.999))
    optimizer.step(sums=[torch.zeros(count)], std=1.0, denominator=1.0)
    return values(optimizer.state[weight]["exp_avg"])


def their_optimizer(weight: Tensor) -> Any:
    return opacus().optimizers.DPOptimizer(
        torch.optim.SGD([weight], lr=1.0), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=1
    )


def their_noise(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    weight: Any = torch.zeros(count, dtype=dtype, requires_grad=True)
    optimizer = their_optimizer(weight)
    weight.grad_sample, weight.summed_grad = torch.empty(1, 0), torch.zeros(count, dtype=dtype)
    optimizer.add_noise()
    out: Tensor = weight.grad
    return out


def their_values(count: int) -> Values:
    return values(their_noise(count, torch.bfloat16))


def values(noise: Tensor) -> Values:
    return Values(len(noise.unique()), float(noise.abs().max()), int((noise.abs() > LIMIT).sum()))


# 3. Where the noise ends


def tail(draw: Any, count: int, chunk: int = 1 << 22) -> Values:
    """The largest of many draws, and how many are beyond LIMIT."""
    largest, beyond = 0.0, 0
    for start in range(0, count, chunk):
        noise = draw(min(chunk, count - start)).abs()
        largest, beyond = max(largest, float(noise.max())), beyond + int((noise > LIMIT).sum())
    return Values(0, largest, beyond)


def our_tail(count: int) -> Values:
    return tail(lambda n: wavedp.gaussian_noise((n,), 1.0), count)


def their_tail(count: int) -> Values:
    return tail(their_noise, count)


def expected_beyond(count: int) -> float:
    return float(2 * stats.norm.sf(LIMIT) * count)


def our_end() -> float:
    """The largest normal that any words make."""
    zero, half = torch.tensor([0]), torch.tensor([WORD])
    return float(normals_from_words(zero, zero, torch.cat([zero, half]))[0].abs().max())


def truncation_delta(end: float, uses: float = 10.0, sigma: float = 1.0) -> float:
    """What pairs that end at a radius of ``end`` add to delta: a record that has its whole norm in one coordinate, in
    ``uses`` steps. The chance that the pair, moved by 1 / sigma, is where no pair without the record can be."""
    return uses * float(stats.ncx2.sf(end**2, 2, 1 / sigma**2))


# 4. Seeds and keys


def our_key_bits() -> int:
    """How many bits of a key change the stream."""
    key = bytes(range(32))
    streams = {bytes(wavedp.chacha20_words(key, 0, bytes(12), 16).numpy())}
    for bit in range(256):
        flipped = int.from_bytes(key, "big") ^ (1 << bit)
        streams.add(bytes(wavedp.chacha20_words(flipped.to_bytes(32, "big"), 0, bytes(12), 16).numpy()))
    return len(streams) - 1


def our_noise_repeats() -> bool:
    """Whether torch's seed decides the noise."""
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        drawn.append(wavedp.gaussian_noise((64,), 1.0))
    return bool(torch.equal(*drawn))


def their_noise_repeats() -> bool:
    """Whether two seeds that differ in their 33rd bit make the same noise."""
    drawn = []
    for seed in (5, 5 + (1 << 32)):
        torch.manual_seed(seed)
        drawn.append(their_noise(64))
    return bool(torch.equal(*drawn))


# 5. What a cipher costs: benchmarks/results has it


def step_times() -> dict[str, dict[str, float]]:
    """Of `wavedp bench noise`, by CPU: how many times as long as AdamW without noise a step takes, by provider."""
    times: dict[str, dict[str, float]] = {}
    for file in sorted((ROOT / "benchmarks" / "results").glob("noise-cpu-*.csv")):
        with file.open(encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                if row["case"] == "step-adamw":
                    device = row["device"].removeprefix("CPU ")
                    times.setdefault(device, {})[row["provider"]] = 1 / float(row["floor_ratio"])
    return times


# 6. The same seed again, and 7. constants that come from the data: one linear layer, a record's gradient is the record


class Scores(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).squeeze(-1)


def loader_of(x: Tensor, batch_size: int, *, shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x), batch_size=batch_size, shuffle=shuffle)


def ours(x: Tensor, *, rate: float, batch_size: float, sigma: float = 1.0, shuffle: bool = False) -> Any:
    model, engine = Scores(x.shape[1]), wavedp.PrivacyEngine()
    _, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=loader_of(x, max(1, int(batch_size)), shuffle=shuffle),
        sample_rate=rate,
        noise_multiplier=sigma,
        max_grad_norm=1.0,
        expected_batch_size=batch_size,
        steps=round(1 / rate),
        delta=DELTA,
    )
    return engine, model, optimizer, loader


def theirs(x: Tensor, *, batch_size: int, sigma: float = 1.0, poisson: bool = True) -> Any:
    model, engine = Scores(x.shape[1]), opacus().PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=loader_of(x, batch_size, shuffle=not poisson),
        noise_multiplier=sigma,
        max_grad_norm=1.0,
        poisson_sampling=poisson,
    )
    return engine, model, optimizer, loader


def train(model: nn.Module, optimizer: Any, loader: Any) -> list[Tensor]:
    """One pass; what was in each batch."""
    seen = []
    for (x,) in loader:
        optimizer.zero_grad()
        model(x).mean().backward()
        optimizer.step()
        seen.append(x)
    return seen


@dataclass(frozen=True)
class Replay:
    """A run is started again under the same seed after a record was withdrawn."""

    error: float  # of the withdrawn record's gradient, read off the difference of what the two runs released
    epsilon: float  # that either run reported


def replay(build: Any, width: int) -> Replay:
    x = torch.randn(32, width, generator=torch.Generator().manual_seed(1))
    released, epsilon = [], 0.0
    for records in (x, torch.cat([torch.zeros(1, width), x[1:]])):
        torch.manual_seed(7)
        engine, model, optimizer, loader = build(records)
        train(model, optimizer, loader)
        released.append(-len(x) * next(model.parameters()).detach().flatten().double())
        epsilon = engine.get_epsilon(DELTA)
    victim = (x[0] / x[0].norm()).double()
    return Replay(float((released[0] - released[1] - victim).norm()), epsilon)


def our_replay(width: int = 1000) -> Replay:
    return replay(lambda x: ours(x, rate=1.0, batch_size=len(x)), width)


def their_replay(width: int = 1000) -> Replay:
    return replay(lambda x: theirs(x, batch_size=len(x)), width)


def our_constants(records: int) -> tuple[float, float]:
    """What a loader with batches of 256 records is trained with: the rate, and what the sum is divided by."""
    _, _, optimizer, _ = ours(torch.zeros(records, 1), rate=0.1, batch_size=256)
    return optimizer.private.spec.sample_rate, optimizer.private.spec.expected_batch_size


def their_constants(records: int) -> tuple[float, float]:
    _, _, optimizer, loader = theirs(torch.zeros(records, 1), batch_size=256)
    return loader.sample_rate, optimizer.expected_batch_size


# 8. Shuffled batches


@dataclass(frozen=True)
class Epoch:
    """One pass over the data, or 1 / rate steps."""

    once: float  # share of the records that were in exactly one batch
    epsilon: float


def epoch(built: Any, records: int) -> Epoch:
    engine, model, optimizer, loader = built
    seen = torch.cat([x[:, 0] for x in train(model, optimizer, loader)]).long()
    return Epoch(float((seen.bincount(minlength=records) == 1).sum()) / records, engine.get_epsilon(DELTA))


def our_epoch(steps: int, sigma: float) -> Epoch:
    x = torch.arange(4.0 * steps).unsqueeze(1)
    return epoch(ours(x, rate=1 / steps, batch_size=4.0, sigma=sigma, shuffle=True), len(x))


def their_epoch(steps: int, sigma: float) -> Epoch:
    x = torch.arange(4.0 * steps).unsqueeze(1)
    return epoch(theirs(x, batch_size=4, sigma=sigma, poisson=False), len(x))


def shuffled_epsilon(steps: int, sigma: float) -> float:
    """A lower bound for one shuffled epoch, by the event that some batch's sum is above c (Chua et al. 2024, arXiv
    2403.17673): all other records contribute -1, and this one 1 or, left out in its place, 0."""
    best = 0.0
    for c in torch.arange(0.0, 12.0 * max(sigma, 1.0), 0.01).tolist():
        others = steps * stats.norm.logcdf(c / sigma) - stats.norm.logcdf(c / sigma)
        above = [-math.expm1(others + stats.norm.logcdf((c - moved) / sigma)) for moved in (2, 1)]
        if above[0] > DELTA and above[1] > 0:
            best = max(best, math.log((above[0] - DELTA) / above[1]))
    return best


# 9. The accountants


REFERENCE = {"sample_rate": 0.01, "noise_multiplier": 1.0}
STEPS = 1000


def our_bounds() -> tuple[float, float]:
    return accounting.epsilon_bounds(steps=STEPS, delta=DELTA, **REFERENCE)


def their_epsilon(accountant: str) -> float:
    import opacus.accountants

    opacus_accountants: Any = opacus.accountants
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = opacus_accountants.create_accountant(accountant)
        one.history = [(REFERENCE["noise_multiplier"], REFERENCE["sample_rate"], STEPS)]
        return float(one.get_epsilon(DELTA))
