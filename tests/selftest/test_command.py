# SPDX-License-Identifier: Apache-2.0
"""`wavedp selftest`: its tables, its exit status, and that the documentation's table is of the bugs there are."""

import json
import re
from pathlib import Path

import pytest

from wavedp.cli import EXIT_ERROR, main
from wavedp.selftest import BUGS, DETECTORS
from wavedp.selftest.planting import Bug

DOCUMENT = Path(__file__).parents[2] / "docs" / "selftest.md"


def test_one_bug_is_caught_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--only", "no_noise", "--seeds", "1", "--processes", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["bug", "class", "source", "seconds", "caught", "by"]
    assert re.fullmatch(r"no_noise  noise +.+ +\d+\.\d\d  canary", lines[1])
    assert lines[-1].startswith("1 of 1 planted bugs caught; 0 false alarms in 1 seeds of all detectors on the right")


def test_json_holds_what_every_detector_said(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["selftest", "--only", "no_noise", "--only", "two_writers", "--json", "--processes", "1"]
    assert main([*arguments, "--every-detector"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["passed"]
    assert [bug["bug"] for bug in answer["bugs"]] == ["no_noise", "two_writers"]
    assert {"canary", "noise law"} <= {finding["detector"] for finding in answer["bugs"][0]["found"]}
    assert [finding["detector"] for finding in answer["bugs"][1]["found"]] == ["ledger"]
    assert answer["seeds"] == 0
    assert [one["name"] for one in answer["detectors"]] == [one.name for one in DETECTORS]


def test_a_missed_bug_exits_with_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    harmless = Bug("harmless", "noise", "nobody", "Runs and changes nothing.", lambda planted: planted.mark())
    monkeypatch.setitem(BUGS, "harmless", harmless)
    assert main(["selftest", "--only", "harmless", "--processes", "1"]) == 1
    assert "MISSED" in capsys.readouterr().out


def test_an_unknown_bug_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--only", "no_such_bug"]) == EXIT_ERROR
    assert "there is no planted bug 'no_such_bug'; wavedp selftest --list" in capsys.readouterr().err


def test_list_names_every_bug(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(BUGS)


def test_two_processes_find_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--only", "two_writers", "--processes", "2", "--markdown"]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[2].startswith(f"| `two_writers` | ledger | {BUGS['two_writers'].source} |")
    assert "1 of 1 planted bugs caught" in shown.err


def test_the_documented_table_is_of_the_bugs_there_are() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.+?) \| (.+?) \| (.+?) \| [\d.]+ \|$", DOCUMENT.read_text(), re.M)
    assert [row[0] for row in rows] == list(BUGS)
    for name, kind, source, what, caught_by in rows:
        bug = BUGS[name]
        assert (kind, source, what) == (bug.kind, bug.source, bug.what)
        assert set(caught_by.split(", ")) <= {one.name for one in DETECTORS}
