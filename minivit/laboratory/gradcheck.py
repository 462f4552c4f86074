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
it needs a forward that is analytic: of a complex x, abs, norm, var and conj give something else than their power
series. Whether it is shows along one random direction, where the complex step and central differences must agree.

The verdict on an analytic value a against a numerical one n is |a - n| <= atol + rtol max(|a|, |n|). Reported is

    error = |a - n| / (atol / rtol + max(|a|, |n|)),   a relative error that stays finite where the gradient is 0,

and ``error <= rtol`` is that verdict exactly. Where no value exceeds atol, any gradient as small would pass: such a
result is "too small to tell". Everything is float64: in float32 rounding alone makes errors of 1e-3.

The steps are meant for numbers of order 1. An entry beyond 100 moves by a step |x_i| / 100 times as long: x_i + h is
rounded to a multiple of eps |x_i|, and at 1e8 a step of 6e-6 would be wrong in its third digit, as would be y. That is
right for functions that vary over lengths like |x|. For the others, such as sin at 1e8, a difference says little at any
step, since x itself is known to eps |x| only: check these by the complex step, which has neither trouble.
"""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass, replace
from itertools import combinations, permutations
from typing import NamedTuple

import numpy as np

from minivit.base.backend import to_device, to_host


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


@dataclass(frozen=True)
class Result:
    """The check of one argument's gradient by one method."""

    argument: str
    method: str
    step: float  # of entries that are not large; see the top of this file
    max_relative_error: float
    analytic: float  # the two values where the error is largest
    numerical: float
    element: tuple | None  # where that is; None for a check along one random direction
    checked: int  # how many numbers were compared
    size: float  # root mean square of the analytic gradient: what a derivative along a random direction is like
    passed: bool
    diagnosis: str = ""  # what kind of mistake the pattern of the errors suggests
    rounding: float = 0.0  # what the rounding of sum(dy * y) alone may add to ``numerical``
    too_small: bool = False  # passed, but all values lie below atol and are not all 0: a missing gradient passes too

    @property
    def verdict(self):
        """In words."""
        return "WRONG" if not self.passed else "too small to tell" if self.too_small else "ok"

    def __str__(self):
        where = "" if self.element is None else f" at {self.element}"
        text = (
            f"d{self.argument}: {self.verdict}, {self.method} differences{where}: "
            f"analytic {self.analytic:.10g}, numerical {self.numerical:.10g}, "
            f"relative error {self.max_relative_error:.1e}, step {self.step:.0e}"
        )
        return text + (f"; {self.diagnosis}" if self.diagnosis else "")


def numerical_derivative(forward, args, index, direction, dy, method, step=None):
    """Derivative of L = sum(dy * y) with respect to argument ``index`` along a direction.

    Shapes  direction like args[index], dy like y  ->  a float
    Raises  ValueError: unknown method.  CannotTellError: for a complex argument the forward gives real numbers.
    The outputs are subtracted entry by entry before they are summed: subtracting two large sums would lose digits.
    """
    h = _method(method).step if step is None else step

    def y(multiple):
        moved = _copies(args)  # a forward that works in place must not spoil the next one
        moved[index] = args[index] + (multiple * h) * direction
        return forward(*moved)[0]

    if method == "complex":
        args = [a.astype(complex) if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a for a in args]
        moved = y(1j)
        return float((dy * _analytic("forward", moved).imag).sum() / h)
    if method == "forward":
        return float((dy * (y(1) - y(0))).sum() / h)
    if method == "central":
        return float((dy * (y(1) - y(-1))).sum() / (2 * h))
    return float((dy * (8 * (y(1) - y(-1)) - (y(2) - y(-2)))).sum() / (12 * h))


def _method(name):
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {name!r}")
    return METHODS[name]


class CannotTellError(ValueError):
    """What a forward or backward returns does not allow a check: it is not analytic, or not finite."""


OTHER_METHOD = "use another method than the complex step, such as central"
SECOND_ORDER = "second derivatives are taken by the complex step, so forward and backward must both be analytic"


def _analytic(what, value, cure=OTHER_METHOD):
    if not np.iscomplexobj(value):
        raise CannotTellError(
            f"the {what} gave real numbers for a complex argument: it is not analytic (abs, norm, a cast to float, "
            f"an array made as float?); {cure}"
        )
    return value


