# SPDX-License-Identifier: Apache-2.0
"""The node behind each use of a booked parameter, and the two ways to take what it sees in a backward."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from wavedp.errors import StateError
from wavedp.privacy.bookings import Bookings, Factors
from wavedp.privacy.layers import Call
from wavedp.privacy.probe import Place


class Taker(Protocol):
    """Takes what the taps see during one backward."""

    def take(self, place: Place, call: Call) -> None: ...


class Tap(torch.autograd.Function):
    """The identity in the forward; hands a use's input and output gradient over in the backward."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, anchor: Tensor, inputs: Tensor, seen: Callable[[Place, Call], None], place: Place
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.seen, ctx.place = seen, place
        if output._is_view():
            # Another tensor of the same memory, which autograd does not take for a view: an in-place activation may
            # follow, and the operation behind a view has not kept its result.
            unaliased: Tensor = torch.ops.aten._unsafe_view(output, output.shape)
            return unaliased
        ctx.mark_dirty(output)  # the result is then no view, and an in-place activation may follow
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (inputs,) = ctx.saved_tensors
        ctx.seen(ctx.place, Call(inputs, grads[0]))
        return grads[0], None, None, None, None


_apply: Any = super(torch.autograd.Function, Tap).apply


def put_tap(
    output: Tensor, anchor: Tensor, inputs: Tensor, seen: Callable[[Place, Call], None], place: Place
) -> Tensor:
    """``output`` with a :class:`Tap` behind it, that hands ``inputs`` and the output's gradient to ``seen``."""
    # What torch does for transforms in front of every call takes as long as the call.
    apply = Tap.apply if torch._C._are_functorch_transforms_active() else _apply
    tapped: Tensor = apply(output, anchor, inputs, seen, place)
    return tapped


class Booking:
    """Turns uses into per-record gradients.

    Args:
        bookings: where they are added.
        gradients: turns a use at a place into forms by parameter name, with whether each is the parameter's only
            use in this backward.
        min_axes: axes that an input at a place has when it has a record axis and no token axis.
        is_verified: whether it is known that a place keeps records apart.
        rows: rows of every input; that of the first if ``None``.
    """

    def __init__(
        self,
        bookings: Bookings,
        gradients: Callable[[Place, Call], Iterator[tuple[str, Any, bool]]],
        min_axes: Callable[[Place], int],
        is_verified: Callable[[Place], bool],
        rows: int | None = None,
    ) -> None:
        self.bookings = bookings
        self.unverified: set[Place] = set()
        bookings.rows = rows
        self._gradients = gradients
        self._min_axes = min_axes
        self._is_verified = is_verified
        self._is_exact: bool | None = None

    def take(self, place: Place, call: Call) -> None:
        bookings = self.bookings
        if bookings.rows is None and call.inputs.ndim:
            bookings.rows = len(call.inputs)
        check_record_axis(place, call, bookings.rows or 0, self._min_axes(place))
        if not self._is_verified(place) and nonzero(call.output_grads):
            self.unverified.add(place)
        if self._is_exact is None:  # the same all through a backward
            self._is_exact = exact_arithmetic() is _NOTHING
        if self._is_exact:
            self._book(place, call)
        else:
            with exact_arithmetic():
                self._book(place, call)

    def _book(self, place: Place, call: Call) -> None:
        bookings = self.bookings
        if bookings.record_map is not None:
            bookings.record_map.check_rows(bookings.rows or 0)
            call = Call(call.inputs, bookings.record_map.weighted(call.output_grads))
        for name, form, alone in self._gradients(place, call):
            bookings.add(name, form, alone=alone)


