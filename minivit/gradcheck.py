r"""Gradient checking for any pair of the layer protocol, the reader's own functions included.

For y = f(x_1, ..., x_n) and a fixed random cotangent dy of y's shape, let L = sum(dy * y). A correct backward
returns dL/dx_i = J_i^T dy. The same numbers are found from the forward alone, along a direction d (a random one of
length 1, or one entry after the other), by

    forward     (L(x + h d) - L(x)) / h                                          error O(h)   + rounding eps / h
    central     (L(x + h d) - L(x - h d)) / 2h                                   error O(h^2) + rounding eps / h
    five-point  (8 L(x + h d) - 8 L(x - h d) - L(x + 2h d) + L(x - 2h d)) / 12h  error O(h^4) + rounding eps / h
    complex     Im L(x + i h d) / h,  h = 1e-30                                  error O(h^2), no rounding to balance

A difference subtracts two nearly equal numbers: the smaller h, the fewer digits are left. The error is smallest where
truncation and rounding meet, at h of about eps^(1/2), eps^(1/3) and eps^(1/5), eps = 2.2e-16: the V of the error
curve. The complex step (Squire & Trapp 1998) subtracts nothing, so its h can be so small that no truncation is left;
it needs a forward that is analytic: free of abs, max and comparisons of values.

The verdict on an analytic value a against a numerical one n is |a - n| <= atol + rtol max(|a|, |n|). Reported is

    error = |a - n| / (atol / rtol + max(|a|, |n|)),   a relative error that stays finite where the gradient is 0,

and ``error <= rtol`` is that verdict exactly. Everything is float64: in float32 rounding alone makes errors of 1e-3.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


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


COTANGENT_STREAM = 0x6479  # separates this module's random numbers from those of a caller with the same seed


@dataclass(frozen=True)
class Result:
    """The check of one argument's gradient by one method."""

    argument: str
    method: str
    step: float
    max_relative_error: float
    analytic: float  # the two values where the error is largest
    numerical: float
    element: tuple | None  # where that is; None for a check along one random direction
    checked: int  # how many numbers were compared
    size: float  # root mean square of the analytic gradient: what a derivative along a random direction is like
    passed: bool
    diagnosis: str = ""  # what kind of mistake the pattern of the errors suggests

    def __str__(self):
        where = "" if self.element is None else f" at {self.element}"
        text = (
            f"d{self.argument}: {'ok' if self.passed else 'WRONG'}, {self.method} differences{where}: "
            f"analytic {self.analytic:.10g}, numerical {self.numerical:.10g}, "
            f"relative error {self.max_relative_error:.1e}, step {self.step:.0e}"
        )
        return text + (f"; {self.diagnosis}" if self.diagnosis else "")


def numerical_derivative(forward, args, index, direction, dy, method, step=None):
    """Derivative of L = sum(dy * y) with respect to argument ``index`` along a direction.

    Shapes  direction like args[index], dy like y  ->  a float
    The outputs are subtracted entry by entry before they are summed: subtracting two large sums would lose digits.
    """
    h = METHODS[method].step if step is None else step

    def y(multiple):
        moved = _copies(args)  # a forward that works in place must not spoil the next one
        moved[index] = args[index] + (multiple * h) * direction
        return forward(*moved)[0]

    if method == "complex":
        args = [a.astype(complex) if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a for a in args]
        moved = y(1j)
        if not np.iscomplexobj(moved):
            raise ValueError(
                "the forward gave real numbers for a complex argument: it is not analytic (abs, norm, a cast to float, "
                "an array made as float?); use another method than the complex step"
            )
        return float((dy * moved.imag).sum() / h)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if method == "forward":
        return float((dy * (y(1) - y(0))).sum() / h)
    if method == "central":
        return float((dy * (y(1) - y(-1))).sum() / (2 * h))
    return float((dy * (8 * (y(1) - y(-1)) - (y(2) - y(-2)))).sum() / (12 * h))


