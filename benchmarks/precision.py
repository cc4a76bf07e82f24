# SPDX-License-Identifier: Apache-2.0
"""What the last bits of a noisy sum tell: one coordinate, one step, a record that is there or not.

The noise has deviation 1, the record adds 1 to a sum of 0 (``noise_multiplier`` 1, its whole bound in one coordinate).
The observer looks at one event, "the output does not come from a noisy sum that is a
multiple of 2^-k", for every k. Differential privacy
bounds the chance of an event with the record by its chance without it: ``p <= e^epsilon q + delta``, with the roles
exchanged too. The delta that an event shows at epsilon 4 is to stay below the Gaussian mechanism's own, 4.7e-5.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import wavedp
from wavedp.optim import DPSGD

EPSILON = 4.0
FALSE_ALARM = 1e-6  # that any delta is overstated
EXPONENTS = tuple(range(4, 33))
LEARNING_RATE = 0.1  # no power of two: the step rounds
CHUNK = 1 << 20


def gaussian_delta(epsilon: float) -> float:
    """Of the Gaussian mechanism with deviation 1 and sensitivity 1 (Balle and Wang, arXiv 1805.06530, theorem 8)."""

    def cdf(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    return cdf(0.5 - epsilon) - math.exp(epsilon) * cdf(-0.5 - epsilon)


def as_it_is(out: Tensor) -> list[Tensor]:
    return [out.double()]


@dataclass(frozen=True)
class Mechanism:
    """``release`` adds noise to sums [n], one a trial, and does what follows.

    ``sums_of`` is what an observer makes of the outputs: for each the noisy sums that it may come from, in float64,
    NaN for none.
    """

    release: Callable[[Tensor], Tensor]
    sums_of: Callable[[Tensor], list[Tensor]] = as_it_is


@dataclass(frozen=True)
class Event:
    """The output comes from no multiple of 2^-exponent."""

    exponent: int
    without: int  # how often it was seen without the record
    with_record: int
    trials: int

    @property
    def shown(self) -> float:
        """The delta at EPSILON that it shows, at the least."""
        alarm = FALSE_ALARM / (4 * len(EXPONENTS))
        low, high = (sorted((self.without, self.with_record))[k] for k in (0, 1))
        upper = bound(low, self.trials, alarm, above=True)
        return bound(high, self.trials, alarm, above=False) - math.exp(EPSILON) * upper


def bound(count: int, trials: int, alarm: float, *, above: bool) -> float:
    """The chance's confidence limit: where ``n KL(count / n || p) = ln(1 / alarm)`` (Chernoff)."""
    share = count / trials

    def excess(p: float) -> float:
        terms = [(share, p), (1 - share, 1 - p)]
        return trials * sum(a * math.log(a / b) for a, b in terms if a > 0) - math.log(1 / alarm)

    near, far = share, (1.0 if above else 0.0)
    for _ in range(60):
        middle = (near + far) / 2
        near, far = (near, middle) if excess(middle) > 0 else (middle, far)
    return far


def events(mechanism: Mechanism, trials: int) -> list[Event]:
    """Every event's count in ``trials`` outputs without the record and as many with it."""
    counts = {exponent: [0, 0] for exponent in EXPONENTS}
    for present in (0, 1):
        for start in range(0, trials, CHUNK):
            out = mechanism.release(torch.full((min(CHUNK, trials - start),), float(present)))
            sums = mechanism.sums_of(out)
            for exponent in EXPONENTS:
                scaled = [x * 2.0**exponent for x in sums]
                on_lattice = torch.stack([x == torch.round(x) for x in scaled]).any(0)
                counts[exponent][present] += int((~on_lattice).sum())
    return [Event(exponent, without, with_record, trials) for exponent, (without, with_record) in counts.items()]


def gradients_of(weights: Tensor) -> list[Tensor]:
    """Those of float32 that SGD's step from a weight of zero takes to ``weights``: the rate is no power of two."""
    rate = torch.tensor(LEARNING_RATE)
    nearest = -weights / rate
    candidates = [nearest, *(torch.nextafter(nearest, torch.full_like(nearest, end)) for end in (-math.inf, math.inf))]
    return [torch.where(-rate * x == weights, x, math.nan).double() for x in candidates]


