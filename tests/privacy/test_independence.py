# SPDX-License-Identifier: Apache-2.0
"""The dummy-data check finds couplings that leave no trace in the gradient's path."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from wavedp.privacy import check_records_independent


def per_record(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum(1) / mask.sum(1)


def token_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Every record is divided by the tokens of the whole batch: no gradient flows between records."""
    return (x * mask).sum(1) / mask.sum()


def centred(x: Tensor, mask: Tensor) -> Tensor:
    return per_record((x - x.mean(0)).square(), mask)


def negatives(x: Tensor, mask: Tensor) -> Tensor:
    """Every record is pushed off the others, which are detached."""
    return per_record(x, mask) + (x @ x.detach().mT).logsumexp(1)


BATCH = (torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.ones(4, 6).tril(1))


def test_independent_records_pass() -> None:
    check_records_independent(per_record, *BATCH)


@pytest.mark.parametrize("loss_fn", [token_mean, centred, negatives])
def test_coupled_records_are_found(loss_fn: Callable[..., Tensor]) -> None:
    with pytest.raises(RuntimeError, match="with the batch it is in"):
        check_records_independent(loss_fn, *BATCH)


def test_not_a_number_is_not_a_pass() -> None:
    with pytest.raises(RuntimeError, match="with the batch it is in"):
        check_records_independent(lambda x: x.sum(1) * float("nan"), BATCH[0])


@pytest.mark.parametrize("batch", [(), (torch.zeros(1, 2),)], ids=["none", "one"])
def test_needs_two_records(batch: tuple[Tensor, ...]) -> None:
    with pytest.raises(ValueError, match="two records"):
        check_records_independent(per_record, *batch)


def test_needs_per_record_losses() -> None:
    with pytest.raises(ValueError, match="one loss per record"):
        check_records_independent(lambda x: x.mean()[None], BATCH[0])
