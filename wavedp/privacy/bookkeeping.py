# SPDX-License-Identifier: Apache-2.0
"""Exact per-record clipped gradients from one backward pass, by book-keeping.

Layers that own trainable parameters run with those detached, and a tap behind each books (input, output
gradient) during the backward (Bu et al. 2022, "book-keeping"): autograd never computes a weight gradient,
so a parameter whose ``.grad`` fills was used along a path that is not booked, and that raises.
"""

import contextlib
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from wavedp.privacy.clipping import Clipping, accumulation_dtype
from wavedp.privacy.coverage import booked_layers, saved_buffers, trainable_parameters
from wavedp.privacy.layers import Call
from wavedp.privacy.per_sample import PerSampleGradient
from wavedp.privacy.probe import IndependenceProbe, Place

_BOOKED = "wavedp.privacy: booked"


class GradientBook:
    """Books a model's layers, from construction until :meth:`detach`.

    Use as a context manager, or call :meth:`detach`. While attached, a backward pass through the model is
    possible only inside :meth:`clipped_sums`; forwards under ``torch.no_grad`` run as always.

    Args:
        model: its trainable parameters belong to Linear, Embedding, LayerNorm or RMSNorm layers; any other
            layer may be there without trainable parameters, unless it mixes records.

    Raises:
        ValueError: the model has something that cannot be booked exactly; nothing has been changed then.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._layers = booked_layers(model)
        self.parameters = trainable_parameters(model)
        self._buffers = saved_buffers(model)
        self._calls: dict[str, list[Call]] | None = None
        self._probe = IndependenceProbe()
        self.attached = True
        # A checkpoint loaded into the attached model changes buffers without reading private data.
        self._load_hooks = [m.register_load_state_dict_post_hook(self._on_load) for m in model.modules()]
        for name, (layer, _) in self._layers.items():
            vars(layer)["forward"] = types.MethodType(self._tapped_forward(name), layer)

    def __enter__(self) -> "GradientBook":
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Give every layer its own forward back; the book cannot be used afterwards."""
        if self.attached:
            self.attached = False
            for hook in self._load_hooks:
                hook.remove()
            for layer, _ in self._layers.values():
                vars(layer).pop("forward", None)

    def clipped_sums(
        self,
        losses: Tensor,  # [B], one loss per record
        clipping: Clipping,
    ) -> dict[str, Tensor]:
        """Run the backward of ``losses`` and return, by parameter name, the sums of clipped gradients.

        Row b of the losses, and of every booked layer's input, belongs to record b. Sums have the parameter's
        shape, in float64; a parameter that the loss does not reach is missing. A record whose gradient is not
        finite contributes zero. On any error nothing stays booked.

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
            calls = self._backward(losses)
            self._check_after()
            with torch.no_grad(), _exact_arithmetic():
                return self._clip(calls, losses, clipping)
        finally:
            for parameter in self.parameters.values():
                parameter.grad = None

    def _tapped_forward(self, name: str) -> Callable[..., Tensor]:
        layer, rule = self._layers[name]

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            # A deep copy of the model (an EMA, say) is not booked and runs its own weights.
            if module is not layer or not torch.is_grad_enabled():
                output: Tensor = type(module).forward(module, *args, **kwargs)
                return output
            if torch.compiler.is_compiling():
                # Under torch.compile a booked layer runs uncompiled, behind a graph break.
                raise RuntimeError(f"layer {name!r} has a GradientBook attached: compile without fullgraph=True")
            (inputs,) = (*args, *kwargs.values())
            self._probe.note((name, inputs.ndim))
            output = rule.forward(layer, inputs)
            # The anchor makes autograd reach the tap even when the layer's input needs no gradient.
            anchor = torch.zeros((), device=output.device, requires_grad=True)
            tapped: Tensor = _Tap.apply(output, anchor, inputs.detach(), self, name)  # type: ignore[no-untyped-call]
            return tapped

        return forward

    def _book(self, name: str, inputs: Tensor, output_grads: Tensor) -> None:
        if self._calls is None:
            raise RuntimeError(
                f"a backward pass reached layer {name!r} outside of private clipping; call "
                f"PrivateOptimizer.backward(losses) with the vector of per-record losses, once per "
                f"micro-batch, in place of loss.backward()"
            )
        self._calls[name].append(Call(inputs, output_grads.detach()))

    def _backward(self, losses: Tensor) -> dict[str, list[Call]]:
        due = self._probe.due(losses)
        calls = self._collect(losses, torch.ones_like(losses), retain_graph=due)
        for name, layer_calls in calls.items():
            for call in layer_calls:
                self._check_record_axis(name, call, len(losses))
        reached: set[Place] = set()
        if len(losses) > 1:
            unverified = self._probe.unverified(_reached(calls))
            if unverified and not due:
                raise RuntimeError(
                    f"layers {sorted(name for name, _ in unverified)} ran first inside the backward, in a reentrant "
                    f"checkpoint, so whether they keep records apart cannot be looked at; use "
                    f"checkpoint(..., use_reentrant=False)"
                )
            if due:
                reached = self._look_between_records(losses, full=bool(unverified))
        self._probe.passed(losses, reached)
        return calls

    def _collect(self, losses: Tensor, seeds: Tensor, retain_graph: bool) -> dict[str, list[Call]]:
        self._calls = defaultdict(list)
        try:
            torch.autograd.backward(losses, seeds, retain_graph=retain_graph)
            return self._calls
        finally:
            self._calls = None

    def _look_between_records(self, losses: Tensor, full: bool) -> set[Place]:
        """Differentiate parts of the losses alone: no row outside the part may receive a gradient.

        It catches an input whose first axis only happens to have B entries (position ids of shape [T] when
        T = B), rows in another order than the losses, and every differentiable path between the records that the
        parts tell apart. Returns what was reached, if the look was in full. The graph is freed by the last part.
        """
        reached: set[Place] = set()
        parts = list(self._probe.parts(len(losses), full))
        for number, part in enumerate(parts, start=1):
            seeds = part.to(losses.device, losses.dtype)
            calls = self._collect(losses, seeds, retain_graph=number < len(parts))
            for name, layer_calls in calls.items():
                for call in layer_calls:
                    self._check_rows_outside(name, call, ~part.to(call.output_grads.device))
            reached |= _reached(calls)
        return reached if full else set()

    def _check_rows_outside(self, name: str, call: Call, outside: Tensor) -> None:
        self._check_record_axis(name, call, len(outside))
        if _nonzero(call.output_grads[outside]):
            raise RuntimeError(
                f"layer {name!r}: the losses of some records depend on rows of other records, so no record's "
                f"contribution can be bounded; give every booked layer an input whose first axis is the record "
                f"axis, in the order of the losses (expand shared inputs such as position ids to [B, T]), and "
                f"remove what mixes records (batch statistics, in-batch negatives)"
            )

    def _check_record_axis(self, name: str, call: Call, records: int) -> None:
        layer, rule = self._layers[name]
        if call.inputs.ndim < rule.min_axes(layer) or call.inputs.shape[0] != records:
            raise RuntimeError(
                f"layer {name!r} got an input of shape {tuple(call.inputs.shape)} for {records} losses: its "
                f"first axis must be the record axis; expand inputs that records share (position ids to [B, "
                f"T]) and keep records apart from tokens ([B, T, d], not [B * T, d])"
            )

    def _check_before(self, losses: Tensor) -> None:
        if not self.attached:
            raise RuntimeError("this GradientBook is detached")
        if losses.ndim != 1:
            raise ValueError(
                f"losses must be a vector [B] with one loss per record, got shape {tuple(losses.shape)}: a "
                f"mean or sum over the batch, or over its tokens, couples records and cannot be clipped per "
                f"record; use reduction='none' and average over each record's own tokens"
            )
        if losses.grad_fn is None:
            raise ValueError("losses have no graph: compute them with gradients enabled from the attached model")
        node: Any = losses.grad_fn
        if _BOOKED in node.metadata:
            raise RuntimeError("backward through the same losses a second time: compute them anew")
        node.metadata[_BOOKED] = True
        if _identities(trainable_parameters(self.model)) != _identities(self.parameters):
            raise RuntimeError(
                "the model's trainable parameters changed after the GradientBook was attached; freeze, "
                "unfreeze and replace parameters before attaching"
            )
        filled = [name for name, parameter in self.parameters.items() if parameter.grad is not None]
        if filled:
            raise RuntimeError(f"parameters {filled} already have a .grad before the backward; set it to None")

    def _check_after(self) -> None:
        filled = [name for name, parameter in self.parameters.items() if parameter.grad is not None]
        if filled:
            raise RuntimeError(
                f"parameters {filled} were used outside their own layer's forward (such as F.linear(h, "
                f"embedding.weight)), so their per-record gradients are not known; call the layer itself, or "
                f"freeze the parameter"
            )
        for name, (buffer, version) in saved_buffers(self.model).items():
            if name not in self._buffers or self._buffers[name][0] is not buffer or self._buffers[name][1] != version:
                raise RuntimeError(
                    f"buffer {name!r} changed since the GradientBook was attached: a buffer that the "
                    f"forward updates would publish private data without noise; make it non-persistent or "
                    f"stop updating it (moving the model must come before attaching)"
                )

    def _clip(self, calls: dict[str, list[Call]], losses: Tensor, clipping: Clipping) -> dict[str, Tensor]:
        gradients: dict[str, PerSampleGradient] = {}
        none = torch.zeros(len(losses), dtype=torch.float64, device=losses.device)
        squared_norms = {clipping.group_of(path): none for path in self.parameters}
        while calls:
            name, layer_calls = calls.popitem()
            layer, rule = self._layers[name]
            for key, gradient in rule.gradients(layer, layer_calls).items():
                path = f"{name}.{key}" if name else key
                if path in self.parameters:
                    gradients[path] = gradient
                    group = clipping.group_of(path)
                    squared_norms[group] = squared_norms[group] + gradient.squared_norms().to(losses.device)
        clipping.observe(squared_norms)
        factors = {d: clipping.group_factors(squared_norms, d) for d in (torch.float32, torch.float64)}
        sums = {}
        while gradients:
            path, gradient = gradients.popitem()
            parameter = self.parameters[path]
            own = factors[accumulation_dtype(parameter.dtype)][clipping.group_of(path)].to(parameter.device)
            sums[path] = gradient.weighted_sum(own).reshape(parameter.shape)
        return sums

    def _on_load(self, module: nn.Module, incompatible_keys: object) -> None:
        self._buffers = saved_buffers(self.model)


class _Tap(torch.autograd.Function):
    """The identity in the forward; books a layer's input and output gradient in the backward."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, inputs: Tensor, book: GradientBook, name: str) -> Tensor:
        # Marked as changed in place: the result is then no view, and an in-place activation may follow.
        ctx.mark_dirty(output)
        ctx.save_for_backward(inputs)
        ctx.book, ctx.layer = book, name
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (inputs,) = ctx.saved_tensors
        ctx.book._book(ctx.layer, inputs, grads[0])
        return grads[0], None, None, None, None


def _reached(calls: dict[str, list[Call]]) -> set[Place]:
    return {(n, c.inputs.ndim) for n, layer_calls in calls.items() for c in layer_calls if _nonzero(c.output_grads)}


def _nonzero(x: Tensor) -> bool:
    """Whether ``x`` has a finite entry other than 0; a non-finite record spreads NaN where nothing flows."""
    return bool(((x != 0) & torch.isfinite(x)).any())


def _identities(parameters: dict[str, nn.Parameter]) -> dict[str, int]:
    return {name: id(parameter) for name, parameter in parameters.items()}


@contextlib.contextmanager
def _exact_arithmetic() -> Iterator[None]:
    """Keep norms and sums in full float32: no autocast, no TF32, no bfloat16 inside float32 products."""
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if hasattr(torch.backends, "fp32_precision"):  # torch >= 2.9
            backends: tuple[Any, Any] = (torch.backends.cuda, torch.backends.mkldnn)
            for flags in (backend.matmul for backend in backends):
                stack.callback(setattr, flags, "fp32_precision", flags.fp32_precision)
                flags.fp32_precision = "ieee"
        else:
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        yield
