# SPDX-License-Identifier: Apache-2.0
"""Training steps as benchmark cases: a wrong gradient is never timed, every trainer is right, memory is measured."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wavedp.benchmarks import measure, memory, registry, run, steps, table
from wavedp.benchmarks.cases import SUITES, dp
from wavedp.benchmarks.measure import Timing
from wavedp.benchmarks.registry import WrongResult
from wavedp.benchmarks.steps import Batch, Mechanism, Step, StepCase, Trainer, Workload

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
Results = Mapping[str, Path]  # of conftest.py


class Line(nn.Module):
    """Losses w . x + bias: a record's gradient is (x, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:  # [B, 2] -> [B]
        return self.linear(x)[:, 0]


X = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0], [6.0, 8.0]])
NORMS = (X.square().sum(1) + 1).sqrt()  # 3.16, 4.12, 1, 10.05: the third smallest is the bound
LINE = Workload((4, 2), Line, lambda: (X,))


def line_case(**trainers: Trainer) -> StepCase:
    return StepCase("line", lambda device: trainers, {"quick": [LINE], "cpu": [LINE], "cuda": []})


def exact(model: nn.Module, optimizer: torch.optim.Optimizer, mechanism: Mechanism) -> Step:
    """Record by record."""

    def step(batch: Batch) -> None:
        total = [torch.zeros_like(p) for p in model.parameters()]
        for x in batch[0]:
            grads = torch.autograd.grad(model(x[None]).sum(), list(model.parameters()))
            norm = torch.cat([g.flatten() for g in grads]).norm()
            for sum_, g in zip(total, grads):
                sum_ += g * min(1.0, mechanism.max_grad_norm / norm.item())
        for p, sum_ in zip(model.parameters(), total):
            noise = mechanism.noise_multiplier * mechanism.max_grad_norm * torch.randn_like(sum_)
            p.grad = (sum_ + noise) / mechanism.expected_batch_size
        optimizer.step()

    return step


def changed(change: Callable[[nn.Module], object]) -> Trainer:
    """``exact``, whose gradients are changed before the optimizer sees them."""

    def prepare(model: nn.Module, optimizer: torch.optim.Optimizer, mechanism: Mechanism) -> Step:
        optimizer.register_step_pre_hook(lambda *_: change(model))
        return exact(model, optimizer, mechanism)

    return Trainer(prepare, may_refuse=False)


def test_the_expected_gradients_are_those_of_a_formula() -> None:
    bound, (weight, bias) = steps.clipped_mean(Line(), (X,))
    assert bound == pytest.approx(NORMS.sort().values[2].item(), rel=1e-6)
    factors = (bound / NORMS.double()).clamp(max=1)
    torch.testing.assert_close(weight[0], (factors[:, None] * X.double()).mean(0))
    torch.testing.assert_close(bias[0], factors.mean())
    _, (weight, bias) = steps.mean_gradient(Line(), (X,))
    assert (weight.tolist(), bias.tolist()) == ([[2.25, 3.0]], [1.0])


def test_a_record_without_gradient_is_not_divided_by_its_norm() -> None:
    class Nothing(Line):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0

    _, grads = steps.clipped_mean(Nothing(), (X,))
    assert all(grad.eq(0).all() for grad in grads)


def test_a_right_step_is_timed_beside_the_plain_one() -> None:
    case = line_case(mine=Trainer(exact), **{steps.FLOOR: dp.trainers(CPU)[steps.FLOOR]})
    rows = run.run_size(case, LINE, CPU, repeats=3, sample_seconds=0.0, quick=True)
    assert [(row["provider"], row["floor"]) for row in rows] == [(steps.FLOOR, steps.FLOOR), ("mine", steps.FLOOR)]
    assert [row["booked_bytes"] for row in rows] == ["16", "16"]  # [4, 1] outputs in float32
    assert rows[0]["floor_ratio"] == "1.000"


def scale(model: nn.Module) -> None:
    for p in model.parameters():
        assert p.grad is not None
        p.grad.mul_(1.001)


def forget_bias(model: nn.Module) -> None:
    list(model.parameters())[1].grad = None


