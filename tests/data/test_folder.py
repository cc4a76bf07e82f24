# SPDX-License-Identifier: Apache-2.0
import io
import os
import socket
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from wavedp.data import BadImageError, open_dataset
from wavedp.data.picture_file import MAX_FILE_BYTES, decode_picture, printable


def encoded(mode="RGB", size=(12, 10), color=None, file_format="PNG", **options):
    stream = io.BytesIO()
    picture = Image.new(mode, size, color if color is not None else {"1": 1, "F": 0.5}.get(mode, 90))
    picture.save(stream, file_format, **options)
    return stream.getvalue()


def noisy_png(side=64):
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def png_that_claims(width, height):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    image = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + image


def write_class(root, name, contents):
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in contents.items():
        (folder / file).write_bytes(content)


@pytest.fixture
def pets(tmp_path):
    write_class(tmp_path, "dog", {f"{i}.png": encoded(color=(i, 0, 0)) for i in range(3)})
    write_class(tmp_path, "cat", {f"{i}.jpg": encoded(color=(0, 50, 0), file_format="JPEG") for i in range(2)})
    return tmp_path


def open_all(root, **options):
    return open_dataset(root, **{"image_size": 8, "channels": 3, "split": "all", **options})


def test_classes_are_the_sorted_subfolders(pets):
    data = open_all(pets)
    assert data.classes == ("cat", "dog")
    assert data.labels.tolist() == [0, 0, 1, 1, 1]
    assert data.images[2:, 0, 0, 0].tolist() == [0, 1, 2]
    assert open_all(pets, classes=["dog", "cat"]).labels.tolist() == [1, 1, 0, 0, 0]
    with pytest.raises(ValueError, match="class 'cat' is not among"):
        open_all(pets, classes=["dog", "bird"])


def test_a_flat_folder_is_one_class(tmp_path):
    write_class(tmp_path, "faces", {"a.png": encoded(), "b.png": encoded()})
    data = open_all(tmp_path / "faces")
    assert (data.classes, data.labels.tolist()) == (("faces",), [0, 0])


def test_deeper_files_belong_to_the_first_folder(pets):
    write_class(pets, "dog/small/brown", {"z.png": encoded()})
    assert open_all(pets).labels.tolist() == [0, 0, 1, 1, 1, 1]


def test_train_and_test_folders_are_the_split(tmp_path):
    for split, n in (("train", 3), ("val", 2)):
        for name in ("a", "b"):
            write_class(tmp_path / split, name, {f"{i}.png": encoded() for i in range(n)})
    train, test, both = (open_all(tmp_path, split=s) for s in ("train", "test", "all"))
    assert (len(train), len(test), len(both)) == (6, 4, 10)
    assert train.classes == test.classes == ("a", "b")


def test_without_a_split_each_image_falls_by_its_own_name(tmp_path):
    contents = {f"{i:03d}.png": encoded(color=(i, 0, 0)) for i in range(100)}
    write_class(tmp_path, "a", contents)
    train, test = (set(open_all(tmp_path, split=s).images[:, 0, 0, 0].tolist()) for s in ("train", "test"))
    assert train | test == set(range(100))
    assert not train & test
    assert 5 <= len(test) <= 40
    (tmp_path / "a" / "000.png").unlink()
    fewer = set(open_all(tmp_path, split="test").images[:, 0, 0, 0].tolist())
    assert fewer == test - {0}


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM"])
def test_the_format_is_found_from_the_content(tmp_path, file_format):
    write_class(tmp_path, "a", {"wrong-suffix.dat": encoded(color=(90, 90, 90), file_format=file_format)})
    assert open_all(tmp_path).images.float().sub(90).abs().max() <= 2


