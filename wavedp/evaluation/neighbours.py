# SPDX-License-Identifier: Apache-2.0
"""The real training images that look most like given samples: for the data's owner, to see whether any was copied."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wavedp.data import to_unit_range
from wavedp.evaluation.distances import nearest
from wavedp.evaluation.fitting import LabelledImages
from wavedp.training.pictures import save_grid

TITLE = "NOT PRIVATE: samples and their nearest real training images"


@dataclass(frozen=True)
class Neighbours:
    """Samples and the real images nearest to them.

    Attributes:
        samples: positions of the samples, int64 ``[M]``.
        indices: positions of their neighbours in the real set, int64 ``[M, k]``, nearest first.
        distances: Euclidean, in feature space, ``[M, k]``.
    """

    samples: Tensor
    indices: Tensor
    distances: Tensor


def find_neighbours(
    real: Tensor, synthetic: Tensor, labels: Tensor, *, num_samples: int = 10, k: int = 5
) -> Neighbours:
    """The k nearest real images to samples taken in turn from the classes.

    Args:
        real, synthetic: features ``[N, D]`` and ``[M, D]``.
        labels: of the samples, int64 ``[M]``.

    Raises:
        ValueError: for fewer than k real images.
    """
    chosen = _in_turn(labels, num_samples)
    distances, indices = nearest(synthetic[chosen], real, k)
    return Neighbours(chosen, indices, distances)


def draw_neighbours(
    path: Path, found: Neighbours, real: Tensor, synthetic: LabelledImages, classes: Sequence[str]
) -> None:
    """Writes one row for each sample: itself, then its neighbours. The title says that it is not private, and only the
    file's owner may read it."""
    rows = [
        (
            f"{classes[int(synthetic.labels[sample])]}, distance {float(distances[0]):.2f}",
            to_unit_range(torch.cat([synthetic.images[sample][None], real[indices]])),
        )
        for sample, indices, distances in zip(found.samples, found.indices, found.distances, strict=True)
    ]
    labels = ["sample", *(f"real {i + 1}" for i in range(found.indices.shape[1]))]
    save_grid(path, rows, title=TITLE, column_labels=labels)
    os.chmod(path, 0o600)


def copying(real: Tensor, held_out: Tensor, synthetic: Tensor, *, num_samples: int = 1000) -> dict[str, Any]:
    """Median distances to the nearest real training image: of samples, and of real images that took no part.

    Samples that lie much nearer than the held-out images do hint at copies.

    Args:
        real, held_out, synthetic: features ``[N, D]``; at most ``num_samples`` of the last two are used.
    """
    medians = {
        name: float(nearest(points[:num_samples], real)[0].median())
        for name, points in (("samples", synthetic), ("held_out_real", held_out))
    }
    return {"median_distance_to_nearest_real": medians, "num_samples": num_samples, "private": False}


def _in_turn(labels: Tensor, number: int) -> Tensor:
    """Positions of the first image of each class, then of the second of each, and so on."""
    order = torch.argsort(labels, stable=True)
    counts = torch.bincount(labels)
    starts = counts.cumsum(0) - counts
    place = torch.arange(len(labels)) - starts[labels[order]]  # rank of each image within its class
    return order[torch.argsort(place * len(counts) + labels[order])][:number]
