"""Adam and AdamW against a loop over numbers."""

import math

import numpy as np
import pytest

from minivit.optim.adam import Adam, AdamW

MASK = np.array([1.0, 1.0, 0.0])


def scalar_adam(theta, gradients, lr, b1, b2, eps, decay, decoupled):
    m = v = 0.0
    for t, g in enumerate(gradients, start=1):
        if decoupled:
            theta -= lr * decay * theta
        else:
            g = g + decay * theta
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        theta -= lr * (m / (1 - b1**t)) / (math.sqrt(v / (1 - b2**t)) + eps)
    return theta


@pytest.mark.parametrize(("kind", "decoupled"), [(Adam, False), (AdamW, True)])
def test_adam_against_scalars(kind, decoupled):
    rng = np.random.default_rng(0)
    start, gradients = rng.standard_normal(3), rng.standard_normal((12, 3))
    theta = start.copy()
    optimizer = kind(theta, MASK, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2)
    for g in gradients:
        kept = g.copy()
        optimizer.step(theta, g, 0.05)
        np.testing.assert_array_equal(g, kept)  # the gradient is not written to
    expected = [
        scalar_adam(start[i], gradients[:, i], 0.05, 0.8, 0.95, 1e-3, 0.2 * MASK[i], decoupled) for i in range(3)
    ]
    np.testing.assert_allclose(theta, expected, rtol=1e-12)


def test_the_first_adam_step_has_length_lr_whatever_the_gradient():
    theta = np.zeros(2)
    Adam(theta, np.zeros(2), eps=0.0).step(theta, np.array([1e-6, -1e6]), 0.01)
    np.testing.assert_allclose(theta, [-0.01, 0.01])
