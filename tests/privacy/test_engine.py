# SPDX-License-Identifier: Apache-2.0
"""The ordinary training loop, private: exact at zero noise, and every departure from one backward a record refused."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torch.utils.data.dataloader import default_collate

from wavedp import PrivacyEngine
from wavedp.privacy import EngineOptimizer, clip_and_sum

Make = Callable[..., Any]
RECORDS, RATE, EXPECTED = 40, 0.25, 10.0


class TinyGPT(nn.Module):
    """An embedding whose weight is used again, by the module or by the function, for the logits."""

    def __init__(self, tying: str = "none") -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(11, 6), nn.Embedding(5, 6)
        self.mix, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.tying = tying
        if tying in ("none", "module"):
            self.head = nn.Linear(6, 11, bias=False)
        if tying == "module":
            self.head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]).expand(ids.shape))
        x = self.norm(x + torch.tanh(self.mix(x)).cumsum(1))
        if self.tying == "function":
            return F.linear(x, self.wte.weight)
        if self.tying == "product":
            return x @ self.wte.weight.T
        return self.head(x)


def token_loss(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())


def tokens(records: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 11, (records, 5), generator=generator)
    return ids, torch.randint(0, 11, (records, 5), generator=generator)


def private(model: nn.Module, **changes: Any) -> tuple[PrivacyEngine, EngineOptimizer, Any]:
    engine = PrivacyEngine()
    settings: dict[str, Any] = {
        "module": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=1.0),
        "data_loader": None,
        "sample_rate": RATE,
        "noise_multiplier": 0.0,
        "max_grad_norm": 0.5,
        "expected_batch_size": EXPECTED,
        "without_privacy": changes.get("noise_multiplier", 0.0) == 0.0,
    }
    same, optimizer, loader = engine.make_private(**{**settings, **changes})
    assert same is model
    return engine, optimizer, loader


def clipped_by_loop(model: nn.Module, ids: Tensor, targets: Tensor, bound: float = 0.5) -> dict[str, Tensor]:
    """The definition: one record at a time."""
    rows: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for i in range(len(ids)):
        model.zero_grad()
        token_loss(model, ids[i : i + 1], targets[i : i + 1]).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            rows[name].append(parameter.grad.clone())
    model.zero_grad()
    return dict(zip(rows, clip_and_sum([torch.stack(grads) for grads in rows.values()], bound)))


def moved(model: nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: (before[name] - p.detach()) * EXPECTED for name, p in model.named_parameters()}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    scale = torch.stack([value.norm() for value in expected.values()]).norm()
    for name, value in expected.items():
        assert (got[name] - value).norm() <= 1e-10 * scale, name


@pytest.mark.parametrize("tying", ["none", "module", "function", "product"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_step_is_the_clipped_sum(tying: str, reduction: str) -> None:
    torch.manual_seed(1)
    model = TinyGPT(tying).double()
    ids, targets = tokens(7)
    expected = clipped_by_loop(model, ids, targets)
    _, optimizer, _ = private(model, loss_reduction=reduction)
    for _ in range(3):  # a first look at the model's outputs, and steps without
        before = state(model)
        loss = token_loss(model, ids, targets)
        (loss if reduction == "mean" else loss * len(ids)).backward()
        optimizer.step()
        assert_close(moved(model, before), expected)
        model.load_state_dict({**model.state_dict(), **before})
        optimizer.zero_grad()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_model_trains_as_the_model(backend: str) -> None:
    ids, targets = tokens(6)
    trained = []
    for compiled in (False, True):
        torch.manual_seed(1)
        model = TinyGPT()
        _, optimizer, _ = private(model)
        run = torch.compile(model, backend=backend) if compiled else model
        for records in (6, 5, 6):
            token_loss(run, ids[:records], targets[:records]).backward()
            optimizer.step()
        trained.append(state(model))
    torch._dynamo.reset()
    for name, value in trained[0].items():
        assert (trained[1][name] - value).norm() <= 1e-5 * value.norm(), name


def test_bound_of_one_record_in_units_of_the_norm() -> None:
    """The 1.8 C of other libraries with tied weights."""
    for tying in ("none", "module", "function"):
        torch.manual_seed(1)
        model = TinyGPT(tying)
        ids, targets = tokens(1)
        _, optimizer, _ = private(model, max_grad_norm=1e-3)
        before = state(model)
        token_loss(model, ids, targets).backward()
        optimizer.step()
        total = torch.stack([value.double().norm() for value in moved(model, before).values()]).norm().item()
        assert 0.99e-3 < total <= 1e-3 * (1 + 1e-4)  # the difference of float32 weights rounds


def test_micro_batches_add_up_and_evaluation_may_come_between() -> None:
    model = TinyGPT().double()
    ids, targets = tokens(6)
    expected = clipped_by_loop(model, ids, targets)
    _, optimizer, _ = private(model)
    before = state(model)
    for part in (slice(0, 2), slice(2, 6)):
        model(ids[part])  # a forward without a backward
        with torch.no_grad():
            model.eval()(ids)
        optimizer.announce(torch.arange(6)[part])
        token_loss(model.train(), ids[part], targets[part]).backward()
    optimizer.step()
    assert_close(moved(model, before), expected)


def test_one_record_of_several_rows_is_clipped_once() -> None:
    model = TinyGPT().double()
    ids, targets = tokens(6)
    sample_id = torch.tensor([4, 9, 4, 9, 7, 9])
    rows: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for record in (4, 7, 9):
        own = sample_id == record
        model.zero_grad()
        token_loss(model, ids[own], targets[own]).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            rows[name].append(parameter.grad.clone())
    model.zero_grad()
    expected = dict(zip(rows, clip_and_sum([torch.stack(grads) for grads in rows.values()], 0.5)))
    for plain in (True, False):
        copied = copy.deepcopy(model)
        _, optimizer, _ = private(copied)
        before = state(copied)
        if plain:
            optimizer.set_sample_id(sample_id)
            token_loss(copied, ids, targets).backward()
        else:
            losses = F.cross_entropy(copied(ids).mT, targets, reduction="none").mean(1)
            optimizer.backward(losses, sample_id=sample_id)
        optimizer.step()
        assert_close(moved(copied, before), expected)


def loader_of(records: int = RECORDS, **settings: Any) -> DataLoader[Any]:
    ids, targets = tokens(records)
    return DataLoader(TensorDataset(ids, targets, torch.arange(records)), batch_size=4, **settings)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("physical", [None, 3])
def test_the_loader_yields_poisson_batches_and_each_is_stepped_once(physical: int | None, workers: int) -> None:
    model = TinyGPT()
    engine, optimizer, loader = private(
        model,
        data_loader=loader_of(num_workers=workers),
        physical_batch_size=physical,
        noise_multiplier=1.0,
        steps=12,
        delta=1e-3,
    )
    assert len(loader) == 4
    sizes, seen = [], []
    for _ in range(4):
        for ids, targets, index in loader:
            assert torch.equal(ids, tokens(RECORDS)[0][index])
            sizes.append(len(index))
            seen += index.tolist()
            optimizer.zero_grad()
            token_loss(model, ids, targets).backward()
            optimizer.step()
    assert optimizer.private.steps_charged == 12
    assert list(loader) == []
    assert 60 < len(seen) < 180  # 12 batches of 10 in expectation, at 5 standard deviations
    assert physical is None or max(sizes) <= physical
    statement = engine.privacy_statement()
    assert statement.epsilon == pytest.approx(engine.get_epsilon(1e-3), rel=1e-6)


def test_empty_batches_are_stepped_on_the_way() -> None:
    model = TinyGPT()
    _, optimizer, loader = private(
        model, data_loader=loader_of(3), sample_rate=0.02, noise_multiplier=1.0, steps=50, delta=1e-3
    )
    yielded = 0
    before = state(model)
    for ids, targets, _ in loader:
        yielded += 1
        token_loss(model, ids, targets).backward()
        optimizer.step()
    assert optimizer.private.steps_charged == 50
    assert yielded < 25
    assert not torch.equal(state(model)["mix.weight"], before["mix.weight"])


def test_epsilon_is_that_of_the_steps_taken() -> None:
    model = TinyGPT()
    engine, optimizer, loader = private(model, data_loader=loader_of(), noise_multiplier=2.0)
    assert engine.get_epsilon(1e-5) == 0.0
    for ids, targets, _ in loader:
        token_loss(model, ids, targets).backward()
        optimizer.step()
    from wavedp.privacy import epsilon

    steps = optimizer.private.steps_charged
    assert steps == 4
    assert engine.get_epsilon(1e-5) == epsilon(sample_rate=RATE, noise_multiplier=2.0, steps=steps, delta=1e-5)
    with pytest.raises(RuntimeError, match="steps="):
        engine.privacy_statement()


def test_noise_for_a_target_epsilon() -> None:
    model = TinyGPT()
    engine = PrivacyEngine()
    _, optimizer, _ = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.Adam(model.parameters()),
        data_loader=loader_of(),
        sample_rate=RATE,
        max_grad_norm=1.0,
        expected_batch_size=EXPECTED,
        target_epsilon=3.0,
        target_delta=1e-3,
        steps=20,
    )
    assert 2.97 <= optimizer.private.spec.epsilon() <= 3.0


# What is not one backward of every record, and then one step


def start(**changes: Any) -> tuple[nn.Module, EngineOptimizer, Any]:
    model = TinyGPT()
    _, optimizer, loader = private(model, data_loader=loader_of(), noise_multiplier=1.0, **changes)
    return model, optimizer, loader


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
