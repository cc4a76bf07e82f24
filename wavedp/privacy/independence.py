# SPDX-License-Identifier: Apache-2.0
"""A check to run on dummy data: does every record's loss depend on that record alone?"""

from collections.abc import Callable

import torch
from torch import Tensor

from wavedp.errors import InvalidValueError, StateError


def check_records_independent(
    loss_fn: Callable[..., Tensor],
    *batch: Tensor,  # each [B, ...]
    relative_tolerance: float = 1e-3,
) -> None:
    """Compare the losses of a batch with the losses of its records one at a time.

    It finds what the backward pass cannot see, a dependence through values only: a mean over the batch's
    tokens, a count or a maximum taken over the batch, detached in-batch negatives, attention of frozen layers
    over the record axis. Use public or made-up records, since the outcome depends on them, and switch dropout off.

    Args:
        loss_fn: maps tensors ``[b, ...]`` to per-record losses ``[b]``.
        batch: the arguments of ``loss_fn`` for B >= 2 unlike records.
        relative_tolerance: allowed difference relative to the largest loss; losses of unlike batch sizes
            differ by rounding.

    Raises:
        ValueError: fewer than two records, or ``loss_fn`` does not return ``[b]``.
        RuntimeError: a record's loss depends on the rest of its batch.
    """
    records = batch[0].shape[0] if batch else 0
    if records < 2:
        raise InvalidValueError("give at least two records")
    with torch.no_grad():
        together = loss_fn(*batch)
        alone = torch.cat([loss_fn(*(part[i : i + 1] for part in batch)) for i in range(records)])
    if together.shape != (records,) or alone.shape != (records,):
        raise InvalidValueError(f"loss_fn must return one loss per record, got shape {tuple(together.shape)}")
    worst = (together - alone).abs().max()
    if not worst <= relative_tolerance * together.abs().max():
        raise StateError(
            f"a record's loss changes by {worst.item():.3g} with the batch it is in: average over each "
            f"record's own tokens and remove batch statistics"
        )
