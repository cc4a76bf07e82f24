# SPDX-License-Identifier: Apache-2.0
"""Runs that share a ledger share a budget: together they never pass it, and none can be forgotten."""

import errno
import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wavedp.privacy import (
    LedgerError,
    PrivacyBudget,
    PrivacyLedger,
    PrivacySpec,
    check_not_forked,
    composed_epsilon,
    read_ledger,
)
from wavedp.privacy.ledger_file import digest_of

MakeSpec = Callable[..., PrivacySpec]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "faces.jsonl"


def roomy(spec: PrivacySpec, runs: float, **values: Any) -> PrivacyBudget:
    """A budget with room for exactly so many runs of one specification, added up."""
    return PrivacyBudget(epsilon=runs * spec.epsilon(), delta=runs * spec.delta, **values)


def test_runs_add_up_and_the_one_that_does_not_fit_is_refused(path: Path, spec: MakeSpec) -> None:
    made = spec()
    budget = roomy(made, 2.5)
    for count, name in enumerate(["first", "second"], start=1):
        with PrivacyLedger(path, made, budget=budget, run=name) as ledger:
            assert (ledger.charged, ledger.remaining) == (0, made.steps)
            ledger.reserve(3)
            assert (ledger.charged, ledger.runs) == (3, ("first", "second")[:count])
            assert ledger.spent() == pytest.approx((count * made.epsilon(), count * made.delta))
    content = path.read_bytes()
    with pytest.raises(LedgerError, match=r"privacy budget exhausted: .* with the run 'third' it would be"):
        PrivacyLedger(path, made, run="third")
    assert path.read_bytes() == content
    half = spec(steps=1, noise_multiplier=4.0, delta=made.delta / 2)
    with PrivacyLedger(path, half, run="third") as ledger:  # and the rest is still there for it
        ledger.reserve(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": 1e-3}, "privacy budget exhausted"),
        ({"delta": 0.5}, "must be below 1/dataset_size_bound"),
        ({"unit": "hospital"}, "differ in unit"),
    ],
)
def test_a_first_run_that_is_refused_leaves_no_ledger(
    path: Path, spec: MakeSpec, changes: dict[str, Any], message: str
) -> None:
    budget = PrivacyBudget(**{"epsilon": 100.0, "delta": 5e-3, **changes})
    with pytest.raises(LedgerError, match=message):
        PrivacyLedger(path, spec(), budget=budget, run="first")
    assert list(path.parent.iterdir()) == []


def test_a_run_resumes_under_its_name_and_never_gets_more_than_its_plan(path: Path, spec: MakeSpec) -> None:
    made = spec(label_noise_multiplier=5.0)
    other = spec(noise_multiplier=2.0)
    budget = PrivacyBudget(epsilon=100.0, delta=5e-3)
    with PrivacyLedger(path, made, budget=budget, run="a") as ledger:
        ledger.release("label_histogram", "a.json")
        ledger.reserve(15)
    with PrivacyLedger(path, other, run="b") as ledger:
        assert (ledger.charged, ledger.released) == (0, {})
        ledger.reserve(7)
        assert ledger.spent()[0] == pytest.approx(made.epsilon() + other.epsilon())
    with PrivacyLedger(path, made, budget=budget, run="a") as ledger:
        assert (ledger.charged, ledger.remaining, ledger.released) == (15, 5, {"label_histogram": "a.json"})
        with pytest.raises(RuntimeError, match="5 of 20 left"):
            ledger.reserve(6)
        with pytest.raises(RuntimeError, match=r"read its result in a\.json"):
            ledger.release("label_histogram")
        ledger.reserve(5)
    with pytest.raises(LedgerError, match=r"run 'a', was opened for another specification.*noise_multiplier"):
        PrivacyLedger(path, other, run="a")
    with PrivacyLedger(path, spec(noise_multiplier=2.0, expected_batch_size=3.0), run="b") as ledger:
        assert ledger.charged == 7
    kinds = [(line["kind"], line.get("run")) for line in map(json.loads, path.read_text().splitlines())]
    assert kinds == [
        *[("create", None), ("run", "a"), ("release", "a"), ("reserve", "a")],
        *[("run", "b"), ("reserve", "b"), ("reserve", "a")],
    ]


