# SPDX-License-Identifier: Apache-2.0
"""What is released once is charged once, through restarts and forged lines; ledgers from before it are still read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wavedp.privacy import LedgerError, PrivacyLedger, PrivacySpec
from wavedp.privacy.ledger_file import digest_of

MakeSpec = Callable[..., PrivacySpec]
LABELS = "label_histogram"

WRITTEN_BEFORE = (
    '{"digest": "f0c9eba73b377aef3b94d502fa644b6404c6f4b8100b39eb428bae54f01b7862", "kind": "create", "previous": '
    '"0000000000000000000000000000000000000000000000000000000000000000", "spec": {"clipping_rule": {"name": "flat"}, '
    '"dataset_size_bound": 100, "delta": 0.001, "expected_batch_size": 8.0, "max_grad_norm": 1.0, '
    '"neighboring_relation": "add_or_remove_one", "noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 20, '
    '"unit": "image"}, "version": 1}\n'
    '{"charged": 3, "digest": "9c954dea4e6c9e31ee6c1e4a5bf3424d1c6e7b54fe21585095de61774da39ade", "kind": "reserve", '
    '"previous": "f0c9eba73b377aef3b94d502fa644b6404c6f4b8100b39eb428bae54f01b7862", "steps": 3}\n'
)
"""By the version before label histograms, for the specification of conftest.py."""


@pytest.fixture
def made(spec: MakeSpec) -> PrivacySpec:
    return spec(label_noise_multiplier=5.0)


@pytest.fixture
def filled(tmp_path: Path, made: PrivacySpec) -> Path:
    path = tmp_path / "ledger.jsonl"
    with PrivacyLedger(path, made) as ledger:
        ledger.reserve(2)
        ledger.release(LABELS, "runs/a/label_histogram.json")
        ledger.reserve(3)
    return path


def test_a_release_survives_reopening_beside_steps(filled: Path, made: PrivacySpec) -> None:
    with PrivacyLedger(filled, made) as ledger:
        assert ledger.released == {LABELS: "runs/a/label_histogram.json"}
        assert (ledger.charged, ledger.remaining) == (5, 15)
        ledger.reserve(15)
    kinds = [json.loads(line)["kind"] for line in filled.read_text().splitlines()]
    assert kinds == ["create", "reserve", "release", "reserve", "reserve"]


def test_a_second_release_is_refused_and_says_where_the_first_is(filled: Path, made: PrivacySpec) -> None:
    with PrivacyLedger(filled, made) as ledger:
        content = filled.read_bytes()
        with pytest.raises(RuntimeError, match=r"not drawn again: read its result in runs/a/label_histogram\.json"):
            ledger.release(LABELS)
        assert filled.read_bytes() == content


@pytest.mark.parametrize("name", ["", "steps", "LABEL_HISTOGRAM"])
def test_only_what_the_specification_has_is_released(filled: Path, made: PrivacySpec, name: str) -> None:
    with PrivacyLedger(filled, made) as ledger, pytest.raises(RuntimeError, match="has no release"):
        ledger.release(name)


def test_a_specification_without_a_release_has_none(tmp_path: Path, spec: MakeSpec, filled: Path) -> None:
    with PrivacyLedger(tmp_path / "plain", spec()) as ledger, pytest.raises(RuntimeError, match="has no release"):
        ledger.release(LABELS)
    with pytest.raises(LedgerError, match="label_noise_multiplier"):
        PrivacyLedger(filled, spec())
    with pytest.raises(LedgerError, match="label_noise_multiplier"):
        PrivacyLedger(filled, spec(label_noise_multiplier=6.0))


@pytest.mark.parametrize(
    "change", [{"truncated_batch_size": 30}, {"noise_mode": "strict", "trainable_parameters": 8}], ids=str
)
def test_a_ledger_of_another_mechanism_is_refused(tmp_path: Path, spec: MakeSpec, change: dict[str, Any]) -> None:
    for first, second in ((spec(), spec(**change)), (spec(**change), spec())):
        path = tmp_path / str(first.truncated_batch_size) / first.noise_mode
        path.parent.mkdir(exist_ok=True)
        PrivacyLedger(path, first).close()
        with pytest.raises(LedgerError, match=next(iter(change))):
            PrivacyLedger(path, second)


def test_a_ledger_from_before_is_read_and_continued(tmp_path: Path, spec: MakeSpec) -> None:
    path = tmp_path / "old.jsonl"
    path.write_text(WRITTEN_BEFORE)
    with PrivacyLedger(path, spec()) as ledger:
        assert (ledger.charged, ledger.released) == (3, {})
        ledger.reserve(17)
    assert path.read_text().startswith(WRITTEN_BEFORE)
    with pytest.raises(LedgerError, match="label_noise_multiplier"):
        PrivacyLedger(path, spec(label_noise_multiplier=5.0))


def test_any_changed_byte_is_found(filled: Path, made: PrivacySpec) -> None:
    content = filled.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1
        filled.write_bytes(damaged)
        with pytest.raises(LedgerError):
            PrivacyLedger(filled, made)


def test_a_torn_release_paid_for_nothing(filled: Path, made: PrivacySpec) -> None:
    lines = filled.read_bytes().splitlines(keepends=True)
    for size in range(1, len(lines[2]) - 1):
        filled.write_bytes(b"".join(lines[:2]) + lines[2][:size])
        with PrivacyLedger(filled, made) as ledger:
            assert (ledger.charged, ledger.released) == (2, {})
    filled.write_bytes(b"".join(lines[:2]) + lines[2][:-1])  # whole but for its newline: charged
    with PrivacyLedger(filled, made) as ledger:
        assert LABELS in ledger.released


FORGED: dict[str, dict[str, Any]] = {
    "repeated": {"kind": "release", "name": LABELS, "saved_as": ""},
    "unknown name": {"kind": "release", "name": "means", "saved_as": ""},
    "no name": {"kind": "release", "saved_as": ""},
    "name of another type": {"kind": "release", "name": [LABELS], "saved_as": ""},
    "no place": {"kind": "release", "name": LABELS},
    "place of another type": {"kind": "release", "name": LABELS, "saved_as": None},
    "with steps": {"kind": "release", "name": LABELS, "saved_as": "", "steps": 1},
    "unknown kind": {"kind": "refund", "name": LABELS, "saved_as": ""},
    "a second header": {"kind": "create", "version": 1},
}


@pytest.mark.parametrize("fields", FORGED.values(), ids=FORGED.keys())
def test_a_line_that_is_chained_but_makes_no_sense_is_refused(
    filled: Path, made: PrivacySpec, fields: dict[str, Any]
) -> None:
    lines = filled.read_text().splitlines(keepends=True)
    lines = lines if fields.get("name") == LABELS and len(fields) == 3 else [*lines[:2]]
    entry = {"previous": json.loads(lines[-1])["digest"], **fields}
    entry["digest"] = digest_of(entry)
    filled.write_text("".join([*lines, json.dumps(entry, sort_keys=True) + "\n"]))
    with pytest.raises(LedgerError, match=f"line {len(lines) + 1} "):
        PrivacyLedger(filled, made)
