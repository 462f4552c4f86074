r"""Gradient checking for any pair of the layer protocol, the reader's own functions included.

For y = f(x_1, ..., x_n) and a fixed random cotangent dy of y's shape, let L = sum(dy * y). A correct backward
returns dL/dx_i = J_i^T dy. Two ways find the same numbers from the forward alone, along a direction d (a
random one of length 1, or one entry after the other):

    central difference   (L(x + h d) - L(x - h d)) / 2h     error O(h^2) truncation + O(eps / h) rounding,
                                                            best near h = 1e-5
    complex step         Im L(x + i h d) / h, h = 1e-30     no subtraction, hence no rounding to balance: exact
                                                            to about 1e-16 (Squire & Trapp 1998); needs a
                                                            forward free of abs, max and the like

The verdict on an analytic value a against a numerical one n is |a - n| <= atol + rtol max(|a|, |n|). Reported
is

    error = |a - n| / (atol / rtol + max(|a|, |n|)),   a relative error that stays finite where the gradient is 0,

and ``error <= rtol`` is that verdict exactly. Everything is float64: in float32 rounding alone makes errors
of 1e-3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

METHODS = ("central", "complex")
STEP = {"central": 1e-5, "complex": 1e-30}


class Tolerance(NamedTuple):
    """|a - n| <= atol + rtol max(|a|, |n|)."""

    rtol: float
    atol: float


# A central difference of numbers of order 1 carries about 1e-16 / 1e-5 = 1e-11 of rounding; the complex step none.
TOLERANCE = {"central": Tolerance(1e-6, 1e-9), "complex": Tolerance(1e-10, 1e-12)}


@dataclass(frozen=True)
class Result:
    """The check of one argument's gradient by one method."""

    argument: str
    method: str
    max_relative_error: float
    analytic: float  # the two values where the error is largest
    numerical: float
    element: tuple | None  # where that is; None for a check along one random direction
    checked: int  # how many numbers were compared
    passed: bool

    def __str__(self):
        where = "" if self.element is None else f" at {self.element}"
        verdict = "ok" if self.passed else "WRONG"
        return (
            f"d{self.argument}: {verdict}, {self.method} differences{where}: analytic {self.analytic:.10g}, "
            f"numerical {self.numerical:.10g}, relative error {self.max_relative_error:.1e}"
        )


def numerical_derivative(forward, args, index, direction, dy, method):
    """Derivative of L = sum(dy * y) with respect to argument ``index`` along a direction.

    Shapes  direction like args[index], dy like y  ->  a float
    The outputs are subtracted entry by entry before they are summed: subtracting two large sums would lose
    digits.
    """
    h = STEP[method]
    if method == "complex":
        moved = [a.astype(complex) if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a for a in args]
        moved[index] = moved[index] + 1j * h * direction
        return float((dy * forward(*moved)[0].imag).sum() / h)
    ahead, behind = list(args), list(args)
    ahead[index] = args[index] + h * direction
    behind[index] = args[index] - h * direction
    return float((dy * (forward(*ahead)[0] - forward(*behind)[0])).sum() / (2 * h))