class Summing:
    """Adds up, in a second backward of what was booked, the clipped gradients of parameters that were left for it."""

    def __init__(
        self,
        bookings: Bookings,
        factors: Factors,
        gradients: Callable[[Place, Call], Iterator[tuple[str, Any, bool]]],
    ) -> None:
        self.sums: dict[str, Tensor] = {}
        self._bookings = bookings
        self._factors = factors
        self._gradients = gradients

    def take(self, place: Place, call: Call) -> None:
        record_map = self._bookings.record_map
        with torch.no_grad(), exact_arithmetic():
            if record_map is not None:
                call = Call(call.inputs, record_map.weighted(call.output_grads))
            for name, form, _ in self._gradients(place, call):
                if name in self._bookings.left:
                    if name in self.sums:
                        raise StateError(f"parameter {name!r} was used once in the first backward and twice in this")
                    form = self._bookings.of_records(form)
                    self._bookings.check_same_norms(name, form)
                    self.sums[name] = self._factors.clipped_sum(name, form)


class Look:
    """Looks whether rows outside a part of the batch receive a gradient when only the part is differentiated."""

    def __init__(self, outside: Tensor, min_axes: Callable[[Place], int]) -> None:  # [rows] bool
        self.reached: set[Place] = set()
        self._outside = outside
        self._min_axes = min_axes

    def take(self, place: Place, call: Call) -> None:
        check_record_axis(place, call, len(self._outside), self._min_axes(place))
        if nonzero(call.output_grads[self._outside.to(call.output_grads.device)]):
            raise StateError(
                f"layer {place[0]!r}: the losses of some records depend on rows of other records, so no record's "
                f"contribution can be bounded; give every booked layer an input whose first axis is the record "
                f"axis, in the order of the losses (expand shared inputs such as position ids to [B, T]), and "
                f"remove what mixes records (batch statistics, in-batch negatives)"
            )
        if nonzero(call.output_grads):
            self.reached.add(place)


def check_record_axis(place: Place, call: Call, rows: int, min_axes: int) -> None:
    if call.inputs.ndim < min_axes or call.inputs.shape[0] != rows:
        raise StateError(
            f"layer {place[0]!r} got an input of shape {tuple(call.inputs.shape)} for {rows} losses: its "
            f"first axis must be the record axis; expand inputs that records share (position ids to [B, "
            f"T]) and keep records apart from tokens ([B, T, d], not [B * T, d])"
        )


def nonzero(x: Tensor) -> bool:
    """Whether ``x`` has a finite entry other than 0; a non-finite record spreads NaN where nothing flows."""
    return bool(((x != 0) & torch.isfinite(x)).any())


_NOTHING: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
_has_cuda = functools.cache(torch.cuda.is_available)
_precision: Any = getattr(
    torch._C, "_get_fp32_precision_getter", None
)  # what the flags below read, at a tenth of the time
_PRODUCTS = (("generic", "all"), ("mkldnn", "matmul"), ("mkldnn", "conv"))


def exact_arithmetic() -> contextlib.AbstractContextManager[object]:
    """Keep norms and sums in full float32: no autocast, no TF32, no bfloat16 inside float32 products."""
    autocast = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    if not hasattr(torch.backends, "fp32_precision"):  # torch < 2.9
        if not autocast and torch.get_float32_matmul_precision() == "highest":
            return _NOTHING
        return _exact(autocast, [])
    if _precision is not None and not (autocast or _has_cuda()) and _are_exact():
        return _NOTHING
    backends: Any = torch.backends
    products = [backends.mkldnn.matmul, backends.mkldnn.conv]
    if _has_cuda():
        products += [backends.cuda.matmul, backends.cudnn.conv]
    inexact = [flags for flags in products if flags.fp32_precision != "ieee"]
    # "none" is what is set for all.
    exact_by_default = backends.fp32_precision in ("none", "ieee") and all(f.fp32_precision == "none" for f in inexact)
    if exact_by_default and not autocast:
        return _NOTHING
    return _exact(autocast, inexact)


def _are_exact() -> bool:
    return all(_precision(backend, op) in ("none", "ieee") for backend, op in _PRODUCTS)


@contextlib.contextmanager
def _exact(autocast: Sequence[str], products: Sequence[Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for kind in autocast:
            stack.enter_context(torch.autocast(kind, enabled=False))
        for flags in products:
            stack.callback(setattr, flags, "fp32_precision", flags.fp32_precision)
            flags.fp32_precision = "ieee"
        if not hasattr(torch.backends, "fp32_precision"):
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        yield