def _require_analytic(what, function, args, tangents, cure=OTHER_METHOD):
    """See that the complex step and central differences give the same derivative along one direction.

    Shapes  function(*args) -> an array; tangents: a list like ``args``, None for what does not move
    Raises  CannotTellError: they differ by more than 1e-4, relatively, and by ten times as much as differences of
            three lengths do among themselves. If these do not agree, they tell nothing: that is no error.
    Entries beyond 1e6 are not moved: see the top of this file on sin at 1e8.
    """
    norm, h = np.linalg.norm, METHODS["complex"].step
    tangents = {
        i: np.where(np.abs(args[i]) <= 1e6, 0.0 if tangents[i] is None else tangents[i], 0.0) for i in _floats(args)
    }
    if not (length := norm(_joined(tangents.values()))):
        return

    def value(step):
        moved = _copies(args)
        for i, v in tangents.items():
            moved[i] = args[i] + step / length * v
        return function(*moved)

    exact, found = _analytic(what, value(1j * h), cure).imag / h, []
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


def _copies(args):
    return [a.copy() if isinstance(a, np.ndarray) else a for a in args]


def _floats(args):
    """The places of the arguments that are differentiated: float arrays."""
    return [i for i, a in enumerate(args) if isinstance(a, np.ndarray) and a.dtype.kind == "f"]


def _arguments(args, names=None):
    """The arguments as a list, the name of each, and the places of the float arrays.

    Raises  TypeError: ``args`` is no list or tuple.
            ValueError: names of another number; no float array; an empty one, or one with a NaN.
    Warns   if a float array is not float64: it is converted. A NumPy float is an array without axes.
    """
    if not isinstance(args, (list, tuple)):
        raise TypeError(f"args must be a list of arguments, it is {type(args).__name__}; for one argument write [x]")
    args = [np.asarray(a) if isinstance(a, np.floating) else a for a in args]
    names = list(names or (f"x{i}" for i in range(len(args))))
    if len(names) != len(args):
        raise ValueError(f"there are {len(names)} names ({', '.join(names)}) for {len(args)} arguments")
    moving = _floats(args)
    if not moving:
        kinds = ", ".join(f"{n} is {getattr(a, 'dtype', type(a).__name__)}" for n, a in zip(names, args, strict=True))
        raise ValueError(f"no argument is a float array, so there is nothing to differentiate: {kinds}")
    for i in moving:
        if not args[i].size:
            raise ValueError(f"argument {names[i]} is empty, its shape {args[i].shape}: there is nothing to check")
        if not np.isfinite(args[i]).all():
            raise ValueError(f"argument {names[i]} holds a value that is NaN or infinite")
        if args[i].dtype != np.float64:
            warnings.warn(f"{names[i]} is {args[i].dtype}; it is checked as float64", stacklevel=3)
            args[i] = args[i].astype(np.float64)
    return args, names, moving


def _numbers(what, value):
    if np.asarray(value).dtype.kind not in "iufc":
        raise TypeError(f"the {what} must be an array of numbers, it is {type(value).__name__}")
    return value


def _pair(returned):
    if not (isinstance(returned, tuple) and len(returned) == 2):
        raise TypeError(f"the forward must return (y, cache), it returned {type(returned).__name__}")
    _numbers("y that the forward returns", returned[0])
    return returned


def _value_and_cache(forward, args):
    """y and cache of a forward, which is called twice to see that it is a function.

    Raises  TypeError: it does not return a pair, or y is no array of numbers.
            ValueError: y is empty, complex or not finite; the second call returned another one.
    Warns   if y is not float64: it cannot be checked well.
    """
    y, cache = _pair(forward(*_copies(args)))
    if not np.size(y):
        raise ValueError(f"the forward returned an empty y, of shape {np.shape(y)}: there is nothing to differentiate")
    if np.iscomplexobj(y):
        raise ValueError("the forward returned complex numbers for real arguments; the gradient of a real y is checked")
    if not np.isfinite(y).all():
        raise ValueError("the forward returned a value that is not finite; gradients can only be checked where it is")
    again, _ = _pair(forward(*_copies(args)))
    if np.shape(again) != np.shape(y) or not np.abs(again - y).max() <= 1e-9 * np.abs(y).max():
        raise ValueError(
            "the forward returned different numbers for the same arguments: it must not draw fresh random ones "
            "(make a Generator of the same seed at each call) or remember the last call"
        )
    if (dtype := np.asarray(y).dtype) != np.float64:
        warnings.warn(
            f"the forward returned {dtype} for float64 arguments: expect errors of its rounding", stacklevel=3
        )
    return y, cache


