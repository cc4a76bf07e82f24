# SPDX-License-Identifier: Apache-2.0
"""The ledger charges what was started: through kill -9, torn lines, damage, forks and full disks."""

import copy
import errno
import json
import os
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from wavedp.privacy import LedgerError, PrivacyLedger, PrivacySpec, PrivateOptimizer

MakeSpec = Callable[..., PrivacySpec]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "privacy.jsonl"


@pytest.fixture
def filled(path: Path, spec: MakeSpec) -> Path:
    with PrivacyLedger(path, spec(steps=100)) as ledger:
        for steps in (10, 5, 20):
            ledger.reserve(steps)
    return path


def test_charges_survive_reopening(filled: Path, spec: MakeSpec) -> None:
    with PrivacyLedger(filled, spec(steps=100)) as ledger:
        assert (ledger.charged, ledger.remaining) == (35, 65)
        ledger.reserve(65)
        with pytest.raises(RuntimeError, match="0 of 100 left"):
            ledger.reserve(1)
    with PrivacyLedger(filled, spec(steps=100)) as ledger:
        assert ledger.remaining == 0


def test_over_reservation_charges_nothing(filled: Path, spec: MakeSpec) -> None:
    with PrivacyLedger(filled, spec(steps=100)) as ledger:
        size = filled.stat().st_size
        with pytest.raises(RuntimeError, match="exhausted"):
            ledger.reserve(66)
        assert (ledger.charged, filled.stat().st_size) == (35, size)
        with pytest.raises(ValueError, match="steps"):
            ledger.reserve(0)


