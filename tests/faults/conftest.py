# SPDX-License-Identifier: Apache-2.0
"""Children that are killed, file-system calls that fail, and all states that a power cut could leave behind."""

import errno
import itertools
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from wavedp.privacy import PrivacySpec

CALLS = ("open", "write", "fsync", "ftruncate", "link", "rename", "replace", "unlink", "rmdir", "mkdir")
"""Everything that ledger and checkpoints call to change files."""


@pytest.fixture
def spec() -> Callable[..., PrivacySpec]:
    def make(**changes: Any) -> PrivacySpec:
        values: dict[str, Any] = {
            "sample_rate": 0.1, "steps": 10**6, "noise_multiplier": 1.0, "max_grad_norm": 1.0,
            "expected_batch_size": 8.0, "delta": 1e-3, "dataset_size_bound": 100,
        }  # fmt: skip
        return PrivacySpec(**{**values, **changes})

    return make


@pytest.fixture
def killed() -> Callable[..., bytes]:
    """``killed(work, after, wait_for)``: what ``work(write)`` wrote in a child that got SIGKILL ``after`` seconds from
    its first ``wait_for`` bytes on, or from its birth if that is 0."""

    def run(work: Callable[[Callable[[bytes], object]], object], after: float, wait_for: int = 0) -> bytes:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(reader)
                work(lambda data: os.write(writer, data))  # whole, up to 4096 bytes: an unbuffered pipe
            finally:
                os._exit(1)
        os.close(writer)
        heard = b""
        while len(heard) < wait_for and (part := os.read(reader, 1 << 16)):
            heard += part
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
        while part := os.read(reader, 1 << 16):
            heard += part
        os.close(reader)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the child ended by itself"
        return heard

    return run


@dataclass
class Faults:
    """Makes one file-system call of many fail: the one numbered ``at``, from 0; ``seen`` lists all that were made."""

    how: str  # "ENOSPC", "EIO" or "short write"
    at: int
    seen: list[str] = field(default_factory=list)

    @property
    def reached(self) -> bool:
        return len(self.seen) > self.at

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in CALLS:
            patch.setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self.how == "short write" and name != "write":
                return real(*arguments, **options)
            self.seen.append(name)
            if len(self.seen) - 1 != self.at:
                return real(*arguments, **options)
            if self.how == "short write":
                return real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
            raise OSError(getattr(errno, self.how), os.strerror(getattr(errno, self.how)))

        return call


@pytest.fixture
def faults() -> Callable[..., Iterator[tuple[Faults, BaseException | None]]]:
    """``faults(work, reset)`` runs ``work`` once for every call that it makes and every way in which that may fail,
    each time after ``reset``."""

    def each(
        work: Callable[[], object], reset: Callable[[], object] = lambda: None
    ) -> Iterator[tuple[Faults, BaseException | None]]:
        for how in ("ENOSPC", "EIO", "short write"):
            for at in itertools.count():
                reset()
                fault, error = Faults(how, at), None
                with pytest.MonkeyPatch.context() as patch:
                    fault.install(patch)
                    try:
                        work()
                    except Exception as raised:
                        error = raised
                if not fault.reached:
                    assert error is None
                    break
                yield fault, error

    return each


@dataclass(eq=False)
class Node:
    """A file's or a folder's identity, whatever its names."""

    folder: bool


