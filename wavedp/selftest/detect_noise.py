# SPDX-License-Identifier: Apache-2.0
"""The law of the noise: what a step releases, less the clipped sum, is Gaussian, of the stated size, on the grid.

Each test of chance fails with a chance of 1e-8 where the noise is right.
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from wavedp import functional
from wavedp.optim import DPSGD, DPAdam
from wavedp.privacy import PrivateOptimizer, release_label_histogram
from wavedp.privacy import noise_law_statistics as statistics
from wavedp.selftest.alarms import require, require_likely
from wavedp.selftest.cases import EXPECTED_BATCH_SIZE, SLACK, Recorder, specification

ROWS, WIDTH = 1024, 128
COORDINATES = 2 * ROWS * WIDTH
MULTIPLIER, BOUND = 1.25, 0.75
_RECORDS = 64
_RESIDUES = 16
_EDGE, _BINS, _TAIL = 8.0, 1 << 12, 4.0


class TwoTables(nn.Module):
    """Two large parameters, of which the loss reaches one."""

    def __init__(self, rows: int = ROWS) -> None:
        super().__init__()
        self.a, self.b = nn.Embedding(rows, WIDTH), nn.Embedding(rows, WIDTH)
        with torch.no_grad():
            self.a.weight.zero_()
            self.b.weight.zero_()

    def forward(self, ids: Tensor) -> Tensor:
        return torch.as_tensor(self.a(ids))


class Releases:
    """Steps of one private run of :class:`TwoTables`: empty, with records, and empty again."""

    def __init__(self, optimizer: str = "recorder", *, rows: int = ROWS, steps: int = 3, **changes: Any) -> None:
        fields = {"noise_multiplier": MULTIPLIER, "max_grad_norm": BOUND, "steps": 8, **changes}
        self.spec = specification(**fields)
        self.model = TwoTables(rows)
        params = list(self.model.parameters())
        inner: Any = Recorder(params) if optimizer == "recorder" else DPSGD(params, lr=1.0)
        self.noise: list[list[Tensor]] = []
        """Per step and parameter what was released, times the expected batch size, less the clipped sum."""
        self.released: list[list[Tensor]] = []
        with PrivateOptimizer(self.model, inner, self.spec) as private:
            for step in range(steps):
                before = [p.detach().clone() for p in params]
                expected = [torch.zeros_like(p, dtype=torch.float64) for p in params]
                if step == 1:
                    expected[0] = self._add_records(private)
                private.step()
                means = inner.seen[-1] if optimizer == "recorder" else [b - p for b, p in zip(before, params)]
                released = [mean.detach().double() * EXPECTED_BATCH_SIZE for mean in means]
                self.released.append(released)
                self.noise.append([total - own for total, own in zip(released, expected)])
            self.state = private.state_dict()

    def _add_records(self, private: PrivateOptimizer) -> Tensor:
        """Records whose gradients are all longer than C, and equal in a row of the table."""
        ids = torch.arange(_RECORDS)[:, None]
        losses = 10.0 * self.model(ids).sum((1, 2))
        private.backward(losses, records=ids[:, 0])
        total = torch.zeros_like(self.model.a.weight, dtype=torch.float64)
        total[:_RECORDS] = BOUND / math.sqrt(WIDTH)
        return total


def detect(seed: int) -> None:
    torch.manual_seed(seed)
    std = MULTIPLIER * BOUND * (1.0 + SLACK)
    releases = Releases()
    check_law("the noise of a step", [part for step in releases.noise for part in step], std)
    check_law("the noise where the sum is not zero", [releases.noise[1][0][:_RECORDS]], std)
    check_grid("a step's release", releases.released, std)
    fused = Releases("sgd", steps=1)
    check_law("the noise of a step of DPSGD", fused.noise[0], std)
    check_grid("a release of DPSGD", fused.released, std)
    strict = Releases(
        steps=1, noise_mode="strict", trainable_parameters=COORDINATES, noise_multiplier=1.0, max_grad_norm=1.0
    )
    # Rounding to integers is to cost 2^-15 sqrt(2^18) = 1/64 here.
    check_law("strict noise", strict.noise[0], (1.0 + SLACK) / (1.0 - 2.0**-6))
    raw = functional.gaussian_noise((COORDINATES,), 1.0)
    check_law("gaussian_noise", [raw.double()], 1.0)
    check_radius(raw.double())
    check_labels()
    check_adaptive()
    check_adam_scale()


def check_law(what: str, parts: list[Tensor], std: float) -> None:
    """Mean, variance, distribution function and tail of Gaussian noise that is rounded to at most 2^-12 of its size."""
    count, total, squares, beyond = 0, 0.0, 0.0, 0
    histogram = torch.zeros(_BINS, dtype=torch.int64)
    for part in parts:
        x = part.flatten().double() / std
        count += x.numel()
        total += float(x.sum())
        squares += float(torch.dot(x, x))
        beyond += int((x.abs() > _TAIL).sum())
        histogram += torch.bincount(((x + _EDGE) * (_BINS / (2 * _EDGE))).clamp_(0, _BINS - 1).long(), minlength=_BINS)
    require_likely(statistics.both_sides(total / math.sqrt(count)), f"{what} has the mean {total / count:.4g}")
    p_value = 2 * min(statistics.lower_gamma(count / 2, squares / 2), statistics.upper_gamma(count / 2, squares / 2))
    require_likely(p_value, f"{what} has {squares / count:.5g} of its variance")
    edges = torch.linspace(-_EDGE, _EDGE, _BINS + 1, dtype=torch.float64)[1:-1]
    wanted = 0.5 * torch.erfc(edges / -math.sqrt(2.0))
    distance = float((histogram.cumsum(0)[:-1] / count - wanted).abs().max()) - 2.0**-12 / math.sqrt(8 * math.pi)
    # Massart: P(sup |F_n - F| > d) <= 2 exp(-2 n d^2).
    p_value = 2 * math.exp(-2 * count * max(0.0, distance) ** 2)
    require_likely(p_value, f"the distribution of {what} is off a Gaussian's by {distance:.3g}")
    expected = count * math.erfc(_TAIL / math.sqrt(2.0))
    require_likely(
        statistics.poisson(beyond, expected),
        f"{what} is beyond {_TAIL:g} deviations {beyond} times, not {expected:.1f}",
    )


def check_grid(what: str, steps: list[list[Tensor]], std: float) -> None:
    """All values are multiples of a public power of two, and their last bits are uniform."""
    grid = 2.0 ** (math.floor(math.log2(std)) - 12)
    for step in steps:
        counts = torch.zeros(_RESIDUES, dtype=torch.int64)
        for part in step:
            whole = part / grid
            off = int((whole != whole.round()).sum())
            require(off == 0, f"{what}: {off} of {part.numel()} values are off the public grid")
            counts += torch.bincount(torch.remainder(whole, _RESIDUES).long().flatten(), minlength=_RESIDUES)
        wanted = counts.double().mean().expand(_RESIDUES)
        _, _, p_value = statistics.chi_square(counts.numpy(), wanted.numpy(), _RESIDUES - 1)
        require_likely(p_value, f"{what}: the last bits are not uniform")


def check_radius(normals: Tensor) -> None:
    """Pairs far out have radii of more than 24 bits, where torch.randn's end."""
    for lag in (1, 8, 16):
        resolution = statistics.TailResolution(lag, 24)
        resolution.add(normals)
        require_likely(resolution.result()[2], "radii of normals lie on a lattice of 24 bits: the tail ends at 5.8")


