"""Random crops and flips against pictures made one by one."""

import numpy as np
import pytest

from minivit.data import augment, random_crop, random_flip


@pytest.fixture
def images():
    return np.random.default_rng(1).integers(1, 256, (37, 5, 7, 3), dtype=np.uint8)  # no zero pixel


@pytest.mark.parametrize("padding", [1, 2, 4])
def test_crop_is_a_window_of_the_padded_picture(images, padding):
    before = images.copy()
    result = random_crop(images, padding, np.random.default_rng(5))
    down, right = np.random.default_rng(5).integers(0, 2 * padding + 1, size=(2, len(images)))
    for i, image in enumerate(images):
        padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
        expected = padded[down[i] : down[i] + 5, right[i] : right[i] + 7]
        np.testing.assert_array_equal(result[i], expected)
    assert result.dtype == np.uint8 and result.shape == images.shape
    np.testing.assert_array_equal(images, before)


def test_crop_reaches_every_offset():
    image = np.zeros((2000, 5, 5, 1), np.uint8)
    image[:, 2, 2] = 1
    result = random_crop(image, 1, np.random.default_rng(0))[..., 0]
    hits = result.sum(axis=0)
    assert hits.sum() == 2000
    inner = hits[1:4, 1:4]
    assert inner.sum() == 2000 and abs(inner - 2000 / 9).max() < 5 * np.sqrt(2000 / 9)


def test_flip_mirrors_about_half(images):
    images = np.concatenate([images] * 40)
    before = images.copy()
    result = random_flip(images, np.random.default_rng(5))
    same = (result == images).all(axis=(1, 2, 3))
    mirrored = (result == images[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert abs(mirrored.mean() - 0.5) < 0.05
    np.testing.assert_array_equal(images, before)


def test_inputs_need_not_be_contiguous(images):
    view = images[::2, ::-1]
    for function in (lambda x, rng: random_crop(x, 2, rng), random_flip):
        result = function(view, np.random.default_rng(2))
        np.testing.assert_array_equal(result, function(view.copy(), np.random.default_rng(2)))


def test_augment_crops_then_flips(images):
    result = augment(images, np.random.default_rng(3), crop_padding=2, flip=True)
    rng = np.random.default_rng(3)
    np.testing.assert_array_equal(result, random_flip(random_crop(images, 2, rng), rng))
    assert augment(images, np.random.default_rng(3)) is images


def test_one_picture_and_none():
    for n in (0, 1):
        images = np.ones((n, 4, 4, 1), np.uint8)
        assert augment(images, np.random.default_rng(0), crop_padding=1, flip=True).shape == images.shape