class Recorder:
    """Notes every change of files under ``root`` and makes the states in which a power cut might leave them.

    The model is POSIX's, weaker than any real file system: data that were not synced by fsync of their file may be
    there, be missing, be half there or be zeros; a name that was not synced by fsync of its folder may be there or
    not, in any combination with others. A rename is one change.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log: list[tuple[Any, ...]] = []  # ("name", parent, {name: node or None}), ("data", ...), ("sync", node)
        self.tree = Node(folder=True)
        self._names: dict[Node, dict[str, Node]] = {self.tree: {}}
        self._sizes: dict[Node, int] = {}
        self._open: dict[int, tuple[Node, bool]] = {}
        self._load(root, self.tree)
        self.initial = len(self.log)

    def _load(self, folder: Path, node: Node) -> None:
        """What is there already counts as synced."""
        for path in sorted(folder.iterdir()):
            child = self._new(node, path.name, path.is_dir())
            if path.is_dir():
                self._load(path, child)
            else:
                self._data(child, 0, path.read_bytes())
                self.log.append(("sync", child))
        self.log.append(("sync", node))

    def _new(self, parent: Node, name: str, folder: bool) -> Node:
        node = Node(folder)
        if folder:
            self._names[node] = {}
        self._rename(parent, {name: node})
        return node

    def _rename(self, parent: Node, names: dict[str, Node | None]) -> None:
        for name, node in names.items():
            if node is None:
                del self._names[parent][name]
            else:
                self._names[parent][name] = node
        self.log.append(("name", parent, names))

    def _data(self, node: Node, offset: int, content: bytes) -> None:
        self._sizes[node] = max(self._sizes.get(node, 0), offset + len(content))
        self.log.append(("data", node, offset, content))

    def _place(self, path: Any, dir_fd: int | None = None) -> tuple[Node, str] | None:
        text = os.fspath(path)
        if dir_fd is not None:
            text = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), text)
        text = os.path.abspath(text)
        if not text.startswith(f"{self.root}/"):
            return None
        *folders, name = text[len(str(self.root)) + 1 :].split("/")
        node = self.tree
        for folder in folders:
            node = self._names[node][folder]
        return node, name

    def install(self, patch: pytest.MonkeyPatch) -> None:
        real = {name: getattr(os, name) for name in (*CALLS, "close")}

        def open_(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            existed = os.path.lexists(path)
            descriptor = real["open"](path, flags, mode, dir_fd=dir_fd)
            if os.path.abspath(os.fspath(path)) == str(self.root):
                self._open[descriptor] = (self.tree, False)
            elif place := self._place(path, dir_fd):
                parent, name = place
                node = self._names[parent][name] if existed else self._new(parent, name, folder=False)
                self._open[descriptor] = (node, bool(flags & os.O_APPEND))
            return int(descriptor)

        def write(descriptor: int, content: Any) -> int:
            written = int(real["write"](descriptor, content))
            if descriptor in self._open:
                node, _ = self._open[descriptor]
                self._data(node, self._sizes.get(node, 0), bytes(content)[:written])  # all of them append
            return written

        def ftruncate(descriptor: int, size: int) -> None:
            real["ftruncate"](descriptor, size)
            node, _ = self._open[descriptor]
            self._sizes[node] = size
            self.log.append(("data", node, size, None))

        def fsync(descriptor: int) -> None:
            if descriptor in self._open:
                self.log.append(("sync", self._open[descriptor][0]))

        def close(descriptor: int) -> None:
            self._open.pop(descriptor, None)
            real["close"](descriptor)

        def mkdir(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
            real["mkdir"](path, mode, dir_fd=dir_fd)
            if place := self._place(path, dir_fd):
                self._new(*place, folder=True)

        def remove(name: str) -> Callable[..., None]:
            def call(path: Any, *, dir_fd: int | None = None) -> None:
                real[name](path, dir_fd=dir_fd)
                if place := self._place(path, dir_fd):
                    self._rename(place[0], {place[1]: None})

            return call

        def move(name: str, keep: bool) -> Callable[..., None]:
            def call(source: Any, target: Any) -> None:
                real[name](source, target)
                (parent, old), (other, new) = self._place(source) or (None, ""), self._place(target) or (None, "")
                assert parent is other is not None, "a rename between folders is not modelled"
                node = self._names[parent][old]
                self._rename(parent, {new: node} if keep else {old: None, new: node})

            return call

        patched = {
            "open": open_, "write": write, "ftruncate": ftruncate, "fsync": fsync, "close": close, "mkdir": mkdir,
            "unlink": remove("unlink"), "rmdir": remove("rmdir"),
            "rename": move("rename", keep=False), "replace": move("replace", keep=False),
            "link": move("link", keep=True),
        }  # fmt: skip
        for name, function in patched.items():
            patch.setattr(os, name, function)

    def states(self, subsets: int, seed: int = 0) -> Iterator[tuple[bool, dict[str, bytes | None]]]:
        """Pairs of whether all calls had been made, and files (``None``: a folder) by path, each pair once."""
        chance = random.Random(seed)
        seen = set()
        for cut in range(self.initial, len(self.log) + 1):
            log = self.log[:cut]
            loose = [i for i, entry in enumerate(log) if entry[0] != "sync" and ("sync", entry[1]) not in log[i + 1 :]]
            for number in range(subsets):
                if number < 2:
                    fate = dict.fromkeys(loose, ("lost", "kept")[number])
                else:
                    fate = {i: chance.choice(("lost", "kept", "half", "zeros")) for i in loose}
                files = self._after(log, fate)
                key = (cut == len(self.log), tuple(sorted(files.items())))
                if key not in seen:
                    seen.add(key)
                    yield cut == len(self.log), files

    def _after(self, log: list[tuple[Any, ...]], fate: dict[int, str]) -> dict[str, bytes | None]:
        names: dict[Node, dict[str, Node]] = {}
        data: dict[Node, bytes] = {}
        for i, entry in enumerate(log):
            what = fate.get(i, "kept")
            if what == "lost" or entry[0] == "sync":
                continue
            if entry[0] == "name":
                here = names.setdefault(entry[1], {})
                for name, node in entry[2].items():
                    if node is not None:
                        here[name] = node
                    else:
                        here.pop(name, None)
            else:
                _, node, offset, content = entry
                before = data.get(node, b"").ljust(offset, b"\0")
                if content is None:
                    data[node] = before[:offset]
                    continue
                content = {"half": content[: len(content) // 2], "zeros": bytes(len(content))}.get(what, content)
                data[node] = before[:offset] + content + before[offset + len(content) :]
        found: dict[str, bytes | None] = {}

        def walk(node: Node, prefix: str) -> None:
            for name, child in names.get(node, {}).items():
                if child.folder:
                    found[prefix + name] = None
                    walk(child, f"{prefix}{name}/")
                else:
                    found[prefix + name] = data.get(child, b"")

        walk(self.tree, "")
        return found


@pytest.fixture
def crash_states(tmp_path: Path) -> Callable[..., Iterator[tuple[bool, Path]]]:
    """``crash_states(root, work)``: folders that hold what ``work``, cut off anywhere, may leave of ``root``."""

    def each(root: Path, work: Callable[[], object], subsets: int = 64) -> Iterator[tuple[bool, Path]]:
        recorder = Recorder(root)
        with pytest.MonkeyPatch.context() as patch:
            recorder.install(patch)
            work()
        scratch = tmp_path / "scratch"
        for complete, files in recorder.states(subsets):
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            for name, content in sorted(files.items()):
                if content is None:
                    (scratch / name).mkdir()
                else:
                    (scratch / name).write_bytes(content)
            yield complete, scratch

    return each