@pytest.mark.parametrize(
    ("content", "grey"),
    [
        (encoded("L", color=77), 77),
        (encoded("1", color=1), 255),
        (encoded("P", color=0), 0),
        (encoded("LA", color=(255, 0)), 0),
        (encoded("RGBA", color=(255, 255, 255, 128)), 128),
        (encoded("I;16", color=77 * 256 + 9), 77),
        (encoded("CMYK", color=(0, 0, 0, 255), file_format="JPEG"), 0),
        (encoded("CMYK", color=(0, 0, 0, 0), file_format="TIFF"), 255),
    ],
    ids=["grey", "bits", "palette", "grey-alpha", "colour-alpha", "16-bit", "cmyk-jpeg", "cmyk-tiff"],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_has_a_rule(content, grey, channels):
    pixels = decode_picture(content, "file", 8, channels)
    assert pixels.shape == (channels, 8, 8)
    assert pixels.float().sub(grey).abs().max() <= 1


def test_the_first_frame_of_an_animation_is_used():
    frames = [Image.new("RGB", (8, 8), (shade, shade, shade)) for shade in (30, 200)]
    stream = io.BytesIO()
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    assert decode_picture(stream.getvalue(), "file", 8, 1).unique().tolist() == [30]


def test_exif_orientation_is_applied():
    pixels = np.zeros((8, 8), dtype=np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: its top row is the right column
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", exif=exif)
    upright = decode_picture(stream.getvalue(), "file", 8, 1)[0]
    assert upright[:, 7].tolist() == [255] * 8
    assert int(upright[:, :7].max()) == 0


BAD_FILES = {
    "empty": (b"", "empty"),
    "text": (b"not an image at all", "not a readable image"),
    "truncated-png": (noisy_png()[:4000], "damaged or truncated"),
    "truncated-jpeg": (encoded(size=(64, 64), file_format="JPEG")[:-60], "damaged or truncated"),
    "header-only": (noisy_png()[:33], "not a readable image|damaged"),
    "bomb": (png_that_claims(60000, 60000), "header claims too many pixels"),
    "sliver": (png_that_claims(40000, 1), "32768 a side"),
    "oversized": (png_that_claims(9000, 9000), "at most 67108864 pixels"),
    "no-pixels": (png_that_claims(0, 5), "not a readable image|0 x 5|damaged"),
    "short": (png_that_claims(2000, 2000), "damaged or truncated"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a readable image"),
    "floats": (encoded("F", file_format="TIFF"), "no stated range"),
    "large-file": (bytes(MAX_FILE_BYTES + 1), "larger than"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_named_or_skipped_and_counted(pets, kind):
    content, reason = BAD_FILES[kind]
    write_class(pets, "dog", {"1b-bad.png": content})
    with pytest.raises(BadImageError, match=reason) as error:
        open_all(pets)
    assert os.path.join("dog", "1b-bad.png") in str(error.value)
    assert "skip_bad" in str(error.value)
    data = open_all(pets, skip_bad=True)
    assert data.labels.tolist() == [0, 0, 1, 1, 1]
    assert data.images[2:, 0, 0, 0].tolist() == [0, 1, 2]
    assert [file.endswith("1b-bad.png") for file, _ in data.skipped] == [True]


@pytest.mark.parametrize("seed", range(3))
def test_damaged_bytes_give_pixels_or_the_one_error(seed):
    generator = np.random.default_rng(seed)
    originals = [noisy_png(16)] + [
        encoded(size=(16, 16), file_format=f) for f in ("JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM")
    ]
    outcomes = set()
    for original in originals:
        for _ in range(60):
            damaged = np.frombuffer(original, dtype=np.uint8).copy()
            places = generator.integers(0, len(damaged), 4)
            damaged[places] = generator.integers(0, 256, 4)
            try:
                outcomes.add(tuple(decode_picture(damaged.tobytes(), "file", 8, 3).shape))
            except BadImageError:
                outcomes.add(BadImageError)
    assert outcomes == {(3, 8, 8), BadImageError}


def test_nothing_left_is_an_error(tmp_path):
    write_class(tmp_path, "a", {"bad.png": b"x"})
    with pytest.raises(ValueError, match=r"no readable image.*1 files skipped"):
        open_all(tmp_path, skip_bad=True)


def test_empty_and_missing_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no files"):
        open_all(tmp_path)
    (tmp_path / "class").mkdir()
    with pytest.raises(ValueError, match="holds no files"):
        open_all(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere.*digits"):
        open_all(tmp_path / "nowhere")


def test_links_out_of_the_folder_are_refused(pets, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    write_class(outside, "secret", {"s.png": encoded()})
    (pets / "dog" / "x.png").symlink_to(outside / "secret" / "s.png")
    write_class(pets, ".store", {"7.png": encoded()})
    (pets / "dog" / "inside.png").symlink_to(pets / ".store" / "7.png")
    (pets / "dog" / "loop.png").symlink_to(pets / "dog" / "loop.png")
    (pets / "bird").symlink_to(outside / "secret")
    with pytest.raises(BadImageError, match="link"):
        open_all(pets)
    data = open_all(pets, skip_bad=True)
    reasons = {os.path.basename(file): reason for file, reason in data.skipped}
    assert set(reasons) == {"x.png", "loop.png", "bird"}
    assert len(data) == 6
    assert data.classes == ("cat", "dog")


def test_a_second_name_for_a_listed_file_is_refused(pets):
    (pets / "cat" / "a.png").symlink_to(pets / "dog" / "0.png")  # sorts before the file itself
    (pets / "dog" / "chain.png").symlink_to(pets / "cat" / "a.png")
    write_class(pets, ".store", {"7.png": encoded(color=(7, 0, 0))})
    for link in ("x.png", "y.png"):
        (pets / "dog" / link).symlink_to(os.path.join("..", ".store", "7.png"))
    with pytest.raises(BadImageError, match=r"a\.png: listed before; one image is one record .*dog.0\.png"):
        open_all(pets)
    data = open_all(pets, skip_bad=True)
    assert [os.path.basename(file) for file, _ in data.skipped] == ["a.png", "chain.png", "y.png"]
    assert all("one image is one record" in reason for _, reason in data.skipped)
    assert data.labels.tolist() == [0, 0, 1, 1, 1, 1]
    assert data.images[2:, 0, 0, 0].tolist() == [0, 1, 2, 7]


def test_a_set_reached_through_a_link_is_itself(pets, tmp_path_factory):
    link = tmp_path_factory.mktemp("elsewhere") / "pets"
    link.symlink_to(pets)
    assert len(open_all(link)) == 5


def test_what_is_not_a_regular_file_is_refused_without_waiting(pets):
    os.mkfifo(pets / "dog" / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listener:
        folder = os.open(pets / "dog", os.O_RDONLY)
        listener.bind(f"/proc/self/fd/{folder}/sock.png")
        os.close(folder)
    data = open_all(pets, skip_bad=True)
    assert len(data) == 5
    assert {os.path.basename(file) for file, _ in data.skipped} == {"pipe.png", "sock.png"}


def test_hidden_files_and_loose_documents_are_ignored(pets):
    write_class(pets, "dog", {".DS_Store": b"x", "._0.png": b"x"})
    write_class(pets, ".git", {"config.png": b"x"})
    (pets / "LICENSE.txt").write_text("free", encoding="utf-8")
    assert len(open_all(pets)) == 5
    (pets / "stray.PNG").write_bytes(encoded())
    with pytest.raises(BadImageError, match="beside the class folders"):
        open_all(pets)
    assert len(open_all(pets, skip_bad=True)) == 5


def test_unicode_names_work_and_messages_stay_printable(tmp_path):
    write_class(tmp_path, "Möwe 🐦", {"bild ä.png": encoded(), "\x1b[31m\n.png": b"bad"})
    data = open_all(tmp_path, skip_bad=True)
    assert data.classes == ("Möwe 🐦",)
    assert all(text.isprintable() for pair in data.skipped for text in pair)
    assert printable("a\x1b\udc80ä") == r"a\x1b\udc80ä"


def test_files_may_vanish_after_opening(pets):
    data = open_all(pets)
    for file in list(pets.glob("*/*")):
        file.unlink()
    assert len([image for image, _ in data]) == 5


def test_beyond_the_memory_limit_a_temporary_file_holds_the_same_pixels(pets, tmp_path_factory, monkeypatch):
    scratch = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    mapped = open_all(pets, memory_limit=0)
    assert torch.equal(mapped.images, open_all(pets).images)
    assert list(scratch.iterdir()) == []
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(OSError, match="0 free"):
        open_all(pets, memory_limit=0)
