# SPDX-License-Identifier: Apache-2.0
"""A write-ahead record of spent steps and releases that outlives the process: what was started is charged.

A chain of JSON lines (:mod:`wavedp.privacy.ledger_file`). Steps are reserved, in blocks, before the first of them
starts: killed at any moment, a run has charged at least what it started. The ledger belongs to a data set's budget and
not to a checkpoint, so going back to an old checkpoint does not give spent steps back.

There are two kinds. A ledger of one run has that run's specification in its header. One that runs share has a
:class:`~wavedp.privacy.PrivacyBudget` there, and a ``run`` line with each run's name and specification. Its other lines
are ``reserve``, a block of steps; and ``release``, one of what the specification releases once
(``PrivacySpec.releases``), with where its result was going to be saved.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from wavedp.errors import InvalidTypeError, InvalidValueError, MissingFileError, StateError
from wavedp.privacy.ledger_budget import PrivacyBudget
from wavedp.privacy.ledger_contents import LedgerContents, LedgerRun
from wavedp.privacy.ledger_file import Entry, LedgerError, LedgerFile
from wavedp.privacy.spec import PrivacySpec
from wavedp.privacy.validation import check_integer

__all__ = ["FREE_FIELDS", "LedgerError", "PrivacyLedger"]

FREE_FIELDS = frozenset({"expected_batch_size"})
"""Fields of the specification that a resumed run may change: they scale a release after its noise."""


class PrivacyLedger:
    """The steps charged against one privacy budget, in a file that one process at a time may open.

    ::

        PrivacyLedger("runs/a/ledger.jsonl", spec)  # of this run alone

        budget = PrivacyBudget(epsilon=10.0, delta=1e-5)  # of all runs on the data set
        PrivacyLedger("faces.jsonl", spec, budget=budget, run="first")

    Opening creates the file (mode 0600), or verifies the whole chain, cuts off a last line that a crash
    left incomplete, and checks that the specification is the recorded one. A run is recorded with the first of its
    charges, and then holds all of its planned steps and releases in the budget, whether or not it takes them. The file
    appears under its name with its header in it, so an empty file was emptied, and is refused; what is no ledger is
    left as it is.

    It protects against crashes, old checkpoints and mistakes, not against someone who can rewrite or
    replace the file; :attr:`head` and :attr:`lines` can be copied elsewhere to detect that (:meth:`check_history`).

    Args:
        path: the ledger's file; its folder must exist.
        spec: what the run is allowed: at most ``spec.steps`` steps of this mechanism, and each of ``spec.releases``
            once.
        budget: of a new ledger that several runs share; for one that exists, the same budget or ``None``.
        run: in a shared ledger, the run's name: the same whenever it is resumed, another for every other run.

    Raises:
        TypeError, ValueError: ``budget`` without a run, or of a wrong type.
        FileNotFoundError: the folder does not exist, or a run is named without a budget and there is no ledger.
        LedgerError: another process holds the file, it is not a ledger or is empty, a line is damaged, the
            specification or the budget differs, or the budget has no room for the run.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        spec: PrivacySpec,
        *,
        budget: PrivacyBudget | None = None,
        run: str | None = None,
    ) -> None:
        if not isinstance(budget, PrivacyBudget | None):
            raise InvalidTypeError(f"budget must be a PrivacyBudget, got {type(budget).__name__}")
        if budget is not None and run is None:
            raise InvalidValueError("a budget is shared by runs: name this one with run=")
        if run is not None and (not isinstance(run, str) or not run.strip()):
            raise InvalidValueError(f"run must be a name, got {run!r}")
        self.path = Path(path)
        if run is not None and budget is None and not os.path.lexists(path):
            raise MissingFileError(f"there is no ledger {path}; a new one that runs share needs a budget")
        self.spec = spec
        self._contents = LedgerContents(self.path)
        header: dict[str, Any] = {"kind": "create", "version": 1, "spec": spec.to_dict()}
        if budget is not None:
            header = {"kind": "create", "version": 2, "budget": budget.to_dict()}
        self._name = run or ""
        self._asked = budget
        if (
            budget is not None and self.path.parent.is_dir() and not os.path.lexists(path)
        ):  # a refused run leaves no file
            self._check_fits(budget, [])
        self._file = LedgerFile(self.path, header, self._accept)
        if not self._contents.runs and self._contents.budget is None:  # a new file
            self._contents.accept(1, {"previous": "", **header})
        try:
            self._check_run()
        except BaseException:
            self.close()
            raise

    @property
    def charged(self) -> int:
        """Steps of this run charged so far: every one that was started, and the rest of the last reserved block."""
        return self._own.charged

    @property
    def remaining(self) -> int:
        """Steps that this run may still reserve."""
        return self.spec.steps - self.charged

    @property
    def released(self) -> dict[str, str]:
        """What this run released once, by name, and where it was going to be saved (``""`` where nobody said)."""
        return dict(self._own.released)

    @property
    def budget(self) -> PrivacyBudget | None:
        """What all runs of the ledger may spend together; ``None`` for a ledger of one run."""
        return self._contents.budget

    @property
    def run(self) -> str:
        """The run's name in a shared ledger; ``""`` in one of its own."""
        return self._name

    @property
    def runs(self) -> tuple[str, ...]:
        """Names of the runs that were charged, in order of their first charge."""
        return tuple(self._contents.runs)

    @property
    def head(self) -> str:
        """Digest of the last line; it stands for the whole history."""
        return self._file.digests[-1]

    @property
    def lines(self) -> int:
        """Number of lines, the header included."""
        return len(self._file.digests)

    def spent(self) -> tuple[float, float]:
        """Return the epsilon and delta of all recorded runs together, every one with all its planned steps."""
        return self._contents.spent()

    def contains(self, head: str) -> bool:
        """Whether ``head`` was the head of this ledger at some time."""
        return head in self._file.digests

    def check_history(self, head: str, lines: int) -> None:
        """Raise unless this ledger once had this :attr:`head` and so many :attr:`lines`, and went on from there.

        Raises:
            LedgerError: it is behind (an older copy was put in its place), or has another line where the head was (two
                copies of one ledger were continued apart, or it is another ledger).
        """
        found = self._file.digests[lines - 1] if 1 <= lines <= self.lines else None
        if found == head:
            return
        if lines > self.lines:
            reason = f"it has {self.lines} lines and had {lines}: an older copy took its place, or it is another ledger"
        else:
            reason = (
                f"its line {lines} is another one: two copies of one ledger were continued apart, or it is another one"
            )
        raise LedgerError(f"{self.path} lacks a charge that was made: {reason}. Put the right ledger back")

    def check_spec(self, spec: PrivacySpec) -> None:
        """Raise a LedgerError unless the ledger was opened for ``spec``."""
        if self.spec != spec:
            raise LedgerError(f"{self.path} was opened for another specification than the run's")

    def reserve(self, steps: int) -> None:
        """Charge ``steps`` steps, durably, before any of them starts.

        Raises:
            ValueError: ``steps`` is less than 1.
            RuntimeError: fewer steps remain; nothing is charged.
            LedgerError: the ledger is closed, its file was replaced, or the disk refused the write.
        """
        steps = check_integer("steps", steps, at_least=1)
        if steps > self.remaining:
            raise StateError(
                f"privacy budget exhausted: {steps} steps asked for, {self.remaining} of {self.spec.steps} "
                f"left in {self.path}"
            )
        self._append({"kind": "reserve", "steps": steps, "charged": self.charged + steps})

    def release(self, name: str, saved_as: str | os.PathLike[str] = "") -> None:
        """Charge the one release called ``name``, durably, before anything of it is drawn.

        Args:
            name: one of ``spec.releases``.
            saved_as: where its result is going to be; written into the ledger.

        Raises:
            RuntimeError: it was charged before, or the specification has no such release; nothing is charged.
            LedgerError: as :meth:`reserve`.
        """
        if name not in self.spec.releases:
            raise StateError(f"the specification of {self.path} has no release {name!r}; it has {self.spec.releases}")
        if name in self._own.released:
            saved = self._own.released[name]
            raise StateError(
                f"{self.path} already charged the release {name!r}, and it is not drawn again"
                + (f": read its result in {saved}" if saved else "")
            )
        self._append({"kind": "release", "name": name, "saved_as": os.fspath(saved_as)})

    def close(self) -> None:
        """Release the file; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> "PrivacyLedger":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise InvalidTypeError("a PrivacyLedger cannot be copied or pickled: two writers would break its chain")

    @property
    def _own(self) -> LedgerRun:
        return self._contents.runs.get(self._name) or LedgerRun(self.spec)

    def _accept(self, number: int, entry: Entry) -> None:
        self._contents.accept(number, entry)
        # Before anything is repaired: the ledger of something else is left as it is.
        if number == 1 and self._contents.budget is None:
            if self._name:
                raise LedgerError(f"{self.path} is the ledger of a single run, without a budget to share; take another")
            self._match_spec(entry["spec"])
        elif number == 1:
            self._match_budget()
        elif entry["kind"] == "run" and entry["run"] == self._name:
            self._match_spec(entry["spec"])

    def _check_run(self) -> None:
        """Raise unless this run is recorded or may be."""
        budget = self._contents.budget
        if budget is not None and self._name not in self._contents.runs:
            self._check_fits(budget, [run.spec for run in self._contents.runs.values()])

    def _check_fits(self, budget: PrivacyBudget, specs: list[PrivacySpec]) -> None:
        """Raise unless the budget has room for this run beside others with these specifications."""
        unlike = budget.unlike(self.spec)
        if unlike:
            raise LedgerError(f"{self.path}: the run and the budget differ in {', '.join(unlike)}")
        if budget.delta * self.spec.dataset_size_bound >= 1.0:
            raise LedgerError(
                f"{self.path}: the budget's delta={budget.delta} must be below 1/dataset_size_bound = "
                f"{1.0 / self.spec.dataset_size_bound}"
            )
        if not budget.covers([*specs, self.spec]):
            (epsilon, delta), (wanted, also) = budget.spent(specs), budget.spent([*specs, self.spec])
            raise LedgerError(
                f"privacy budget exhausted: {self.path} has spent epsilon {epsilon:.6g} and delta {delta:.6g} of "
                f"{budget.epsilon:.6g} and {budget.delta:.6g}; with the run {self._name!r} it would be "
                f"{wanted:.6g} and {also:.6g}. Take fewer steps or more noise"
            )

    def _match_budget(self) -> None:
        budget = self._contents.budget
        if not self._name:
            raise LedgerError(f"{self.path} is shared by runs: name this one with run= (--run-name)")
        if self._asked is not None and self._asked != budget:
            raise LedgerError(f"{self.path} has another budget: {budget}. Leave the budget out to use that one")

    def _match_spec(self, recorded: Mapping[str, Any]) -> None:
        current = self.spec.to_dict()
        differing = {
            name: (recorded.get(name), current.get(name))
            for name in {*recorded, *current} - FREE_FIELDS
            if recorded.get(name) != current.get(name)
        }
        if differing:
            where = f"{self.path}, run {self._name!r}," if self._name else f"{self.path}"
            raise LedgerError(
                f"{where} was opened for another specification; differing (recorded, now): {differing}. "
                f"Resume with the recorded values, or charge this as another run"
            )

    def _append(self, fields: dict[str, Any]) -> None:
        if self._contents.budget is not None:
            if self._name not in self._contents.runs:
                self._write({"kind": "run", "run": self._name, "spec": self.spec.to_dict()})
            fields = {**fields, "run": self._name}
        self._write(fields)

    def _write(self, fields: dict[str, Any]) -> None:
        self._file.append(fields)
        self._contents.accept(self.lines, {"previous": "", "digest": "", **fields})
