"""The checker itself: it passes what is right, fails what is wrong, and refuses what it cannot judge."""

import math

import numpy as np
import pytest

from minivit import gradcheck
from minivit.layers.layernorm import layernorm_backward, layernorm_forward
from minivit.layers.linear import linear_backward, linear_forward


def cube_forward(x):
    return x * x * x, x


def cube_backward(dy, x):
    return 3 * x * x * dy


X = np.random.default_rng(0).standard_normal((3, 4))


@pytest.mark.parametrize("method", gradcheck.METHODS)
@pytest.mark.parametrize("elementwise", [True, False])
def test_a_right_gradient_passes_and_a_factor_of_one_in_a_million_does_not(method, elementwise):
    def check(backward):
        (result,) = gradcheck.check(cube_forward, backward, [X], method=method, elementwise=elementwise)
        return result

    right, wrong = check(cube_backward), check(lambda dy, x: (1 + 3e-6) * cube_backward(dy, x))
    assert right.passed and right.checked == (12 if elementwise else 1)
    assert not wrong.passed and wrong.max_relative_error > 1e-6
    assert "WRONG" in str(wrong) and "ok" in str(right)


def test_one_wrong_element_is_found_and_named():
    def backward(dy, x):
        dx = cube_backward(dy, x)
        dx[1, 2] = -dx[1, 2]
        return dx

    (result,) = gradcheck.check(cube_forward, backward, [X], names=["x"], elementwise=True)
    assert not result.passed and result.element == (1, 2)
    assert math.isclose(result.analytic, -result.numerical, rel_tol=1e-6)
    (direction,) = gradcheck.check(cube_forward, backward, [X], elementwise=False)
    assert not direction.passed


def test_a_missing_gradient_where_the_true_one_is_tiny_does_not_pass():
    """An absolute tolerance alone would accept 0 for a gradient of 1e-6."""

    def forward(x):
        return 1e-6 * x, None

    (result,) = gradcheck.check(forward, lambda dy, cache: np.zeros_like(dy), [X])
    assert not result.passed


def test_nan_never_passes():
    (result,) = gradcheck.check(cube_forward, lambda dy, x: np.full_like(dy, np.nan), [X])
    assert not result.passed and result.max_relative_error == math.inf


def test_each_argument_is_judged_alone():
    x, W, b = X, np.random.default_rng(1).standard_normal((4, 2)), np.zeros(2)

    def backward(dy, cache):
        dx, dW, db = linear_backward(dy, cache)
        return dx, dW, db / len(dy)  # a mean where a sum belongs

    results = gradcheck.check(linear_forward, backward, [x, W, b], names=["x", "W", "b"])
    assert [r.passed for r in results] == [True, True, False]
    assert [r.argument for r in results] == ["x", "W", "b"]
    assert math.isclose(results[2].analytic * 3, results[2].numerical, rel_tol=1e-6)


def test_central_differences_are_as_exact_as_theory_says():
    args = [X, np.ones(4), np.zeros(4)]
    central = gradcheck.check(layernorm_forward, layernorm_backward, args, method="central")
    exact = gradcheck.check(layernorm_forward, layernorm_backward, args, method="complex")
    assert max(r.max_relative_error for r in central) < 1e-7
    assert max(r.max_relative_error for r in exact) < 1e-12


def test_labels_and_none_are_left_out():
    def forward(x, labels, nothing):
        return x[np.arange(3), labels], (x.shape, labels)

    def backward(dy, cache):
        shape, labels = cache
        dx = np.zeros(shape)
        dx[np.arange(3), labels] = dy
        return dx, None, None

    results = gradcheck.check(forward, backward, [X, np.array([0, 1, 3]), None], names=["x", "labels", "nothing"])
    assert [r.argument for r in results] == ["x"] and results[0].passed


@pytest.mark.parametrize(
    ("backward", "args", "settings", "error", "message"),
    [
        (cube_backward, [X.astype(np.float32)], {}, TypeError, "float32; gradients are checked in float64"),
        (cube_backward, [X], {"method": "magic"}, ValueError, "central, complex"),
        (lambda dy, x: dy[0], [X], {}, ValueError, r"dx0 has shape \(4,\), x0 has \(3, 4\)"),
        (lambda dy, x: (), [X], {}, ValueError, "0 gradients for 1 arguments"),
        (lambda dy, x: None, [X], {}, ValueError, "dx0 has shape"),
    ],
)
def test_what_cannot_be_judged_is_refused(backward, args, settings, error, message):
    with pytest.raises(error, match=message):
        gradcheck.check(cube_forward, backward, args, **settings)
