"""The checker itself: it passes what is right, fails what is wrong, and refuses what it cannot judge."""

import itertools
import math
import re

import numpy as np
import pytest

from minivit import ViT, ViTConfig
from minivit.laboratory import gradcheck
from minivit.laboratory.cases import MODELS
from minivit.layers.layernorm import layernorm_backward, layernorm_forward
from minivit.layers.linear import linear_backward, linear_forward
from minivit.layers.softmax import softmax_forward


def cube_forward(x):
    return x * x * x, x


def cube_backward(dy, x):
    return 3 * x * x * dy


X = np.random.default_rng(0).standard_normal((3, 4))
ROUNDED = 1e-14  # of what is 0 but for rounding: some ten operations in a row, each off by 1e-16 at the most


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


FRESH, COUNT = np.random.default_rng(), itertools.count()


@pytest.mark.parametrize(
    ("forward", "backward", "args", "settings", "error", "message"),
    [
        (cube_forward, cube_backward, [X], {"method": "magic"}, ValueError, "forward, central, five-point, complex"),
        (cube_forward, lambda dy, x: dy[0], [X], {}, ValueError, r"dx0 has shape \(4,\), x0 has \(3, 4\)"),
        (cube_forward, lambda dy, x: (), [X], {}, ValueError, "0 gradients for 1 arguments"),
        (cube_forward, lambda dy, x: None, [X], {}, ValueError, "dx0 has shape None"),
        (cube_forward, lambda dy, x: (dy, dy), [X], {}, ValueError, "2 gradients for 1 arguments"),
        (cube_forward, lambda dy, x: 1j * dy, [X], {}, ValueError, "dx0 is complex, although x and dy are real"),
        (lambda x: (1j * x, x), cube_backward, [X], {}, ValueError, "complex numbers for real arguments"),
        (lambda x: x * x, cube_backward, [X], {}, TypeError, r"must return \(y, cache\), it returned ndarray"),
        (lambda x: (x / 0, x), cube_backward, [X], {}, ValueError, "a value that is not finite"),
        (cube_forward, cube_backward, [np.array([1.0, np.nan])], {"names": ["x"]}, ValueError, "x holds .* NaN"),
        (cube_forward, cube_backward, [np.arange(3)], {"names": ["x"]}, ValueError, "differentiate: x is int64"),
        (cube_forward, cube_backward, [[1.0, 2.0]], {"names": ["x"]}, ValueError, "x is list"),
        (cube_forward, cube_backward, X, {}, TypeError, r"args must be a list .* it is ndarray; .* write \[x\]"),
        (linear_forward, linear_backward, [X, X.T, np.ones(3)], {"names": ["x", "W"]}, ValueError,
         r"2 names \(x, W\) for 3 arguments"),
        (lambda x: (None, x), cube_backward, [X], {}, TypeError, "y .* must be an array of numbers, it is NoneType"),
        (lambda x: ("y", x), cube_backward, [X], {}, TypeError, "y .* must be an array of numbers, it is str"),
        (cube_forward, cube_backward, [X[:0]], {"names": ["x"]}, ValueError, r"x is empty, its shape \(0, 4\)"),
        (cube_forward, cube_backward, [X[:0]], {"elementwise": True}, ValueError, "x0 is empty"),
        (lambda x: (x[:0], x), cube_backward, [X], {}, ValueError, r"an empty y, of shape \(0, 4\)"),
        (lambda x: (x * FRESH.random(4), x), cube_backward, [X], {}, ValueError, "different numbers .* fresh random"),
        (lambda x: (x / (1 - next(COUNT)), x), cube_backward, [X], {}, ValueError, "different numbers"),
        (lambda x: (x[: 1 + next(COUNT) % 2], x), cube_backward, [X], {}, ValueError, "different numbers"),
        (cube_forward, lambda dy, x: np.full((3, 4), "a"), [X], {}, TypeError, "dx0 must be an array of numbers"),
        (
            lambda x, b: (x + b, None), lambda dy, c: (dy, dy), [X, X[0]], {"names": ["x", "b"]}, ValueError,
            r"db has shape \(3, 4\), b has \(4,\): it was broadcast, so its gradient must be summed",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_judged_is_refused(forward, backward, args, settings, error, message):
    with np.errstate(all="ignore"), pytest.raises(error, match=message):
        gradcheck.check(forward, backward, args, **settings)


TOOLS = {
    "symmetry_error": gradcheck.symmetry_error,
    "hessian_error": gradcheck.hessian_error,
    "hessian_vector_product": lambda forward, backward, args: gradcheck.hessian_vector_product(
        forward, backward, args, args if isinstance(args, list) else [args]
    ),
    "error_curve": lambda forward, backward, args: gradcheck.error_curve(forward, args, 0, "central"),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_the_other_tools_refuse_it_too(tool):
    def refused(error, message, forward=cube_forward, backward=cube_backward, args=None):
        with np.errstate(all="ignore"), pytest.raises(error, match=message):
            TOOLS[tool](forward, backward, [X] if args is None else args)

    refused(TypeError, "args must be a list", args=X)
    refused(TypeError, r"must return \(y, cache\)", forward=lambda x: x * x * x)
    refused(TypeError, "it is NoneType", forward=lambda x: (None, x))
    refused(ValueError, "x0 is empty", args=[X[:0]])
    refused(ValueError, "nothing to differentiate", args=[np.arange(3)])
    if tool != "hessian_vector_product":  # one call, and no more: it is made for many products
        refused(ValueError, "different numbers", forward=lambda x: (x * FRESH.random(4), x))
    if tool != "error_curve":
        refused(ValueError, r"dx0 has shape \(4,\)", backward=lambda dy, x: dy[0])
        refused(ValueError, "dx0 has shape None", backward=lambda dy, x: None)
        refused(ValueError, "2 gradients for 1 arguments", backward=lambda dy, x: (dy, dy))
        refused(gradcheck.CannotTellError, "dx0 holds a value that is NaN", backward=lambda dy, x: np.nan * dy)
        refused(ValueError, "the backward gave real numbers", backward=lambda dy, x: abs(dy))
    refused(ValueError, "the forward gave real numbers", forward=lambda x: (abs(x), x))


@pytest.mark.parametrize("tool", TOOLS)
def test_the_other_tools_warn_of_float32_too(tool):
    with pytest.warns(UserWarning, match="x0 is float32; it is checked as float64") as caught:
        TOOLS[tool](cube_forward, cube_backward, [X.astype(np.float32)])
    assert len(caught) == 1 and caught[0].filename == __file__
    if tool != "hessian_vector_product":  # which makes no real y

        def forward(x):
            return (np.complex64 if np.iscomplexobj(x) else np.float32)(x * x * x), x

        with pytest.warns(UserWarning, match="returned float32 for float64 arguments") as caught:
            TOOLS[tool](forward, cube_backward, [X])
        assert len(caught) == 1 and caught[0].filename == __file__


def normalised(length):
    """y = x / |x| and its right gradient, |x| computed in some way."""

    def forward(x):
        n = length(x)
        return x / n, (x / n, n)

    def backward(dy, cache):
        y, n = cache
        return (dy - y * (y * dy).sum()) / n

    return forward, backward


NORMS = {
    "norm": np.linalg.norm,
    "conj": lambda x: np.sqrt((x * x.conj()).sum()),
    "var": lambda x: np.sqrt(x.size * (x.var() + x.mean() ** 2)),
    "abs": lambda x: np.sqrt((abs(x) ** 2).sum()),
}


@pytest.mark.parametrize("length", NORMS.values(), ids=NORMS.keys())
def test_a_right_gradient_of_a_forward_that_is_not_analytic_is_not_called_wrong(length):
    forward, backward = normalised(length)
    assert gradcheck.check(forward, backward, [X], elementwise=True)[0].passed
    calls = [
        lambda: gradcheck.check(forward, backward, [X], method="complex"),
        lambda: gradcheck.symmetry_error(forward, backward, [X]),
        lambda: gradcheck.hessian_error(forward, backward, [X]),
        lambda: gradcheck.hessian_vector_product(forward, backward, [X], [X**2], dy=np.cos(X)),
        lambda: gradcheck.error_curve(forward, [X], 0, "central"),
    ]
    for call in calls:
        with pytest.raises(gradcheck.CannotTellError, match=r"is not analytic: .*central.*\(var, norm, abs") as caught:
            call()
        assert "\n" not in str(caught.value)
    forward, backward = normalised(lambda x: np.sqrt((x * x).sum()))
    for call in calls:
        call()
    assert gradcheck.symmetry_error(forward, backward, [X]) < ROUNDED


def test_a_backward_that_is_not_analytic_is_refused_where_it_is_differentiated():
    def forward(x):
        return x / np.sqrt((x * x).sum()), x

    def backward(dy, x):
        n = np.linalg.norm(x)
        return (dy - x * (x * dy).sum() / n**2) / n

    assert gradcheck.check(forward, backward, [X], method="complex", elementwise=True)[0].passed
    for tool in ("symmetry_error", "hessian_vector_product"):
        with pytest.raises(gradcheck.CannotTellError, match="the backward is not analytic.*must both be analytic"):
            TOOLS[tool](forward, backward, [X])
    gradcheck.hessian_vector_product(forward, backward, [X], [X], verify=False)


@pytest.mark.parametrize(
    ("forward", "x"),
    [
        (lambda x: (np.sin(x), None), 1e8 * X),  # x + h is x, or nearly: differences tell nothing
        (lambda x: (np.sin(x), None), 1e15 * X),
        (lambda x: (np.sin(1e4 * x), None), X),  # curved over lengths of 1e-4
        (lambda x: (np.sin(1e7 * x), None), X),
        (lambda x: (x * x * x, None), 1e-8 * X),  # truncation is all there is
        (lambda x: (1e8 + x, None), X),  # rounding is
        (lambda x: (0 * x + 1, None), X),
        (lambda x: (np.maximum(x, 0), None), X),  # of complex numbers, that of the real parts
        (lambda x: (np.sqrt(x), None), np.full(3, 1e-8)),  # not a number on the left
    ],
)
def test_differences_that_tell_nothing_refuse_no_analytic_forward(forward, x):
    with np.errstate(invalid="ignore"):
        gradcheck.check(forward, lambda dy, cache: dy, [x], method="complex")


def test_what_the_hessian_vector_product_needs():
    def product(v=X, dy=1.0):
        return gradcheck.hessian_vector_product(cube_forward, cube_backward, [X], [v], dy=dy)

    with pytest.raises(ValueError, match=r"dy has shape \(4,\), y has \(3, 4\)"):
        product(dy=np.ones(4))
    with pytest.raises(ValueError, match="the direction of x0 holds a value that is NaN"):
        product(v=np.nan * X)


def test_a_hessian_vector_product_at_the_edge_of_where_the_gradient_is_defined():
    """y = x^(3/2) / 1.5 at 1e-8: a difference would take the root of a negative number."""

    def forward(x):
        return np.sqrt(x) * x / 1.5, x

    with np.errstate(invalid="ignore"):
        (Hv,) = gradcheck.hessian_vector_product(
            forward, lambda dy, x: np.sqrt(x) * dy, [np.full(2, 1e-8)], [np.ones(2)]
        )
    np.testing.assert_allclose(Hv, 0.5 / 1e-4)


def test_a_hessian_vector_product_with_an_argument_that_stands_still():
    """The layer adds b, which is real and does not move, to a complex array in place, and the other way round."""
    args, v = [X, np.ones(4), np.zeros(4)], np.cos(X)
    for still in (1, 2):
        direction = [v, 0.3 * np.ones(4), 0.2 * np.ones(4)]
        expected = [d if i != still else 0 * d for i, d in enumerate(direction)]
        direction[still] = None
        one, other = (
            gradcheck.hessian_vector_product(layernorm_forward, layernorm_backward, args, d, dy=v)
            for d in (direction, expected)
        )
        for a, b in zip(one, other, strict=True):  # BLAS sums real and complex numbers each in an order of its own
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_a_numpy_float_is_an_argument():
    def forward(x, a):
        return a * x, (x, a)

    def backward(dy, cache):
        x, a = cache
        return a * dy, (x * dy).sum()

    for elementwise in (True, False):
        results = gradcheck.check(
            forward, backward, [X, np.float64(2.0)], names=["x", "a"], method="complex", elementwise=elementwise
        )
        assert [r.argument for r in results] == ["x", "a"] and all(r.passed for r in results)


def test_gradients_too_small_to_tell_are_called_so():
    """All values are far below atol: one that is off by a third passes, and it must be said that this shows nothing."""
    for size, verdict in ((1e-8, "too small to tell"), (1.0, "WRONG")):
        (result,) = gradcheck.check(
            cube_forward, lambda dy, x: 2 * x * x * dy, [size * X], method="complex", elementwise=True
        )
        assert result.verdict == verdict and f"dx0: {verdict}, " in str(result)
    (zero,) = gradcheck.check(lambda x: (0 * x + 1, x), lambda dy, x: 0 * dy, [X], method="complex", elementwise=True)
    assert zero.verdict == "ok"  # both exactly 0
    (some,) = gradcheck.check(cube_forward, cube_backward, [np.array([1e-8, 1.0])], method="complex", elementwise=True)
    assert some.verdict == "ok"


def test_curves_of_nothing_are_refused():
    for method, index, forward, message in (
        ("magic", 0, cube_forward, "method must be one of .* got 'magic'"),
        ("central", 1, cube_forward, r"no float array at args\[1\]; there is at 0"),
        ("central", 0, lambda x: (0 * x + 1, x), "the derivative with respect to x0 is zero"),
    ):
        with pytest.raises(ValueError, match=message):
            gradcheck.error_curve(forward, [X], index, method)
    for steps in ([1e-3, 0.0], -1e-3, [np.nan], []):
        with pytest.raises(ValueError, match="steps must be positive numbers, got"):
            gradcheck.error_curve(cube_forward, [X], 0, "central", steps=steps)
    with pytest.raises(ValueError, match="method must be one of"):
        gradcheck.knee(gradcheck.error_curve(cube_forward, [X], 0, "central"), "magic")
    with pytest.raises(ValueError, match="method must be one of"):
        gradcheck.numerical_derivative(cube_forward, [X], 0, X, X, "magic")


@pytest.mark.parametrize("method", gradcheck.METHODS)
@pytest.mark.parametrize("elementwise", [True, False])
@pytest.mark.parametrize("size", [1e4, 1e8])
def test_large_arguments_move_by_longer_steps(method, elementwise, size):
    off = 1 + 3 * gradcheck.METHODS[method].rtol
    for factor in (1.0, off):
        (result,) = gradcheck.check(
            cube_forward, lambda dy, x, factor=factor: factor * cube_backward(dy, x), [size * X],
            method=method, elementwise=elementwise,
        )  # fmt: skip
        assert result.passed == (factor == 1.0), result


def test_arguments_beside_large_ones_move_by_their_own_step():
    """In one array: sin(x) is curved over a length of 1 where x is of that order, and y = 1e8 elsewhere."""
    small = np.arange(12).reshape(3, 4) % 2 == 0

    def forward(x):
        return np.where(small, np.sin(x), 1e-8 * x * x), x

    def backward(dy, x):
        return np.where(small, np.cos(x), 2e-8 * x) * dy

    x = np.where(small, X, 1e8 * X)
    for elementwise in (True, False):
        (result,) = gradcheck.check(forward, backward, [x], elementwise=elementwise)
        assert result.passed, result
    right = gradcheck.check(forward, backward, [x], method="complex", elementwise=True)
    assert right[0].passed


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
        (
            lambda dx, dW, db: (dx / 2, dW, db),
            r"^2 times too small; it may be a plain factor 2.* sqrt\(4\), 4 the length of axis 1 of x",
        ),
        (lambda dx, dW, db: (dx * 12, dW, db), r"^12 times too large: .*; 12 = 3 \* 4 is the size of x$"),
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


@pytest.mark.parametrize("elementwise", [True, False])
@pytest.mark.parametrize(
    ("mistake", "expected"),
    [
        (lambda da, db, dc: (db, da, dc), ["it is the gradient of b: the two are swapped",
                                           "it is the gradient of a: the two are swapped", ""]),
        (lambda da, db, dc: (da, da, dc), ["", "it is the gradient of a", ""]),
        (lambda da, db, dc: (da, 0 * db, 0 * dc), ["", None, ""]),  # the gradient of c is 0, but so is any dropped one
        (lambda da, db, dc: (2 * da, db, dc), [None, "", ""]),
        (lambda da, db, dc: (1e-15 * da, db, dc), [None, "", ""]),
    ],
)  # fmt: skip
def test_the_gradient_of_another_argument_is_called_so(mistake, expected, elementwise):
    def forward(a, b, c):
        return np.sin(a) * b + 0 * c, (a, b)

    def backward(dy, cache):
        a, b = cache
        return mistake(np.cos(a) * b * dy, np.sin(a) * dy, 0 * dy)

    args = [X, X[::-1] ** 2, X + 1]
    results = gradcheck.check(forward, backward, args, names="abc", method="complex", elementwise=elementwise)
    for result, diagnosis in zip(results, expected, strict=True):
        if diagnosis is None:
            assert not result.passed and "it is the gradient of" not in result.diagnosis
        else:
            assert result.diagnosis == diagnosis and result.passed == (not diagnosis)


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (1 / 10, r"^10 times too small: a mean .*; 10 = 2 \* 5 is that of axes 0, 1 of x$"),
        (14, r"^14 times too large: a sum .*; 14 = 2 \* 7 is that of axes 0, 2 of x$"),
        (70, r"^70 times too large: a sum .*; 70 = 2 \* 5 \* 7 is the size of x$"),
        (2, r"^2 times too large: a sum .*; 2 is the length of axis 0 of x, or it may be a plain factor 2"),
        (7**-0.5, r"^sqrt\(7\) times too small: .*; it is sqrt\(7\), 7 the length of axis 2 of x$"),
        (11, "^everywhere 11 times the true value"),
    ],
)
def test_factors_are_named_the_plainest_first(factor, message):
    x = np.random.default_rng(0).standard_normal((2, 5, 7))
    (result,) = gradcheck.check(
        cube_forward, lambda dy, x: factor * cube_backward(dy, x), [x], names=["x"], elementwise=True
    )
    assert re.search(message, result.diagnosis), result.diagnosis


def test_in_a_model_the_tokens_of_the_batch_are_named(monkeypatch):
    def wrong(self, *args, **keywords):
        return 40.0 * right(self, *args, **keywords)

    right = ViT.backward
    monkeypatch.setattr(ViT, "backward", wrong)
    config = ViTConfig(**{**MODELS["vit"], "depth": 1})
    rng = np.random.default_rng(0)
    flat = ViT(config, dtype=np.float64).flat
    flat += 0.3 * rng.standard_normal(flat.shape)
    results = gradcheck.check_model(
        lambda flat: ViT(config, flat=flat), rng.standard_normal((8, 4, 4, 3)), np.arange(8) % 6, flat,
        method="complex", elementwise=True,
    )  # fmt: skip
    assert [r.argument for r in results if not r.passed] == ["images"]
    assert "40 = 8 * 5 is that of the tokens of the batch" in results[-1].diagnosis


def test_a_model_that_is_not_analytic_is_refused(monkeypatch):
    def wrong(self, *args, **keywords):
        logits, cache = right(self, *args, **keywords)
        return logits + 0.1 * logits.real, cache

    right, config = ViT.forward, ViTConfig(**{**MODELS["vit"], "depth": 1})
    rng = np.random.default_rng(0)
    flat = rng.standard_normal(ViT(config, dtype=np.float64).flat.size)
    problem = lambda flat: ViT(config, flat=flat), rng.standard_normal((2, 4, 4, 3)), np.arange(2), flat  # noqa: E731
    gradcheck.check_model(*problem, method="complex")
    monkeypatch.setattr(ViT, "forward", wrong)
    with pytest.raises(gradcheck.CannotTellError, match="the model is not analytic"):
        gradcheck.check_model(*problem, method="complex")


def test_the_step_can_be_chosen():
    for step in (1e-3, 1e-4):
        (result,) = gradcheck.check(cube_forward, cube_backward, [np.array([0.5])], step=step, elementwise=True)
        assert result.step == step and f"step {step:.0e}" in str(result)
        dy = result.analytic / 0.75
        assert result.rounding == pytest.approx(np.finfo(float).eps * abs(dy) * 0.125 / step)
        assert result.numerical - result.analytic == pytest.approx(dy * step**2, rel=1e-3)


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
    # s and x s (1 - s) leave a hundredth of themselves where the slope crosses zero, and all of their rounding
    assert right.passed and right.max_relative_error < 100 * ROUNDED


def test_every_tool_takes_the_readers_own_layer():
    def right_backward(dy, cache):
        x, s = cache
        return dy * (s + x * s * (1 - s))

    assert gradcheck.symmetry_error(swish_forward, right_backward, [X]) < ROUNDED
    curve = gradcheck.error_curve(swish_forward, [X], 0, "central")
    found = gradcheck.knee(curve, "central")
    assert abs(found.slope - 2) < 0.1 and found.error < 1e-8 and 1e-7 < found.step < 1e-3


def test_an_uneven_floor_does_not_bend_the_slope():
    """What rounding leaves at small steps is ten times as much here as there: where it is least, no side begins."""
    steps = np.logspace(-14, -0.5, 82)
    uneven = np.where(np.arange(82) < 10, 2e-16, 3e-15)
    for floor in (uneven, uneven[::-1], uneven * np.where(np.arange(82) % 2, 1.0, 0.1)):
        curve = gradcheck.Curve(steps, np.maximum(floor, 0.3 * steps**2), 1.0, 1.0, False)
        assert abs(gradcheck.knee(curve, "complex").slope - 2) < 0.1


def test_second_derivatives_of_the_readers_own_layer():
    """y = x W: L = sum(dy x W) has the Hessian blocks d2L/dx dW alone, known in closed form."""

    def forward(x, labels, W):
        return x @ W, (x, W)

    def backward(dy, cache):
        x, W = cache
        return dy @ W.T, None, x.T @ dy

    rng = np.random.default_rng(5)
    args = [X, np.arange(3), ROOT]
    v, V, dy = rng.standard_normal(X.shape), rng.standard_normal(ROOT.shape), rng.standard_normal((3, 4))
    for scale in (1e-8, 1.0, 1e8):
        Hx, nothing, HW = gradcheck.hessian_vector_product(forward, backward, args, [scale * v, None, scale * V], dy=dy)
        np.testing.assert_allclose(Hx / scale, dy @ V.T, rtol=1e-13)
        np.testing.assert_allclose(HW / scale, v.T @ dy, rtol=1e-13)
        assert nothing is None
    Hx, _, HW = gradcheck.hessian_vector_product(forward, backward, args, [v, None, None])  # L is the sum of y
    assert not Hx.any() and np.allclose(HW, v.T @ np.ones((3, 4)))
    _, _, HW = gradcheck.hessian_vector_product(forward, backward, args, [0 * v, None, None])
    assert not HW.any()
    with pytest.raises(ValueError, match="a list like args, of 3"):
        gradcheck.hessian_vector_product(forward, backward, args, [v])
    with pytest.raises(ValueError, match=r"direction of x0 has shape \(4, 4\), x0 has \(3, 4\)"):
        gradcheck.hessian_vector_product(forward, backward, args, [V, None, None])
    with pytest.raises(ValueError, match="x1 is no float array and cannot move"):
        gradcheck.hessian_vector_product(forward, backward, args, [v, np.arange(3), None])
    with pytest.raises(ValueError, match="a list like args"):
        gradcheck.hessian_vector_product(forward, backward, args, [None, None, None])


def test_differences_of_the_gradient_converge_to_the_hessian_vector_product():
    args = [X, np.linspace(0.5, 1.5, 4), np.zeros(4)]
    rng = np.random.default_rng(6)
    direction = [rng.standard_normal(a.shape) / 5 for a in args]
    dy = rng.standard_normal(X.shape)

    def gradient(h):
        moved = [a + h * v for a, v in zip(args, direction, strict=True)]
        return np.concatenate([g.ravel() for g in layernorm_backward(dy, layernorm_forward(*moved)[1])])

    parts = gradcheck.hessian_vector_product(layernorm_forward, layernorm_backward, args, direction, dy=dy)
    Hv = np.concatenate([part.ravel() for part in parts])
    errors = [np.linalg.norm((gradient(h) - gradient(-h)) / (2 * h) - Hv) for h in (1e-1, 1e-2, 1e-3)]
    assert 80 < errors[0] / errors[1] < 120 and 80 < errors[1] / errors[2] < 120  # O(h^2)
    assert gradcheck.hessian_error(layernorm_forward, layernorm_backward, args) < 1e-9


def test_the_hessian_is_off_where_the_backward_is_not_analytic():
    def backward(dy, x):
        return (3 * x * x + 0.1 * x.real) * dy  # the complex step does not see the last term

    assert gradcheck.hessian_error(cube_forward, cube_backward, [X]) < 1e-9
    assert gradcheck.hessian_error(cube_forward, backward, [X]) > 1e-3
    # at 1e8 a direction of length 1 would make a difference too small to be seen beside the gradient
    assert gradcheck.hessian_error(cube_forward, cube_backward, [1e8 * X]) < 1e-9
    assert gradcheck.hessian_error(cube_forward, lambda dy, x: 3 * x * x.real * dy, [1e8 * X]) > 1e-5


def test_symmetry_says_nothing_of_elementwise_functions():
    assert gradcheck.symmetry_error(swish_forward, swish_backward, [X]) < ROUNDED  # wrong, and symmetric all the same
    assert "diagonal" in gradcheck.symmetry_error.__doc__


def test_a_backward_that_is_no_gradient_is_not_symmetric():
    def backward(dy, cache):
        x, W = cache
        return dy @ W.T, 1.5 * x.T @ dy  # two arguments with different factors: no function has this gradient

    args = [X, ROOT]

    def forward(x, W):
        return x @ W, (x, W)

    assert gradcheck.symmetry_error(forward, lambda dy, c: (dy @ c[1].T, c[0].T @ dy), args) < ROUNDED
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


# ---- kinks -----------------------------------------------------------------------------------------------------------


def relu_forward(x):
    return np.maximum(x, 0.0), x


def relu_backward(dy, x):
    return dy * (x > 0)


@pytest.mark.parametrize("near", [0.0, 3e-9, -3e-9, 7e-7, 3e-6, -5e-6])
@pytest.mark.parametrize("method", ["forward", "central", "five-point"])
def test_a_right_backward_is_not_called_wrong_on_a_kink(method, near):
    """At 0, or beside it by less than a step, the backward is one of the one-sided derivatives; the rest is checked."""
    x = np.array([[near, 1.0], [-1.0, 2.0]])
    (result,) = gradcheck.check(relu_forward, relu_backward, [x], method=method, elementwise=True)
    assert result.passed and result.verdict in ("ok", "on a kink")
    if method != "forward" or near == 0.0:  # whose step is short, and to the right
        assert (result.verdict, result.kinks) == ("on a kink", 1) and result.element != (0, 0)
        assert "at (0, 0) x lies on a kink" in result.diagnosis and "move x away from the kink" in str(result)
        (along,) = gradcheck.check(relu_forward, relu_backward, [np.full((1, 1), near)], method=method)
        assert along.passed and (method == "forward" or "along this direction x lies on a kink" in along.diagnosis)


def test_a_tie_of_a_maximum_is_a_kink():
    def backward(dy, x):
        return dy[:, None] * (x == x.max(axis=1, keepdims=True))

    (result,) = gradcheck.check(lambda x: (x.max(axis=1), x), backward, [np.ones((2, 3))], elementwise=True)
    assert (result.verdict, result.kinks, result.checked) == ("on a kink", 6, 6)


@pytest.mark.parametrize("wrong", [
    lambda dy, x: 2.0 * dy * (x > 0), lambda dy, x: -dy * (x > 0), lambda dy, x: dy, lambda dy, x: 0.0 * dy,
])  # fmt: skip
def test_a_kink_excuses_no_wrong_gradient(wrong):
    """Neither beside it, where another element is wrong, nor on it, where the value is none of the subgradients."""
    x = np.array([[0.0, 1.0], [-1.0, 2.0]])
    (result,) = gradcheck.check(relu_forward, wrong, [x], elementwise=True)
    assert result.verdict == "WRONG" and result.element != (0, 0)
    (result,) = gradcheck.check(relu_forward, lambda dy, x: 1.5 * dy, [np.zeros((1, 1))], elementwise=True)
    assert result.verdict == "WRONG" and result.kinks == 0


@pytest.mark.parametrize("steep", [1e2, 1e4, 1e5])
def test_a_strong_curvature_is_no_kink(steep):
    """The derivative of tanh(steep x), off by one in a thousand, where it bends the most."""
    x = np.array([0.66, -0.3, 0.1]) / steep

    def backward(dy, x):
        return 1.001 * dy * steep / np.cosh(steep * x) ** 2

    (result,) = gradcheck.check(lambda x: (np.tanh(steep * x), x), backward, [x], elementwise=True)
    assert result.verdict == "WRONG" and result.kinks == 0


def test_a_wrong_element_can_be_worked_out_by_hand():
    """x, and each dy with the derivative of its y: their products add up to the numerical value."""
    x = np.array([[0.1, 0.2, 0.3], [1.0, 2.0, 3.0]])
    (result,) = gradcheck.check(softmax_forward, lambda dy, cache: dy * cache.y, [x], elementwise=True)
    i, j = result.element
    assert result.x == x[i, j] and {place for place, _, _ in result.terms} == {(i, 0), (i, 1), (i, 2)}
    assert sum(dy * rate for _, dy, rate in result.terms) == pytest.approx(result.numerical, rel=1e-7)
    assert abs(result.terms[0][1] * result.terms[0][2]) == max(abs(dy * rate) for _, dy, rate in result.terms)
    assert f"there x = {x[i, j]:.10g}, and the sum of dy * (derivative of y by x) over y[{i}, " in str(result)
