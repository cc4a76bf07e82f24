# SPDX-License-Identifier: Apache-2.0
"""`wavedp noise-law`: its table, its exit status, and who makes the noise."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

import wavedp
from wavedp import functional
from wavedp.cli import main
from wavedp.ops.backend import requested_backend
from wavedp.privacy import noise_law


def test_right_noise_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["noise-law", "--draws", "1e6", "--seed", "1"]) == 0
    first, heading, *tests, last = capsys.readouterr().out.splitlines()
    assert first.startswith("draws 1000000, backend auto, dtype float32, mode standard, device cpu, false_alarm 1e-06")
    assert heading.split() == ["measured", "expected", "p-value"]
    assert last == f"all {len(tests)} tests passed"
    assert tests[0].startswith("mean ")
    assert main(["noise-law", "--draws", "1e6", "--seed", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[2:-1] == tests


def test_wrong_noise_exits_with_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = functional.gaussian_noise

    def low(shape: tuple[int, ...], std: float, **options: Any) -> Tensor:
        return right(shape, 0.99 * std, **options)

    monkeypatch.setattr(functional, "gaussian_noise", low)
    assert main(["noise-law", "--draws", "1e6"]) == 1
    shown = capsys.readouterr().out
    (line,) = (line for line in shown.splitlines() if line.startswith("variance"))
    assert "FAILED: below 3.1e-08" in line
    failed = sum("FAILED" in line for line in shown.splitlines())  # the distribution function may show it too
    assert shown.endswith(f"{failed} of 32 tests failed\n")
    assert main(["noise-law", "--draws", "1e6", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert not answer["passed"]
    assert [test["name"] for test in answer["tests"] if not test["passed"]][:1] == ["variance"]


@pytest.mark.parametrize("instructions", ["baseline", "avx2", "avx512"])
def test_the_instruction_set_is_the_one_that_is_asked_for(
    instructions: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    native = pytest.importorskip("wavedp._csrc", reason="needs the C++ library")
    before = native.isa()
    try:
        with wavedp.ops.use_instructions(instructions):
            pass
    except ValueError:
        pytest.skip(f"needs a CPU with {instructions}")
    seen = []

    def check(source: noise_law.NoiseSource, draws: int, **options: object) -> list[noise_law.LawTest]:
        seen.append((native.isa(), requested_backend(), draws, source.draw(2, 0, 0, 0).dtype))
        return [noise_law.LawTest("mean", 0.0, 0.0, 1.0, 1e-8)]

    monkeypatch.setattr(noise_law, "check_noise_law", check)
    assert main(["noise-law", "--instructions", instructions, "--dtype", "float64", "--draws", "2e6"]) == 0
    assert seen == [(instructions, "native", 2_000_000, torch.float64)]
    assert native.isa() == before
    assert "all 1 tests passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--backend", "reference", "--instructions", "avx2"], "those of the backend native, not of reference"),
        (["--backend", "numpy"], "unknown backend 'numpy'"),
        (["--instructions", "mmx"], "mmx"),
    ],
)
def test_a_wrong_choice_is_refused(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["noise-law", "--draws", "1e6", *arguments]) == 2
    assert complaint in capsys.readouterr().err


def test_too_few_draws_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["noise-law", "--draws", "1e5"])
    assert "must be >= 1e+06" in capsys.readouterr().err
