# SPDX-License-Identifier: Apache-2.0
import gzip
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wavedp.data import IdxError, open_dataset, read_idx
from wavedp.data.idx import read_idx_pair

HEADER_BYTES = 16


def idx_bytes(values):
    sizes = struct.pack(f">{values.dim()}I", *values.shape)
    return b"\0\0\x08" + bytes([values.dim()]) + sizes + bytes(values.flatten().tolist())


def some_images(n=5, rows=28, columns=28):
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (n, rows, columns), dtype=torch.uint8, generator=generator)


def write_family(folder, *, num_train=5, num_test=4, ending="", dash="-", pack=lambda content: content):
    for stem, n in (("train", num_train), ("t10k", num_test)):
        images = folder / f"{stem}-images{dash}idx3-ubyte{ending}"
        labels = folder / f"{stem}-labels{dash}idx1-ubyte{ending}"
        images.write_bytes(pack(idx_bytes(some_images(n))))
        labels.write_bytes(pack(idx_bytes(torch.arange(n, dtype=torch.uint8))))


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("shape", [(3, 4, 5), (0, 28, 28), (7,), (2, 3, 4, 5)], ids=str)
def test_a_written_file_is_read_back(tmp_path, shape, pack):
    values = torch.arange(torch.Size(shape).numel()).to(torch.uint8).view(shape)
    file = tmp_path / "values-idx-ubyte"
    file.write_bytes(pack(idx_bytes(values)))
    assert torch.equal(read_idx(file, len(shape)), values)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("kept", range(HEADER_BYTES + 12))
def test_a_file_cut_anywhere_is_refused_by_name(tmp_path, kept, pack):
    file = tmp_path / "cut-idx3-ubyte"
    file.write_bytes(pack(idx_bytes(some_images(1, 3, 4))[:kept]))
    with pytest.raises(IdxError, match="cut-idx3-ubyte") as error:
        read_idx(file, 3)
    if kept >= HEADER_BYTES:
        assert f"{kept - HEADER_BYTES} bytes" in str(error.value)
        assert "needs 12" in str(error.value)


@pytest.mark.parametrize("kept", [1, 2, 9, 10, 15, 20, -8, -4, -1])
def test_a_cut_gzip_stream_is_refused_by_name(tmp_path, kept):
    file = tmp_path / "cut.gz"
    file.write_bytes(gzip.compress(idx_bytes(some_images(1)))[:kept])
    with pytest.raises(IdxError, match=r"cut\.gz"):
        read_idx(file, 3)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_extra_bytes_are_refused(tmp_path, pack):
    file = tmp_path / "long"
    file.write_bytes(pack(idx_bytes(some_images(1, 3, 4)) + b"\0"))
    with pytest.raises(IdxError, match=r"needs 12|the 12 that"):
        read_idx(file, 3)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"\x89PNG" + bytes(12), "starts with 89 50"),
        (b"\0\0\x0d\x03" + struct.pack(">3I", 1, 1, 1) + bytes(4), "type 0x0d"),
        (b"\0\0\x08\x01" + struct.pack(">I", 1) + b"\0", "1 dimensions, expected 3"),
        (b"\0\0\x08\x03" + struct.pack(">3I", *[2**32 - 1] * 3), "more than"),
        (b"\0\0\x08\x03" + struct.pack(">3I", 2**31, 2, 2) + bytes(50), "needs 8589934592"),
    ],
    ids=["not-idx", "doubles", "labels", "overflow", "huge"],
)
def test_a_wrong_header_is_refused(tmp_path, header, message):
    for file, pack in ((tmp_path / "plain", bytes), (tmp_path / "zipped", gzip.compress)):
        file.write_bytes(pack(header))
        with pytest.raises(IdxError, match=message):
            read_idx(file, 3)


def test_a_gzip_bomb_is_unpacked_no_further_than_its_header_says(tmp_path, monkeypatch):
    file = tmp_path / "bomb.gz"
    file.write_bytes(gzip.compress(idx_bytes(some_images(1, 3, 4)) + bytes(2**26)))
    unpacked = []
    original = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, size=-1: unpacked.append(size) or original(self, size))
    with pytest.raises(IdxError, match="more bytes than the 12"):
        read_idx(file, 3)
    assert all(0 <= size < 100 for size in unpacked)


