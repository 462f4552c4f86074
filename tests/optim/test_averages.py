"""The moving average of the weights."""

import math

import numpy as np

from minivit.optim.averages import EMA


def test_the_moving_average_by_its_formula():
    theta = np.array([1.0])
    ema = EMA(theta, 0.5)
    expected = 1.0
    for t in range(1, 12):
        theta += 1.0
        ema.update(theta)
        d = min(0.5, (1 + t) / (10 + t))
        expected = d * expected + (1 - d) * theta[0]
        assert math.isclose(ema.flat[0], expected, rel_tol=1e-13)
    assert theta[0] == 12.0
