"""The same work: a contender's loss, gradients and update must agree with ours before anything is timed.

An error of at most 1e-4 in the Euclidean norm of each parameter's gradient is allowed, and of 1e-5 in the loss.
float32 rounds to 6e-8, and a gradient sums up thousands of products: ours is off float64's by some 2e-6, and so are
correct contenders off ours. One with the other form of GELU, or with twice the LayerNorm epsilon, is off by 6e-4.
The loss after one update must agree too, to 1e-4 since AdamW's first step is the sign of the gradient, in which
rounding tells where the gradient is next to nothing; without the update the loss is off by some 1e-2.
"""

from __future__ import annotations

import math

import numpy as np

LOSS_TOLERANCE, GRADIENT_TOLERANCE, UPDATE_TOLERANCE = 1e-5, 1e-4, 1e-4  # relative
COARSER = {"float32": 1, "tf32": 100, "bf16": 1000}  # times these, for factors that are rounded to 2^-11 or 2^-8


class Disagreement(Exception):
    """A contender computes something else than we do: its times would mean nothing."""


def disagreement(ours, theirs):
    """How far apart two answers to "check" are, as (loss's relative error, largest error of an array, its name).

    Math    |theirs - ours| / |ours| in the Euclidean norm, array by array
    A gradient that is zero but for rounding is measured against a thousandth of the largest array's norm instead.
    Returns  inf where something is missing, of another shape, or not finite
    """
    (loss, arrays), (their_loss, their_arrays) = ours, theirs
    loss_error = 0.0 if loss is None else abs(their_loss - loss) / abs(loss)
    norms = {name: float(np.linalg.norm(array)) for name, array in arrays.items()}
    least = 1e-3 * max(norms.values())
    worst, where = 0.0, ""
    for name in arrays.keys() | their_arrays.keys():
        a, b = arrays.get(name), their_arrays.get(name)
        error = math.inf
        if a is not None and b is not None and a.shape == b.shape:
            error = float(np.linalg.norm(b - a)) / max(norms[name], least, 1e-30)
        error = error if math.isfinite(error) else math.inf
        if error >= worst:
            worst, where = error, name
    return loss_error if math.isfinite(loss_error) else math.inf, worst, where


def agree(name, ours, theirs, coarser=1):
    """Check a contender's loss and gradients, or logits, against ours: (loss's error, largest array's error).

    ``coarser``: how many times the tolerances.
    Raises  Disagreement
    """
    loss_error, worst, where = disagreement(ours, theirs)
    if loss_error > (limit := coarser * LOSS_TOLERANCE):
        raise Disagreement(f"{name} disagrees: its loss is off by {loss_error:.1e}, allowed {limit:.0e}")
    if worst > (limit := coarser * GRADIENT_TOLERANCE):
        what = where if where == "logits" else f"the gradient of {where}"
        raise Disagreement(f"{name} disagrees: {what} is off by {worst:.1e}, allowed {limit:.0e}")
    return loss_error, worst


def agree_after_update(name, ours, theirs, coarser=1):
    """Check a contender's loss after one step of the optimiser against ours: its relative error.

    Raises  Disagreement
    """
    error = abs(theirs - ours) / abs(ours)
    if not error <= (limit := coarser * UPDATE_TOLERANCE):
        what = f"its loss after an update is off by {error:.1e}"
        raise Disagreement(f"{name} disagrees: {what}, allowed {limit:.0e}")
    return error
