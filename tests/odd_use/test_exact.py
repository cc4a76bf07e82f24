# SPDX-License-Identifier: Apache-2.0
"""Odd ways through one private step that change nothing: the step is the clipped sum of a loop over the records."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from bench import BOUND, EXPECTED, Bench, assert_close, clipped_by_loop, inputs, losses_of, net
from torch import Tensor, nn

from wavedp import optim


def zero_grad_between(b: Bench) -> None:
    b.optimizer.zero_grad()
    b.backward()
    b.optimizer.zero_grad()
    b.optimizer.zero_grad(set_to_none=False)
    b.model.zero_grad()
    b.private.optimizer.zero_grad()
    b.optimizer.step()
    b.optimizer.zero_grad()


def clipping_by_the_user(b: Bench) -> None:
    b.backward()
    assert nn.utils.clip_grad_norm_(b.model.parameters(), 1e-6) == 0
    b.optimizer.step()


def hooks_of_parameters(b: Bench) -> None:
    """Autograd never makes the gradient of a booked parameter: hooks on it are not called."""
    for p in b.model.parameters():
        if p.requires_grad:
            p.register_hook(lambda grad: grad * 100)
            p.register_post_accumulate_grad_hook(lambda p: p.data.zero_())
    b.backward()
    b.optimizer.step()


def forwards_without_a_backward(b: Bench) -> None:
    kept = [b.model(b.x), losses_of(b.model, b.x[:2]).mean()]
    b.backward()
    kept.append(b.model(b.x))
    b.optimizer.step()
    assert len(kept) == 3


def evaluation_in_between(b: Bench) -> None:
    b.model.eval()
    with torch.no_grad():
        before = b.model(b.x)
    b.model.train()
    b.backward()
    b.model.eval()
    with torch.inference_mode():
        assert torch.equal(b.model(b.x), before)
    b.optimizer.step()
    b.model.train()


def eval_mode_throughout(b: Bench) -> None:
    b.model.eval()
    b.backward()
    b.optimizer.step()


def a_forward_inside_the_step(b: Bench) -> None:
    seen: list[Tensor] = []

    def evaluate(*_: object) -> None:
        with torch.no_grad():
            seen.append(b.model(b.x))

    b.private.optimizer.register_step_pre_hook(evaluate)
    b.private.optimizer.register_step_post_hook(evaluate)
    b.backward()
    b.optimizer.step()
    assert len(seen) == 2


def step_without_grad_mode(b: Bench) -> None:
    b.backward()
    with torch.no_grad():
        b.optimizer.step()


def a_retained_graph(b: Bench) -> None:
    loss = b.backward(retain_graph=True)
    b.optimizer.step()
    assert loss.grad_fn is not None


def frozen_for_an_evaluation(b: Bench) -> None:
    b.backward()
    trained = [p for p in b.model.parameters() if p.requires_grad]
    b.model.requires_grad_(False)
    b.model(b.x)
    for p in trained:
        p.requires_grad_(True)
    b.optimizer.step()


def states_in_the_middle(b: Bench) -> None:
    b.optimizer.load_state_dict(b.optimizer.state_dict())
    b.backward()
    weights, state = b.model.state_dict(), b.optimizer.state_dict()
    assert set(state) == {"optimizer", "spec", "steps_charged", "ledger_head", "clipping"}
    b.model.load_state_dict(weights)
    b.optimizer.step()


def a_copy_of_the_model_trained_beside(b: Bench) -> None:
    b.backward()
    other = copy.deepcopy(b.model)
    losses_of(other, b.x).sum().backward()
    torch.optim.SGD(other.parameters(), lr=1.0).step()
    b.optimizer.step()


def another_optimizer_over_the_parameters(b: Bench) -> None:
    """It finds no .grad, so it does nothing, weight decay included."""
    other = torch.optim.SGD(b.model.parameters(), lr=1.0, weight_decay=0.5, momentum=0.9)
    b.backward()
    other.step()
    b.optimizer.step()
    other.step()


def state_cleared(b: Bench) -> None:
    b.backward()
    b.private.optimizer.state.clear()
    b.optimizer.state.clear()
    b.optimizer.step()


def two_losses_summed(b: Bench) -> None:
    half = losses_of(b.model, b.x) / 2
    (half.mean() + half.mean()).backward()
    b.optimizer.step()


def two_forwards_of_the_records(b: Bench) -> None:
    """A layer that is called twice for every record: cross terms of both calls count in its norm."""
    ((losses_of(b.model, b.x) + losses_of(b.model, b.x)).mean() / 2).backward()
    b.optimizer.step()


def inside_data_parallel(b: Bench) -> None:
    """Without a GPU it calls the module as it is."""
    losses_of(nn.DataParallel(b.model), b.x).mean().backward()
    b.optimizer.step()


def a_step_that_was_refused_first(b: Bench) -> None:
    b.backward()
    b.model.first.weight.grad = torch.ones_like(b.model.first.weight)
    with pytest.raises(RuntimeError, match="not known"):
        b.optimizer.step()
    b.model.zero_grad()
    b.optimizer.step()


def a_weight_put_back(b: Bench) -> None:
    b.backward()
    with torch.no_grad():
        b.model.first.weight.mul_(2.0)
        b.model.first.weight.mul_(0.5)
    b.optimizer.step()


def a_vector_of_losses(b: Bench) -> None:
    b.optimizer.backward(losses_of(b.model, b.x))
    b.optimizer.step()


WAYS: list[Callable[[Bench], None]] = [
    zero_grad_between,
    clipping_by_the_user,
    hooks_of_parameters,
    forwards_without_a_backward,
    evaluation_in_between,
    eval_mode_throughout,
    a_forward_inside_the_step,
    step_without_grad_mode,
    a_retained_graph,
    frozen_for_an_evaluation,
    states_in_the_middle,
    a_copy_of_the_model_trained_beside,
    another_optimizer_over_the_parameters,
    state_cleared,
    two_losses_summed,
    two_forwards_of_the_records,
    inside_data_parallel,
    a_step_that_was_refused_first,
    a_weight_put_back,
    a_vector_of_losses,
]


@pytest.mark.parametrize("fused", [False, True], ids=["torch", "fused"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_step_is_the_clipped_sum(way: Callable[[Bench], None], fused: bool) -> None:
    model = net()
    trained = [p for p in model.parameters() if p.requires_grad]
    make = optim.DPSGD if fused else torch.optim.SGD
    bench = Bench(model, inner=make(trained, lr=1.0))
    way(bench)
    bench.check_exact()
    assert bench.private.steps_charged == 1


def test_a_wrong_step_would_be_seen() -> None:
    bench = Bench()
    bench.backward()
    next(iter(bench.private._sums.values())).mul_(1.001)
    bench.optimizer.step()
    with pytest.raises(AssertionError):
        bench.check_exact()


def test_hooks_that_edit_each_records_gradient_are_part_of_the_loss() -> None:
    """A hook of a module changes what flows on below it; the clipped sum is that of what came of it."""

    def with_hook() -> nn.Module:
        model = net()
        model.second.register_full_backward_hook(lambda module, grads, _: (grads[0].clamp(-0.1, 0.1),))
        return model

    bench = Bench(with_hook())
    bench.optimizer.backward(losses_of(bench.model, bench.x))
    bench.optimizer.step()
    expected = clipped_by_loop(with_hook(), bench.x)
    assert_close(bench.moved(), expected)
    plain = clipped_by_loop(net(), bench.x)
    assert (expected["first.weight"] - plain["first.weight"]).norm() > 0.01


def test_a_scaled_loss_is_clipped_as_it_is() -> None:
    """A GradScaler's loss: 65,536 times the gradient, and still at most C from a record."""
    bench = Bench(x=inputs(1))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(losses_of(bench.model, bench.x).mean()).backward()
    bench.optimizer.step()
    moved = bench.moved()
    assert_close(moved, clipped_by_loop(net(), bench.x, scale=65536.0))
    assert torch.stack([value.norm() for value in moved.values()]).norm() <= BOUND


