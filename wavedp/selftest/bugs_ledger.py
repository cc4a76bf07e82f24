# SPDX-License-Identifier: Apache-2.0
"""Planted bugs: spending that is charged late, lost, or given back; files that are believed."""

import io
import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from wavedp import storage
from wavedp.privacy import ledger_file, optimizer
from wavedp.privacy.ledger import PrivacyLedger
from wavedp.privacy.ledger_budget import PrivacyBudget
from wavedp.privacy.ledger_file import LedgerError, LedgerFile
from wavedp.privacy.optimizer import PrivateOptimizer
from wavedp.selftest.planting import Planted, Registry

registry = Registry("ledger")
bug = registry.bug


class OtherSystem:
    """The module ``os`` with some functions replaced."""

    def __init__(self, **functions: Any) -> None:
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def replace_module(planted: Planted, owner: Any, name: str, module: Any) -> None:
    planted._undo.append((owner, name, vars(owner)[name]))
    setattr(owner, name, module)


@bug("checkpointed accountants")
def charged_after_step(planted: Planted) -> None:
    """Steps are written into the ledger after the next one has begun."""

    def write(original: Any, self: PrivacyLedger, fields: dict[str, Any]) -> None:
        if fields.get("kind") != "reserve":
            original(self, fields)
            return
        planted.mark()
        waiting = self.__dict__.setdefault("waiting", [])
        if waiting:
            self._file.append(waiting.pop())
        waiting.append(fields)
        self._contents.accept(self.lines + 1, {"previous": "", "digest": "", **fields})

    planted.replace(PrivacyLedger, "_write", write)


@bug("write without fsync")
def charge_not_synced(planted: Planted) -> None:
    """A charge may still be in memory when power fails."""

    def fsync(descriptor: int) -> None:
        planted.mark()

    replace_module(planted, ledger_file, "os", OtherSystem(fsync=fsync))


@bug("own")
def empty_batch_not_charged(planted: Planted) -> None:
    """A step without records is not charged."""

    def begin(original: Any, self: PrivateOptimizer) -> None:
        started = self._batch.pending
        original(self)
        if not started and self._releasing_empty:  # type: ignore[attr-defined]
            planted.mark()
            self._charged -= 1

    def step(original: Any, self: PrivateOptimizer, closure: object = None) -> None:
        self._releasing_empty = not self._sums  # type: ignore[attr-defined]
        original(self, closure)
        self._releasing_empty = False  # type: ignore[attr-defined]

    def add(original: Any, self: PrivateOptimizer, *arguments: Any) -> None:
        self._releasing_empty = False  # type: ignore[attr-defined]
        original(self, *arguments)

    planted.replace(PrivateOptimizer, "_begin_step", begin)
    planted.replace(PrivateOptimizer, "step", step)
    planted.replace(PrivateOptimizer, "_add", add)


@bug("retry after an exception")
def failed_attempt_given_back(planted: Planted) -> None:
    """A batch that is discarded is not charged."""

    def discard(original: Any, self: PrivateOptimizer) -> None:
        planted.mark()
        self._charged -= self._batch.pending
        original(self)

    planted.replace(PrivateOptimizer, "discard", discard)


@bug("checkpointed accountants")
def checkpoint_gives_back(planted: Planted) -> None:
    """Loading an old checkpoint gives back what was spent since."""

    def load(original: Any, self: PrivateOptimizer, state: Any) -> None:
        original(self, state)
        planted.mark()
        self._charged = state["steps_charged"]

    planted.replace(PrivateOptimizer, "load_state_dict", load)


@bug("checkpointed accountants")
def ledger_rolled_back(planted: Planted) -> None:
    """Loading an old checkpoint rolls the ledger back to it."""

    def load(original: Any, self: PrivateOptimizer, state: Any) -> None:
        original(self, state)
        if self._ledger is not None:
            planted.mark()
            self._ledger._own.charged = state["steps_charged"]

    planted.replace(PrivateOptimizer, "load_state_dict", load)


@bug("own")
def older_ledger_accepted(planted: Planted) -> None:
    """A checkpoint is continued with a ledger that does not know of it."""

    def contains(original: Any, self: PrivacyLedger, head: str) -> bool:
        planted.mark()
        return True

    planted.replace(PrivacyLedger, "contains", contains)


@bug("own")
def steps_beyond_plan(planted: Planted) -> None:
    """Steps go on when all are charged."""

    def left(original: Any, self: PrivateOptimizer) -> int:
        planted.mark()
        return max(1, int(original(self)))

    planted.replace(PrivateOptimizer, "steps_left", left)


@bug("own")
def ledger_beyond_plan(planted: Planted) -> None:
    """The ledger reserves steps when none remain."""

    def remaining(original: Any, self: PrivacyLedger) -> int:
        planted.mark()
        return 10**6

    planted.replace(PrivacyLedger, "remaining", remaining)


