# SPDX-License-Identifier: Apache-2.0
"""The file under a privacy ledger: JSON lines in a chain of digests, appended durably by one process at a time.

Each line carries the SHA-256 of its own content, which includes the previous line's. What the lines mean is
:mod:`wavedp.privacy.ledger`'s; this module knows only that nothing in them may be changed, left out or put in.
"""

import contextlib
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from wavedp.errors import MissingFileError, StateError
from wavedp.storage import sync_folder

_FIRST = "0" * 64
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC

Entry = dict[str, Any]


class LedgerError(StateError):
    """The ledger's file is damaged, belongs to another run, is in use, or cannot take what was asked for."""


class LedgerFile:
    """An open file of chained lines, locked against other processes.

    The file appears under its name with its first line in it, so an empty file was emptied, and is refused; what is
    no ledger is left as it is. A last line that a crash left incomplete is cut off, after all others were accepted.

    Args:
        path: the file; its folder must exist.
        header: the first line of a file that does not exist yet.
        accept: told of every line, by number from 1, when the file is opened; raises what is wrong with it.

    Raises:
        FileNotFoundError: the folder does not exist.
        LedgerError: another process holds the file, it is no chain or is empty, a line is damaged, or the disk
            refused.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], accept: Callable[[int, Entry], None]) -> None:
        self.path = path
        self._digests: list[str] = []
        self._size = 0
        self._process = os.getpid()
        self._file: int | None = None
        if not path.parent.is_dir():
            raise MissingFileError(f"folder {path.parent} of the privacy ledger does not exist")
        try:
            if not self._create(header):
                self._open(accept)
        except OSError as error:
            self.close()
            raise LedgerError(f"{path} could not be opened: {error}") from error
        except BaseException:
            self.close()
            raise

    @property
    def digests(self) -> list[str]:
        """Digests of all lines, which were the file's heads one after the other."""
        return self._digests

    def append(self, fields: Mapping[str, Any]) -> None:
        """Write one line, durably; nothing may rely on it where this raises, and after a failed write the file is
        closed."""
        if os.getpid() != self._process:
            raise LedgerError(f"{self.path} was opened by another process; open the ledger after forking")
        try:
            current, opened = os.stat(self.path), os.fstat(self._handle())
        except OSError as error:
            raise LedgerError(f"{self.path} was removed while in use, or cannot be reached: {error}") from error
        if (current.st_dev, current.st_ino) != (opened.st_dev, opened.st_ino):
            raise LedgerError(f"{self.path} was replaced while in use")
        if opened.st_size != self._size:
            raise LedgerError(f"{self.path} was written to by something else while in use")
        self._write(fields)

    def close(self) -> None:
        """Release the file; a second call does nothing."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _create(self, header: Mapping[str, Any]) -> bool:
        """Write the header under another name and link it to the file's; return whether there was none."""
        if os.path.lexists(self.path):
            return False
        draft = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}")
        self._file = os.open(draft, _FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            self._lock()
            self._write(header)
            os.link(draft, self.path)
        except FileExistsError:
            self.close()
            self._digests, self._size = [], 0
            return False
        except OSError as error:
            raise LedgerError(f"{self.path} could not be created: {error}; put it on a local file system") from error
        finally:
            with contextlib.suppress(OSError):  # it stands in nobody's way
                os.unlink(draft)
        folder, *above = self.path.absolute().parents
        sync_folder(folder)
        for parent in above:  # folders made for this run; what cannot be opened was there before
            with contextlib.suppress(OSError):
                sync_folder(parent)
        return True

    def _open(self, accept: Callable[[int, Entry], None]) -> None:
        if self.path.is_dir():
            raise LedgerError(f"{self.path} is a folder; give the path of a file, such as {self.path / 'ledger.jsonl'}")
        self._file = os.open(self.path, _FLAGS)
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise LedgerError(f"{self.path} is not a regular file")
        self._lock()
        content = _read(self._file)
        entries, whole = parse(self.path, content)
        for number, entry in enumerate(entries, start=1):
            accept(number, entry)
        self._digests = [str(entry["digest"]) for entry in entries]
        # A line is complete before anything that it charges may start, so a torn one paid for nothing.
        if whole < len(content):
            os.ftruncate(self._file, whole)
        elif not content.endswith(b"\n"):
            whole += os.write(self._file, b"\n")
            if whole == len(content):
                raise LedgerError(f"{self.path} takes no more bytes; is the disk full?")
        self._size = whole
        # A killed process may not have synced its last line; what is relied on is on disk.
        os.fsync(self._file)

    def _lock(self) -> None:
        import fcntl

        try:
            fcntl.flock(self._handle(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LedgerError(
                f"{self.path} is in use by another run; two runs cannot share a ledger at once"
            ) from error

    def _write(self, fields: Mapping[str, Any]) -> None:
        descriptor = self._handle()
        entry = {"previous": self._digests[-1] if self._digests else _FIRST, **fields}
        entry["digest"] = digest_of(entry)
        line = (json.dumps(entry, sort_keys=True) + "\n").encode()
        try:
            written = os.write(descriptor, line)
            os.fsync(descriptor)
        except OSError as error:
            self.close()
            raise LedgerError(f"{self.path} could not be written ({error}); the step must not start") from error
        if written != len(line):
            self.close()
            raise LedgerError(f"{self.path} took {written} of {len(line)} bytes; is the disk full?")
        self._digests.append(str(entry["digest"]))
        self._size += written

    def _handle(self) -> int:
        if self._file is None:
            raise LedgerError(f"{self.path} is closed")
        return self._file


def read_entries(path: Path) -> list[Entry]:
    """Return the lines of a ledger without opening it for a run: what is torn is left out, nothing is changed.

    Raises:
        FileNotFoundError, LedgerError: there is no such file, it is not a ledger, or a line is damaged.
    """
    return parse(path, path.read_bytes())[0]


def parse(path: Path, content: bytes) -> tuple[list[Entry], int]:
    """Return the chained lines of ``content`` and how many of its bytes they are; what follows was torn by a crash.

    Raises:
        LedgerError: there is no whole line, or one is damaged.
    """
    *lines, rest = content.split(b"\n")
    torn = _torn(rest)
    if not lines and torn:
        raise LedgerError(
            f"{path} is empty or not a ledger: a ledger has a header from the start, so what was spent is "
            f"not known; give another path for a new budget"
        )
    if not torn:
        lines.append(rest)
    entries: list[Entry] = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise damaged(path, number, "is not JSON") from error
        if not isinstance(entry, dict) or entry.get("digest") != digest_of(entry):
            raise damaged(path, number, "does not match its digest")
        if entry.get("previous") != (entries[-1]["digest"] if entries else _FIRST):
            raise damaged(path, number, "does not follow the line before it")
        entries.append(entry)
    return entries, len(content) - (len(rest) if torn else 0)


def digest_of(entry: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a line's fields, its own digest left out, in hexadecimal."""
    content = {key: value for key, value in entry.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def damaged(path: Path, number: int, reason: str) -> LedgerError:
    """Return the error of a line that cannot be counted on."""
    return LedgerError(f"{path}, line {number} {reason}; what was spent is not known, so the run cannot go on")


def _torn(line: bytes) -> bool:
    """Whether ``line`` can be the beginning of a line and no more, or blocks that a crash left unwritten."""
    if not line:
        return True
    try:
        json.JSONDecoder().raw_decode(line.decode())
    except ValueError:
        return line.startswith(b"{") or not line.strip(b"\0")
    return False


def _read(descriptor: int) -> bytes:
    content = b""
    while part := os.pread(descriptor, 1 << 20, len(content)):
        content += part
    return content