def _gradients(backward, dy, cache, args, names, finite=False):
    """{place: gradient} of the float arguments.

    Raises  TypeError: one is no array of numbers.
            ValueError: gradients of the wrong count or shape; complex ones for a real dy.
            CannotTellError: one is not ``finite``, if they must be.
    """
    gradients, moving = backward(dy.copy(), cache), _floats(args)
    gradients = list(gradients) if isinstance(gradients, (tuple, list)) else [gradients]
    if not len(moving) <= len(gradients) <= len(args):
        count = len(moving) if len(gradients) < len(moving) else len(args)
        raise ValueError(f"the backward returned {len(gradients)} gradients for {count} arguments")
    gradients = {i: gradients[i] if i < len(gradients) else None for i in moving}
    for i, gradient in gradients.items():
        shape = None if gradient is None else np.shape(gradient)
        if shape != args[i].shape:
            raise ValueError(
                f"d{names[i]} has shape {shape}, {names[i]} has {args[i].shape}{_unsummed(shape, args[i])}"
            )
        _numbers(f"gradient d{names[i]}", gradient)
        if np.iscomplexobj(gradient) and not np.iscomplexobj(dy):
            raise ValueError(f"the gradient d{names[i]} is complex, although x and dy are real")
        if finite and not np.isfinite(gradient).all():
            raise CannotTellError(f"the gradient d{names[i]} holds a value that is NaN or infinite")
    return gradients


def check(forward, backward, args, *, names=None, method="central", step=None, elementwise=False, seed=0):
    """Compare a backward with numerical derivatives of its forward, argument by argument.

    ``forward(*args) -> (y, cache)`` and ``backward(dy, cache) -> dx_1`` or ``(dx_1, ..., dx_n)`` in the order of the
    arguments; fixed settings go in through a closure, and a forward that draws random numbers must draw the same ones
    at each call. Arguments that are not float arrays (labels, None) are left out; a gradient returned for one is not
    looked at. Element by element, a wrong gradient comes with a diagnosis; in any case, one that is the gradient of
    another argument of the same shape is called so. ``step`` replaces the method's own.

    Shapes  args: float arrays of any shape  ->  a list of `Result`, one per float argument
    Raises  TypeError: args is no list; the forward returns no (y, cache), or a y that is no array of numbers.
            ValueError: unknown method; no float argument; names of another number; an argument or y is empty or not
            finite; a forward that returns different numbers at two calls; gradients of the wrong count or shape, or
            complex; the complex step of a forward that is not analytic.
    Warns   if an argument is not float64 (it is converted), or y is not (it cannot be checked well).
    """
    _method(method)
    args, names, moving = _arguments(args, names)
    # A stream of its own: with the caller's x drawn from the same seed, dy would equal x, and x^T dy hide a transpose.
    rng = np.random.default_rng([seed, COTANGENT_STREAM])
    y, cache = _value_and_cache(forward, args)
    if method == "complex":
        tangents = _random_tangents(np.random.default_rng([seed, COTANGENT_STREAM, 1]), args)
        _require_analytic("forward", lambda *moved: _pair(forward(*moved))[0], args, tangents)
    dy = rng.standard_normal(np.shape(y))
    terms = float(np.abs(dy * y).sum())  # before a backward that works in place
    gradients = _gradients(backward, dy, cache, args, names)
    sizes = _sizes({names[i]: args[i].shape for i in moving})

    def judge(i, gradient):
        return _check_argument(forward, args, i, names[i], gradient, dy, method, step, elementwise, rng, sizes, terms)

    results = {i: judge(i, gradients[i]) for i in moving}
    for i, j in permutations(moving, 2):
        if results[i].passed or args[i].shape != args[j].shape or not np.any(gradients[i]):
            continue
        if judge(j, gradients[i]).verdict == "ok":
            other = f"it is the gradient of {names[j]}"
            swapped = judge(i, gradients[j]).passed
            results[i] = replace(results[i], diagnosis=f"{other}: the two are swapped" if swapped else other)
    return list(results.values())


