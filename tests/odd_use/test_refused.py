# SPDX-License-Identifier: Apache-2.0
"""Odd ways through a private step that cannot be exact: each raises an error of the family, and releases nothing."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from bench import Bench, losses_of
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from wavedp.errors import WavedpError


def closure(b: Bench) -> None:
    b.optimizer.step(lambda: b.backward())


def second_backward_of_a_retained_graph(b: Bench) -> None:
    b.backward(retain_graph=True).backward()


def second_backward_of_the_records(b: Bench) -> None:
    b.backward()
    b.backward()


def graph_of_the_batch_before(b: Bench) -> None:
    loss = b.backward(retain_graph=True)
    b.optimizer.step()
    b.remember()
    loss.backward()


def gradient_of_a_gradient(b: Bench) -> None:
    b.backward(create_graph=True)


def backward_inside_a_backward(b: Bench) -> None:
    def again(grad: Tensor) -> None:
        with torch.enable_grad():
            b.backward()

    h = b.model(b.x)
    h.register_hook(again)
    h.square().sum(1).mean().backward()


def backward_inside_the_step(b: Bench) -> None:
    b.private.optimizer.register_step_pre_hook(lambda *_: b.backward() and None)
    b.backward()
    b.optimizer.step()


def step_inside_the_step(b: Bench) -> None:
    b.private.optimizer.register_step_pre_hook(lambda *_: b.optimizer.step())
    b.backward()
    b.optimizer.step()


def unwrapped_optimizer(b: Bench) -> None:
    b.backward()
    assert b.inner is not None
    b.inner.step()


def unwrapped_optimizer_by_its_class(b: Bench) -> None:
    b.backward()
    torch.optim.SGD.step(b.inner)


def scaler(b: Bench) -> None:
    made = torch.amp.GradScaler("cpu")
    made.scale(losses_of(b.model, b.x).mean()).backward()
    made.step(b.optimizer)


def another_optimizer_with_gradients_of_its_own(b: Bench) -> None:
    b.backward()
    for p in b.model.first.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(b.model.parameters(), lr=1.0).step()
    b.model.zero_grad()
    b.remember()
    b.optimizer.step()


def gradient_put_there_by_hand(b: Bench) -> None:
    b.backward()
    b.model.first.weight.grad = torch.zeros_like(b.model.first.weight)
    b.optimizer.step()


def gradient_of_a_frozen_parameter(b: Bench) -> None:
    b.backward()
    b.model.frozen.weight.grad = torch.ones_like(b.model.frozen.weight)
    b.optimizer.step()


def hook_that_mixes_records(b: Bench) -> None:
    b.model.second.register_full_backward_hook(lambda module, grads, _: (grads[0] - grads[0].mean(0),))
    b.backward()


def input_changed_after_the_layer(b: Bench) -> None:
    h = torch.tanh(b.model.first(b.x))
    out = b.model.second(h)
    h.mul_(2.0)
    b.optimizer.backward(out.square().sum(1))


def penalty_on_the_weights(b: Bench) -> None:
    (losses_of(b.model, b.x).mean() + b.model.first.weight.square().sum()).backward()


def weight_used_outside_of_the_forward(b: Bench) -> None:
    b.optimizer.backward(losses_of(b.model, b.x) + F.linear(b.x, b.model.first.weight).sum(1))


def functional_call(b: Bench) -> None:
    torch.func.functional_call(b.model, {"first.weight": torch.zeros(4, 3).double()}, (b.x,))


def weights_edited_in_place(b: Bench) -> None:
    with torch.no_grad():
        b.model.first.weight.mul_(0.5)
    b.remember()
    b.backward()
    b.optimizer.step()


def initialised_anew(b: Bench) -> None:
    b.model.first.reset_parameters()
    b.remember()
    b.optimizer.step()


def moved_to_another_type(b: Bench) -> None:
    b.model.float()
    b.remember()
    b.optimizer.step()


def frozen_after_wrapping(b: Bench) -> None:
    b.model.first.requires_grad_(False)
    b.backward()
    b.optimizer.step()


def unfrozen_after_wrapping(b: Bench) -> None:
    b.model.frozen.requires_grad_(True)
    b.backward()
    b.optimizer.step()


def tied_after_wrapping(b: Bench) -> None:
    b.model.unused.weight = b.model.frozen.weight
    b.remember()
    b.backward()
    b.optimizer.step()


def untied_after_wrapping(b: Bench) -> None:
    b.model.first.weight = nn.Parameter(b.model.first.weight.detach().clone())
    b.backward()
    b.optimizer.step()


def layer_added_after_wrapping(b: Bench) -> None:
    b.model.more = nn.Linear(2, 2)  # type: ignore[assignment]
    b.backward()
    b.optimizer.step()


def layer_with_a_tied_weight_added_after_wrapping(b: Bench) -> None:
    b.model.more = nn.Linear(4, 2, bias=False)  # type: ignore[assignment]
    b.model.more.weight = b.model.second.weight
    b.optimizer.backward(losses_of(b.model, b.x))
    b.optimizer.step()


def parametrized_after_wrapping(b: Bench) -> None:
    parametrize.register_parametrization(b.model.first, "weight", nn.Identity())
    b.backward()
    b.optimizer.step()


def pruned_after_wrapping(b: Bench) -> None:
    prune.l1_unstructured(b.model.first, "weight", amount=2)
    b.backward()


def group_added_to_the_wrapped_optimizer(b: Bench) -> None:
    b.backward()
    assert b.inner is not None
    b.inner.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    b.optimizer.step()


def group_added(b: Bench) -> None:
    b.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def parameter_taken_out_of_its_group(b: Bench) -> None:
    b.backward()
    del b.optimizer.param_groups[0]["params"][0]
    b.optimizer.step()


def forked(b: Bench) -> None:
    """The child's error, raised here; the parent may go on."""
    b.backward()
    child = os.fork()
    if child == 0:
        try:
            b.optimizer.step()
        except WavedpError as error:
            os._exit(17 if "another process" in str(error) else 1)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17:
        raise WavedpError("refused in the child: another process")