def poison(model: nn.Module) -> None:
    grad = next(model.parameters()).grad
    assert grad is not None
    grad[0, 0] = torch.nan


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (scale, "gradient 0 is off by"),
        (forget_bias, "gradient 1 is off by"),
        (poison, "gradient 0 is off by nan"),
    ],
)
def test_a_wrong_step_is_never_timed(
    change: Callable[[nn.Module], None], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "time_in_turns", lambda *arguments: pytest.fail("it was timed"))
    with pytest.raises(WrongResult, match=f"line, wrong: {complaint}"):
        run.run_size(line_case(wrong=changed(change)), LINE, CPU, 1, 0.0, quick=True)


def test_a_step_that_does_not_clip_is_wrong() -> None:
    def unclipped(model: nn.Module, optimizer: torch.optim.Optimizer, mechanism: Mechanism) -> Step:
        return exact(model, optimizer, Mechanism(mechanism.expected_batch_size, 1e9, 0.0))

    with pytest.raises(WrongResult, match="line, wrong"):
        line_case(wrong=Trainer(unclipped)).timed(LINE, CPU, quick=True)


def test_a_library_that_raises_is_left_out_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(model: nn.Module, optimizer: torch.optim.Optimizer, mechanism: Mechanism) -> Step:
        raise NotImplementedError("no such layer\nand much more")

    floor = {steps.FLOOR: dp.trainers(CPU)[steps.FLOOR]}
    rows = run.run_size(line_case(rival=Trainer(refuse), **floor), LINE, CPU, 1, 0.0, quick=True)
    assert [row["provider"] for row in rows] == [steps.FLOOR]
    shown = capsys.readouterr().err
    assert "line 4x2 float32: rival is left out: NotImplementedError: no such layer\n" in shown
    with pytest.raises(NotImplementedError):
        line_case(ours=Trainer(refuse, may_refuse=False)).timed(LINE, CPU, quick=True)


def test_every_trainer_that_is_installed_was_right_on_the_quick_models(results: Results) -> None:
    rows = table.read([results["dp"]])
    wanted = {"non-private", "wavedp", "torch.func"}
    if importlib.util.find_spec("opacus"):
        wanted |= {"Opacus hooks", "Opacus ghost"}
    for case, more in (("gpt-256", {"Opacus ew"}), ("pipeline-demo", set())):
        there = {row["provider"] for row in rows if row["case"] == case}
        assert there - {"fastDP MixOpt"} == wanted | (more if "Opacus hooks" in wanted else set())


def test_the_functions_have_their_rivals_and_floors(results: Results) -> None:
    found: dict[str, set[str]] = {}
    for row in table.read([results["dp"]]):
        if row["floor"] != steps.FLOOR:
            found.setdefault(row["case"], set()).add(row["provider"])
    assert found == {
        "ghost_norm": {"sum", "mm of all records", "wavedp", "bmm, T x T Gram", "einsum, B x P gradients"},
        "embedding_grad_norm": {
            "sum",
            "wavedp",
            "index_add, B x P gradients",
            "one-hot",
            "bmm, T x T mask",
        },
        "clip_and_sum": {"sum", "wavedp", "eager"},
        "scaled_weight_grad": {"mm", "wavedp", "scale, then mm"},
    }


def test_the_floor_of_a_scaled_gradient_is_the_product() -> None:
    g, a = torch.randn(2, 3, 5), torch.randn(2, 3, 4)
    floor = registry.make_floor("mm", registry.Size((2, 3, 4, 5)), [g, a, torch.ones(2)], moved=7)
    torch.testing.assert_close(floor.call(), torch.einsum("btp,btd->pd", g, a))
    assert (floor.floor, floor.bytes) == ("mm", 7)
    beside = registry.make_floor("mm of all records", registry.Size((2, 3, 4, 5)), [g, a], moved=7)
    assert beside.floor == "sum"


@pytest.mark.parametrize(
    ("name", "parameters"), [("gpt-256", 3_716_608), ("gpt-512", 14_727_168), ("pipeline-demo", 167_104)]
)
def test_the_models_have_the_sizes_that_are_reported(name: str, parameters: int) -> None:
    (case,) = (case for case in SUITES["dp"] if case.name == name)
    (size,) = case.sizes["cpu"]
    model = steps.make_model(size, CPU)
    assert sum(p.numel() for p in model.parameters()) == parameters
    batch = steps.make_batch(size, CPU)
    assert tuple(batch[0].shape) == size.shape
    with torch.no_grad():
        losses = model(*(x[:2] for x in batch))
    assert losses.shape == (2,)
    codes = {"gpt-256": 1024, "gpt-512": 8192, "pipeline-demo": 128}[name]
    assert losses.mean().item() == pytest.approx(torch.tensor(codes).log().item(), rel=0.15)  # a guess at random


