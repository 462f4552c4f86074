"""The error of a numerical derivative against its step."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from minivit.laboratory.gradcheck.arguments import arguments_of, pair_of, value_and_cache
from minivit.laboratory.gradcheck.methods import COTANGENT_STREAM, method_of, numerical_derivative, require_analytic


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
    method_of(method)
    args, names, moving = arguments_of(args)
    if index not in moving:
        raise ValueError(f"there is no float array at args[{index}]; there is at {', '.join(map(str, moving))}")
    steps = np.logspace(-14, -0.5, 82) if steps is None else np.atleast_1d(np.asarray(steps, float))
    if not (steps.size and np.isfinite(steps).all() and (steps > 0).all()):
        raise ValueError(f"steps must be positive numbers, got {', '.join(map(str, steps)) or 'none'}")
    rng = np.random.default_rng([seed, COTANGENT_STREAM])
    y, _ = value_and_cache(forward, args)
    dy = rng.standard_normal(np.shape(y))
    direction = rng.standard_normal(args[index].shape)
    direction /= np.linalg.norm(direction)
    moving_alone = [direction if i == index else None for i in range(len(args))]
    require_analytic("forward", lambda *moved: pair_of(forward(*moved))[0], args, moving_alone,
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
    order, eps = method_of(method).order, float(np.finfo(dtype).eps)
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
