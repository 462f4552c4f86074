"""Random crops, flips, affine maps and erasing against images made one by one."""

import zlib

import numpy as np
import pytest

from minivit.data import (
    augment,
    random_affine,
    random_crop,
    random_erasing,
    random_flip,
    trivial_augment,
)


@pytest.fixture
def images():
    return np.random.default_rng(1).integers(1, 256, (37, 5, 7, 3), dtype=np.uint8)  # no zero pixel


@pytest.mark.parametrize("padding", [1, 2, 4])
def test_crop_is_a_window_of_the_padded_image(images, padding):
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
    for function in (
        lambda x, rng: random_crop(x, 2, rng),
        lambda x, rng: random_crop(x, 2, rng, mode="reflect"),
        random_flip,
    ):
        result = function(view, np.random.default_rng(2))
        np.testing.assert_array_equal(result, function(view.copy(), np.random.default_rng(2)))


def test_augment_crops_then_flips(images):
    result = augment(images, np.random.default_rng(3), crop_padding=2, flip=True)
    rng = np.random.default_rng(3)
    np.testing.assert_array_equal(result, random_flip(random_crop(images, 2, rng), rng))
    assert augment(images, np.random.default_rng(3)) is images


def test_one_image_and_none():
    for n in (0, 1):
        images = np.ones((n, 4, 4, 1), np.uint8)
        for settings in (
            {"crop_padding": 1, "flip": True},
            {"crop_padding": 3, "crop_mode": "reflect", "erasing": 1.0},
        ):
            assert augment(images, np.random.default_rng(0), **settings).shape == images.shape


def affine_by_hand(image, angle, scale, slant, shift):
    """One image, pixel by pixel, from the formula in the docstring."""
    H, W, C = image.shape
    centre = np.array([(H - 1) / 2, (W - 1) / 2])
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = np.diag(scale) @ rotation @ np.array([[1, 0], [slant, 1]])
    result = np.zeros(image.shape)
    for row in range(H):
        for column in range(W):
            y, x = matrix @ (np.array([row, column]) - centre) + shift + centre
            for j in (int(np.floor(y)), int(np.floor(y)) + 1):
                for i in (int(np.floor(x)), int(np.floor(x)) + 1):
                    if 0 <= j < H and 0 <= i < W:
                        result[row, column] += (1 - abs(y - j)) * (1 - abs(x - i)) * image[j, i]
    return result


def test_affine_is_its_formula(images):
    before = images.copy()
    result = random_affine(images, np.random.default_rng(3), rotate=40, zoom=0.3, shear=0.2, shift=1.5)
    assert result.dtype == np.uint8 and result.shape == images.shape
    np.testing.assert_array_equal(images, before)
    rng, B = np.random.default_rng(3), len(images)
    angle = np.deg2rad(rng.uniform(-40, 40, B))
    scale = 1 + rng.uniform(-0.3, 0.3, (2, B))
    slant = rng.uniform(-0.2, 0.2, B)
    shift = rng.uniform(-1.5, 1.5, (2, B))
    for i in range(B):
        expected = affine_by_hand(images[i], angle[i], scale[:, i], slant[i], shift[:, i])
        assert np.abs(result[i] - expected).max() <= 0.5001


def test_affine_of_nothing_is_the_image_itself(images):
    np.testing.assert_array_equal(random_affine(images, np.random.default_rng(0)), images)


def test_a_whole_pixel_shift_moves_the_image(images):
    class Ends:  # a Generator whose draws are all at the upper end
        def uniform(self, low, high, size):
            return np.full(size, float(high))

    result = random_affine(images, Ends(), shift=1.0)
    np.testing.assert_array_equal(result[:, :-1, :-1], images[:, 1:, 1:])
    assert not result[:, -1].any() and not result[:, :, -1].any()
    far = random_affine(images, Ends(), shift=50.0)
    assert not far.any()


def test_augment_takes_the_affine_settings(images):
    result = augment(images, np.random.default_rng(3), rotate=40, zoom=0.3, shear=0.2, shift=1.5)
    expected = random_affine(images, np.random.default_rng(3), rotate=40, zoom=0.3, shear=0.2, shift=1.5)
    np.testing.assert_array_equal(result, expected)


