# SPDX-License-Identifier: Apache-2.0
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from wavedp.training.pictures import save_curves, save_dots, save_grid


def pixels_of(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def find_cell(sheet, colour, cell):
    """Top left corner of the ``cell`` x ``cell`` square of one colour."""
    ys, xs = np.nonzero((sheet == colour).all(axis=2))
    assert len(ys) == cell * cell
    assert (ys.max() - ys.min() + 1, xs.max() - xs.min() + 1) == (cell, cell)
    return ys.min(), xs.min()


def plain(*colours, side=8):
    return torch.stack([torch.tensor(c).view(3, 1, 1).expand(3, side, side) / 255 for c in colours])


def test_every_image_is_in_its_row_and_column(tmp_path):
    rows = [
        ("first", plain((255, 0, 0), (0, 255, 0), side=8)),
        ("second", plain((0, 0, 255), (255, 255, 0), side=64)),
    ]
    save_grid(tmp_path / "g.png", rows, cell=32, title="Title", column_labels=["a", "b"])
    sheet = pixels_of(tmp_path / "g.png")
    red, green, blue, yellow = (find_cell(sheet, c, 32) for c in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)))
    assert red[0] == green[0] < blue[0] == yellow[0]
    assert red[1] == blue[1] < green[1] == yellow[1]
    assert (sheet[red[0] : red[0] + 32, : red[1]] < 100).any()  # the label, left of its row
    assert (sheet[: red[0], :] < 100).any()


def test_small_images_show_their_pixels_as_squares(tmp_path):
    image = torch.zeros(1, 1, 2, 2)
    image[0, 0, 0, 1] = 100 / 255
    save_grid(tmp_path / "g.png", [("coarse", image)], cell=40)
    find_cell(pixels_of(tmp_path / "g.png"), (100, 100, 100), 20)


def test_large_images_are_averaged(tmp_path):
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2
    save_grid(tmp_path / "g.png", [("fine", board.float()[None, None])], cell=16)
    find_cell(pixels_of(tmp_path / "g.png"), (128, 128, 128), 16)


def test_rows_may_differ_in_length_and_labels_may_be_long(tmp_path):
    rows = [("a very long label that must be broken into several lines", torch.zeros(1, 1, 8, 8))]
    rows.append(("", torch.ones(4, 3, 8, 8)))
    save_grid(tmp_path / "g.png", rows, cell=64, column_labels=["a name wider than its column"])
    assert pixels_of(tmp_path / "g.png").shape[1] < 4 * 67 + 230


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "at least one row"),
        ([("r", torch.zeros(2, 8, 8))], {}, "row 'r': images must be float"),
        ([("r", torch.zeros(2, 1, 8, 8, dtype=torch.uint8))], {}, "row 'r': images must be float"),
        ([("r", torch.full((2, 1, 8, 8), 2.0))], {}, r"row 'r': images must lie in \[0, 1\]"),
        ([("r", torch.full((1, 1, 8, 8), float("nan")))], {}, r"\[0, 1\]"),
        ([("r", torch.zeros(2, 1, 8, 8))], {"cell": 1}, "cell"),
        ([("r", torch.zeros(2, 1, 8, 8))], {"column_labels": ["a"] * 3}, "3 column labels for 2"),
    ],
)
def test_rows_that_are_not_images_are_refused(tmp_path, rows, options, message):
    with pytest.raises(ValueError, match=message):
        save_grid(tmp_path / "g.png", rows, **options)
    assert list(tmp_path.iterdir()) == []


def test_curves_draw_each_series(tmp_path):
    save_curves(tmp_path / "one.png", {"a": (range(5), [1.0] * 5)}, title="t")
    save_curves(tmp_path / "two.png", {"a": (range(5), [1.0] * 5), "b": ([0, 4], [1.0, 0.1])}, log_y=True)
    one, two = (pixels_of(tmp_path / f"{name}.png") for name in ("one", "two"))
    blue, orange = (31, 119, 180), (255, 127, 14)
    assert (one == blue).all(axis=2).any()
    assert not (one == orange).all(axis=2).any()
    assert (two == orange).all(axis=2).any()


def test_a_single_curve_is_named_in_the_picture(tmp_path):
    for name in ("loss_not_private", "loss"):
        save_curves(tmp_path / f"{name}.png", {name: (range(5), [1.0] * 5)})
    long, short = (pixels_of(tmp_path / f"{name}.png") for name in ("loss_not_private", "loss"))
    assert (long < 100).all(axis=2).sum() > (short < 100).all(axis=2).sum() + 100  # the ink of "_not_private"


def test_dots_stand_at_their_values_in_order(tmp_path):
    save_dots(tmp_path / "dots.png", {"first": (1.0, 0.0), "a longer name": (3.0, 0.0), "third": (2.0, 0.0)})
    blue = (pixels_of(tmp_path / "dots.png") == (31, 119, 180)).all(axis=2)
    rows = blue.any(axis=1).nonzero()[0]
    groups = np.split(rows, (np.diff(rows) > 1).nonzero()[0] + 1)
    assert len(groups) == 3
    first, second, third = (float(blue[g].any(axis=0).nonzero()[0].mean()) for g in groups)
    assert first < third < second
    assert third == pytest.approx((first + second) / 2, abs=2)
    save_dots(tmp_path / "spread.png", {"first": (1.0, 0.5), "a longer name": (3.0, 0.0), "third": (2.0, 0.0)})
    assert (pixels_of(tmp_path / "spread.png") == (31, 119, 180)).all(axis=2).sum() > blue.sum() + 20
    with pytest.raises(ValueError, match="at least one point"):
        save_dots(tmp_path / "none.png", {})


@pytest.mark.parametrize(
    ("missing", "write", "extra"),
    [
        (["PIL", "PIL.Image"], lambda path: save_grid(path, [("a", torch.zeros(1, 1, 8, 8))]), "data"),
        (["matplotlib", "matplotlib.figure"], lambda path: save_curves(path, {"a": ([1], [1])}), "demo"),
    ],
    ids=["grid", "curves"],
)
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, missing, write, extra):
    for module in missing:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{missing[0]} is needed here: pip install 'wavedp\[{extra}\]'"):
        write(tmp_path / "picture.png")


def test_curves_refuse_what_they_cannot_draw(tmp_path):
    with pytest.raises(ValueError, match="at least one series"):
        save_curves(tmp_path / "c.png", {})
    with pytest.raises(ValueError, match="'a' has 2 x values and 1 y"):
        save_curves(tmp_path / "c.png", {"a": ([1, 2], [1])})
