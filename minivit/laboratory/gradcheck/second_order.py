"""Second derivatives by the complex step through a backward, and two checks by them."""

from __future__ import annotations

import numpy as np

from minivit.laboratory.gradcheck.arguments import (
    arguments_of,
    copies,
    gradients_of,
    joined,
    pair_of,
    random_tangents,
    value_and_cache,
)
from minivit.laboratory.gradcheck.methods import (
    COTANGENT_STREAM,
    METHODS,
    SECOND_ORDER,
    require_analytic,
    require_complex,
    scale_of,
)


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
    args, names, moving = arguments_of(args)
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
            return joined(_gradient_at(forward, backward, moved, args, names, dy, finite=False))

        require_analytic("backward", gradient, args, direction, SECOND_ORDER)
    # a step relative to the vector keeps h^2 v^2 out of sight at any length
    longest = max(float(np.abs(v).max()) for v in direction if v is not None) or 1.0
    h = METHODS["complex"].step / longest
    moved = copies(args)
    for i in moving:  # those that stand still are complex too: the forward may add others to them in place
        moved[i] = args[i] + 1j * h * np.asarray(0.0 if direction[i] is None else direction[i], float)
    gradients = _gradient_at(forward, backward, moved, args, names, dy)
    return [g if g is None else require_complex("backward", g, SECOND_ORDER).imag / h for g in gradients]


def _gradient_at(forward, backward, moved, args, names, dy, finite=True):
    """The gradient of L = sum(dy * y) at ``moved``, real or complex: a list like ``args``.

    Raises  as `gradients_of`; and if dy has not y's shape, or of complex arguments y is real.
    """
    y, cache = pair_of(forward(*copies(moved)))
    if any(map(np.iscomplexobj, moved)):
        require_complex("forward", y, SECOND_ORDER)
    if np.ndim(dy) and np.shape(dy) != np.shape(y):
        raise ValueError(f"dy has shape {np.shape(dy)}, y has {np.shape(y)}")
    dy = np.array(np.broadcast_to(dy, np.shape(y)), np.result_type(float, np.asarray(y).dtype))
    gradients = gradients_of(backward, dy, cache, args, names, finite)
    return [gradients.get(i) for i in range(len(args))]


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
    args, _, _ = arguments_of(args)
    rng = np.random.default_rng([seed, COTANGENT_STREAM])
    dy = rng.standard_normal(np.shape(value_and_cache(forward, args)[0]))
    u, v = (random_tangents(rng, args) for _ in range(2))
    Hu, Hv = (joined(hessian_vector_product(forward, backward, args, x, dy=dy, verify=x is u)) for x in (u, v))
    u, v = joined(u), joined(v)
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
    args, names, _ = arguments_of(args)
    rng = np.random.default_rng([seed, COTANGENT_STREAM])
    dy = rng.standard_normal(np.shape(value_and_cache(forward, args)[0]))
    v = random_tangents(rng, args)
    length = np.linalg.norm(joined(v))
    v = [None if part is None else part / length * scale_of(a) for a, part in zip(args, v, strict=True)]
    require_analytic("forward", lambda *moved: pair_of(forward(*moved))[0], args, v, SECOND_ORDER)

    def gradient(multiple):
        moved = [a if part is None else a + multiple * h * part for a, part in zip(args, v, strict=True)]
        return joined(_gradient_at(forward, backward, moved, args, names, dy))

    h = METHODS["central"].step
    Hv = joined(hessian_vector_product(forward, backward, args, v, dy=dy, verify=False))
    difference = (gradient(1) - gradient(-1)) / (2 * h)
    return float(np.linalg.norm(Hv - difference) / (np.linalg.norm(Hv) + np.linalg.norm(gradient(0)) or 1.0))
