# SPDX-License-Identifier: Apache-2.0
"""Book-keeping is exact against vmap(grad), and refuses whatever it cannot bound."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wavedp.privacy import FlatClipping, GradientBook, clip_and_sum
from wavedp.privacy.per_sample import OuterProducts

Make = Callable[..., Any]


def assert_sums_match(sums: dict[str, Tensor], grads: dict[str, Tensor], bound: float, tolerance: float) -> None:
    expected = dict(zip(grads, clip_and_sum(list(grads.values()), bound)))
    scale = torch.stack([total.norm() for total in expected.values()]).norm()
    for name, total in expected.items():
        got = sums.get(name, torch.zeros_like(total))
        assert got.shape == total.shape
        assert (got - total).norm() <= tolerance * scale, name
    assert set(sums) <= set(expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@pytest.mark.parametrize("bound", [0.3, 3.0, 1e4])
def test_exact_for_a_transformer(
    transformer: Make,
    losses: Make,
    batch: Make,
    grad_samples: Make,
    dtype: torch.dtype,
    tolerance: float,
    bound: float,
    device: torch.device,
) -> None:
    model, data = transformer(dtype).to(device), [part.to(device) for part in batch(5)]
    grads = grad_samples(model, data)
    with GradientBook(model) as book:
        sums = book.clipped_sums(losses(model, *data), FlatClipping(bound))
    assert {total.dtype for total in sums.values()} <= {dtype, torch.float64}
    assert_sums_match(sums, grads, bound, tolerance)


@pytest.mark.parametrize(
    "frozen",
    [("weight",), ("bias",), ("token", "position", "norm", "qkv"), ("head", "down"), ("twice", "label")],
    ids="-".join,
)
def test_exact_with_frozen_parameters(
    transformer: Make, losses: Make, batch: Make, grad_samples: Make, frozen: tuple[str, ...]
) -> None:
    model, data = transformer(), batch(4)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name.split(".") for part in frozen))
    grads = grad_samples(model, data)
    with GradientBook(model) as book:
        sums = book.clipped_sums(losses(model, *data), FlatClipping(0.5))
    assert_sums_match(sums, grads, 0.5, 1e-10)


@pytest.mark.parametrize("grouped", [False, True])
def test_two_backwards_give_the_same_sums(transformer: Make, losses: Make, batch: Make, grouped: bool) -> None:
    """`twice` and `norm` are called twice in a forward: their parts are kept for the cross terms."""
    model, data = transformer(), batch(6)
    sample_id = torch.tensor([0, 1, 1, 2, 0, 3]) if grouped else None
    sums = []
    for two in (False, True):
        with GradientBook(model, two_backwards=two) as book:
            for _ in range(3):  # with looks between the records, and without
                sums.append(book.clipped_sums(losses(model, *data), FlatClipping(0.5), sample_id=sample_id))
    for other in sums[1:]:
        assert other.keys() == sums[0].keys()
        for name, total in sums[0].items():
            assert torch.allclose(other[name], total, rtol=1e-12, atol=1e-14)


def test_two_backwards_that_differ_are_refused() -> None:
    """Dropout drawn anew in a checkpoint: norms of one gradient would be taken to clip another, 500 C seen."""
    model = nn.ModuleDict({"first": nn.Linear(6, 6), "drop": nn.Dropout(0.5), "last": nn.Linear(6, 2)})

    def body(h: Tensor) -> Tensor:
        return model["last"](model["drop"](h))

    with GradientBook(model, two_backwards=True) as book:
        out = checkpoint(body, model["first"](torch.randn(1, 6)), use_reentrant=False, preserve_rng_state=False)
        with pytest.raises(RuntimeError, match="preserve_rng_state"):
            book.clipped_sums((out * 100).sum(1), FlatClipping(1.0))


def test_two_backwards_keep_no_output_gradients() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(8)])
    held = []

    class Watching(FlatClipping):
        def observe(self, squared_norms: Any) -> None:
            gc.collect()
            held.append(sum(isinstance(x, OuterProducts) for x in gc.get_objects()))

    for two in (False, True):
        with GradientBook(model, two_backwards=two) as book:
            book.clipped_sums(model(torch.randn(4, 64)).sum(1), Watching(1.0))
    assert held == [8, 0]


def test_exact_for_a_single_record_and_many_steps(
    transformer: Make, losses: Make, batch: Make, grad_samples: Make
) -> None:
    model = transformer()
    batches = [batch(records, seed=records) for records in (1, 3, 1, 6)]  # 6 records of 6 tokens
    references = [grad_samples(model, data) for data in batches]
    with GradientBook(model) as book:
        for data, grads in zip(batches, references):
            sums = book.clipped_sums(losses(model, *data), FlatClipping(1.0))
            assert_sums_match(sums, grads, 1.0, 1e-10)


@pytest.mark.parametrize("shape", [(3, 5), (3, 2, 5), (3, 2, 4, 5)], ids=str)
def test_linear_of_any_rank(shape: tuple[int, ...]) -> None:
    layer, x = nn.Linear(5, 4).double(), torch.randn(shape, dtype=torch.float64)
    grads: dict[str, list[Tensor]] = {"weight": [], "bias": []}
    for row in x:
        layer.zero_grad()
        layer(row[None]).square().sum().backward()
        grads["weight"].append(layer.weight.grad.clone())
        grads["bias"].append(layer.bias.grad.clone())
    layer.zero_grad()
    with GradientBook(layer) as book:
        sums = book.clipped_sums(layer(x).square().flatten(1).sum(1), FlatClipping(2.0))
    assert_sums_match(sums, {name: torch.stack(rows) for name, rows in grads.items()}, 2.0, 1e-12)


def test_norms_over_several_axes() -> None:
    model = nn.Sequential(nn.LayerNorm((3, 4)), nn.RMSNorm((3, 4))).double()
    x = torch.randn(5, 2, 3, 4, dtype=torch.float64)
    grads: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for row in x:
        model.zero_grad()
        model(row[None]).pow(3).sum().backward()
        for name, parameter in model.named_parameters():
            grads[name].append(parameter.grad.clone())
    model.zero_grad()
    with GradientBook(model) as book:
        sums = book.clipped_sums(model(x).pow(3).flatten(1).sum(1), FlatClipping(1.0))
    assert_sums_match(sums, {name: torch.stack(rows) for name, rows in grads.items()}, 1.0, 1e-12)


def test_keyword_input_and_unreached_layers() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2), "cut": nn.Linear(3, 2)})
    with GradientBook(model) as book:
        x = torch.randn(4, 3)
        model["unused"](x)
        out = model["used"](input=x) + model["cut"](x).detach()
        sums = book.clipped_sums(out.sum(1), FlatClipping(1.0))
    assert set(sums) == {"used.weight", "used.bias"}


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    first = nn.Linear(4, 4).double()
    whole = nn.ModuleList([first, model])
    x = torch.randn(5, 4, dtype=torch.float64)

    def sums(run: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        with GradientBook(whole) as book:
            return book.clipped_sums(run(first(x)).square().sum(1), FlatClipping(0.5))

    plain = sums(model)
    again = sums(lambda h: checkpoint(model, h, use_reentrant=reentrant))
    assert plain.keys() == again.keys()
    for name, total in plain.items():
        assert torch.allclose(again[name], total, rtol=1e-12)


def test_autocast_keeps_the_bound_and_float32_sums(transformer: Make, losses: Make, batch: Make) -> None:
    model, data = transformer(torch.float32), batch(1)
    with GradientBook(model) as book, torch.autocast("cpu", dtype=torch.bfloat16):
        sums = book.clipped_sums(losses(model, *data), FlatClipping(0.1))
    total = torch.stack([part.double().norm() for part in sums.values()]).norm()
    assert {part.dtype for part in sums.values()} <= {torch.float32, torch.float64}
    assert 0.099 < total <= 0.1 * (1 + 1e-6)


def test_dropout_is_booked_as_it_was_drawn() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 2)).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.manual_seed(7)
    model(x).square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    with GradientBook(model) as book:
        torch.manual_seed(7)
        sums = book.clipped_sums(model(x).square().sum(1), FlatClipping(1e6))
    for name, total in sums.items():
        assert torch.allclose(total, expected[name], rtol=1e-12)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_record_leaves_the_others_as_they_were(poison: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(5, 3, 4)
    with GradientBook(model) as book:
        keep = torch.tensor([0, 1, 3, 4])
        clean = book.clipped_sums(model(x[keep]).square().sum((1, 2)), FlatClipping(0.5))
        x[2, 1, 0] = poison
        poisoned = book.clipped_sums(model(x).square().sum((1, 2)), FlatClipping(0.5))
    for name, total in clean.items():
        assert torch.allclose(poisoned[name], total, rtol=1e-5, atol=1e-6), name


def test_everything_is_restored(transformer: Make, losses: Make, batch: Make) -> None:
    model, data = transformer(), batch(3)
    before = losses(model, *data)
    with pytest.raises(ZeroDivisionError), GradientBook(model):
        raise ZeroDivisionError
    assert not any("forward" in vars(module) for module in model.modules())
    book = GradientBook(model)
    book.detach()
    book.detach()
    after = losses(model, *data)
    assert torch.equal(before, after)
    after.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad()
    with pytest.raises(RuntimeError, match="detached"):
        book.clipped_sums(losses(model, *data), FlatClipping(1.0))


def test_no_grad_and_abandoned_forwards_leave_nothing(
    transformer: Make, losses: Make, batch: Make, grad_samples: Make
) -> None:
    model, data = transformer(), batch(4)
    grads = grad_samples(model, data)
    with GradientBook(model) as book:
        with torch.no_grad():
            losses(model, *batch(9, 5))
        losses(model, *batch(2, 6))
        model.eval()
        losses(model, *batch(3, 7))
        model.train()
        sums = book.clipped_sums(losses(model, *data), FlatClipping(0.5))
    assert_sums_match(sums, grads, 0.5, 1e-10)


def test_a_copied_model_runs_its_own_weights(transformer: Make, losses: Make, batch: Make) -> None:
    model, data = transformer(), batch(3)
    with GradientBook(model):
        average = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in average.parameters():
                parameter.zero_()
        assert not torch.allclose(losses(average, *data), losses(model, *data))
        losses(average, *data).sum().backward()
        assert all(parameter.grad is not None for parameter in average.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


# Refused before the start


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), ["'1'", "BatchNorm1d", "LayerNorm"]),
        (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False)), ["BatchNorm1d"]),
        (nn.Sequential(nn.Linear(3, 3), nn.InstanceNorm1d(3, track_running_stats=True)), ["InstanceNorm1d"]),
        (nn.Embedding(4, 3, max_norm=1.0), ["max_norm"]),
        (nn.Embedding(4, 3, scale_grad_by_freq=True), ["scale_grad_by_freq"]),
        (nn.Embedding(4, 3, sparse=True), ["sparse"]),
        (nn.Linear(3, 3).requires_grad_(False), ["no trainable parameter"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_refused_at_attach(model: nn.Module, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        GradientBook(model)
    assert all(word in str(caught.value) for word in words), caught.value
    assert not any("forward" in vars(module) for module in model.modules())


def test_compiled_models_are_exact_and_whole() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(4, 3)
    with GradientBook(model) as book:
        expected = book.clipped_sums(model(x).sum(1), FlatClipping(1.0))

        def losses(x: Tensor) -> Tensor:
            return model[2](model[1](model[0](x))).sum(1)

        whole = torch.compile(losses, backend="aot_eager", fullgraph=True)
        for _ in range(3):
            sums = book.clipped_sums(whole(x), FlatClipping(1.0))
            assert all(torch.equal(sums[name], expected[name]) for name in expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_equal_uses_stay_two_in_a_compiled_graph(backend: str) -> None:
    model, x = nn.Linear(3, 3), torch.randn(4, 3)
    with GradientBook(model) as book:
        expected = book.clipped_sums((model(x) + model(x)).sum(1), FlatClipping(1e6))
        run = torch.compile(lambda x: (model(x) + model(x)).sum(1), backend=backend)
        sums = book.clipped_sums(run(x), FlatClipping(1e6))
    torch._dynamo.reset()
    assert torch.allclose(sums["weight"], expected["weight"], rtol=1e-5)


def test_frozen_batch_norm_is_refused_too() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3).requires_grad_(False).eval())
    with pytest.raises(ValueError, match="BatchNorm1d"):
        GradientBook(model)


def test_frozen_layers_of_any_other_kind_are_fine() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 1).requires_grad_(False), nn.Flatten(), nn.Linear(15, 2))
    with GradientBook(model) as book:
        sums = book.clipped_sums(model(torch.randn(4, 2, 5)).sum(1), FlatClipping(1.0))
    assert set(sums) == {"2.weight", "2.bias"}


def test_a_second_book_is_refused() -> None:
    model = nn.Linear(3, 3)
    with GradientBook(model), pytest.raises(ValueError, match="detach it"):
        GradientBook(model)


# Refused at the backward


@pytest.mark.parametrize("reduce", [Tensor.mean, lambda losses: losses[:, None]], ids=["scalar", "matrix"])
def test_losses_must_be_a_vector(linear: nn.Linear, reduce: Callable[[Tensor], Tensor]) -> None:
    with GradientBook(linear) as book, pytest.raises(ValueError, match="one loss per record"):
        book.clipped_sums(reduce(linear(torch.randn(4, 3)).sum(1)), FlatClipping(1.0))


def test_losses_need_a_graph(linear: nn.Linear) -> None:
    with GradientBook(linear) as book, torch.no_grad(), pytest.raises(ValueError, match="no graph"):
        book.clipped_sums(linear(torch.randn(4, 3)).sum(1), FlatClipping(1.0))


def test_plain_backward_is_refused(linear: nn.Linear) -> None:
    with GradientBook(linear) as book:
        with pytest.raises(RuntimeError, match=r"in place of loss\.backward"):
            linear(torch.randn(4, 3)).sum().backward()
        assert linear.weight.grad is None
        book.clipped_sums(linear(torch.randn(4, 3)).sum(1), FlatClipping(1.0))


def test_second_backward_of_the_same_losses_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    with GradientBook(model) as book:
        for _ in range(2):  # the first pass verifies independence and keeps the graph for it
            losses = model(torch.randn(4, 3)).sum(1)
            book.clipped_sums(losses, FlatClipping(1.0))
        with pytest.raises(RuntimeError, match="second time"):
            book.clipped_sums(losses, FlatClipping(1.0))


@pytest.mark.parametrize(
    "run",
    [
        lambda layer, x: layer(x.reshape(8, 3)).reshape(4, 2, 2).sum((1, 2)),
        lambda layer, x: layer(x[:1]).expand(4, 2, 2).sum((1, 2)),
        lambda layer, x: layer(x[0, 0]) + x.sum((1, 2))[:, None][:, :1].expand(4, 2) * 0,
        lambda layer, x: layer(x)[:3].sum((1, 2)),
    ],
    ids=["tokens as records", "shared row", "no record axis", "fewer losses than rows"],
)
def test_record_axis_must_match(linear: nn.Linear, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
    with GradientBook(linear) as book:
        losses = run(linear, torch.randn(4, 2, 3))
        losses = losses.sum(1) if losses.ndim == 2 else losses
        with pytest.raises(RuntimeError, match="record axis"):
            book.clipped_sums(losses, FlatClipping(1.0))


def test_functional_use_of_a_booked_parameter_is_refused() -> None:
    """The silent 1.8 C of other libraries: an output layer that borrows the embedding's weight."""
    embedding = nn.Embedding(5, 3)
    with GradientBook(embedding) as book:
        h = embedding(torch.tensor([[1, 2], [3, 4]]))
        losses = F.linear(h, embedding.weight).square().sum((1, 2))
        with pytest.raises(RuntimeError, match=r"\['weight'\].*F.linear"):
            book.clipped_sums(losses, FlatClipping(1.0))
        assert embedding.weight.grad is None
        sums = book.clipped_sums(embedding(torch.tensor([[1], [2]])).sum((1, 2)), FlatClipping(1.0))
        assert set(sums) == {"weight"}


