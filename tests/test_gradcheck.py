"""The checker itself: it passes what is right, fails what is wrong, and refuses what it cannot judge."""

import math
import re

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
def test_a_right_gradient_passes_and_one_off_by_three_tolerances_does_not(method, elementwise):
    def check(backward):
        (result,) = gradcheck.check(cube_forward, backward, [X], method=method, elementwise=elementwise)
        return result

    off = 1 + 3 * gradcheck.METHODS[method].rtol
    right, wrong = check(cube_backward), check(lambda dy, x: off * cube_backward(dy, x))
    assert right.passed and right.checked == (12 if elementwise else 1)
    assert not wrong.passed and wrong.max_relative_error > gradcheck.METHODS[method].rtol
    assert "WRONG" in str(wrong) and "ok" in str(right) and f"{gradcheck.METHODS[method].step:.0e}" in str(right)


@pytest.mark.parametrize(
    ("method", "steps"), [("forward", (1e-3, 1e-4)), ("central", (1e-2, 1e-3)), ("five-point", (1e-1, 1e-2))]
)
def test_the_error_of_a_difference_falls_with_its_order(method, steps):
    def forward(x):
        return np.sin(3 * x), None

    exact = 3 * np.cos(3 * 0.4)
    args = [np.array([0.4])]
    errors = [
        abs(gradcheck.numerical_derivative(forward, args, 0, np.ones(1), np.ones(1), method, h) - exact) for h in steps
    ]
    order = gradcheck.METHODS[method].order
    assert 0.9 * 10**order < errors[0] / errors[1] < 1.2 * 10**order


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
    ("forward", "backward", "args", "settings", "error", "message"),
    [
        (cube_forward, cube_backward, [X], {"method": "magic"}, ValueError, "forward, central, five-point, complex"),
        (cube_forward, lambda dy, x: dy[0], [X], {}, ValueError, r"dx0 has shape \(4,\), x0 has \(3, 4\)"),
        (cube_forward, lambda dy, x: (), [X], {}, ValueError, "0 gradients for 1 arguments"),
        (cube_forward, lambda dy, x: None, [X], {}, ValueError, "dx0 has shape None"),
        (lambda x: x * x, cube_backward, [X], {}, TypeError, r"must return \(y, cache\), it returned ndarray"),
        (lambda x: (x / 0, x), cube_backward, [X], {}, ValueError, "a value that is not finite"),
        (cube_forward, cube_backward, [np.array([1.0, np.nan])], {"names": ["x"]}, ValueError, "x holds .* NaN"),
        (cube_forward, cube_backward, [np.arange(3)], {"names": ["x"]}, ValueError, "differentiate: x is int64"),
        (cube_forward, cube_backward, [[1.0, 2.0]], {"names": ["x"]}, ValueError, "x is list"),
        (
            lambda x, b: (x + b, None), lambda dy, c: (dy, dy), [X, X[0]], {"names": ["x", "b"]}, ValueError,
            r"db has shape \(3, 4\), b has \(4,\): it was broadcast, so its gradient must be summed",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_judged_is_refused(forward, backward, args, settings, error, message):
    with np.errstate(all="ignore"), pytest.raises(error, match=message):
        gradcheck.check(forward, backward, args, **settings)


def test_float32_is_checked_as_float64_with_a_warning():
    with pytest.warns(UserWarning, match="x is float32; it is checked as float64"):
        (result,) = gradcheck.check(cube_forward, cube_backward, [X.astype(np.float32)], names=["x"])
    assert result.passed and result.max_relative_error < 1e-8
    with pytest.warns(UserWarning, match="returned float32 for float64 arguments"):
        gradcheck.check(lambda x: (np.float32(x), x), lambda dy, x: dy, [X])


ROOT = np.random.default_rng(3).standard_normal((4, 4))


def matrix_forward(x, W, b):
    return x @ W + b, (x, W)


def matrix_backward(dy, cache):
    x, W = cache
    return dy @ W.T, x.T @ dy, dy.sum(axis=0)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (
            lambda dx, dW, db: (dx, dW, db / 3),
            "3 times too small: a mean where a sum belongs.* 3 is the length of axis 0 of x",
        ),
        (lambda dx, dW, db: (dx, dW * 3, db), "3 times too large: a sum where a mean belongs"),
        (lambda dx, dW, db: (dx / 2, dW, db), r"sqrt\(4\) times too small.* 4 is the length of axis 1 of x"),
        (lambda dx, dW, db: (dx, dW * 1.1, db), "everywhere 1.1 times the true value"),
        (lambda dx, dW, db: (-dx, dW, db), "the sign is reversed"),
        (lambda dx, dW, db: (dx, dW.T, db), "the transpose"),
        (lambda dx, dW, db: (dx, dW, db[::-1]), "the right numbers in the wrong places"),
        (lambda dx, dW, db: (0 * dx, dW, db), "the gradient is zero everywhere"),
        (lambda dx, dW, db: (dx * np.nan, dW, db), "12 of 12 values are NaN"),
        (lambda dx, dW, db: (dx * [1, 1, 2, 1], dW, db), r"only index 2 of axis 1 is wrong \(3 of 12 values\)"),
        (
            lambda dx, dW, db: (dx - dx.mean(axis=1, keepdims=True), dW, db),
            "the same all along axis 1.* such as a mean",
        ),
        (lambda dx, dW, db: (dx + 0.3 * abs(dx), dW, db), "nearly the right direction"),
        (lambda dx, dW, db: (np.cos(9 * dx), dW, db), "another direction"),
    ],
)
def test_the_pattern_of_a_mistake_is_named(mistake, message):
    def backward(dy, cache):
        return mistake(*matrix_backward(dy, cache))

    args = [X, ROOT, np.zeros(4)]
    results = gradcheck.check(matrix_forward, backward, args, names=["x", "W", "b"], elementwise=True)
    wrong = [r for r in results if not r.passed]
    assert len(wrong) == 1
    assert re.search(message, wrong[0].diagnosis), wrong[0].diagnosis
    assert wrong[0].diagnosis in str(wrong[0])