REFUSED: list[tuple[Callable[[Bench], None], str]] = [
    (closure, "takes no closure"),
    (second_backward_of_a_retained_graph, "a second backward"),
    (second_backward_of_the_records, "contribute twice the bound"),
    (graph_of_the_batch_before, "compute the loss anew"),
    (gradient_of_a_gradient, "create_graph"),
    (backward_inside_a_backward, "contribute twice the bound"),
    (backward_inside_the_step, "are not known"),
    (step_inside_the_step, "another call of this PrivateOptimizer"),
    (unwrapped_optimizer, r"PrivateOptimizer\.step"),
    (unwrapped_optimizer_by_its_class, r"PrivateOptimizer\.step"),
    (scaler, "do not scale the loss"),
    (another_optimizer_with_gradients_of_its_own, "changed outside of private steps"),
    (gradient_put_there_by_hand, r"\['first\.weight'\]"),
    (gradient_of_a_frozen_parameter, r"hold a \.grad"),
    (hook_that_mixes_records, "depend on rows of other records"),
    (input_changed_after_the_layer, "inplace"),
    (penalty_on_the_weights, r"\['first\.weight'\]"),
    (weight_used_outside_of_the_forward, r"\['first\.weight'\]"),
    (functional_call, "functional_call"),
    (weights_edited_in_place, "'first.weight' of the model changed"),
    (initialised_anew, "'first.bias', 'first.weight' of the model changed"),
    (moved_to_another_type, "of the model changed"),
    (frozen_after_wrapping, "frozen, unfrozen, replaced or added"),
    (unfrozen_after_wrapping, "frozen, unfrozen, replaced or added"),
    (tied_after_wrapping, "frozen, unfrozen, replaced or added"),
    (untied_after_wrapping, "other parameters than it was attached with"),
    (layer_added_after_wrapping, "frozen, unfrozen, replaced or added"),
    (layer_with_a_tied_weight_added_after_wrapping, "'more.weight' of the model changed"),
    (parametrized_after_wrapping, "other parameters than it was attached with"),
    (pruned_after_wrapping, "other parameters than it was attached with"),
    (group_added_to_the_wrapped_optimizer, "1 trainable tensors that are not"),
    (group_added, "cannot be added to a private run"),
    (parameter_taken_out_of_its_group, r"\['first\.weight'\] are in no optimizer group"),
    (forked, "another process"),
]


@pytest.mark.parametrize(("way", "words"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_refused_and_nothing_is_released(way: Callable[[Bench], None], words: str) -> None:
    bench = Bench()
    # torch itself refuses an input that was changed in place.
    with pytest.raises(RuntimeError if words == "inplace" else WavedpError, match=words):
        way(bench)
    for name, p in bench.model.named_parameters():
        if name in bench.before:
            assert torch.equal(p.detach(), bench.before[name]), name
