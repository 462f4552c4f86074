"""Clipping by the global norm."""

import math

import numpy as np

from minivit.optim.clipping import clip_by_global_norm


def test_clipping_keeps_the_direction():
    g = np.array([3.0, 4.0])
    assert clip_by_global_norm(g, 1.0) == 5.0
    np.testing.assert_allclose(g, [0.6, 0.8], rtol=1e-10)
    assert math.isclose(clip_by_global_norm(g, 2.0), 1.0, rel_tol=1e-10)
    np.testing.assert_allclose(g, [0.6, 0.8], rtol=1e-10)  # short enough: left alone
    clip_by_global_norm(g, 0.0)
    np.testing.assert_allclose(g, [0.6, 0.8], rtol=1e-10)  # no clipping
    zero = np.zeros(3, np.float32)
    assert clip_by_global_norm(zero, 1.0) == 0.0
    assert not zero.any() and zero.dtype == np.float32


def test_clipping_leaves_the_tiniest_gradient_alone():
    g = np.array([3e-14, -4e-14])
    clip_by_global_norm(g, 1.0)
    np.testing.assert_array_equal(g, [3e-14, -4e-14])


def test_the_tiny_number_of_the_clipping_is_1e_12():
    g = np.array([3e-12, -4e-12])  # of norm 5e-12, to at most 3e-12: by 3 / (5 + 1)
    clip_by_global_norm(g, 3e-12)
    np.testing.assert_allclose(g, [1.5e-12, -2e-12], rtol=1e-12)