def test_momentum_ends_with_the_state_that_was_cleared() -> None:
    bench = Bench(options={"momentum": 0.9})
    for _ in range(2):
        bench.remember()
        bench.backward()
        bench.optimizer.step()
    bench.remember()
    bench.optimizer.state.clear()
    bench.backward()
    bench.optimizer.step()
    bench.check_exact()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_scheduler_changes_the_rate_and_nothing_else(when: str) -> None:
    """Schedulers wrap the step of the optimizer that they are given, before or after it is made private."""
    model = net()
    inner = torch.optim.SGD(model.parameters(), lr=2.0)
    early = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: 0.5**step) if when == "before" else None
    bench = Bench(model, inner=inner)
    scheduler = early or torch.optim.lr_scheduler.LambdaLR(bench.optimizer, lambda step: 0.5**step)
    bench.backward()
    bench.optimizer.step()
    scheduler.step()
    bench.remember()
    assert inner.param_groups[0]["lr"] == bench.optimizer.param_groups[0]["lr"] == 1.0
    bench.backward()
    bench.optimizer.step()
    bench.check_exact()
    scheduler.step()


def test_a_hook_after_the_step_may_clip_weights() -> None:
    """What it makes of released weights is post-processing: the next step takes them as they are."""
    bench = Bench()
    bound = 0.3
    bench.private.optimizer.register_step_post_hook(
        lambda *_: [p.data.clamp_(-bound, bound) for p in bench.model.parameters() if p.requires_grad]
    )
    for _ in range(2):
        expected = clipped_by_loop(bench.model, bench.x)
        bench.remember()
        bench.backward()
        bench.optimizer.step()
        for name, value in expected.items():
            wanted = (bench.before[name] - value / EXPECTED).clamp(-bound, bound)
            assert torch.allclose(dict(bench.model.named_parameters())[name], wanted, atol=1e-12), name


