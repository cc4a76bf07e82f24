# SPDX-License-Identifier: Apache-2.0
"""The statistics of :mod:`wavedp.privacy.noise_law`: each gives what was measured, what is expected, and a p-value."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

Measured = tuple[float, float, float]  # what was measured, what right noise gives, p-value

EDGE, BINS = 8.0, 1 << 18  # of the histogram: no bin holds more than 2.5e-5 of the law


def both_sides(z: float) -> float:
    """The chance that a standard normal is at least ``|z|`` from 0."""
    return math.erfc(abs(z) / math.sqrt(2.0))


def upper_gamma(a: float, x: float) -> float:
    """Regularised upper incomplete gamma function: of ``k / 2``, ``x / 2`` the tail of chi-square with k degrees."""
    if x <= 0.0:
        return 1.0
    return float(torch.special.gammaincc(torch.tensor(a, dtype=torch.float64), torch.tensor(x, dtype=torch.float64)))


def poisson(count: int, mean: float) -> float:
    """Two-sided p-value of a count."""
    below = upper_gamma(count + 1.0, mean)  # P(N <= count)
    above = 1.0 if count == 0 else lower_gamma(float(count), mean)  # P(N >= count)
    return min(1.0, 2.0 * min(below, above))


def lower_gamma(a: float, x: float) -> float:
    return float(torch.special.gammainc(torch.tensor(a, dtype=torch.float64), torch.tensor(x, dtype=torch.float64)))


def chi_square(counts: np.ndarray, wanted: np.ndarray, freedom: int) -> Measured:
    chi = float(((counts - wanted) ** 2 / wanted).sum())
    return chi, float(freedom), upper_gamma(freedom / 2, chi / 2) if freedom else 1.0


def correlation(product: float, count: int) -> Measured:
    """Of a sum of ``count`` products of independent numbers of mean 0 and variance 1."""
    return product / count, 0.0, both_sides(product / math.sqrt(count))


class Distribution:
    """Moments, distribution function and tail counts of standard normals."""

    def __init__(self, tails: Sequence[float]) -> None:
        self.count, self.sum, self.squares = 0, 0.0, 0.0
        self.histogram = np.zeros(BINS, dtype=np.int64)  # those beyond the edges are in the outermost bins
        self.tails = dict.fromkeys(tails, 0)

    def add(self, x: Tensor) -> None:
        self.count += x.numel()
        self.sum += x.sum().item()
        self.squares += torch.dot(x, x).item()
        place = ((x + EDGE) * (BINS / (2 * EDGE))).clamp_(0, BINS - 1).long()  # NaN falls into the first bin
        self.histogram += torch.bincount(place, minlength=BINS).numpy()
        size = x.abs()
        for tail in self.tails:
            self.tails[tail] += int((size > tail).sum())

    def results(self, grid: float) -> Iterator[tuple[str, float, float, float]]:
        """``grid`` is what the numbers are rounded to: it adds grid^2 / 12 to the variance."""
        n = self.count
        mean = self.sum / n
        yield "mean", mean, 0.0, both_sides(mean * math.sqrt(n))
        scaled = self.squares / (1.0 + grid * grid / 12)
        below, above = lower_gamma(n / 2, scaled / 2), upper_gamma(n / 2, scaled / 2)
        yield "variance", self.squares / n, 1.0, min(1.0, 2 * min(below, above))
        edges = np.linspace(-EDGE, EDGE, BINS + 1)[1:-1]
        wanted = 0.5 * torch.erfc(torch.from_numpy(edges) / -math.sqrt(2.0)).numpy()
        shifted = 0.0 if grid == 0.0 else grid / math.sqrt(8 * math.pi)  # half a grid step times the density
        distance = max(0.0, float(np.abs(np.cumsum(self.histogram)[:-1] / n - wanted).max()) - shifted)
        # Massart's constant: P(sup |F_n - F| > d) <= 2 exp(-2 n d^2) for every n.
        yield "Kolmogorov-Smirnov distance", distance, 0.0, min(1.0, 2 * math.exp(-2 * n * distance**2))
        for tail, count in self.tails.items():
            expected = n * math.erfc(tail / math.sqrt(2.0))
            yield f"draws beyond {tail:g} sigma", float(count), expected, poisson(count, expected)


class TailResolution:
    """Whether the radii of pairs lie on a lattice of few bits, where the tail's cut and its gaps are.

    Box and Muller's radius is ``sqrt(-2 ln u)``. If u has ``bits`` bits, ``u 2^bits`` of the pairs far out is a whole
    number, or a whole number and a half, though the cut itself is too rare to be seen: 24 bits end the tail at 5.8
    sigma, 32 at 6.7. From pairs of independent normals u comes back uniform, so that the fraction of ``u 2^bits`` is
    too. The test is Rayleigh's, on those fractions as angles.
    """

    def __init__(self, lag: int, bits: int) -> None:
        self.lag, self.bits = lag, bits
        self.radius = 4.0 if bits <= 24 else 5.0  # so far out that float32 shows the fraction
        self.count, self.real, self.imaginary = 0, 0.0, 0.0

    def add(self, x: Tensor) -> None:
        whole = x.numel() // (2 * self.lag) * 2 * self.lag
        first, second = x[:whole].view(-1, 2, self.lag).unbind(1)
        square = first * first + second * second
        far = square[square > self.radius**2]
        angle = torch.exp(far / -2.0) * (2.0**self.bits * 2.0 * math.pi)
        self.count += angle.numel()
        self.real += torch.cos(angle).sum().item()
        self.imaginary += torch.sin(angle).sum().item()

    def result(self) -> Measured:
        """The length of the mean angle; ``exp(-n R^2)`` bounds its law but for terms of 1 / n."""
        if self.count < 2:
            return 0.0, 0.0, 1.0
        length = math.hypot(self.real, self.imaginary)
        return length / self.count, 0.0, math.exp(-(length**2) / self.count)


def largest_autocorrelation(x: Tensor) -> Measured:
    """Over all lags up to half of the row, by a Fourier transform padded with zeros."""
    n = x.numel()
    spectrum = torch.fft.rfft(x, n=2 * n)
    sums = torch.fft.irfft(spectrum.abs().square(), n=2 * n)[1 : n // 2 + 1]
    z = sums / torch.sqrt(torch.arange(n - 1, n - n // 2 - 1, -1, dtype=torch.float64))
    largest = float(z.abs().max())
    return largest, math.sqrt(2 * math.log(n)), min(1.0, (n // 2) * both_sides(largest))


def largest_correlation(rows: np.ndarray) -> Measured:
    """Between any two rows [R, n]; the expected size is that of the largest of as many normals, about."""
    products = rows @ rows.T / math.sqrt(rows.shape[1])
    above = np.abs(products[np.triu_indices(len(rows), 1)])
    largest = float(above.max())
    return largest, math.sqrt(2 * math.log(2 * len(above))), min(1.0, len(above) * both_sides(largest))


def equal_values(x: Tensor, dtype: torch.dtype, grid: float) -> Measured:
    """Pairs of equal values: as many as the resolution of the number format, or of the grid, brings, and no more."""
    _, counts = torch.unique(x, return_counts=True)
    pairs = int((counts * (counts - 1) // 2).sum())
    expected = x.numel() ** 2 / 2 * collision_chance(torch.finfo(dtype).eps, grid)
    return float(pairs), expected, 1.0 if pairs == 0 else lower_gamma(float(pairs), expected)


def collision_chance(eps: float, grid: float) -> float:
    """That two standard normals, rounded to floating point of spacing ``eps`` at 1, or to ``grid``, are equal."""
    chance = 0.0
    for exponent in range(-40, 4):  # |x| in [2^e, 2^(e+1)): the spacing there times the integral of the density squared
        low, high = 2.0**exponent, 2.0 ** (exponent + 1)
        mass = (math.erf(high) - math.erf(low)) / (2 * math.sqrt(math.pi))
        chance += max(eps * low, grid) * mass
    return chance
