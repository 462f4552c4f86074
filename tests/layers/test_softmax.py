"""softmax: a worked example, the shift, the axis."""

import numpy as np

from minivit.layers.softmax import softmax_backward, softmax_forward


def test_worked_example():
    y, cache = softmax_forward(np.log([[1.0, 2.0, 5.0]]))
    np.testing.assert_allclose(y, [[1 / 8, 2 / 8, 5 / 8]])
    dx = softmax_backward(np.array([[8.0, 0.0, 0.0]]), cache)
    np.testing.assert_allclose(dx, [[7 / 8, -2 / 8, -5 / 8]])  # y (dy - sum dy y), sum dy y = 1


def test_the_explicit_jacobian():
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 3, 5, 4)), rng.standard_normal((2, 3, 5, 4))
    y, cache = softmax_forward(x)
    np.testing.assert_allclose(y.sum(axis=-1), 1.0)
    jacobian = y[..., :, None] * np.eye(4) - y[..., :, None] * y[..., None, :]
    np.testing.assert_allclose(softmax_backward(dy, cache), (jacobian @ dy[..., None])[..., 0], atol=1e-15)


def test_each_row_has_its_own_shift():
    x = np.array([[1e4, 1e4 - 1.0], [-1e4, -1e4 - 1.0], [0.0, -1.0]])
    y, cache = softmax_forward(x)
    np.testing.assert_allclose(y, np.broadcast_to(y[2], (3, 2)), rtol=1e-12)
    np.testing.assert_allclose(softmax_backward(np.ones((3, 2)), cache), 0.0, atol=1e-15)
