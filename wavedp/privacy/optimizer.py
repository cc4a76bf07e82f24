# SPDX-License-Identifier: Apache-2.0
"""Private training around any torch optimizer: clip and add up, then noise, divide and step.

One logical (Poisson) batch is zero or more calls of :meth:`PrivateOptimizer.backward`, one per physical
micro-batch, followed by one :meth:`PrivateOptimizer.step`, which is the only release.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from wavedp.errors import InvalidTypeError, InvalidValueError, StateError
from wavedp.optim import PrivateStep
from wavedp.privacy.batches import BatchTracker, check_sampler
from wavedp.privacy.bookings import Bookings
from wavedp.privacy.bookkeeping import GradientBook
from wavedp.privacy.contents import ContentsWatch
from wavedp.privacy.coverage import check_groups, trainable_parameters
from wavedp.privacy.entropy import Entropy
from wavedp.privacy.ledger import LedgerError, PrivacyLedger
from wavedp.privacy.release import check_run, step_with_noise, write_noisy_means
from wavedp.privacy.sampling import PoissonSampler
from wavedp.privacy.spec import PrivacySpec
from wavedp.privacy.validation import check_integer

_STATE_KEYS = ("optimizer", "spec", "steps_charged", "ledger_head", "clipping")


class PrivateOptimizer:
    """Drives ``optimizer`` with the noisy mean of clipped per-record gradients.

    ::

        sampler = PoissonSampler.for_spec(spec, len(records))
        private = PrivateOptimizer(model, optimizer, spec, sampler=sampler)
        for indices in sampler:
            for chunk in physical_batches(indices, 64):
                private.backward(loss_fn(model, chunk), records=chunk)  # [b], one loss per record
            private.step()

    Formal guarantee: if every batch is a Poisson sample at ``spec.sample_rate``, every record appears at
    most once per logical batch, and each loss depends on its own record alone, then the parameters after
    every step, taken together, are (``spec.epsilon()``, ``spec.delta``)-differentially private under adding
    or removing one record, up to the floating-point caveat of ``docs/privacy.md``. Anything else that is
    computed from the records, losses and gradient norms included, is not covered. With ``sampler`` the first
    two conditions are checked at every step; without it the run gets no privacy statement.

    Learning-rate schedulers take ``private.optimizer``. Use one object from one thread.

    Args:
        model: see :class:`~wavedp.privacy.GradientBook` for what may be in it; attached until :meth:`close`.
            Whatever a state_dict of it holds may change by private steps and ``load_state_dict`` alone.
        optimizer: any optimizer whose ``step`` needs no closure, over exactly the trainable parameters of
            ``model``. Those of :mod:`wavedp.optim` make the noise while they step, in one pass. Its own ``step``
            raises from now on. State that it already holds must not stem from private data, unless from a private
            run.
        spec: the mechanism.
        sampler: what draws every batch: a :class:`~wavedp.privacy.PoissonSampler` that has not drawn yet, of this
            run alone.
        ledger: charges steps on disk before they start; without it a restarted run is not charged for
            what it did before.
        reserve_steps: steps reserved in the ledger at a time; a crash charges at most this many too many.
        insecure_seed: for debugging: reproducible noise, and no privacy statement.
        without_privacy: must be set if ``spec.noise_multiplier`` is 0; no privacy statement is issued then.
        loss_reduction: ``"mean"`` or ``"sum"`` lets a plain ``loss.backward()`` add to the batch too, ``loss`` being
            that reduction of one loss per row; ``None`` refuses it.
        two_backwards: saves memory for a third more time, see :class:`~wavedp.privacy.GradientBook`; takes
            :meth:`backward` in place of ``loss.backward()``.

    Raises:
        TypeError: an argument of a wrong type; a sampler of a subclass.
        ValueError: the model cannot be booked, the optimizer's parameters are not the trainable ones or of another
            number than ``spec`` charges, or the sampler is not the one that it accounts for.
        RuntimeError: a parameter that is not trained, but is in the optimizer, holds a ``.grad``; the sampler serves
            another run.
        LedgerError: the ledger was opened for another specification.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        spec: PrivacySpec,
        *,
        sampler: PoissonSampler | None = None,
        ledger: PrivacyLedger | None = None,
        reserve_steps: int = 10,
        insecure_seed: int | None = None,
        without_privacy: bool = False,
        loss_reduction: str | None = None,
        two_backwards: bool = False,
    ) -> None:
        check_run(model, optimizer, spec, ledger, without_privacy=without_privacy, loss_reduction=loss_reduction)
        self._spec = spec
        self._optimizer = optimizer
        self._ledger = ledger
        self._sampler = sampler
        self._reserve_steps = check_integer("reserve_steps", reserve_steps, at_least=1)
        self._entropy = Entropy(insecure_seed, "noise")
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._charged = 0 if ledger is None else ledger.charged
        self._reserved = 0
        self._started = 0
        if sampler is not None:
            check_sampler(sampler, spec, self.steps_left)
        self._batch = BatchTracker(sampler, spec.dataset_size_bound)
        self._sums: dict[str, Tensor] = {}
        self._releasing = False
        self._changed_at_close: list[str] = []
        self._loss_reduction = loss_reduction
        listener = None if loss_reduction is None else self._heard
        self._book = GradientBook(model, listener=listener, two_backwards=two_backwards)
        try:
            rule = spec.clipping.for_parameters(self._book.parameters)
            self._clipping = rule.session(Entropy(insecure_seed, "clipping"))
            self._check_model()
            self._contents = ContentsWatch(model)
            if sampler is not None:
                sampler.serve()
        except BaseException:
            self._book.detach()
            raise
        self._guard = optimizer.register_step_pre_hook(self._refuse_direct_step)

    def __enter__(self) -> "PrivateOptimizer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise InvalidTypeError(
            "a PrivateOptimizer cannot be copied or pickled: both would spend the same reserved steps"
        )

    @property
    def spec(self) -> PrivacySpec:
        """The mechanism."""
        return self._spec

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The wrapped optimizer, which learning-rate schedulers take."""
        return self._optimizer

    @property
    def sampler(self) -> PoissonSampler | None:
        """What draws the batches, if it was given."""
        return self._sampler

    @property
    def ledger(self) -> PrivacyLedger | None:
        """What charges steps on disk, if it was given."""
        return self._ledger

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups; learning rates may be changed, parameters may not."""
        return self._optimizer.param_groups

    @property
    def steps_charged(self) -> int:
        """Attempts charged so far: steps that were started, and the rest of a block reserved in a ledger."""
        return self._charged if self._ledger is None else self._ledger.charged

    @property
    def steps_started(self) -> int:
        """Logical batches begun by this object."""
        return self._started

    @property
    def steps_left(self) -> int:
        """Steps that may still be started."""
        return self._spec.steps - self._charged if self._ledger is None else self._ledger.remaining + self._reserved

    @property
    def insecure(self) -> bool:
        """Whether noise or batches can be reproduced from a seed."""
        return self._entropy.insecure or (self._sampler is not None and self._sampler.insecure)

    @property
    def pending(self) -> bool:
        """Whether a logical batch was begun and neither stepped nor discarded."""
        return self._batch.pending

    def backward(
        self,
        losses: Tensor,  # [b], one loss per row of this micro-batch
        records: Tensor | None = None,  # [b] int, the records' indices
        *,
        sample_id: Tensor | None = None,  # [b] int64, the record of each row
    ) -> None:
        """Run the backward of one micro-batch, clip every record's gradient, and add the sum to the batch's.

        The first call of a logical batch charges the step. ``records`` must be given if there is a sampler (unless
        a loader announced them), and come from the batch that it drew last; a record that comes twice in one logical
        batch would contribute 2 C and raises. With ``sample_id`` a record may have several rows: its loss is their
        mean, and ``records``, if given, holds each record once. ``records`` that is refused leaves the batch as it
        was. Any later failure ends it: :meth:`discard` is all that remains.

        Raises:
            TypeError: ``losses`` is not a tensor, or ``records`` is missing or not an int64 tensor.
            ValueError: ``losses`` is not ``[b]`` with a graph, or ``records`` does not fit it or the batch.
            RuntimeError: the batch failed before, a drawn batch was left out, the budget is exhausted, or
                see :meth:`GradientBook.clipped_sums`.
        """
        with self._alone():
            self._batch.check_turn()
            if not isinstance(losses, Tensor):
                raise InvalidTypeError(f"losses must be a tensor [b], got {type(losses).__name__}")
            sample_id = self._book.sample_id if sample_id is None else sample_id
            rows = losses.numel() if sample_id is None else len(torch.unique(sample_id))
            if records is None and self._batch.announced:
                indices = self._batch.check_count(rows)
            else:
                indices = self._batch.check_records(rows if losses.ndim == 1 else None, records)
            self._add(lambda: self._book.clipped_sums(losses, self._clipping, sample_id=sample_id), indices)

    def set_sample_id(self, sample_id: Tensor | None) -> None:
        """Say which record each row belongs to, ``[rows]`` int64, in the next backward; ``None``: its own."""
        self._book.sample_id = sample_id

    def announce(self, records: Tensor) -> None:
        """Say which records, of the batch that was drawn last, the next plain backwards are about; for loaders."""
        self._batch.announce(records)

    def step(self, closure: object = None) -> None:
        """Release the batch: add noise to every sum, round, divide by the expected batch size, and step.

        An empty batch (no call of :meth:`backward`) takes the same path with a sum of zero.

        Raises:
            RuntimeError: nothing is released: a closure was given; the budget is exhausted; the records
                booked are not the drawn batch, or one before it was left out; a backward failed; parameters,
                saved buffers or a ``.grad`` were changed from outside.
        """
        if closure is not None:
            raise StateError("step() takes no closure: it would recompute gradients without clipping and noise")
        with self._alone():
            self._batch.check_turn()
            self._batch.check_complete()
            self._book.check_nothing_unbooked()
            self._check_model()
            _refuse_changed(self._contents.changed())
            self._begin_step()
            try:
                self._release()
                self._clipping.end_step()
                self._batch.stepped()
            except BaseException:
                self._drop()
                raise

    def discard(self) -> None:
        """Drop the batch, without a release; its step stays charged.

        Further steps are possible and get no privacy statement: which batches are left out may depend on the
        data. Discarding what an interrupt left at the end of a run is harmless.
        """
        with self._alone():
            self._drop()

    def irregularity(self) -> str | None:
        """Return why the batches so far were not those of the mechanism that ``spec`` accounts for, or ``None``."""
        return self._batch.irregularity()

    def check_regular(self) -> None:
        """Raise a RuntimeError unless the run so far was the mechanism that ``spec`` accounts for.

        Compares the contents of everything that a state_dict of the model holds, as at :meth:`close` for an
        optimizer that is closed.
        """
        reason = self.irregularity()
        if reason is not None:
            raise StateError(reason)
        _refuse_changed(self._contents.changed(thorough=True) if self._book.attached else self._changed_at_close)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing between logical batches, where nothing is held.

        Raises:
            RuntimeError: sums are pending; :meth:`step` releases them and :meth:`discard` drops them.
        """
        if self._batch.pending:
            raise StateError("a batch is pending: call step() to release it, or discard() to drop it")

    def privacy_spent(self) -> dict[str, float | int | None]:
        """Return what is charged so far and what the whole run costs.

        ``epsilon`` is the bound for all planned steps and releases, which holds whenever and however the run stops;
        ``epsilon_charged`` is that of the charged steps in their place, which holds if the decision to stop did not
        depend on the private data. Both are ``None`` where noise is reproducible or absent.
        """
        private = not self.insecure and self._spec.noise_multiplier > 0.0
        return {
            "steps_charged": self.steps_charged,
            "steps_planned": self._spec.steps,
            "delta": self._spec.delta,
            "epsilon": self._spec.epsilon() if private else None,
            "epsilon_charged": self._spec.epsilon(steps=self.steps_charged) if private else None,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state and the steps charged; never sums, noise or sampling state."""
        return {
            "optimizer": self._optimizer.state_dict(),
            "spec": self._spec.to_dict(),
            "steps_charged": self.steps_charged,
            "ledger_head": None if self._ledger is None else self._ledger.head,
            "clipping": self._clipping.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; steps charged since then stay charged, and the sampler ends with the budget.

        Raises:
            ValueError: ``state`` is not from :meth:`state_dict`.
            RuntimeError: a batch is pending, the specification differs, or the ledger does not contain the
                checkpoint's history.
        """
        self.zero_grad()
        if not isinstance(state, Mapping) or set(state) != set(_STATE_KEYS):
            raise InvalidValueError(
                f"not the state_dict of a PrivateOptimizer, which has the keys {', '.join(_STATE_KEYS)}"
            )
        if PrivacySpec.from_dict(state["spec"]) != self.spec:
            raise StateError("the checkpoint was made under another PrivacySpec; resume with the same one")
        if self._ledger is not None:
            head = state["ledger_head"]
            if head is None or not self._ledger.contains(head):
                raise LedgerError(
                    f"the checkpoint's spending is not in {self._ledger.path}: this ledger is older than the "
                    f"checkpoint or belongs to another run"
                )
        elif state["ledger_head"] is not None:
            raise StateError("the checkpoint was made with a privacy ledger; open it and pass it as ledger=")
        charged = max(self._charged, check_integer("steps_charged", state["steps_charged"]))
        if self._sampler is not None:
            self._sampler.end_after(self._spec.steps - charged if self._ledger is None else self.steps_left)
        self._clipping.load_state_dict(state["clipping"])
        self._charged = charged
        self._optimizer.load_state_dict(dict(state["optimizer"]))

    def close(self) -> None:
        """Drop what is pending and give model and optimizer back unchanged; the ledger stays open."""
        if self._book.attached:
            self._changed_at_close = self._contents.changed(thorough=True)
            self._sums.clear()
            if self._batch.pending:
                self._batch.drop()
            self._contents.close()
            self._book.detach()
            self._guard.remove()

    def _begin_step(self) -> None:
        """Charge one step, durably, before anything of it happens; once per logical batch."""
        if self._batch.pending:
            return
        if self.steps_left < 1:
            raise StateError(f"privacy budget exhausted: all {self._spec.steps} steps of the specification are charged")
        if self._ledger is not None and self._reserved == 0:
            block = min(self._reserve_steps, self._ledger.remaining)
            self._ledger.reserve(block)
            self._reserved = block
        self._reserved = max(self._reserved - 1, 0)
        self._charged += 1
        self._started += 1
        self._batch.pending = True

    def _heard(self, bookings: Bookings) -> None:
        """A plain backward has ended."""
        with self._alone():
            self._batch.check_turn()
            scale = float(bookings.rows or 0) if self._loss_reduction == "mean" else 1.0
            indices = self._batch.check_count(bookings.records)
            self._add(lambda: self._book.clip(bookings, self._clipping, scale=scale), indices)

    def _add(self, clipped_sums: Callable[[], dict[str, Tensor]], indices: frozenset[int]) -> None:
        try:
            self._begin_step()
            for name, part in clipped_sums().items():
                # Micro-batches add up in float64; one alone is as it is.
                self._sums[name] = self._sums[name].double() + part if name in self._sums else part
            self._batch.add(indices)
        except BaseException:
            if self._batch.pending:
                self._batch.fail()
            raise

    def _drop(self) -> None:
        self._sums.clear()
        self._clipping.drop_step()
        self._book.forget()
        self._batch.drop()

    def _release(self) -> None:
        std = self._spec.stddev_with(self._clipping)
        try:
            with self._entropy.key() as key:
                if isinstance(self._optimizer, PrivateStep):
                    self._releasing = True
                    step_with_noise(self._optimizer, self._book.parameters, self._sums, self._spec, std, key)
                    return
                write_noisy_means(self._book.parameters, self._sums, self._spec, std, key)
            self._releasing = True
            self._optimizer.step()
        finally:
            self._releasing = False
            for parameter in self._book.parameters.values():
                parameter.grad = None
            self._sums.clear()
            self._contents.released(self._book.parameters)

    def _check_model(self) -> None:
        now = trainable_parameters(self._book.model)
        if {n: id(p) for n, p in now.items()} != {n: id(p) for n, p in self._book.parameters.items()}:
            raise StateError(
                "the model's trainable parameters were frozen, unfrozen, replaced or added; do that before "
                "building the PrivateOptimizer"
            )
        check_groups(self._optimizer, self._book.parameters)

    def _refuse_direct_step(self, optimizer: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._releasing:
            raise StateError("the wrapped optimizer must not be stepped directly; call PrivateOptimizer.step()")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._book.attached:
            raise StateError("this PrivateOptimizer is closed")
        if os.getpid() != self._process:
            raise StateError("this PrivateOptimizer belongs to another process; build it after forking")
        if not self._lock.acquire(blocking=False):
            raise StateError("another call of this PrivateOptimizer is under way; use it from one thread")
        try:
            yield
        finally:
            self._lock.release()


def _refuse_changed(names: list[str]) -> None:
    if names:
        raise StateError(
            f"{', '.join(map(repr, names[:5]))} of the model changed outside of private steps: what the forward "
            f"writes there would publish private data without noise. Make such a buffer non-persistent or stop "
            f"updating it; to put other weights in on purpose, use load_state_dict"
        )
