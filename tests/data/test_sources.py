# SPDX-License-Identifier: Apache-2.0
import pytest

from wavedp.data import NAMED_SOURCES, open_dataset


@pytest.mark.parametrize("source", NAMED_SOURCES)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_named_source_opens_at_any_size(source, channels):
    data = open_dataset(source, image_size=20, channels=channels, split="test", num_images=12)
    image, label = data[0]
    assert image.shape == (channels, 20, 20)
    assert 0 <= label < len(data.classes) == 10


@pytest.mark.parametrize("source", [*NAMED_SOURCES, "."])
@pytest.mark.parametrize(
    ("option", "value"), [("split", "dev"), ("channels", 2), ("image_size", 0), ("fit", "x"), ("background", -1)]
)
def test_a_bad_option_is_refused_before_anything_is_read(source, option, value):
    with pytest.raises(ValueError, match=option):
        open_dataset(source, **{"image_size": 8, option: value})


@pytest.mark.parametrize("source", [*NAMED_SOURCES, "."])
def test_repeated_class_names_are_refused(source):
    with pytest.raises(ValueError, match=r"distinct, \['cat'\] are repeated in \['cat', 'dog', 'cat'\]"):
        open_dataset(source, image_size=8, classes=["cat", "dog", "cat"])


@pytest.mark.parametrize("classes", [["cat", "dog"], ["a", ""], ["a", "bc"]])
def test_classes_of_glyphs_that_are_no_characters_are_refused(classes):
    with pytest.raises(ValueError, match="the classes of glyphs are single characters"):
        open_dataset("glyphs", image_size=8, num_images=4, classes=classes)


def test_a_source_that_is_nowhere_lists_the_names():
    with pytest.raises(FileNotFoundError, match=r"no such data set: glyph .*digits, glyphs, silhouettes"):
        open_dataset("glyph", image_size=8)


def test_a_file_that_is_no_data_set_says_what_it_is(tmp_path):
    file = tmp_path / "photo.jpg"
    file.write_bytes(b"\xff\xd8\xff\xe0" + bytes(100))
    with pytest.raises(ValueError, match=r"photo\.jpg: not an IDX file \(it starts with ff d8"):
        open_dataset(file, image_size=8)
