# SPDX-License-Identifier: Apache-2.0
"""Tests of the noise's law on many draws, with a stated rate of false alarms.

:func:`check_noise_law` draws from a :class:`NoiseSource` in chunks and tests the moments, the distribution function,
the tail, correlations within the stream and between streams, and the residues on the public grid. Each test has the
chance ``false_alarm / number of tests`` to fail where the noise is right (Bonferroni), so that all together fail with
at most ``false_alarm``. p-values are of exact laws, or of bounds or normal approximations that hold for the counts of
draws that are allowed.

``wavedp noise-law`` is the command.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from wavedp import functional
from wavedp.privacy import noise_law_statistics as statistics
from wavedp.privacy.noise_law_statistics import Distribution, TailResolution
from wavedp.privacy.validation import check_integer, check_real

__all__ = ["LawTest", "NoiseSource", "check_noise_law", "public_source"]

FALSE_ALARM = 1e-6
LEAST_DRAWS = 1_000_000
CHUNK = 1 << 22  # draws at a time
LAGS = (1, 10, 16, 160)  # neighbours, numbers of a block, the two of a pair, the same place in the next group
TAILS = (4.0, 5.0, 6.0)
PAIR_LAGS = (1, 8, 16)  # where a generator may put the two numbers of a pair; 16 is this package's
SHORT = 1 << 17  # draws of a stream that are compared with those of another
RESIDUES = 16
CANARIES = (0.0, 1.0, 1 / 3, 2.0**-20)  # sums that are to leave no trace in the residues, in deviations


@dataclass(frozen=True)
class NoiseSource:
    """What is tested.

    Attributes:
        draw: ``draw(count, key, step, offset)`` returns ``count`` numbers of deviation 1, float32 or float64, of the
            stream of a key (a number that stands for one) and a step, from number ``offset`` on.
        add: ``add(total, key, step)`` returns the released ``total + noise``, of deviation 1; ``None``: not tested.
        grid: what ``add`` rounds to.
        drawn_grid: what ``draw`` rounds to, in deviations; 0 if it does not.
    """

    draw: Callable[[int, int, int, int], Tensor]
    add: Callable[[Tensor, int, int], Tensor] | None = None
    grid: float = 0.0
    drawn_grid: float = 0.0


def public_source(
    *,
    dtype: torch.dtype = torch.float32,
    mode: str = "standard",
    device: torch.device | str = "cpu",
    seed: int | None = None,
) -> NoiseSource:
    """The noise of :func:`wavedp.gaussian_noise` and :func:`wavedp.add_gaussian_noise_`, by the chosen backend.

    Args:
        dtype: float32 or float64.
        mode: ``"standard"``, or ``"strict"`` for the integers that :func:`wavedp.noisy_mean` makes in that mode.
        device: where it is made.
        seed: the same numbers again; ``None``: keys from the operating system.
    """
    keys: dict[int, functional.NoiseKey] = {}

    def key_of(number: int) -> functional.NoiseKey:
        if number not in keys:
            fresh = functional.NoiseKey.from_os
            keys[number] = fresh() if seed is None else functional.NoiseKey.insecure(seed << 32 | number)
        return keys[number]

    def draw(count: int, key: int, step: int, offset: int) -> Tensor:
        place: dict[str, Any] = {"key": key_of(key), "step": step, "offset": offset}
        if mode == "strict":
            return functional.noisy_mean(torch.zeros(count, dtype=dtype, device=device), 1.0, mode=mode, **place)
        return functional.gaussian_noise((count,), 1.0, dtype=dtype, device=device, **place)

    def add(total: Tensor, key: int, step: int) -> Tensor:
        total = total.to(device, dtype)
        if mode == "strict":
            return functional.noisy_mean(total, 1.0, mode=mode, key=key_of(key), step=step)
        return functional.add_gaussian_noise_(total.clone(), 1.0, key=key_of(key), step=step)

    grid = functional.grid_step(1.0, mode)
    return NoiseSource(draw, add, grid, grid if mode == "strict" else 0.0)


class LawTest(NamedTuple):
    """One test: what was measured, what right noise gives, and the chance that it strays at least as far."""

    name: str
    measured: float
    expected: float
    p_value: float
    false_alarm: float  # the test fails below it

    @property
    def passed(self) -> bool:
        return self.p_value >= self.false_alarm


class _Result(NamedTuple):
    name: str
    measured: float
    expected: float
    p_value: float


def check_noise_law(
    source: NoiseSource,
    draws: int,
    *,
    false_alarm: float = FALSE_ALARM,
    progress: Callable[[str], None] = lambda what: None,
) -> list[LawTest]:
    """Draw ``draws`` numbers and test them.

    What n draws can show: an error of the deviation of 5 / sqrt(n), of the distribution function of 3.1 / sqrt(n),
    a correlation of 5.5 / sqrt(n), each about; of the tail what occurs 20 times or more. A radius of few bits cuts
    the tail off where nobody counts, and is found by the gaps between its largest values.

    Args:
        source: where the numbers come from.
        draws: at least 1,000,000.
        false_alarm: chance that right noise fails a test, all tests together.
        progress: called with a line that says what is being done.

    Raises:
        ValueError: fewer draws, or ``false_alarm`` not in (0, 1).
    """
    draws = check_integer("draws", draws, at_least=LEAST_DRAWS)
    false_alarm = check_real("false_alarm", false_alarm, above=0.0, below=1.0)
    results = [*_stream(source, draws, progress), *_between_streams(source, progress)]
    if source.add is not None:
        results += _residues(source, min(draws, 10_000_000), progress)
    each = false_alarm / len(results)
    return [LawTest(*result, each) for result in results]


def _stream(source: NoiseSource, draws: int, progress: Callable[[str], None]) -> Iterator[_Result]:
    """One long stream: key 0, step 0."""
    law = Distribution(TAILS)
    resolution = {(lag, bits): TailResolution(lag, bits) for lag in PAIR_LAGS for bits in (24, 32)}
    products = dict.fromkeys(LAGS, 0.0)
    squares = dict.fromkeys(LAGS, 0.0)
    counts = dict.fromkeys(LAGS, 0)
    beginnings: list[np.ndarray] = []
    any_lag = equal = None
    for start in range(0, draws, CHUNK):
        progress(f"{start:,} of {draws:,} draws")
        x = source.draw(min(CHUNK, draws - start), 0, 0, start)
        kind = x.dtype
        x = x.double().cpu()
        law.add(x)
        for one in resolution.values():
            one.add(x)
        centred = x * x - 1.0
        for lag in LAGS:
            products[lag] += torch.dot(x[:-lag], x[lag:]).item()
            squares[lag] += torch.dot(centred[:-lag], centred[lag:]).item() / 2.0
            counts[lag] += x.numel() - lag
        if any_lag is None:
            any_lag = statistics.largest_autocorrelation(x[: 1 << 20])
            equal = statistics.equal_values(x[: 1 << 16], kind, source.drawn_grid)
        if x.numel() >= SHORT:
            beginnings.append(x[:SHORT].numpy().copy())
    assert any_lag is not None
    assert equal is not None
    yield from (_Result(*result) for result in law.results(source.drawn_grid))
    for one in resolution.values():
        yield _Result(f"gaps of 2^-{one.bits} in the tail, pairs {one.lag} apart", *one.result())
    for lag in LAGS:
        yield _Result(f"correlation, lag {lag}", *statistics.correlation(products[lag], counts[lag]))
        yield _Result(f"correlation of squares, lag {lag}", *statistics.correlation(squares[lag], counts[lag]))
    yield _Result("largest correlation, lags to 2^19", *any_lag)
    yield _Result("equal values among 65,536", *equal)
    if len(beginnings) > 1:
        name = f"largest correlation of {len(beginnings)} chunks"
        yield _Result(name, *statistics.largest_correlation(np.stack(beginnings)))


def _between_streams(source: NoiseSource, progress: Callable[[str], None]) -> Iterator[_Result]:
    """Streams that differ in the key, the step or the offset share nothing, wherever the difference lies."""
    progress("streams")
    streams = {
        "keys": [(key, 0, 0) for key in range(8)],
        "steps": [(0, step, 0) for step in (0, 1, 2, 255, 256, 2**16, 2**31, 2**32 - 1)],
        "offsets": [(0, 0, offset) for offset in (0, SHORT, 2**24, 2**32, 160 * 2**28, 2**40, 2**56, 2**62)],
        "keys, steps and offsets": [(1, 2, SHORT), (2, 1, SHORT), (1, SHORT, 2), (SHORT, 1, 2), (2, 2, 0), (0, 1, 1)],
    }
    for name, places in streams.items():
        drawn = np.stack([source.draw(SHORT, *place).double().cpu().numpy() for place in places])
        yield _Result(f"largest correlation between {name}", *statistics.largest_correlation(drawn))


def _residues(source: NoiseSource, draws: int, progress: Callable[[str], None]) -> Iterator[_Result]:
    """What is released lies on the grid, and its lowest bits are uniform whatever the sum was."""
    assert source.add is not None
    counts = np.zeros((len(CANARIES), RESIDUES), dtype=np.int64)
    off_grid = 0
    for i, canary in enumerate(CANARIES):
        progress(f"residues with a sum of {canary:.3g}")
        for start in range(0, draws // len(CANARIES), CHUNK):
            total = torch.full((min(CHUNK, draws // len(CANARIES) - start),), canary)
            released = source.add(total, i, start // CHUNK).double().cpu() / source.grid
            whole = torch.round(released)
            off_grid += int((whole != released).sum())
            counts[i] += np.bincount(torch.remainder(whole, RESIDUES).long().numpy(), minlength=RESIDUES)
    yield _Result("values off the grid", float(off_grid), 0.0, 1.0 if off_grid == 0 else 0.0)
    for canary, here in zip(CANARIES, counts):
        wanted = np.full(RESIDUES, here.sum() / RESIDUES)
        name = f"chi-square of {RESIDUES} residues, sum {canary:.3g}"
        yield _Result(name, *statistics.chi_square(here, wanted, RESIDUES - 1))
    seen = counts[:, counts.sum(0) > 0]
    wanted = np.outer(seen.sum(1), seen.sum(0) / seen.sum())
    freedom = (len(CANARIES) - 1) * (seen.shape[1] - 1)
    yield _Result("chi-square of residues between sums", *statistics.chi_square(seen, wanted, freedom))
