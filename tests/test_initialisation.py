"""Initialisations, by the products they promise."""

import numpy as np
import pytest

from minivit import ViT, ViTConfig, initialisation
from minivit.layers.patch_embed import patchify
from minivit.model import pixels

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
    initialisation.whiten(model, images, seed=1)
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
    initialisation.whiten(model, images, seed=1)
    x = patchify(model.feature_map(images)[0], 2).reshape(-1, 32)
    z = x @ model.params["patch_embed.proj.weight"] + model.params["patch_embed.proj.bias"]
    np.testing.assert_allclose(z.mean(axis=0), 0.0, atol=1e-9)
    variances = np.linalg.eigvalsh(z.T @ z / len(z))[-32:]
    assert variances.min() > 0.7 * variances.max()
