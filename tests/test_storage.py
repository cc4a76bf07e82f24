# SPDX-License-Identifier: Apache-2.0
"""Files are replaced whole or not at all, and damage is noticed."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from wavedp import storage
from wavedp.errors import BadFileError
from wavedp.weights_file import read_tensors

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2], dtype=torch.int64)}


def test_a_folder_comes_back_as_it_was(tmp_path: Path):
    storage.save_folder(tmp_path / "m", {"kind": "x", "n": 3}, TENSORS)
    config, tensors = storage.load_folder(tmp_path / "m")
    assert config == {"kind": "x", "n": 3}
    assert tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert torch.equal(tensors[name], value)
        assert tensors[name].dtype == value.dtype


def test_tied_and_strided_tensors_are_stored_as_values(tmp_path: Path):
    base = torch.arange(12.0).reshape(3, 4)
    storage.save_folder(tmp_path, {}, {"view": base.T, "expanded": base[:1].expand(2, 4)})
    _, tensors = storage.load_folder(tmp_path)
    assert torch.equal(tensors["view"], base.T)
    assert torch.equal(tensors["expanded"], base[:1].expand(2, 4))


def test_overwriting_leaves_one_weights_file(tmp_path: Path):
    for n in range(3):
        storage.save_folder(tmp_path, {"n": n}, {"a": torch.full((2,), float(n))})
    config, tensors = storage.load_folder(tmp_path)
    assert (config["n"], tensors["a"].tolist()) == (2, [2.0, 2.0])
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_files_of_others_are_left_alone(tmp_path: Path):
    (tmp_path / "adapter.safetensors").write_bytes(b"mine")
    for n in range(2):
        storage.save_folder(tmp_path, {"n": n}, {"a": torch.full((2,), float(n))})
    assert (tmp_path / "adapter.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize("failing_write", [1, 2])
def test_a_full_disk_keeps_the_previous_folder(tmp_path: Path, monkeypatch, failing_write: int):
    storage.save_folder(tmp_path, {"n": 1}, TENSORS)
    calls = 0
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal calls
        if not os.path.isdir(f"/proc/self/fd/{descriptor}"):
            calls += 1
            if calls == failing_write:
                raise OSError(errno.ENOSPC, "No space left on device")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        storage.save_folder(tmp_path, {"n": 2}, {"a": torch.zeros(3)})
    monkeypatch.undo()
    config, tensors = storage.load_folder(tmp_path)
    assert config == {"n": 1}
    assert torch.equal(tensors["a"], TENSORS["a"])
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("position", [0, 9, -1])
def test_one_flipped_bit_is_noticed(tmp_path: Path, position: int):
    storage.save_folder(tmp_path, {}, TENSORS)
    weights = tmp_path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[position] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors does not have the sha256"):
        storage.load_folder(tmp_path)


def test_what_is_missing_or_foreign_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        storage.load_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        storage.load_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"weights": "../../etc/passwd", "sha256": "0"}))
    with pytest.raises(ValueError, match="is no plain file name"):
        storage.load_folder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="not written by wavedp"):
        storage.load_folder(tmp_path)


def test_weights_of_another_shape_are_refused_by_name(tmp_path: Path):
    with pytest.raises(ValueError, match="does not fit its own configuration"):
        storage.load_weights(torch.nn.Linear(2, 2), {"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, tmp_path)


@pytest.mark.parametrize("magic", [0x0280, 0x0380, 0x0480, 0x0580, 0x8B1F])
def test_a_header_whose_length_reads_as_another_format_is_a_header(tmp_path: Path, magic: int) -> None:
    """Lengths such as 640 are the first two bytes of a pickle, and 35,615 those of a gzip archive."""
    entry = b'"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    header = b"{" + entry + b"}" + b" " * (magic - len(entry) - 2)
    content = magic.to_bytes(8, "little") + header + b"\0" * 8
    tensors = read_tensors(content, "weights")
    assert list(tensors) == ["w"]
    assert torch.equal(tensors["w"], torch.zeros(2))


def test_a_pickle_is_refused_by_name() -> None:
    with pytest.raises(BadFileError, match="a pickle"):
        read_tensors(b"\x80\x02}q\x00.", "weights")


def test_one_process_at_a_time_is_alone_in_a_folder(tmp_path: Path):
    """Another one waits until the first has left or was killed."""
    code = (
        "import sys, time, pathlib; from wavedp.storage import alone\n"
        "with alone(pathlib.Path(sys.argv[1])): print('in', flush=True); time.sleep(60)"
    )
    folder = tmp_path / "new" / "folder"
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"in\n"
    waited: list[int] = []
    with storage.alone(folder, lambda: (waited.append(1), process.kill())):
        assert waited == [1]
        process.wait()
    with storage.alone(folder, lambda: waited.append(2)):
        assert waited == [1]
