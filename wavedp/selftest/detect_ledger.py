# SPDX-License-Identifier: Apache-2.0
"""What was spent is on disk before anything of it is released, and stays spent. Nothing here is a test of chance."""

import json
import os
import pickle
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wavedp import storage
from wavedp.privacy import LedgerError, PrivacyBudget, PrivacyLedger, PrivateOptimizer, release_label_histogram
from wavedp.selftest.alarms import Alarm, require, require_refusal
from wavedp.selftest.cases import Recorder, specification


def detect(seed: int) -> None:
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory(prefix="wavedp-selftest-") as name:
        folder = Path(name)
        write_ahead(folder / "ahead.jsonl")
        attempts_without_ledger()
        old_checkpoints(folder)
        damaged_files(folder)
        label_histogram(folder / "labels.jsonl")
        shared_budget(folder / "shared.jsonl")
        checkpoint_contents()
        hostile_weights(folder)


def on_disk(path: Path) -> int:
    """Steps charged in the file, read without the package."""
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sum(entry["steps"] for entry in entries if entry["kind"] == "reserve")


class Watching(Recorder):
    """At every release, compares what is on disk with the steps that were begun."""

    def __init__(self, params: Any, path: Path) -> None:
        super().__init__(params)
        self.path = path

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        charged, released = on_disk(self.path), len(self.seen)
        require(charged >= released, f"{released} steps are released and {charged} charged on disk")


@contextmanager
def _counted_syncs() -> Iterator[list[int]]:
    """Note what is synced to disk meanwhile."""
    synced: list[int] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(descriptor)
        real(descriptor)

    os.fsync = fsync  # type: ignore[assignment]
    try:
        yield synced
    finally:
        os.fsync = real


def write_ahead(path: Path) -> None:
    spec = specification(steps=6)
    model = nn.Linear(2, 1)
    with PrivacyLedger(path, spec) as ledger:
        optimizer = Watching(model.parameters(), path)
        with PrivateOptimizer(model, optimizer, spec, ledger=ledger, reserve_steps=2) as private:
            for number in range(4):
                with _counted_syncs() as synced:
                    if number != 1:
                        private.backward(model(torch.ones(2, 2)).sum(1), records=torch.arange(2))
                    private.step()
                if number % 2 == 0:
                    require(len(synced) > 0, "a charge is not synced to disk before its step")
            require_refusal("a reservation beyond the plan", lambda: ledger.reserve(3))
            private.step()
            private.step()
            require_refusal("a step beyond the plan of a ledger", private.step)
            charged, released = on_disk(path), len(optimizer.seen)
            require(charged == released == 6, f"of 6 steps {charged} are charged and {released} released")


def attempts_without_ledger() -> None:
    """Every attempt is charged: empty, failed and discarded ones, and those after an old checkpoint."""
    spec = specification(steps=8)
    model = nn.Linear(2, 1)
    with PrivateOptimizer(model, Recorder(model.parameters()), spec) as private:

        def expect(charged: int, what: str) -> None:
            require(private.steps_charged == charged, f"{what}: {private.steps_charged} of {charged} are charged")

        private.step()
        expect(1, "an empty step")
        old = private.state_dict()
        private.backward(model(torch.ones(2, 2)).sum(1), records=torch.arange(2))
        private.discard()
        expect(2, "an attempt that is discarded")
        private.backward(model(torch.ones(2, 2)).sum(1), records=torch.arange(2))
        private.step()
        expect(3, "a step")
        private.load_state_dict(old)
        expect(3, "steps after going back to a checkpoint")


def old_checkpoints(folder: Path) -> None:
    path, copy, spec = folder / "resume.jsonl", folder / "older.jsonl", specification(steps=6)
    model = nn.Linear(2, 1)
    with PrivacyLedger(path, spec) as ledger:
        with PrivateOptimizer(model, Recorder(model.parameters()), spec, ledger=ledger, reserve_steps=1) as private:
            private.step()
            old = private.state_dict()
            head, lines = ledger.head, ledger.lines
            copy.write_bytes(path.read_bytes())
            private.step()
            private.step()
            new = private.state_dict()
            newer = ledger.head, ledger.lines
            private.load_state_dict(old)
            require(
                private.steps_charged == on_disk(path) == 3,
                f"an old checkpoint takes {on_disk(path)} charged steps to {private.steps_charged}",
            )
        require_refusal("a second writer", lambda: PrivacyLedger(path, spec), (LedgerError,))
    with PrivacyLedger(path, spec) as ledger:
        require(ledger.charged == 3, f"a ledger of 3 steps is opened with {ledger.charged}")
    with (
        PrivacyLedger(copy, spec) as ledger,
        PrivateOptimizer(model, Recorder(model.parameters()), spec, ledger=ledger) as private,
    ):
        require_refusal("a ledger older than the checkpoint", lambda: private.load_state_dict(new))
        ledger.check_history(head, lines)
        require_refusal("a ledger that an older copy took the place of", lambda: ledger.check_history(*newer))


