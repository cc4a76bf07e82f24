# SPDX-License-Identifier: Apache-2.0
"""From one image size to another: which models to chain, and how to finish when no chain fits."""

import warnings
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from wavedp.errors import InvalidValueError
from wavedp.superres.base import SuperResolver, check_positive
from wavedp.superres.chain import Chain, Resized
from wavedp.superres.registry import load
from wavedp.superres.swin2sr import DEFAULT_PATHS

Size = int | tuple[int, int]
Stage = str | SuperResolver


def to_size(
    spec: Stage | Sequence[Stage],
    from_size: Size,  # height and width, or the side of a square
    to_size: Size,
    **options: Any,
) -> SuperResolver:
    """A super-resolver that enlarges images of ``from_size`` to exactly ``to_size``.

    ``spec`` is a name or a built resolver, used as often as its scale fits (a swin2sr asked for x8: x4, then
    x2), or several, as a list or joined by ``+`` (``"ldm-4x+swin2sr"``), each used at most once and in that
    order. A name with more than one scale takes the largest that fits. ``options`` (path, device, dtype, ...)
    go to `load`; several names share only ``device`` and ``dtype``.

    A stage fits if it does not go beyond the wanted factor. What the stages leave is a bicubic enlargement.
    If none fits (an x4 model asked for x2), the first is used once and its result shrunk by the area mean.
    Both give a UserWarning, except for ``"bicubic"``, which is such a resize anyway.

    Raises ValueError for sizes that shrink or change the aspect ratio.
    """
    source, target = _pair(from_size), _pair(to_size)
    factor = Fraction(target[0], source[0])
    if factor < 1 or Fraction(target[1], source[1]) != factor:
        raise InvalidValueError(f"super-resolution enlarges at a fixed aspect ratio; {source} to {target} does not")
    stages = _stages(spec, factor, options)
    chain = stages[0] if len(stages) == 1 else Chain(stages)
    if chain.scale == factor:
        return chain
    if spec not in ("bicubic", ["bicubic"]):
        rest = factor / chain.scale
        how = f"an area mean, factor {rest}" if rest < 1 else f"a bicubic enlargement, factor {rest}"
        warnings.warn(
            f"the scales of {spec!r} make x{chain.scale} where x{factor} is wanted ({source} to {target}); "
            f"the rest is {how}",
            stacklevel=2,
        )
    return Resized(chain, source, target)


def _pair(size: Size) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return check_positive("a height", height), check_positive("a width", width)


def _stages(spec: Stage | Sequence[Stage], factor: Fraction, options: dict[str, Any]) -> list[SuperResolver]:
    if factor == 1:
        return []
    items = _items(spec)
    if not items:
        raise InvalidValueError("name at least one super-resolver")
    if items == ["bicubic"] and factor.denominator != 1:
        return []
    unshared = sorted(set(options) - {"device", "dtype"})
    if unshared and len(items) > 1:
        raise InvalidValueError(
            f"{', '.join(unshared)} cannot be shared by {len(items)} models; load them first and pass them"
        )
    models = [_Model(item, options) for item in items]
    stages: list[SuperResolver] = []
    remaining = factor
    for model in models:
        while remaining > 1 and (stage := model.at_most(remaining)).scale <= remaining:
            stages.append(stage)
            remaining /= stage.scale
            if len(models) > 1:
                break
    return stages or [models[0].at_most(factor)]


def _items(spec: Stage | Sequence[Stage]) -> list[Stage]:
    if isinstance(spec, str):
        return [*spec.split("+")]
    return [spec] if isinstance(spec, SuperResolver) else [*spec]


class _Model:
    """A stage's model, loaded once per scale."""

    def __init__(self, item: Stage, options: dict[str, Any]) -> None:
        self.item, self.options = item, options
        self.loaded: dict[int | None, SuperResolver] = {}

    def at_most(self, factor: Fraction) -> SuperResolver:
        """The model with its largest scale up to ``factor``; with its smallest if even that is larger."""
        if isinstance(self.item, SuperResolver):
            return self.item
        scale = self._choice(max(2, int(factor)))
        if scale not in self.loaded:
            chosen = {} if scale is None else {"scale": scale}
            self.loaded[scale] = load(self.item, **{**chosen, **self.options})
        return self.loaded[scale]

    def _choice(self, limit: int) -> int | None:
        """The scale to ask for; None leaves it to the weights."""
        if "scale" in self.options:
            return None
        if self.item == "bicubic":
            return limit
        if self.item == "haar":
            return 1 << (limit.bit_length() - 1)
        if self.item == "swin2sr" and not {"path", "pipeline"} & set(self.options):
            return max((scale for scale in DEFAULT_PATHS if scale <= limit), default=min(DEFAULT_PATHS))
        return None
