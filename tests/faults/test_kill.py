# SPDX-License-Identifier: Apache-2.0
"""kill -9 at 300 points of the ledger's life and 200 of the checkpoints': nothing is released that was not charged, no
key comes twice, and the newest checkpoint is whole. (`make soak` does the same to real training.)"""

import hashlib
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from wavedp.privacy import Entropy, PrivacyBudget, PrivacyLedger, PrivacySpec
from wavedp.training.checkpoints import KEPT, load_newest, save_generation

MakeSpec = Callable[..., PrivacySpec]
Killed = Callable[..., bytes]
Write = Callable[[bytes], object]
LATEST = 0.008  # seconds; a reservation with its sync takes under one millisecond


def released_steps(path: Path, spec: PrivacySpec, block: int, run: str | None, write: Write) -> None:
    """What a run does, without its training: reserve, draw a key, and only then release, here the key's hash."""
    with PrivacyLedger(path, spec, run=run, budget=None if run is None else BUDGET) as ledger:
        while True:
            ledger.reserve(block)
            for _ in range(block):
                with Entropy().key() as key:
                    write(hashlib.sha256(bytes(key._bytes().tolist())).digest())


BUDGET = PrivacyBudget(epsilon=1e9, delta=5e-3)


@pytest.mark.parametrize("shared", [False, True], ids=["single", "shared"])
@pytest.mark.parametrize("block", [1, 3, 10])
def test_kill_9_at_50_points_of_a_ledger(
    tmp_path: Path, spec: MakeSpec, killed: Killed, block: int, shared: bool
) -> None:
    """Ten lives of five kills each: in a life's first, often before there is a ledger."""
    made, chance = spec(steps=10**5), random.Random(block + 100 * shared)
    assert made.epsilon() < BUDGET.epsilon  # computed here once, and not by every child
    names = ("a", "b") if shared else (None,)
    keys: list[bytes] = []
    there = 0
    for life in range(10):
        path = tmp_path / f"ledger-{life}"
        released = dict.fromkeys(names, 0)
        for kill in range(5):
            run = names[kill % len(names)]
            heard = killed(
                lambda write, path=path, run=run: released_steps(path, made, block, run, write),
                after=chance.uniform(0.0, LATEST),
                wait_for=0 if kill in (0, 3) else 32,
            )
            assert len(heard) % 32 == 0
            found = [heard[i : i + 32] for i in range(0, len(heard), 32)]
            keys += found
            released[run] += len(found)
            if not path.exists():
                assert not any(released.values())
                continue
            there += 1
            budget = BUDGET if shared else None
            with PrivacyLedger(path, made, run=run, budget=budget) as ledger:
                assert released[run] <= ledger.charged <= released[run] + block * (kill + 1)
    assert len(set(keys)) == len(keys) >= 30
    assert there >= 30


def save_without_end(folder: Path, start: int, write: Write) -> None:
    for n in range(start, 1 << 30):
        save_generation(folder, {"n": n}, {"a": torch.full((8000,), float(n)), "b": torch.full((7,), n)})
        write(struct.pack("<q", n))


@pytest.mark.parametrize("life", range(10))
def test_kill_9_at_20_points_of_checkpoints(tmp_path: Path, killed: Killed, life: int) -> None:
    folder, chance, saved = tmp_path / "checkpoint", random.Random(life), 0
    for kill in range(20):
        heard = killed(
            lambda write, start=saved + 1: save_without_end(folder, start, write),
            after=chance.uniform(0.0, LATEST),
            wait_for=0 if kill % 4 == 0 else 8,
        )
        known = max([saved, *(n for (n,) in struct.iter_unpack("<q", heard))])
        found = load_newest(folder) if folder.exists() else None
        if found is None:
            assert known == 0
            continue
        assert found.skipped == ()
        assert found.config["n"] in (known, known + 1)  # the last one may be there before its writer could say so
        assert {found.config["n"]} == {*found.tensors["a"].tolist(), *found.tensors["b"].tolist()}
        generations = [path for path in folder.iterdir() if path.name.isdecimal()]
        assert len(generations) <= KEPT + 1
        assert all(path.stat().st_mode & 0o777 == 0o700 for path in (folder, *generations))
        assert all(file.stat().st_mode & 0o777 == 0o600 for path in generations for file in path.iterdir())
        saved = found.config["n"]
    assert saved >= 15
