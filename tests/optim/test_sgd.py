"""Gradient descent with momentum, by steps worked out by hand."""

import numpy as np

from minivit.optim.sgd import SGD

MASK = np.array([1.0, 1.0, 0.0])


def test_sgd_by_hand():
    theta = np.array([1.0, 2.0, 3.0])
    sgd = SGD(theta, MASK, momentum=0.5, weight_decay=0.1)
    sgd.step(theta, np.array([1.0, 0.0, 1.0]), 0.1)
    np.testing.assert_allclose(theta, [1 - 0.1 * 1.1, 2 - 0.1 * 0.2, 3 - 0.1])  # the third is not decayed
    sgd.step(theta, np.zeros(3), 0.1)
    m = [0.55 + 0.1 * 0.89, 0.1 + 0.1 * 1.98, 0.5]
    np.testing.assert_allclose(theta, [0.89 - 0.1 * m[0], 1.98 - 0.1 * m[1], 2.9 - 0.1 * m[2]])
