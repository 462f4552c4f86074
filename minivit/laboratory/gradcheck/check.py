"""The check of a backward, or of a whole model, against numerical derivatives."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np

from minivit.base.backend import to_device, to_host
from minivit.laboratory.gradcheck.arguments import (
    arguments_of,
    copies,
    gradients_of,
    pair_of,
    random_tangents,
    value_and_cache,
)  # fmt: skip
from minivit.laboratory.gradcheck.diagnosis import diagnose, sizes_of
from minivit.laboratory.gradcheck.kinks import kink_at
from minivit.laboratory.gradcheck.methods import (
    COTANGENT_STREAM,
    LARGE,
    METHODS,
    method_of,
    numerical_derivative,
    require_analytic,
    scale_of,
)
from minivit.layers.loss import softmax_cross_entropy_backward, softmax_cross_entropy_forward

SHOWN = 6  # terms of a sum that are written out


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
    kinks: int = 0  # at how many of the numbers x lies on or beside a kink, so that nothing can be told there
    x: float | None = None  # at a wrong element: the number that moved,
    terms: tuple = ()  # and (index in y, dy there, derivative of y there by x), the largest products first

    @property
    def verdict(self):
        """In words."""
        if not self.passed:
            return "WRONG"
        return "on a kink" if self.kinks else "too small to tell" if self.too_small else "ok"

    @property
    def by_hand(self):
        """What a reader needs to work a wrong element out with a pencil; "" where there is none."""
        if self.x is None:
            return ""
        sums = " + ".join(f"({dy:.6g}) * ({rate:.6g})" for _, dy, rate in self.terms[:SHOWN])
        more = f" + {len(self.terms) - SHOWN} more" if len(self.terms) > SHOWN else ""
        places = ", ".join(f"y[{', '.join(map(str, place))}]" for place, _, _ in self.terms[:SHOWN])
        text = f"there x = {self.x:.10g}"
        return text + (f", and the sum of dy * (derivative of y by x) over {places} is {sums}{more}" if sums else "")

    def __str__(self):
        where = "" if self.element is None else f" at {self.element}"
        text = (
            f"d{self.argument}: {self.verdict}, {self.method} differences{where}: "
            f"analytic {self.analytic:.10g}, numerical {self.numerical:.10g}, "
            f"relative error {self.max_relative_error:.1e}, step {self.step:.0e}"
        )
        return text + "".join(f"; {more}" for more in (self.diagnosis, self.by_hand) if more)


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
    method_of(method)
    args, names, moving = arguments_of(args, names)
    # A stream of its own: with the caller's x drawn from the same seed, dy would equal x, and x^T dy hide a transpose.
    rng = np.random.default_rng([seed, COTANGENT_STREAM])
    y, cache = value_and_cache(forward, args)
    if method == "complex":
        tangents = random_tangents(np.random.default_rng([seed, COTANGENT_STREAM, 1]), args)
        require_analytic("forward", lambda *moved: pair_of(forward(*moved))[0], args, tangents)
    dy = rng.standard_normal(np.shape(y))
    terms = float(np.abs(dy * y).sum())  # before a backward that works in place
    gradients = gradients_of(backward, dy, cache, args, names)
    sizes = sizes_of({names[i]: args[i].shape for i in moving})

    def judge(i, gradient):
        return check_argument(forward, args, i, names[i], gradient, dy, method, step, elementwise, rng, sizes, terms)

    results = {i: judge(i, gradients[i]) for i in moving}
    for i, j in permutations(moving, 2):
        if results[i].passed or args[i].shape != args[j].shape or not np.any(gradients[i]):
            continue
        if judge(j, gradients[i]).verdict == "ok":
            other = f"it is the gradient of {names[j]}"
            swapped = judge(i, gradients[j]).passed
            results[i] = replace(results[i], diagnosis=f"{other}: the two are swapped" if swapped else other)
    return list(results.values())


def check_argument(forward, args, i, name, gradient, dy, method, step, elementwise, rng, sizes, terms):
    """The `Result` of one argument: its gradient against numerical derivatives."""
    shape, scale = args[i].shape, scale_of(args[i])
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
    shape, size = shape if elementwise else None, rms(gradient * scale)

    def along(j):
        if not elementwise:
            return direction
        only = np.zeros(args[i].shape)
        only[elements[j]] = 1.0
        return only

    def kink(j):
        length = float(np.abs(along(j) * scale).max()) if elementwise else 1.0
        found = kink_at(forward, args, i, along(j) * length, dy, analytic[j] * length, method, step)
        return found and [side / length for side in found]

    result = compare(
        name, analytic, numerical, method, elements, size, step=step, shape=shape, sizes=sizes, terms=terms, kink=kink
    )
    if result.passed or not elementwise:
        return result
    only = np.zeros(args[i].shape)
    only[result.element] = 1.0
    return replace(result, x=float(args[i][result.element]), terms=terms_of(forward, args, i, only, dy))


def terms_of(forward, args, i, direction, dy):
    """The terms of sum(dy * dy/dx): (index in y, dy, derivative of y by x), the largest products first, zeros left out.

    Empty where y is one number: there is no sum.
    """
    if not np.ndim(dy):
        return ()
    h = METHODS["central"].step * max(1.0, float(np.abs(args[i] * direction).max()) / LARGE)
    moved = [[*args[:i], args[i] + sign * h * direction, *args[i + 1 :]] for sign in (1.0, -1.0)]
    rates = np.subtract(*(forward(*copies(each))[0] for each in moved)) / (2.0 * h)
    products = np.abs(dy * rates)
    order = np.argsort(-products, axis=None, kind="stable")
    kept = order[products.reshape(-1)[order] > 1e-6 * products.max()]
    places = [tuple(int(k) for k in np.unravel_index(place, dy.shape)) for place in kept]
    return tuple((place, float(dy[place]), float(rates[place])) for place in places)


def rms(gradient):
    """The root of the mean of squares of a gradient."""
    return float(np.linalg.norm(gradient) / gradient.size**0.5)


def compare(
    name, analytic, numerical, method, elements, size, *, step=None, shape=None, sizes=None, terms=0.0, kink=None
):  # fmt: skip
    """The `Result` of analytic against numerical values, (n,) each, at the given elements.

    ``size`` is the root mean square of the whole gradient. With ``shape``, that of the whole gradient, a wrong one is
    diagnosed; ``sizes`` names lengths of axes, as in `diagnose`; ``terms`` is sum |dy y|, the size of what is
    subtracted, over how much longer the step was: a number, or (n,). ``kink(j)`` gives the one-sided differences of
    value j if x lies on a kink there, else None; it is asked about wrong values, the worst first, until one is not.
    """
    _, rtol, atol, _ = METHODS[method]
    step = METHODS[method].step if step is None else step
    # no difference is more exact than the rounding of the sum that it subtracts
    rounding = 0.0 if method == "complex" else np.finfo(np.float64).eps * terms / step
    atol, larger = np.maximum(atol, rounding), np.maximum(np.abs(analytic), np.abs(numerical))
    error = np.abs(analytic - numerical) / (atol / rtol + larger)
    error[~np.isfinite(error)] = np.inf  # a NaN must not pass for small
    order = np.argsort(-error, kind="stable")
    kinks, on_kink = 0, ""
    while kink and kinks < len(order) and error[order[kinks]] > rtol and (sides := kink(order[kinks])):
        if not kinks:
            on_kink = kink_words(elements[order[0]], sides, analytic[order[0]], METHODS[method].step)
        kinks += 1
    worst = int(order[min(kinks, len(order) - 1)])
    passed = bool(kinks == len(order) or error[worst] <= rtol)
    diagnosis = on_kink
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
        kinks,
    )


def kink_words(element, sides, analytic, step):
    """What to say of a kink, and what to do."""
    where = "along this direction" if element is None else f"at {element}"
    return (
        f"{where} x lies on a kink or less than a step beside it: one-sided differences give {sides[0]:.6g} "
        f"and {sides[1]:.6g}, the backward {analytic + 0.0:.6g}, which is right too; to check it, move x "
        f"away from the kink by more than {10 * max(step, METHODS['central'].step):.0e}"
    )


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
    there = functools.partial(to_device, device=device)
    labels = there(labels)

    def forward(flat, images):
        model = model_of(there(flat))
        logits, cache = model.forward(there(images), rng=np.random.default_rng(seed))
        loss, loss_cache = softmax_cross_entropy_forward(logits, labels, label_smoothing=label_smoothing)
        return to_host(loss), (model, cache, loss_cache)

    if method == "complex":
        tangents = random_tangents(np.random.default_rng([seed, COTANGENT_STREAM, 1]), [flat, images])
        require_analytic("model", lambda *moved: forward(*moved)[0], [flat, images], tangents)
    loss, (model, cache, loss_cache) = forward(flat, images)
    gradient, grads = model.gradient_buffer()
    dimages = to_host(model.backward(softmax_cross_entropy_backward(1.0, loss_cache), cache, grads))
    gradient, rng = to_host(gradient), np.random.default_rng([seed, COTANGENT_STREAM])
    B, N = len(images), model.config.num_tokens
    sizes = {
        "the batch size": (B,),
        "the number of tokens": (N,),
        "the width of a head": (model.config.width // model.config.num_heads,),
        "that of the tokens of the batch": (B, N),
    }
    args, one, terms = [flat, images], np.ones(()), abs(float(loss))
    results, start = [], 0
    for spec in model.table:
        part = np.s_[start : start + spec.size]
        start += spec.size
        results.append(
            check_part(forward, args, spec, part, gradient, method, step, elementwise, rng, sizes, terms)
        )  # fmt: skip
    results.append(
        check_argument(forward, args, 1, "images", dimages, one, method, step, elementwise, rng, sizes, terms)
    )
    return results


def check_part(forward, args, spec, part, gradient, method, step, elementwise, rng, sizes, terms):
    """The `Result` of one parameter, the ``part`` of the flat buffer that a row of the table says."""
    flat, one = args[0], np.ones(())
    scale, direction = scale_of(flat), np.zeros_like(flat)
    if elementwise:
        elements, numerical = list(np.ndindex(spec.shape)), np.empty(spec.size)
        for j in range(spec.size):
            place = part.start + j
            direction[place] = scale[place]
            moved = numerical_derivative(forward, args, 0, direction, one, method, step)
            numerical[j], direction[place] = moved / scale[place], 0.0
        analytic, terms = gradient[part], terms / scale[part]
    else:
        unit = rng.standard_normal(spec.size)
        direction[part] = unit / np.linalg.norm(unit) * scale[part]
        elements = [None]
        analytic = np.array([gradient @ direction])
        numerical = np.array([numerical_derivative(forward, args, 0, direction, one, method, step)])
    shape, size = spec.shape if elementwise else None, rms(gradient[part] * scale[part])
    return compare(
        spec.name, analytic, numerical, method, elements, size, step=step, shape=shape, sizes=sizes, terms=terms
    )  # fmt: skip
