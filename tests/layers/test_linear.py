"""linear: a worked example and what the shapes promise."""

import numpy as np

from minivit.layers.linear import linear_backward, linear_forward


def test_worked_example():
    x, W, b = (
        np.array([[1.0, 2.0], [3.0, 4.0]]),
        np.array([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]]),
        np.array([0.5, 0.0, -0.5]),
    )
    y, cache = linear_forward(x, W, b)
    np.testing.assert_array_equal(y, [[1.5, 2.0, -0.5], [3.5, 4.0, 1.5]])
    dx, dW, db = linear_backward(np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]), cache)
    np.testing.assert_array_equal(dx, [[1.0, 0.0], [2.0, 0.0]])  # rows of W^T: dy W^T
    np.testing.assert_array_equal(dW, [[1.0, 3.0, 3.0], [2.0, 4.0, 4.0]])  # x^T dy
    np.testing.assert_array_equal(db, [1.0, 1.0, 1.0])  # a sum over rows, not a mean


def test_leading_axes_are_rows():
    rng = np.random.default_rng(1)
    x, W, b = rng.standard_normal((2, 3, 4)), rng.standard_normal((4, 5)), rng.standard_normal(5)
    y, cache = linear_forward(x, W, b)
    flat, flat_cache = linear_forward(x.reshape(6, 4), W, b)
    np.testing.assert_array_equal(y.reshape(6, 5), flat)
    dy = rng.standard_normal((2, 3, 5))
    for a, c in zip(linear_backward(dy, cache), linear_backward(dy.reshape(6, 5), flat_cache), strict=True):
        np.testing.assert_array_equal(a.reshape(c.shape), c)
