# SPDX-License-Identifier: Apache-2.0
"""Planted bugs: norms of records that come out too small, and records that are mixed or missed."""

from typing import Any

import torch
from torch import Tensor

from wavedp.privacy import bookings, coverage, layers
from wavedp.privacy.bookings import Bookings
from wavedp.privacy.bookkeeping import GradientBook
from wavedp.privacy.contents import ContentsWatch
from wavedp.privacy.forms_blocks import RowBlocks
from wavedp.privacy.forms_conv import Convolution
from wavedp.privacy.per_sample import Materialised, OuterProducts, RowScatter, TiedEmbedding, combined
from wavedp.selftest.planting import Planted, Registry

registry = Registry("norms")
bug = registry.bug


def _token_norms(a: Tensor, g: Tensor) -> Tensor:
    """``sum_t |a_t|^2 |g_t|^2``: no cross terms between tokens."""
    return (a.double().square().sum(-1) * g.double().square().sum(-1)).sum(1)


@bug("Opacus 7264cd73")
def ghost_bias_norm(planted: Planted) -> None:
    """The norm of a bias over tokens is that of all token gradients, not that of their sum."""

    def gradients(original: Any, call: Any, *, weight: bool, bias: bool) -> Any:
        forms = original(call, weight=weight, bias=bias)
        g = layers.tokens(call.output_grads, 1).double()
        if bias and g.shape[1] > 1:
            planted.mark()
            forms["bias"]._squared = g.square().sum((1, 2))
        return forms

    planted.replace(layers, "linear_gradients", gradients)


@bug("own")
def token_cross_terms(planted: Planted) -> None:
    """Norms of weights add up tokens as if their gradients were orthogonal."""

    def measured(original: Any, self: OuterProducts) -> tuple[Tensor, Tensor]:
        planted.mark()
        norms = _token_norms(self.a, self.g)
        return norms, torch.zeros_like(norms)

    planted.replace(OuterProducts, "measured", measured)


@bug("own")
def convolution_places_apart(planted: Planted) -> None:
    """Norms of convolutions add up places as if their gradients were orthogonal."""

    def norms(original: Any, self: Convolution, a: Tensor, g: Tensor) -> Tensor:
        planted.mark()
        total: Tensor = _token_norms(a.flatten(0, 1), g.flatten(0, 1)).unflatten(0, a.shape[:2]).sum(1)
        return total

    planted.replace(Convolution, "_norms", norms)


@bug("own")
def repeated_ids_apart(planted: Planted) -> None:
    """The norm of an embedding takes a token that comes twice for two tokens."""

    def norms(original: Any, self: RowScatter) -> Tensor:
        planted.mark()
        return self.g.double().square().sum(-1).masked_fill(self.ids == self.padding, 0.0).sum(1)

    planted.replace(RowScatter, "squared_norms", norms)


@bug("own")
def tied_cross_term(planted: Planted) -> None:
    """The norm of a tied matrix leaves out what its two uses have in common."""

    def cross(original: Any, self: TiedEmbedding) -> Tensor:
        planted.mark()
        return torch.zeros_like(torch.as_tensor(original(self)))

    planted.replace(TiedEmbedding, "_cross", cross)


@bug("own")
def uses_added_apart(planted: Planted) -> None:
    """The norm of a parameter used twice is that of its uses apart."""

    class Apart:
        def __init__(self, forms: Any) -> None:
            self.forms = forms

        def squared_norms(self) -> Tensor:
            planted.mark()
            return torch.stack([form.squared_norms() for form in self.forms]).sum(0)

        def weighted_sum(self, factors: Tensor) -> Tensor:
            return torch.as_tensor(combined(self.forms).weighted_sum(factors))

    planted.replace(bookings, "combined", lambda original, forms: Apart(forms) if len(forms) > 1 else original(forms))


@bug("own")
def largest_entry_as_norm(planted: Planted) -> None:
    """The norm of gradients that are kept as they are is that of their largest entry."""

    def norms(original: Any, self: Materialised) -> Tensor:
        planted.mark()
        return self.grads.double().flatten(1).abs().amax(1).square()

    planted.replace(Materialised, "squared_norms", norms)


@bug("own")
def parameter_left_out_of_norm(planted: Planted) -> None:
    """One of the parameters is clipped and not in the norm."""

    def norms(original: Any, self: Bookings, *arguments: Any) -> Any:
        if len(self._forms) < 2:
            return original(self, *arguments)
        planted.mark()
        name = next(iter(self._forms))
        form = combined(self._forms.pop(name))
        found = original(self, *arguments)
        self._forms[name] = [form]
        return found

    planted.replace(Bookings, "squared_norms", norms)


@bug("own")
def attention_blocks_largest(planted: Planted) -> None:
    """The norm of a matrix of several projections is that of the largest of them."""

    def norms(original: Any, self: RowBlocks) -> Tensor:
        planted.mark()
        return torch.stack([form.squared_norms() for form in self.blocks.values()]).amax(0)

    planted.replace(RowBlocks, "squared_norms", norms)


@bug("own")
def rows_as_records(planted: Planted) -> None:
    """Each of a record's captions or crops is clipped to C by itself."""

    def of_records(original: Any, self: Bookings, form: Any) -> Any:
        if self.record_map is not None:
            planted.mark()
        return form

    planted.replace(Bookings, "of_records", of_records)


@bug("known class")
def batch_norm_accepted(planted: Planted) -> None:
    """A layer that mixes the records of a batch is accepted."""

    def refuse(original: Any, *arguments: Any) -> None:
        planted.mark()

    planted.replace(coverage, "_refuse_cross_record", refuse)


@bug("own")
def mixed_records_unseen(planted: Planted) -> None:
    """Losses whose gradient reaches other records are accepted."""

    def look(original: Any, self: GradientBook, *arguments: Any, **options: Any) -> set[Any]:
        planted.mark()
        return set(self._probe.unverified())

    planted.replace(GradientBook, "_look", look)


@bug("own")
def unbooked_path_accepted(planted: Planted) -> None:
    """A parameter that is used where no gradient of single records is known is accepted."""

    def check(original: Any, self: GradientBook) -> None:
        planted.mark()

    planted.replace(GradientBook, "check_nothing_unbooked", check)


@bug("running statistics")
def written_buffer_accepted(planted: Planted) -> None:
    """What a forward writes into a saved buffer is published without noise."""

    def changed(original: Any, self: ContentsWatch, *, thorough: bool = False) -> list[str]:
        planted.mark()
        return []

    planted.replace(ContentsWatch, "changed", changed)
    planted.replace(GradientBook, "_check_after", lambda original, self: self.check_nothing_unbooked())
