# SPDX-License-Identifier: Apache-2.0
"""Exact per-record clipped gradients from one backward pass, by book-keeping.

Layers that own trainable parameters run with those detached, and a tap behind each books (input, output
gradient) during the backward (Bu et al. 2022, "book-keeping"): autograd never computes a weight gradient,
so a parameter whose ``.grad`` fills was used along a path that is not booked, and that raises.
"""

import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from wavedp.errors import InvalidValueError, StateError
from wavedp.privacy import compiled
from wavedp.privacy.bookings import Bookings, Factors, RecordMap
from wavedp.privacy.clipping import Clipping
from wavedp.privacy.coverage import BookedLayer, booked_layers, saved_buffers, trainable_parameters
from wavedp.privacy.functional_uses import FunctionalUses
from wavedp.privacy.heap import keep_freed_memory
from wavedp.privacy.layers import Call, LayerRule
from wavedp.privacy.per_sample import PerSampleGradient
from wavedp.privacy.probe import IndependenceProbe, Place, rows_of_outputs
from wavedp.privacy.taps import Booking, Look, Summing, Taker, exact_arithmetic, put_tap

_BOOKED = "wavedp.privacy: booked"


class GradientBook:
    """Books a model's layers, from construction until :meth:`detach`.

    Use as a context manager, or call :meth:`detach`. While attached, a backward pass through the model is
    possible only inside :meth:`clipped_sums`, or with a listener; forwards under ``torch.no_grad`` run as always.

    Args:
        model: its trainable parameters belong to layers that :mod:`wavedp.privacy.rules` knows; any other
            layer may be there without trainable parameters, unless it mixes records.
        listener: called at the end of every other backward that reached a booked layer, with what it booked.
        two_backwards: take the norms in one backward and the sums in a second, in :meth:`clipped_sums` alone: output
            gradients are not kept, which saves as many bytes as the model's layers put out, for a third more time.

    Raises:
        ValueError: the model has something that cannot be booked exactly; nothing has been changed then.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        listener: Callable[[Bookings], None] | None = None,
        two_backwards: bool = False,
    ) -> None:
        if hasattr(model, "_orig_mod"):
            raise InvalidValueError(
                "the model is a compiled one: make the model itself private, and compile it afterwards"
            )
        if "forward" in vars(model):
            raise InvalidValueError(
                f"the {type(model).__name__} has a forward of its own (another GradientBook, or a library that wraps "
                f"models, is attached): detach it, or attach it afterwards"
            )
        self.model = model
        self._two_backwards = two_backwards
        self.parameters = trainable_parameters(model)
        self._layers: dict[str, BookedLayer] = booked_layers(model)
        self._in_layers = {name: booked.layer for name, booked in self._layers.items()}
        owners = Counter(name for booked in self._layers.values() for name in booked.names.values())
        self._tied = {name for name, count in owners.items() if count > 1}
        self._buffers = saved_buffers(model)
        self._listener = listener
        self._taker: Taker | None = None
        self._heard: tuple[int, Booking] | None = None  # the backward a listener waits for, by autograd's number
        self._runs: Counter[str] = Counter()  # uses of each layer since the last backward
        self._rows: int | None = None  # of the batch that the model's forward is running on
        self._has_mode = False  # whether that forward looks for functional uses
        self._anchor_of: dict[tuple[Place, torch.device], Tensor] = {}
        self._anchors: dict[tuple[Place, torch.device] | None, Tensor] = {}  # of taps since the model's forward began
        self._anchor = torch.zeros((), requires_grad=True)  # of the taps in compiled graphs
        self._probe = IndependenceProbe()
        self.sample_id: Tensor | None = None
        """[rows] int64, the record of each row, in the next backward that a listener waits for."""
        self.attached = True
        compiled.prepare_compiler()
        if any(parameter.device.type == "cpu" for parameter in self.parameters.values()):  # pragma: always here
            keep_freed_memory()
        # A checkpoint loaded into the attached model changes buffers without reading private data.
        self._load_hooks = [m.register_load_state_dict_post_hook(self._on_load) for m in model.modules()]
        for name, layer in self._in_layers.items():
            vars(layer)["forward"] = types.MethodType(self._tapped_forward(name), layer)
        vars(model)["forward"] = types.MethodType(self._watched_forward(), model)

    def __enter__(self) -> "GradientBook":
        return self

    def __deepcopy__(self, memo: object) -> "GradientBook":
        # Copies of the model, such as an average of its weights, carry the hooks along.
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Give every layer its own forward back; the book cannot be used afterwards."""
        if self.attached:
            self.attached = False
            for hook in self._load_hooks:
                hook.remove()
            for layer in [*self._in_layers.values(), self.model]:
                vars(layer).pop("forward", None)

    def clipped_sums(
        self,
        losses: Tensor,  # [B], one loss per row
        clipping: Clipping,
        *,
        sample_id: Tensor | None = None,  # [B] int64, the record of each row
    ) -> dict[str, Tensor]:
        """Run the backward of ``losses`` and return, by parameter name, the sums of clipped gradients.

        Row b of the losses, and of every booked layer's input, belongs to record b, or to record ``sample_id[b]``,
        whose loss is the mean over its rows. Sums have the parameter's shape, in float32 or float64; a parameter
        that the loss does not reach is missing. A record whose gradient is not finite contributes zero. On any error
        nothing stays booked.

        Gradients that flow between records are looked for, and refused, when a layer first gets a gradient and
        at the 1st, 2nd, 4th, 8th, ... backward of every kind of loss: a detector and not a proof, see
        :mod:`wavedp.privacy.probe`.

        Raises:
            ValueError: ``losses`` is not a vector of per-record losses with a graph.
            RuntimeError: a booked input's first axis is not the record axis; records influence each other; a
                parameter was reached along a path that is not booked; parameters or buffers changed.
        """
        self._check_before(losses)
        if losses.numel() == 0:
            return {}
        try:
            return self._backward(losses, clipping, None if sample_id is None else RecordMap(sample_id))
        finally:
            self.forget()

    def clip(self, bookings: Bookings, clipping: Clipping, *, scale: float = 1.0) -> dict[str, Tensor]:
        """The clipped sums of what was booked, every gradient times ``scale`` first; empties the bookings."""
        with torch.no_grad(), exact_arithmetic():
            return bookings.clipped_sums(self._factors(bookings, clipping, scale))

    def forget(self) -> None:
        """Drop what a backward left: a half-booked one, and gradients of paths that are not booked."""
        self._heard = None
        self.sample_id = None
        self._runs.clear()
        self._anchors.clear()
        for parameter in self.parameters.values():
            parameter.grad = None

    def check_nothing_unbooked(self) -> None:
        """Raise a RuntimeError if a trainable parameter holds a ``.grad``."""
        filled = [name for name, parameter in self.parameters.items() if parameter.grad is not None]
        if filled:
            raise StateError(
                f"parameters {filled} were used outside their own layer's forward (such as F.linear(h, "
                f"embedding.weight) in a method other than the model's forward), so their per-record gradients are "
                f"not known; call the layer itself, or freeze the parameter"
            )

    def _watched_forward(self) -> Callable[..., Any]:
        """The model's own forward, with functional uses of its parameters booked."""
        watched = self.model
        booked = self._tapped_forward("") if "" in self._layers else type(watched).forward

        def forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if model is not watched or not torch.is_grad_enabled():
                return type(model).forward(model, *args, **kwargs)
            if torch.compiler.is_compiling():  # pragma: compiled graph
                return self._look_compiled(booked(model, *args, **kwargs))
            self._anchors.clear()
            self._rows = next((len(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim), None)
            try:
                with FunctionalUses(self.parameters, self._tap_functional):
                    self._has_mode = True
                    output = booked(model, *args, **kwargs)
            finally:
                self._rows, self._has_mode = None, False
            if self._listener is not None:
                self._look_at(output)
            return output

        return forward

    def _tapped_forward(self, path: str) -> Callable[..., Any]:
        layer, rule, names = self._layers[path]
        owned = {key: self.parameters[name] for key, name in names.items() if "." not in key}
        numbers = {"": compiled.register(self, path, "")}  # before anything is compiled, which cannot register
        is_ours = not rule.covers_children and all(type(p) is nn.Parameter for p in layer.parameters(recurse=False))

        def tap(output: Tensor, inputs: Tensor, use: str = "") -> Tensor:
            if type(output) is not Tensor or type(inputs) is not Tensor:
                output, inputs = self._for_every_record(output, inputs)
                return self._tap((path, use, inputs.ndim), output, inputs)
            with torch._C.DisableTorchFunction():  # a mode would see every attribute that is read
                output, inputs = self._for_every_record(output, inputs)
                return self._tap((path, use, inputs.ndim), output, inputs)

        def compiled_tap(output: Tensor, inputs: Tensor, use: str = "") -> Tensor:  # pragma: compiled graph
            if use not in numbers:
                numbers[use] = compiled.register(self, path, use)
            return compiled.tap(output, self._anchor, inputs, numbers[use])

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            # A deep copy of the model (an EMA, say) is not booked and runs its own weights.
            if module is not layer or not torch.is_grad_enabled():
                return type(module).forward(module, *args, **kwargs)
            given = layer._parameters
            for key in owned:
                if given.get(key) is not owned[key]:
                    raise StateError(
                        f"layer {path!r} runs with other parameters than it was attached with, as in "
                        f"torch.func.functional_call or after it was parametrized: their gradients are not known"
                    )
            if torch.compiler.is_compiling():  # pragma: compiled graph
                return rule.forward(layer, compiled_tap, *args, **kwargs)
            # Where FunctionalUses is the only mode: it finds nothing in what a rule does.
            is_alone = is_ours and self._has_mode and torch._C._len_torch_function_stack() == 1
            if is_alone and not kwargs and all(type(x) is Tensor for x in args):
                with torch._C.DisableTorchFunction():
                    return rule.forward(layer, tap, *args)
            return rule.forward(layer, tap, *args, **kwargs)

        return forward

    def _tap_functional(self, rule: LayerRule, names: dict[str, str], output: Tensor, inputs: Tensor) -> Tensor:
        """Put a tap behind a use of parameters outside of their layer; ``names`` maps the rule's to the model's."""
        path = f"{', '.join(names.values())} by {rule}"
        self._layers.setdefault(path, BookedLayer(self.model, rule, names))
        self._tied |= set(names.values())
        return self._tap((path, "", inputs.ndim), output, inputs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _look_compiled(self, output: Any) -> Any:
        if self._listener is not None:
            self._anchors = {None: self._anchor}
            self._look_at(output)
        return output

    def _for_every_record(self, output: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Repeat what records share, position ids ``[T]`` or ``[1, T]``, so that each has a gradient of its own."""
        rows = self._rows
        if rows is None or inputs.is_floating_point() or inputs.ndim == 0 or len(inputs) == rows:
            return output, inputs
        if inputs.ndim == 1:
            output, inputs = output[None], inputs[None]
        elif len(inputs) != 1:
            return output, inputs
        return output.expand(rows, *output.shape[1:]).contiguous(), inputs.expand(rows, *inputs.shape[1:])

    def note(self, place: Place) -> None:
        """Take note of a use in a forward."""
        self._probe.note(place)
        self._runs[place[0]] += 1

    def _tap(self, place: Place, output: Tensor, inputs: Tensor) -> Tensor:
        self.note(place)
        # The anchor makes autograd reach the tap even when the layer's input needs no gradient.
        device = output.device
        anchor = self._anchor_of.get((place, device))
        if anchor is None:
            anchor = self._anchor_of[place, device] = torch.zeros((), device=device, requires_grad=True)
        self._anchors[place, device] = anchor
        return put_tap(output, anchor, inputs.detach(), self.seen, place)

    def seen(self, place: Place, call: Call) -> None:
        """Take what a tap saw in a backward."""
        if torch.is_grad_enabled():
            raise StateError(
                f"a backward with create_graph=True reached layer {place[0]!r}: the gradient of a gradient would miss "
                f"the booked parameters, so gradient penalties cannot be trained privately"
            )
        call = Call(call.inputs, call.output_grads.detach())
        if self._taker is not None:
            self._taker.take(place, call)
            return
        if self._listener is None:
            raise StateError(
                f"a backward pass reached layer {place[0]!r} outside of private clipping; call "
                f"PrivateOptimizer.backward(losses) with the vector of per-record losses, once per "
                f"micro-batch, in place of loss.backward()"
            )
        number = torch._C._current_graph_task_id()
        if self._heard is None:
            record_map = None if self.sample_id is None else RecordMap(self.sample_id)
            self._heard = (number, self._booking(Bookings(record_map)))
            torch.autograd.Variable._execution_engine.queue_callback(self._tell)
        if self._heard[0] != number:
            raise StateError(
                "a backward before this one failed, or this one runs inside another, as in a reentrant checkpoint: "
                "drop the batch with discard(), and use checkpoint(..., use_reentrant=False)"
            )
        node: Any = torch._C._current_autograd_node()
        if node is not None and node.metadata.setdefault(_BOOKED, number) != number:
            raise StateError("a second backward through the same forward: compute the loss anew")
        self._heard[1].take(place, call)

    def _tell(self) -> None:
        """Ends a backward that the listener waits for."""
        assert self._heard is not None
        assert self._listener is not None
        heard = self._heard[1]
        try:
            if self._two_backwards:
                raise StateError("two backwards save memory in backward(losses) alone, and not in loss.backward()")
            self._check_after()
            if heard.unverified and (heard.bookings.rows or 0) > 1:
                raise StateError(
                    f"{_named(heard.unverified)} got gradients, and whether they keep records apart was not looked at: "
                    f"run the model by calling it, model(...), and take the loss of what it returns; or pass "
                    f"per-record losses to backward(losses)"
                )
            self._listener(heard.bookings)
        finally:
            self.forget()

    def _booking(self, bookings: Bookings, rows: int | None = None) -> Booking:
        return Booking(bookings, self._gradients, self._min_axes, self._probe.is_verified, rows)

    def _gradients(self, place: Place, call: Call) -> Iterator[tuple[str, PerSampleGradient, bool]]:
        layer, rule, names = self._layers[place[0]]
        once = self._runs[place[0]] == 1
        for key, form in rule.gradients(layer, place[1], call).items():
            if key in names:
                yield names[key], form, once and names[key] not in self._tied

    def _min_axes(self, place: Place) -> int:
        layer, rule, _ = self._layers[place[0]]
        return rule.min_axes(layer, place[1])

    def _factors(self, bookings: Bookings, clipping: Clipping, scale: float) -> Factors:
        norms = bookings.squared_norms(clipping, scale, next(iter(self.parameters.values())).device)
        clipping.observe(norms)
        return Factors(self.parameters, clipping, norms, scale)

    def _backward(self, losses: Tensor, clipping: Clipping, record_map: RecordMap | None) -> dict[str, Tensor]:
        due = self._probe.due(losses)
        bookings = Bookings(record_map, norms_only=self._two_backwards)
        main = self._booking(bookings, len(losses))
        ones = torch.ones_like(losses)
        self._differentiate(main, losses, ones, retain_graph=due or self._two_backwards)
        if len(losses) > 1 and main.unverified and not due:
            raise StateError(
                f"{_named(main.unverified)} ran first inside the backward, in a reentrant "
                f"checkpoint, so whether they keep records apart cannot be looked at; use "
                f"checkpoint(..., use_reentrant=False)"
            )
        self._check_after()
        with torch.no_grad(), exact_arithmetic():
            factors = self._factors(bookings, clipping, 1.0)
            sums = bookings.clipped_sums(factors)
        if self._two_backwards:
            second = Summing(bookings, factors, self._gradients)
            self._differentiate(second, losses, ones, retain_graph=due)
            sums |= second.sums
        looked = self._look([losses], len(losses), full=bool(main.unverified)) if due else set()
        self._check_after()
        self._probe.passed(losses, looked)
        return sums

    def _look_at(self, output: Any) -> None:
        """Look at a model's outputs where the loss of a plain backward will not be known."""
        outputs, rows = rows_of_outputs(output)
        if rows < 2:
            return
        # Where it is the turn of what was never seen to get a gradient, only what leads there is differentiated.
        unverified = self._probe.unverified()
        turn = self._probe.is_turn(*outputs)
        anchors = [anchor for at, anchor in self._anchors.items() if turn or at is None or at[0] in unverified]
        if anchors and (turn or unverified):
            looked = self._look(outputs, rows, full=bool(unverified), anchors=anchors)
            for tensor in outputs:
                self._probe.passed(tensor, looked)

    def _look(
        self, outputs: Sequence[Tensor], rows: int, *, full: bool, anchors: list[Tensor] | None = None
    ) -> set[Place]:
        """Differentiate parts of the outputs alone: no row outside the part may receive a gradient.

        It catches an input whose first axis only happens to have B entries (position ids of shape [T] when
        T = B), rows in another order than the losses, and every differentiable path between the records that the
        parts tell apart. Returns what was reached, if the look was in full. Without ``anchors`` the last part frees
        the graph.
        """
        reached: set[Place] = set()
        parts = list(self._probe.parts(rows, full))
        for number, part in enumerate(parts, start=1):
            look = Look(~part, self._min_axes)
            seeds = [self._probe.seed(tensor, part) for tensor in outputs]
            keep = anchors is not None or number < len(parts)
            self._differentiate(look, outputs, seeds, retain_graph=keep, inputs=anchors)
            reached |= look.reached
        return reached if full else set()

    def _differentiate(self, taker: Taker, outputs: Any, seeds: Any, **settings: Any) -> None:
        self._taker = taker
        try:
            torch.autograd.backward(outputs, seeds, **settings)
        finally:
            self._taker = None

    def _check_before(self, losses: Tensor) -> None:
        if not self.attached:
            raise StateError("this GradientBook is detached")
        if losses.ndim != 1:
            raise InvalidValueError(
                f"losses must be a vector [B] with one loss per record, got shape {tuple(losses.shape)}: a "
                f"mean or sum over the batch, or over its tokens, couples records and cannot be clipped per "
                f"record; use reduction='none' and average over each record's own tokens"
            )
        if losses.grad_fn is None:
            raise InvalidValueError("losses have no graph: compute them with gradients enabled from the attached model")
        node: Any = losses.grad_fn
        if _BOOKED in node.metadata:
            raise StateError("backward through the same losses a second time: compute them anew")
        node.metadata[_BOOKED] = True
        if _identities(trainable_parameters(self.model)) != _identities(self.parameters):
            raise StateError(
                "the model's trainable parameters changed after the GradientBook was attached; freeze, "
                "unfreeze and replace parameters before attaching"
            )
        filled = [name for name, parameter in self.parameters.items() if parameter.grad is not None]
        if filled:
            raise StateError(f"parameters {filled} already have a .grad before the backward; set it to None")

    def _check_after(self) -> None:
        self.check_nothing_unbooked()
        for name, (buffer, version) in saved_buffers(self.model).items():
            if name not in self._buffers or self._buffers[name][0] is not buffer or self._buffers[name][1] != version:
                raise StateError(
                    f"buffer {name!r} changed since the GradientBook was attached: a buffer that the "
                    f"forward updates would publish private data without noise; stop updating it (moving the "
                    f"model must come before attaching)"
                )

    def _on_load(self, module: nn.Module, incompatible_keys: object) -> None:
        if any(module is own for own in self.model.modules()):  # copies of the model carry the hook along
            self._buffers = saved_buffers(self.model)


def _named(places: set[Place]) -> str:
    return f"layers {sorted({path for path, _, _ in places})}"


def _identities(parameters: dict[str, nn.Parameter]) -> dict[str, int]:
    return {name: id(parameter) for name, parameter in parameters.items()}
