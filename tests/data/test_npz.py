# SPDX-License-Identifier: Apache-2.0
"""NumPy archives of images, and what is refused of them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from wavedp.data import NpzError, load_npz, open_dataset

PIXELS = np.arange(5 * 8 * 8, dtype=np.uint8).reshape(5, 8, 8)
LABELS = np.array([0, 2, 1, 1, 0])


@pytest.mark.parametrize(
    "images",
    [PIXELS, PIXELS[:, None], PIXELS[..., None], PIXELS[:, None] / np.float32(255), PIXELS.astype(np.float64) / 255],
    ids=["NSS", "NCSS", "NSSC", "float32", "float64"],
)
@pytest.mark.parametrize("names", [("x", "y"), ("images", "labels")])
def test_every_layout_gives_the_same_images(tmp_path: Path, images: np.ndarray, names: tuple[str, str]) -> None:
    np.savez_compressed(tmp_path / "a.npz", **dict(zip(names, (images, LABELS), strict=True)), other=np.zeros(3))
    dataset = open_dataset(tmp_path / "a.npz", image_size=8, split="all", classes=["a", "b", "c"])
    assert torch.equal(dataset.images, torch.from_numpy(PIXELS)[:, None])
    assert dataset.labels.tolist() == LABELS.tolist()


def test_colour_one_hot_sizes_and_splits(tmp_path: Path) -> None:
    colour = np.stack([PIXELS, PIXELS // 2, PIXELS // 3], axis=3)
    np.savez(tmp_path / "a.npz", x=colour, y=np.eye(3)[LABELS])
    dataset = load_npz(tmp_path / "a.npz", image_size=8, channels=3, split="all")
    assert torch.equal(dataset.images[:, 1], torch.from_numpy(PIXELS // 2))
    assert dataset.labels.tolist() == LABELS.tolist()
    assert dataset.classes == ("0", "1", "2")
    smaller = load_npz(tmp_path / "a.npz", image_size=4, channels=1, split="all")
    assert smaller.images.shape == (5, 1, 4, 4)
    parts = [load_npz(tmp_path / "a.npz", image_size=8, split=s, classes="abc") for s in ("train", "test")]
    assert sum(len(part) for part in parts) == 5
    np.savez(tmp_path / "b.npz", x=PIXELS)
    assert load_npz(tmp_path / "b.npz", image_size=8, split="all").labels.tolist() == [0] * 5


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"z": PIXELS}, "no array 'x' or 'images'"),
        ({"x": PIXELS[0]}, r"images of shape \[8, 8\]"),
        ({"x": PIXELS.astype(np.int32)}, "images of dtype int32"),
        ({"x": PIXELS.astype(np.float32)}, r"must lie in \[0, 1\], they span 0\.\.255"),
        ({"x": np.full((2, 8, 8), np.nan)}, r"must lie in \[0, 1\]"),
        ({"x": PIXELS, "y": LABELS[:4]}, r"labels must be integers >= 0 of shape \[5\]"),
        ({"x": PIXELS, "y": LABELS - 1}, "labels must be integers >= 0"),
        ({"x": PIXELS, "y": LABELS / 2}, "labels must be integers >= 0"),
        ({"x": np.array([{"a": 1}] * 5, dtype=object)}, "claims Python objects"),
    ],
)
def test_a_bad_archive_is_named(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(NpzError, match=message) as error:
        load_npz(tmp_path / "a.npz", image_size=8, split="all")
    assert "a.npz" in str(error.value)


def test_a_header_that_claims_too_much_allocates_nothing(tmp_path: Path) -> None:
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 8, 8), }\n"
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\0" * 64)
    with pytest.raises(NpzError, match="claims more than it has"):
        load_npz(tmp_path / "a.npz", image_size=8, split="all")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nothing", b"\x80\x04pickle"])
def test_what_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(NpzError, match="not a readable NumPy archive"):
        load_npz(tmp_path / "a.npz", image_size=8)


def test_more_labels_than_classes_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=PIXELS, y=LABELS)
    with pytest.raises(ValueError, match="there are 2 classes"):
        load_npz(tmp_path / "a.npz", image_size=8, split="all", classes=["a", "b"])