def test_the_random_cotangent_is_not_the_callers_random_input():
    seen = {}

    def backward(dy, x):
        seen["dy"] = dy
        return cube_backward(dy, x)

    for seed in (0, 1):
        gradcheck.check(cube_forward, backward, [np.random.default_rng(seed).standard_normal((3, 4))], seed=seed)
        assert not np.isclose(seen["dy"], np.random.default_rng(seed).standard_normal((3, 4))).any()


def test_a_gradient_where_there_should_be_none_is_named():
    results = gradcheck.check(lambda x: (0 * x + 1, x), lambda dy, x: dy, [X], elementwise=True)
    assert "does not depend on this argument" in results[0].diagnosis


def test_the_adjoint_of_a_wrong_backward_is_off():
    def jvp(xdot, x):
        return 3 * x * x * xdot

    assert gradcheck.adjoint_error(cube_forward, cube_backward, jvp, [X]) < 1e-15
    assert gradcheck.adjoint_error(cube_forward, lambda dy, x: 1.001 * cube_backward(dy, x), jvp, [X]) > 1e-5


# The reader's own layer, wrong on purpose: the derivative of the logistic function is s (1 - s).


def swish_forward(x):
    s = 1 / (1 + np.exp(-x))
    return x * s, (x, s)


def swish_backward(dy, cache):
    x, s = cache
    return dy * (s + x * s)


def test_the_readers_own_wrong_swish():
    (result,) = gradcheck.check(swish_forward, swish_backward, [X], names=["x"], elementwise=True)
    assert not result.passed and result.diagnosis
    (right,) = gradcheck.check(
        swish_forward, lambda dy, c: dy * (c[1] + c[0] * c[1] * (1 - c[1])), [X], method="complex", elementwise=True
    )
    assert right.passed and right.max_relative_error < 1e-14


def test_every_tool_takes_the_readers_own_layer():
    def right_backward(dy, cache):
        x, s = cache
        return dy * (s + x * s * (1 - s))

    def jvp(xdot, cache):
        return right_backward(xdot, cache)

    assert gradcheck.adjoint_error(swish_forward, right_backward, jvp, [X]) < 1e-15
    assert gradcheck.adjoint_error(swish_forward, swish_backward, jvp, [X]) > 1e-5  # rounding is 1e-16
    assert gradcheck.symmetry_error(swish_forward, right_backward, [X]) < 1e-15
    curve = gradcheck.error_curve(swish_forward, [X], 0, "central")
    found = gradcheck.knee(curve, "central")
    assert abs(found.slope - 2) < 0.1 and found.error < 1e-8 and 1e-7 < found.step < 1e-3


def test_a_backward_that_is_no_gradient_is_not_symmetric():
    def backward(dy, cache):
        x, W = cache
        return dy @ W.T, 1.5 * x.T @ dy  # two arguments with different factors: no function has this gradient

    args = [X, ROOT]

    def forward(x, W):
        return x @ W, (x, W)

    assert gradcheck.symmetry_error(forward, lambda dy, c: (dy @ c[1].T, c[0].T @ dy), args) < 1e-15
    assert gradcheck.symmetry_error(forward, backward, args) > 1e-3


def test_functions_that_work_in_place_are_judged_rightly():
    def forward(x):
        x *= 2.0
        return x * x, x

    def backward(dy, x):
        dy *= 4.0
        dy *= x
        return dy

    for method in gradcheck.METHODS:
        (result,) = gradcheck.check(forward, backward, [X.copy()], method=method, elementwise=True)
        assert result.passed, result


@pytest.mark.parametrize("forward", [lambda x: (abs(x), x), lambda x: (np.linalg.norm(x), x)])
def test_the_complex_step_refuses_what_is_not_analytic(forward):
    with pytest.raises(ValueError, match="not analytic.* use another method"):
        gradcheck.check(forward, lambda dy, x: np.sign(x) * dy, [X], method="complex")


def test_the_rounding_of_large_sums_is_allowed_for_and_no_more():
    """A bias of which nothing depends: its difference is the rounding of a sum of 10,000 terms, and no mistake."""
    x = 100.0 * np.random.default_rng(0).standard_normal((100, 100))

    def forward(b):
        return x + 0 * b, None

    (right,) = gradcheck.check(forward, lambda dy, c: np.zeros(100), [np.zeros(100)], elementwise=True)
    assert right.passed
    (wrong,) = gradcheck.check(forward, lambda dy, c: np.full(100, 1e-2), [np.zeros(100)], elementwise=True)
    assert not wrong.passed


def test_a_gradient_that_is_nearly_right_is_called_so():
    (result,) = gradcheck.check(cube_forward, lambda dy, x: (1 + 1e-5) * cube_backward(dy, x), [X], elementwise=True)
    assert not result.passed and "right to 5 digits" in result.diagnosis


def test_a_sum_over_an_axis_of_length_one_is_asked_for():
    with pytest.raises(ValueError, match="summed over the axes of length 1"):
        gradcheck.check(lambda x, b: (x + b, None), lambda dy, c: (dy, dy), [X, X[:1]])
