# SPDX-License-Identifier: Apache-2.0
"""A full disk, a failing one, a short write, at every file-system call of ledger and checkpoints, one at a time."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from wavedp import storage
from wavedp.functional import NoiseKey
from wavedp.privacy import LedgerError, PrivacyBudget, PrivacyLedger, PrivacySpec, PrivateOptimizer
from wavedp.training.checkpoints import load_newest, save_generation

MakeSpec = Callable[..., PrivacySpec]
Faults = Callable[..., Iterator[tuple[Any, BaseException | None]]]


@pytest.mark.parametrize("shared", [False, True], ids=["single", "shared"])
@pytest.mark.parametrize("content", ["none", "whole", "torn", "without newline"])
def test_a_ledger_is_opened_and_charged_or_says_that_it_is_not(
    tmp_path: Path, spec: MakeSpec, faults: Faults, content: str, shared: bool
) -> None:
    made = spec(steps=100)
    budget = PrivacyBudget(epsilon=1e4, delta=5e-3)
    given: dict[str, Any] = {"budget": budget, "run": "a"} if shared else {}
    template, path = tmp_path / "template", tmp_path / "folder" / "ledger"
    template.mkdir()
    before = 0
    if content != "none":
        with PrivacyLedger(template / "ledger", made, **given) as ledger:
            ledger.reserve(4)
        before = 4
        with (template / "ledger").open("ab") as file:
            file.write(b'{"charged": 9, "di' if content == "torn" else b"")
            file.truncate(file.tell() - (content == "without newline"))
    done: list[int] = []

    def reset() -> None:
        shutil.rmtree(path.parent, ignore_errors=True)
        shutil.copytree(template, path.parent)
        done.clear()

    def charge() -> None:
        with PrivacyLedger(path, made, **given) as ledger:
            ledger.reserve(3)
            done.append(3)

    points = 0
    for fault, error in faults(charge, reset):
        points += 1
        assert error is None or isinstance(error, LedgerError), error
        assert (error is None) == bool(done)
        # What could not be cleaned up or synced above its folder is all that may fail without a word.
        assert error is not None or fault.seen[fault.at] in ("unlink", "open", "fsync")
        with PrivacyLedger(path, made, **given) as ledger:
            assert ledger.charged == before + 3 if done else ledger.charged in (before, before + 3)
            ledger.reserve(1)
    assert points >= 6


def test_no_step_starts_where_the_ledger_cannot_be_written(tmp_path: Path, spec: MakeSpec, faults: Faults) -> None:
    """Neither a gradient, nor a key, nor a changed weight."""
    made = spec(steps=1000)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    drawn = 0
    original = NoiseKey.from_os.__func__

    def counting(cls: type[NoiseKey]) -> NoiseKey:
        nonlocal drawn
        drawn += 1
        return original(cls)

    path = tmp_path / "ledger"
    PrivacyLedger(path, made).close()

    def work() -> None:
        with (
            PrivacyLedger(path, made) as ledger,
            PrivateOptimizer(model, optimizer, made, ledger=ledger, reserve_steps=1) as private,
        ):
            try:
                private.backward(model(torch.ones(4, 3)).sum(1))
            except LedgerError:
                with pytest.raises(RuntimeError):
                    private.step()
                raise
            private.step()

    def reset() -> None:
        nonlocal drawn
        model.load_state_dict(weights)
        drawn = 0

    points = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NoiseKey, "from_os", classmethod(counting))
        for _, error in faults(work, reset):
            points += 1
            assert isinstance(error, LedgerError)
            assert drawn == 0
            assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert drawn == 1  # the last time, nothing failed
    assert points == 9  # open, sync, write, sync, each of a full disk and a failing one; and half a line


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, faults: Faults) -> None:
    folder = tmp_path / "run" / "checkpoint"
    n = 0

    def work() -> None:
        save_generation(folder, {"n": n}, {"a": torch.full((500,), float(n))})

    for n in range(1, 5):  # noqa: B007, work() reads it
        work()
    points, silent = 0, set()
    good = n
    n += 1
    for fault, error in faults(work):
        points += 1
        found = load_newest(folder)
        assert found is not None
        assert found.skipped == ()
        assert {found.config["n"]} == set(found.tensors["a"].tolist())
        if error is None:
            assert found.config["n"] == n
            silent.add(f"{fault.how} {fault.seen[fault.at]}")
        else:
            assert isinstance(error, OSError)
            assert found.config["n"] in (good, n)
        good, n = found.config["n"], n + 1
    assert points >= 30
    # Old generations that could not be removed are removed by the next call; a short write goes on.
    assert silent <= {"short write write", *(f"{how} {call}" for how in ("ENOSPC", "EIO") for call in REMOVING)}
    work()
    assert sorted(path.name.isdecimal() for path in folder.iterdir()) == [True] * 3


REMOVING = ("rename", "open", "unlink", "rmdir")


def test_a_published_folder_that_cannot_be_written_stays_as_it_was(tmp_path: Path, faults: Faults) -> None:
    folder = tmp_path / "model"
    n = 1

    def work() -> None:
        storage.save_folder(folder, {"n": n}, {"a": torch.full((50,), float(n))})

    work()
    points, good = 0, 1
    n += 1
    for _, error in faults(work):
        points += 1
        config, tensors = storage.load_folder(folder)
        assert {config["n"]} == set(tensors["a"].tolist())
        assert config["n"] == n if error is None else config["n"] in (good, n)
        assert error is None or isinstance(error, OSError)
        good, n = config["n"], n + 1
    assert points >= 20
