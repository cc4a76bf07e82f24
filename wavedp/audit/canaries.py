# SPDX-License-Identifier: Apache-2.0
"""Made-up records whose gradients are known: each one coordinate of a model's parameters, far above the clipping bound.

A canary runs through one layer alone, and its loss weighs what comes out, so that the gradient does not depend on the
parameters. For a ``Linear`` layer it has two rows, x and -x, with x one-hot, and output gradients g and -g: the
weight's gradient has one entry, and the bias' is exactly zero. Canaries have coordinates of their own, so their
gradients are orthogonal, and each one's score has its own noise.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from wavedp.errors import InvalidValueError
from wavedp.privacy.validation import check_integer, check_real


@dataclass(frozen=True)
class _Target:
    """A trainable matrix or bias that canaries may have coordinates in."""

    layer: int
    parameter: nn.Parameter
    is_bias: bool


class GradientCanaries:
    """``count`` canaries on coordinates of a model's ``Linear`` and ``Embedding`` layers, chosen at random.

    Coordinates are spread evenly over the trainable weights and biases, as far as each has enough of them.

    Args:
        model: with at least one trainable ``nn.Linear`` or ``nn.Embedding``.
        count: number of canaries.
        norm: of each canary's gradient before clipping.
        generator: chooses the coordinates.

    Raises:
        ValueError: the model has fewer coordinates than ``count`` in such layers.
    """

    def __init__(self, model: nn.Module, count: int, *, norm: float, generator: np.random.Generator) -> None:
        self.count = check_integer("count", count, at_least=1)
        self.norm = check_real("norm", norm, above=0.0)
        self._layers: list[nn.Linear | nn.Embedding] = []
        self._targets = self._find_targets(model)
        free = sum(target.parameter.numel() for target in self._targets)
        if free < self.count:
            raise InvalidValueError(
                f"{self.count} canaries need as many coordinates, and the trainable Linear and Embedding layers of the "
                f"{type(model).__name__} have {free}: use fewer canaries, or train more of the model"
            )
        self._target_of, self._flat = self._choose(generator)
        parameters = [target.parameter for target in self._targets]
        columns = [1 if t.is_bias else t.parameter.shape[1] for t in self._targets]
        width = torch.tensor(columns)[self._target_of]
        self._row = torch.div(self._flat, width, rounding_mode="floor")
        self._column = self._flat % width
        self._device = parameters[0].device

    @property
    def parameters(self) -> int:
        """Weights and biases that canaries have coordinates in."""
        return len(torch.unique(self._target_of))

    def losses(self, canaries: Tensor) -> Tensor:
        """Return the losses ``[b]`` of the canaries with the numbers ``[b]`` int64."""
        total = torch.zeros(len(canaries), device=self._device)
        for number, layer in enumerate(self._layers):
            total = total + (self._linear if isinstance(layer, nn.Linear) else self._embedding)(number, canaries)
        return total

    def read(self, optimizer: torch.optim.Optimizer, name: str) -> npt.NDArray[np.float64]:
        """Return what ``optimizer`` keeps as ``name`` at each canary's coordinate, ``[count]``."""
        values = torch.empty(self.count, dtype=torch.float64)
        for number, target in enumerate(self._targets):
            here = self._target_of == number
            kept = optimizer.state[target.parameter][name].detach().reshape(-1)
            values[here] = kept[self._flat[here].to(kept.device)].double().cpu()
        return values.numpy()

    def _find_targets(self, model: nn.Module) -> list[_Target]:
        targets: list[_Target] = []
        seen: set[int] = set()
        for layer in model.modules():
            if type(layer) not in (nn.Linear, nn.Embedding):
                continue
            assert isinstance(layer, nn.Linear | nn.Embedding)
            if isinstance(layer, nn.Embedding) and (layer.padding_idx is not None or layer.max_norm is not None):
                continue
            own = [layer.weight, getattr(layer, "bias", None)]
            found = [p for p in own if isinstance(p, nn.Parameter) and p.requires_grad and id(p) not in seen]
            seen |= {id(p) for p in found}
            if found:
                self._layers.append(layer)
                targets += [_Target(len(self._layers) - 1, p, p.ndim == 1) for p in found]
        return targets

    def _choose(self, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Return the target of each canary and its coordinate there, ``[count]`` each."""
        sizes = np.array([target.parameter.numel() for target in self._targets])
        shares = np.zeros(len(sizes), dtype=np.int64)
        while (left := self.count - int(shares.sum())) > 0:
            open_ones = np.flatnonzero(shares < sizes)
            extra = max(1, left // len(open_ones))
            for number in open_ones:
                shares[number] += min(extra, sizes[number] - shares[number], self.count - int(shares.sum()))
        chosen = [generator.choice(size, share, replace=False) for size, share in zip(sizes, shares)]
        of = np.repeat(np.arange(len(sizes)), shares)
        return torch.from_numpy(of), torch.from_numpy(np.concatenate(chosen).astype(np.int64))

    def _here(self, number: int, canaries: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return where in the batch the canaries of a layer are, their row, column, and whether they are a bias'."""
        of = self._target_of[canaries]
        in_layer = torch.tensor([target.layer == number for target in self._targets])[of]
        places = in_layer.nonzero()[:, 0]
        is_bias = torch.tensor([target.is_bias for target in self._targets])[of[places]]
        return places, self._row[canaries[places]], self._column[canaries[places]], is_bias

    def _linear(self, number: int, canaries: Tensor) -> Tensor:
        layer = self._layers[number]
        assert isinstance(layer, nn.Linear)
        places, row, column, is_bias = self._here(number, canaries)
        # A bias' canary has no input and the whole gradient in its first row.
        inputs = torch.zeros(len(canaries), 2, layer.in_features)
        weights = torch.zeros(len(canaries), 2, layer.out_features)
        at, to = places[~is_bias], row[~is_bias]
        inputs[at, 0, column[~is_bias]], inputs[at, 1, column[~is_bias]] = 1.0, -1.0
        weights[at, 0, to], weights[at, 1, to] = 0.5 * self.norm, -0.5 * self.norm
        weights[places[is_bias], 0, row[is_bias]] = self.norm
        return self._weighed(layer, inputs, weights)

    def _embedding(self, number: int, canaries: Tensor) -> Tensor:
        layer = self._layers[number]
        assert isinstance(layer, nn.Embedding)
        places, row, column, _ = self._here(number, canaries)
        inputs = torch.zeros(len(canaries), 1, dtype=torch.int64)
        weights = torch.zeros(len(canaries), 1, layer.embedding_dim)
        inputs[places, 0] = row
        weights[places, 0, column] = self.norm
        return self._weighed(layer, inputs, weights)

    def _weighed(self, layer: nn.Module, inputs: Tensor, weights: Tensor) -> Tensor:
        output: Tensor = layer(inputs.to(self._device))
        return (output * weights.to(self._device)).sum(dim=(1, 2))
