# SPDX-License-Identifier: Apache-2.0
"""Puts private training around a model, an optimizer and a data loader, for the ordinary training loop."""

import math
import warnings
from collections.abc import Mapping
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from wavedp.errors import InvalidTypeError, InvalidValueError, StateError
from wavedp.privacy.clipping_rules import ClippingRule
from wavedp.privacy.ledger import PrivacyLedger
from wavedp.privacy.loader import PrivateLoader
from wavedp.privacy.optimizer import PrivateOptimizer
from wavedp.privacy.sampling import PoissonSampler
from wavedp.privacy.spec import PrivacySpec
from wavedp.privacy.statement import PrivacyStatement

Rule: TypeAlias = ClippingRule | str | Mapping[str, Any]

OPEN_END = 10**8
"""Steps of a specification for a run whose number of steps was not given: it is charged as it goes."""


class PrivacyEngine:
    """Makes training private: per-record clipping, noise, Poisson batches, and the account of them.

    ::

        engine = PrivacyEngine()
        model, optimizer, loader = engine.make_private(
            module=model, optimizer=optimizer, data_loader=loader, sample_rate=0.01,
            noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=600,
        )
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
        print(engine.get_epsilon(delta=1e-5))

    The model stays the same object, with the same state_dict. One engine serves one run.
    """

    def __init__(self) -> None:
        self._optimizer: EngineOptimizer | None = None
        self._open_end = False

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: DataLoader[Any] | None,
        sample_rate: float,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float,
        clipping: Rule = "flat",
        physical_batch_size: int | None = None,
        loss_reduction: str = "mean",
        two_backwards: bool = False,
        steps: int | None = None,
        delta: float | None = None,
        ledger: PrivacyLedger | None = None,
        insecure_seed: int | None = None,
        without_privacy: bool = False,
    ) -> "tuple[nn.Module, EngineOptimizer, PrivateLoader | None]":
        """Return the model, an optimizer and a loader for private training.

        Args:
            module: trained where it stands; what may be in it is said in ``docs/private_training.md``.
            optimizer: over exactly the trainable parameters.
            data_loader: of a map-style data set; its data set, ``collate_fn`` and workers are used, the batches are
                Poisson samples. ``None``: the caller samples, and the run gets no privacy statement.
            sample_rate: probability with which each record joins each batch. A public constant: do not compute it
                from the data set's length.
            noise_multiplier: noise standard deviation over the sensitivity of the clipped sum.
            max_grad_norm: bound on the l2 norm of one record's gradient.
            expected_batch_size: what the noisy sum is divided by. A public constant, too.
            clipping: a rule's name or mapping, see :meth:`ClippingRule.parse <wavedp.privacy.ClippingRule.parse>`.
            physical_batch_size: records at most in one forward and backward; a logical batch is then several batches
                of the loader, and ``step`` does nothing before the last of them. Bounds memory, not privacy.
            loss_reduction: how the loss that ``backward`` is called on was made of one loss per row: ``"mean"`` or
                ``"sum"``.
            two_backwards: for models whose output gradients do not fit into memory beside their activations: takes
                the norms in one backward and the sums in a second, by ``optimizer.backward(losses)``.
            steps: batches in the whole run, if it has a fixed number.
            delta: of the statement, below 1 / (number of records); needs ``steps``.
            ledger: charges steps on disk; opened for :attr:`PrivacySpec` of the same values.
            insecure_seed: for debugging: reproducible batches and noise, and no privacy statement.
            without_privacy: must be set if ``noise_multiplier`` is 0.

        Raises:
            TypeError, ValueError: an argument of a wrong type or value, a model that cannot be trained privately.
        """
        if (steps is None) != (delta is None):
            raise InvalidValueError("give both steps and delta, or neither: a statement is about both")
        spec = _spec(
            clipping,
            max_grad_norm,
            sample_rate=sample_rate,
            steps=OPEN_END if steps is None else steps,
            noise_multiplier=noise_multiplier,
            expected_batch_size=expected_batch_size,
            delta=2.0**-40 if delta is None else delta,
        )
        self._open_end = steps is None
        return self.make_private_with_spec(
            spec=spec,
            module=module,
            optimizer=optimizer,
            data_loader=data_loader,
            physical_batch_size=physical_batch_size,
            loss_reduction=loss_reduction,
            two_backwards=two_backwards,
            ledger=ledger,
            insecure_seed=insecure_seed,
            without_privacy=without_privacy,
        )

    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: DataLoader[Any] | None,
        sample_rate: float,
        max_grad_norm: float,
        expected_batch_size: float,
        target_epsilon: float,
        target_delta: float,
        steps: int,
        clipping: Rule = "flat",
        physical_batch_size: int | None = None,
        loss_reduction: str = "mean",
        two_backwards: bool = False,
        ledger: PrivacyLedger | None = None,
        insecure_seed: int | None = None,
    ) -> "tuple[nn.Module, EngineOptimizer, PrivateLoader | None]":
        """As :meth:`make_private`, with the least noise that keeps ``steps`` steps within 1 % below a target.

        Raises:
            TypeError, ValueError: as :meth:`make_private`; or no noise multiplier meets the target.
        """
        unnoised = _spec(
            clipping,
            max_grad_norm,
            sample_rate=sample_rate,
            steps=steps,
            noise_multiplier=0.0,
            expected_batch_size=expected_batch_size,
            delta=target_delta,
        )
        return self.make_private_with_spec(
            spec=unnoised.calibrated(target_epsilon),
            module=module,
            optimizer=optimizer,
            data_loader=data_loader,
            physical_batch_size=physical_batch_size,
            loss_reduction=loss_reduction,
            two_backwards=two_backwards,
            ledger=ledger,
            insecure_seed=insecure_seed,
        )

    def make_private_with_spec(
        self,
        *,
        spec: PrivacySpec,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: DataLoader[Any] | None,
        physical_batch_size: int | None = None,
        loss_reduction: str = "mean",
        two_backwards: bool = False,
        ledger: PrivacyLedger | None = None,
        insecure_seed: int | None = None,
        without_privacy: bool = False,
    ) -> "tuple[nn.Module, EngineOptimizer, PrivateLoader | None]":
        """As :meth:`make_private`, under a specification; with a ledger, for the steps that are left in it.

        It may also say what the other two have no arguments for: truncated batches, strict noise, a label histogram.

        Raises:
            TypeError, ValueError: as :meth:`make_private`; the data set is larger than the specification's bound.
            LedgerError: the ledger was opened for another specification.
        """
        if self._optimizer is not None:
            raise StateError("this engine serves another run already: build a PrivacyEngine for each")
        if loss_reduction not in ("mean", "sum"):
            raise InvalidValueError(f"loss_reduction must be 'mean' or 'sum', got {loss_reduction!r}")
        sampler = None
        if data_loader is not None:
            if not isinstance(data_loader, DataLoader):
                raise InvalidTypeError(f"data_loader must be a torch DataLoader, got {type(data_loader).__name__}")
            steps = None if ledger is None else ledger.remaining
            count = len(data_loader.dataset)  # type: ignore[arg-type]
            if count > spec.dataset_size_bound:
                raise InvalidValueError(
                    f"delta={spec.delta:g} is not below 1 / (number of records): choose it by a public bound on that "
                    f"number"
                )
            sampler = PoissonSampler.for_spec(spec, count, steps=steps, insecure_seed=insecure_seed)
        private = PrivateOptimizer(
            module,
            optimizer,
            spec,
            sampler=sampler,
            ledger=ledger,
            insecure_seed=insecure_seed,
            without_privacy=without_privacy,
            loss_reduction=loss_reduction,
            two_backwards=two_backwards,
        )
        loader = None
        if data_loader is not None:
            try:
                loader = PrivateLoader(data_loader, private, physical_batch_size)
            except BaseException:
                private.close()
                raise
        self._optimizer = EngineOptimizer(private, loader)
        return module, self._optimizer, loader

    def get_epsilon(self, delta: float) -> float:
        """Return the upper bound on epsilon for the steps charged so far, add-or-remove-one; with the label histogram
        if the specification has one.

        It holds for the model as it is if the decision to stop here did not depend on the private data, and batches
        were what the mechanism draws; a warning says where that was not checked or is not so.

        Raises:
            RuntimeError: nothing was made private, or noise and batches can be reproduced from a seed.
            ValueError: ``delta`` is not in (0, 1).
        """
        private = self._private()
        if private.insecure:
            raise StateError("insecure_seed makes noise and batches reproducible, which is not private at any epsilon")
        if private.steps_charged == 0:
            return 0.0
        reason = private.irregularity()
        if reason is not None:
            warnings.warn(f"this epsilon is of the mechanism that was planned; {reason}", stacklevel=2)
        return private.spec.epsilon(steps=private.steps_charged, delta=delta)

    def privacy_statement(self) -> PrivacyStatement:
        """Return the statement of a run with a fixed number of steps.

        Raises:
            RuntimeError: the number of steps was not given, or the run was not the accounted mechanism.
        """
        private = self._private()
        if self._open_end:
            raise StateError("a statement needs the planned number of steps: pass steps= and delta= to make_private")
        return PrivacyStatement.from_run(private)

    def _private(self) -> PrivateOptimizer:
        if self._optimizer is None:
            raise StateError("nothing was made private yet: call make_private")
        return self._optimizer.private


class EngineOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose step is private; learning-rate schedulers take it.

    ``step`` at the end of a logical batch releases it, and does nothing before; ``zero_grad`` does nothing, since
    gradients are held nowhere between. :attr:`private` is the :class:`~wavedp.privacy.PrivateOptimizer` behind it.
    """

    def __init__(self, private: PrivateOptimizer, loader: PrivateLoader | None) -> None:
        inner = private.optimizer
        super().__init__(inner.param_groups, inner.defaults)
        self.param_groups = inner.param_groups
        self.state = inner.state
        self.private = private
        self._loader = loader

    def backward(self, losses: Tensor, records: Tensor | None = None, *, sample_id: Tensor | None = None) -> None:
        """Use in place of ``loss.backward()``, with one loss per row: no loss can couple records then."""
        self.private.backward(losses, records, sample_id=sample_id)

    def set_sample_id(self, sample_id: Tensor | None) -> None:
        """Say which record each row belongs to, ``[rows]`` int64, in the next backward; ``None``: every row its own."""
        self.private.set_sample_id(sample_id)

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Release the batch; see :meth:`PrivateOptimizer.step`."""
        if self._loader is None or self._loader.at_end_of_batch or closure is not None:
            self.private.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: what was added to a batch is released by its step, or dropped by :meth:`discard`."""

    def discard(self) -> None:
        """Drop the batch; see :meth:`PrivateOptimizer.discard`: its step stays charged."""
        self.private.discard()

    def announce(self, records: Tensor) -> None:
        """Say which records, ``[b]`` int64, the next backward is about, where no loader does."""
        self.private.announce(records)

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`PrivateOptimizer.state_dict`."""
        return self.private.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See :meth:`PrivateOptimizer.load_state_dict`."""
        self.private.load_state_dict(state_dict)
        self.param_groups, self.state = self.private.optimizer.param_groups, self.private.optimizer.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "private"):
            raise StateError("parameters cannot be added to a private run")
        super().add_param_group(param_group)

    @property
    def _step_supports_amp_scaling(self) -> NoReturn:
        raise StateError(
            "a GradScaler skips steps by what the gradients are, which is released without noise, and its scaled "
            "loss would be clipped as such: use bfloat16 autocast, and do not scale the loss"
        )

    def __getstate__(self) -> NoReturn:
        raise InvalidTypeError("a private optimizer cannot be copied or pickled: both would spend the same steps")


def _spec(clipping: Rule, max_grad_norm: float, *, delta: float, **values: Any) -> PrivacySpec:
    # The largest bound N on the number of records that delta is below the inverse of.
    bound = max(1, math.ceil(1.0 / delta) - 1) if 0.0 < delta < 1.0 else 1
    return PrivacySpec(
        max_grad_norm=max_grad_norm, delta=delta, dataset_size_bound=bound, clipping_rule=clipping, **values
    )