def test_present_grad_is_refused(linear: nn.Linear) -> None:
    linear.weight.grad = torch.zeros(2, 3)
    with GradientBook(linear) as book, pytest.raises(RuntimeError, match=r"already have a \.grad"):
        book.clipped_sums(linear(torch.randn(4, 3)).sum(1), FlatClipping(1.0))


@pytest.mark.parametrize("change", ["freeze", "unfreeze", "replace", "add"])
def test_changed_parameters_are_refused(change: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model[1].weight.requires_grad_(False)
    with GradientBook(model) as book:
        if change == "freeze":
            model[0].bias.requires_grad_(False)
        elif change == "unfreeze":
            model[1].weight.requires_grad_(True)
        elif change == "replace":
            model[0].weight = nn.Parameter(torch.zeros(2, 3))
        else:
            model.append(nn.Linear(2, 2))
        with pytest.raises(RuntimeError, match=r"trainable parameters changed|other parameters than it was attached"):
            book.clipped_sums(model(torch.randn(4, 3)).sum(1), FlatClipping(1.0))


class Counting(nn.Module):
    """Publishes the mean of what it saw through a buffer."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("seen", torch.zeros(3), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.mean(0)
        return self.linear(x).sum(1)


def test_a_buffer_that_the_forward_updates_is_refused() -> None:
    model = Counting(persistent=True)
    with GradientBook(model) as book, pytest.raises(RuntimeError, match="'seen' changed"):
        book.clipped_sums(model(torch.randn(4, 3)), FlatClipping(1.0))


def test_loading_into_a_copy_does_not_excuse_the_model() -> None:
    model = Counting(persistent=True)
    with GradientBook(model) as book:
        losses = model(torch.randn(4, 3))
        average = copy.deepcopy(model)
        average.load_state_dict(average.state_dict())
        with pytest.raises(RuntimeError, match="'seen' changed"):
            book.clipped_sums(losses, FlatClipping(1.0))


def test_unsaved_buffers_and_loaded_checkpoints_may_change() -> None:
    model = Counting(persistent=False)
    with GradientBook(model) as book:
        book.clipped_sums(model(torch.randn(4, 3)), FlatClipping(1.0))
    model = nn.Sequential(nn.Linear(3, 2))
    model.register_buffer("scale", torch.ones(1))
    with GradientBook(model) as book:
        model.load_state_dict(model.state_dict())
        book.clipped_sums(model(torch.randn(4, 3)).sum(1), FlatClipping(1.0))


def test_reduced_matmul_precision_is_not_used_for_norms_and_sums(linear: nn.Linear) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        seen: list[str] = []

        class Spy(FlatClipping):
            def factors(self, squared_norms: Tensor, dtype: torch.dtype) -> Tensor:
                seen.append(torch.backends.mkldnn.matmul.fp32_precision)
                return super().factors(squared_norms, dtype)

        with GradientBook(linear) as book:
            book.clipped_sums(linear(torch.randn(4, 3)).sum(1), Spy(1.0))
        assert set(seen) == {"ieee"}
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
