"""attention and msa: against loops over heads and tokens written from the equations, and the exact identities."""

import math
from functools import partial

import numpy as np

from minivit.base.pairs import Pair
from minivit.kernels import cpu
from minivit.layers.attention import attention_backward, attention_forward
from minivit.layers.layernorm import layernorm_forward
from minivit.layers.msa import msa_backward, msa_forward, split_heads
from minivit.options.qk_norm import normed_attention_backward, normed_attention_forward


def test_equations_6_and_7_by_loops():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 3, 5, 4))
    y, cache = attention_forward(q, k, v)
    for b in range(2):
        for h in range(3):
            for i in range(5):
                weights = [math.exp(sum(q[b, h, i] * k[b, h, j]) / math.sqrt(4)) for j in range(5)]
                expected = sum(w * v[b, h, j] for j, w in enumerate(weights)) / sum(weights)
                np.testing.assert_allclose(y[b, h, i], expected, rtol=1e-12)
    np.testing.assert_allclose(cache.attn.sum(axis=-1), 1.0)


def test_more_keys_than_queries():
    rng = np.random.default_rng(1)
    q, k, v = rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 7, 4)), rng.standard_normal((2, 7, 4))
    y, cache = attention_forward(q, k, v)
    assert y.shape == (2, 3, 4)
    assert [g.shape for g in attention_backward(np.ones_like(y), cache)] == [q.shape, k.shape, v.shape]


def test_gradients_are_written_where_asked():
    rng = np.random.default_rng(2)
    q, k, v = rng.standard_normal((3, 2, 3, 5, 4))
    y, cache = cpu.attention_forward(q, k, v)
    dy = rng.standard_normal(y.shape)
    expected = attention_backward(dy, attention_forward(q, k, v)[1])
    fused = np.empty((2, 5, 36))
    got = cpu.attention_backward(dy, cache, out=tuple(split_heads(fused, 3)))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(fused[:, :, :12].reshape(2, 5, 3, 4).transpose(0, 2, 1, 3), got[0])


def test_msa_by_loops_over_heads():
    """Eq. 5-8 with each head's matrices cut out by hand."""
    rng = np.random.default_rng(3)
    B, N, D, h = 2, 5, 12, 3
    x, Wqkv, bqkv = rng.standard_normal((B, N, D)), rng.standard_normal((D, 3 * D)), rng.standard_normal(3 * D)
    Wproj, bproj = rng.standard_normal((D, D)), rng.standard_normal(D)
    y, _ = msa_forward(x, Wqkv, bqkv, Wproj, bproj, num_heads=h)
    heads = []
    for i in range(h):
        q, k, v = (x @ Wqkv[:, s : s + 4] + bqkv[s : s + 4] for s in (4 * i, D + 4 * i, 2 * D + 4 * i))
        scores = np.exp(q @ k.transpose(0, 2, 1) / 2.0)
        heads.append(scores / scores.sum(axis=2, keepdims=True) @ v)
    np.testing.assert_allclose(y, np.concatenate(heads, axis=2) @ Wproj + bproj, rtol=1e-10)


def test_the_key_bias_has_no_gradient_and_no_effect():
    rng = np.random.default_rng(4)
    D = 12
    x, Wqkv, bqkv = rng.standard_normal((2, 5, D)), 0.3 * rng.standard_normal((D, 3 * D)), rng.standard_normal(3 * D)
    Wproj, bproj = rng.standard_normal((D, D)), rng.standard_normal(D)
    y, cache = msa_forward(x, Wqkv, bqkv, Wproj, bproj, num_heads=3)
    _, _, dbqkv, *_ = msa_backward(rng.standard_normal(y.shape), cache)
    assert np.abs(dbqkv[D : 2 * D]).max() < 1e-13 < 1e-2 < np.abs(dbqkv[:D]).max()
    bqkv[D : 2 * D] += 10.0
    np.testing.assert_allclose(msa_forward(x, Wqkv, bqkv, Wproj, bproj, num_heads=3)[0], y, rtol=1e-10)


def test_qk_norm_by_loops_over_heads():
    rng = np.random.default_rng(6)
    h, Dh, D = 3, 4, 12
    x, Wqkv, bqkv = rng.standard_normal((2, 5, D)), rng.standard_normal((D, 3 * D)), rng.standard_normal(3 * D)
    wq, bq, wk, bk = rng.standard_normal((4, Dh))
    attend = Pair(partial(normed_attention_forward, eps=0.1), normed_attention_backward)
    y, cache = msa_forward(x, Wqkv, bqkv, np.eye(D), np.zeros(D), wq, bq, wk, bk, num_heads=h, attend=attend)
    for i in range(h):
        q, k, v = (x @ Wqkv[:, s : s + Dh] + bqkv[s : s + Dh] for s in range(i * Dh, 3 * D, D))
        q, k = (layernorm_forward(a, w, b, eps=0.1)[0] for a, w, b in ((q, wq, bq), (k, wk, bk)))
        scores = np.exp(q @ k.transpose(0, 2, 1) / 2.0)
        expected = scores / scores.sum(axis=2, keepdims=True) @ v
        np.testing.assert_allclose(y[..., i * Dh : (i + 1) * Dh], expected, rtol=1e-10)
    gradients = msa_backward(rng.standard_normal(y.shape), cache, attend=attend)
    assert np.abs(gradients[8]).max() < 1e-13 < 1e-2 < np.abs(gradients[7]).max()  # the bias of the keys' LayerNorm
    assert np.abs(gradients[2][D : 2 * D]).max() > 1e-3  # that of the keys themselves has an effect now


def test_permuting_tokens_permutes_the_output():
    rng = np.random.default_rng(5)
    x, order = rng.standard_normal((2, 5, 12)), rng.permutation(5)
    args = (
        rng.standard_normal((12, 36)),
        rng.standard_normal(36),
        rng.standard_normal((12, 12)),
        rng.standard_normal(12),
    )
    y, _ = msa_forward(x, *args, num_heads=3)
    np.testing.assert_allclose(msa_forward(x[:, order], *args, num_heads=3)[0], y[:, order], rtol=1e-10)
