# SPDX-License-Identifier: Apache-2.0
"""Distances against closed forms, against scipy, and on points placed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from wavedp.evaluation import density_coverage, frechet_distance, gaussian_statistics, nearest, precision_recall


def covariance(d: int, rank: int, seed: int) -> torch.Tensor:
    root = torch.randn(d, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T / rank


def line(*places: float) -> torch.Tensor:
    """Points on a line, as features [N, 2]."""
    return torch.tensor([[place, 0.0] for place in places])


def test_the_frechet_distance_of_diagonal_gaussians_is_the_closed_form() -> None:
    m1, m2 = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 1.0, 0.5])
    s1, s2 = torch.tensor([4.0, 1.0, 0.0]), torch.tensor([1.0, 9.0, 0.25])
    # |m1 - m2|^2 + sum (sigma1 - sigma2)^2 = 10 + 1 + 4 + 0.25
    assert frechet_distance(m1, s1.diag(), m2, s2.diag()) == pytest.approx(15.25, abs=1e-12)


@pytest.mark.parametrize(("rank1", "rank2"), [(40, 40), (5, 12), (3, 40)])
def test_the_frechet_distance_is_that_of_scipy(rank1: int, rank2: int) -> None:
    d = 12
    m1, m2 = torch.randn(2, d, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    s1, s2 = covariance(d, rank1, 1), covariance(d, rank2, 2)
    root = np.real(scipy.linalg.sqrtm(s1.numpy() @ s2.numpy()))
    expected = float((m1 - m2).square().sum() + s1.trace() + s2.trace()) - 2 * np.trace(root)
    assert frechet_distance(m1, s1, m2, s2) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(m2, s2, m1, s1) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(m1, s1, m1, s1) == pytest.approx(0, abs=1e-10)


def test_the_distance_of_two_samples_is_near_that_of_their_gaussians() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(20_000, 3, generator=generator) for _ in range(2))
    moved = gaussian_statistics(2 * y + 1)
    assert torch.allclose(moved[1], 4 * torch.eye(3, dtype=torch.float64), atol=0.15)
    # 3 x 1 for the means, 3 x (2 - 1)^2 for the spreads
    assert frechet_distance(*gaussian_statistics(x), *moved) == pytest.approx(6, abs=0.15)


def test_precision_and_recall_on_a_line() -> None:
    real = line(0, 1, 2, 10)  # distance to the second neighbour: 2, 1, 2, 9
    synthetic = line(-1.5, 2.5, 4.5, 30)  # to the second neighbour: 6, 4, 6, 27.5
    # -1.5 lies in the ball of 0, 2.5 in that of 2, 4.5 in that of 10; 30 in none
    found = precision_recall(real, synthetic, k=2)
    assert found.precision == 0.75
    assert found.recall == 1.0
    assert precision_recall(synthetic, real, k=2) == (1.0, 0.75)
    assert precision_recall(real, line(100, 101, 102), k=2) == (0.0, 0.0)
    assert precision_recall(real, real, k=1) == (1.0, 1.0)


def test_density_and_coverage_on_a_line() -> None:
    real = line(0, 1, 2, 10)  # radii for k = 2: 2, 1, 2, 9
    synthetic = line(0.5, 0.6, 40)
    # 0.5 and 0.6 lie in the balls of 0, 1 and 2, and not in that of 10, which begins at 1; 40 in none
    found = density_coverage(real, synthetic, k=2)
    assert found.density == pytest.approx(6 / (2 * 3))
    assert found.coverage == 0.75
    assert density_coverage(real, line(50, 60, 70), k=2) == (0.0, 0.0)


def test_a_dropped_mode_lowers_recall_and_coverage_and_an_invented_one_precision() -> None:
    generator = torch.Generator().manual_seed(1)
    both = torch.cat([torch.randn(600, 4, generator=generator), torch.randn(600, 4, generator=generator) + 20])
    one = torch.randn(1300, 4, generator=generator)  # more rows than a block of distances has
    dropped = precision_recall(both, one)
    assert dropped.precision > 0.9
    assert 0.4 < dropped.recall < 0.55
    assert 0.4 < density_coverage(both, one).coverage <= 0.5
    invented = precision_recall(one, both)
    assert 0.4 < invented.precision < 0.55
    assert invented.recall > 0.9
    assert density_coverage(one, both).density < 0.6


def test_the_nearest_are_found_in_order() -> None:
    distances, indices = nearest(line(0.9, 7), line(0, 1, 5, 10), k=2)
    assert indices.tolist() == [[1, 0], [2, 3]]
    assert torch.allclose(distances, torch.tensor([[0.1, 0.9], [2, 3]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: precision_recall(line(0, 1), line(0, 1, 2, 3)), "real must be .* N >= 4"),
        (lambda: precision_recall(line(0, 1), line(0, 1), k=0), "k must be >= 1"),
        (lambda: density_coverage(torch.zeros(9, 2), torch.zeros(9, 3)), "real features have 2 columns"),
        (lambda: density_coverage(torch.full((9, 2), torch.nan), torch.zeros(9, 2)), "not finite"),
        (lambda: gaussian_statistics(torch.zeros(1, 2)), "N >= 2"),
        (lambda: frechet_distance(torch.zeros(2), torch.eye(2), torch.zeros(3), torch.eye(3)), "second Gaussian"),
        (lambda: nearest(line(0), line(0), k=2), "N >= 2"),
    ],
)
def test_what_does_not_fit_is_named(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()
