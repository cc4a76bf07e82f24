# SPDX-License-Identifier: Apache-2.0
"""The rule of every layer that has no other: ``torch.func`` runs it record by record, each with its own parameters.

Every trainable parameter is expanded to ``[B, *parameter]`` with a tap behind it, and ``vmap`` runs the layer on a
batch of one record with one row of these. The gradient that reaches the tap is then every record's own. The forward
runs once, so dropout is booked as it was drawn; the price is ``[B, *parameter]`` in memory, for every parameter.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_map, tree_unflatten

from wavedp.errors import StateError
from wavedp.privacy.layers import Call, Tap
from wavedp.privacy.per_sample import Materialised, PerSampleGradient

_BOOK = "wavedp.privacy.bookkeeping"


class FallbackRule:
    """Runs a layer and all below it by ``vmap`` over records.

    The records are the first axis of the first argument that is a tensor of numbers, and of every other tensor with
    as many rows; what else is passed is the same for all. The layer sees a batch of one record, and must return
    tensors with one row.
    """

    parameters = None
    covers_children = True
    how = "torch.func.vmap runs it on one record at a time"

    def __init__(self, name: str) -> None:
        self.name = name
        self._shared: set[str] = set()  # arguments that were seen without a record axis
        self._by_record: set[str] = set()  # and with one, in a batch of several records

    def refusal(self, layer: nn.Module) -> str | None:
        return None

    def forward(self, layer: nn.Module, tap: Tap, *args: Any, **kwargs: Any) -> Any:
        paths, spec = tree_flatten_with_path((args, kwargs))
        keys = ["".join(map(str, path)) for path, _ in paths]
        leaves = [leaf for _, leaf in paths]
        records, axes = self._record_axes(layer, keys, leaves)
        trainable = {name: p for name, p in layer.named_parameters() if p.requires_grad}
        expanded = {
            name: tap(p.detach().expand(records, *p.shape), p.new_empty(records, 0), name)
            for name, p in trainable.items()
        }
        alone = _OwnForward(layer)
        if records == 0:
            return self._run_empty(alone, args, kwargs, trainable, expanded)
        structures: list[tuple[list[Any], Any]] = []  # of the results, known once the layer has run

        def run(parameters: dict[str, Tensor], rows: list[Tensor]) -> list[Tensor]:
            given = iter(rows)
            whole = [leaf if axis is None else next(given).unsqueeze(axis) for leaf, axis in zip(leaves, axes)]
            one_args, one_kwargs = tree_unflatten(whole, spec)
            own = {f"layer.{name}": parameter for name, parameter in parameters.items()}
            found, structure = tree_flatten(functional_call(alone, own, one_args, one_kwargs))
            structures.append((found, structure))
            return [_row(leaf, self.output_axis(i)) for i, leaf in enumerate(found) if isinstance(leaf, Tensor)]

        mapped = [leaf.movedim(axis, 0) for leaf, axis in zip(leaves, axes) if axis is not None]
        try:
            results = self.run_by_record(run, expanded, mapped)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            raise StateError(
                f"{self._title(layer)} has no rule of its own, and it cannot be run on one record at a time: {error}; "
                f"build it of layers that have a rule, freeze it with requires_grad_(False), or write it without "
                f"in-place updates of buffers and control flow that depends on data"
            ) from error
        found, structure = structures[-1]
        tensors = iter(results)
        outputs = [
            next(tensors).movedim(0, self.output_axis(i)) if isinstance(leaf, Tensor) else leaf
            for i, leaf in enumerate(found)
        ]
        return tree_unflatten(outputs, structure)

    def min_axes(self, layer: nn.Module, use: str) -> int:
        return 2

    def gradients(self, layer: nn.Module, use: str, call: Call) -> dict[str, PerSampleGradient]:
        return {use: Materialised(call.output_grads)}

    def run_by_record(
        self, run: Callable[..., list[Tensor]], parameters: dict[str, Tensor], rows: list[Tensor]
    ) -> list[Tensor]:
        """Run every record, which is first in all tensors; results are stacked."""
        results: list[Tensor] = vmap(run, randomness="different")(parameters, rows)
        return results

    def input_axis(self, position: int) -> int:
        """Return the record axis of a tensor among the arguments."""
        return 0

    def output_axis(self, position: int) -> int:
        """Return the record axis of a tensor among the results."""
        return 0

    def _title(self, layer: nn.Module) -> str:
        return f"module {self.name!r} of type {type(layer).__name__}"

    def _record_axes(self, layer: nn.Module, keys: list[str], leaves: list[Any]) -> tuple[int, list[int | None]]:
        """The number of records, and the record axis of every argument that has one."""
        numbers = (x for x in leaves if isinstance(x, Tensor) and x.ndim and x.dtype != torch.bool)
        first = next(numbers, None)
        if first is None:
            raise StateError(
                f"{self._title(layer)} has trainable parameters and no rule, and was called without a tensor whose "
                f"first axis is the record axis: pass it the records' input, or move its parameters into the module "
                f"that uses them"
            )
        records = len(first)
        axes: list[int | None] = []
        for position, (key, leaf) in enumerate(zip(keys, leaves)):
            axis = self.input_axis(position)
            if not isinstance(leaf, Tensor) or leaf.ndim <= axis or key in self._shared:
                axes.append(None)
            elif leaf.shape[axis] == records:
                axes.append(axis)
                if records > 1:
                    self._by_record.add(key)
            else:
                axes.append(None)
                self._check_shared(layer, key, leaf)
        return records, axes

    def _check_shared(self, layer: nn.Module, key: str, leaf: Tensor) -> None:
        if leaf.shape[0] == 1:  # broadcasts, with a record axis as without
            return
        if key in self._by_record:
            raise StateError(
                f"{self._title(layer)} got an argument {key} of shape {tuple(leaf.shape)} whose first axis was the "
                f"record axis in a batch before: pass what the records share with a first axis of size 1"
            )
        self._shared.add(key)

    def _run_empty(
        self,
        alone: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        trainable: Mapping[str, Tensor],
        expanded: Mapping[str, Tensor],
    ) -> Any:
        """Run on no records, which vmap does not; the result has the graph that the taps give it."""
        output = functional_call(alone, {f"layer.{k}": p.detach() for k, p in trainable.items()}, args, dict(kwargs))
        nothing = torch.stack([x.sum() for x in expanded.values()]).sum()
        return tree_map(lambda x: x + nothing.to(x.dtype) if _is_floating(x) else x, output)


class RecurrentRule(FallbackRule):
    """RNN, LSTM and GRU with ``batch_first=True``: the second argument and result have the record axis second."""

    how = "a loop runs it on one record after another"

    def refusal(self, layer: Any) -> str | None:
        if not layer.batch_first:
            return "its records are not the first axis; build it with batch_first=True"
        return None

    def forward(self, layer: nn.Module, tap: Tap, input: Tensor, hx: Any = None) -> Any:
        if not isinstance(input, Tensor) or input.ndim != 3:
            shape = f"a tensor of shape {tuple(input.shape)}" if isinstance(input, Tensor) else type(input).__name__
            raise StateError(
                f"{self._title(layer)} got {shape} with a GradientBook attached: it needs the record axis first, "
                f"[B, T, d], and no packed sequences"
            )
        args = (input,) if hx is None else (input, hx)
        return super().forward(layer, tap, *args)

    def input_axis(self, position: int) -> int:
        return min(position, 1)

    def output_axis(self, position: int) -> int:
        return min(position, 1)

    def run_by_record(
        self, run: Callable[..., list[Tensor]], parameters: dict[str, Tensor], rows: list[Tensor]
    ) -> list[Tensor]:
        """One record after another: vmap has no rules for these layers."""
        names, own = list(parameters), zip(*(parameter.unbind(0) for parameter in parameters.values()))
        results = [run(dict(zip(names, p)), list(r)) for p, r in zip(own, zip(*(row.unbind(0) for row in rows)))]
        return [torch.stack(parts) for parts in zip(*results)]


class _OwnForward(nn.Module):
    """Calls a layer's own forward, without the hooks that have run and without books on anything below."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _unbooked(self.layer), _current_weights(self.layer), torch.backends.cudnn.flags(enabled=False):
            return type(self.layer).forward(self.layer, *args, **kwargs)


