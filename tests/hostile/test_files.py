# SPDX-License-Identifier: Apache-2.0
"""Files, archives, names and disks that mean harm: nothing runs, nothing leaves its folder, nothing is lost."""

from __future__ import annotations

import ast
import errno
import hashlib
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import workbench

from wavedp import cli, data, models, storage, superres
from wavedp.data.idx import read_idx
from wavedp.data.picture_file import decode_picture
from wavedp.errors import BadFileError, WavedpError
from wavedp.pipeline import CoarseToFinePipeline
from wavedp.privacy import load_label_histogram
from wavedp.training.results import save_images
from wavedp.weights_file import read_tensors

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(tmp_path: Path) -> workbench.Workbench:
    return workbench.Workbench(tmp_path)


class Payload:
    """Makes ``mark`` when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def pickles(mark: Path) -> list[bytes]:
    """The payload as a pickle of every protocol, and as torch.save writes it, zipped and not."""
    made = [pickle.dumps(Payload(mark), protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for zipped in (True, False):
        file = io.BytesIO()
        torch.save({"weight": Payload(mark)}, file, _use_new_zipfile_serialization=zipped)
        made.append(file.getvalue())
    return made


def test_the_payload_works(tmp_path: Path) -> None:
    for content in pickles(tmp_path / "mark")[:-2]:
        pickle.loads(content)
        (tmp_path / "mark").unlink()


def hashed(folder: Path, content: bytes) -> Path:
    """``folder`` with ``content`` as its weights, and their hash in its config."""
    weights = folder / "model.safetensors"
    weights.write_bytes(content)
    return workbench.replaced(folder, weights=weights.name, sha256=hashlib.sha256(content).hexdigest())


READERS: dict[str, Callable[[workbench.Workbench, bytes], object]] = {
    "model": lambda b, content: models.load_model(hashed(b["saved_model"], content)),
    "super-resolver": lambda b, content: superres.from_pretrained(hashed(b["saved_espcn"], content)),
    "pipeline": lambda b, content: (
        hashed(b["saved_pipeline"] / "tokenizer", content) and CoarseToFinePipeline.from_pretrained(b["saved_pipeline"])
    ),
    "config": lambda b, content: storage.read_json(workbench.writes(b["tmp"] / "config.json", content)),
    "histogram": lambda b, content: load_label_histogram(workbench.writes(b["tmp"] / "h.json", content)),
    "weights": lambda b, content: read_tensors(content, "weights"),
    "picture": lambda b, content: decode_picture(content, "a.png", 8, 1),
    "idx": lambda b, content: read_idx(workbench.writes(b["tmp"] / "idx", content), 3),
    "archive": lambda b, content: data.open_dataset(workbench.writes(b["tmp"] / "a.zip", content), image_size=8),
    "folder": lambda b, content: data.open_dataset(
        workbench.writes(b["tmp"] / "set" / "a" / "1.png", content).parents[1], image_size=8, split="all"
    ),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_pickle_is_never_unpickled(reader: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for number, content in enumerate(pickles(mark)):
        bench = workbench.Workbench(tmp_path / str(number))
        bench["tmp"].mkdir()
        with pytest.raises(WavedpError):
            READERS[reader](bench, content)
        assert not mark.exists()


PLANTED = {("selftest/bugs_ledger.py", "torch.load")}
"""A bug that the selftest switches on to see it caught; nothing outside of wavedp/selftest imports it."""


def test_no_module_can_unpickle() -> None:
    forbidden = {"pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
    calls = {"torch.load", "np.load", "numpy.load", "torch.hub.load", "eval", "exec"}
    found = set()
    for file in sorted((ROOT / "wavedp").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not forbidden & {alias.name.split(".")[0] for alias in node.names}, file
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in forbidden, file
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in calls:
                found.add((file.relative_to(ROOT / "wavedp").as_posix(), ast.unparse(node.func)))
    assert found == PLANTED


PIXELS = b"P5 4 4 255\n" + bytes(range(16))
NAMES = {
    "parent": "../../escaped.pgm",
    "absolute": "/tmp/escaped.pgm",
    "drive": "C:\\escaped.pgm",
    "network": "\\\\host\\share\\escaped.pgm",
    "terminal": "a/\x1b]0;title\x07.pgm",
    "line break": "a/b\nc.pgm",
    "right to left": "a/\u202egpm.exe.pgm",
    "long": "a/" + "b" * 4000 + ".pgm",
    "deep": "a/" * 500 + "b.pgm",
}


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("kind", NAMES)
def test_a_member_of_an_archive_stays_inside(kind: str, tmp_path: Path) -> None:
    """It is read in place: at worst its folder's name is a class, which is printable and a folder of its own."""
    inside = tmp_path / "in" / "side"
    inside.mkdir(parents=True)
    with zipfile.ZipFile(inside / "a.zip", "w") as archive:
        archive.writestr("a/good.pgm", PIXELS)
        archive.writestr(NAMES[kind], PIXELS)
    before = tree(tmp_path)
    dataset = data.open_dataset(inside / "a.zip", image_size=4, split="all", skip_bad=True)
    assert tree(tmp_path) == before
    assert len(dataset) + len(dataset.skipped) >= 1
    assert all(name.isprintable() for name in dataset.classes)
    pixels = data.to_unit_range(dataset.images)
    save_images(inside / "images", pixels, dataset.labels, dataset.classes)
    new = tree(tmp_path) - before
    assert len([name for name in new if name.endswith(".png")]) == len(dataset)
    assert all(name.startswith("in/side/images") for name in new)


