"""gelu: both forms against their definitions, far out too."""

import math

import numpy as np
import pytest

from minivit.layers.gelu import gelu_backward, gelu_forward

X = np.array([-30.0, -4.0, -2.7, -1.0, 0.0, 0.5, 2.7, 30.0])


def test_tanh_form_is_its_definition():
    expected = [0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) for x in X]
    np.testing.assert_allclose(gelu_forward(X)[0], expected, rtol=1e-14, atol=1e-15)  # 1 + t rounds to 1e-16


def test_erf_form_is_its_definition():
    expected = [x * 0.5 * math.erfc(-x / math.sqrt(2)) for x in X]  # = x/2 (1 + erf(x / sqrt 2)) to the last digit
    found = gelu_forward(X, kind="erf")[0]
    # near -1, erf is rounded to 1e-16, and 1 + erf is as exact as that and no more: one rounding more for the library
    np.testing.assert_array_less(np.abs(found - expected), 1e-15 * np.abs(expected) + 2.3e-16 * np.abs(X) / 2 + 1e-300)


def test_the_forms_differ_by_what_is_published():
    x = np.linspace(-6, 6, 100001)
    difference = np.abs(gelu_forward(x)[0] - gelu_forward(x, kind="erf")[0])
    assert 4.7e-4 < difference.max() < 4.8e-4
    assert abs(abs(x[difference.argmax()]) - 2.70) < 0.01


@pytest.mark.parametrize("kind", ["tanh", "erf"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_far_out_it_is_the_identity_or_zero(kind, dtype):
    x = np.array([-1e4, -50.0, 50.0, 1e4], dtype)
    y, cache = gelu_forward(x, kind=kind)
    np.testing.assert_array_equal(y, [0, 0, 50, 1e4])
    np.testing.assert_array_equal(gelu_backward(np.ones(4, dtype), cache), [0, 0, 1, 1])


def test_the_slope_at_zero_is_one_half():
    for kind in ("tanh", "erf"):
        assert gelu_backward(np.ones(1), gelu_forward(np.zeros(1), kind=kind)[1])[0] == 0.5


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="tanh"):
        gelu_forward(X, kind="relu")
