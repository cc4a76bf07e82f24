# SPDX-License-Identifier: Apache-2.0
"""A write-ahead record of spent steps and releases that outlives the process: what was started is charged.

JSON lines in an append-only file. Each line carries the SHA-256 of its own content, which includes the
previous line's. Steps are reserved, in blocks, before the first of them starts: killed at any moment, a
run has charged at least what it started. The ledger belongs to a data set's budget and not to a
checkpoint, so going back to an old checkpoint does not give spent steps back.

Lines after the header are of two kinds: ``reserve``, a block of steps; and ``release``, one of what the specification
releases once (``PrivacySpec.releases``), with where its result was going to be saved.
"""

import hashlib
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any, NoReturn

from wavedp.privacy.spec import PrivacySpec
from wavedp.privacy.validation import check_integer

FREE_FIELDS = frozenset({"expected_batch_size"})
"""Fields of the specification that a resumed run may change: they scale a release after its noise."""

_FIRST = "0" * 64
_RELEASE_KEYS = frozenset({"kind", "name", "saved_as", "previous", "digest"})
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC


class LedgerError(RuntimeError):
    """The ledger's file is damaged, belongs to another run, or is in use."""


class PrivacyLedger:
    """The steps charged against one privacy budget, in a file that one process at a time may open.

    Opening creates the file (mode 0600), or verifies the whole chain, cuts off a last line that a crash
    left incomplete, and checks that the specification is the recorded one. The file appears under its name
    with its header in it, so an empty file was emptied, and is refused; what is no ledger is left as it is.

    It protects against crashes, old checkpoints and mistakes, not against someone who can rewrite or
    replace the file; :attr:`head` can be copied elsewhere to detect that.

    Args:
        path: the ledger's file; its folder must exist.
        spec: what the run is allowed: at most ``spec.steps`` steps of this mechanism, and each of ``spec.releases``
            once.

    Raises:
        FileNotFoundError: the folder does not exist.
        LedgerError: another process holds the file, it is not a ledger or is empty, a line is damaged, or the
            specification differs.
    """

    def __init__(self, path: str | os.PathLike[str], spec: PrivacySpec) -> None:
        self.path = Path(path)
        self.spec = spec
        self._charged = 0
        self._released: dict[str, str] = {}
        self._digests = [_FIRST]
        self._process = os.getpid()
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"folder {self.path.parent} of the privacy ledger does not exist")
        self._file: int | None = None
        try:
            if not self._create():
                self._open()
        except BaseException:
            self.close()
            raise

    @property
    def charged(self) -> int:
        """Steps charged so far: every one that was started, and the rest of the last reserved block."""
        return self._charged

    @property
    def remaining(self) -> int:
        """Steps that may still be reserved."""
        return self.spec.steps - self._charged

    @property
    def released(self) -> dict[str, str]:
        """What was released once, by name, and where its result was going to be saved (``""`` where nobody said)."""
        return dict(self._released)

    @property
    def head(self) -> str:
        """Digest of the last line; it stands for the whole history."""
        return self._digests[-1]

    def contains(self, head: str) -> bool:
        """Whether ``head`` was the head of this ledger at some time."""
        return head in self._digests

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
            raise RuntimeError(
                f"privacy budget exhausted: {steps} steps asked for, {self.remaining} of {self.spec.steps} "
                f"left in {self.path}"
            )
        self._append({"kind": "reserve", "steps": steps, "charged": self._charged + steps})
        self._charged += steps

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
            raise RuntimeError(f"the specification of {self.path} has no release {name!r}; it has {self.spec.releases}")
        if name in self._released:
            saved = self._released[name]
            raise RuntimeError(
                f"{self.path} already charged the release {name!r}, and it is not drawn again"
                + (f": read its result in {saved}" if saved else "")
            )
        saved_as = os.fspath(saved_as)
        self._append({"kind": "release", "name": name, "saved_as": saved_as})
        self._released[name] = saved_as

    def close(self) -> None:
        """Release the file; a second call does nothing."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> "PrivacyLedger":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a PrivacyLedger cannot be copied or pickled: two writers would break its chain")

    def _create(self) -> bool:
        """Write the header under another name and link it to the ledger's; return whether there was none."""
        if os.path.lexists(self.path):
            return False
        draft = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}")
        self._file = os.open(draft, _FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            self._lock()
            self._write({"kind": "create", "version": 1, "spec": self.spec.to_dict()})
            os.link(draft, self.path)
        except FileExistsError:
            self.close()
            self._digests = [_FIRST]
            return False
        except OSError as error:
            raise LedgerError(f"{self.path} could not be created: {error}; put it on a local file system") from error
        finally:
            os.unlink(draft)
        self._sync_folder()
        return True

    def _open(self) -> None:
        if self.path.is_dir():
            raise LedgerError(f"{self.path} is a folder; give the path of a file, such as {self.path / 'ledger.jsonl'}")
        self._file = os.open(self.path, _FLAGS)
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise LedgerError(f"{self.path} is not a regular file")
        self._lock()
        self._replay()

    def _lock(self) -> None:
        import fcntl

        try:
            fcntl.flock(self._handle(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LedgerError(f"{self.path} is in use by another run; two runs cannot share a ledger") from error

    def _replay(self) -> None:
        content = self._read()
        *lines, rest = content.split(b"\n")
        if not lines and _torn(rest):
            raise LedgerError(
                f"{self.path} is empty or not a ledger: a ledger has a header from the start, so what was spent is "
                f"not known; give another path for a new budget"
            )
        for number, line in enumerate(lines, start=1):
            self._accept(number, self._parse(number, line))
        if not rest:
            return
        number = len(lines) + 1
        if _torn(rest):
            # A line is complete before anything it reserved may start, so this one paid for nothing.
            os.ftruncate(self._handle(), len(content) - len(rest))
        else:
            self._accept(number, self._parse(number, rest))
            os.write(self._handle(), b"\n")
        os.fsync(self._handle())

    def _accept(self, number: int, entry: dict[str, Any]) -> None:
        if entry.get("previous") != self.head:
            raise self._damaged(number, "does not follow the line before it")
        kind = entry.get("kind")
        if number == 1:
            recorded = entry.get("spec")
            if kind != "create" or entry.get("version") != 1 or not isinstance(recorded, dict):
                raise self._damaged(number, "is not the header of a version 1 ledger")
            self._match_spec(recorded)
        elif kind == "release":
            name, saved_as = entry.get("name"), entry.get("saved_as")
            if entry.keys() != _RELEASE_KEYS or not isinstance(name, str) or not isinstance(saved_as, str):
                raise self._damaged(number, "is not a whole release")
            if name not in self.spec.releases or name in self._released:
                raise self._damaged(number, f"releases {name!r}, which is not in the specification, or once more")
            self._released[name] = saved_as
        else:
            steps, charged = entry.get("steps"), entry.get("charged")
            if kind != "reserve" or type(steps) is not int or steps < 1 or charged != self._charged + steps:
                raise self._damaged(number, "is not a consistent reservation")
            self._charged = charged
            if self._charged > self.spec.steps:
                raise self._damaged(number, f"charges more than the {self.spec.steps} steps of the specification")
        self._digests.append(entry["digest"])

    def _match_spec(self, recorded: dict[str, Any]) -> None:
        current = self.spec.to_dict()
        differing = {
            name: (recorded.get(name), current.get(name))
            for name in {*recorded, *current} - FREE_FIELDS
            if recorded.get(name) != current.get(name)
        }
        if differing:
            raise LedgerError(
                f"{self.path} was opened for another specification; differing (recorded, now): {differing}. "
                f"Resume with the recorded values, or start a new ledger and add up both runs' costs"
            )

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise self._damaged(number, "is not JSON") from error
        if not isinstance(entry, dict) or entry.get("digest") != _digest(entry):
            raise self._damaged(number, "does not match its digest")
        return entry

    def _append(self, fields: dict[str, Any]) -> None:
        if os.getpid() != self._process:
            raise LedgerError(f"{self.path} was opened by another process; open the ledger after forking")
        try:
            current = os.stat(self.path)
        except FileNotFoundError as error:
            raise LedgerError(f"{self.path} was removed while in use") from error
        opened = os.fstat(self._handle())
        if (current.st_dev, current.st_ino) != (opened.st_dev, opened.st_ino):
            raise LedgerError(f"{self.path} was replaced while in use")
        self._write(fields)

    def _write(self, fields: dict[str, Any]) -> None:
        descriptor = self._handle()
        entry = {"previous": self.head, **fields}
        entry["digest"] = _digest(entry)
        line = (json.dumps(entry, sort_keys=True) + "\n").encode()
        try:
            written = os.write(descriptor, line)
            os.fsync(descriptor)
        except OSError as error:
            self.close()
            raise LedgerError(f"{self.path} could not be written; the step must not start") from error
        if written != len(line):
            self.close()
            raise LedgerError(f"{self.path} took {written} of {len(line)} bytes; is the disk full?")
        self._digests.append(str(entry["digest"]))

    def _read(self) -> bytes:
        descriptor = self._handle()
        size = os.fstat(descriptor).st_size
        content = b""
        while len(content) < size:
            part = os.pread(descriptor, size - len(content), len(content))
            if not part:
                break
            content += part
        return content

    def _sync_folder(self) -> None:
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _handle(self) -> int:
        if self._file is None:
            raise LedgerError(f"{self.path} is closed")
        return self._file

    def _damaged(self, number: int, reason: str) -> LedgerError:
        return LedgerError(f"{self.path}, line {number} {reason}; what was spent is not known, so the run cannot go on")


def _torn(line: bytes) -> bool:
    """Whether ``line`` can be the beginning of a line and no more, or blocks that a crash left unwritten."""
    try:
        json.JSONDecoder().raw_decode(line.decode())
    except ValueError:
        return line.startswith(b"{") or not line.strip(b"\0")
    return False


def _digest(entry: dict[str, Any]) -> str:
    content = {key: value for key, value in entry.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
