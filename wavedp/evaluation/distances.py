# SPDX-License-Identifier: Apache-2.0
"""How far apart two sets of feature vectors are: Frechet distance, precision and recall, density and coverage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from wavedp.errors import InvalidValueError

_ROWS = 1024  # of a block of distances


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]: of synthetic points near a real one, and of real points near a synthetic one."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Density (>= 0, about 1 for equal sets) and the share of real points with a synthetic one near."""

    density: float
    coverage: float


def gaussian_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``[D]`` and covariance ``[D, D]`` (divisor N - 1) of features ``[N, D]``, float64.

    Raises:
        ValueError: unless N >= 2 and all are finite.
    """
    points = _points("features", features, at_least=2)
    return points.mean(dim=0), torch.cov(points.T).reshape(points.shape[1], points.shape[1])


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1^(1/2) S2 S1^(1/2))^(1/2)) of two Gaussians [Dowson and Landau 1982].

    That is the squared 2-Wasserstein distance; with Inception's features it is what is called FID
    [Heusel et al. 2017, arXiv 1706.08500]. Computed in float64.

    Args:
        mean1, mean2: ``[D]``.
        covariance1, covariance2: ``[D, D]``, symmetric and positive semi-definite.

    Raises:
        ValueError: for shapes that do not fit.
    """
    d = mean1.numel()
    for name, mean, covariance in (("first", mean1, covariance1), ("second", mean2, covariance2)):
        if mean.shape != (d,) or covariance.shape != (d, d):
            raise InvalidValueError(
                f"the {name} Gaussian needs a mean [{d}] and a covariance [{d}, {d}], got {list(mean.shape)} and "
                f"{list(covariance.shape)}"
            )
    s1, s2 = covariance1.double(), covariance2.double()
    values, vectors = torch.linalg.eigh(s1)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s2 @ root).clamp_min(0).sqrt().sum()
    distance = (mean1.double() - mean2.double()).square().sum() + s1.trace() + s2.trace() - 2 * cross
    return max(0.0, float(distance))


def precision_recall(real: Tensor, synthetic: Tensor, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall [Kynkaanniemi et al. 2019, arXiv 1904.06991].

    A point is near a set when it lies in the ball around one of the set's points whose radius is the distance to that
    point's k-th neighbour in the set.

    Args:
        real, synthetic: features ``[N, D]`` and ``[M, D]``; the estimate depends on N and M, so compare equal ones.
        k: neighbours; less than N and M.

    Raises:
        ValueError: for shapes or k that do not fit, or values that are not finite.
    """
    x, y = _pair(real, synthetic, k)
    return PrecisionRecall(_share_inside(y, x, _radii(x, k)), _share_inside(x, y, _radii(y, k)))


def density_coverage(real: Tensor, synthetic: Tensor, k: int = 5) -> DensityCoverage:
    """Density and coverage [Naeem et al. 2020, arXiv 2002.09797]: as precision and recall, by the real balls alone.

    Density is the number of real balls around a synthetic point, divided by k, on average; coverage the share of real
    balls with a synthetic point in them.

    Args:
        real, synthetic: features ``[N, D]`` and ``[M, D]``.
        k: neighbours; less than N.

    Raises:
        ValueError: as :func:`precision_recall`.
    """
    x, y = _pair(real, synthetic, k)
    radii = _radii(x, k)
    counts = torch.cat(
        [
            (distances <= radius[:, None]).sum(dim=1)
            for distances, radius in zip(_distances(x, y), radii.split(_ROWS), strict=True)
        ]
    )
    return DensityCoverage(float(counts.sum()) / (k * len(y)), float((counts > 0).double().mean()))


def nearest(points: Tensor, among: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """For each of ``points`` ``[M, D]`` its k nearest of ``among`` ``[N, D]``: distances and indices, ``[M, k]``.

    Raises:
        ValueError: as :func:`precision_recall`.
    """
    y, x = _points("points", points), _points("among", among, at_least=k)
    if k < 1 or y.shape[1] != x.shape[1]:
        raise InvalidValueError(f"k must be >= 1 and the widths equal, got {k}, {y.shape[1]} and {x.shape[1]}")
    found = [distances.topk(k, dim=1, largest=False) for distances in _distances(y, x)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def _distances(rows: Tensor, columns: Tensor) -> Iterator[Tensor]:
    """Euclidean distances in blocks of rows."""
    for block in rows.split(_ROWS):
        yield torch.cdist(block, columns)


def _radii(points: Tensor, k: int) -> Tensor:
    """Distance of each point to its k-th neighbour, itself not counted."""
    radii = []
    for start, distances in zip(range(0, len(points), _ROWS), _distances(points, points), strict=True):
        own = torch.arange(len(distances), device=points.device)
        distances[own, start + own] = torch.inf
        radii.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def _share_inside(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    inside = sum(int((distances <= radii).any(dim=1).sum()) for distances in _distances(points, centres))
    return inside / len(points)


def _pair(real: Tensor, synthetic: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if k < 1:
        raise InvalidValueError(f"k must be >= 1, got {k}")
    x, y = _points("real", real, at_least=k + 1), _points("synthetic", synthetic, at_least=k + 1)
    if x.shape[1] != y.shape[1]:
        raise InvalidValueError(f"real features have {x.shape[1]} columns, synthetic ones {y.shape[1]}")
    return x, y


def _points(name: str, features: Tensor, *, at_least: int = 1) -> Tensor:
    if features.dim() != 2 or len(features) < at_least or not features.is_floating_point():
        raise InvalidValueError(
            f"{name} must be floating-point [N, D] with N >= {at_least}, got {features.dtype} {list(features.shape)}"
        )
    if not bool(features.isfinite().all()):
        raise InvalidValueError(f"{name} has values that are not finite; look at the images or the network")
    return features.double()