def _sizes(shapes):
    """{words: lengths of axes} of named shapes: each axis, and the products of several axes of one argument."""
    axes, products = {}, {}
    for name, shape in shapes.items():
        axes |= {f"the length of axis {axis} of {name}": (n,) for axis, n in enumerate(shape)}
        long = [axis for axis, n in enumerate(shape) if n > 1]
        for count in range(2, len(long) + 1):
            for chosen in combinations(long, count):
                some = f"that of axes {', '.join(map(str, chosen))} of {name}"
                words = some if count < len(long) else f"the size of {name}"
                products[words] = tuple(shape[axis] for axis in chosen)
    return axes | products


def _unsummed(shape, x):
    if shape is not None and len(shape) == x.ndim and all(n in (1, m) for n, m in zip(x.shape, shape, strict=True)):
        return ": it was broadcast, so its gradient must be summed over the axes of length 1"
    if shape is not None and len(shape) > x.ndim and shape[len(shape) - x.ndim :] == x.shape:
        return ": it was broadcast, so its gradient must be summed over the leading axes"
    return ""


def _scale(x):
    """How much longer the step of each entry is than a method's own: see the top of this file."""
    return np.maximum(1.0, np.abs(x) / LARGE)


def _check_argument(forward, args, i, name, gradient, dy, method, step, elementwise, rng, sizes, terms):
    shape, scale = args[i].shape, _scale(args[i])
    if elementwise:
        elements = list(np.ndindex(shape))
        analytic = np.asarray(gradient, dtype=np.float64).reshape(-1)
        numerical = np.empty(len(elements))
        for j, element in enumerate(elements):
            direction = np.zeros(shape)
            direction[element] = scale[element]
            numerical[j] = numerical_derivative(forward, args, i, direction, dy, method, step) / scale[element]
        terms = terms / scale.reshape(-1)
    else:
        direction = rng.standard_normal(shape)
        direction /= np.linalg.norm(direction)
        direction *= scale
        elements = [None]
        analytic = np.array([(gradient * direction).sum()])
        numerical = np.array([numerical_derivative(forward, args, i, direction, dy, method, step)])
    shape, size = shape if elementwise else None, _rms(gradient * scale)
    return compare(name, analytic, numerical, method, elements, size, step=step, shape=shape, sizes=sizes, terms=terms)


def _rms(gradient):
    return float(np.linalg.norm(gradient) / gradient.size**0.5)


def compare(name, analytic, numerical, method, elements, size, *, step=None, shape=None, sizes=None, terms=0.0):
    """The `Result` of analytic against numerical values, (n,) each, at the given elements.

    ``size`` is the root mean square of the whole gradient. With ``shape``, that of the whole gradient, a wrong one is
    diagnosed; ``sizes`` names lengths of axes, as in `diagnose`; ``terms`` is sum |dy y|, the size of what is
    subtracted, over how much longer the step was: a number, or (n,).
    """
    _, rtol, atol, _ = METHODS[method]
    step = METHODS[method].step if step is None else step
    # no difference is more exact than the rounding of the sum that it subtracts
    rounding = 0.0 if method == "complex" else np.finfo(np.float64).eps * terms / step
    atol, larger = np.maximum(atol, rounding), np.maximum(np.abs(analytic), np.abs(numerical))
    error = np.abs(analytic - numerical) / (atol / rtol + larger)
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
        float(np.broadcast_to(rounding, error.shape)[worst]),
        passed and bool((larger <= atol).all() and larger.any()),
    )


