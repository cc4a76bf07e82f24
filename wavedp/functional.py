# SPDX-License-Identifier: Apache-2.0
"""Public functions on tensors: the Haar transform with PyWavelets' names, order, signs and modes, and its tokens.

``docs/wavelets.md`` is the user's page. All functions take ``[..., H, W]`` tensors of float16, bfloat16, float32 or
float64 with any strides on any device, keep the dtype (half precision is computed in float32 through all levels and
rounded once), and can be differentiated any number of times.

``norm="ortho"`` is the orthonormal transform. With ``norm="mean"`` the approximation is the mean of its block and a
detail the mean of its block under the detail's signs: 2^-k times the orthonormal band of level k.

``out=`` takes tensors for the results, in the structure in which they are returned, and returns them. They have the
shapes, dtype and device of the results and no memory in common with the input; contiguous ones are written
directly, so that nothing is allocated. As in PyTorch, no argument may require grad then (``RuntimeError``).
"""

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from wavedp.errors import InvalidValueError
from wavedp.noise import (
    GRID_BITS,
    MAX_DEVIATION,
    MAX_STRICT_DEVIATION,
    STRICT_ANGLE_BITS,
    STRICT_GRID_BITS,
    STRICT_NORMAL_ERROR,
    STRICT_RADIUS_BITS,
    NoiseKey,
    add_gaussian_noise_,
    chacha20_words,
    gaussian_noise,
    grid_step,
    noisy_mean,
)
from wavedp.ops import wavelet_autograd
from wavedp.ops.arguments import (
    affine_of,
    check_level,
    check_tensor,
    described,
    factor_of,
    result_type,
    same_kind,
    size_of,
)
from wavedp.ops.eager import are_plain_alike, is_plain
from wavedp.ops.out import check_out
from wavedp.ops.wavelet import (
    band_shapes,
    check_dtype,
    check_image,
    compute_wavedec2,
    compute_waverec2_of,
    result_dtype,
)
from wavedp.per_sample import (
    clip_and_sum,
    clip_factors,
    embedding_grad_norm,
    ghost_norm,
    per_sample_norm,
    scaled_weight_grad,
)
from wavedp.tokens import wavelet_tokens, wavelet_untokens

Details: TypeAlias = tuple[Tensor, Tensor, Tensor]

__all__ = [
    "GRID_BITS",
    "MAX_DEVIATION",
    "MAX_STRICT_DEVIATION",
    "STRICT_ANGLE_BITS",
    "STRICT_GRID_BITS",
    "STRICT_NORMAL_ERROR",
    "STRICT_RADIUS_BITS",
    "NoiseKey",
    "add_gaussian_noise_",
    "chacha20_words",
    "clip_and_sum",
    "clip_factors",
    "coarse",
    "dwt2",
    "embedding_grad_norm",
    "gaussian_noise",
    "ghost_norm",
    "grid_step",
    "idwt2",
    "noisy_mean",
    "per_sample_norm",
    "scaled_weight_grad",
    "wavedec2",
    "wavelet_tokens",
    "wavelet_untokens",
    "waverec2",
]


def dwt2(
    x: Tensor,  # [..., H, W]
    mode: str = "symmetric",
    *,
    norm: str = "ortho",
    out: Any = None,
) -> tuple[Tensor, Details]:  # (cA, (cH, cV, cD)), each [..., ceil(H/2), ceil(W/2)]
    """One level of the two-dimensional Haar transform, as ``pywt.dwt2(x, "haar", mode)``.

    A block ``[[a, b], [c, d]]`` gives ``cA = (a+b+c+d)/2``, ``cH = (a+b-c-d)/2``, ``cV = (a-b+c-d)/2`` and
    ``cD = (a-b-c+d)/2``; with ``norm="mean"``, half of each. The bands are contiguous views of one allocation.

    Args:
        x: images, at least 1 x 1.
        mode: what completes an axis of odd length: ``"zero"``, ``"constant"``, ``"symmetric"``,
            ``"periodization"``, ``"periodic"``, ``"reflect"``, ``"antisymmetric"``, ``"smooth"`` or
            ``"antireflect"``. Even sizes are the same in all.
        norm: ``"ortho"`` or ``"mean"``.
        out: ``(cA, (cH, cV, cD))`` to write to.

    Raises:
        TypeError: ``x`` is not a tensor of one of the four dtypes, or ``out`` does not hold such tensors.
        ValueError: ``x`` has fewer than two axes or an empty image, the mode or the norm is unknown, a reflecting
            mode meets an axis of one sample, or ``out`` does not fit.
    """
    ll, lh, hl, hh = _decomposed("dwt2", x, 1, mode, norm, out)
    return ll, (lh, hl, hh)


