# SPDX-License-Identifier: Apache-2.0
"""A package that is not installed is simulated by None in sys.modules, which makes its import fail."""

import sys

import matplotlib.font_manager  # noqa: F401 (begun without Pillow, its import would stay half done for other tests)
import pytest
import torch
from PIL import Image

from wavedp.data import native_digits, open_dataset, render_silhouettes
from wavedp.data.glyph_shapes import outline_fields, stroke_fields
from wavedp.data.resize import fit_pixels
from wavedp.extras import import_extra


@pytest.fixture
def photos(tmp_path):
    Image.new("L", (9, 9)).save(tmp_path / "1.png")
    return tmp_path


def without(monkeypatch, *modules):
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)


@pytest.mark.parametrize(
    ("package", "modules", "extra", "use"),
    [
        ("PIL", ["PIL.Image"], "data", lambda: render_silhouettes(1, 8, seed=0)),
        ("PIL", ["PIL.Image"], "data", lambda: fit_pixels(torch.zeros(1, 1, 9, 9, dtype=torch.uint8), 8, 1)),
        ("PIL", ["PIL.ImageFont"], "demo", lambda: outline_fields.__wrapped__("0")),
        ("sklearn", ["sklearn.datasets"], "demo", native_digits),
        ("matplotlib", [], "demo", lambda: outline_fields.__wrapped__("0")),
        ("HersheyFonts", [], "demo", lambda: stroke_fields.__wrapped__("0")),
    ],
    ids=["silhouettes", "resizing", "fonts", "digits", "outlines", "strokes"],
)
def test_the_error_names_the_extra(monkeypatch, package, modules, extra, use):
    without(monkeypatch, package, *modules)
    with pytest.raises(ImportError, match=rf"{package} is needed here: pip install 'wavedp\[{extra}\]'") as error:
        use()
    assert error.value.name == package


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_missing_decoder_is_no_bad_file(monkeypatch, photos, skip_bad):
    without(monkeypatch, "PIL", "PIL.Image")
    with pytest.raises(ImportError, match=r"pip install 'wavedp\[data\]'"):
        open_dataset(photos, image_size=8, split="all", skip_bad=skip_bad)


def test_images_of_the_right_size_need_no_package(monkeypatch):
    without(monkeypatch, "PIL", "PIL.Image")
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
    assert torch.equal(fit_pixels(images, 8, 1), images)


def test_what_is_there_is_imported():
    assert import_extra("PIL.Image", "data") is Image
