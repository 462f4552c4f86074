"""The hybrids live against timm and Flax. What needs them runs with: python -m pytest -m torch"""

import numpy as np
import pytest
from conftest import load_script

from minivit import ViT, ViTConfig

CONFIG = ViTConfig(  # R26 in full, a small transformer behind it
    image_size=64, patch_size=1, stem="2,2,2,2", width=48, depth=1, num_heads=3, mlp_dim=64, num_classes=7
)  # fmt: skip


def reference(source):
    """The class of tools/make_reference.py that runs another library's model."""
    return getattr(load_script("make_reference"), source)


def problem(gelu):
    """(model, images, labels) in float64, away from the zeros of the initialisation."""
    model = ViT(ViTConfig(**{**vars(CONFIG), "gelu": gelu}), dtype=np.float64)
    rng = np.random.default_rng(0)
    for value in model.params.values():
        if value.ndim != 4:
            value += 0.2 * rng.standard_normal(value.shape)
    return model, rng.standard_normal((2, 64, 64, 3)), np.array([3, 6])


def apart(ours, theirs):
    """The largest difference, relative to the largest entry."""
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.torch
@pytest.mark.parametrize(("source", "gelu"), [("TimmReference", "erf"), ("FlaxReference", "tanh")])
def test_logits_of_an_r26_hybrid(source, gelu):
    model, images, labels = problem(gelu)
    theirs, _, _ = reference(source)(vars(model.config), images, labels, 0.0).forward(model.params)
    assert apart(model.predict(images), theirs) < 1e-12
    narrow = ViT(model.config, flat=model.flat.astype(np.float32))
    assert apart(narrow.predict(images.astype(np.float32)), theirs) < 1e-4


@pytest.mark.torch
def test_timms_own_numbers_make_a_small_difference():
    """As timm builds it: another eps in GroupNorm, and one in the kernels that is added to the variance."""
    import timm
    import torch

    model, images, labels = problem("erf")
    theirs = timm.create_model(
        "vit_small_r26_s32_224", img_size=64, embed_dim=48, depth=1, num_heads=3, mlp_ratio=64 / 48, num_classes=7
    ).double()
    loader = reference("TimmReference")(vars(model.config), images, labels, 0.0)
    loader.model = theirs
    loader.load(model.params)  # every name of timm's is ours, and the other way round
    with torch.no_grad():
        logits = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    assert 1e-8 < apart(model.predict(images), logits) < 1e-3