def idwt2(
    coeffs: tuple[Tensor | None, Sequence[Tensor | None]],  # (cA, (cH, cV, cD)), each [..., h, w]
    *,
    output_size: Sequence[int] | None = None,
    norm: str = "ortho",
    out: Tensor | None = None,
) -> Tensor:  # [..., 2 h, 2 w], or [..., *output_size]
    """Inverse of :func:`dwt2`, as ``pywt.idwt2(coeffs, "haar")``.

    Args:
        coeffs: the bands; None stands for a band of zeros, at least one is given.
        output_size: ``(H, W)`` of the image, to have an odd size back: each is twice the band's, or one less.
        norm: that of the transform.
        out: a tensor to write to.

    Raises:
        TypeError: a band is not a tensor of one of the four dtypes.
        ValueError: ``coeffs`` is not such a pair, the bands differ in shape, dtype or device, all are None, or
            ``output_size`` or ``out`` does not fit them.
    """
    if not isinstance(coeffs, (tuple, list)) or len(coeffs) != 2:
        raise InvalidValueError(f"idwt2 takes (cA, (cH, cV, cD)), not {described(coeffs)}")
    bands = [coeffs[0], *_details("idwt2", coeffs[1])]
    return _composed("idwt2", bands, output_size, norm, out)


def wavedec2(
    x: Tensor,  # [..., H, W]
    level: int,
    mode: str = "symmetric",
    *,
    norm: str = "ortho",
    out: Any = None,
) -> list[Tensor | Details]:  # [cA_L, (cH_L, cV_L, cD_L), ..., (cH_1, cV_1, cD_1)]
    """``level`` levels of the two-dimensional Haar transform, as ``pywt.wavedec2(x, "haar", mode, level)``.

    The bands of level ``k`` are ``[..., ceil(H/2^k), ceil(W/2^k)]``, all of them contiguous views of one allocation
    in the order of the list. Level 0 gives ``[x]``. An axis that has come down to one sample stays at one and is
    completed by ``mode``, as in PyWavelets, which warns of it. The image is read once and each band written once;
    more than eight levels are computed eight at a time, from a copy in float32 where ``x`` is in half precision.

    Raises:
        TypeError: as :func:`dwt2`, or ``level`` is not an integer.
        ValueError: as :func:`dwt2` at any level, or ``level`` is negative.
    """
    bands = iter(_decomposed("wavedec2", x, level, mode, norm, out))
    return [next(bands), *zip(bands, bands, bands)]


def waverec2(
    coeffs: Sequence[Tensor | Sequence[Tensor | None]],  # [cA_L, (cH_L, cV_L, cD_L), ..., (cH_1, cV_1, cD_1)]
    *,
    output_size: Sequence[int] | None = None,
    norm: str = "ortho",
    out: Tensor | None = None,
) -> Tensor:  # [..., H, W]
    """Inverse of :func:`wavedec2`, as ``pywt.waverec2(coeffs, "haar")``.

    An approximation that is one row or column larger than its details, as odd sizes make it, is cut to them.

    Args:
        coeffs: coarsest first; None stands for a band of zeros among the details.
        output_size: ``(H, W)`` of the image, to have an odd size back; without it the last sizes are even.
        norm: that of the transform.
        out: a tensor to write to.

    Raises:
        TypeError: a band is not a tensor of one of the four dtypes.
        ValueError: ``coeffs`` is not such a list, its bands do not fit together, or ``output_size`` or ``out`` does
            not fit them.
    """
    if not isinstance(coeffs, (tuple, list)) or len(coeffs) == 0:
        raise InvalidValueError(f"waverec2 takes [cA, (cH, cV, cD), ...], not {described(coeffs)}")
    if coeffs[0] is None:
        check_tensor("waverec2", None)
    bands = [coeffs[0]]
    for details in coeffs[1:]:
        bands += details if type(details) is tuple and len(details) == 3 else _details("waverec2", details)
    return _composed("waverec2", bands, output_size, norm, out)


