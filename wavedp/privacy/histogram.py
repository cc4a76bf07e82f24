# SPDX-License-Identifier: Apache-2.0
"""How many private records each class has, released once, with noise that is charged."""

import math
import os
from pathlib import Path

import torch
from torch import Tensor

from wavedp.errors import InvalidTypeError, InvalidValueError
from wavedp.functional import noisy_mean
from wavedp.privacy.entropy import Entropy
from wavedp.privacy.ledger import PrivacyLedger
from wavedp.privacy.spec import LABEL_HISTOGRAM, PrivacySpec
from wavedp.privacy.strict import MOST_CLASSES
from wavedp.privacy.validation import check_integer
from wavedp.storage import read_json, write_json

HISTOGRAM_FILE = "label_histogram.json"


def release_label_histogram(
    labels: Tensor,  # [n] int64, one for each record
    num_classes: int,
    spec: PrivacySpec,
    *,
    ledger: PrivacyLedger | None = None,
    path: str | os.PathLike[str] | None = None,
    insecure_seed: int | None = None,
) -> Tensor:  # [num_classes] float64
    """Return the noised number of records of each class, and save it.

    Gaussian noise of deviation ``spec.label_noise_multiplier`` on every count, rounded to a public grid: one record
    more or less moves one count by 1. It is one phase of ``spec``, charged in ``ledger`` before anything is drawn.
    What it returns is public: anything may be computed from it.

    Args:
        labels: the private records' classes, in ``[0, num_classes)``.
        num_classes: a public constant.
        spec: has a ``label_noise_multiplier``.
        ledger: that of the run, so that a restart does not release a second histogram.
        path: JSON file to write the counts into, durably.
        insecure_seed: for debugging: reproducible noise, which is not private. Not with a ledger, whose run could not
            tell it from a release that is.

    Raises:
        TypeError: ``labels`` is not an int64 tensor.
        ValueError: the specification has no histogram, ``labels`` does not fit it or the classes, or there are a seed
            and a ledger.
        RuntimeError: the ledger has charged a histogram before; its message says where that one is.
        LedgerError: the ledger is of another specification, closed, or could not be written.
    """
    if spec.label_noise_multiplier is None:
        raise InvalidValueError("the specification charges no label histogram: give it a label_noise_multiplier")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise InvalidTypeError(f"labels must be an int64 tensor, got {getattr(labels, 'dtype', type(labels).__name__)}")
    num_classes = check_integer("num_classes", num_classes, at_least=1)
    if spec.noise_mode == "strict" and num_classes > MOST_CLASSES:
        raise InvalidValueError(f"strict noise is charged for at most {MOST_CLASSES} classes, got {num_classes}")
    if labels.ndim != 1 or labels.numel() > spec.dataset_size_bound:
        raise InvalidValueError(f"labels must be [n] with n at most dataset_size_bound={spec.dataset_size_bound}")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise InvalidValueError(f"labels must be in [0, {num_classes}): the list of classes is public and fixed before")
    if ledger is not None:
        if insecure_seed is not None:
            raise InvalidValueError(
                "insecure_seed makes noise that is not private: leave out the ledger, which charges private releases"
            )
        ledger.check_spec(spec)
        ledger.release(LABEL_HISTOGRAM, "" if path is None else os.path.abspath(path))
    std = spec.label_noise_multiplier
    counts = torch.bincount(labels.cpu(), minlength=num_classes).double()
    with Entropy(insecure_seed, LABEL_HISTOGRAM).key() as key:
        noised = noisy_mean(counts, std, grid=spec.label_grid, key=key, mode=spec.noise_mode)
    if path is not None:
        save_label_histogram(noised, std, path)
    return noised


def save_label_histogram(counts: Tensor, noise_multiplier: float, path: str | os.PathLike[str]) -> None:
    """Write noised counts as JSON, whole or not at all."""
    write_json(Path(path), {"noised_counts": counts.tolist(), "noise_multiplier": noise_multiplier})


def load_label_histogram(path: str | os.PathLike[str]) -> Tensor:  # [num_classes] float64
    """Read the noised counts of :func:`release_label_histogram`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is damaged.
    """
    content = read_json(Path(path))
    counts = content.get("noised_counts") if isinstance(content, dict) else None
    numbers = isinstance(counts, list) and all(
        isinstance(count, int | float) and not isinstance(count, bool) and math.isfinite(count) for count in counts
    )
    if not numbers or not counts:
        raise InvalidValueError(f"{path} holds no label histogram; it was damaged or is not a wavedp file")
    return torch.tensor(counts, dtype=torch.float64)


def label_probabilities(counts: Tensor) -> Tensor:  # [num_classes] float64 of sum 1
    """Make probabilities of noised counts: those below 0 count as 0; if nothing is left, all classes are alike.

    Post-processing, which costs nothing.
    """
    if not isinstance(counts, Tensor) or counts.ndim != 1 or counts.is_complex():
        raise InvalidTypeError("counts must be a tensor [num_classes], as release_label_histogram returns it")
    if not len(counts) or not bool(counts.isfinite().all()):
        raise InvalidValueError("counts must be finite, and of at least one class")
    positive = counts.double().clamp(min=0.0)
    total = positive.sum()
    return positive / total if total > 0 else torch.full_like(positive, 1.0 / len(positive))
