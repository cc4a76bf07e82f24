# SPDX-License-Identifier: Apache-2.0
"""``DWTForward`` and ``DWTInverse`` of pytorch_wavelets 1.3, for the Haar wavelet.

Layout: ``(Yl, Yh)``, ``Yh`` finest level first, ``Yh[j]`` holding LH, HL, HH (PyWavelets' cH, cV, cD) on an axis of
its own before the rows and columns. ``docs/compat.md`` lists what differs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wavedp import functional
from wavedp.compat import haar
from wavedp.errors import InvalidValueError

__all__ = ["DWT", "DWT2D", "IDWT", "IDWT2D", "DWTForward", "DWTInverse"]

MODES = (
    "zero",
    "constant",
    "symmetric",
    "periodization",
    "per",
    "periodic",
    "reflect",
    "antisymmetric",
    "smooth",
    "antireflect",
)
"""Modes of :func:`wavedp.wavedec2`, and pytorch_wavelets' short name of periodization."""

# The original's buffers, its prefix ("h" or "g") left out. Its convolution takes the decomposition filters reversed,
# which makes them the reconstruction filters.
_BUFFERS = {
    "0_col": (haar.REC_LO, (1, 1, 2, 1)),
    "1_col": (haar.REC_HI, (1, 1, 2, 1)),
    "0_row": (haar.REC_LO, (1, 1, 1, 2)),
    "1_row": (haar.REC_HI, (1, 1, 1, 2)),
}


class _HaarModule(nn.Module):
    """The filters of the original as buffers, so that checkpoints go both ways. The transform reads none of them."""

    _PREFIX: str  # of the buffers' names

    def __init__(self, wave: Any, mode: str, lo: Sequence[float], hi: Sequence[float]) -> None:
        super().__init__()
        four = isinstance(wave, (tuple, list)) and len(wave) == 4
        haar.check_wavelet("pytorch_wavelets", wave, (lo, hi, lo, hi) if four else (lo, hi))
        if mode not in MODES:
            raise InvalidValueError(f"unknown mode {mode!r}; choose from {', '.join(MODES)}")
        self.mode = mode
        for name, (taps, shape) in _BUFFERS.items():
            self.register_buffer(self._PREFIX + name, torch.tensor(taps).reshape(shape))

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        *_, error_msgs = lists
        for name, (taps, _) in _BUFFERS.items():
            key = prefix + self._PREFIX + name
            loaded = state_dict.get(key)
            if loaded is not None and not loaded.is_meta and not haar.is_filter(loaded, taps):
                error_msgs.append(
                    f"{key} is the filter of another wavelet, and {type(self).__name__} of wavedp.compat "
                    "computes Haar: a model trained with another wavelet needs pytorch_wavelets itself."
                )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)


class DWTForward(_HaarModule):
    """``J`` levels of the two-dimensional Haar transform.

    Args:
        J: number of levels; 0 gives the image and an empty list.
        wave: ``"haar"``, ``"db1"`` or the same wavelet as a ``pywt.Wavelet`` or as a tuple ``(h0, h1)`` or
            ``(h0_col, h1_col, h0_row, h1_row)`` of its decomposition filters.
        mode: what completes an axis of odd length: a mode of :func:`wavedp.wavedec2`, or ``"per"`` for
            ``"periodization"``.

    Raises:
        ValueError: another wavelet, or an unknown mode.
    """

    _PREFIX = "h"

    def __init__(self, J: int = 1, wave: Any = "db1", mode: str = "zero") -> None:
        super().__init__(wave, mode, haar.DEC_LO, haar.DEC_HI)
        self.J = J

    def forward(
        self,
        x: Tensor,  # [N, C, H, W], or any leading axes
    ) -> tuple[Tensor, list[Tensor]]:  # Yl [N, C, ceil(H/2^J), ...]; Yh[j] [N, C, 3, ceil(H/2^(j+1)), ...]
        """Yl and Yh in the dtype of ``x``. Each is contiguous.

        Raises:
            TypeError, ValueError: as :func:`wavedp.wavedec2`.
        """
        coeffs: list[Any] = functional.wavedec2(x, self.J, "periodization" if self.mode == "per" else self.mode)
        yl, *details = coeffs
        if details:
            yl = yl.clone()  # alone it would keep the memory of the details
        return yl, [torch.stack(bands, -3) for bands in reversed(details)]

    def extra_repr(self) -> str:
        return f"J={self.J}, mode={self.mode!r}"


class DWTInverse(_HaarModule):
    """Inverse of :class:`DWTForward`.

    Args:
        wave: as for :class:`DWTForward`; in a tuple, the reconstruction filters.
        mode: as for :class:`DWTForward`. The inverse is the same in all.

    Raises:
        ValueError: another wavelet, or an unknown mode.
    """

    _PREFIX = "g"

    def __init__(self, wave: Any = "db1", mode: str = "zero") -> None:
        super().__init__(wave, mode, haar.REC_LO, haar.REC_HI)

    def forward(
        self,
        coeffs: tuple[Tensor, Sequence[Tensor | None]],  # (Yl, Yh), Yh finest first
        output_size: Sequence[int] | None = None,
    ) -> Tensor:  # [N, C, H, W]
        """The image. An odd size comes back one larger, unless ``output_size=(H, W)`` asks for it.

        None in Yh stands for a level of zeros, which is neither allocated nor read. An approximation one larger
        than its details, as odd sizes make it, is cut to them.

        Raises:
            TypeError: as :func:`wavedp.waverec2`.
            ValueError: ``coeffs`` is not such a pair; else as :func:`wavedp.waverec2`.
        """
        if not isinstance(coeffs, (tuple, list)) or len(coeffs) != 2 or not isinstance(coeffs[1], (tuple, list)):
            raise InvalidValueError("DWTInverse takes a pair (Yl, Yh), Yh being a list with the finest level first")
        yl, yh = coeffs
        details = [_bands(j, level) for j, level in reversed(list(enumerate(yh)))]
        return functional.waverec2([yl, *details], output_size=output_size)

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}"


def _bands(j: int, level: Tensor | None) -> tuple[Tensor | None, ...]:
    if level is None:
        return None, None, None
    if level.ndim < 3 or level.shape[-3] != 3:
        raise InvalidValueError(
            f"Yh[{j}] is [N, C, 3, h, w] with LH, HL, HH on its third last axis, not {list(level.shape)}"
        )
    return level.unbind(-3)


DWT = DWT2D = DWTForward
IDWT = IDWT2D = DWTInverse