def read_or_refuse(file):
    try:
        return read_idx(file, 3), ""
    except IdxError as error:
        return None, str(error)


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=80) | st.binary(max_size=60).map(lambda tail: b"\0\0\x08\x03" + tail))
def test_any_bytes_give_a_tensor_or_an_idx_error(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "fuzz-idx"
    for body in (content, gzip.compress(content), b"\x1f\x8b" + content):
        file.write_bytes(body)
        values, message = read_or_refuse(file)
        assert "fuzz-idx" in message if values is None else content == idx_bytes(values)


@settings(max_examples=200, deadline=None)
@given(place=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_a_damaged_gzip_file_gives_the_original_or_an_idx_error(tmp_path_factory, place, byte):
    images = some_images(2, 6, 6)
    damaged = bytearray(gzip.compress(idx_bytes(images), mtime=0))
    damaged[place % len(damaged)] = byte
    file = tmp_path_factory.getbasetemp() / "damaged-idx.gz"
    file.write_bytes(damaged)
    values, message = read_or_refuse(file)
    assert "damaged-idx.gz" in message if values is None else torch.equal(values, images)


def test_more_images_than_labels_is_refused(tmp_path):
    images, labels = tmp_path / "images", tmp_path / "labels"
    images.write_bytes(idx_bytes(some_images(5)))
    labels.write_bytes(idx_bytes(torch.zeros(4, dtype=torch.uint8)))
    with pytest.raises(IdxError, match=r"5 images, but .*labels has 4 labels"):
        read_idx_pair(images, labels)


def test_images_without_pixels_are_refused(tmp_path):
    file = tmp_path / "images"
    file.write_bytes(idx_bytes(torch.zeros(3, 0, 28, dtype=torch.uint8)))
    with pytest.raises(IdxError, match=r"no pixels.*\[3, 0, 28\]"):
        open_dataset(file, image_size=28)


@pytest.mark.parametrize(("ending", "pack"), [("", bytes), (".gz", gzip.compress)])
@pytest.mark.parametrize("dash", ["-", "."])
def test_a_folder_of_the_mnist_family_has_its_own_split(tmp_path, ending, pack, dash):
    write_family(tmp_path, ending=ending, pack=pack, dash=dash)
    train, test, both = (open_dataset(tmp_path, image_size=28, split=s) for s in ("train", "test", "all"))
    assert torch.equal(train.images[:, 0], some_images(5))
    assert torch.equal(test.images[:, 0], some_images(4))
    assert torch.equal(both.images, torch.cat([train.images, test.images]))
    assert train.classes == ("0", "1", "2", "3", "4")
    assert open_dataset(tmp_path, image_size=16, channels=3)[0][0].shape == (3, 16, 16)


def test_names_come_from_the_caller_or_a_file(tmp_path):
    write_family(tmp_path)
    (tmp_path / "classes.txt").write_text("Hemd\nHose\nKleid\nMantel\nStiefel\n", encoding="utf-8")
    assert open_dataset(tmp_path, image_size=28).classes[4] == "Stiefel"
    assert open_dataset(tmp_path, image_size=28, classes=list("abcde")).classes == tuple("abcde")
    with pytest.raises(ValueError, match=r"span 0\.\.4, but there are 2 classes"):
        open_dataset(tmp_path, image_size=28, classes=["a", "b"])


def test_a_training_pair_alone_is_divided(tmp_path):
    write_family(tmp_path, num_train=200)
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (tmp_path / name).unlink()
    parts = [open_dataset(tmp_path, image_size=8, split=s).labels.tolist() for s in ("train", "test")]
    assert sorted(parts[0] + parts[1]) == list(range(200))
    assert 20 <= len(parts[1]) <= 60


@pytest.mark.parametrize("removed", [0, 57, 99])
def test_removing_a_record_moves_no_other_between_train_and_test(tmp_path, removed):
    images, labels = some_images(100, 8, 8), torch.arange(100, dtype=torch.uint8)

    def split_of(kept):
        folder = tmp_path / f"{len(kept)}"
        folder.mkdir()
        (folder / "train-images-idx3-ubyte").write_bytes(idx_bytes(images[kept]))
        (folder / "train-labels-idx1-ubyte").write_bytes(idx_bytes(labels[kept]))
        parts = {s: open_dataset(folder, image_size=8, split=s, classes=None) for s in ("train", "test")}
        single = open_dataset(folder / "train-images-idx3-ubyte", image_size=4, split="test")
        assert torch.equal(single.labels, parts["test"].labels)
        return {label: s for s, part in parts.items() for label in part.labels.tolist()}

    everything = split_of(list(range(100)))
    assert sorted(everything) == list(range(100))
    assert set(everything.values()) == {"train", "test"}
    del everything[removed]
    assert split_of([i for i in range(100) if i != removed]) == everything


def test_missing_labels_are_named(tmp_path):
    write_family(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="train-labels-idx1-ubyte"):
        open_dataset(tmp_path, image_size=28)


def test_a_single_file_finds_its_labels_or_is_one_class(tmp_path):
    write_family(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte"
    assert open_dataset(file, image_size=28, split="all").labels.tolist() == [0, 1, 2, 3, 4]
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    alone = open_dataset(file, image_size=28, split="all")
    assert (alone.labels.tolist(), alone.classes) == ([0] * 5, ("0",))


def test_fashion_mnist_is_read(wavedp_data):
    data = open_dataset(wavedp_data / "fashion-mnist", image_size=28, split="test")
    assert data.labels.bincount().tolist() == [1000] * 10
    assert data.labels[:5].tolist() == [9, 2, 1, 1, 6]
    assert data.images.shape == (10000, 1, 28, 28)
    assert abs(float(data.images.float().mean()) - 73.147) < 0.01
