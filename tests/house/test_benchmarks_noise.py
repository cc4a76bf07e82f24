# SPDX-License-Identifier: Apache-2.0
"""Noise as benchmark cases: the bytes of each provider, and that wrong noise is never timed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wavedp.benchmarks import run, table
from wavedp.benchmarks.cases import noise_normals, noise_steps
from wavedp.benchmarks.cases.noise import GPT, MODELS
from wavedp.benchmarks.cases.noise_checks import FILL, Moments, NoiseCase, NoiseProvider, check_digits
from wavedp.benchmarks.cases.noise_steps import ADAM, SGD, Rule, Tensors, check_step, plain_step
from wavedp.benchmarks.registry import Size, WrongResult

CPU = torch.device("cpu")
Results = Mapping[str, Path]  # of conftest.py
TRAFFIC = {  # (case, provider): passes, bytes an element
    ("normals", "Tensor.normal_"): (2, 12),
    ("normals", "wavedp"): (1, 4),
    ("normals", "torch.randn, out="): (2, 12),
    ("normals", "NumPy"): (1, 4),
    ("normals", "Opacus secure mode"): (14, 4 * (1 + 4 * 6 + 2)),
    ("noisy_mean", "copy_"): (1, 8),
    ("noisy_mean", "wavedp"): (1, 8),
    ("noisy_mean", "plain torch"): (6, 48),
    ("step-adamw", "AdamW, no noise"): (1, 28),
    ("step-adamw", "wavedp"): (1, 28),
    ("step-adamw", "wavedp, std=0"): (1, 28),
    ("step-adamw", "wavedp, strict"): (1, 28),
    ("step-adamw", "wavedp, with an average"): (1, 36),
    ("step-adamw", "plain torch"): (4, 52),
    ("step-adamw", "Opacus"): (13, 116),
    ("step-adamw", "Opacus, fused"): (6, 64),
    ("step-sgd", "SGD, no noise"): (1, 20),
    ("step-sgd", "wavedp"): (1, 20),
    ("step-sgd", "wavedp, std=0"): (1, 20),
    ("step-sgd", "wavedp, strict"): (1, 20),
    ("step-sgd", "wavedp, with an average"): (1, 28),
    ("step-sgd", "plain torch"): (4, 44),
    ("step-sgd", "Opacus"): (8, 68),
    ("step-sgd", "Opacus, fused"): (6, 56),
}


def test_each_provider_has_the_bytes_that_it_moves(results: Results) -> None:
    rows = table.read([results["noise"]])
    found = {}
    for row in rows:
        if "threads" not in row["provider"]:
            found[row["case"], row["provider"]] = (int(row["passes"]), int(row["bytes"]) / int(row["shape"]))
    opacus = importlib.util.find_spec("opacus") is not None
    assert found == {
        key: value for key, value in TRAFFIC.items() if opacus or key[1] not in ("Opacus", "Opacus, fused")
    }


def test_the_steps_are_of_50_million_parameters() -> None:
    assert GPT.shape == (50_412_544,)
    assert len(GPT.shapes) == 147
    assert MODELS["cuda"][1].shape[0] > 750_000_000


def normals_case(fill: Callable[[Tensor], object]) -> NoiseCase:
    def make(size: Size, device: torch.device) -> dict[str, NoiseProvider]:
        return {"Tensor.normal_": noise_normals.filler(fill, torch.empty(size.shape), (FILL,))}

    sizes = {"quick": [Size((40_000,))], "cpu": [], "cuda": []}
    return NoiseCase("normals", "Tensor.normal_", make, sizes)


@pytest.mark.parametrize(
    ("fill", "complaint"),
    [
        (lambda x: x.normal_(0.05), "mean"),
        (lambda x: x.normal_(0.0, 1.05), "variance"),
        (lambda x: x.uniform_(-(3**0.5), 3**0.5), "fourth moment"),
        (lambda x: x[:-1].normal_(), "mean is nan"),
    ],
    ids=["mean", "variance", "uniform", "unwritten"],
)
def test_wrong_noise_is_never_timed(
    fill: Callable[[Tensor], object], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "time_in_turns", lambda *arguments: pytest.fail("it was timed"))
    case = normals_case(fill)
    with pytest.raises(WrongResult, match=f"normals, Tensor.normal_: the noise's {complaint}"):
        run.run_size(case, case.sizes["quick"][0], CPU, 1, 0.0, quick=True)


def test_right_noise_is_timed() -> None:
    (row,) = run.run_size(normals_case(Tensor.normal_), Size((40_000,)), CPU, 3, 0.0, quick=True)
    assert (row["provider"], row["passes"], row["bytes"]) == ("Tensor.normal_", "1", "160000")


def test_a_sum_that_is_added_wrongly_shows() -> None:
    total, noise = torch.randn(40_000), torch.randn(40_000)
    right, wrong = Moments(), Moments()
    right.add(noise, total)
    right.check("right")
    wrong.add(noise + 0.05 * total, total)
    with pytest.raises(WrongResult, match="share of the sum"):
        wrong.check("wrong")


def test_digits_are_those_of_the_definition() -> None:
    x = torch.randn(100)
    check_digits("same", x, x + 1e-6)
    with pytest.raises(WrongResult, match="off by 1e-05 from the definition"):
        check_digits("other", x.double(), x.double() + 1e-5)


QUICK = MODELS["quick"][0]


@pytest.mark.parametrize("rule", [ADAM, SGD], ids=["adamw", "sgd"])
def test_a_wrong_step_is_found(rule: Rule) -> None:
    tensors = Tensors(QUICK, CPU)

    def wrong(change: Callable[[], object]) -> Callable[[], Callable[[], None]]:
        def prepare() -> Callable[[], None]:
            step = plain_step(rule, tensors, True)

            def call() -> None:
                step()
                change()

            return call

        return prepare

    with torch.no_grad():
        check_step(rule, tensors, wrong(lambda: None), "right", 0.0)
        with pytest.raises(WrongResult, match=r"mean is|variance is"):
            check_step(rule, tensors, wrong(lambda: None), "no noise", 1.0)
        with pytest.raises(WrongResult, match="a step without noise is off by"):
            check_step(rule, tensors, wrong(lambda: tensors.get("first")[3].add_(1e-4)), "noise", 0.0)
        with pytest.raises(WrongResult, match="a parameter is off by"):
            check_step(rule, tensors, wrong(lambda: tensors.get("params")[3].mul_(0.999)), "decay", 0.0)


@pytest.mark.parametrize("rule", [ADAM, SGD], ids=["adamw", "sgd"])
def test_every_provider_steps_whoever_stepped_before(rule: Rule) -> None:
    """They share memory, not gradients: Opacus' None would be a step that does nothing."""
    found = noise_steps.steps_of(rule, QUICK, CPU)
    calls = {name: provider.prepare() for name, provider in found.items()}
    shared = next(
        cell.cell_contents
        for cell in found["plain torch"].prepare.__closure__  # type: ignore[union-attr]
        if isinstance(cell.cell_contents, Tensors)
    )
    shared.renew()
    for call in calls.values():
        call()
    for name, call in calls.items():
        before = [param.clone() for param in shared.get("params")]
        call()
        for param, old in zip(shared.get("params"), before):
            assert not torch.equal(param, old), name


def test_the_table_has_a_line_for_each_provider() -> None:
    same = {"case": "s", "shape": "1000000", "dtype": "float32", "device": "D", "threads": "2", "torch": "2"}
    rows = [
        {**same, "provider": "floor", "passes": "1", "bytes": "28000000", "median_ms": "2", "floor_ratio": "1"},
        {**same, "provider": "wavedp", "passes": "1", "bytes": "28000000", "median_ms": "3", "floor_ratio": "0.667"},
        {**same, "provider": "unknown", "passes": "", "bytes": "", "median_ms": "8", "floor_ratio": "0.25"},
    ]  # fmt: skip
    text = table.noise_markdown([{**row, "date": "today"} for row in rows])
    assert "| `s` 1000000 float32 | `floor` | 1 | 28 | 2 | 2.00 | 1.00 |" in text
    assert "|  | **`wavedp`** | 1 | 28 | 3 | 3.00 | **1.50** |" in text
    assert "|  | `unknown` |  |  | 8 | 8.00 | 4.00 |" in text
