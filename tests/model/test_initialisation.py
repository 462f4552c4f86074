"""Initialisations, by the products they promise."""

import numpy as np
import pytest

from minivit import ViT, ViTConfig
from minivit.data import load
from minivit.layers.patch_embed import patchify
from minivit.model import feature_map, initialisation, pixels

CONFIG = ViTConfig(image_size=8, patch_size=4, width=96, depth=2, num_heads=3, mlp_dim=20)


def test_mimetic_attention_resembles_identities():
    model, before = ViT(CONFIG, dtype=np.float64), ViT(CONFIG, dtype=np.float64)
    initialisation.mimetic(model, seed=3)
    D, Dh = 96, 32
    for i in range(2):
        qkv, proj = (model.params[f"blocks.{i}.attn.{name}.weight"] for name in ("qkv", "proj"))
        q, k, v = np.split(qkv, 3, axis=1)
        product = v @ proj
        noise = (product + 0.4 * np.eye(D)) / 0.4 * np.sqrt(D)
        assert abs(noise.mean()) < 0.05 and noise.std() == pytest.approx(1.0, abs=0.03)
        np.testing.assert_allclose(np.linalg.norm(v, axis=0), np.linalg.norm(proj, axis=1), rtol=1e-8)  # S^(1/2) each
        for head in range(3):
            columns = slice(head * Dh, (head + 1) * Dh)
            score = q[:, columns] @ k[:, columns].T
            assert np.linalg.matrix_rank(score) == Dh
            assert np.trace(score) > 0.2 * 0.7 * D  # of rank D / 3, the best approximation keeps some of it
            assert np.linalg.norm(q[:, columns]) == pytest.approx(np.linalg.norm(k[:, columns]))
    heads = [model.params["blocks.0.attn.qkv.weight"][:, i * Dh : (i + 1) * Dh] for i in range(2)]
    assert not np.allclose(*heads)
    changed = {name for name in model.params if not np.array_equal(model.params[name], before.params[name])}
    assert changed == {f"blocks.{i}.attn.{name}.weight" for i in range(2) for name in ("qkv", "proj")}
    again, other = ViT(CONFIG, dtype=np.float64), ViT(CONFIG, dtype=np.float64)
    initialisation.mimetic(again, seed=3)
    initialisation.mimetic(other, seed=4)
    np.testing.assert_array_equal(again.flat, model.flat)
    assert not np.allclose(other.flat, model.flat)


@pytest.mark.parametrize("width", [96, 24])
def test_whitened_patches_have_no_preferred_direction(width):
    rng = np.random.default_rng(0)
    base = rng.integers(0, 200, (400, 1, 1, 3)) + rng.integers(0, 56, (400, 8, 8, 3))  # mostly brightness
    images = base.astype(np.uint8)
    model = ViT(ViTConfig(image_size=8, patch_size=4, width=width, depth=1, num_heads=3, mlp_dim=8), dtype=np.float64)
    before = model.flat.copy()
    initialisation.whiten(model, images, np.zeros(len(images), int), seed=1)
    x = patchify(pixels(images, np.float64), 4).reshape(-1, 48)
    assert np.linalg.cond(np.cov(x.T)) > 100
    z = x @ model.params["patch_embed.proj.weight"] + model.params["patch_embed.proj.bias"]
    np.testing.assert_allclose(z.mean(axis=0), 0.0, atol=1e-9)
    variances = np.linalg.eigvalsh(z.T @ z / len(z))[-min(48, width) :]
    kept = min(48, width)
    L = np.linalg.eigvalsh(np.cov(x.T, bias=True))[-kept:]
    expected = np.sort(L / (L + 1e-2 * L.mean())) * width / kept
    np.testing.assert_allclose(variances, expected, rtol=1e-6)
    assert variances.min() > 0.75 * variances.max()
    assert (model.flat != before).sum() == 48 * width + width  # nothing else has changed


def test_behind_a_stem_the_patches_of_its_maps_are_whitened():
    images = np.random.default_rng(0).integers(0, 256, (130, 16, 16, 3), dtype=np.uint8)  # two parts of 64, and two
    config = ViTConfig(
        image_size=16, patch_size=2, stem="root", stem_width=8, stem_groups=2, width=40, depth=1, num_heads=2
    )
    model = ViT(config, dtype=np.float64)
    initialisation.whiten(model, images, np.zeros(len(images), int), seed=1)
    x = patchify(feature_map(model, images), 2).reshape(-1, 32)
    z = x @ model.params["patch_embed.proj.weight"] + model.params["patch_embed.proj.bias"]
    np.testing.assert_allclose(z.mean(axis=0), 0.0, atol=1e-9)
    variances = np.linalg.eigvalsh(z.T @ z / len(z))[-32:]
    assert variances.min() > 0.7 * variances.max()