def test_models_and_batches_are_the_same_each_time() -> None:
    (size,) = dp.QUICK_GPT
    before = torch.random.get_rng_state()
    first, second = (steps.make_model(size, CPU) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(steps.make_batch(size, CPU), steps.make_batch(size, CPU)))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_copy_in_float64_computes_the_same_function() -> None:
    (size,) = dp.QUICK_PIPELINE
    model, batch = steps.make_model(size, CPU), steps.make_batch(size, CPU)
    exact_losses = steps.in_float64(model)(*batch)
    assert exact_losses.dtype == torch.float64
    torch.testing.assert_close(model(*batch).double(), exact_losses, rtol=1e-6, atol=1e-6)  # eps of RMSNorm by dtype


def test_output_gradients_are_counted_of_every_call() -> None:
    (size,) = dp.QUICK_GPT
    model, batch = steps.make_model(size, CPU), steps.make_batch(size, CPU)
    d, V, layers = 16, 32, 2
    block = d + 3 * d + d + d + 4 * d + d  # norm, qkv, projection, norm, MLP in and out
    assert steps.booked_bytes(model, batch) == 4 * 4 * 8 * (2 * d + layers * block + d + V)


def test_ratios_are_taken_within_a_repeat() -> None:
    """In the second repeat the machine was three times slower for both."""
    floor, timing = Timing(2, 1, 3, samples=(1.0, 3.0, 2.0)), Timing(4, 2, 6, samples=(2.0, 6.0, 3.0))
    assert measure.paired_ratio(floor, timing) == 0.5
    assert measure.summary([3.0, 1.0, 2.0]).samples == (3.0, 1.0, 2.0)


def test_no_sample_is_of_a_step_that_is_a_power_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []  # steps of the timed model when a sample begins
    calls = 0

    def prepare(model: nn.Module, optimizer: torch.optim.Optimizer, mechanism: Mechanism) -> Step:
        def step(batch: Batch) -> None:
            nonlocal calls
            calls += bool(mechanism.noise_multiplier)
            exact(model, optimizer, mechanism)(batch)

        return step

    sample = measure.sample

    def seen(*arguments: Any) -> float:
        taken.append(calls + 1)
        return sample(*arguments)

    monkeypatch.setattr(measure, "sample", seen)
    found = line_case(mine=Trainer(prepare)).timed(LINE, CPU, quick=True)
    measure.time_in_turns({"mine": found["mine"].call}, CPU, repeats=7, sample_seconds=0.0)
    assert taken[-7:] == [5, 7, 9, 11, 13, 15, 17]


@pytest.mark.skipif(not memory.can_measure(), reason="needs a Linux /proc whose peak can be reset")
def test_the_peak_is_what_a_step_holds_at_once() -> None:
    """In a process whose allocator nobody has told to keep freed memory."""
    program = (
        "from wavedp.benchmarks import memory; step = lambda: bytearray(b'x') * (64 << 20); kept = []; "
        "print(memory.measure(step), memory.measure(lambda: kept.append(step())))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)
    freed, kept = map(int, done.stdout.split())
    assert freed == pytest.approx(64 << 20, rel=0.1)
    assert kept == pytest.approx(3 * (64 << 20), rel=0.1)


@pytest.mark.skipif(not memory.can_measure(), reason="needs a Linux /proc whose peak can be reset")
def test_a_process_of_its_own_measures_a_step() -> None:
    (size,) = dp.QUICK_GPT
    peak = memory.peak_bytes("gpt-256", steps.FLOOR, size.shape, CPU, lambda: pytest.fail("called here"))
    assert peak is not None
    assert 1e5 < peak < 1e8
    with pytest.raises(RuntimeError, match="no training step gpt-256 of 1x1"):
        memory.peak_bytes("gpt-256", steps.FLOOR, (1, 1), CPU, lambda: None)