def coarse(
    x: Tensor,  # [..., H, W], uint8 too
    level: int,
    mode: str = "symmetric",
    *,
    norm: str = "ortho",
    affine: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:  # [..., ceil(H/2^level), ceil(W/2^level)]
    """The approximation band of :func:`wavedec2` alone: no detail is computed or written.

    It is 2^level times the mean of each block of 2^level x 2^level pixels, or with ``norm="mean"`` that mean;
    ``mode`` completes the blocks of an odd size.

    Args:
        x: images, at least 1 x 1.
        level: the number of halvings.
        mode, norm: as for :func:`dwt2`.
        affine: ``(gain, bias)`` for images of uint8: a sample is ``gain * x + bias`` in float32, before edges are
            completed. (1/255, 0) unless given.
        dtype: of the result: that of ``x``, or float32 for uint8, unless given.
        out: a tensor to write to.

    Raises:
        TypeError: as :func:`wavedec2`, or ``dtype`` is no floating-point type.
        ValueError: as :func:`wavedec2`, or ``affine`` is given for images that are not uint8.
    """
    check_tensor("coarse", x)
    check_dtype("coarse", x.dtype, or_bytes=True)
    level, factor = check_level("coarse", level), factor_of("coarse", norm)
    gain, bias = affine_of("coarse", x, affine)
    dtype = result_dtype(x, result_type("coarse", dtype))
    if out is not None:
        check_out("coarse", [out], band_shapes(x.shape, level)[:1], dtype, [x])
    if level > 0:
        return wavelet_autograd.coarse(x, level, mode, factor, gain, bias, dtype, out)
    check_image("coarse", x.shape, mode)
    if x.dtype == torch.uint8:
        x = x.float() * gain + bias
    return x.to(dtype) if out is None else out.copy_(x)


def _decomposed(op: str, x: Tensor, level: int, mode: str, norm: str, out: Any) -> list[Tensor]:
    """The bands of ``level`` levels as a flat list."""
    if type(level) is not int or level < 0:
        level = check_level(op, level)
    factor = factor_of(op, norm)
    if out is None and level > 0 and is_plain(x):
        return compute_wavedec2(x, level, mode, factor, op=op)
    check_tensor(op, x)
    check_dtype(op, x.dtype)
    outs: list[Tensor] | None = None
    if out is not None:
        outs = _flat(op, out, level)
        plain = check_out(op, outs, band_shapes(x.shape, level), x.dtype, [x])
        if plain and level > 0:
            return compute_wavedec2(x, level, mode, factor, outs, op)
    if level > 0:
        return wavelet_autograd.wavedec2(x, level, mode, factor, outs)
    check_image(op, x.shape, mode)
    return [x if outs is None else outs[0].copy_(x)]


def _flat(op: str, out: Any, level: int) -> list[Tensor]:
    """The tensors of ``out`` in the order of the bands, from the structure in which ``op`` returns them."""
    structure = "(cA, (cH, cV, cD))" if op == "dwt2" else f"[cA, (cH, cV, cD), ...] of {level} levels"
    if not isinstance(out, (tuple, list)) or len(out) != level + 1:
        raise InvalidValueError(f"out of {op} must be {structure}, not {described(out)}")
    flat = [out[0]]
    for details in out[1:]:
        if not isinstance(details, (tuple, list)) or len(details) != 3:
            raise InvalidValueError(f"out of {op} must be {structure}, but its details are {described(details)}")
        flat += details
    return flat


def _composed(op: str, bands: list[Any], output_size: Any, norm: str, out: Tensor | None) -> Tensor:
    """The image of a flat list of bands, of which at least one is given."""
    factor = factor_of(op, norm, inverse=True)
    size = None if output_size is None else size_of(op, output_size)
    given = [band for band in bands if band is not None]
    if not given:
        raise InvalidValueError(f"{op} takes at least one band that is not None")
    plain = are_plain_alike(given)
    if not plain:
        for band in given:
            check_tensor(op, band)
        same_kind(op, given)
        plain = is_plain(*given)
    check_dtype(op, given[0].dtype)
    if len(bands) == 1:
        return _of_no_level(op, given[0], size, out)
    shapes = tuple([None if band is None else band.shape for band in bands])
    height, width, cut = (_cached_fit if plain else _fit)(op, shapes, size)
    if cut is not None:
        bands[0] = bands[0][..., : cut[0], : cut[1]]
    if out is not None:
        plain = check_out(op, [out], [(*given[0].shape[:-2], height, width)], given[0].dtype, given)
    if plain:
        return compute_waverec2_of(bands, given[0], height, width, "zero", factor, out)
    return wavelet_autograd.waverec2(bands, height, width, "zero", factor, out)


def _of_no_level(op: str, approximation: Tensor, size: tuple[int, int] | None, out: Tensor | None) -> Tensor:
    if size is not None and size != tuple(approximation.shape[-2:]):
        raise InvalidValueError(f"{op} of no level gives the size {tuple(approximation.shape[-2:])} of cA, not {size}")
    if out is None:
        return approximation
    check_out(op, [out], [approximation.shape], approximation.dtype, [approximation])
    return out.copy_(approximation)


_Shape: TypeAlias = Sequence[int] | None


def _fit(
    op: str, shapes: Sequence[_Shape], output_size: tuple[int, int] | None
) -> tuple[int, int, tuple[int, int] | None]:
    """The size of the image that bands of these shapes make, and the size to which the approximation is cut, if any.

    A size that no band and no ``output_size`` tells is twice that of the level below."""
    levels = len(shapes) // 3
    details = [_common(op, shapes[k : k + 3]) for k in range(1, len(shapes), 3)]  # of levels L to 1
    shape, cut = shapes[0], None
    if shape is None:
        shape = details[0]
    elif op == "waverec2" and details[0] is not None and len(shape) >= 2:
        wanted = details[0]
        height, width = (n - 1 if n == m + 1 else n for n, m in zip(shape[-2:], wanted[-2:]))
        if (height, width) != tuple(shape[-2:]):
            shape, cut = (*shape[:-2], height, width), (height, width)
    assert shape is not None  # one band of idwt2's four is there
    if len(shape) < 2:
        raise InvalidValueError(f"{op} takes bands [..., h, w], not a shape of {tuple(shape)}")
    for k in range(levels, 0, -1):
        shape = _common(op, (shape, details[levels - k]))
        assert shape is not None
        finer = details[levels - k + 1] if k > 1 else None
        if output_size is not None:
            # Halving and rounding up, once per remaining level.
            height, width = (-(-n // 2 ** (k - 1)) for n in output_size)
        elif finer is not None:
            height, width = finer[-2:]
        else:
            height, width = 2 * shape[-2], 2 * shape[-1]
        h, w = (height + 1) // 2, (width + 1) // 2
        if height < 1 or width < 1 or (h, w) != tuple(shape[-2:]):
            raise InvalidValueError(
                f"an image of {height} x {width} has bands of {h} x {w}, but these are {shape[-2]} x {shape[-1]}"
            )
        shape = (*shape[:-2], height, width)
    return shape[-2], shape[-1], cut


_cached_fit = functools.lru_cache(maxsize=4096)(_fit)


def _common(op: str, shapes: Sequence[_Shape]) -> _Shape:
    """The one shape of the bands that are there; None if none is."""
    first = None
    for shape in shapes:
        if first is None:
            first = shape
        elif shape is not None and tuple(shape) != tuple(first):
            raise InvalidValueError(
                f"the bands of {op} must agree in shape, but one is {tuple(first)} and another {tuple(shape)}"
            )
    return first


def _details(op: str, details: Any) -> Sequence[Tensor | None]:
    if not isinstance(details, (tuple, list)) or len(details) != 3:
        raise InvalidValueError(f"{op} takes details (cH, cV, cD), not {described(details)}")
    return details
