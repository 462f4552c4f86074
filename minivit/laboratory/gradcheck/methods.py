"""Numerical derivatives of a forward: the methods, and whether it is analytic."""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import numpy as np

from minivit.laboratory.gradcheck.arguments import CannotTellError, copies, floats, joined


class Method(NamedTuple):
    """How a derivative is approximated, and what may be expected of it: |a - n| <= atol + rtol max(|a|, |n|)."""

    step: float
    rtol: float
    atol: float
    order: int  # of the truncation error: O(step^order)


METHODS = {  # the steps are near the best ones for numbers of order 1; the tolerances leave a factor of some 100
    "forward": Method(1e-8, 1e-4, 1e-7, 1),
    "central": Method(6e-6, 1e-6, 1e-9, 2),
    "five-point": Method(1e-3, 1e-8, 1e-11, 4),
    "complex": Method(1e-30, 1e-10, 1e-12, 2),
}

LARGE = 100.0  # entries beyond this move by longer steps

COTANGENT_STREAM = 0x6479  # separates this module's random numbers from those of a caller with the same seed


OTHER_METHOD = "use another method than the complex step, such as central"

SECOND_ORDER = "second derivatives are taken by the complex step, so forward and backward must both be analytic"


def method_of(name):
    """The `Method` of a name. Raises ValueError for another name."""
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {name!r}")
    return METHODS[name]


def numerical_derivative(forward, args, index, direction, dy, method, step=None):
    """Derivative of L = sum(dy * y) with respect to argument ``index`` along a direction.

    Shapes  direction like args[index], dy like y  ->  a float
    Raises  ValueError: unknown method.  CannotTellError: for a complex argument the forward gives real numbers.
    The outputs are subtracted entry by entry before they are summed: subtracting two large sums would lose digits.
    """
    h = method_of(method).step if step is None else step

    def y(multiple):
        moved = copies(args)  # a forward that works in place must not spoil the next one
        moved[index] = args[index] + (multiple * h) * direction
        return forward(*moved)[0]

    if method == "complex":
        args = [a.astype(complex) if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a for a in args]
        moved = y(1j)
        return float((dy * require_complex("forward", moved).imag).sum() / h)
    if method == "forward":
        return float((dy * (y(1) - y(0))).sum() / h)
    if method == "central":
        return float((dy * (y(1) - y(-1))).sum() / (2 * h))
    return float((dy * (8 * (y(1) - y(-1)) - (y(2) - y(-2)))).sum() / (12 * h))


def scale_of(x):
    """How much longer the step of each entry is than a method's own: see the top of this file."""
    return np.maximum(1.0, np.abs(x) / LARGE)


def require_complex(what, value, cure=OTHER_METHOD):
    """Raises CannotTellError unless a value is complex, as the complex step needs it."""
    if not np.iscomplexobj(value):
        raise CannotTellError(
            f"the {what} gave real numbers for a complex argument: it is not analytic (abs, norm, a cast to float, "
            f"an array made as float?); {cure}"
        )
    return value


def require_analytic(what, function, args, tangents, cure=OTHER_METHOD):
    """See that the complex step and central differences give the same derivative along one direction.

    Shapes  function(*args) -> an array; tangents: a list like ``args``, None for what does not move
    Raises  CannotTellError: they differ by more than 1e-4, relatively, and by ten times as much as differences of
            three lengths do among themselves. If these do not agree, they tell nothing: that is no error.
    Entries beyond 1e6 are not moved: see the top of this file on sin at 1e8.
    """
    norm, h = np.linalg.norm, METHODS["complex"].step
    tangents = {
        i: np.where(np.abs(args[i]) <= 1e6, 0.0 if tangents[i] is None else tangents[i], 0.0) for i in floats(args)
    }
    if not (length := norm(joined(tangents.values()))):
        return

    def value(step):
        moved = copies(args)
        for i, v in tangents.items():
            moved[i] = args[i] + step / length * v
        return function(*moved)

    exact, found = require_complex(what, value(1j * h), cure).imag / h, []
    for step in (METHODS["central"].step, 1e-4, 1e-7):
        with np.errstate(invalid="ignore", divide="ignore"):  # at the edge of where the function is defined
            found.append((value(step) - value(-step)) / (2 * step))
        if not norm(exact - found[-1]) > 1e-4 * max(norm(exact), norm(found[-1])):
            return
    spread = max(norm(a - b) for a, b in combinations(found, 2))
    if min(norm(exact - each) for each in found) > 10 * spread:
        raise CannotTellError(
            f"the {what} is not analytic: along a random direction the complex step gives a derivative of length "
            f"{norm(exact):.4g}, central differences one of {norm(found[0]):.4g}, {norm(exact - found[0]):.2g} from it "
            "(var, norm, abs, conj, max, ... take the modulus or the real part of a complex number, or x lies on a "
            f"kink); {cure}"
        )
