# SPDX-License-Identifier: Apache-2.0
"""What is not one backward of every record and then one step is refused, and nothing is released."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_runs import (
    TinyGPT,
    private,
    start,
    token_loss,
    tokens,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.dataloader import default_collate

from wavedp import PrivacyEngine


def test_a_second_backward_of_the_same_records_is_refused() -> None:
    model, optimizer, loader = start()
    ids, targets, _ = next(iter(loader))
    token_loss(model, ids, targets).backward()
    once = {name: value.clone() for name, value in optimizer.private._sums.items()}
    with pytest.raises(RuntimeError, match="contribute twice"):
        token_loss(model, ids, targets).backward()
    assert all(torch.equal(optimizer.private._sums[name], value) for name, value in once.items())
    optimizer.step()


def test_a_step_without_all_records_is_refused() -> None:
    model, optimizer, loader = start()
    ids, targets, _ = next(iter(loader))
    with pytest.raises(RuntimeError, match="the loss has to be about all"):
        token_loss(model, ids[1:], targets[1:]).backward()
    with pytest.raises(RuntimeError, match="not passed to"):
        optimizer.step()


def test_without_a_loader_a_second_backward_needs_the_records_names() -> None:
    """Two backwards, retained graphs, gradients for an attack first: each would add a record twice."""
    ids, targets = tokens(3)
    for again in ("forward", "graph", "announced"):
        model = TinyGPT()
        _, optimizer, _ = private(model)
        if again == "announced":
            optimizer.announce(torch.arange(3))
        loss = token_loss(model, ids, targets)
        loss.backward(retain_graph=True)
        if again == "announced":
            with pytest.raises(ValueError, match="comes twice"):
                optimizer.announce(torch.tensor([5, 2]))
        with pytest.raises(RuntimeError, match="a second backward"):
            (loss if again == "graph" else token_loss(model, ids, targets)).backward()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_graph_is_taken_once_whatever_is_announced(compiled: bool) -> None:
    """The loss of one part of a batch, differentiated again as if it were that of the next."""
    ids, targets = tokens(3)
    model = TinyGPT()
    _, optimizer, _ = private(model)
    optimizer.announce(torch.arange(3))
    loss = token_loss(torch.compile(model, backend="aot_eager") if compiled else model, ids, targets)
    loss.backward(retain_graph=True)
    optimizer.announce(torch.arange(3, 6))
    with pytest.raises(RuntimeError, match="through the same forward"):
        loss.backward()
    torch._dynamo.reset()


def test_records_passed_by_name_are_not_taken_again() -> None:
    model, optimizer, loader = start(sample_rate=1.0)
    ids, targets, index = next(iter(loader))
    optimizer.backward(F.cross_entropy(model(ids).mT, targets, reduction="none").mean(1), records=index)
    with pytest.raises(RuntimeError, match="a second backward"):
        token_loss(model, ids, targets).backward()


def test_a_sample_id_is_for_one_backward_of_its_length() -> None:
    model, optimizer, loader = start(sample_rate=1.0, physical_batch_size=4)
    ids, targets, _ = next(iter(loader))
    optimizer.set_sample_id(torch.arange(3))
    with pytest.raises(ValueError, match="sample_id has 3 rows, the batch has 4"):
        token_loss(model, ids, targets).backward()
    optimizer.discard()
    other = TinyGPT()
    _, optimizer, _ = private(other)
    optimizer.set_sample_id(torch.zeros(4, dtype=torch.int64))
    token_loss(other, ids, targets).backward()
    assert optimizer.private._book.sample_id is None


def test_a_layer_that_never_gets_a_gradient_costs_no_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.side = nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.body(x)
            return h, self.side(h.detach())

    model = Detached()
    _, optimizer, _ = private(model)
    backwards = []
    run = torch.autograd.backward
    monkeypatch.setattr(torch.autograd, "backward", lambda *args, **kwargs: backwards.append(1) or run(*args, **kwargs))
    for _ in range(12):
        model(torch.randn(4, 3))[0].sum().backward()
        optimizer.step()
        backwards.append(0)
    assert sum(backwards[-8:]) <= 8  # the plain backward, and a look that finds nothing to differentiate


def test_a_copy_of_the_model_may_be_made() -> None:
    model = TinyGPT()
    _, optimizer, _ = private(model)
    average = torch.optim.swa_utils.AveragedModel(model)
    token_loss(model, *tokens(3)).backward()
    optimizer.step()
    average.update_parameters(model)
    with torch.no_grad():
        assert torch.equal(average(tokens(2)[0]), model(tokens(2)[0]))


def test_models_that_are_wrapped_already_are_refused() -> None:
    with pytest.raises(ValueError, match="compile it afterwards"):
        private(torch.compile(TinyGPT()))
    model = TinyGPT()
    model.forward = lambda ids: ids
    with pytest.raises(ValueError, match="a forward of its own"):
        private(model)


def test_functional_call_is_refused() -> None:
    model = TinyGPT()
    private(model)
    swapped = {name: p.detach() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="functional_call"):
        torch.func.functional_call(model, swapped, (tokens(2)[0],))


def test_epsilon_of_unchecked_batches_warns() -> None:
    model = TinyGPT()
    engine, optimizer, _ = private(model, noise_multiplier=1.0)
    token_loss(model, *tokens(3)).backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="not checked"):
        assert engine.get_epsilon(1e-5) > 0


def test_a_second_step_is_refused() -> None:
    model, optimizer, loader = start()
    ids, targets, _ = next(iter(loader))
    token_loss(model, ids, targets).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="drew no batch"):
        optimizer.step()


def test_skipping_a_batch_is_refused() -> None:
    model, _optimizer, loader = start()
    batches = iter(loader)
    next(batches)
    ids, targets, _ = next(batches)
    with pytest.raises(RuntimeError, match="2 batches were drawn"):
        token_loss(model, ids, targets).backward()


def test_closures_scalers_copies_and_more_parameters_are_refused() -> None:
    _model, optimizer, _loader = start()
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step(lambda: 0.0)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    with pytest.raises(RuntimeError, match="bfloat16"):
        scaler.step(optimizer)
    for duplicate in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="copied or pickled"):
            duplicate(optimizer)
    with pytest.raises(RuntimeError, match="private run"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(RuntimeError, match="directly"):
        optimizer.private.optimizer.step()


def test_a_failed_backward_leaves_nothing_for_the_next() -> None:
    model, optimizer, loader = start()
    ids, targets, _ = next(iter(loader))

    failing = False

    def hook(grad: Tensor) -> None:
        if failing:
            raise MemoryError

    model.mix.register_forward_hook(lambda module, inputs, output: output.register_hook(hook) and None)
    loss = token_loss(model, ids, targets)
    failing = True
    with pytest.raises(MemoryError):
        loss.backward()
    failing = False
    with pytest.raises(RuntimeError, match="discard"):
        token_loss(model, ids, targets).backward()
    optimizer.private.discard()
    with pytest.raises(RuntimeError, match="drew no batch"):
        optimizer.step()


def test_two_backwards_need_the_losses() -> None:
    model = TinyGPT()
    _, optimizer, _ = private(model, two_backwards=True)
    ids, targets = tokens(3)
    with pytest.raises(RuntimeError, match=r"backward\(losses\)"):
        token_loss(model, ids, targets).backward()
    optimizer.backward(F.cross_entropy(model(ids).mT, targets, reduction="none").mean(1))
    optimizer.step()


def test_gradient_penalties_are_refused() -> None:
    model = nn.Linear(3, 1)
    _, _optimizer, _ = private(model)
    x = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


def test_models_that_mix_records_are_refused_before_the_backward() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.second(h - h.mean(0))

    model = Mixing()
    private(model)
    with pytest.raises(RuntimeError, match="depend on rows of other records"):
        model(torch.randn(4, 3))


def test_a_loss_that_goes_around_the_model_forward_is_refused() -> None:
    model = TinyGPT()
    _, _optimizer, _ = private(model)
    ids, targets = tokens(4)
    with pytest.raises(RuntimeError, match=r"model\(\.\.\.\)"):
        F.cross_entropy(model.head(model.wte(ids)).flatten(0, 1), targets.flatten()).backward()


def test_unbooked_use_of_a_parameter_is_refused() -> None:
    class Penalised(TinyGPT):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * self.mix.weight.square().sum()

    model = Penalised()
    _, _optimizer, _ = private(model)
    with pytest.raises(RuntimeError, match=r"mix\.weight"):
        token_loss(model, *tokens(3)).backward()


def test_schedulers_and_state(tmp_path: Any) -> None:
    model, optimizer, loader = start()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    ids, targets, _ = next(iter(loader))
    token_loss(model, ids, targets).backward()
    optimizer.step()
    scheduler.step()
    assert optimizer.private.optimizer.param_groups[0]["lr"] == 0.5
    torch.save(optimizer.state_dict(), tmp_path / "state")
    _other, again, _ = start()
    again.load_state_dict(torch.load(tmp_path / "state"))
    assert again.private.steps_charged == 1
    assert again.param_groups[0]["lr"] == 0.5


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="loss_reduction"):
        private(TinyGPT(), loss_reduction="none")
    with pytest.raises(ValueError, match="both steps and delta"):
        private(TinyGPT(), steps=3)
    with pytest.raises(TypeError, match="DataLoader"):
        private(TinyGPT(), data_loader=[1, 2])

    class Stream(IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(3))

        def __len__(self) -> int:
            return 3

    model = TinyGPT()
    with pytest.raises(ValueError, match="map-style"):
        private(model, data_loader=DataLoader(Stream()))
    assert "forward" not in vars(model)
    with pytest.raises(ValueError, match="not private"):
        private(TinyGPT(), without_privacy=False)
    engine, _, _ = private(TinyGPT(), insecure_seed=1, noise_multiplier=1.0)
    with pytest.raises(RuntimeError, match="reproducible"):
        engine.get_epsilon(1e-5)
    with pytest.raises(RuntimeError, match="nothing was made private"):
        PrivacyEngine().get_epsilon(1e-5)
    assert math.isfinite(default_collate([torch.zeros(1)]).sum())