def test_a_run_that_took_nothing_holds_nothing(path: Path, spec: MakeSpec) -> None:
    made = spec()
    for name in "abc":
        PrivacyLedger(path, made, budget=roomy(made, 1), run=name).close()
    with PrivacyLedger(path, made, run="d") as ledger:
        assert ledger.spent() == (0.0, 0.0)
        ledger.reserve(1)
    with pytest.raises(LedgerError, match="exhausted"):
        PrivacyLedger(path, made, run="a")


def test_composition_follows_from_the_choice_of_runs(spec: MakeSpec) -> None:
    """Added up where runs were chosen by results; composed as one mechanism where they were fixed before."""
    a, b, strict = spec(), spec(noise_multiplier=2.0), spec(noise_mode="strict", trainable_parameters=8)
    adaptive = PrivacyBudget(epsilon=50.0, delta=3e-3)
    joint = PrivacyBudget(epsilon=50.0, delta=3e-3, composition="joint")
    assert adaptive.spent([]) == joint.spent([]) == (0.0, 0.0)
    assert adaptive.spent([a, b]) == pytest.approx((a.epsilon() + b.epsilon(), 2e-3))
    assert joint.spent([a, b]) == pytest.approx((composed_epsilon([*a.phases(), *b.phases()], 3e-3), 3e-3))
    assert joint.spent([a, a])[0] < 0.9 * adaptive.spent([a, a])[0]
    assert joint.spent([a, strict]) == pytest.approx((strict.epsilon() + composed_epsilon(a.phases(), 2e-3), 3e-3))
    assert joint.spent([strict]) == pytest.approx((strict.epsilon(), 1e-3))
    assert joint.spent([a, strict, strict, strict]) == (math.inf, 3e-3)  # no delta is left for the first
    assert adaptive.spent([a, spec(noise_multiplier=0.0)])[0] == math.inf


def test_the_limit_itself_is_inside(spec: MakeSpec) -> None:
    made = spec(delta=1e-3 / 3)
    assert PrivacyBudget(epsilon=3 * made.epsilon(), delta=1e-3).covers([made] * 3)
    assert not PrivacyBudget(epsilon=3 * made.epsilon() * (1 - 1e-9), delta=1e-3).covers([made] * 3)
    assert not PrivacyBudget(epsilon=3 * made.epsilon(), delta=0.9e-3).covers([made] * 3)


