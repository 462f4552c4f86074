"""Images at another size, and some of the classes: against Pillow and by hand."""

import os

import numpy as np
import pytest
from PIL import Image

from minivit.base.errors import InputError
from minivit.data import Dataset, load, parse_classes, resize_images, with_classes
from minivit.data import size as module
from minivit.weights.resize import interpolation


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("old", "new"), [(8, 12), (32, 48), (12, 5), (9, 31), (5, 1), (1, 3)])
def test_as_pillow_scales_them(old, new, channels):
    images = np.random.default_rng(old).integers(0, 256, (3, old, old, channels), dtype=np.uint8)
    found = resize_images(images, new)
    assert found.shape == (3, new, new, channels) and found.dtype == np.uint8
    for image, mine in zip(images, found, strict=True):
        original = Image.fromarray(image[..., 0] if channels == 1 else image)
        theirs = np.asarray(original.resize((new, new), Image.Resampling.BILINEAR)).reshape(mine.shape)
        assert np.abs(theirs.astype(int) - mine).max() <= 1  # Pillow rounds between rows and columns


@pytest.mark.parametrize(("old", "new"), [(8, 12), (12, 5)])
def test_within_a_rounding_of_the_formula(old, new):
    images = np.random.default_rng(0).integers(0, 256, (4, old, old, 3), dtype=np.uint8)
    M = interpolation(new, old, "bilinear-antialias")
    exact = np.einsum("ia,jb,nabc->nijc", M, M, images.astype(float))
    assert np.abs(resize_images(images, new) - exact).max() <= 0.5 + 0.02  # weights of 16 bits


def test_by_hand():
    two = np.array([[0, 100], [200, 44]], np.uint8)[None, ..., None]
    np.testing.assert_array_equal(
        resize_images(two, 4)[0, ..., 0],
        # rows and columns at 0, 1/4, 3/4 and 1 of the way; 55.75 becomes 56, 140.25 becomes 140
        [[0, 25, 75, 100], [50, 59, 77, 86], [150, 127, 81, 58], [200, 161, 83, 44]],
    )
    np.testing.assert_array_equal(resize_images(two, 1).ravel(), [86])  # the mean of all four


@pytest.mark.parametrize("new", [1, 7, 33, 61])
def test_a_image_of_one_colour_stays_so(new):
    for value in (0, 1, 127, 255):
        images = np.full((2, 32, 32, 3), value, np.uint8)
        np.testing.assert_array_equal(resize_images(images, new), value)


def test_the_same_size_is_the_same_array_and_nothing_is_written_to(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 1), dtype=np.uint8)
    before = images.copy()
    assert resize_images(images, 8) is images
    whole = resize_images(images, 11)
    monkeypatch.setattr(module, "CHUNK", 2 * 11 * 11)
    np.testing.assert_array_equal(resize_images(images, 11), whole)  # in chunks of two, the last of one
    np.testing.assert_array_equal(images, before)


def test_sizes_that_cannot_be(monkeypatch):
    images = np.zeros((3, 8, 8, 1), np.uint8)
    for size in (0, -3, 4097):
        with pytest.raises(InputError, match=f"image size {size} is out of range; choose 1 to 4096"):
            resize_images(images, size)
    with pytest.raises(InputError, match="8x9 are not square and cannot be resized to 4x4"):
        resize_images(np.zeros((3, 8, 9, 1), np.uint8), 4)
    monkeypatch.setattr(os, "sysconf", lambda name: 2)  # 4 bytes of memory
    with pytest.raises(InputError, match="take 0.0 GB at 16x16, this machine has 0.0; choose a smaller image size"):
        resize_images(images, 16)


def test_load_scales_the_digits():
    plain, larger = load("digits"), load("digits", image_size=12)
    np.testing.assert_array_equal(larger.train_images, resize_images(plain.train_images, 12))
    np.testing.assert_array_equal(larger.test_images, resize_images(plain.test_images, 12))
    assert larger.source == plain.source + "; resized from 8x8" and larger.class_names == plain.class_names
    assert load("digits", image_size=8).source == plain.source