CLASSES = (
    "../x",
    "/etc",
    "..",
    ".",
    "",
    "C:\\x",
    "a\0b",
    "\x1b[31m",
    "nul",
    "a" * 5000,
    "é" * 300,
    "a/b",
    "a_b",
    "A_B",
)


def test_class_names_become_folders_of_their_own(tmp_path: Path) -> None:
    out = tmp_path / "in" / "images"
    save_images(out, torch.zeros(len(CLASSES), 1, 4, 4), torch.arange(len(CLASSES)), CLASSES)
    folders = sorted(out.iterdir())
    assert len(folders) == len(CLASSES)
    assert all(len(list(folder.iterdir())) == 1 for folder in folders)
    assert sorted(tree(tmp_path)) == sorted({"in", *(f"in/{name}" for name in ["images", *_under(out)])})


def _under(out: Path) -> list[str]:
    return [f"images/{name}" for name in tree(out)]


def test_a_member_that_is_a_link_is_its_text(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("a/link.pgm")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(WavedpError, match="not a readable image"):
        data.open_dataset(tmp_path / "a.zip", image_size=4, split="all")


def test_a_member_that_unpacks_to_a_gigabyte_is_not_unpacked(tmp_path: Path) -> None:
    with (
        zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("a/bomb.pgm", "w", force_zip64=True) as member,
    ):
        for _ in range(80):
            member.write(bytes(2**20))
    assert (tmp_path / "a.zip").stat().st_size < 2**20
    with pytest.raises(WavedpError, match="larger than 67108864 bytes"):
        data.open_dataset(tmp_path / "a.zip", image_size=4, split="all")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"file\tname\n../../etc/passwd\ta\n", "not in the archive"),
        (b"file\tname\n/etc/passwd\ta\n", "not in the archive"),
        (b"file\tname\ng.pgm\ta\ng.pgm\tb\n", "listed before"),
        (b"file\tname\n\t\n", "expected a file, a class"),
        (b"file\tname\tsplit\ng.pgm\ta\tdev\n", "expected a file, a class"),
        (b"file\tname\n\xff\xfe\ta\n", "not tab-separated UTF-8"),
        (b"a\tb\n", "needs the columns"),
        (b"", "needs the columns"),
        (b"file\tname\n", "lists no files"),
        (b"file\tname\ng.pgm\t" + b"a" * 200_000 + b"\n", "not tab-separated UTF-8 text"),
    ],
)
def test_captions(tmp_path: Path, index: bytes, message: str) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("g.pgm", PIXELS)
    (tmp_path / "index.tsv").write_bytes(index)
    with pytest.raises(WavedpError, match=message):
        data.open_dataset(tmp_path, image_size=4, split="all")


def test_a_caption_with_terminal_codes_is_printable(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("g.pgm", PIXELS)
    (tmp_path / "index.tsv").write_bytes(b"file\tname\ng.pgm\t\x1b[2Jred\n")
    dataset = data.open_dataset(tmp_path, image_size=4, split="all")
    assert list(dataset.classes) == ["\\x1b[2Jred"]


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def fill() -> None:
        def fsync(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", fsync)

    return fill


def test_a_full_disk_keeps_the_model_that_was_there(
    bench: workbench.Workbench, full_disk: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = bench["saved_model"], bench["model"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = tree(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    full_disk()
    with pytest.raises(OSError, match="No space left"):
        models.save_model(model, folder)
    monkeypatch.undo()
    assert tree(folder) == names
    loaded = models.load_model(folder).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in before.items())


def test_a_full_disk_is_one_line(
    tmp_path: Path, full_disk: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    full_disk()
    assert cli.main(["tokenizer", "--data", "digits", "--out", str(tmp_path / "o"), "--no-progress"]) == 2
    err = capsys.readouterr().err
    assert err == f"wavedp tokenizer: error: {OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))}\n"


def test_a_folder_that_cannot_be_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workbench.writes(tmp_path / "set" / "a" / "1.pgm", PIXELS)

    def scandir(path: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "scandir", scandir)
    assert cli.main(["tokenizer", "--data", str(tmp_path / "set"), "--out", str(tmp_path / "o")]) == 2
    err = capsys.readouterr().err
    assert "Permission denied" in err
    assert str(tmp_path / "set") in err
    assert err.count("\n") == 1


def test_a_config_larger_than_its_bound_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MAX_JSON_BYTES", 100)
    with pytest.raises(BadFileError, match="larger than 100 bytes"):
        storage.read_json(workbench.writes(tmp_path / "a.json", "[" + "1," * 100 + "1]"))


def test_a_pipe_in_place_of_weights_does_not_hang(bench: workbench.Workbench) -> None:
    folder = bench["saved_model"]
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(WavedpError, match="is missing"):
        models.load_model(folder)
