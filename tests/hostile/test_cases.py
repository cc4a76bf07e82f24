# SPDX-License-Identifier: Apache-2.0
"""Every named case of misuse raises its error of the family, in a sentence; a command says it in one line."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import sharp_edges
import workbench
from workbench import Case

from wavedp import cli
from wavedp.errors import WavedpError

CASES = workbench.read_cases()
COMMANDS = [case for case in CASES if case.area == "command line"]
CALLS = [case for case in CASES if case.area != "command line"]

pytestmark = pytest.mark.filterwarnings("ignore")


def name_of(case: Case) -> str:
    return f"{case.area}-{case.name}"


def test_there_are_enough_cases_and_each_has_a_name_of_its_own() -> None:
    assert len(CASES) >= 300
    assert len(COMMANDS) >= 50
    twice = [name for name, count in Counter(map(name_of, CASES)).items() if count > 1]
    assert not twice


@pytest.mark.parametrize("case", CALLS, ids=name_of)
def test_a_call_is_refused(case: Case, tmp_path: Path) -> None:
    error = workbench.evaluate(case, tmp_path)
    assert isinstance(error, workbench.family(case.error)), f"{type(error).__name__}: {error}"
    assert workbench.says(" ".join(str(error).split()), case.message), str(error)


@pytest.mark.parametrize("case", COMMANDS, ids=name_of)
def test_a_command_is_refused_in_one_line(case: Case, tmp_path: Path) -> None:
    status, _, err = workbench.command(case, tmp_path)
    assert status == int(case.error)
    assert workbench.says(err, case.message), err
    assert err.startswith("wavedp")
    assert err.count("\n") == 1


def test_most_cases_are_of_the_family() -> None:
    outside = [case.name for case in CALLS if not issubclass(workbench.family(case.error), WavedpError)]
    assert len(outside) <= 1, outside


def test_the_page_has_the_cases() -> None:
    assert sharp_edges.PAGE.read_text(encoding="utf-8") == sharp_edges.page(CASES), (
        f"run: python {Path(sharp_edges.__file__).relative_to(sharp_edges.ROOT)}"
    )


def test_every_odd_use_has_a_test() -> None:
    uses = sharp_edges.read_uses()
    assert len({use["use"] for use in uses}) == len(uses) > 50
    for use in uses:
        file, name = use["test"].split()
        assert f"def {name}(" in (sharp_edges.ROOT / "tests" / file).read_text(encoding="utf-8"), use["test"]


@pytest.mark.parametrize(
    ("text", "pattern", "holds"),
    [("a b c", "a…c", True), ("a b c", "c…a", False), ("a b", "b", True), ("a b", "x", False)],
)
def test_a_pattern(text: str, pattern: str, holds: bool) -> None:
    assert workbench.says(text, pattern) == holds


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(_: object) -> None:
        raise error

    monkeypatch.setattr("wavedp.cli.precision_test.run", run)


def test_what_nobody_foresaw_is_one_line_and_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, KeyError("a\nb\x1b[31m"))
    assert cli.main(["precision-test"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "\x1b" not in err
    assert "KeyError that was not foreseen" in err
    assert "--traceback" in err


def test_a_message_of_several_lines_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, RuntimeError("first\n  second\x1b[2J"))
    assert cli.main(["precision-test"]) == 2
    assert capsys.readouterr().err == "wavedp precision-test: error: first second\\x1b[2J\n"


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), MemoryError()])
def test_traceback_raises(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    failing(monkeypatch, error)
    with pytest.raises(type(error)):
        cli.main(["precision-test", "--traceback"])
