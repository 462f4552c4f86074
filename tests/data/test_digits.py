"""The digits that ship: every byte as expected, split and scaled as documented."""

import hashlib

import numpy as np
import pytest

from minivit.base.errors import InputError
from minivit.data import load
from minivit.data.dataset import check_dataset


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def test_shapes_and_dtypes(digits):
    assert digits.name == "digits"
    assert digits.train_images.shape == (1437, 8, 8, 1) and digits.test_images.shape == (360, 8, 8, 1)
    assert digits.train_images.dtype == digits.test_images.dtype == np.uint8
    assert digits.train_labels.dtype == digits.test_labels.dtype == np.int64
    assert digits.class_names == tuple("0123456789")
    assert "10.24432/C50P49" in digits.source and "CC BY 4.0" in digits.source


def test_each_class_keeps_its_share(digits):
    total = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    test = np.bincount(digits.test_labels)
    assert (np.bincount(digits.train_labels) + test).tolist() == total
    assert np.abs(test - np.array(total) / 5).max() < 1


def test_pixels_and_split_are_the_known_ones(digits):
    images = np.concatenate([digits.train_images, digits.test_images])
    levels = np.unique(images)
    assert levels.tolist() == [round(level * 255 / 16 + 1e-9) for level in range(17)]
    assert np.searchsorted(levels, images).sum() == 561718  # the sum of the raw pixels, 0..16
    content = b"".join(np.ascontiguousarray(part).tobytes() for part in digits[1:5])
    assert hashlib.sha256(content).hexdigest() == "b27a17df94074adbcc9ffd158581ad0485759a21712f5009724ccc75d122bd8a"


def test_a_zero_is_round(digits):
    zero = digits.train_images[digits.train_labels == 0].mean(axis=0)[..., 0]
    assert zero[3:5, 3:5].max() < 60 < zero[3:5, 1:3].max()  # a hole with a rim: rows and columns are in order


def test_other_sizes():
    assert load("digits", image_size=8).train_images.shape == (1437, 8, 8, 1)
    assert load("digits", image_size=20).train_images.shape == (1437, 20, 20, 1)
    with pytest.raises(InputError, match="image size 0 is out of range"):
        load("digits", image_size=0)


def test_unknown_name_lists_the_names():
    with pytest.raises(InputError, match="digits, cifar10, cifar100, folder"):
        load("mnist")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            lambda d: {"test_labels": d.test_labels[:0], "test_images": d.test_images[:0]},
            "test split is empty",
        ),
        (lambda d: {"train_labels": d.train_labels[1:]}, r"\(1436,\) labels for \(1437, 8, 8, 1\)"),
        (lambda d: {"test_images": d.test_images[:, :7]}, r"each image of shape \(8, 8, 1\)"),
        (lambda d: {"train_images": d.train_images / 255}, "float64"),
        (lambda d: {"train_images": d.train_images[..., 0]}, r"uint8 \(1437, 8, 8\)"),
        (lambda d: {"test_labels": d.test_labels.astype(np.uint8)}, "uint8 labels"),
        (lambda d: {"test_labels": d.test_labels + 1}, "labels from 1 to 10; expected 0 to 9"),
        (lambda d: {"train_labels": d.train_labels - 1}, "labels from -1 to 8"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(digits, changed, message):
    assert check_dataset(digits) is digits
    with pytest.raises(InputError, match=message):
        check_dataset(digits._replace(**changed(digits)))
