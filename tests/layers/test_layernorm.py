"""layernorm: a worked example, its invariances, and the numbers that break the shortcut variance."""

import numpy as np

from minivit.layers.layernorm import layernorm_backward, layernorm_forward


def test_worked_example():
    x, w, b = np.array([[1.0, 3.0, 5.0, 7.0]]), np.array([1.0, 1.0, 2.0, 2.0]), np.array([0.0, 1.0, 0.0, 1.0])
    y, cache = layernorm_forward(x, w, b, eps=0.0)
    s = 5.0**-0.5  # mean 4, variance 5
    np.testing.assert_allclose(y, [[-3 * s, 1 - s, 2 * s, 1 + 6 * s]])
    dx, dw, db = layernorm_backward(np.array([[1.0, 0.0, 0.0, 0.0]]), cache)
    np.testing.assert_allclose(dw, [-3 * s, 0, 0, 0])
    np.testing.assert_allclose(db, [1, 0, 0, 0])
    # dx = s (dxhat - 1/4 - xhat mean(dxhat xhat)) with dxhat = (1, 0, 0, 0), xhat = s (-3, -1, 1, 3)
    np.testing.assert_allclose(dx, s * np.array([[0.3, -0.4, -0.1, 0.2]]), atol=1e-15)


def test_shift_and_scale_of_a_row_change_nothing_and_get_no_gradient():
    rng = np.random.default_rng(0)
    x, w, b = rng.standard_normal((3, 7)), rng.standard_normal(7), rng.standard_normal(7)
    y, cache = layernorm_forward(x, w, b, eps=0.0)
    np.testing.assert_allclose(layernorm_forward(5.0 * x + 2.0, w, b, eps=0.0)[0], y, rtol=1e-12)
    dx, *_ = layernorm_backward(rng.standard_normal((3, 7)), cache)
    np.testing.assert_allclose(dx.sum(axis=1), 0.0, atol=1e-13)  # orthogonal to a common shift
    centred = x - x.mean(axis=1, keepdims=True)
    np.testing.assert_allclose((dx * centred).sum(axis=1), 0.0, atol=1e-13)  # and to a common scale


def test_a_large_mean_does_not_cancel_in_float32():
    x = (1000.0 + np.random.default_rng(0).standard_normal((4, 64))).astype(np.float32)
    y, _ = layernorm_forward(x, np.ones(64, np.float32), np.zeros(64, np.float32))
    reference, _ = layernorm_forward(x.astype(np.float64), np.ones(64), np.zeros(64))
    assert np.abs(y - reference).max() < 2e-3  # E[x^2] - E[x]^2 would be off by 5e-2 and more


def test_a_constant_row_is_finite():
    y, cache = layernorm_forward(np.full((2, 5), 3.0), np.ones(5), np.zeros(5))
    np.testing.assert_array_equal(y, 0.0)
    assert np.isfinite(layernorm_backward(np.ones((2, 5)), cache)[0]).all()


def test_vectors_and_images_of_tokens_are_treated_alike():
    rng = np.random.default_rng(2)
    x, w, b, dy = (
        rng.standard_normal((6, 4)),
        rng.standard_normal(4),
        rng.standard_normal(4),
        rng.standard_normal((6, 4)),
    )
    expected = layernorm_backward(dy, layernorm_forward(x, w, b)[1])
    for shape in ((2, 3, 4), (1, 2, 3, 4)):
        got = layernorm_backward(dy.reshape(shape), layernorm_forward(x.reshape(shape), w, b)[1])
        for a, e in zip(got, expected, strict=True):
            np.testing.assert_allclose(a.reshape(e.shape), e, rtol=1e-12, atol=1e-14)
