# SPDX-License-Identifier: Apache-2.0
"""Private training around any torch optimizer: clip and add up, then noise, divide and step.

One logical (Poisson) batch is zero or more calls of :meth:`PrivateOptimizer.backward`, one per physical
micro-batch, followed by one :meth:`PrivateOptimizer.step`, which is the only release.
"""

import os
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from wavedp.privacy import accounting
from wavedp.privacy.bookkeeping import GradientBook
from wavedp.privacy.clipping import accumulation_dtype
from wavedp.privacy.entropy import Entropy
from wavedp.privacy.ledger import LedgerError, PrivacyLedger
from wavedp.privacy.noise import gaussian_noise, grid_step, round_to_grid
from wavedp.privacy.spec import PrivacySpec
from wavedp.privacy.validation import check_integer


class PrivateOptimizer:
    """Drives ``optimizer`` with the noisy mean of clipped per-record gradients.

    ::

        for indices in PoissonSampler.for_spec(spec, len(records)):
            for chunk in physical_batches(indices, 64):
                private.backward(loss_fn(model, chunk))  # [b], one loss per record
            private.step()

    Formal guarantee: if every batch is a Poisson sample at ``spec.sample_rate``, every record appears at
    most once per logical batch, and each loss depends on its own record alone, then the parameters after
    every step, taken together, are (``spec.epsilon()``, ``spec.delta``)-differentially private under adding
    or removing one record, up to the floating-point caveat of ``docs/privacy.md``. Anything else that is
    computed from the records, losses and gradient norms included, is not covered.

    Args:
        model: see :class:`~wavedp.privacy.GradientBook` for what may be in it; attached until :meth:`close`.
        optimizer: any optimizer whose ``step`` needs no closure, over exactly the trainable parameters of
            ``model``. Its own ``step`` raises from now on.
        spec: the mechanism.
        ledger: charges steps on disk before they start; without it a restarted run is not charged for
            what it did before.
        reserve_steps: steps reserved in the ledger at a time; a crash charges at most this many too many.
        insecure_seed: for debugging: reproducible noise, and no privacy statement.
        without_privacy: must be set if ``spec.noise_multiplier`` is 0; no privacy statement is issued then.

    Raises:
        ValueError: the model cannot be booked, or the optimizer's parameters are not the trainable ones.
        LedgerError: the ledger was opened for another specification.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        spec: PrivacySpec,
        *,
        ledger: PrivacyLedger | None = None,
        reserve_steps: int = 10,
        insecure_seed: int | None = None,
        without_privacy: bool = False,
    ) -> None:
        if spec.noise_multiplier == 0.0 and not without_privacy:
            raise ValueError("noise_multiplier is 0, which is not private; pass without_privacy=True if it is meant")
        if ledger is not None and ledger.spec != spec:
            raise LedgerError(f"{ledger.path} was opened for another specification than the optimizer's")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("LBFGS evaluates the loss several times per step, each of which would be a release")
        self.spec = spec
        self.optimizer = optimizer
        self.ledger = ledger
        self._reserve_steps = check_integer("reserve_steps", reserve_steps, at_least=1)
        self._entropy = Entropy(insecure_seed, "noise")
        self._process = os.getpid()
        self._charged = 0 if ledger is None else ledger.charged
        self._reserved = 0
        self._started = 0
        self._sums: dict[str, Tensor] = {}
        self._records: set[int] = set()
        self._in_step = False
        self._releasing = False
        self._book = GradientBook(model)
        try:
            self._check_groups()
        except BaseException:
            self._book.detach()
            raise
        self._guard = optimizer.register_step_pre_hook(self._refuse_direct_step)

    def __enter__(self) -> "PrivateOptimizer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a PrivateOptimizer cannot be copied or pickled: both would spend the same reserved steps")

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups; learning rates may be changed, parameters may not."""
        return self.optimizer.param_groups

    @property
    def steps_charged(self) -> int:
        """Attempts charged so far: steps that were started, and the rest of a block reserved in a ledger."""
        return self._charged if self.ledger is None else self.ledger.charged

    @property
    def steps_started(self) -> int:
        """Logical batches begun by this object."""
        return self._started

    @property
    def steps_left(self) -> int:
        """Steps that may still be started."""
        return self.spec.steps - self._charged if self.ledger is None else self.ledger.remaining + self._reserved

    @property
    def insecure(self) -> bool:
        """Whether the noise can be reproduced from a seed."""
        return self._entropy.insecure

    @property
    def pending(self) -> bool:
        """Whether a logical batch was begun and neither stepped nor discarded."""
        return self._in_step

    def backward(
        self,
        losses: Tensor,  # [b], one loss per record of this micro-batch
        records: Tensor | None = None,  # [b] int, the records' indices
    ) -> None:
        """Run the backward of one micro-batch, clip every record's gradient, and add the sum to the batch's.

        With ``records``, a record that comes twice in one logical batch raises: it would contribute 2 C. The
        first call of a logical batch charges the step.

        Raises:
            ValueError: ``losses`` is not ``[b]`` with a graph, or ``records`` does not fit it.
            RuntimeError: the budget is exhausted, or see :meth:`GradientBook.clipped_sums`; nothing is added.
        """
        self._check_open()
        indices = self._checked_records(losses, records)
        self._begin_step()
        sums = self._book.clipped_sums(losses, self.spec.clipping)
        self._records |= indices
        for name, part in sums.items():
            if name in self._sums:
                self._sums[name] += part
            else:
                self._sums[name] = part

    def step(self, closure: object = None) -> None:
        """Release the batch: add noise to every sum, round, divide by the expected batch size, and step.

        An empty batch (no call of :meth:`backward`) takes the same path with a sum of zero.

        Raises:
            RuntimeError: a closure was given, the budget is exhausted (nothing is released then), or the
                parameters changed.
        """
        self._check_open()
        if closure is not None:
            raise RuntimeError("step() takes no closure: it would recompute gradients without clipping and noise")
        self._check_groups()
        self._begin_step()
        try:
            self._release()
        finally:
            self._end_step()

    def discard(self) -> None:
        """Drop the batch that was begun, without a release; its step stays charged."""
        self._end_step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing between logical batches, where nothing is held.

        Raises:
            RuntimeError: sums are pending; :meth:`step` releases them and :meth:`discard` drops them.
        """
        if self._in_step:
            raise RuntimeError("a batch is pending: call step() to release it, or discard() to drop it")

    def privacy_spent(self) -> dict[str, float | int | None]:
        """Return what is charged so far and what the whole run costs.

        ``epsilon`` is the bound for all planned steps, which holds whenever and however the run stops;
        ``epsilon_charged`` is that of the charged steps alone, which holds if the decision to stop did not
        depend on the private data. Both are ``None`` where noise is reproducible or absent.
        """
        private = not self.insecure and self.spec.noise_multiplier > 0.0
        return {
            "steps_charged": self.steps_charged,
            "steps_planned": self.spec.steps,
            "delta": self.spec.delta,
            "epsilon": self.spec.epsilon() if private else None,
            "epsilon_charged": self._epsilon_charged() if private else None,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state and the steps charged; never sums, noise or sampling state."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "spec": self.spec.to_dict(),
            "steps_charged": self.steps_charged,
            "ledger_head": None if self.ledger is None else self.ledger.head,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; steps charged since then stay charged.

        Raises:
            RuntimeError: a batch is pending, the specification differs, or the ledger does not contain the
                checkpoint's history.
        """
        self.zero_grad()
        if PrivacySpec.from_dict(state["spec"]) != self.spec:
            raise RuntimeError("the checkpoint was made under another PrivacySpec; resume with the same one")
        if self.ledger is not None:
            head = state["ledger_head"]
            if head is None or not self.ledger.contains(head):
                raise LedgerError(
                    f"the checkpoint's spending is not in {self.ledger.path}: this ledger is older than the "
                    f"checkpoint or belongs to another run"
                )
        elif state["ledger_head"] is not None:
            raise RuntimeError("the checkpoint was made with a privacy ledger; open it and pass it as ledger=")
        self._charged = max(self._charged, int(state["steps_charged"]))
        self.optimizer.load_state_dict(dict(state["optimizer"]))

    def close(self) -> None:
        """Drop what is pending and give model and optimizer back unchanged; the ledger stays open."""
        self._end_step()
        self._book.detach()
        self._guard.remove()

    def _begin_step(self) -> None:
        """Charge one step, durably, before anything of it happens; once per logical batch."""
        if self._in_step:
            return
        if os.getpid() != self._process:
            raise RuntimeError("this PrivateOptimizer belongs to another process; build it after forking")
        if self.steps_left < 1:
            raise RuntimeError(
                f"privacy budget exhausted: all {self.spec.steps} steps of the specification are charged"
            )
        if self.ledger is not None and self._reserved == 0:
            block = min(self._reserve_steps, self.ledger.remaining)
            self.ledger.reserve(block)
            self._reserved = block
        self._reserved = max(self._reserved - 1, 0)
        self._charged += 1
        self._started += 1
        self._in_step = True

    def _end_step(self) -> None:
        self._sums.clear()
        self._records.clear()
        self._in_step = False

    def _release(self) -> None:
        std = self.spec.noise_stddev
        try:
            for name, parameter in self._book.parameters.items():
                parameter.grad = self._noisy_mean(parameter, self._sums.pop(name, None), std)
            self._releasing = True
            self.optimizer.step()
        finally:
            self._releasing = False
            for parameter in self._book.parameters.values():
                parameter.grad = None

    def _noisy_mean(self, parameter: nn.Parameter, total: Tensor | None, std: float) -> Tensor:
        if total is None:
            total = torch.zeros_like(parameter, dtype=accumulation_dtype(parameter.dtype))
        noisy = total.double()
        if std > 0.0:
            noise = gaussian_noise(
                parameter.shape, std, dtype=torch.float64, device=parameter.device, entropy=self._entropy
            )
            noisy = round_to_grid(noisy + noise, grid_step(std))
        return (noisy / self.spec.expected_batch_size).to(parameter.dtype)

    def _checked_records(self, losses: Tensor, records: Tensor | None) -> set[int]:
        if records is None:
            return set()
        indices = set(records.tolist())
        if records.shape != losses.shape:
            raise ValueError(f"records has shape {tuple(records.shape)}, losses {tuple(losses.shape)}")
        if len(indices) != records.numel() or indices & self._records:
            raise ValueError("a record comes twice in one logical batch and would contribute twice the bound")
        return indices

    def _check_groups(self) -> None:
        grouped = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        trainable = {id(parameter): name for name, parameter in self._book.parameters.items()}
        missing = sorted(set(trainable.values()) - {trainable.get(id(p), "") for p in grouped})
        if missing:
            raise ValueError(f"trainable parameters {missing} are in no optimizer group; add or freeze them")
        foreign = sum(id(p) not in trainable for p in grouped)
        if foreign or len(grouped) != len(trainable):
            raise ValueError(
                f"the optimizer holds {foreign} trainable tensors that are not parameters of the model, or "
                f"holds one twice; every trainable parameter belongs to exactly one group"
            )

    def _refuse_direct_step(self, optimizer: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._releasing:
            raise RuntimeError("the wrapped optimizer must not be stepped directly; call PrivateOptimizer.step()")

    def _check_open(self) -> None:
        if not self._book.attached:
            raise RuntimeError("this PrivateOptimizer is closed")

    def _epsilon_charged(self) -> float:
        return accounting.epsilon(
            sample_rate=self.spec.sample_rate,
            noise_multiplier=self.spec.noise_multiplier,
            steps=self.steps_charged,
            delta=self.spec.delta,
        )