def test_erasing_fills_a_rectangle_with_noise():
    images = np.full((4000, 32, 24, 3), 255, np.uint8)
    before = images.copy()
    result = random_erasing(images, 0.25, np.random.default_rng(0))
    np.testing.assert_array_equal(images, before)
    changed = (result != images).any(axis=3)
    erased = np.flatnonzero(changed.any(axis=(1, 2)))
    assert abs(len(erased) / 4000 - 0.25) < 0.03
    areas, ratios, noise = [], [], []
    for i in erased:
        rows, columns = np.flatnonzero(changed[i].any(axis=1)), np.flatnonzero(changed[i].any(axis=0))
        box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert changed[i][box].mean() > 0.99  # noise is hardly ever 255 in all three channels
        areas.append(changed[i][box].size / (32 * 24))
        ratios.append(len(rows) / len(columns))
        noise.append(result[i][box].ravel())
    assert 0.01 < min(areas) and max(areas) < 0.36 and abs(np.mean(areas) - (0.02 + 1 / 3) / 2) < 0.01
    assert abs(np.median(ratios) - 1) < 0.1 and np.quantile(ratios, 0.02) < 0.4 and np.quantile(ratios, 0.98) > 2.6
    assert changed[erased].any(axis=0).all()  # no place is spared
    counts = np.bincount(np.concatenate(noise), minlength=256)
    np.testing.assert_allclose(counts / counts.sum(), 1 / 256, rtol=0.1)


def test_erasing_all_none_and_tiny_images(images):
    assert random_erasing(images, 0.0, np.random.default_rng(0)) is images
    assert (random_erasing(images, 1.0, np.random.default_rng(0)) != images).any(axis=(1, 2, 3)).all()
    assert random_erasing(np.zeros((9, 1, 1, 1), np.uint8), 1.0, np.random.default_rng(0)).any()
    assert random_erasing(images[:0], 1.0, np.random.default_rng(0)).shape == (0, 5, 7, 3)


def test_augment_goes_from_policy_to_erasing(images):
    settings = {"crop_padding": 2, "flip": True, "rotate": 9.0, "erasing": 0.5}
    result = augment(images, np.random.default_rng(3), policy="trivial", **settings)
    rng = np.random.default_rng(3)
    expected = random_affine(trivial_augment(images, rng), rng, rotate=9.0)
    expected = random_flip(random_crop(expected, 2, rng), rng)
    np.testing.assert_array_equal(result, random_erasing(expected, 0.5, rng))


@pytest.mark.parametrize("padding", [1, 2, 4])
def test_reflected_crop_is_a_window_of_the_mirrored_image(images, padding):
    before = images.copy()
    result = random_crop(images, padding, np.random.default_rng(5), mode="reflect")
    down, right = np.random.default_rng(5).integers(0, 2 * padding + 1, size=(2, len(images)))  # as with black edges
    for i, image in enumerate(images):
        padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode="reflect")
        np.testing.assert_array_equal(result[i], padded[down[i] : down[i] + 5, right[i] : right[i] + 7])
    assert result.dtype == np.uint8 and result.shape == images.shape
    np.testing.assert_array_equal(images, before)


def test_both_crops_show_the_same_part_of_the_image(images):
    black, mirrored = (random_crop(images, 3, np.random.default_rng(1), mode=mode) for mode in ("zero", "reflect"))
    inside = black != 0  # no pixel of an image is 0
    assert 0.2 < inside.mean() < 0.9
    np.testing.assert_array_equal(mirrored[inside], black[inside])
    assert (mirrored != 0).all()


def test_crops_that_cannot_be(images):
    with pytest.raises(ValueError, match="unknown mode 'wrap'"):
        random_crop(images, 1, np.random.default_rng(0), mode="wrap")
    for padding in (5, 6):
        with pytest.raises(ValueError, match="images of 5x7 cannot be reflected over"):
            random_crop(images, padding, np.random.default_rng(0), mode="reflect")


def test_augment_crops_by_reflection_and_erases_last(images):
    settings = {"crop_padding": 2, "crop_mode": "reflect", "flip": True, "erasing": 0.5}
    result = augment(images, np.random.default_rng(3), **settings)
    rng = np.random.default_rng(3)
    expected = random_flip(random_crop(images, 2, rng, mode="reflect"), rng)
    np.testing.assert_array_equal(result, random_erasing(expected, 0.5, rng))


def test_settings_that_are_off_draw_nothing(images):
    rng = np.random.default_rng(3)
    assert augment(images, rng, erasing=0.0, crop_mode="reflect", crop_padding=0) is images
    assert rng.bit_generator.state == np.random.default_rng(3).bit_generator.state


def test_images_are_those_of_earlier_versions():
    """The numbers drawn for what there was before are the same: a checksum of images made then."""
    images = (np.arange(576) % 251).astype(np.uint8).reshape(3, 8, 8, 3)
    settings = {"policy": "rand", "crop_padding": 2, "flip": True, "erasing": 0.5}
    assert zlib.crc32(augment(images, np.random.default_rng(7), **settings)) == 1062602706
