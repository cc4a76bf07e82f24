# SPDX-License-Identifier: Apache-2.0
"""Nothing but private steps and load_state_dict may write to what is published."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from wavedp.optim import DPSGD
from wavedp.privacy import PrivacySpec, PrivateOptimizer, contents

MakeSpec = Callable[..., PrivacySpec]


class CodeBook(nn.Module):
    """A layer beside a buffer and a frozen parameter, which ``write`` may change in the forward."""

    def __init__(self, write: Callable[["CodeBook", Tensor], None] = lambda *_: None) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("codes", torch.randn(4, 3))
        self.register_buffer("cache", torch.zeros(3), persistent=False)
        self.frozen = nn.Parameter(torch.randn(4, 3), requires_grad=False)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.write(self, x)
        return self.layer(x).sum(1)


def private_sgd(model: nn.Module, spec: PrivacySpec) -> PrivateOptimizer:
    return PrivateOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1), spec)


def replace_frozen(model: CodeBook, x: Tensor) -> None:
    model.frozen = nn.Parameter(x.clone(), requires_grad=False)


WRITES: dict[str, tuple[str, Callable[[CodeBook, Tensor], object]]] = {
    "buffer-data": ("codes", lambda m, x: m.codes.data.copy_(x)),
    "buffer-average": ("codes", lambda m, x: m.codes.data.mul_(0.9).add_(0.1 * x)),
    "buffer-numpy": ("codes", lambda m, x: m.codes.numpy().__setitem__(0, x[0].numpy())),
    "frozen-data": ("frozen", lambda m, x: m.frozen.data.copy_(x)),
    "frozen-no_grad": ("frozen", lambda m, x: m.frozen.copy_(x)),
    "frozen-replaced": ("frozen", replace_frozen),
    "weight-no_grad": ("layer.weight", lambda m, x: m.layer.weight.add_(x.mean(0))),
    "weight-data": ("layer.weight", lambda m, x: m.layer.weight.data.add_(x.mean(0))),
}


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("kind", WRITES)
def test_a_forward_that_writes_is_found_at_the_step(
    spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, kind: str, large: bool
) -> None:
    name, write = WRITES[kind]
    if large:
        monkeypatch.setattr(contents, "EVERY_STEP_BYTES", 0)
    model = CodeBook(write)  # type: ignore[arg-type]
    private = private_sgd(model, spec())
    private.backward(model(torch.randn(4, 3)))
    with pytest.raises(RuntimeError, match=f"'{name}' of the model changed"):
        private.step()


def test_large_models_are_compared_now_and_then(spec: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "EVERY_STEP_BYTES", 0)
    monkeypatch.setattr(contents, "INTERVAL", 3)
    model = CodeBook()
    private = private_sgd(model, spec())
    private.step()
    model.codes.data.add_(1.0)
    model.layer.weight.data.add_(1.0)
    private.step()
    private.step()
    with pytest.raises(RuntimeError, match="'codes' of the model changed"):
        private.step()


def test_version_counters_are_compared_at_every_step(spec: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "EVERY_STEP_BYTES", 0)
    for name in ("codes", "frozen", "layer.weight"):
        model = CodeBook()
        private = private_sgd(model, spec())
        private.step()
        with torch.no_grad():
            model.state_dict(keep_vars=True)[name].add_(1.0)
        with pytest.raises(RuntimeError, match=f"'{name}' of the model changed"):
            private.step()


def test_tensors_that_appear_are_found(spec: MakeSpec) -> None:
    model = CodeBook()
    private = private_sgd(model, spec())
    model.register_buffer("seen", torch.zeros(2))
    with pytest.raises(RuntimeError, match="'seen' of the model changed"):
        private.step()


def test_what_is_not_published_may_change(spec: MakeSpec) -> None:
    model = CodeBook(lambda m, x: m.cache.copy_(x.mean(0)))  # type: ignore[arg-type,return-value]
    private = private_sgd(model, spec())
    for _ in range(2):
        private.backward(model(torch.randn(4, 3)))
        private.step()


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_contents_that_were_put_back_are_no_change(
    spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    if large:
        monkeypatch.setattr(contents, "EVERY_STEP_BYTES", 0)
    model = CodeBook()
    private = private_sgd(model, spec())
    with torch.no_grad():
        for tensor in (model.codes, model.frozen, model.layer.weight):
            kept = tensor.clone()
            tensor.zero_()
            tensor.copy_(kept)
    private.step()
    assert private.steps_charged == 1


@pytest.mark.parametrize("part", ["model", "layer", "inner"])
def test_weights_may_be_loaded(spec: MakeSpec, part: str) -> None:
    model = nn.ModuleDict({"layer": nn.Linear(3, 2), "inner": CodeBook()})
    target = model if part == "model" else model[part]
    private = private_sgd(model, spec())
    private.step()
    target.load_state_dict({name: tensor + 1.0 for name, tensor in target.state_dict().items()})
    private.step()
    with torch.no_grad():
        model["layer"].weight.add_(1.0)
    with pytest.raises(RuntimeError, match=r"'layer\.weight' of the model changed"):
        private.step()


def test_copies_of_the_model_are_free(spec: MakeSpec) -> None:
    model = CodeBook()
    private = private_sgd(model, spec())
    average, other = AveragedModel(model), copy.deepcopy(model)
    private.step()
    average.update_parameters(model)
    other.load_state_dict({name: tensor * 0 for name, tensor in model.state_dict().items()})
    private.step()
    with torch.no_grad():
        model.codes.zero_()  # loading into the copy said nothing of the model
    with pytest.raises(RuntimeError, match="'codes' of the model changed"):
        private.step()


def test_hooks_go_when_the_optimizer_is_closed(spec: MakeSpec) -> None:
    model = CodeBook()
    private_sgd(model, spec()).close()
    assert all(not module._load_state_dict_post_hooks for module in model.modules())


class Tied(nn.Module):
    """One parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embedding(ids))
        return logits.square().sum((1, 2))


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_every_name_of_a_tied_parameter_steps(spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, large: bool) -> None:
    monkeypatch.setattr(contents, "INTERVAL", 2)
    if large:
        monkeypatch.setattr(contents, "EVERY_STEP_BYTES", 0)
    model = Tied()
    private = private_sgd(model, spec())
    for _ in range(4):
        private.backward(model(torch.randint(5, (4, 2))))
        private.step()
    model.head.weight.data[0, 0] += 1.0
    with pytest.raises(RuntimeError, match=r"'embedding\.weight', 'head\.weight' of the model changed"):
        private.step()


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_a_look_at_the_averages_is_no_change(spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, large: bool) -> None:
    if large:
        monkeypatch.setattr(contents, "EVERY_STEP_BYTES", 0)
    model = CodeBook()
    optimizer = DPSGD(model.layer.parameters(), lr=0.1, ema_decay=0.9)
    private = PrivateOptimizer(model, optimizer, spec())
    for _ in range(3):
        private.step()
        before = model.layer.weight.detach().clone()
        with optimizer.averaged():
            assert torch.equal(model.layer.weight, optimizer.state[model.layer.weight]["average"])
        assert torch.equal(model.layer.weight, before)
    with optimizer.averaged(), torch.no_grad():
        model.layer.weight.add_(1.0)
    assert torch.equal(model.layer.weight, before)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.zeros(4, 3),
    "transposed": lambda: torch.zeros(3, 4).t(),
    "every other": lambda: torch.zeros(4, 6)[:, ::2],
    "float16": lambda: torch.zeros(4, 3, dtype=torch.float16),
    "complex128": lambda: torch.zeros(4, 3, dtype=torch.complex128),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_are_compared(spec: MakeSpec, layout: str) -> None:
    """NaN that stays is no change, and the sign of a zero is one."""
    model = CodeBook()
    model.codes = LAYOUTS[layout]()
    model.codes[0, 0] = float("nan")
    private = private_sgd(model, spec())
    private.step()
    private.step()
    model.codes.data[3, 2] = -0.0
    with pytest.raises(RuntimeError, match="'codes' of the model changed"):
        private.step()


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "every other"])
def test_weights_are_remembered_as_steps_leave_them(spec: MakeSpec, layout: str) -> None:
    model = nn.Linear(3, 4)
    model.weight = nn.Parameter(LAYOUTS[layout]())
    private = private_sgd(model, spec())
    for _ in range(3):
        private.backward(model(torch.randn(2, 3)).sum(1))
        private.step()
    assert not torch.equal(model.weight, torch.zeros(4, 3))
    model.weight.data[3, 2] += 1.0
    with pytest.raises(RuntimeError, match="'weight' of the model changed"):
        private.step()