def test_the_moments_of_parts_are_those_of_the_whole():
    x = np.random.default_rng(0).standard_normal((41, 7)) * 3 + 5
    mean, covariance = initialisation.moments([x])
    np.testing.assert_array_equal(mean, x.mean(axis=0))  # to the bit: trainings are to stay as they were
    centred = x - x.mean(axis=0)
    np.testing.assert_array_equal(covariance, centred.T @ centred / 41)
    for ends in ([0, 40, 41], [0, 1, 41], [0, 9, 18, 27, 41]):
        parts = [x[i:j] for i, j in zip(ends, ends[1:], strict=False)]
        for found, expected in zip(initialisation.moments(parts), (mean, covariance), strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


W_AND_B = {"patch_embed.proj.weight", "patch_embed.proj.bias"}


def test_images_are_taken_a_part_at_a_time(monkeypatch):
    """Of a size that depends on theirs; a part and the whole give the same patch embedding."""
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    made, seen, real = [], [], initialisation.pixels
    monkeypatch.setattr(initialisation, "pixels", lambda part, dtype: seen.append(len(part)) or real(part, dtype))
    for numbers in (initialisation.WHITENING_PART, 13 * 192, 1):
        monkeypatch.setattr(initialisation, "WHITENING_PART", numbers)
        made.append(ViT(CONFIG, dtype=np.float64))
        initialisation.whiten(made[-1], images, np.arange(30) % 10, seed=1)
    assert seen == [30, 13, 13, 4] + 30 * [1]
    name = "patch_embed.proj"  # what is made of eigenvectors, whose signs LAPACK may choose anew for each rounding
    for other in made[1:]:
        W, V = (each.params[f"{name}.weight"] for each in (made[0], other))
        np.testing.assert_allclose(V @ V.T, W @ W.T, rtol=0, atol=1e-11 * (W**2).sum())
        np.testing.assert_allclose(V @ other.params[f"{name}.bias"], W @ made[0].params[f"{name}.bias"], atol=1e-9)
        for key in other.params.keys() - W_AND_B:
            np.testing.assert_array_equal(other.params[key], made[0].params[key])
    assert 2048 * 32 * 32 * 3 < 1 << 23  # CIFAR's are taken together


def test_images_that_come_class_by_class_are_whitened_as_if_they_were_shuffled(monkeypatch):
    monkeypatch.setattr(initialisation, "WHITENING_IMAGES", 100)
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 60)
    images = (10 * labels[:, None, None, None] + rng.integers(0, 120, (600, 8, 8, 3))).astype(np.uint8)
    x = patchify(pixels(images, np.float64), 4).reshape(-1, 48)

    def variances(order):
        model = ViT(CONFIG, dtype=np.float64)
        initialisation.whiten(model, images[order], labels[order], seed=1)
        z = x @ model.params["patch_embed.proj.weight"] + model.params["patch_embed.proj.bias"]
        assert np.abs(z.mean(axis=0)).max() < 0.3  # of variances about 1; several, if it saw but two of the classes
        return np.linalg.eigvalsh(np.cov(z.T))[-48:]

    by_class, shuffled = variances(np.arange(600)), variances(rng.permutation(600))
    np.testing.assert_allclose(by_class, shuffled, rtol=0.25)


def test_which_images_are_whitened():
    """The first ones, unless classes follow one another in any order."""
    rows, labels = initialisation.whitening_rows, np.repeat([3, 0, 2, 1], 1500)
    np.testing.assert_array_equal(rows(labels, 4), np.arange(2048) * 6000 // 2048)
    np.testing.assert_array_equal(np.bincount(labels[rows(labels, 4)]), 4 * [512])
    for others in (np.tile([3, 0, 2, 1], 1500), np.zeros(6000, int), load("digits").train_labels):
        np.testing.assert_array_equal(rows(others, 10), np.arange(min(len(others), 2048)))
    np.testing.assert_array_equal(rows(labels[1000:2600], 4), np.arange(1600))