def ours() -> dict[str, Mechanism]:
    def step(total: Tensor, dtype: torch.dtype, rate: float) -> Tensor:
        weight = torch.zeros(total.shape, dtype=dtype)
        DPSGD([weight], lr=rate).step(sums=[total], std=1.0, denominator=1.0)
        return weight

    return {
        "wavedp, add_gaussian_noise_": Mechanism(lambda total: wavedp.add_gaussian_noise_(total, 1.0)),
        "wavedp, noisy_mean": Mechanism(lambda total: wavedp.noisy_mean(total, 1.0)),
        "wavedp, noisy_mean, strict": Mechanism(lambda total: wavedp.noisy_mean(total.double(), 1.0, mode="strict")),
        "wavedp, DPSGD step": Mechanism(lambda total: step(total, torch.float32, LEARNING_RATE), gradients_of),
        "wavedp, DPSGD step, bfloat16": Mechanism(lambda total: step(total, torch.bfloat16, 1.0)),
    }


def opacus() -> dict[str, Mechanism]:
    """``DPOptimizer`` of Opacus after clipping: ``add_noise``, ``scale_grad``, the step. Secure mode's arithmetic with
    torch's generator, since torchcsprng is no longer installable."""
    optimizers = importlib.import_module("opacus.optimizers")

    def noised(total: Tensor, dtype: torch.dtype, secure: bool, step: bool) -> Tensor:
        weight: Any = torch.zeros(total.shape, dtype=dtype, requires_grad=True)
        optimizer = optimizers.DPOptimizer(
            torch.optim.SGD([weight], lr=LEARNING_RATE),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            expected_batch_size=1,
            secure_mode=secure,
        )
        weight.grad_sample, weight.summed_grad = torch.empty(1, 0), total.to(dtype)
        optimizer.add_noise()
        optimizer.scale_grad()
        if step:
            optimizer.original_optimizer.step()
        out: Tensor = weight.detach() if step else weight.grad
        return out

    found = {}
    for name, secure in (("Opacus", False), ("Opacus, secure mode", True)):
        plain = partial(noised, dtype=torch.float32, secure=secure, step=False)
        found[name] = Mechanism(plain)
        found[f"{name}, SGD step"] = Mechanism(partial(plain, step=True), gradients_of)
        found[f"{name}, bfloat16"] = Mechanism(partial(plain, dtype=torch.bfloat16))
    return found


def mechanisms() -> dict[str, Mechanism]:
    """Opacus' if it is installed, then this package's."""
    return (opacus() if importlib.util.find_spec("opacus") else {}) | ours()


def table(found: Mapping[str, list[Event]]) -> list[str]:
    """As Markdown: the event of 2^-24, and the event that shows most."""
    trials = next(iter(found.values()))[0].trials
    lines = [
        f"| {trials:,} trials | not 2^-24: without | with the record | event that shows most | without | "
        f"with the record | delta shown at epsilon {EPSILON:g} |",
        "|---" * 7 + "|",
    ]
    for name, here in found.items():
        fixed = next(event for event in here if event.exponent == 24)
        most = max(here, key=lambda event: event.shown)
        shown = f"**{most.shown:.2g}**" if most.shown > gaussian_delta(EPSILON) else "none"
        cells = [name, percent(fixed.without, trials), percent(fixed.with_record, trials)]
        if most.shown > gaussian_delta(EPSILON):
            cells += [f"not 2^-{most.exponent}", percent(most.without, trials), percent(most.with_record, trials)]
        else:
            cells += ["", "", ""]
        lines.append(f"| {' | '.join([*cells, shown])} |")
    return lines


def percent(count: int, trials: int) -> str:
    share = 100 * count / trials
    return f"{share:.2f} %" if share >= 0.01 else "< 0.01 %" if count else "0"