def _diagnose_factor(factor, sizes):
    if abs(factor + 1) < 1e-3:
        return "the sign is reversed"
    if abs(factor - 1) < 1e-3:
        return f"right to {-np.log10(abs(factor - 1) + 1e-16):.0f} digits: rounding, the step, or a rounded constant"
    large, small = "large: a sum where a mean belongs", "small: a mean where a sum belongs, or a division made twice"
    for value, words in ((factor, large), (1 / factor, small)):

        def near(n, value=value):
            return abs(value - n) < 1e-3 * n

        # everything that explains the factor, the plainest first: {what it is: why}
        reasons = {}
        for words_of, lengths in sizes.items():
            n, product = math.prod(lengths), " * ".join(map(str, lengths))
            if n > 1 and near(n):
                reasons.setdefault((n, product), f"{n if len(lengths) == 1 else f'{n} = {product}'} is {words_of}")
        if near(2):
            words = words if reasons else words.partition(":")[0]
            reasons[2, ""] = "it may be a plain factor 2, as in the derivative of a square"
        for words_of, lengths in sizes.items():
            n, *others = lengths
            if n > 1 and not others and near(n**0.5):
                reasons.setdefault((f"sqrt({n})", ""), f"it is sqrt({n}), {n} {words_of}")
        if reasons:
            first, _ = next(iter(reasons))
            return f"{first} times too {words}; {', or '.join(reasons.values())}"
    return f"everywhere {factor:.6g} times the true value: a constant factor"


