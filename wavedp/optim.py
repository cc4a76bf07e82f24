# SPDX-License-Identifier: Apache-2.0
"""SGD, Adam and AdamW that take clipped sums instead of gradients: noise, mean and step in one pass.

::

    optimizer = wavedp.optim.DPAdamW(model.parameters(), lr=1e-3)
    sums = wavedp.clip_and_sum(grad_samples, max_grad_norm)  # one tensor a parameter
    optimizer.step(sums=sums, std=noise_multiplier * max_grad_norm, denominator=expected_batch_size)

Gaussian noise of deviation ``std`` is added to every coordinate of the sums under a fresh key, the result rounded to a
public grid (:func:`wavedp.noise.grid_step`) and divided by the public denominator; what follows is torch's rule.
With ``std=0`` a step equals torch's to rounding, and is not private. That the sums are clipped and the batch drawn as
an accountant assumes is the caller's part; :mod:`wavedp.privacy` does both.

Parameters of bfloat16 and float16 are computed in float32, have moments of float32, and are rounded once a step. No
gradient is read or written.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wavedp.noise import NoiseKey, grid_of, secret_of
from wavedp.ops.noise_step import ADAM, SGD, StepConstants, StepTensor, noise_step

__all__ = ["DPSGD", "DPAdam", "DPAdamW", "PrivateStep"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class PrivateStep(torch.optim.Optimizer):
    """What the three have in common: :meth:`step`. Learning-rate schedulers and state_dicts are torch's."""

    _rule: int
    _moments: tuple[str, ...]  # names in the state, those of torch

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        for group in self.param_groups:
            self._check_group(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._check_group(self.param_groups[-1])

    def step(  # type: ignore[override]
        self,
        closure: None = None,
        *,
        sums: Sequence[Tensor | None] | None = None,
        std: float | None = None,
        denominator: float | None = None,
        grid: float | None = None,
        key: NoiseKey | None = None,
    ) -> None:
        """Make one private step.

        Args:
            closure: must be ``None``.
            sums: for each parameter, in the order of ``param_groups``, the sum of its clipped per-record gradients,
                float32 or float64 and of its shape; ``None`` stands for zero, and gets noise like the others.
            std: standard deviation of the noise in each coordinate of a sum: noise multiplier times sensitivity.
            denominator: the public number that the noisy sums are divided by: the expected batch size.
            grid: the step that noisy sums are rounded to, a power of two; 2^-12 ``std``, rounded down to one, when
                ``None``; 0 leaves rounding out.
            key: what the noise is made from; a fresh key of the operating system, wiped at the end, when ``None``.
                The noise of a step takes the numbers of the key's stream from 0 on, in the order of the parameters.

        Raises:
            RuntimeError: ``sums``, ``std`` or ``denominator`` is missing, as in an ordinary training loop, or a closure
                is given; or the key was wiped, or belongs to another process.
            TypeError: an argument of a wrong type.
            ValueError: sums that do not fit the parameters, or a number out of range. Nothing was changed.
        """
        name = type(self).__name__
        if closure is not None:
            raise RuntimeError(f"{name}.step takes no closure: it would compute gradients without clipping and noise")
        if sums is None or std is None or denominator is None:
            raise RuntimeError(
                f"{name}.step takes sums=, std= and denominator=: it steps by clipped sums and noise, not by .grad"
            )
        params = [(group, param) for group in self.param_groups for param in group["params"]]
        totals = self._checked_sums([param for _, param in params], sums)
        std, denominator, step_of_grid = grid_of(f"{name}.step", std, denominator, grid)
        with secret_of(f"{name}.step", key) as secret:
            tensors = [self._tensor(group, param, total) for (group, param), total in zip(params, totals)]
            noise_step(self._rule, tensors, std, step_of_grid, denominator, secret, 0, 0, False)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`, also that of torch's optimizer of the same rule; moments keep their precision."""
        super().load_state_dict(dict(state_dict))
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for i, param in zip(ids, params):
            for name, value in state_dict["state"].get(i, {}).items():
                # torch casts moments to the type of their parameter, and shares the count of steps.
                if name in self._moments and isinstance(value, Tensor):
                    self.state[param][name] = _moment_like(param).copy_(value.reshape(param.shape))
                elif isinstance(value, Tensor):
                    self.state[param][name] = value.clone()

    def _checked_sums(self, params: list[Tensor], sums: Any) -> Sequence[Tensor | None]:
        name = type(self).__name__
        if not isinstance(sums, (list, tuple)):
            raise TypeError(f"{name}.step takes sums as a list, one for each parameter, not a {type(sums).__name__}")
        if len(sums) != len(params):
            raise ValueError(f"{name}.step takes {len(params)} sums, one for each parameter, not {len(sums)}")
        for position, (param, total) in enumerate(zip(params, sums)):
            if param.dtype not in _DTYPES:
                raise ValueError(f"{name} takes parameters of float16, bfloat16, float32 or float64, not {param.dtype}")
            if total is None:
                continue
            if not isinstance(total, Tensor):
                raise TypeError(f"sum {position} of {name}.step must be a tensor or None, not {total!r}")
            if total.shape != param.shape or total.device != param.device:
                raise ValueError(
                    f"sum {position} of {name}.step has the shape {tuple(total.shape)} on {total.device}, but its "
                    f"parameter {tuple(param.shape)} on {param.device}"
                )
            if total.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"sum {position} of {name}.step is {total.dtype}: sums are float32 or float64, as lower "
                    f"precisions do not hold one within its sensitivity"
                )
        return sums

    def _moment(self, param: Tensor, name: str) -> Tensor:
        state = self.state[param]
        if name not in state:
            state[name] = _moment_like(param)
        moment: Tensor = state[name]
        return moment

    def _check_group(self, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _tensor(self, group: dict[str, Any], param: Tensor, total: Tensor | None) -> StepTensor:
        raise NotImplementedError


class DPSGD(PrivateStep):
    """As :class:`torch.optim.SGD` in its rule, its arguments and its state; :meth:`step` takes clipped sums.

    Raises:
        ValueError: an argument out of range, or ``nesterov`` without momentum or with dampening.
    """

    _rule, _moments = SGD, ("momentum_buffer",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
        values = (lr, momentum, dampening, weight_decay, nesterov, maximize)
        super().__init__(params, dict(zip(names, values)))

    def _check_group(self, group: dict[str, Any]) -> None:
        _check_numbers("DPSGD", group, ("lr", "momentum", "weight_decay"))
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("DPSGD: nesterov needs a momentum above 0 and no dampening")

    def _tensor(self, group: dict[str, Any], param: Tensor, total: Tensor | None) -> StepTensor:
        momentum = float(group["momentum"])
        constants = StepConstants(sign=_sign(group), l2=float(group["weight_decay"]), rate=float(group["lr"]))
        if momentum == 0.0:
            return StepTensor(param, total, None, None, None, None, None, False, constants)
        begun = self.state[param].get("momentum_buffer") is not None
        if not begun:
            self.state[param].pop("momentum_buffer", None)
        constants = constants._replace(
            keep_first=momentum if begun else 0.0,
            first=1.0 - float(group["dampening"]) if begun else 1.0,
            nesterov=1.0 if group["nesterov"] else 0.0,
            from_first=momentum if group["nesterov"] else 1.0,
        )
        return StepTensor(
            param, total, self._moment(param, "momentum_buffer"), None, None, None, None, False, constants
        )


class DPAdam(PrivateStep):
    """As :class:`torch.optim.Adam` in its rule, its arguments and its state; :meth:`step` takes clipped sums.

    Raises:
        ValueError: an argument out of range.
    """

    _rule, _moments = ADAM, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    _decoupled = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        names = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")
        super().__init__(params, dict(zip(names, (lr, betas, eps, weight_decay, amsgrad, maximize))))

    def _check_group(self, group: dict[str, Any]) -> None:
        _check_numbers(type(self).__name__, group, ("lr", "eps", "weight_decay"))
        if len(group["betas"]) != 2 or not all(0.0 <= beta < 1.0 for beta in group["betas"]):
            raise ValueError(f"{type(self).__name__} takes two betas in [0, 1), not {group['betas']!r}")

    def _tensor(self, group: dict[str, Any], param: Tensor, total: Tensor | None) -> StepTensor:
        state, lr, decay = self.state[param], float(group["lr"]), float(group["weight_decay"])
        beta1, beta2 = (float(beta) for beta in group["betas"])
        count = float(state.get("step", 0.0)) + 1.0
        state["step"] = torch.tensor(count)
        constants = StepConstants(
            sign=_sign(group),
            l2=0.0 if self._decoupled else decay,
            rate=lr / (1.0 - beta1**count),
            first=1.0 - beta1,
            keep=1.0 - lr * decay if self._decoupled else 1.0,
            keep_second=beta2,
            second=1.0 - beta2,
            root_scale=1.0 / math.sqrt(1.0 - beta2**count),
            eps=float(group["eps"]),
        )
        largest = self._moment(param, "max_exp_avg_sq") if group["amsgrad"] else None
        first, second = self._moment(param, "exp_avg"), self._moment(param, "exp_avg_sq")
        return StepTensor(param, total, first, second, largest, None, None, False, constants)


class DPAdamW(DPAdam):
    """As :class:`torch.optim.AdamW`, whose weight decay is decoupled; else :class:`DPAdam`."""

    _decoupled = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize)


def _moment_like(param: Tensor) -> Tensor:
    return torch.zeros(param.shape, dtype=torch.promote_types(param.dtype, torch.float32), device=param.device)


def _sign(group: dict[str, Any]) -> float:
    return -1.0 if group["maximize"] else 1.0


def _check_numbers(op: str, group: dict[str, Any], names: Iterable[str]) -> None:
    for name in names:
        value = float(group[name])
        if not (math.isfinite(value) and value >= 0.0):
            raise ValueError(f"{op} takes a finite {name} >= 0, not {group[name]!r}")