@bug("own")
def digests_not_checked(planted: Planted) -> None:
    """A ledger whose numbers were changed is believed."""

    def digest_of(original: Any, entry: dict[str, Any]) -> Any:
        planted.mark()
        return entry.get("digest", original(entry))

    planted.replace(ledger_file, "digest_of", digest_of)


@bug("own")
def chain_not_checked(planted: Planted) -> None:
    """A ledger that lost lines is believed."""

    def parse(original: Any, path: Path, content: bytes) -> Any:
        try:
            return original(path, content)
        except LedgerError:
            entries = [json.loads(line) for line in content.splitlines()]
            if not entries or any(entry["digest"] != ledger_file.digest_of(entry) for entry in entries):
                raise
        planted.mark()
        charged = 0
        for entry in entries:
            if entry["kind"] == "reserve":
                charged += entry["steps"]
                entry["charged"] = charged
        return entries, len(content)

    planted.replace(ledger_file, "parse", parse)


@bug("own")
def emptied_ledger_accepted(planted: Planted) -> None:
    """A ledger that was emptied starts again from nothing."""

    def parse(original: Any, path: Path, content: bytes) -> Any:
        if content:
            return original(path, content)
        planted.mark()
        return [], 0

    planted.replace(ledger_file, "parse", parse)


@bug("own")
def torn_line_charged_nothing(planted: Planted) -> None:
    """A whole last line that lacks its newline is cut off, and its steps with it."""

    def torn(original: Any, line: bytes) -> bool:
        if original(line):
            return True
        planted.mark()
        return True

    planted.replace(ledger_file, "_torn", torn)


@bug("own")
def two_writers(planted: Planted) -> None:
    """Two runs open one ledger, and each spends all of it."""

    def lock(original: Any, self: LedgerFile) -> None:
        planted.mark()

    planted.replace(LedgerFile, "_lock", lock)


@bug("own")
def other_mechanism_accepted(planted: Planted) -> None:
    """A ledger is continued with less noise than it was opened for."""

    def match(original: Any, self: PrivacyLedger, recorded: dict[str, Any]) -> None:
        planted.mark()

    planted.replace(PrivacyLedger, "_match_spec", match)


@bug("own")
def histogram_released_again(planted: Planted) -> None:
    """The label histogram is charged once and drawn as often as is asked."""

    def release(original: Any, self: PrivacyLedger, name: str, saved_as: Any = "") -> None:
        if name in self._own.released:
            planted.mark()
            return
        original(self, name, saved_as)

    planted.replace(PrivacyLedger, "release", release)


@bug("own")
def replaced_ledger_accepted(planted: Planted) -> None:
    """A ledger that an older copy took the place of is continued."""

    def check(original: Any, self: PrivacyLedger, head: str, lines: int) -> None:
        planted.mark()

    planted.replace(PrivacyLedger, "check_history", check)


@bug("own")
def runs_not_added_up(planted: Planted) -> None:
    """Of runs that share a budget, only the last counts."""

    def spent(original: Any, self: PrivacyBudget, specs: Any) -> Any:
        planted.mark()
        return original(self, list(specs)[-1:])

    planted.replace(PrivacyBudget, "spent", spent)


@bug("own")
def fork_spends_same_steps(planted: Planted) -> None:
    """A forked process goes on with the steps that its parent has reserved."""
    process = os.getpid()

    def getpid() -> int:
        planted.mark()
        return process

    replace_module(planted, optimizer, "os", OtherSystem(getpid=getpid))


@bug("own")
def batch_in_checkpoint(planted: Planted) -> None:
    """A checkpoint holds the sums of a batch before their noise."""

    def state(original: Any, self: PrivateOptimizer) -> Any:
        planted.mark()
        found = original(self)
        found["optimizer"]["sums"] = {name: total.clone() for name, total in self._sums.items()}
        return found

    planted.replace(PrivateOptimizer, "state_dict", state)


@bug("Opacus 1.6.0's load_checkpoint")
def pickle_executed(planted: Planted) -> None:
    """Weights are read as a pickle, whose author's code runs."""

    def load(original: Any, folder: Path) -> Any:
        try:
            return original(folder)
        except Exception:
            planted.mark()
            content = next(Path(folder).glob("*.safetensors")).read_bytes()
            return {}, torch.load(io.BytesIO(content), weights_only=False)

    planted.replace(storage, "load_folder", load)


@bug("torch.load(weights_only=True)")
def damaged_weights_accepted(planted: Planted) -> None:
    """Weights with a flipped bit are read as if nothing was."""

    def load(original: Any, folder: Path) -> Any:
        try:
            return original(folder)
        except ValueError:
            weights = next(Path(folder).glob("*.safetensors")).read_bytes()
            found = safetensors.torch.load(weights)
            planted.mark()
            return {}, found

    planted.replace(storage, "load_folder", load)
