"""flash_attention: the same function as attention, whatever the blocks, in memory that grows with N, not N^2."""

import tracemalloc

import numpy as np
import pytest

from minivit.base.backend import plain
from minivit.layers.dropout import dropout_forward
from minivit.model import ViT, ViTConfig, attention_map
from minivit.options import flash_attention
from minivit.options.flash_attention import FlashAttentionCache, flash_attention_backward, flash_attention_forward


@pytest.mark.parametrize("order", [1, -1])
def test_scores_of_any_size_do_not_overflow(order):
    """The maximum rises, or falls, by thousands from block to block."""
    k = np.linspace(-3000.0, 3000.0, 7)[::order, None]
    q, v = np.array([[1.0], [-1.0], [0.0]]), np.arange(7.0)[:, None]
    with np.errstate(all="raise", under="ignore"):
        y, cache = flash_attention_forward(q, k, v, keys=2)
        gradients = flash_attention_backward(np.ones_like(y), cache)
    np.testing.assert_array_equal(y[:2, 0], [6.0, 0.0][::order])
    assert y[2] == pytest.approx(3.0) and all(np.isfinite(g).all() for g in gradients)


def test_each_block_has_a_mask_of_its_own_which_is_that_of_the_backward():
    q, k = np.zeros((2, 1, 1, 600, 4))
    v = np.eye(600)[None, None]  # y is the dropped map itself
    y, cache = flash_attention_forward(q, k, v, rate=0.5, rng=np.random.default_rng(0), keys=300)
    kept = y[0, 0] != 0
    assert 0.48 < kept.mean() < 0.52 and not np.array_equal(kept[:, :300], kept[:, 300:])
    np.testing.assert_allclose(y[0, 0][kept], 2.0 / 600)
    _, _, dv = flash_attention_backward(np.eye(600)[None, None], cache)  # dv is the transposed map
    np.testing.assert_array_equal(dv[0, 0].T != 0, kept)
    again, _ = flash_attention_forward(q, k, v, rate=0.5, rng=np.random.default_rng(1), keys=300)
    assert not np.array_equal(again, y)


def test_a_block_draws_its_mask_from_the_stream_of_the_seed_and_its_first_key():
    """[seed, first key], written out: another order would change every run with dropout that was ever made."""
    q, k = np.zeros((2, 5, 4))
    y, _ = flash_attention_forward(q, k, np.eye(5), rate=0.5, rng=np.random.default_rng(7), keys=2)
    seed = int(np.random.default_rng(7).integers(1 << 63))
    masks = [
        dropout_forward(np.ones((5, keys)), rate=0.5, rng=np.random.default_rng([seed, start]))[0]
        for start, keys in ((0, 2), (2, 2), (4, 1))
    ]
    np.testing.assert_allclose(y, np.concatenate(masks, axis=1) / 5)


def test_memory_grows_with_the_tokens_not_with_their_square():
    def peak(n):
        q, k, v, dy = np.random.default_rng(0).standard_normal((4, 1, 1, n, 8), dtype=np.float32)
        tracemalloc.start()
        _, cache = flash_attention_forward(q, k, v, keys=64)
        flash_attention_backward(dy, cache)
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(2000) < 2.2 * peak(1000)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_long_sequences_take_it_and_agree(monkeypatch, qk_norm):
    config = ViTConfig(
        image_size=4, patch_size=2, channels=1, width=12, depth=2, num_heads=3, mlp_dim=5, qk_norm=qk_norm
    )  # fmt: skip
    assert flash_attention.LONG > 197  # the paper's models at 224 pixels keep their maps
    rng = np.random.default_rng(3)
    flat = 0.3 * rng.standard_normal(ViT(config).flat.size)
    images, dlogits = rng.standard_normal((2, 4, 4, 1)), rng.standard_normal((2, 10))

    def everything():
        model = ViT(config, flat=flat)
        with plain():
            logits, cache = model.forward(images)
            gradient, grads = model.gradient_buffer()
            dimages = model.backward(dlogits, cache, grads)
            maps = attention_map(cache.blocks[0])
        attention = cache.blocks[0].msa.attention
        return attention.attention if qk_norm else attention, [logits, gradient, dimages, maps]

    _, expected = everything()
    monkeypatch.setattr(flash_attention, "LONG", 5)
    cache, found = everything()
    assert isinstance(cache, FlashAttentionCache)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)
    monkeypatch.setattr(flash_attention, "LONG", 6)
    assert not isinstance(everything()[0], FlashAttentionCache)
