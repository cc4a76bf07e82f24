# SPDX-License-Identifier: Apache-2.0
import io
import zipfile

import pytest
from PIL import Image

from wavedp.data import BadImageError, open_dataset


def png(shade):
    stream = io.BytesIO()
    Image.new("L", (9, 9), shade).save(stream, "PNG")
    return stream.getvalue()


def write_zip(file, members):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file


def open_all(source, **options):
    return open_dataset(source, **{"image_size": 8, "split": "all", **options})


@pytest.mark.parametrize("prefix", ["", "photos/", "a/b/"])
def test_folders_inside_are_classes_whatever_wraps_them(tmp_path, prefix):
    members = {f"{prefix}{name}/{i}.png": png(i) for name in ("x", "y") for i in range(2)}
    members |= {f"{prefix}x/.hidden": b"", "__MACOSX/x/0.png": b"junk"}
    data = open_all(write_zip(tmp_path / "set.zip", members))
    assert (data.classes, data.labels.tolist()) == (("x", "y"), [0, 0, 1, 1])
    assert data.images[:, 0, 4, 4].tolist() == [0, 1, 0, 1]


def test_a_flat_archive_is_one_class_and_splits_are_kept(tmp_path):
    flat = open_all(write_zip(tmp_path / "faces.zip", {"1.png": png(1), "2.png": png(2)}))
    assert (flat.classes, len(flat)) == (("faces",), 2)
    split = write_zip(tmp_path / "s.zip", {"train/a/1.png": png(1), "test/a/2.png": png(2)})
    assert open_all(split, split="test").images.unique().tolist() == [2]


@pytest.mark.parametrize("inside", [True, False])
def test_an_index_gives_classes_and_split(tmp_path, inside):
    index = "file\tsplit\tclass\tname\n1.png\ttrain\t0\tzebra\n2.png\ttest\t1\tant\n3.png\ttrain\t1\tant\n"
    members = {f"{i}.png": png(i) for i in (1, 2, 3)}
    file = write_zip(tmp_path / "images.zip", members | ({"index.tsv": index} if inside else {}))
    if not inside:
        (tmp_path / "index.tsv").write_text(index, encoding="utf-8")
    for source in [file] if inside else [file, tmp_path]:
        data = open_all(source, split="train")
        assert data.classes == ("ant", "zebra")
        assert data.labels.tolist() == [1, 0]
        assert data.images[:, 0, 0, 0].tolist() == [1, 3]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"path\tlabel\n", "needs the columns"),
        (b"file\tname\n1.png\n", "line 2"),
        (b"file\tname\tsplit\n1.png\ta\tdev\n", "line 2"),
        (b"file\tname\n", "lists no files"),
        (b"\xff\xfe\0", "tab-separated UTF-8"),
    ],
)
def test_a_malformed_index_is_named(tmp_path, index, message):
    file = write_zip(tmp_path / "images.zip", {"1.png": png(1), "index.tsv": index})
    with pytest.raises(ValueError, match=message) as error:
        open_all(file)
    assert "index.tsv" in str(error.value)


def test_a_listed_file_that_is_missing_is_named_or_skipped(tmp_path):
    index = "file\tname\n1.png\ta\n../../etc/passwd\ta\n"
    file = write_zip(tmp_path / "images.zip", {"1.png": png(1), "index.tsv": index})
    with pytest.raises(BadImageError, match="not in the archive"):
        open_all(file)
    assert len(open_all(file, skip_bad=True)) == 1


def test_a_member_that_is_listed_again_is_named_or_skipped(tmp_path):
    index = "file\tname\tsplit\n1.png\ta\ttrain\n2.png\ta\ttrain\n1.png\ta\ttrain\n1.png\tb\ttest\n"
    file = write_zip(tmp_path / "images.zip", {"1.png": png(1), "2.png": png(2), "index.tsv": index})
    with pytest.raises(BadImageError, match=r"1\.png: listed before; one image is one record .*index\.tsv, line 4"):
        open_all(file)
    data = open_all(file, skip_bad=True)
    assert data.images[:, 0, 4, 4].tolist() == [1, 2]
    assert [reason.split("line ")[1][0] for _, reason in data.skipped] == ["4", "5"]


def test_members_that_point_elsewhere_are_never_extracted(tmp_path):
    (tmp_path / "deep").mkdir()
    file = write_zip(tmp_path / "deep" / "set.zip", {"../../escape/1.png": png(1), "/abs/2.png": png(2)})
    before = sorted(tmp_path.rglob("*"))
    open_all(file, skip_bad=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_member_is_named_or_skipped(tmp_path):
    file = write_zip(tmp_path / "set.zip", {"a/1.png": png(1), "a/2.png": png(2)})
    content = bytearray(file.read_bytes())
    start = content.index(b"a/1.png") + len(b"a/1.png")
    content[start + 5] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(BadImageError, match=r"a/1\.png"):
        open_all(file)
    data = open_all(file, skip_bad=True)
    assert (len(data), data.skipped[0][0].endswith("a/1.png")) == (1, True)


def test_an_encrypted_member_is_refused(tmp_path):
    file = write_zip(tmp_path / "set.zip", {"a/1.png": png(1)})
    content = bytearray(file.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1
    file.write_bytes(content)
    with pytest.raises(BadImageError, match="encrypted"):
        open_all(file)


def test_a_member_that_unpacks_to_a_bomb_is_read_no_further_than_the_cap(tmp_path, monkeypatch):
    monkeypatch.setattr("wavedp.data.archive.MAX_FILE_BYTES", 10_000)
    monkeypatch.setattr("wavedp.data.picture_file.MAX_FILE_BYTES", 10_000)
    file = write_zip(tmp_path / "set.zip", {"a/1.png": bytes(10**7)})
    with pytest.raises(BadImageError, match="larger than 10000"):
        open_all(file)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no", b"nothing like a zip"])
def test_what_is_no_archive_is_named(tmp_path, content):
    file = tmp_path / "set.zip"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"set\.zip is not a readable zip archive"):
        open_all(file)


def test_an_empty_archive_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no files"):
        open_all(write_zip(tmp_path / "set.zip", {}))


def test_caltech_is_read_by_its_index(wavedp_data):
    data = open_dataset(wavedp_data / "caltech101-64", image_size=64, channels=3, split="test")
    assert (len(data), len(data.classes)) == (2893, 101)
    assert data.classes[int(data.labels[0])] == "Faces"
