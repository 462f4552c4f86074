"""Resizing of positions and patch embeddings: against SciPy and PyTorch, and the facts that they promise.

The values are written by tools/make_reference.py, which needs those libraries; these tests need only the file.
"""

from pathlib import Path

import numpy as np
import pytest

from minivit.base.errors import InputError
from minivit.layers.patch_embed import patch_embed_forward, patchify
from minivit.weights.resize import KINDS, PATCHES, interpolation, resize_patch_embedding, resize_positions, resize_table

with np.load(Path(__file__).parent.parent / "data" / "resize.npz") as archive:
    REFERENCE = dict(archive)
RESIZED = [name for name in REFERENCE if name.split("/")[0] in KINDS]
PATCH_SIZES = [name for name in REFERENCE if name.startswith("pi/")]


def test_the_references_are_of_every_kind():
    assert {name.split("/")[0] for name in RESIZED} == set(KINDS) and len(RESIZED) == 12 * len(KINDS)


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("name", RESIZED)
def test_positions_as_other_libraries_resize_them(name, prefix):
    kind, sizes = name.split("/")
    old, new = map(int, sizes.split("-"))
    first = np.random.default_rng(prefix).standard_normal((1, prefix, 2))
    before = np.concatenate([first, REFERENCE[f"grid/{old}"].reshape(1, -1, 2)], axis=1)
    after = resize_positions(before, new, prefix_tokens=prefix, kind=kind)
    np.testing.assert_array_equal(after[:, :prefix], first)
    np.testing.assert_allclose(after[0, prefix:].reshape(new, new, 2), REFERENCE[name], rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", RESIZED)
def test_tables_of_rows_and_columns_as_the_grid_that_they_stand_for(name):
    kind, sizes = name.split("/")
    old, new = map(int, sizes.split("-"))
    x, y = (np.random.default_rng(seed).standard_normal((1, old, 3)) for seed in (1, 2))

    def grid(x, y):
        g = x.shape[1]
        return np.concatenate(np.broadcast_arrays(x[0], y[0][:, None]), axis=-1).reshape(1, g * g, 6)  # [x_b, y_a]

    made = grid(resize_table(x, new, kind), resize_table(y, new, kind))
    np.testing.assert_allclose(made, resize_positions(grid(x, y), new, prefix_tokens=0, kind=kind), rtol=0, atol=1e-13)
    assert resize_table(x.astype(np.float32), new, kind).dtype == np.float32


@pytest.mark.parametrize("kind", KINDS)
def test_the_matrices(kind):
    for n, o in [(1, 1), (1, 4), (4, 1), (3, 7), (7, 3), (8, 12), (12, 8), (24, 14)]:
        M = interpolation(n, o, kind)
        assert M.shape == (n, o)
        np.testing.assert_allclose(M.sum(axis=1), 1.0, atol=1e-14)  # what is constant stays so
        if kind != "align-corners":
            np.testing.assert_allclose(M, M[::-1, ::-1], atol=1e-14)  # left and right are alike
    for n in (1, 2, 9):
        np.testing.assert_array_equal(interpolation(n, n, kind), np.eye(n))
    corners = interpolation(9, 4, "align-corners")
    np.testing.assert_array_equal(corners[[0, -1]], np.eye(4)[[0, -1]])


def test_the_number_of_prefix_tokens_is_told_and_not_guessed():
    """196 tokens are a grid of 14 without a class token, 197 with one, which counting alone cannot always tell."""
    position = np.random.default_rng(0).standard_normal((1, 197, 3)).astype(np.float32)
    with_token = resize_positions(position, 24, prefix_tokens=1)
    without = resize_positions(position[:, 1:], 24, prefix_tokens=0)
    assert with_token.shape == (1, 577, 3) and without.shape == (1, 576, 3) and with_token.dtype == np.float32
    np.testing.assert_array_equal(with_token[:, 1:], without)
    np.testing.assert_array_equal(with_token[:, :1], position[:, :1])
    for tokens, prefix in [(197, 0), (196, 1), (12, 0), (3, 3), (1, 2)]:
        with pytest.raises(InputError, match=f"of {tokens} tokens, {prefix} of them .* no square grid"):
            resize_positions(np.zeros((1, tokens, 2)), 4, prefix_tokens=prefix)


def test_the_same_size_changes_no_bit_and_shares_no_memory():
    rng = np.random.default_rng(0)
    position, W = rng.standard_normal((1, 10, 3)).astype(np.float32), rng.standard_normal((48, 3)).astype(np.float32)
    for kind in KINDS:
        same = resize_positions(position, 3, prefix_tokens=1, kind=kind)
        np.testing.assert_array_equal(same, position)
        assert not np.shares_memory(same, position)
        same = resize_table(position, 10, kind)
        np.testing.assert_array_equal(same, position)
        assert not np.shares_memory(same, position)
    same = resize_patch_embedding(W, 4, channels=3)
    np.testing.assert_array_equal(same, W)
    assert not np.shares_memory(same, W)


def test_unknown_kinds():
    for kind in ("nearest", "pi", ""):
        with pytest.raises(InputError, match=f"must be one of align-corners, .*got '{kind}'"):
            interpolation(3, 4, kind)
    with pytest.raises(InputError, match="patch_resize must be one of pi, bilinear; got 'bicubic'"):
        resize_patch_embedding(np.zeros((48, 2)), 8, channels=3, kind="bicubic")


@pytest.mark.parametrize("name", PATCH_SIZES)
def test_patch_embeddings_as_the_pseudo_inverse_of_all_pixels_makes_them(name):
    old, new = map(int, name.removeprefix("pi/").split("-"))
    W = REFERENCE[f"patch/{old}"].reshape(-1, 2)
    made = resize_patch_embedding(W, new, channels=3)
    np.testing.assert_allclose(made, REFERENCE[name].reshape(-1, 2), rtol=0, atol=1e-12)
    assert resize_patch_embedding(W.astype(np.float32), new, channels=3).dtype == np.float32


def resized_patches(images, P, new):
    """Images whose patches were each resized by themselves."""
    B, H, _, C = images.shape
    M, g = interpolation(new, P, PATCHES), H // P
    patches = patchify(images, P).reshape(B, g, g, P, P, C)
    patches = np.einsum("ia,jb,Bxyabc->Bxyijc", M, M, patches)
    return patches.transpose(0, 1, 3, 2, 4, 5).reshape(B, g * new, g * new, C)


def tokens_of(images, W, b, patch_size):
    """The patches alone, without class token and positions."""
    nothing, zero = np.zeros((1, 0, len(b))), np.zeros((1, 1, len(b)))
    return patch_embed_forward(images, W, b, nothing, zero, patch_size=patch_size)


@pytest.mark.parametrize(("old", "new"), [(2, 3), (4, 6), (4, 8), (5, 7), (3, 16)])
def test_patches_that_grow_give_the_same_tokens(old, new):
    rng = np.random.default_rng(old)
    images = rng.standard_normal((2, 3 * old, 3 * old, 3))
    W, b = rng.standard_normal((old * old * 3, 5)), rng.standard_normal(5)
    tokens, _ = tokens_of(images, W, b, old)
    larger = resized_patches(images, old, new)

    def error(kind):
        made = resize_patch_embedding(W, new, channels=3, kind=kind)
        return np.abs(tokens_of(larger, made, b, new)[0] - tokens).max()

    assert error("pi") < 1e-11 < 0.1 < error("bilinear")


def test_smaller_patches_are_as_near_as_they_can_be():
    """B^T w* = w has no solution there: the pseudo-inverse gives the w* of the least squared difference."""
    rng = np.random.default_rng(1)
    M = interpolation(3, 5, PATCHES)
    B, w = np.kron(M, M), rng.standard_normal(25)
    made = resize_patch_embedding(w[:, None], 3, channels=1)[:, 0]
    np.testing.assert_allclose(made, np.linalg.lstsq(B.T, w, rcond=None)[0], atol=1e-12)
    plain = resize_patch_embedding(w[:, None], 3, channels=1, kind="bilinear")[:, 0]
    np.testing.assert_allclose(plain, B @ w, atol=1e-12)
    least = np.linalg.norm(B.T @ made - w)
    assert all(least < np.linalg.norm(B.T @ (made + 1e-3 * rng.standard_normal(9)) - w) for _ in range(5))
