# SPDX-License-Identifier: Apache-2.0
"""Taps inside compiled graphs: two ops that ``torch.compile`` keeps as they are, for a layer's forward and backward.

``wavedp::tap`` copies what it is given; its gradient is ``wavedp::book``, which hands copies to the book: a compiled
graph may overwrite its own tensors once the op has run. Both are about a place by number.
"""

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from wavedp.privacy.layers import Call
from wavedp.privacy.probe import Place


class Booker(Protocol):
    """What a tap tells of forwards and backwards."""

    def note(self, place: Place) -> None: ...

    def seen(self, place: Place, call: Call) -> None: ...


_library = torch.library.Library("wavedp", "FRAGMENT")
_library.define("tap(Tensor output, Tensor anchor, Tensor inputs, int number) -> Tensor")
_library.define("book(Tensor output_grads, Tensor inputs, int number) -> Tensor")

_numbers = itertools.count()
_bookers: "weakref.WeakValueDictionary[int, Booker]" = weakref.WeakValueDictionary()
_uses: dict[int, tuple[str, str]] = {}


def register(booker: Booker, path: str, use: str) -> int:
    """Return the number under which a use of a layer is known; it is forgotten with the booker."""
    number = next(_numbers)
    _bookers[number] = booker
    _uses[number] = (path, use)
    weakref.finalize(booker, _uses.pop, number, None)
    return number


def prepare_compiler() -> None:
    """Set what graphs that are compiled from now on need, in this process.

    Their backward may run more than once, as the look between records does, and equal uses of a layer stay two: one
    tap in place of both would book half of the gradient.
    """
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False
    torch._functorch.config.cse = False


def tap(output: Tensor, anchor: Tensor, inputs: Tensor, number: int) -> Tensor:
    """Put a tap behind ``output``; ``anchor`` makes autograd reach it."""
    tapped: Tensor = torch.ops.wavedp.tap(output, anchor, inputs.detach(), number)
    return tapped


def _tap(output: Tensor, anchor: Tensor, inputs: Tensor, number: int) -> Tensor:
    path, use = _uses[number]
    _bookers[number].note((path, use, inputs.ndim))
    return output.clone()


def _book(output_grads: Tensor, inputs: Tensor, number: int) -> Tensor:
    path, use = _uses[number]
    _bookers[number].seen((path, use, inputs.ndim), Call(inputs.clone(), output_grads.clone()))
    return output_grads.new_zeros(())


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])
    ctx.number = inputs[3]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    (inputs,) = ctx.saved_tensors
    return grad, torch.ops.wavedp.book(grad, inputs, ctx.number), None, None


for device in ("CPU", "CUDA"):
    _library.impl("tap", _tap, device)
    _library.impl("book", _book, device)
torch.library.register_fake(
    "wavedp::tap", lambda output, anchor, inputs, number: torch.empty_like(output), lib=_library
)
torch.library.register_fake(
    "wavedp::book", lambda output_grads, inputs, number: output_grads.new_empty(()), lib=_library
)
torch.library.register_autograd("wavedp::tap", _backward, setup_context=_setup, lib=_library)