def test_a_run_without_noise_never_fits(path: Path, spec: MakeSpec) -> None:
    with pytest.raises(LedgerError, match="would be inf"):
        PrivacyLedger(path, spec(noise_multiplier=0.0), budget=PrivacyBudget(epsilon=1e6, delta=1e-3), run="a")


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"epsilon": 0.0}, ValueError, "budget epsilon"),
        ({"epsilon": math.inf}, ValueError, "budget epsilon"),
        ({"delta": 1.0}, ValueError, "budget delta"),
        ({"delta": "1e-5"}, TypeError, "budget delta"),
        ({"composition": "advanced"}, ValueError, "composition='advanced'"),
        ({"unit": " "}, ValueError, "unit"),
        ({"neighboring_relation": "replace_one"}, ValueError, "neighboring_relation"),
    ],
    ids=str,
)
def test_a_budget_out_of_range_is_refused(values: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PrivacyBudget(**{"epsilon": 1.0, "delta": 1e-5, **values})


def test_what_does_not_belong_together_is_refused(path: Path, spec: MakeSpec, tmp_path: Path) -> None:
    made = spec()
    budget = PrivacyBudget(epsilon=100.0, delta=5e-3)
    with pytest.raises(TypeError, match="must be a PrivacyBudget"):
        PrivacyLedger(path, made, budget=10.0, run="a")
    with pytest.raises(ValueError, match="name this one with run="):
        PrivacyLedger(path, made, budget=budget)
    with pytest.raises(ValueError, match="must be a name"):
        PrivacyLedger(path, made, budget=budget, run=" ")
    with pytest.raises(FileNotFoundError, match="needs a budget"):
        PrivacyLedger(path, made, run="a")
    assert list(tmp_path.iterdir()) == []
    PrivacyLedger(path, made, budget=budget, run="a").close()
    with pytest.raises(LedgerError, match="is shared by runs"):
        PrivacyLedger(path, made)
    with pytest.raises(LedgerError, match="another budget"):
        PrivacyLedger(path, made, budget=PrivacyBudget(epsilon=101.0, delta=5e-3), run="a")
    with pytest.raises(LedgerError, match="differ in unit"):
        PrivacyLedger(path, spec(unit="person"), run="a")
    with pytest.raises(LedgerError, match=r"below 1/dataset_size_bound = 0\.005"):
        PrivacyLedger(path, spec(dataset_size_bound=200), run="a")
    PrivacyLedger(tmp_path / "single", made).close()
    for given in (budget, None):
        with pytest.raises(LedgerError, match="the ledger of a single run"):
            PrivacyLedger(tmp_path / "single", made, budget=given, run="a")
    with PrivacyLedger(tmp_path / "single", made) as ledger:
        assert (ledger.budget, ledger.run, ledger.spent()) == (None, "", (made.epsilon(), made.delta))


@pytest.fixture
def shared(path: Path, spec: MakeSpec) -> Path:
    for name, noise in (("a", 1.0), ("b", 2.0)):
        budget = PrivacyBudget(epsilon=100.0, delta=5e-3)
        with PrivacyLedger(path, spec(noise_multiplier=noise), budget=budget, run=name) as ledger:
            ledger.reserve(4)
    return path


def test_any_changed_byte_of_a_shared_ledger_is_found(shared: Path, spec: MakeSpec) -> None:
    content = shared.read_bytes()
    for position in range(0, len(content), 3):
        changed = bytearray(content)
        changed[position] ^= 1
        shared.write_bytes(changed)
        with pytest.raises(LedgerError):
            PrivacyLedger(shared, spec(), run="a")
        assert shared.read_bytes() == bytes(changed)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "run", "run": "a"},
        {"kind": "run", "run": ""},
        {"kind": "run", "run": 3},
        {"kind": "run", "run": "c", "spec": {}},
        {"kind": "run", "run": "c", "spec": 1},
        {"kind": "run", "run": "c", "charged": 4},
        {"kind": "reserve", "run": "c", "steps": 1, "charged": 1},
        {"kind": "reserve", "run": ["a"], "steps": 1, "charged": 5},
        {"kind": "reserve", "run": "b", "steps": 1, "charged": 1},
        {"kind": "reserve", "steps": 1, "charged": 5},
        {"kind": "reserve", "run": "a", "steps": 17, "charged": 21},
        {"kind": "release", "run": "a", "name": "label_histogram", "saved_as": ""},
        {"kind": "refund", "run": "a", "steps": -4, "charged": 0},
    ],
    ids=str,
)
def test_a_chained_line_that_makes_no_sense_is_refused(shared: Path, spec: MakeSpec, change: dict[str, Any]) -> None:
    if change["kind"] == "run":
        change = {"spec": spec().to_dict(), **change}
    entry = {"previous": json.loads(shared.read_text().splitlines()[-1])["digest"], **change}
    entry["digest"] = digest_of(entry)
    shared.write_text(shared.read_text() + json.dumps(entry, sort_keys=True) + "\n")
    with pytest.raises(LedgerError, match="line 6 "):
        PrivacyLedger(shared, spec(), run="a")
    with pytest.raises(LedgerError, match="line 6 "):
        read_ledger(shared)