# ---- classes ---------------------------------------------------------------------------------------------------------

NAMES = ("air", "bus", "cat", "elk", "3", "2-3")


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("0-2", [0, 1, 2]), ("cat,air", [2, 0]), (" elk , air ", [3, 0]), ("1", [1]), ("0-1,4", [0, 1, 4]),
        ("3", [4]), ("2-3", [5]), ("5-5", [5]),
    ],
)  # fmt: skip
def test_classes_by_number_range_and_name(text, chosen):
    assert parse_classes(text, NAMES) == chosen


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0-6", "no class '0-6'; it has 0-5, air, bus, cat, elk, 3, 2-3"),
        ("2-1", "no class '2-1'"), ("6", "no class '6'"),
        ("cats", "no class 'cats'; did you mean cat?"), ("", "no class ''"),
        ("cat,", "no class ''"), ("-1", "no class '-1'"),
        ("cat,0-2", "mixes names (cat) and numbers (0-2)"), ("0,1,cat", "mixes names (cat) and numbers (0)"),
        ("0-3", "3 is the name of a class, and counted from 0 the number of another"),
        ("3,0", "3 is the name of a class"), ("cat,air,cat", "cat is named twice"), ("0-2,1", "bus is named twice"),
        ("9" * 5000, "it has 0-5, air"), ("1,1", "bus is named twice"),
    ],
)  # fmt: skip
def test_classes_that_are_not_there(text, said):
    with pytest.raises(InputError) as error:
        parse_classes(text, NAMES)
    assert said in str(error.value)


def test_classes_are_names_or_numbers_and_which_is_said(capsys):
    """Folders 1, 2, 3: "1,2" are their names, which is told; digits are named by their numbers, which is not."""
    assert parse_classes("1,2", ("1", "2", "3")) == [0, 1]
    assert capsys.readouterr().err == "note: the classes 1,2 are taken for names, not for numbers from 0\n"
    with pytest.raises(InputError, match="2 is the name of a class, and counted from 0 the number of another"):
        parse_classes("0-2", ("1", "2", "3"))
    assert parse_classes("1,2-3", [str(k) for k in range(10)]) == [1, 2, 3]
    assert parse_classes("Ka\u0308tzchen", ("Hund", "K\u00e4tzchen")) == [1]
    assert capsys.readouterr().err == ""


def test_labels_are_numbered_anew():
    data = Dataset(
        "x", np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1), np.array([0, 1, 2, 2, 1, 0]),
        np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1), np.array([2, 0, 1]), ("a", "b", "c"), "here",
    )  # fmt: skip
    some = with_classes(data, "c,a")
    assert some.class_names == ("c", "a") and some.source == "here; 2 of 3 classes" and some.name == "x"
    np.testing.assert_array_equal(some.train_images.ravel(), [0, 2, 3, 5])
    np.testing.assert_array_equal(some.train_labels, [1, 0, 0, 1])
    np.testing.assert_array_equal(some.test_images.ravel(), [0, 1])
    np.testing.assert_array_equal(some.test_labels, [0, 1])
    assert some.train_labels.dtype == np.int64


def test_load_keeps_some_classes():
    plain, some = load("digits"), load("digits", classes="3,5-7", image_size=6)
    kept = np.isin(plain.train_labels, [3, 5, 6, 7])
    np.testing.assert_array_equal(some.train_images, resize_images(plain.train_images[kept], 6))
    assert some.class_names == ("3", "5", "6", "7") and set(some.train_labels) == {0, 1, 2, 3}
    with pytest.raises(InputError, match="no class '10'"):
        load("digits", classes="10")
    without_a_test = Dataset(
        "x", np.zeros((2, 1, 1, 1), np.uint8), np.array([0, 1]), np.zeros((1, 1, 1, 1), np.uint8), np.array([1]),
        ("a", "b"), "here",
    )  # fmt: skip
    with pytest.raises(InputError, match="the test split is empty"):
        from minivit.data.dataset import check_dataset

        check_dataset(with_classes(without_a_test, "a"))