@contextlib.contextmanager
def _unbooked(layer: nn.Module) -> Iterator[None]:
    """Take away the forwards that a book put on shared modules."""
    taken = []
    for module in layer.modules():
        forward = vars(module).get("forward")
        if getattr(getattr(forward, "__func__", None), "__module__", None) == _BOOK:
            taken.append((module, vars(module).pop("forward")))
    try:
        yield
    finally:
        for module, forward in taken:
            vars(module)["forward"] = forward


@contextlib.contextmanager
def _current_weights(layer: nn.Module) -> Iterator[None]:
    """Let recurrent layers use the parameters that they have now, and not the list that they keep of them."""
    kept = [(module, module._flat_weights) for module in layer.modules() if isinstance(module, nn.RNNBase)]
    for module, _ in kept:
        vars(module)["_flat_weights"] = [getattr(module, name) for name in module._flat_weights_names]
    try:
        yield
    finally:
        for module, weights in kept:
            vars(module)["_flat_weights"] = weights


def _row(output: Tensor, axis: int) -> Tensor:
    if output.ndim <= axis or output.shape[axis] != 1:
        raise StateError(
            f"it returned a tensor of shape {tuple(output.shape)} for one record; axis {axis} must be the record axis"
        )
    return output.squeeze(axis)


def _is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