def test_file_is_private_and_chained(filled: Path) -> None:
    assert filled.stat().st_mode & 0o777 == 0o600
    lines = [json.loads(line) for line in filled.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["create", "reserve", "reserve", "reserve"]
    assert lines[0]["previous"] == "0" * 64
    assert all(after["previous"] == before["digest"] for before, after in pairwise(lines))


def test_only_one_writer(filled: Path, spec: MakeSpec) -> None:
    with PrivacyLedger(filled, spec(steps=100)), pytest.raises(LedgerError, match="in use"):
        PrivacyLedger(filled, spec(steps=100))
    PrivacyLedger(filled, spec(steps=100)).close()


@pytest.mark.parametrize(
    "change",
    [
        {"noise_multiplier": 0.9},
        {"sample_rate": 0.2},
        {"steps": 101},
        {"max_grad_norm": 2.0},
        {"delta": 2e-3},
        {"dataset_size_bound": 200},
        {"unit": "person"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_specification_is_refused(filled: Path, spec: MakeSpec, change: dict[str, object]) -> None:
    with pytest.raises(LedgerError, match=next(iter(change))):
        PrivacyLedger(filled, spec(**{"steps": 100, **change}))


def test_the_denominator_may_change(filled: Path, spec: MakeSpec) -> None:
    with PrivacyLedger(filled, spec(steps=100, expected_batch_size=16.0)) as ledger:
        assert ledger.charged == 35


def test_a_torn_last_line_is_cut_off_at_every_byte(filled: Path, spec: MakeSpec) -> None:
    content = filled.read_bytes()
    start = content[:-1].rfind(b"\n") + 1
    for size in range(start, len(content) - 1):
        filled.write_bytes(content[:size])
        with PrivacyLedger(filled, spec(steps=100)) as ledger:
            assert ledger.charged == 15
            if size % 40 == 0:
                ledger.reserve(7)
                assert ledger.charged == 22
        assert filled.read_bytes().startswith(content[:start])


@pytest.mark.parametrize("lines", [1, 4])
def test_a_whole_last_line_counts_without_its_newline(filled: Path, spec: MakeSpec, lines: int) -> None:
    content = b"".join(filled.read_bytes().splitlines(keepends=True)[:lines])
    charged = 35 if lines == 4 else 0
    filled.write_bytes(content[:-1])
    with PrivacyLedger(filled, spec(steps=100)) as ledger:
        assert ledger.charged == charged
        assert filled.read_bytes() == content
        ledger.reserve(2)
    with PrivacyLedger(filled, spec(steps=100)) as ledger:
        assert ledger.charged == charged + 2


def test_unwritten_blocks_at_the_end_are_cut_off(filled: Path, spec: MakeSpec) -> None:
    content = filled.read_bytes()
    filled.write_bytes(content + bytes(300))
    PrivacyLedger(filled, spec(steps=100)).close()
    assert filled.read_bytes() == content


FOREIGN = {
    "empty": b"",
    "torn header": b'{"digest": "12',
    "binary": bytes(range(256)) * 9,
    "text without a newline": b"notes without a newline at the end",
    "json": b'{"a": 1,\n"b": 2}',
    "json line": b'{"a": 1}\n{"b": 2',
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_file_that_is_no_ledger_is_refused_and_left_alone(path: Path, spec: MakeSpec, content: bytes) -> None:
    """An emptied ledger must not turn into a fresh budget, nor a mistyped path cost a file."""
    path.write_bytes(content)
    with pytest.raises(LedgerError, match=r"privacy\.jsonl"):
        PrivacyLedger(path, spec())
    assert path.read_bytes() == content


def test_a_foreign_ledger_with_a_torn_line_is_left_alone(filled: Path, spec: MakeSpec) -> None:
    content = filled.read_bytes()[:-20]
    filled.write_bytes(content)
    with pytest.raises(LedgerError, match="another specification"):
        PrivacyLedger(filled, spec(steps=101))
    assert filled.read_bytes() == content


def test_a_folder_is_refused(tmp_path: Path, spec: MakeSpec) -> None:
    with pytest.raises(LedgerError, match="is a folder; give the path of a file"):
        PrivacyLedger(tmp_path, spec())


def test_a_pipe_is_refused(path: Path, spec: MakeSpec) -> None:
    os.mkfifo(path)
    with pytest.raises(LedgerError, match="not a regular file"):
        PrivacyLedger(path, spec())


@pytest.mark.parametrize("failing", ["write", "fsync", "link"])
def test_a_creation_that_fails_leaves_nothing(
    path: Path, spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        with pytest.raises(LedgerError):
            PrivacyLedger(path, spec())
    assert list(path.parent.iterdir()) == []
    PrivacyLedger(path, spec()).close()
    assert list(path.parent.iterdir()) == [path]


def test_a_ledger_made_meanwhile_is_opened(path: Path, spec: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.link

    def late(*arguments: str) -> None:
        monkeypatch.setattr(os, "link", real)
        with PrivacyLedger(path, spec()) as other:
            other.reserve(3)
        real(*arguments)

    monkeypatch.setattr(os, "link", late)
    with PrivacyLedger(path, spec()) as ledger:
        assert ledger.charged == 3
        ledger.reserve(1)
    with PrivacyLedger(path, spec()) as ledger:
        assert ledger.charged == 4


def test_any_changed_byte_is_found(filled: Path, spec: MakeSpec) -> None:
    content = filled.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1
        filled.write_bytes(damaged)
        with pytest.raises(LedgerError):
            PrivacyLedger(filled, spec(steps=100))
        assert filled.read_bytes() == bytes(damaged)


@pytest.mark.parametrize(
    "edit",
    [
        lambda lines: [lines[0], *lines[2:]],
        lambda lines: lines[1:],
        lambda lines: [lines[0], lines[2], lines[1], lines[3]],
        lambda lines: [*lines, lines[-1]],
        lambda lines: [lines[0], b"\n", *lines[1:]],
        lambda lines: [*lines[:2], lines[2].replace(b'"steps": 5', b'"steps": 1'), lines[3]],
        lambda lines: [*lines[:2], lines[2][:40] + b"\n", lines[3]],
        lambda lines: [*lines, b"[]\n"],
    ],
    ids=["removed", "headless", "swapped", "repeated", "blank", "lowered", "torn inside", "alien"],
)
def test_damage_is_refused(filled: Path, spec: MakeSpec, edit: Callable[[list[bytes]], list[bytes]]) -> None:
    filled.write_bytes(b"".join(edit(filled.read_bytes().splitlines(keepends=True))))
    with pytest.raises(LedgerError, match="line"):
        PrivacyLedger(filled, spec(steps=100))


def test_a_line_of_another_history_is_refused(filled: Path, spec: MakeSpec, tmp_path: Path) -> None:
    """Counts that fit do not make a line belong: its predecessor's digest must."""
    with PrivacyLedger(tmp_path / "other", spec(steps=100, expected_batch_size=9.0)) as ledger:
        for steps in (10, 5, 20):
            ledger.reserve(steps)
    lines, others = (p.read_bytes().splitlines(keepends=True) for p in (filled, tmp_path / "other"))
    filled.write_bytes(b"".join([*lines[:3], others[3]]))
    with pytest.raises(LedgerError, match="does not follow"):
        PrivacyLedger(filled, spec(steps=100))


def test_copies_are_refused(filled: Path, spec: MakeSpec) -> None:
    with PrivacyLedger(filled, spec(steps=100)) as ledger, pytest.raises(TypeError, match="copied"):
        copy.deepcopy(ledger)


def test_missing_folder(tmp_path: Path, spec: MakeSpec) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        PrivacyLedger(tmp_path / "nowhere" / "ledger", spec())


@pytest.mark.parametrize("failing", ["write", "fsync", "short write"])
def test_a_full_disk_refuses_and_closes(
    filled: Path, spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    real = os.write
    with PrivacyLedger(filled, spec(steps=100)) as ledger:
        with monkeypatch.context() as patch:
            if failing == "short write":
                patch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:20]))
            else:
                patch.setattr(os, failing, fail)
            with pytest.raises(LedgerError):
                ledger.reserve(1)
        assert ledger.charged == 35
        with pytest.raises(LedgerError, match="closed"):
            ledger.reserve(1)
    with PrivacyLedger(filled, spec(steps=100)) as ledger:
        assert ledger.charged in (35, 36)  # a write whose fsync failed may have arrived; then it is charged


def test_a_replaced_or_removed_file_is_noticed(filled: Path, spec: MakeSpec) -> None:
    with PrivacyLedger(filled, spec(steps=100)) as ledger:
        copy = filled.read_bytes()
        filled.unlink()
        with pytest.raises(LedgerError, match="removed"):
            ledger.reserve(1)
        filled.write_bytes(copy)
        with pytest.raises(LedgerError, match="replaced"):
            ledger.reserve(1)


def test_a_forked_child_cannot_write(filled: Path, spec: MakeSpec) -> None:
    with PrivacyLedger(filled, spec(steps=100)) as ledger:
        child = os.fork()
        if child == 0:
            try:
                ledger.reserve(1)
            except LedgerError:
                os._exit(17)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
        ledger.reserve(1)
        assert ledger.charged == 36


def test_heads(filled: Path, spec: MakeSpec) -> None:
    with PrivacyLedger(filled, spec(steps=100)) as ledger:
        before = ledger.head
        ledger.reserve(1)
        assert ledger.head != before
        assert ledger.contains(before)
        assert ledger.contains(ledger.head)
        assert not ledger.contains("0" * 63 + "1")


def run_child(work: Callable[[int], None], kill_after: float | None = None, started: bool = True) -> int:
    """Run ``work`` in a child, kill -9 it some seconds after its first release (or, if not ``started``, after its
    birth), and return how many bytes it released."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            work(writer)
        finally:
            os._exit(0)
    os.close(writer)
    released = 0
    if kill_after is not None:
        released += len(os.read(reader, 1)) if started else 0
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    while part := os.read(reader, 1 << 16):
        released += len(part)
    os.close(reader)
    os.waitpid(child, 0)
    return released


def test_kill_9_never_leaves_a_step_uncharged(path: Path, spec: MakeSpec) -> None:
    made = spec(steps=10**8)
    total = 0

    def run(writer: int) -> None:
        with PrivacyLedger(path, made) as ledger:
            while True:
                ledger.reserve(3)
                for _ in range(3):
                    os.write(writer, b".")

    for point in range(12):
        total += run_child(run, kill_after=0.003 * point, started=point % 3 > 0)
        with PrivacyLedger(path, made) as ledger:
            assert ledger.charged >= total
            assert ledger.charged - total <= 3 * (point + 1)
    assert total >= 8


def test_kill_9_during_private_training(path: Path, spec: MakeSpec) -> None:
    made = spec(steps=400)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters())  # the first one imports for seconds, so not in the child
    total = 0

    def run(writer: int) -> None:
        torch.set_num_threads(1)
        with PrivacyLedger(path, made) as ledger:
            private = PrivateOptimizer(model, optimizer, made, ledger=ledger)
            while private.steps_left:
                private.backward(model(torch.randn(4, 3)).sum(1))
                private.step()
                os.write(writer, b".")

    for point in range(10):
        total += run_child(run, kill_after=0.003 * point)
    with PrivacyLedger(path, made) as ledger:
        assert total <= ledger.charged <= total + 10 * 10
    total += run_child(run)
    assert total <= 400
    with PrivacyLedger(path, made) as ledger:
        assert ledger.charged == 400
