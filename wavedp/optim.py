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

Options, each for a group of parameters and in the same pass:

* ``noise_correction`` (Adam, AdamW): the second moment of a noisy gradient is larger by the noise's variance, which is
  known. It is taken off, and what is left is at least this number: the direction is ``m / (sqrt(max(v - variance,
  noise_correction)) + eps)`` of the bias-corrected moments (DP-AdamBC: Tang et al., arXiv 2312.14334). The variance is
  averaged as ``v`` is, so that ``std`` may change from step to step. In units of the squared mean gradient.
* ``ema_decay``: keep the moving average of the parameters in the state, in float32 or float64. With t values in it, the
  next one is added with the weight ``1 - min(ema_decay, t / (t + 10))``. :meth:`PrivateStep.averaged` puts the averages
  in place of the parameters.
* ``master_weights``: parameters of bfloat16 and float16 are roundings of a float32 copy in the state, which is made at
  the first step and is what steps change. Parameters that are changed otherwise go back to the copy at the next step,
  unless ``optimizer.state[parameter]["master"]`` is deleted.
* ``stochastic_rounding``: parameters of bfloat16 are rounded up or down at random, so that their mean is the float32
  number and steps smaller than half a unit in the last place are not lost.
"""

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from wavedp.errors import InvalidTypeError, InvalidValueError
from wavedp.noise_checks import real_of
from wavedp.ops.noise_step import ADAM, SGD, StepConstants, StepTensor
from wavedp.private_step import OPTIONS, PrivateStep, check_numbers

__all__ = ["DPSGD", "DPAdam", "DPAdamW", "PrivateStep"]


class DPSGD(PrivateStep):
    """As :class:`torch.optim.SGD` in its rule, its arguments and its state; :meth:`step` takes clipped sums.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: torch's.
        ema_decay, master_weights, stochastic_rounding: see :mod:`wavedp.optim`.

    Raises:
        TypeError: an option of a wrong type.
        ValueError: an argument out of range, ``nesterov`` without momentum or with dampening, or options that exclude
            each other.
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
        ema_decay: float | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", *OPTIONS)
        values = (lr, momentum, dampening, weight_decay, nesterov, maximize)
        super().__init__(params, dict(zip(names, (*values, ema_decay, master_weights, stochastic_rounding))))

    def _check_group(self, group: dict[str, Any]) -> None:
        check_numbers("DPSGD", group, ("lr", "momentum", "weight_decay"))
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise InvalidValueError("DPSGD: nesterov needs a momentum above 0 and no dampening")

    def _tensor(self, group: dict[str, Any], param: Tensor, total: Tensor | None, noise: float) -> StepTensor:
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

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize: torch's.
        noise_correction, ema_decay, master_weights, stochastic_rounding: see :mod:`wavedp.optim`.

    Raises:
        TypeError: an option of a wrong type.
        ValueError: an argument out of range, or options that exclude each other.
    """

    _rule, _moments = ADAM, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    _options = (*OPTIONS, "noise_correction")
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
        noise_correction: float | None = None,
        ema_decay: float | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        names = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "noise_correction", *OPTIONS)
        values = (lr, betas, eps, weight_decay, amsgrad, maximize, noise_correction)
        super().__init__(params, dict(zip(names, (*values, ema_decay, master_weights, stochastic_rounding))))

    def _check_group(self, group: dict[str, Any]) -> None:
        check_numbers(type(self).__name__, group, ("lr", "eps", "weight_decay"))
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or not all(isinstance(beta, (Real, Tensor)) for beta in betas):
            raise InvalidTypeError(f"{type(self).__name__} takes two numbers in betas, not {betas!r}")
        if len(group["betas"]) != 2 or not all(0.0 <= beta < 1.0 for beta in group["betas"]):
            raise InvalidValueError(f"{type(self).__name__} takes two betas in [0, 1), not {group['betas']!r}")
        least = group["noise_correction"]
        if least is None:
            return
        real_of(type(self).__name__, "noise_correction", least, positive=True)
        if group["amsgrad"]:
            raise InvalidValueError(
                f"{type(self).__name__}: amsgrad keeps the largest second moment, whose part of noise is not known: "
                f"leave amsgrad or noise_correction out"
            )

    def _tensor(self, group: dict[str, Any], param: Tensor, total: Tensor | None, noise: float) -> StepTensor:
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
        if group["noise_correction"] is not None:
            # The same running mean of the noise's variance as the second moment is of squared gradients.
            variance = beta2 * float(state.get("noise_variance", 0.0)) + (1.0 - beta2) * noise * noise
            state["noise_variance"] = torch.tensor(variance, dtype=torch.float64)
            constants = constants._replace(
                noise_square=variance / (1.0 - beta2**count), least_square=float(group["noise_correction"])
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
        noise_correction: float | None = None,
        ema_decay: float | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            noise_correction=noise_correction,
            ema_decay=ema_decay,
            master_weights=master_weights,
            stochastic_rounding=stochastic_rounding,
        )


def _sign(group: dict[str, Any]) -> float:
    return -1.0 if group["maximize"] else 1.0
