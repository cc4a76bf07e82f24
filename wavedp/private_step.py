# SPDX-License-Identifier: Apache-2.0
"""What the optimizers of :mod:`wavedp.optim` have in common: a step by clipped sums, its options, and its state."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from wavedp.errors import InvalidTypeError, InvalidValueError, StateError
from wavedp.noise_checks import grid_of, real_of
from wavedp.noise_key import NoiseKey, secret_of
from wavedp.ops.noise_step import StepTensor, noise_step

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_HALVES = (torch.bfloat16, torch.float16)
OPTIONS = ("ema_decay", "master_weights", "stochastic_rounding")  # of every rule
_EMA_RAMP = 10  # steps over which the average's memory grows, so that the first values are soon forgotten


class PrivateStep(torch.optim.Optimizer):
    """:meth:`step` by clipped sums. Learning-rate schedulers and state_dicts are torch's."""

    _rule: int
    _moments: tuple[str, ...]  # names in the state, those of torch
    _options: tuple[str, ...] = OPTIONS  # what torch's optimizer of the same rule does not have
    _holds_averages = False

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        given = params if isinstance(params, Tensor) else list(params)
        if not len(given):
            raise InvalidValueError(f"{type(self).__name__} takes at least one parameter, and was given none")
        super().__init__(given, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except BaseException:
            self.param_groups.pop()
            raise

    def step(  # type: ignore[override]
        self,
        closure: None = None,
        *,
        sums: Sequence[Tensor | None] | None = None,
        std: float | None = None,
        denominator: float | None = None,
        grid: float | None = None,
        key: NoiseKey | None = None,
        noise_mode: str = "standard",
    ) -> None:
        """Make one private step.

        Args:
            closure: must be ``None``.
            sums: for each parameter, in the order of ``param_groups``, the sum of its clipped per-record gradients,
                float32 or float64 and of its shape; ``None`` stands for zero, and gets noise like the others.
            std: standard deviation of the noise in each coordinate of a sum: noise multiplier times sensitivity.
            denominator: the public number that the noisy sums are divided by: the expected batch size.
            grid: the step that noisy sums are rounded to, a power of two; 2^-12 ``std``, or 2^-20 ``std`` for strict
                noise, rounded down to one, when ``None``; 0 leaves rounding out.
            key: what the noise is made from; a fresh key of the operating system, wiped at the end, when ``None``.
                The noise of a step takes the numbers of the key's stream from 0 on, in the order of the parameters.
            noise_mode: ``"standard"`` or ``"strict"``, as in :func:`wavedp.noisy_mean`.

        Raises:
            RuntimeError: ``sums``, ``std`` or ``denominator`` is missing, as in an ordinary training loop, or a closure
                is given; or the key was wiped, or belongs to another process; or the parameters hold their averages.
            TypeError: an argument of a wrong type.
            ValueError: sums that do not fit the parameters, or a number out of range. Nothing was changed.
        """
        name = type(self).__name__
        if closure is not None:
            raise StateError(f"{name}.step takes no closure: it would compute gradients without clipping and noise")
        if sums is None or std is None or denominator is None:
            raise StateError(
                f"{name}.step takes sums=, std= and denominator=: it steps by clipped sums and noise, not by .grad"
            )
        if self._holds_averages:
            raise StateError(f"{name}.step was called within averaged(): the parameters are averages there")
        params = [(group, param) for group in self.param_groups for param in group["params"]]
        totals = self._checked_sums([param for _, param in params], sums)
        op = f"{name}.step"
        std = real_of(op, "std", std)
        denominator = real_of(op, "denominator", denominator, positive=True)
        step_of_grid = grid_of(op, std, grid, noise_mode)
        for group in self.param_groups:
            self._check(group)
        with secret_of(op, key) as secret:
            tensors = [
                self._with_options(group, self._tensor(group, param, total, std / denominator))
                for (group, param), total in zip(params, totals)
            ]
            noise_step(self._rule, tensors, std, step_of_grid, denominator, secret, 0, 0, noise_mode == "strict")

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the parameters of groups with ``ema_decay`` hold their averages, and at the end what they held before.

        ::

            with optimizer.averaged():
                accuracy = evaluate(model)

        Raises:
            RuntimeError: there are no averages yet, or the parameters hold them already.
        """
        if self._holds_averages:
            raise StateError(f"averaged() of {type(self).__name__} was entered twice")
        params = [p for group in self.param_groups if group["ema_decay"] is not None for p in group["params"]]
        if not params or not all("average" in self.state.get(param, {}) for param in params):
            raise StateError(f"{type(self).__name__} has no averages: give it ema_decay, and make a step first")
        # Other memory, and not other contents: a private run would take those for a write to the model.
        before = [param.data for param in params]
        self._holds_averages = True
        try:
            for param in params:
                param.data = torch.empty_like(param.data).copy_(self.state[param]["average"])
            yield
        finally:
            for param, held in zip(params, before):
                param.data = held
            self._holds_averages = False

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`, also that of torch's optimizer of the same rule; moments, averages and masters
        keep their precision. Options that the saved groups do not have stay as they are.

        Raises:
            ValueError: the groups are not those of this optimizer, or a count of steps is not one.
        """
        for state in state_dict["state"].values():
            count = float(state.get("step", 0.0))
            if not (math.isfinite(count) and count >= 0.0):
                raise InvalidValueError(f"the state of {type(self).__name__} has made {count} steps: it is damaged")
        before = [{name: group[name] for name in self._options} for group in self.param_groups]
        super().load_state_dict(dict(state_dict))
        for group, options in zip(self.param_groups, before):
            for option, value in options.items():
                group.setdefault(option, value)
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for i, param in zip(ids, params):
            for name, value in state_dict["state"].get(i, {}).items():
                # torch casts moments to the type of their parameter, and shares the count of steps.
                if name in (*self._moments, "average", "master") and isinstance(value, Tensor):
                    self.state[param][name] = moment_like(param).copy_(value.reshape(param.shape))
                elif isinstance(value, Tensor):
                    self.state[param][name] = value.clone()

    def _checked_sums(self, params: list[Tensor], sums: Any) -> Sequence[Tensor | None]:
        name = type(self).__name__
        if not isinstance(sums, (list, tuple)):
            raise InvalidTypeError(
                f"{name}.step takes sums as a list, one for each parameter, not a {type(sums).__name__}"
            )
        if len(sums) != len(params):
            raise InvalidValueError(f"{name}.step takes {len(params)} sums, one for each parameter, not {len(sums)}")
        for position, (param, total) in enumerate(zip(params, sums)):
            if param.dtype not in _DTYPES:
                raise InvalidValueError(
                    f"{name} takes parameters of float16, bfloat16, float32 or float64, not {param.dtype}"
                )
            if total is None:
                continue
            if not isinstance(total, Tensor):
                raise InvalidTypeError(f"sum {position} of {name}.step must be a tensor or None, not {total!r}")
            if total.shape != param.shape or total.device != param.device:
                raise InvalidValueError(
                    f"sum {position} of {name}.step has the shape {tuple(total.shape)} on {total.device}, but its "
                    f"parameter {tuple(param.shape)} on {param.device}"
                )
            if total.layout != torch.strided:
                raise InvalidValueError(
                    f"sum {position} of {name}.step is {total.layout}: make it dense by .to_dense()"
                )
            if total.dtype not in (torch.float32, torch.float64):
                raise InvalidValueError(
                    f"sum {position} of {name}.step is {total.dtype}: sums are float32 or float64, as lower "
                    f"precisions do not hold one within its sensitivity"
                )
        return sums

    def _moment(self, param: Tensor, name: str) -> Tensor:
        state = self.state[param]
        if name not in state:
            state[name] = moment_like(param)
        moment: Tensor = state[name]
        return moment

    def _check(self, group: dict[str, Any]) -> None:
        self._check_options(group)
        self._check_group(group)

    def _check_options(self, group: dict[str, Any]) -> None:
        name, decay = type(self).__name__, group["ema_decay"]
        if decay is not None and not 0.0 <= real_of(name, "ema_decay", decay) < 1.0:
            raise InvalidValueError(f"{name} takes an ema_decay in [0, 1), or None for no averages, not {decay!r}")
        for option in ("master_weights", "stochastic_rounding"):
            if not isinstance(group[option], bool):
                raise InvalidTypeError(f"{name} takes {option} as True or False, not {group[option]!r}")
        if not group["stochastic_rounding"]:
            return
        if group["master_weights"]:
            raise InvalidValueError(f"{name}: master_weights leave nothing to stochastic_rounding: ask for one of them")
        if any(param.dtype == torch.float16 for param in group["params"]):
            raise InvalidValueError(
                f"{name}: stochastic_rounding is that of bfloat16, whose numbers have float32's range, but a parameter "
                f"is float16: use master_weights=True"
            )

    def _with_options(self, group: dict[str, Any], one: StepTensor) -> StepTensor:
        """What a rule made of a parameter, with average, master and rounding."""
        param, state = one.param, self.state[one.param]
        if group["ema_decay"] is not None:
            count = float(state.get("average_step", 0.0))
            state["average_step"] = torch.tensor(count + 1.0)
            weight = 1.0 - min(float(group["ema_decay"]), count / (count + _EMA_RAMP))
            one = one._replace(
                average=self._moment(param, "average"), constants=one.constants._replace(average_weight=weight)
            )
        if group["master_weights"] and param.dtype in _HALVES:
            if "master" not in state:
                state["master"] = param.detach().to(torch.float32, memory_format=torch.contiguous_format)
            return one._replace(master=state["master"])
        state.pop("master", None)  # it would be behind the parameter if it were used again
        return one._replace(stochastic=group["stochastic_rounding"] and param.dtype == torch.bfloat16)

    def _check_group(self, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _tensor(
        self,
        group: dict[str, Any],
        param: Tensor,
        total: Tensor | None,
        noise: float,  # deviation in the mean
    ) -> StepTensor:
        raise NotImplementedError


def moment_like(param: Tensor) -> Tensor:
    return torch.zeros(param.shape, dtype=torch.promote_types(param.dtype, torch.float32), device=param.device)


def check_numbers(op: str, group: dict[str, Any], names: Iterable[str]) -> None:
    for name in names:
        given = group[name]
        if isinstance(given, bool) or not isinstance(given, (Real, Tensor)):
            raise InvalidTypeError(f"{op} takes a number as {name}, not {given!r}")
        try:
            value = float(given)
        except OverflowError:
            value = math.inf
        if not (math.isfinite(value) and value >= 0.0):
            raise InvalidValueError(f"{op} takes a finite {name} >= 0, not {value!r}")
