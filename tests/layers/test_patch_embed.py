"""patch_embed: where each pixel goes, what is broadcast, and the fixed sine-cosine embedding."""

import math

import numpy as np
import pytest

from minivit.base.backend import plain
from minivit.layers.patch_embed import patch_embed_backward, patch_embed_forward, patchify, unpatchify
from minivit.options.positions import sincos2d


def test_patches_are_read_row_by_row_in_the_order_row_column_channel():
    images = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    for b in range(2):
        for n in range(6):
            row, column = 2 * (n // 3), 2 * (n % 3)
            np.testing.assert_array_equal(patches[b, n], images[b, row : row + 2, column : column + 2].ravel())
    np.testing.assert_array_equal(unpatchify(patches, images.shape, 2), images)


def test_equation_1():
    rng = np.random.default_rng(0)
    images, W, b = rng.standard_normal((3, 4, 4, 2)), rng.standard_normal((8, 5)), rng.standard_normal(5)
    cls_token, pos_embed = rng.standard_normal((1, 1, 5)), rng.standard_normal((1, 5, 5))
    z, cache = patch_embed_forward(images, W, b, cls_token, pos_embed, patch_size=2)
    np.testing.assert_allclose(z[:, 0], np.broadcast_to(cls_token[0] + pos_embed[:, 0], (3, 5)))
    np.testing.assert_allclose(z[:, 1:], patchify(images, 2) @ W + b + pos_embed[:, 1:])
    dz = rng.standard_normal(z.shape)
    dimages, _, _, dcls_token, dpos_embed = patch_embed_backward(dz, cache)
    np.testing.assert_allclose(dcls_token, dz[:, :1].sum(axis=0, keepdims=True))  # summed over the batch
    np.testing.assert_allclose(dpos_embed, dz.sum(axis=0, keepdims=True))
    assert dimages.shape == images.shape


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bytes_are_scaled_to_minus_one_and_one(dtype):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 4, 4, 2), dtype=np.uint8)
    images[0, 0, 0] = 0, 255
    scaled = (images.astype(dtype) - 127.5) / dtype(127.5)
    assert scaled.min() == -1 and scaled.max() == 1
    W, b = rng.standard_normal((8, 5)).astype(dtype), np.zeros(5, dtype)
    tokens = rng.standard_normal((1, 1, 5)).astype(dtype), rng.standard_normal((1, 5, 5)).astype(dtype)
    with plain():
        (z, cache), (expected, of_numbers) = (
            patch_embed_forward(x, W, b, *tokens, patch_size=2) for x in (images, scaled)
        )
    assert z.dtype == dtype
    np.testing.assert_array_equal(z, expected)
    for found, true in zip(patch_embed_backward(z, cache), patch_embed_backward(z, of_numbers), strict=True):
        np.testing.assert_array_equal(found, true)  # dimages too, which is by the scaled pixels


def test_the_twin_makes_no_gradient_of_bytes():
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (3, 4, 4, 2), dtype=np.uint8)
    arguments = [rng.standard_normal(shape) for shape in ((8, 5), (5,), (1, 1, 5), (1, 5, 5))]
    z, cache = patch_embed_forward(images, *arguments, patch_size=2)
    with plain():
        expected, book = patch_embed_forward(images, *arguments, patch_size=2)
    np.testing.assert_allclose(z, expected, rtol=1e-13, atol=1e-14)
    dimages, *gradients = patch_embed_backward(z, cache)
    assert dimages is None
    for found, true in zip(gradients, patch_embed_backward(z, book)[1:], strict=True):
        np.testing.assert_allclose(found, true, rtol=1e-12, atol=1e-13)


def test_without_a_class_token_there_are_patches_alone():
    nothing, positions = np.zeros((1, 0, 3)), np.zeros((1, 4, 3))
    z, cache = patch_embed_forward(
        np.ones((1, 2, 2, 1)), np.ones((1, 3)), np.zeros(3), nothing, positions, patch_size=1
    )
    assert z.shape == (1, 4, 3)
    assert patch_embed_backward(z, cache)[3].shape == (1, 0, 3)


def test_sincos2d_by_its_formula():
    table = sincos2d(3, 8, prefix_tokens=1)
    assert table.shape == (1, 10, 8)
    np.testing.assert_array_equal(table[0, 0], 0.0)
    for row in range(3):
        for column in range(3):
            parts = ((math.sin, column), (math.cos, column), (math.sin, row), (math.cos, row))
            expected = [f(c * w) for f, c in parts for w in (1.0, 1e-4)]
            np.testing.assert_allclose(table[0, 1 + 3 * row + column], expected, atol=1e-15)
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos2d(3, 6)
