# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments that the public functions share: each says whose argument is wrong, and what it takes."""

import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from wavedp.errors import InvalidTypeError, InvalidValueError

_FACTORS = {"ortho": (0.5, 0.5), "mean": (0.25, 1.0)}


def factor_of(op: str, norm: str, *, inverse: bool = False) -> float:
    """The factor of a level under ``norm``: ``"ortho"`` keeps the sum of squares, ``"mean"`` the mean."""
    factors = _FACTORS.get(norm)
    if factors is None:
        raise InvalidValueError(f"{op} takes norm 'ortho' or 'mean', not {norm!r}")
    return factors[inverse]


def check_tensor(op: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise InvalidTypeError(f"{op} takes torch tensors, not {described(x)}")
    if x.layout != torch.strided:
        raise InvalidTypeError(f"{op} takes dense tensors, not {x.layout}: convert it by .to_dense()")


def check_level(op: str, level: Any, name: str = "level") -> int:
    if isinstance(level, bool) or not hasattr(level, "__index__"):
        raise InvalidTypeError(f"{op} takes an integer {name}, not {level!r}")
    if level < 0:
        raise InvalidValueError(f"{op} takes a {name} of at least 0, not {level}")
    return operator.index(level)


def size_of(op: str, size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise InvalidValueError(f"{op} takes output_size (H, W), not {size!r}")
    if not all(isinstance(n, (int, torch.SymInt)) or hasattr(n, "__index__") for n in size):
        raise InvalidTypeError(f"{op} takes integers in output_size (H, W), not {tuple(size)!r}")
    return size[0], size[1]


def result_type(op: str, dtype: Any) -> torch.dtype | None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InvalidTypeError(f"{op} takes a floating-point dtype of the result, not {dtype!r}")
    return dtype


def affine_of(op: str, x: Tensor, affine: Any) -> tuple[float, float]:
    """The gain and bias that make a sample of a byte: 1/255 and 0 unless given."""
    if x.dtype != torch.uint8:
        if affine is not None:
            raise InvalidValueError(f"{op} takes affine=(gain, bias) for uint8 images alone, but these are {x.dtype}")
        return 1.0, 0.0
    if affine is None:
        return 1 / 255, 0.0
    if not isinstance(affine, (tuple, list)) or len(affine) != 2:
        raise InvalidValueError(f"{op} takes affine (gain, bias), not {affine!r}")
    if not all(isinstance(number, Real) for number in affine):
        raise InvalidTypeError(f"{op} takes two numbers in affine (gain, bias), not {tuple(affine)!r}")
    if not all(math.isfinite(number) for number in affine):
        raise InvalidValueError(f"{op} takes finite numbers in affine (gain, bias), not {tuple(affine)!r}")
    return float(affine[0]), float(affine[1])


def same_kind(op: str, tensors: Sequence[Tensor]) -> None:
    """Raises unless all have one dtype and one device."""
    first = tensors[0]
    dtype, device = first.dtype, first.device
    for other in tensors[1:]:
        if other.dtype is not dtype or other.device != device:
            raise InvalidValueError(
                f"the bands of {op} must agree in dtype and device, but one is {first.dtype} on {first.device} "
                f"and another {other.dtype} on {other.device}"
            )


def described(value: Any) -> str:
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, (tuple, list)) else "")