def diagnose(analytic, numerical, wrong, sizes):
    """What kind of mistake the pattern of a wrong gradient suggests, in words.

    Shapes  analytic, numerical, wrong (bool): all like the argument
    ``sizes`` names what a factor may come from: {words: lengths of axes}, several lengths if they are multiplied.
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


def on_device(forward, backward, device):
    """The pair computed on a device (see `minivit.base.backend.find_device`), from and to NumPy arrays, for `check`."""

    def there(value):
        if not isinstance(value, np.ndarray):
            return value
        return to_device(value, device) if value.ndim else value.item()

    def forward_there(*args):
        y, cache = forward(*map(there, args))
        return to_host(y), cache

    def backward_there(dy, cache):
        gradients = backward(there(dy), cache)
        gradients = gradients if isinstance(gradients, tuple) else (gradients,)
        return tuple(gradient if gradient is None else to_host(gradient) for gradient in gradients)

    return (forward, backward) if device == "cpu" else (forward_there, backward_there)


def check_model(
    model_of,
    images,
    labels,
    flat,
    *,
    method="central",
    step=None,
    elementwise=False,
    label_smoothing=0.0,
    seed=0,
    device="cpu",
):
    """Check a whole model, parameter by parameter and the images too, on the cross-entropy of a batch.

    ``model_of(flat)`` makes the model around a parameter buffer; dropout, where the configuration has any, is
    active with the same masks at each call. The model's work is done on ``device``.

    Shapes  images (B, H, W, C) float64, labels (B,), flat (n,) float64
            ->  a list of `Result`, one per parameter and "images"
    """
    from minivit.layers.loss import softmax_cross_entropy_backward, softmax_cross_entropy_forward

    there = functools.partial(to_device, device=device)
    labels = there(labels)

    def forward(flat, images):
        model = model_of(there(flat))
        logits, cache = model.forward(there(images), rng=np.random.default_rng(seed))
        loss, loss_cache = softmax_cross_entropy_forward(logits, labels, label_smoothing=label_smoothing)
        return to_host(loss), (model, cache, loss_cache)

    if method == "complex":
        tangents = _random_tangents(np.random.default_rng([seed, COTANGENT_STREAM, 1]), [flat, images])
        _require_analytic("model", lambda *moved: forward(*moved)[0], [flat, images], tangents)
    loss, (model, cache, loss_cache) = forward(flat, images)
    gradient, grads = model.gradient_buffer()
    dimages = model.backward(softmax_cross_entropy_backward(1.0, loss_cache), cache, grads)
    gradient, dimages = to_host(gradient), to_host(dimages)
    rng = np.random.default_rng([seed, COTANGENT_STREAM])
    one, scale = np.ones(()), _scale(flat)
    B, N = len(images), model.config.num_tokens
    sizes = {
        "the batch size": (B,),
        "the number of tokens": (N,),
        "the width of a head": (model.config.width // model.config.num_heads,),
        "that of the tokens of the batch": (B, N),
    }
    results, start = [], 0
    for spec in model.table:
        part = np.s_[start : start + spec.size]
        start += spec.size
        direction, terms = np.zeros_like(flat), abs(float(loss))
        if elementwise:
            elements, numerical = list(np.ndindex(spec.shape)), np.empty(spec.size)
            for j in range(spec.size):
                place = part.start + j
                direction[place] = scale[place]
                moved = numerical_derivative(forward, [flat, images], 0, direction, one, method, step)
                numerical[j], direction[place] = moved / scale[place], 0.0
            analytic, terms = gradient[part], terms / scale[part]
        else:
            unit = rng.standard_normal(spec.size)
            direction[part] = unit / np.linalg.norm(unit) * scale[part]
            elements = [None]
            analytic = np.array([gradient @ direction])
            numerical = np.array([numerical_derivative(forward, [flat, images], 0, direction, one, method, step)])
        shape, size = spec.shape if elementwise else None, _rms(gradient[part] * scale[part])
        results.append(
            compare(
                spec.name, analytic, numerical, method, elements, size, step=step, shape=shape, sizes=sizes, terms=terms
            )
        )
    args = [flat, images]
    terms = abs(float(loss))
    results.append(
        _check_argument(forward, args, 1, "images", dimages, one, method, step, elementwise, rng, sizes, terms)
    )
    return results


def hessian_vector_product(forward, backward, args, direction, *, dy=1.0, verify=True):
    """H v for the Hessian H of L = sum(dy * y), by the complex step through the backward: exact to rounding.

    Math    the backward's gradient g is a chain of analytic operations: g(x + i h v) = g(x) + i h H v - h^2 (...), so
            H v = Im g(x + i h v) / h with h = 1e-30 / max |v|
    Shapes  direction: a list like ``args`` of arrays v, None for what does not move; dy like y, or one number for all
            ->  a list like ``args``: H v of each float argument, None for the others
    Raises  TypeError, ValueError: as `check`.
            ValueError: no direction, or one of another count or shape, or not finite; dy of another shape.
            CannotTellError: the gradient is not finite; forward or backward is not analytic.
    Warns   as `check`.
    That the gradient is analytic is seen along v, unless ``verify`` is false: that costs as much as another product,
    and two to six gradients.
    A forward that draws random numbers must draw the same at each call.
    """
    args, names, moving = _arguments(args)
    if not isinstance(direction, (list, tuple)) or len(direction) != len(args) or all(v is None for v in direction):
        raise ValueError(f"direction must be a list like args, of {len(args)} arrays, or None for what does not move")
    for i, v in enumerate(direction):
        if v is not None and (i not in moving or np.shape(v) != args[i].shape):
            of = f"has {args[i].shape}" if i in moving else "is no float array and cannot move"
            raise ValueError(f"the direction of {names[i]} has shape {np.shape(v)}, {names[i]} {of}")
        if v is not None and not np.isfinite(v).all():
            raise ValueError(f"the direction of {names[i]} holds a value that is NaN or infinite")
    if verify:

        def gradient(*moved):  # beside x it need not be finite
            return _joined(_gradient_at(forward, backward, moved, args, names, dy, finite=False))

        _require_analytic("backward", gradient, args, direction, SECOND_ORDER)
    # a step relative to the vector keeps h^2 v^2 out of sight at any length
    longest = max(float(np.abs(v).max()) for v in direction if v is not None) or 1.0
    h = METHODS["complex"].step / longest
    moved = _copies(args)
    for i in moving:  # those that stand still are complex too: the forward may add others to them in place
        moved[i] = args[i] + 1j * h * np.asarray(0.0 if direction[i] is None else direction[i], float)
    gradients = _gradient_at(forward, backward, moved, args, names, dy)
    return [g if g is None else _analytic("backward", g, SECOND_ORDER).imag / h for g in gradients]


def _gradient_at(forward, backward, moved, args, names, dy, finite=True):
    """The gradient of L = sum(dy * y) at ``moved``, real or complex: a list like ``args``.

    Raises  as `_gradients`; and if dy has not y's shape, or of complex arguments y is real.
    """
    y, cache = _pair(forward(*_copies(moved)))
    if any(map(np.iscomplexobj, moved)):
        _analytic("forward", y, SECOND_ORDER)
    if np.ndim(dy) and np.shape(dy) != np.shape(y):
        raise ValueError(f"dy has shape {np.shape(dy)}, y has {np.shape(y)}")
    dy = np.array(np.broadcast_to(dy, np.shape(y)), np.result_type(float, np.asarray(y).dtype))
    gradients = _gradients(backward, dy, cache, args, names, finite)
    return [gradients.get(i) for i in range(len(args))]


def _random_tangents(rng, args):
    moving = _floats(args)
    return [rng.standard_normal(a.shape) if i in moving else None for i, a in enumerate(args)]


def _joined(parts):
    """The arrays among the parts as one vector."""
    return np.concatenate([np.ravel(part) for part in parts if part is not None])


def symmetry_error(forward, backward, args, *, seed=0):
    """How far the second derivatives of L = sum(dy * y), taken through the backward, are from being symmetric.

    Math    |u^T H v - v^T H u| / (|u| |H v| + |v| |H u|) with H v from `hessian_vector_product`: rounding, if the
            backward is the gradient of anything at all
    All float arguments are moved together; 0 where L is linear in them. It is a necessary condition and no more: the
    Hessian of an elementwise function is diagonal, hence symmetric, for any elementwise backward, right or wrong; so is
    that of a constant times the true gradient.
    Raises  TypeError, ValueError: as `check` and `hessian_vector_product`; forward and backward must be analytic.
    Warns   as `check`.
    """
    args, _, _ = _arguments(args)
    rng = np.random.default_rng([seed, COTANGENT_STREAM])
    dy = rng.standard_normal(np.shape(_value_and_cache(forward, args)[0]))
    u, v = (_random_tangents(rng, args) for _ in range(2))
    Hu, Hv = (_joined(hessian_vector_product(forward, backward, args, x, dy=dy, verify=x is u)) for x in (u, v))
    u, v = _joined(u), _joined(v)
    scale = np.linalg.norm(u) * np.linalg.norm(Hv) + np.linalg.norm(v) * np.linalg.norm(Hu)
    return float(abs(u @ Hv - v @ Hu) / scale) if scale else 0.0


def hessian_error(forward, backward, args, *, seed=0):
    """How far `hessian_vector_product` is from central differences of the backward's gradient g.

    Math    D = (g(x + h v) - g(x - h v)) / 2h along a random v of length 1, longer where x is large, as in `check`:
            |H v - D| / (|H v| + |g|)
    All float arguments are moved together. It shows that the backward is analytic, not that it is right. A backward
    that is not, such as one with a norm in it, makes a large error, right or wrong; a forward that is not is refused.
    Raises  TypeError, ValueError: as `check` and `hessian_vector_product`.
    Warns   as `check`.
    """
    args, names, _ = _arguments(args)
    rng = np.random.default_rng([seed, COTANGENT_STREAM])
    dy = rng.standard_normal(np.shape(_value_and_cache(forward, args)[0]))
    v = _random_tangents(rng, args)
    length = np.linalg.norm(_joined(v))
    v = [None if part is None else part / length * _scale(a) for a, part in zip(args, v, strict=True)]
    _require_analytic("forward", lambda *moved: _pair(forward(*moved))[0], args, v, SECOND_ORDER)

    def gradient(multiple):
        moved = [a if part is None else a + multiple * h * part for a, part in zip(args, v, strict=True)]
        return _joined(_gradient_at(forward, backward, moved, args, names, dy))

    h = METHODS["central"].step
    Hv = _joined(hessian_vector_product(forward, backward, args, v, dy=dy, verify=False))
    difference = (gradient(1) - gradient(-1)) / (2 * h)
    return float(np.linalg.norm(Hv - difference) / (np.linalg.norm(Hv) + np.linalg.norm(gradient(0)) or 1.0))


class Curve(NamedTuple):
    """The error of a method against its step: what `error_curve` measures."""

    steps: np.ndarray  # (n,)
    errors: np.ndarray  # (n,) relative to the derivative, which the complex step gives
    derivative: float
    noise: float  # |dy * y| / |derivative|: rounding alone makes errors of about eps noise / h
    linear: bool  # y is a linear function along the direction: there is no truncation


def error_curve(forward, args, index, method, *, dtype=np.float64, steps=None, seed=0):
    """The V-curve of one argument: relative error of a numerical derivative along a random direction, step by step.

    The arithmetic is done in ``dtype``; the truth is the complex step in float64.

    Shapes  args as in `check`, steps (n,) or None for 10^-14 ... 10^-0.5  ->  `Curve`
    Raises  TypeError, ValueError: as `check`; args[index] is no float array; a step is not positive; the derivative is
            zero; the forward is not analytic.
    Warns   as `check`.
    """
    _method(method)
    args, names, moving = _arguments(args)
    if index not in moving:
        raise ValueError(f"there is no float array at args[{index}]; there is at {', '.join(map(str, moving))}")
    steps = np.logspace(-14, -0.5, 82) if steps is None else np.atleast_1d(np.asarray(steps, float))
    if not (steps.size and np.isfinite(steps).all() and (steps > 0).all()):
        raise ValueError(f"steps must be positive numbers, got {', '.join(map(str, steps)) or 'none'}")
    rng = np.random.default_rng([seed, COTANGENT_STREAM])
    y, _ = _value_and_cache(forward, args)
    dy = rng.standard_normal(np.shape(y))
    direction = rng.standard_normal(args[index].shape)
    direction /= np.linalg.norm(direction)
    moving_alone = [direction if i == index else None for i in range(len(args))]
    _require_analytic("forward", lambda *moved: _pair(forward(*moved))[0], args, moving_alone,
                      "its derivative is taken by the complex step")  # fmt: skip
    truth = numerical_derivative(forward, args, index, direction, dy, "complex")
    if not truth:
        raise ValueError(f"the derivative with respect to {names[index]} is zero: there is no relative error")
    narrow = [a.astype(dtype) if i in moving else a for i, a in enumerate(args)]
    found = [numerical_derivative(forward, narrow, index, direction.astype(dtype), dy, method, dtype(h)) for h in steps]
    errors = np.abs(np.array(found) - truth) / abs(truth)
    # a one-sided difference, whose truncation is the largest, shows none at large steps
    far = [numerical_derivative(forward, args, index, direction, dy, "forward", h) for h in (0.1, 0.3)]
    linear = bool(np.abs(np.array(far) - truth).max() < 1e-9 * abs(truth))
    noise = float(np.linalg.norm(dy * y) / abs(truth))
    return Curve(steps, np.maximum(errors, 1e-17), truth, noise, linear)  # 0 has no place on a logarithmic axis


class Knee(NamedTuple):
    """Where a V-curve is lowest, what theory says, and how it falls to there."""

    step: float
    error: float
    predicted_step: float  # (eps noise)^(1 / (order + 1)), where truncation h^order is rounding eps noise / h
    predicted_error: float  # each of the two there; the step is infinite and the error 0 if there is no truncation
    slope: float  # of log(error) against log(step) on the truncation side, nan if there are too few points


def knee(curve, method, dtype=np.float64):
    """The lowest point of a V-curve, smoothed over neighbours, and the slope of its truncation side.

    The prediction takes the function's higher derivatives to be of the order of the first.
    Raises  ValueError: unknown method.
    """
    order, eps = _method(method).order, float(np.finfo(dtype).eps)
    logs, x = np.log10(curve.errors), np.log10(curve.steps)
    smooth = np.array([np.median(logs[max(i - 3, 0) : i + 4]) for i in range(len(logs))])
    best = int(smooth.argmin())
    # the complex step has no other side, but an uneven floor of some roundings, where the least tells nothing
    low = np.flatnonzero(smooth <= max(smooth[best], np.log10(eps)) + 1.5)[-1]
    rising = (x > max(x[best] + 0.5, x[low])) & (x < -1.0) & (not curve.linear)
    slope = float(np.polyfit(x[rising], logs[rising], 1)[0]) if rising.sum() >= 4 else float("nan")
    predicted = (eps * curve.noise) ** (1 / (order + 1))
    predicted = (math.inf, 0.0) if curve.linear else (predicted, predicted**order)
    return Knee(float(curve.steps[best]), float(10 ** smooth[best]), *predicted, slope)
