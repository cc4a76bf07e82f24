# SPDX-License-Identifier: Apache-2.0
"""The private step: one release, always noised and charged, divided by a public constant."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_runs import MakeSpec, flat, linear, private_sgd
from torch import Tensor, nn

import wavedp
from wavedp.functional import NoiseKey
from wavedp.privacy import PrivacySpec, PrivateOptimizer, clip_and_sum, grid_step, release


def test_without_noise_a_step_is_the_clipped_sum_over_the_public_batch_size(spec: MakeSpec) -> None:
    model = linear()
    x = torch.randn(5, 3)
    grads = [torch.einsum("bp,bd->bpd", 2 * model(x), x).detach(), (2 * model(x)).detach()]
    expected = torch.cat([total.flatten() for total in clip_and_sum(grads, 0.5)]).double() / 8.0
    before = flat(model)
    private = private_sgd(model, spec(noise_multiplier=0.0, max_grad_norm=0.5), without_privacy=True)
    private.backward(model(x).square().sum(1))
    private.step()
    assert torch.allclose(before - flat(model), expected, rtol=1e-5, atol=1e-7)


def test_micro_batches_add_up(spec: MakeSpec) -> None:
    x = torch.randn(9, 3)
    results = []
    for size in (9, 4, 1):
        model = linear()
        private = private_sgd(model, spec(), insecure_seed=1)
        for chunk in x.split(size):
            private.backward(model(chunk).square().sum(1))
        private.step()
        results.append(flat(model))
    # Equal noise, so equal grid points, up to one where rounding of the sum tips a tie.
    for other in results[1:]:
        assert (results[0] - other).abs().max() <= grid_step(spec().noise_stddev) / 8.0 + 1e-7


def test_empty_batch_is_noise_of_the_right_size_on_the_grid(spec: MakeSpec, device: torch.device) -> None:
    made = spec(noise_multiplier=2.0, max_grad_norm=0.5, expected_batch_size=4.0)
    model = nn.Linear(500, 400).double().to(device)
    before = flat(model)
    private = private_sgd(model, made)
    private.step()
    noise = (before - flat(model)) * 4.0
    n = noise.numel()
    assert abs(noise.std().item() / made.noise_stddev - 1.0) < 5.5 / math.sqrt(2 * n)
    assert abs(noise.mean().item()) < 5.5 * made.noise_stddev / math.sqrt(n)
    assert made.noise_stddev >= 2.0 * 0.5
    units = noise / grid_step(made.noise_stddev)
    assert (units - units.round()).abs().max() < 1e-6
    assert private.steps_charged == 1


def test_noise_is_fresh_for_every_step_and_tensor(spec: MakeSpec) -> None:
    model = nn.Sequential(*[nn.Linear(40, 40, bias=False) for _ in range(4)]).double()
    private = private_sgd(model, spec())
    rows = []
    for _ in range(5):
        before = flat(model)
        private.step()
        rows += list((before - flat(model)).reshape(4, -1))
    correlation = torch.corrcoef(torch.stack(rows)) - torch.eye(20, dtype=torch.float64)
    assert correlation.abs().max() < 6.5 / math.sqrt(1600)  # 190 pairs, 2e-8 in all


def test_low_precision_parameters_get_full_precision_noise(spec: MakeSpec) -> None:
    model = nn.Linear(100, 100, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.zero_()
    private = private_sgd(model, spec(expected_batch_size=1.0))
    seen = []
    private.optimizer.register_step_pre_hook(lambda *_: seen.append(model.weight.grad.dtype))
    private.step()
    assert seen == [torch.bfloat16]
    assert model.weight.float().std().item() == pytest.approx(1.0, rel=0.05)


def test_the_budget_ends_before_anything_is_released(spec: MakeSpec) -> None:
    model = linear()
    private = private_sgd(model, spec(steps=3))
    for _ in range(3):
        private.step()
    after = flat(model)
    with pytest.raises(RuntimeError, match="budget exhausted"):
        private.step()
    with pytest.raises(RuntimeError, match="budget exhausted"):
        private.backward(model(torch.randn(4, 3)).sum(1))
    assert torch.equal(flat(model), after)
    assert private.steps_charged == 3
    assert private.steps_left == 0


def test_the_inner_optimizer_cannot_be_stepped(spec: MakeSpec) -> None:
    model = linear()
    private = private_sgd(model, spec())
    with pytest.raises(RuntimeError, match=r"PrivateOptimizer\.step"):
        private.optimizer.step()
    private.backward(model(torch.randn(4, 3)).sum(1))
    assert model.weight.grad is None
    with pytest.raises(RuntimeError, match=r"PrivateOptimizer\.step"):
        private.optimizer.step(lambda: 0.0)
    with pytest.raises(RuntimeError, match="no closure"):
        private.step(lambda: 0.0)
    private.close()
    private.optimizer.step()


def test_gradients_are_gone_after_the_step(spec: MakeSpec) -> None:
    model = linear()
    private = private_sgd(model, spec())
    private.backward(model(torch.randn(4, 3)).sum(1))
    private.step()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not private.pending


def test_a_batch_is_dropped_only_on_purpose_and_stays_charged(spec: MakeSpec) -> None:
    model = linear()
    private = private_sgd(model, spec(noise_multiplier=0.0), without_privacy=True)
    private.zero_grad()
    private.backward(model(torch.randn(4, 3)).sum(1))
    assert private.pending
    with pytest.raises(RuntimeError, match="discard"):
        private.zero_grad()
    private.discard()
    assert private.steps_charged == 1
    before = flat(model)
    private.step()
    assert torch.equal(flat(model), before)
    assert private.steps_charged == 2


def test_a_failed_backward_adds_nothing(spec: MakeSpec) -> None:
    model = linear()
    private = private_sgd(model, spec(noise_multiplier=0.0), without_privacy=True)
    before = flat(model)
    with pytest.raises(RuntimeError, match="record axis"):
        private.backward(model(torch.randn(4, 3)).sum(1)[:2])
    with pytest.raises(RuntimeError, match="discard"):
        private.step()
    private.discard()
    private.step()
    assert torch.equal(flat(model), before)


def test_after_a_failed_backward_the_batch_can_only_be_discarded(
    spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Skipping out-of-memory batches would add the next batch to the half of this one: 2 C for one record."""
    model = linear()
    private = private_sgd(model, spec(noise_multiplier=0.0), without_privacy=True)
    private.backward(model(torch.randn(2, 3)).sum(1))
    with monkeypatch.context() as patch:
        patch.setattr(private._book, "clipped_sums", _out_of_memory)
        with pytest.raises(MemoryError):
            private.backward(model(torch.randn(2, 3)).sum(1))
    with pytest.raises(RuntimeError, match="discard"):
        private.backward(model(torch.randn(2, 3)).sum(1))
    private.discard()
    before = flat(model)
    private.step()
    assert torch.equal(flat(model), before)


