"""gelu: both forms against their definitions, far out too."""

import math

import numpy as np

from minivit.layers.gelu import gelu_forward
from minivit.options.exact_gelu import exact_gelu_forward

X = np.array([-30.0, -4.0, -2.7, -1.0, 0.0, 0.5, 2.7, 30.0])


def test_tanh_form_is_its_definition():
    expected = [0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) for x in X]
    np.testing.assert_allclose(gelu_forward(X)[0], expected, rtol=1e-14, atol=1e-15)  # 1 + t rounds to 1e-16


def test_erf_form_is_its_definition():
    expected = [x * 0.5 * math.erfc(-x / math.sqrt(2)) for x in X]  # = x/2 (1 + erf(x / sqrt 2)) to the last digit
    found = exact_gelu_forward(X)[0]
    # near -1, erf is rounded to 1e-16, and 1 + erf is as exact as that and no more: one rounding more for the library
    np.testing.assert_array_less(np.abs(found - expected), 1e-15 * np.abs(expected) + 2.3e-16 * np.abs(X) / 2 + 1e-300)


def test_the_forms_differ_by_what_is_published():
    x = np.linspace(-6, 6, 100001)
    difference = np.abs(gelu_forward(x)[0] - exact_gelu_forward(x)[0])
    assert 4.7e-4 < difference.max() < 4.8e-4
    assert abs(abs(x[difference.argmax()]) - 2.70) < 0.01
