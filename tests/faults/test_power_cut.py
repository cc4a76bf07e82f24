# SPDX-License-Identifier: Apache-2.0
"""Every state in which a power cut may leave ledger and checkpoints is the old one or the new one, never a mixture."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from wavedp import storage
from wavedp.privacy import LedgerError, PrivacyBudget, PrivacyLedger, PrivacySpec
from wavedp.training.checkpoints import load_newest, save_generation

MakeSpec = Callable[..., PrivacySpec]
States = Callable[..., Iterator[tuple[bool, Path]]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.mark.parametrize("shared", [False, True], ids=["single", "shared"])
@pytest.mark.parametrize("torn", [False, True], ids=["whole", "torn"])
def test_a_reservation_is_charged_or_never_began(
    root: Path, spec: MakeSpec, crash_states: States, shared: bool, torn: bool
) -> None:
    """The reservation of a run that was there before, and of a new one, whose record comes first."""
    given = {"budget": PrivacyBudget(epsilon=1e4, delta=5e-3), "run": "a"} if shared else {}
    made = spec(steps=100)
    path = root / "ledger"
    with PrivacyLedger(path, made, **given) as ledger:
        ledger.reserve(5)
    if torn:
        path.write_bytes(path.read_bytes() + b'{"charged": 9, "dig')

    def work() -> None:
        with PrivacyLedger(path, made, **{**given, **({"run": "b"} if shared else {})}) as ledger:
            ledger.reserve(2)

    count = 0
    for complete, state in crash_states(root, work):
        count += 1
        own = {"run": "b"} if shared else {}
        with PrivacyLedger(state / "ledger", made, **own) as ledger:
            before, after = (0, 2) if shared else (5, 7)
            assert ledger.charged == after if complete else ledger.charged in (before, after)
            ledger.reserve(1)  # and it goes on
    assert count >= 5


def test_a_new_ledger_is_whole_or_not_there(root: Path, spec: MakeSpec, crash_states: States) -> None:
    made = spec(steps=100)
    path = root / "runs" / "a" / "ledger"
    count = {True: 0, False: 0}

    def work() -> None:
        path.parent.mkdir(parents=True)
        with PrivacyLedger(path, made) as ledger:
            ledger.reserve(3)

    for complete, state in crash_states(root, work):
        left = state / path.relative_to(root)
        count[left.exists()] += 1
        assert left.exists() or not complete
        left.parent.mkdir(parents=True, exist_ok=True)
        with PrivacyLedger(left, made) as ledger:
            assert ledger.charged == 3 if complete else ledger.charged in (0, 3)
    assert min(count.values()) >= 3


def test_a_ledger_emptied_by_a_disk_without_order_is_refused(root: Path, spec: MakeSpec) -> None:
    """Where a disk lies about what it synced, a ledger may lose lines, but never turns into a fresh budget."""
    made = spec(steps=100)
    with PrivacyLedger(root / "ledger", made) as ledger:
        ledger.reserve(3)
    (root / "ledger").write_bytes(bytes(4096))
    with pytest.raises(LedgerError, match="empty or not a ledger"):
        PrivacyLedger(root / "ledger", made)


def save(folder: Path, n: int) -> None:
    save_generation(folder, {"n": n}, {"a": torch.full((40,), float(n)), "b": torch.full((3, 3), n)})


def loaded(folder: Path) -> int:
    found = load_newest(folder)
    if found is None:
        return 0
    assert found.skipped == ()
    (n,) = {*found.tensors["a"].tolist(), *found.tensors["b"].flatten().tolist(), found.config["n"]}
    return int(n)


@pytest.mark.parametrize("before", [0, 1, 3])
def test_a_checkpoint_is_the_old_one_or_the_new_one(root: Path, crash_states: States, before: int) -> None:
    folder = root / "checkpoint"
    for n in range(1, before + 1):
        save(folder, n)
    count = 0
    for complete, state in crash_states(root, lambda: save(folder, before + 1)):
        count += 1
        found = loaded(state / "checkpoint")
        assert found == before + 1 if complete else found in (before, before + 1)
    assert count >= 10


def test_a_draft_that_a_crash_left_is_removed_by_the_next_save(root: Path, crash_states: States) -> None:
    save(root, 1)
    for _, state in crash_states(root, lambda: save(root, 2), subsets=3):
        save(state, 9)
        assert loaded(state) == 9
        assert all(path.name.isdecimal() for path in state.iterdir())


def test_a_published_folder_is_the_old_one_or_the_new_one(root: Path, crash_states: States) -> None:
    storage.save_folder(root / "model", {"n": 1}, {"a": torch.full((40,), 1.0)})
    count = 0

    def work() -> None:
        storage.save_folder(root / "model", {"n": 2}, {"a": torch.full((40,), 2.0)})

    for complete, state in crash_states(root, work):
        count += 1
        config, tensors = storage.load_folder(state / "model")
        assert {config["n"]} == set(tensors["a"].tolist())
        assert config["n"] == 2 if complete else config["n"] in (1, 2)
    assert count >= 10


def test_the_model_finds_what_is_not_synced(root: Path, crash_states: States) -> None:
    """Written without fsync, the same file is found mixed or torn: the states are not those of a kind disk."""
    (root / "f").write_bytes(b"old")

    def careless(sync: bool) -> set[bytes]:
        def work() -> None:
            descriptor = os.open(root / "f.tmp", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.write(descriptor, b"NEWS")
            if sync:
                os.fsync(descriptor)
            os.close(descriptor)
            os.replace(root / "f.tmp", root / "f")

        return {(state / "f").read_bytes() for _, state in crash_states(root, work)}

    assert careless(sync=False) == {b"old", b"NEWS", b"NE", bytes(4), b""}
    (root / "f").write_bytes(b"old")
    assert careless(sync=True) == {b"old", b"NEWS"}