@pytest.mark.parametrize(
    "header",
    [
        {"kind": "create", "version": 3, "budget": {}},
        {"kind": "create", "version": 2, "budget": {"epsilon": 1.0}},
        {"kind": "create", "version": 2, "budget": {"epsilon": -1.0, "delta": 1e-5}},
        {"kind": "create", "version": 2, "budget": 1.0},
        {"kind": "create", "version": 1, "spec": {"steps": 1}},
    ],
    ids=str,
)
def test_a_chained_header_that_makes_no_sense_is_refused(path: Path, spec: MakeSpec, header: dict[str, Any]) -> None:
    entry = {"previous": "0" * 64, **header}
    entry["digest"] = digest_of(entry)
    path.write_text(json.dumps(entry, sort_keys=True) + "\n")
    with pytest.raises(LedgerError, match="line 1 "):
        PrivacyLedger(path, spec(), run="a")


def test_reading_needs_no_run_and_changes_nothing(shared: Path, spec: MakeSpec) -> None:
    content = shared.read_bytes()
    with PrivacyLedger(shared, spec(), run="a") as ledger:  # while it is in use
        contents = read_ledger(shared)
        assert contents.spent() == ledger.spent()
    assert {name: run.charged for name, run in contents.runs.items()} == {"a": 4, "b": 4}
    shared.write_bytes(content[:-9])
    assert read_ledger(shared).runs["b"].charged == 0  # the torn line was not charged, and stays
    assert shared.read_bytes() == content[:-9]
    with pytest.raises(FileNotFoundError):
        read_ledger(shared.with_name("none"))


def test_a_fork_is_found_by_its_heads(shared: Path, spec: MakeSpec) -> None:
    """Two copies continued apart have one head with two successors; a checkpoint of one shows it in the other."""
    copy = shared.with_name("copy.jsonl")
    shutil.copy(shared, copy)
    assert check_not_forked(shared, copy) == 5
    with PrivacyLedger(copy, spec(), run="a") as ledger:
        ledger.reserve(1)
        behind = (ledger.head, ledger.lines)
    assert check_not_forked(copy, shared) == 5  # the one continues the other
    with PrivacyLedger(shared, spec(), run="a") as ledger:
        with pytest.raises(LedgerError, match="it has 5 lines and had 6: an older copy took its place"):
            ledger.check_history(*behind)
        ledger.check_history(ledger.head, ledger.lines)
        earlier = (ledger.head, ledger.lines)
        ledger.reserve(2)
        ledger.check_history(*earlier)
        for lines in (6, 1, 0, -1):
            with pytest.raises(LedgerError, match=f"line {lines} is another one: two copies"):
                ledger.check_history(behind[0], lines)
    with pytest.raises(LedgerError, match="one ledger up to line 5 and were continued apart"):
        check_not_forked(shared, copy)
    PrivacyLedger(shared.with_name("new"), spec()).close()
    with pytest.raises(LedgerError, match="two different ledgers"):
        check_not_forked(shared, shared.with_name("new"))


def test_a_line_that_another_program_appended_is_noticed(shared: Path, spec: MakeSpec) -> None:
    with PrivacyLedger(shared, spec(), run="a") as ledger:
        with shared.open("a") as file:
            file.write("{}\n")
        with pytest.raises(LedgerError, match="written to by something else"):
            ledger.reserve(1)
        assert ledger.charged == 4


def test_a_long_ledger_and_a_disk_that_cannot_be_locked(
    tmp_path: Path, spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = spec(steps=10**6)
    with PrivacyLedger(tmp_path / "long", made) as ledger, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        for _ in range(5500):
            ledger.reserve(2)
    assert (tmp_path / "long").stat().st_size > 1 << 20
    with PrivacyLedger(tmp_path / "long", made) as ledger:
        assert ledger.charged == 11000

    def unlockable(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unlockable)
    for name in ("long", "new"):
        with pytest.raises(LedgerError, match="No locks available"):
            PrivacyLedger(tmp_path / name, made)
    assert [path.name for path in tmp_path.iterdir()] == ["long"]