def damaged_files(folder: Path) -> None:
    path, spec = folder / "whole.jsonl", specification(steps=9)
    with PrivacyLedger(path, spec) as ledger:
        ledger.reserve(3)
        ledger.reserve(1)
        ledger.reserve(2)
    content = path.read_bytes()
    header, first, second, third = content.splitlines(keepends=True)

    def opened(text: bytes, with_spec: Any = spec) -> int:
        damaged = folder / "damaged.jsonl"
        damaged.write_bytes(text)
        with PrivacyLedger(damaged, with_spec) as ledger:
            return ledger.charged

    fewer = third.replace(b'"charged": 6', b'"charged": 5').replace(b'"steps": 2', b'"steps": 1')
    for what, text in {
        "a ledger whose numbers were changed": header + first + second + fewer,
        "a ledger that lost a line": header + first + third,
        "a ledger that was emptied": b"",
        "a ledger without its header": first + second,
    }.items():
        require_refusal(what, lambda t=text: opened(t), (LedgerError,))  # type: ignore[misc]
    for what, text, charged in (
        ("a line without its newline", content[:-1], 6),
        ("a line that was torn", content[:-20], 4),
    ):
        require(opened(text) == charged, f"{what} is read as {opened(text)} steps, not {charged}")
    other = specification(steps=9, noise_multiplier=0.5)
    require_refusal("a ledger of more noise", lambda: opened(content, other), (LedgerError,))


def label_histogram(path: Path) -> None:
    spec = specification(label_noise_multiplier=2.0)
    labels = torch.zeros(5, dtype=torch.int64)
    with PrivacyLedger(path, spec) as ledger:
        release_label_histogram(labels, 4, spec, ledger=ledger)
        require_refusal("a second label histogram", lambda: release_label_histogram(labels, 4, spec, ledger=ledger))
    kinds = [json.loads(line)["kind"] for line in path.read_text(encoding="utf-8").splitlines()]
    require(kinds == ["create", "release"], f"a label histogram is charged as {kinds}")


def shared_budget(path: Path) -> None:
    """Runs on one data set add up: the second does not fit."""
    spec = specification(sample_rate=1.0, noise_multiplier=20.0, steps=100)
    budget = PrivacyBudget(epsilon=1.5 * spec.epsilon(), delta=2.5 * spec.delta)
    with PrivacyLedger(path, spec, budget=budget, run="first") as ledger:
        ledger.reserve(1)
    require_refusal(
        "a run beyond the budget that it shares", lambda: PrivacyLedger(path, spec, run="second"), (LedgerError,)
    )


def checkpoint_contents() -> None:
    """A checkpoint in the middle of a batch holds nothing of it."""
    spec = specification()
    model = nn.Linear(2, 1, bias=False)
    with PrivateOptimizer(model, Recorder(model.parameters()), spec) as private:
        private.backward(model(torch.ones(2, 2)).sum(1), records=torch.arange(2))
        state = private.state_dict()
    tensors = [path for path, value in _leaves(state) if isinstance(value, torch.Tensor)]
    require(not tensors, f"a checkpoint holds {tensors} of a batch that has no noise yet")
    names = {"optimizer", "spec", "steps_charged", "ledger_head", "clipping"}
    require(set(state) == names, f"a checkpoint holds {sorted(set(state) - names)}")


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(part, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for number, part in enumerate(value):
            yield from _leaves(part, f"{path}[{number}]")
    else:
        yield path, value


class Payload:
    """Makes a folder when it is read as a pickle."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def hostile_weights(folder: Path) -> None:
    weights, mark = folder / "weights", folder / "executed"
    storage.save_folder(weights, {}, {"w": torch.arange(64.0)})
    file = weights / storage.WEIGHTS_FILE
    content = bytearray(file.read_bytes())
    for what, damaged in (
        ("a pickle in place of weights", pickle.dumps(Payload(mark))),
        ("weights with a flipped bit", bytes([*content[:-1], content[-1] ^ 1])),
    ):
        file.write_bytes(damaged)
        try:
            storage.load_folder(weights)
        except Exception:
            accepted = False
        else:
            accepted = True
        if mark.exists():
            raise Alarm(f"{what}: the code in it was executed")
        require(not accepted, f"{what} was accepted")