def _out_of_memory(*_: object, **__: object) -> dict[str, Tensor]:
    raise MemoryError


def test_a_failed_release_is_a_discarded_batch(spec: MakeSpec) -> None:
    model = linear()
    private = private_sgd(model, spec())
    private.backward(model(torch.randn(2, 3)).sum(1))
    hook = private.optimizer.register_step_post_hook(_out_of_memory)
    with pytest.raises(MemoryError):
        private.step()
    hook.remove()
    assert not private.pending
    assert private._sums == {}
    assert model.weight.grad is None
    private.step()
    assert private.steps_charged == 2


def test_a_record_cannot_come_twice(spec: MakeSpec) -> None:
    model = linear()
    private = private_sgd(model, spec())
    private.backward(model(torch.randn(3, 3)).sum(1), records=torch.tensor([4, 7, 9]))
    with pytest.raises(ValueError, match="twice"):
        private.backward(model(torch.randn(2, 3)).sum(1), records=torch.tensor([1, 7]))
    with pytest.raises(ValueError, match="twice"):
        private.backward(model(torch.randn(2, 3)).sum(1), records=torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="shape"):
        private.backward(model(torch.randn(2, 3)).sum(1), records=torch.tensor([1]))
    with pytest.raises(ValueError, match=r"outside of \[0, 100\)"):
        private.backward(model(torch.randn(2, 3)).sum(1), records=torch.tensor([1, 100]))
    with pytest.raises(ValueError, match=r"outside of \[0, 100\)"):
        private.backward(model(torch.randn(2, 3)).sum(1), records=torch.tensor([-1, 1]))
    private.step()
    private.backward(model(torch.randn(1, 3)).sum(1), records=torch.tensor([7]))


