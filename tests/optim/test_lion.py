"""Lion against a loop over numbers."""

import math

import numpy as np
import pytest

from minivit.optim.lion import Lion

MASK = np.array([1.0, 1.0, 0.0])


def test_lion_against_scalars():
    rng = np.random.default_rng(0)
    start, gradients = rng.standard_normal(3), rng.standard_normal((12, 3))
    theta = start.copy()
    lion = Lion(theta, MASK, betas=(0.8, 0.95), weight_decay=0.2)
    for g in gradients:
        lion.step(theta, g, 0.05)
    for i in range(3):
        expected, m = start[i], 0.0
        for g in gradients[:, i]:
            u = math.copysign(1.0, 0.8 * m + 0.2 * g)
            expected -= 0.05 * (u + 0.2 * MASK[i] * expected)
            m = 0.95 * m + 0.05 * g
        assert theta[i] == pytest.approx(expected, rel=1e-12)