def _copies(args):
    return [a.copy() if isinstance(a, np.ndarray) else a for a in args]


def _value_and_cache(forward, args):
    """y and cache of a forward.

    Raises  TypeError: it does not return a pair.  ValueError: y is not finite.
    """
    returned = forward(*_copies(args))
    if not (isinstance(returned, tuple) and len(returned) == 2):
        raise TypeError(f"the forward must return (y, cache), it returned {type(returned).__name__}")
    y, cache = returned
    if not np.isfinite(y).all():
        raise ValueError("the forward returned a value that is not finite; gradients can only be checked where it is")
    return y, cache


def check(forward, backward, args, *, names=None, method="central", elementwise=False, seed=0):
    """Compare a backward with numerical derivatives of its forward, argument by argument.

    ``forward(*args) -> (y, cache)`` and ``backward(dy, cache) -> dx_1`` or ``(dx_1, ..., dx_n)`` in the order of the
    arguments; fixed settings go in through a closure, and a forward that draws random numbers must draw the same ones
    at each call. Arguments that are not float arrays (labels, None) are left out; a gradient returned for one is not
    looked at. Element by element, a wrong gradient comes with a diagnosis.

    Shapes  args: float arrays of any shape  ->  a list of `Result`, one per float argument
    Raises  TypeError: the forward returns no (y, cache).
            ValueError: unknown method; no float argument; an argument or y is not finite; gradients of the wrong count
            or shape.
    Warns   if an argument is not float64 (it is converted), or y is not (it cannot be checked well).
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    args = list(args)
    names = names or [f"x{i}" for i in range(len(args))]
    checked = [i for i, a in enumerate(args) if isinstance(a, np.ndarray) and a.dtype.kind == "f"]
    if not checked:
        kinds = ", ".join(f"{n} is {getattr(a, 'dtype', type(a).__name__)}" for n, a in zip(names, args, strict=True))
        raise ValueError(f"no argument is a float array, so there is nothing to differentiate: {kinds}")
    for i in checked:
        if not np.isfinite(args[i]).all():
            raise ValueError(f"argument {names[i]} holds a value that is NaN or infinite")
        if args[i].dtype != np.float64:
            warnings.warn(f"{names[i]} is {args[i].dtype}; it is checked as float64", stacklevel=2)
            args[i] = args[i].astype(np.float64)
    # A stream of its own: with the caller's x drawn from the same seed, dy would equal x, and x^T dy hide a transpose.
    rng = np.random.default_rng([seed, COTANGENT_STREAM])
    y, cache = _value_and_cache(forward, args)
    if np.asarray(y).dtype != np.float64:
        warnings.warn(
            f"the forward returned {np.asarray(y).dtype} for float64 arguments: expect errors of its rounding",
            stacklevel=2,
        )
    dy = rng.standard_normal(np.shape(y))
    y = np.array(y)  # before a backward that works in place
    gradients = backward(dy.copy(), cache)
    gradients = list(gradients) if isinstance(gradients, (tuple, list)) else [gradients]
    if len(gradients) < len(checked):
        raise ValueError(f"the backward returned {len(gradients)} gradients for {len(checked)} arguments")
    sizes = {f"axis {axis} of {names[i]}": n for i in checked for axis, n in enumerate(args[i].shape)}
    results = []
    for i in checked:
        gradient = gradients[i] if i < len(gradients) else None
        shape = getattr(gradient, "shape", None) if gradient is None else np.shape(gradient)
        if shape != args[i].shape:
            raise ValueError(
                f"d{names[i]} has shape {shape}, {names[i]} has {args[i].shape}{_unsummed(shape, args[i])}"
            )
        noise = float(np.abs(dy * y).sum())
        results.append(
            _check_argument(forward, args, i, names[i], gradient, dy, method, elementwise, rng, sizes, noise)
        )
    return results


def _unsummed(shape, x):
    if shape is not None and len(shape) == x.ndim and all(n in (1, m) for n, m in zip(x.shape, shape, strict=True)):
        return ": it was broadcast, so its gradient must be summed over the axes of length 1"
    if shape is not None and len(shape) > x.ndim and shape[len(shape) - x.ndim :] == x.shape:
        return ": it was broadcast, so its gradient must be summed over the leading axes"
    return ""


def _check_argument(forward, args, i, name, gradient, dy, method, elementwise, rng, sizes, terms):
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
    shape = shape if elementwise else None
    return compare(name, analytic, numerical, method, elements, _rms(gradient), shape=shape, sizes=sizes, terms=terms)


def _rms(gradient):
    return float(np.linalg.norm(gradient) / max(gradient.size, 1) ** 0.5)


def compare(name, analytic, numerical, method, elements, size, *, shape=None, sizes=None, terms=0.0):
    """The `Result` of analytic against numerical values, (n,) each, at the given elements.

    ``size`` is the root mean square of the whole gradient. With ``shape``, that of the whole gradient, a wrong one is
    diagnosed; ``sizes`` names the lengths of axes; ``terms`` is sum |dy y|, the size of what is subtracted.
    """
    step, rtol, atol, _ = METHODS[method]
    if method != "complex":  # no difference is more exact than the rounding of the sum that it subtracts
        atol = max(atol, float(np.finfo(np.float64).eps) * terms / step)
    error = np.abs(analytic - numerical) / (atol / rtol + np.maximum(np.abs(analytic), np.abs(numerical)))
    error[~np.isfinite(error)] = np.inf  # a NaN must not pass for small
    worst = int(error.argmax())
    passed = bool(error[worst] <= rtol)
    diagnosis = ""
    if not passed:
        diagnosis = "check element by element for a diagnosis"
        if shape is not None:
            diagnosis = diagnose(
                analytic.reshape(shape), numerical.reshape(shape), error.reshape(shape) > rtol, sizes or {}
            )
    return Result(
        name,
        method,
        step,
        float(error[worst]),
        float(analytic[worst]),
        float(numerical[worst]),
        elements[worst],
        len(error),
        size,
        passed,
        diagnosis,
    )


def _diagnose_factor(factor, sizes):
    if abs(factor + 1) < 1e-3:
        return "the sign is reversed"
    if abs(factor - 1) < 1e-3:
        return f"right to {-np.log10(abs(factor - 1) + 1e-16):.0f} digits: rounding, the step, or a rounded constant"
    large, small = "large: a sum where a mean belongs", "small: a mean where a sum belongs, or a division made twice"
    for value, words in ((factor, large), (1 / factor, small)):
        found = {}  # every length that explains the factor: more than one may
        for place, n in sizes.items():
            for power, shown in ((1, f"{n}"), (0.5, f"sqrt({n})")):
                if n > 1 and abs(value - n**power) < 1e-3 * n**power:
                    found.setdefault((shown, n), place)
        if found:
            first = next(iter(found))[0]
            reasons = ", or ".join(
                f"{n} is the length of {place}" if shown == first else f"it is {shown}, {n} the length of {place}"
                for (shown, n), place in found.items()
            )
            return f"{first} times too {words}; {reasons}"
    return f"everywhere {factor:.6g} times the true value: a constant factor"


def diagnose(analytic, numerical, wrong, sizes):
    """What kind of mistake the pattern of a wrong gradient suggests, in words.

    Shapes  analytic, numerical, wrong (bool): all like the argument; sizes: {words: length of an axis}
    """

    def alike(a, b):
        return bool(np.abs(a - b).max() <= 1e-4 * np.abs(b).max())

    if not np.isfinite(analytic).all():
        return f"{np.count_nonzero(~np.isfinite(analytic))} of {analytic.size} values are NaN or infinite"
    scale = np.abs(numerical).max()
    if not analytic.any():
        return "the gradient is zero everywhere: it, or its only term, was dropped"
    if scale == 0 or scale < 1e-7 * np.abs(analytic).max():
        return "the true gradient is zero everywhere: the forward does not depend on this argument"
    # one factor everywhere: least squares c of analytic = c * numerical
    factor = float((analytic * numerical).sum() / (numerical * numerical).sum())
    if analytic.size > 1 and factor and alike(analytic, factor * numerical):
        return _diagnose_factor(factor, sizes)
    if analytic.ndim >= 2 and analytic.shape[-1] == analytic.shape[-2] and alike(analytic, numerical.swapaxes(-1, -2)):
        return "it is the transpose of the true gradient"
    if alike(np.sort(analytic, axis=None), np.sort(numerical, axis=None)):
        return "the right numbers in the wrong places: a transpose or reshape"
    if not wrong.all():
        for axis in range(wrong.ndim):
            others = tuple(a for a in range(wrong.ndim) if a != axis)
            lines = wrong.any(axis=others)
            if analytic.shape[axis] > 1 and not lines.all():
                indices = np.flatnonzero(lines)
                shown = ", ".join(map(str, indices[:5])) + (", ..." if len(indices) > 5 else "")
                return f"only index {shown} of axis {axis} is wrong ({np.count_nonzero(wrong)} of {wrong.size} values)"
    difference = analytic - numerical
    for axis in reversed(range(difference.ndim)):
        if difference.shape[axis] > 1 and alike(
            np.broadcast_to(difference.mean(axis=axis, keepdims=True), difference.shape), difference
        ):
            return f"the error is the same all along axis {axis}: a term constant there, such as a mean, is missing"
    cosine = float((analytic * numerical).sum() / (np.linalg.norm(analytic) * np.linalg.norm(numerical)))
    if cosine > 0.7:
        return f"nearly the right direction (cosine {cosine:.3f}): a term is missing or has a wrong factor"
    return f"another direction (cosine {cosine:.3f}): a wrong operand, axis or formula"


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
    rng = np.random.default_rng([seed, COTANGENT_STREAM])
    one = np.ones(())
    sizes = {
        "the batch": len(images),
        "the tokens": model.config.num_tokens,
        "a head": model.config.width // model.config.num_heads,
    }
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
        shape = spec.shape if elementwise else None
        size = _rms(gradient[part])
        results.append(
            compare(
                spec.name, analytic, numerical, method, elements, size, shape=shape, sizes=sizes, terms=abs(float(loss))
            )
        )  # fmt: skip
    args = [flat, images]
    terms = abs(float(loss))
    results.append(_check_argument(forward, args, 1, "images", dimages, one, method, elementwise, rng, sizes, terms))
    return results


def adjoint_error(forward, backward, jvp, args, *, seed=0):
    """How far a backward is from being the transpose of a forward-mode derivative: no step size, no truncation.

    Math    for J = dy/dx, random tangents v and a random cotangent u: |<J v, u> - <v, J^T u>| / (|J v| |u|),
            a few 1e-16 where both are right
    ``jvp(*tangents, cache) -> ydot`` takes a tangent for each argument of ``forward``, None where the argument is no
    float array.
    """
    rng = np.random.default_rng([seed, COTANGENT_STREAM])
    y, cache = forward(*args)
    tangents = [
        rng.standard_normal(a.shape) if isinstance(a, np.ndarray) and a.dtype.kind == "f" else None for a in args
    ]
    u = rng.standard_normal(np.shape(y))
    ydot = jvp(*tangents, cache)
    gradients = backward(u.copy(), cache)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    transposed = sum((v * g).sum() for v, g in zip(tangents, gradients, strict=False) if v is not None)
    return float(abs((ydot * u).sum() - transposed) / (np.linalg.norm(ydot) * np.linalg.norm(u)))


def symmetry_error(forward, backward, args, *, seed=0):
    """How far the second derivatives of L = sum(dy * y), taken through the backward, are from being symmetric.

    Math    H v = Im g(x + i h v) / h with g the gradient that the backward returns, h = 1e-30;
            |u^T H v - v^T H u| / (|u| |H v| + |v| |H u|): rounding, if the backward is the gradient of anything at all
    All float arguments are moved together; 0 where L is linear in them.
    """
    rng = np.random.default_rng([seed, COTANGENT_STREAM])
    moving = [i for i, a in enumerate(args) if isinstance(a, np.ndarray) and a.dtype.kind == "f"]
    dy = rng.standard_normal(np.shape(forward(*args)[0]))
    h = METHODS["complex"].step

    def product(tangents):
        moved = list(args)
        for i, v in zip(moving, tangents, strict=True):
            moved[i] = args[i] + 1j * h * v
        gradients = backward(dy.astype(complex), forward(*moved)[1])
        gradients = gradients if isinstance(gradients, tuple) else (gradients,)
        return np.concatenate([(gradients[i].imag / h).ravel() for i in moving])

    u, v = ([rng.standard_normal(args[i].shape) for i in moving] for _ in range(2))
    Hu, Hv = product(u), product(v)
    u, v = (np.concatenate([part.ravel() for part in parts]) for parts in (u, v))
    scale = np.linalg.norm(u) * np.linalg.norm(Hv) + np.linalg.norm(v) * np.linalg.norm(Hu)
    return float(abs(u @ Hv - v @ Hu) / scale) if scale else 0.0


class Curve(NamedTuple):
    """The error of a method against its step: what `error_curve` measures."""

    steps: np.ndarray  # (n,)
    errors: np.ndarray  # (n,) relative to the derivative, which the complex step gives
    derivative: float


def error_curve(forward, args, index, method, *, dtype=np.float64, steps=None, seed=0):
    """The V-curve of one argument: relative error of a numerical derivative along a random direction, step by step.

    The arithmetic is done in ``dtype``; the truth is the complex step in float64.

    Shapes  args as in `check`, steps (n,) or None for 10^-14 ... 10^-0.5  ->  `Curve`
    """
    steps = np.logspace(-14, -0.5, 82) if steps is None else np.asarray(steps)
    rng = np.random.default_rng([seed, COTANGENT_STREAM])
    dy = rng.standard_normal(np.shape(forward(*args)[0]))
    direction = rng.standard_normal(args[index].shape)
    direction /= np.linalg.norm(direction)
    truth = numerical_derivative(forward, args, index, direction, dy, "complex")
    narrow = [a.astype(dtype) if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a for a in args]
    found = [numerical_derivative(forward, narrow, index, direction.astype(dtype), dy, method, dtype(h)) for h in steps]
    errors = np.abs(np.array(found) - truth) / abs(truth)
    return Curve(steps, np.maximum(errors, 1e-17), truth)  # 0 has no place on a logarithmic axis


class Knee(NamedTuple):
    """Where a V-curve is lowest, what theory says, and how it falls to there."""

    step: float
    error: float
    predicted_step: float  # eps^(1 / (order + 1)): truncation h^order and rounding eps / h balance there
    slope: float  # of log(error) against log(step) on the truncation side, nan if there are too few points


def knee(curve, method, dtype=np.float64):
    """The lowest point of a V-curve, smoothed over neighbours, and the slope of its truncation side."""
    order, eps = METHODS[method].order, float(np.finfo(dtype).eps)
    logs, x = np.log10(curve.errors), np.log10(curve.steps)
    smooth = np.array([np.median(logs[max(i - 3, 0) : i + 4]) for i in range(len(logs))])
    best = int(smooth.argmin())
    rising = (x > x[best] + 0.5) & (x < -1.0) & (smooth > smooth[best] + 1.0)
    slope = float(np.polyfit(x[rising], logs[rising], 1)[0]) if rising.sum() >= 4 else float("nan")
    return Knee(float(curve.steps[best]), float(10 ** smooth[best]), eps ** (1 / (order + 1)), slope)
