# SPDX-License-Identifier: Apache-2.0
"""What one private step takes and gives: the arguments of a run, checked, and clipped sums turned into noisy means."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from wavedp.errors import InvalidTypeError, InvalidValueError
from wavedp.functional import NoiseKey, noisy_mean
from wavedp.optim import PrivateStep
from wavedp.privacy.clipping import accumulation_dtype
from wavedp.privacy.ledger import PrivacyLedger
from wavedp.privacy.spec import PrivacySpec

JOINED_ENTRIES = 1 << 20
"""Up to as many entries of several parameters get their noise in one pass."""


def check_run(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    spec: PrivacySpec,
    ledger: PrivacyLedger | None,
    *,
    without_privacy: bool,
    loss_reduction: str | None,
) -> None:
    """Raise unless the arguments of a :class:`~wavedp.privacy.PrivateOptimizer` fit each other.

    Raises:
        TypeError, ValueError: an argument of a wrong type, or an optimizer that cannot be driven.
        LedgerError: the ledger was opened for another specification.
    """
    for name, value, kind in (
        ("model", model, nn.Module),
        ("optimizer", optimizer, torch.optim.Optimizer),
        ("spec", spec, PrivacySpec),
        ("ledger", ledger, PrivacyLedger | None),
    ):
        if not isinstance(value, kind):
            wanted = getattr(kind, "__name__", str(kind))
            raise InvalidTypeError(f"{name} must be of type {wanted}, got {type(value).__name__}")
    if spec.noise_multiplier == 0.0 and not without_privacy:
        raise InvalidValueError("noise_multiplier is 0, which is not private; pass without_privacy=True if it is meant")
    if ledger is not None:
        ledger.check_spec(spec)
    if loss_reduction not in (None, "mean", "sum"):
        raise InvalidValueError(f"loss_reduction must be 'mean', 'sum' or None, got {loss_reduction!r}")
    frozen = (not p.requires_grad for group in optimizer.param_groups for p in group["params"])
    if isinstance(optimizer, PrivateStep) and any(frozen):
        raise InvalidValueError(
            f"{type(optimizer).__name__} adds noise to all its parameters: leave frozen ones out of it"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise InvalidValueError("LBFGS evaluates the loss several times per step, each of which would be a release")
    if spec.trainable_parameters is not None:
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if count != spec.trainable_parameters:
            raise InvalidValueError(
                f"the specification charges the rounding of {spec.trainable_parameters} trainable parameters, the "
                f"model has {count}"
            )


def step_with_noise(
    optimizer: PrivateStep,
    parameters: Mapping[str, Tensor],
    sums: Mapping[str, Tensor],
    spec: PrivacySpec,
    std: float,
    key: NoiseKey,
) -> None:
    """Release by an optimizer that makes the noise while it steps."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    in_groups = (parameter for group in optimizer.param_groups for parameter in group["params"])
    optimizer.step(
        sums=[sums.get(names[id(parameter)]) for parameter in in_groups],
        std=std,
        denominator=spec.expected_batch_size,
        grid=spec.grid_of(std),
        key=key,
        noise_mode=spec.noise_mode,
    )


def write_noisy_means(
    parameters: Mapping[str, Tensor], sums: dict[str, Tensor], spec: PrivacySpec, std: float, key: NoiseKey
) -> None:
    """Give every parameter the private mean as its ``.grad``; sums that are missing are zero, and get noise too.

    Small parameters that follow one another get theirs in one pass. The noise is numbered through, so it is the same.
    """
    grid, offset = spec.grid_of(std), 0
    for run in _runs(parameters, sums):
        totals = []
        for name, parameter in run:
            total = sums.pop(name, None)
            if total is None:
                total = torch.zeros_like(parameter, dtype=accumulation_dtype(parameter.dtype))
            totals.append(total)
        joined = totals[0] if len(run) == 1 else torch.cat([total.flatten() for total in totals])
        mean = noisy_mean(
            joined,
            std,
            divisor=spec.expected_batch_size,
            key=key,
            offset=offset,
            out_dtype=run[0][1].dtype,
            grid=grid,
            mode=spec.noise_mode,
        )
        offset += joined.numel()
        parts = [mean] if len(run) == 1 else mean.split([parameter.numel() for _, parameter in run])
        for (_, parameter), part in zip(run, parts):
            parameter.grad = part.view(parameter.shape)


def _runs(parameters: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> list[list[tuple[str, Tensor]]]:
    """Parameters in their order, together up to :data:`JOINED_ENTRIES` where types and device are the same."""
    runs: list[list[tuple[str, Tensor]]] = []
    kind: object = None
    entries = 0
    for name, parameter in parameters.items():
        total = sums.get(name)
        wide = accumulation_dtype(parameter.dtype) if total is None else total.dtype
        if kind != (kind := (parameter.dtype, wide, parameter.device)) or entries + parameter.numel() > JOINED_ENTRIES:
            runs.append([])
            entries = 0
        runs[-1].append((name, parameter))
        entries += parameter.numel()
    return runs