def check_labels() -> None:
    spec = specification(label_noise_multiplier=3.0)
    counts = release_label_histogram(torch.arange(100), 1 << 14, spec)
    counts[:100] -= 1.0
    check_law("the noise of a label histogram", [counts], 3.0)


def check_adaptive() -> None:
    """The noise of adaptive clipping's counts, from how they move C, and of the sum beside them."""
    count_noise, multiplier = 1.0, 1.5
    rule = {"name": "adaptive", "count_noise_stddev": count_noise}
    model = nn.Linear(1024, 16, bias=False)
    recorder = Recorder(model.parameters())
    spec = specification(noise_multiplier=multiplier, clipping_rule=rule, steps=64)
    bounds, sums = [1.0], []
    with PrivateOptimizer(model, recorder, spec) as private:
        for _ in range(24):
            private.step()
            sums.append(recorder.seen.pop()[0].double() * EXPECTED_BATCH_SIZE / (bounds[-1] * (1.0 + SLACK)))
            bounds.append(private.state_dict()["clipping"]["max_grad_norm"])
    votes = [
        -math.log(after / before) / 0.2 * EXPECTED_BATCH_SIZE for before, after in itertools.pairwise(bounds)
    ]  # (fraction - 1/2) times the batch size, of empty batches: noise alone
    squares = sum(vote * vote for vote in votes) / count_noise**2
    p_value = 2 * min(statistics.lower_gamma(12.0, squares / 2), statistics.upper_gamma(12.0, squares / 2))
    require_likely(p_value, f"the noise of adaptive counts has variance {squares / 24:.3g}, not 1")
    # Sum and count together are to be one mechanism of the multiplier: 1/z^2 = 1/z_sum^2 + 1/(2 sigma_b)^2.
    of_sum = (multiplier**-2 - (2.0 * count_noise) ** -2) ** -0.5
    check_law("the noise beside adaptive counts", [torch.stack(sums)], of_sum)


def check_adam_scale() -> None:
    """DPAdam's first step shows the noise in its first moment."""
    model = nn.Linear(512, 256, bias=False)
    optimizer = DPAdam(model.parameters(), lr=1e-3)
    with PrivateOptimizer(model, optimizer, specification(noise_multiplier=2.0)) as private:
        private.step()
        moment = optimizer.state[model.weight]["exp_avg"].double() * (EXPECTED_BATCH_SIZE / 0.1)
    check_law("the noise of a step of DPAdam", [moment], 2.0 * (1.0 + SLACK))