@pytest.mark.parametrize(
    "records",
    [[0, 1], torch.tensor([0.0, 1.0]), torch.tensor([False, True]), torch.tensor([0, 1], dtype=torch.int32)],
    ids=["list", "float", "bool", "int32"],
)
def test_records_are_int64(spec: MakeSpec, records: Any) -> None:
    model = linear()
    private = private_sgd(model, spec())
    with pytest.raises(TypeError, match="int64"):
        private.backward(model(torch.randn(2, 3)).sum(1), records=records)
    assert private.steps_charged == 0


def test_wrong_types_are_named(spec: MakeSpec) -> None:
    model = linear()
    inner = torch.optim.SGD(model.parameters())
    for name, arguments in {
        "model": (lambda x: x, inner, spec()),
        "optimizer": (model, object(), spec()),
        "spec": (model, inner, spec().to_dict()),
    }.items():
        with pytest.raises(TypeError, match=f"^{name} must be"):
            PrivateOptimizer(*arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^ledger must be"):
        PrivateOptimizer(model, inner, spec(), ledger="ledger.jsonl")  # type: ignore[arg-type]
    private = PrivateOptimizer(model, inner, spec())
    with pytest.raises(TypeError, match="losses"):
        private.backward([1.0, 2.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not the state_dict of a PrivateOptimizer"):
        private.load_state_dict(inner.state_dict())


@pytest.mark.parametrize("name", ["spec", "ledger", "optimizer", "sampler"])
def test_what_a_run_is_made_of_cannot_be_exchanged(spec: MakeSpec, name: str) -> None:
    private = private_sgd(linear(), spec())
    with pytest.raises(AttributeError):
        setattr(private, name, None)


def test_a_poisoned_record_leaves_finite_parameters(spec: MakeSpec) -> None:
    model = linear()
    private = private_sgd(model, spec())
    x = torch.randn(4, 3)
    x[1, 0] = float("nan")
    private.backward(model(x).sum(1))
    private.step()
    assert torch.isfinite(flat(model)).all()


@pytest.mark.parametrize("fault", ["missing", "foreign", "added later"])
def test_groups_must_be_the_trainable_parameters(spec: MakeSpec, fault: str) -> None:
    model = linear()
    parameters = list(model.parameters())
    stranger = nn.Parameter(torch.zeros(2))
    if fault == "missing":
        with pytest.raises(ValueError, match=r"\['bias'\]"):
            PrivateOptimizer(model, torch.optim.SGD([model.weight]), spec())
    elif fault == "foreign":
        with pytest.raises(ValueError, match="1 trainable tensors"):
            PrivateOptimizer(model, torch.optim.SGD([*parameters, stranger]), spec())
    else:
        private = private_sgd(model, spec())
        private.optimizer.add_param_group({"params": [stranger]})
        with pytest.raises(ValueError, match="1 trainable tensors"):
            private.step()
        assert private.steps_charged == 0
        private.close()
    assert "forward" not in vars(model)


def test_frozen_parameters_may_sit_in_a_group(spec: MakeSpec) -> None:
    model = linear()
    model.bias.requires_grad_(False)
    before = model.bias.clone()
    private = private_sgd(model, spec())
    private.step()
    assert torch.equal(model.bias, before)


def test_a_frozen_parameter_with_a_gradient_is_not_stepped(spec: MakeSpec) -> None:
    """A left-over .grad of a frozen parameter would be applied at every step, unclipped and without noise."""
    model = nn.Sequential(linear(3, 3), linear(3, 2))
    model(torch.randn(4, 3)).sum().backward()
    model[0].requires_grad_(False)
    model[1].zero_grad()
    with pytest.raises(RuntimeError, match=r"2 tensors .* hold a \.grad"):
        private_sgd(model, spec())
    model.zero_grad()
    private = private_sgd(model, spec())
    before = flat(model[0])
    model[0].requires_grad_(True)
    model[0](torch.randn(4, 3)).sum().backward()
    model[0].requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"2 tensors .* hold a \.grad"):
        private.step()
    assert torch.equal(flat(model[0]), before)
    assert private.steps_charged == 0
    model[0].zero_grad()
    private.step()


def test_a_parameter_replaced_after_the_backward_is_noticed(spec: MakeSpec) -> None:
    model = linear()
    private = private_sgd(model, spec())
    private.backward(model(torch.randn(4, 3)).sum(1))
    model.weight = nn.Parameter(torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="replaced"):
        private.step()


def test_lbfgs_is_refused(spec: MakeSpec) -> None:
    model = linear()
    with pytest.raises(ValueError, match="LBFGS"):
        PrivateOptimizer(model, torch.optim.LBFGS(model.parameters()), spec())


def test_schedulers_work_on_the_inner_optimizer(spec: MakeSpec) -> None:
    model = linear()
    private = private_sgd(model, spec(noise_multiplier=0.0), without_privacy=True)
    scheduler = torch.optim.lr_scheduler.StepLR(private.optimizer, 1, gamma=0.5)
    private.step()
    scheduler.step()
    assert private.param_groups[0]["lr"] == 0.5


def test_no_noise_needs_consent(spec: MakeSpec) -> None:
    with pytest.raises(ValueError, match="without_privacy"):
        private_sgd(linear(), spec(noise_multiplier=0.0))


def test_privacy_spent(spec: MakeSpec) -> None:
    made = spec()
    private = private_sgd(linear(), made)
    private.step()
    spent = private.privacy_spent()
    assert spent["steps_charged"] == 1
    assert spent["steps_planned"] == 20
    assert spent["epsilon"] == made.epsilon()
    assert spent["epsilon_charged"] == made.with_steps(1).epsilon() < made.epsilon()
    assert private_sgd(linear(), made, insecure_seed=0).privacy_spent()["epsilon"] is None


def test_adam_trains_under_little_noise(spec: MakeSpec) -> None:
    torch.manual_seed(0)
    model, target = nn.Linear(4, 1), torch.randn(4, 1)
    made = spec(noise_multiplier=0.1, steps=200, expected_batch_size=64.0, max_grad_norm=1.0)
    private = PrivateOptimizer(model, torch.optim.AdamW(model.parameters(), lr=0.03), made)
    for _ in range(200):
        x = torch.randn(64, 4)
        private.backward((model(x) - x @ target).square().sum(1))
        private.step()

    assert (model.weight.detach().T - target).abs().max() < 0.15


@pytest.mark.parametrize("entries", [0, 20, 1 << 20])
def test_noise_of_parameters_together_is_that_of_each(
    spec: Callable[..., PrivacySpec], monkeypatch: pytest.MonkeyPatch, entries: int
) -> None:
    """Number i of a release's noise belongs to entry i of all parameters, whichever of them are passed together."""
    monkeypatch.setattr(release, "JOINED_ENTRIES", entries)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).double(), nn.Linear(5, 4), nn.Linear(3, 3))
    parameters = dict(model.named_parameters())
    sums = {name: torch.randn_like(p) for name, p in parameters.items() if name != "2.weight"}
    sums["3.bias"] = sums["3.bias"].double()
    key, one = NoiseKey.insecure(1), spec()
    expected, offset = {}, 0
    for name, p in parameters.items():
        total = sums.get(name, torch.zeros_like(p))
        expected[name] = wavedp.noisy_mean(
            total,
            2.0,
            divisor=one.expected_batch_size,
            key=key,
            offset=offset,
            out_dtype=p.dtype,
            grid=one.grid_of(2.0),
        )
        offset += p.numel()
    release.write_noisy_means(parameters, dict(sums), one, 2.0, key)
    for name, p in parameters.items():
        assert p.grad is not None
        assert torch.equal(p.grad, expected[name]), name