def test_parameters_that_no_record_uses_get_noise_alone() -> None:
    """And frozen ones stay, weight decay or not."""
    bench = Bench(options={"weight_decay": 0.1})
    bench.backward()
    bench.optimizer.step()
    assert torch.equal(bench.model.frozen.weight, bench.before["frozen.weight"])
    assert torch.allclose(bench.model.unused.weight, 0.9 * bench.before["unused.weight"], atol=1e-12)


def test_a_second_name_of_a_layer_is_the_same_layer() -> None:
    """An alias made after wrapping: the uses under both names are one parameter's."""
    bench = Bench()
    bench.model.again = bench.model.second  # type: ignore[assignment]

    def both(model: nn.Module, x: Tensor) -> Tensor:
        return losses_of(model, x) + model.second(torch.tanh(model.first(x))).sum(1)  # type: ignore[operator]

    bench.optimizer.backward(
        losses_of(bench.model, bench.x) + bench.model.again(torch.tanh(bench.model.first(bench.x))).sum(1)
    )
    bench.optimizer.step()
    rows: dict[str, list[Tensor]] = {name: [] for name, p in net().named_parameters() if p.requires_grad}
    subject = net()
    for i in range(len(bench.x)):
        subject.zero_grad()
        both(subject, bench.x[i : i + 1]).sum().backward()
        for name, own in rows.items():
            p = dict(subject.named_parameters())[name]
            own.append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
    from wavedp.privacy import clip_and_sum

    expected = dict(zip(rows, clip_and_sum([torch.stack(grads) for grads in rows.values()], BOUND)))
    assert_close({name: bench.moved()[name] for name in expected}, expected)
