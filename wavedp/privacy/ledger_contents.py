# SPDX-License-Identifier: Apache-2.0
"""What the lines of a privacy ledger say: runs, what each was allowed, what was charged to it.

Read this way, a ledger may be in use by a run and is not changed.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wavedp.privacy.ledger_budget import PrivacyBudget
from wavedp.privacy.ledger_file import Entry, LedgerError, damaged, read_entries
from wavedp.privacy.spec import PrivacySpec

_STEP_KEYS = frozenset({"kind", "steps", "charged", "previous", "digest"})
_RELEASE_KEYS = frozenset({"kind", "name", "saved_as", "previous", "digest"})
_RUN_KEYS = frozenset({"kind", "run", "spec", "previous", "digest"})


@dataclass
class LedgerRun:
    """One run as a ledger records it: what it may do, the steps charged, and what it released once, and where to."""

    spec: PrivacySpec
    charged: int = 0
    released: dict[str, str] = field(default_factory=dict)


class LedgerContents:
    """What the lines of a ledger say, taken in one by one.

    Attributes:
        path: for messages.
        budget: of a ledger that runs share, ``None`` for one of a single run.
        runs: by name, in the order of their first lines; the name of a single run is ``""``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.budget: PrivacyBudget | None = None
        self.runs: dict[str, LedgerRun] = {}

    def spent(self) -> tuple[float, float]:
        """Return the epsilon and delta of all runs together, all planned steps and releases of each counted."""
        specs = [run.spec for run in self.runs.values()]
        if self.budget is not None:
            return self.budget.spent(specs)
        return specs[0].epsilon(), specs[0].delta

    def accept(self, number: int, entry: Entry) -> None:
        """Take in line ``number``, from 1.

        Raises:
            LedgerError: it makes no sense after those before it.
        """
        kind = entry.get("kind")
        if number == 1:
            self._header(entry)
        elif kind == "run" and self.budget is not None:
            name = entry.get("run")
            if entry.keys() != _RUN_KEYS or not isinstance(name, str) or not name or name in self.runs:
                raise damaged(self.path, number, "is not a new run")
            self.runs[name] = LedgerRun(self._spec(number, entry["spec"]))
        elif kind == "release":
            self._release(number, entry)
        else:
            self._reserve(number, entry)

    def _header(self, entry: Entry) -> None:
        version, spec, budget = (entry.get(key) for key in ("version", "spec", "budget"))
        if entry.get("kind") == "create" and version == 1 and isinstance(spec, dict):
            self.runs[""] = LedgerRun(self._spec(1, spec))
        elif entry.get("kind") == "create" and version == 2 and isinstance(budget, dict):
            try:
                self.budget = PrivacyBudget.from_dict(budget)
            except (TypeError, ValueError) as error:
                raise damaged(self.path, 1, f"holds no budget ({error})") from error
        else:
            raise damaged(self.path, 1, "is not the header of a version 1 or 2 ledger")

    def _spec(self, number: int, recorded: Any) -> PrivacySpec:
        try:
            return PrivacySpec.from_dict(recorded)
        except (TypeError, ValueError) as error:
            raise damaged(self.path, number, f"holds no specification of this version ({error})") from error

    def _release(self, number: int, entry: Entry) -> None:
        run = self._run(number, entry, _RELEASE_KEYS, "is not a whole release")
        name, saved_as = entry["name"], entry["saved_as"]
        if not isinstance(name, str) or not isinstance(saved_as, str):
            raise damaged(self.path, number, "is not a whole release")
        if name not in run.spec.releases or name in run.released:
            raise damaged(self.path, number, f"releases {name!r}, which is not in the specification, or once more")
        run.released[name] = saved_as

    def _reserve(self, number: int, entry: Entry) -> None:
        run = self._run(number, entry, _STEP_KEYS, "is not a consistent reservation")
        steps, charged = entry["steps"], entry["charged"]
        if entry["kind"] != "reserve" or type(steps) is not int or steps < 1 or charged != run.charged + steps:
            raise damaged(self.path, number, "is not a consistent reservation")
        if charged > run.spec.steps:
            raise damaged(self.path, number, f"charges more than the {run.spec.steps} steps of the specification")
        run.charged += steps

    def _run(self, number: int, entry: Entry, keys: frozenset[str], complaint: str) -> LedgerRun:
        shared = self.budget is not None
        name = entry.get("run") if shared else ""
        if entry.keys() != (keys | {"run"} if shared else keys) or not isinstance(name, str) or name not in self.runs:
            raise damaged(self.path, number, complaint)
        return self.runs[name]


def read_ledger(path: str | os.PathLike[str]) -> LedgerContents:
    """Return what a ledger says, without a run; the file may be in use, and is not changed.

    Raises:
        FileNotFoundError: there is none.
        LedgerError: it is not a ledger, or is damaged.
    """
    contents = LedgerContents(Path(path))
    for number, entry in enumerate(read_entries(contents.path), start=1):
        contents.accept(number, entry)
    return contents


def check_not_forked(path: str | os.PathLike[str], other: str | os.PathLike[str]) -> int:
    """Return how many lines two copies of one ledger have in common, if one continues the other.

    Raises:
        LedgerError: one head has two different successors, so what was spent is in neither file; or they never had a
            line in common.
    """
    first, second = (read_entries(Path(p)) for p in (path, other))
    common = 0
    for a, b in zip(first, second):
        if a["digest"] != b["digest"]:
            break
        common += 1
    if common == 0:
        raise LedgerError(f"{path} and {other} are two different ledgers")
    if common < min(len(first), len(second)):
        raise LedgerError(
            f"{path} and {other} were one ledger up to line {common} and were continued apart: neither holds all that "
            f"was spent. Count the runs of both"
        )
    return common