def check(forward, backward, args, *, names=None, method="central", elementwise=False, seed=0):
    """Compare a backward with numerical derivatives of its forward, argument by argument.

    ``forward(*args) -> (y, cache)`` and ``backward(dy, cache) -> dx_1`` or ``(dx_1, ..., dx_n)`` in the order
    of the arguments; fixed settings go in through a closure, and a forward that draws random numbers must
    draw the same ones at each call. Arguments that are not float arrays (labels, None) are left out; their
    gradient, if one is returned, must be None.

    Shapes  args: float64 arrays of any shape  ->  a list of `Result`, one per float argument
    Raises  TypeError: a float argument is not float64.
            ValueError: unknown method, or gradients of the wrong count or shape.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    args = list(args)
    names = names or [f"x{i}" for i in range(len(args))]
    checked = [i for i, a in enumerate(args) if isinstance(a, np.ndarray) and a.dtype.kind in "fc"]
    for i in checked:
        if args[i].dtype != np.float64:
            raise TypeError(f"argument {names[i]} is {args[i].dtype}; gradients are checked in float64")
    rng = np.random.default_rng(seed)
    y, cache = forward(*args)
    dy = rng.standard_normal(np.shape(y))
    gradients = backward(dy, cache)
    gradients = list(gradients) if isinstance(gradients, tuple) else [gradients]
    if len(gradients) < len(checked):
        raise ValueError(f"the backward returned {len(gradients)} gradients for {len(checked)} arguments")
    results = []
    for i in checked:
        gradient = gradients[i] if i < len(gradients) else None
        if gradient is None or np.shape(gradient) != args[i].shape:
            raise ValueError(f"d{names[i]} has shape {np.shape(gradient)}, {names[i]} has {args[i].shape}")
        results.append(_check_argument(forward, args, i, names[i], gradient, dy, method, elementwise, rng))
    return results


def _check_argument(forward, args, i, name, gradient, dy, method, elementwise, rng):
    shape = args[i].shape
    if elementwise:
        elements = list(np.ndindex(shape))
        analytic = np.asarray(gradient, dtype=np.float64).reshape(-1)
        numerical = np.empty(len(elements))
        for j, element in enumerate(elements):
            direction = np.zeros(shape)
            direction[element] = 1.0
            numerical[j] = numerical_derivative(forward, args, i, direction, dy, method)
    else:
        direction = rng.standard_normal(shape)
        direction /= np.linalg.norm(direction)
        elements = [None]
        analytic = np.array([(gradient * direction).sum()])
        numerical = np.array([numerical_derivative(forward, args, i, direction, dy, method)])
    return compare(name, analytic, numerical, method, elements)


def compare(name, analytic, numerical, method, elements):
    """The `Result` of analytic against numerical values, (n,) each, at the given elements."""
    rtol, atol = TOLERANCE[method]
    error = np.abs(analytic - numerical) / (atol / rtol + np.maximum(np.abs(analytic), np.abs(numerical)))
    error[~np.isfinite(error)] = np.inf  # a NaN must not pass for small
    worst = int(error.argmax())
    return Result(
        name,
        method,
        float(error[worst]),
        float(analytic[worst]),
        float(numerical[worst]),
        elements[worst],
        len(error),
        bool(error[worst] <= rtol),
    )


def check_model(model_of, images, labels, flat, *, method="central", elementwise=False, label_smoothing=0.0, seed=0):
    """Check a whole model, parameter by parameter and the pictures too, on the cross-entropy of a batch.

    ``model_of(flat)`` makes the model around a parameter buffer; dropout, where the configuration has any, is
    active with the same masks at each call.

    Shapes  images (B, H, W, C) float64, labels (B,), flat (n,) float64
            ->  a list of `Result`, one per parameter and "images"
    """
    from minivit.loss import softmax_cross_entropy_backward, softmax_cross_entropy_forward

    def forward(flat, images):
        model = model_of(flat)
        logits, cache = model.forward(images, rng=np.random.default_rng(seed))
        loss, loss_cache = softmax_cross_entropy_forward(logits, labels, label_smoothing=label_smoothing)
        return loss, (model, cache, loss_cache)

    loss, (model, cache, loss_cache) = forward(flat, images)
    gradient, grads = model.gradient_buffer()
    dimages = model.backward(softmax_cross_entropy_backward(1.0, loss_cache), cache, grads, need_dimages=True)
    rng = np.random.default_rng(seed)
    one = np.ones(())
    results, start = [], 0
    for spec in model.table:
        part = np.s_[start : start + spec.size]
        start += spec.size
        direction = np.zeros_like(flat)
        if elementwise:
            elements, numerical = list(np.ndindex(spec.shape)), np.empty(spec.size)
            for j in range(spec.size):
                direction[part.start + j] = 1.0
                numerical[j] = numerical_derivative(forward, [flat, images], 0, direction, one, method)
                direction[part.start + j] = 0.0
            analytic = gradient[part]
        else:
            unit = rng.standard_normal(spec.size)
            direction[part] = unit / np.linalg.norm(unit)
            elements = [None]
            analytic = np.array([gradient @ direction])
            numerical = np.array([numerical_derivative(forward, [flat, images], 0, direction, one, method)])
        results.append(compare(spec.name, analytic, numerical, method, elements))
    results.append(_check_argument(forward, [flat, images], 1, "images", dimages, one, method, elementwise, rng))
    return results


def adjoint_error(forward, backward, jvp, args, *, seed=0):
    """How far a backward is from being the transpose of a forward-mode derivative: no step size, no truncation.

    Math    for J = dy/dx, random tangents v and a random cotangent u: |<J v, u> - <v, J^T u>| / (|J v| |u|),
            a few 1e-16 where both are right
    ``jvp(*tangents, cache) -> ydot`` takes a tangent for each argument of ``forward``, None where the argument is no
    float array.
    """
    rng = np.random.default_rng(seed)
    y, cache = forward(*args)
    tangents = [
        rng.standard_normal(a.shape) if isinstance(a, np.ndarray) and a.dtype.kind == "f" else None for a in args
    ]
    u = rng.standard_normal(np.shape(y))
    ydot = jvp(*tangents, cache)
    gradients = backward(u, cache)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    transposed = sum((v * g).sum() for v, g in zip(tangents, gradients, strict=False) if v is not None)
    return float(abs((ydot * u).sum() - transposed) / (np.linalg.norm(ydot) * np.linalg.norm(u)))
