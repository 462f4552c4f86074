"""What a reader gives to be checked: arguments, and what forward and backward return of them."""

from __future__ import annotations

import warnings

import numpy as np


class CannotTellError(ValueError):
    """What a forward or backward returns does not allow a check: it is not analytic, or not finite."""


def copies(args):
    """The arguments with their arrays copied, so that no check writes to a caller's."""
    return [a.copy() if isinstance(a, np.ndarray) else a for a in args]


def floats(args):
    """The places of the arguments that are differentiated: float arrays."""
    return [i for i, a in enumerate(args) if isinstance(a, np.ndarray) and a.dtype.kind == "f"]


def joined(parts):
    """The arrays among the parts as one vector."""
    return np.concatenate([np.ravel(part) for part in parts if part is not None])


def random_tangents(rng, args):
    """A random direction for each float argument, None for the others."""
    moving = floats(args)
    return [rng.standard_normal(a.shape) if i in moving else None for i, a in enumerate(args)]


def arguments_of(args, names=None):
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
    moving = floats(args)
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


def require_numbers(what, value):
    """The value as an array of numbers. Raises TypeError if it is none."""
    if np.asarray(value).dtype.kind not in "iufc":
        raise TypeError(f"the {what} must be an array of numbers, it is {type(value).__name__}")
    return value


def pair_of(returned):
    """The two things that a forward returns. Raises TypeError if it is no pair."""
    if not (isinstance(returned, tuple) and len(returned) == 2):
        raise TypeError(f"the forward must return (y, cache), it returned {type(returned).__name__}")
    require_numbers("y that the forward returns", returned[0])
    return returned


def value_and_cache(forward, args):
    """y and cache of a forward, which is called twice to see that it is a function.

    Raises  TypeError: it does not return a pair, or y is no array of numbers.
            ValueError: y is empty, complex or not finite; the second call returned another one.
    Warns   if y is not float64: it cannot be checked well.
    """
    y, cache = pair_of(forward(*copies(args)))
    if not np.size(y):
        raise ValueError(f"the forward returned an empty y, of shape {np.shape(y)}: there is nothing to differentiate")
    if np.iscomplexobj(y):
        raise ValueError("the forward returned complex numbers for real arguments; the gradient of a real y is checked")
    if not np.isfinite(y).all():
        raise ValueError("the forward returned a value that is not finite; gradients can only be checked where it is")
    again, _ = pair_of(forward(*copies(args)))
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


def gradients_of(backward, dy, cache, args, names, finite=False):
    """{place: gradient} of the float arguments.

    Raises  TypeError: one is no array of numbers.
            ValueError: gradients of the wrong count or shape; complex ones for a real dy.
            CannotTellError: one is not ``finite``, if they must be.
    """
    gradients, moving = backward(dy.copy(), cache), floats(args)
    gradients = list(gradients) if isinstance(gradients, (tuple, list)) else [gradients]
    if not len(moving) <= len(gradients) <= len(args):
        count = len(moving) if len(gradients) < len(moving) else len(args)
        raise ValueError(f"the backward returned {len(gradients)} gradients for {count} arguments")
    gradients = {i: gradients[i] if i < len(gradients) else None for i in moving}
    for i, gradient in gradients.items():
        shape = None if gradient is None else np.shape(gradient)
        if shape != args[i].shape:
            raise ValueError(f"d{names[i]} has shape {shape}, {names[i]} has {args[i].shape}{unsummed(shape, args[i])}")
        require_numbers(f"gradient d{names[i]}", gradient)
        if np.iscomplexobj(gradient) and not np.iscomplexobj(dy):
            raise ValueError(f"the gradient d{names[i]} is complex, although x and dy are real")
        if finite and not np.isfinite(gradient).all():
            raise CannotTellError(f"the gradient d{names[i]} holds a value that is NaN or infinite")
    return gradients


def unsummed(shape, x):
    """Whether a shape would become that of x by a sum over some axes: a broadcast that was not undone."""
    if shape is not None and len(shape) == x.ndim and all(n in (1, m) for n, m in zip(x.shape, shape, strict=True)):
        return ": it was broadcast, so its gradient must be summed over the axes of length 1"
    if shape is not None and len(shape) > x.ndim and shape[len(shape) - x.ndim :] == x.shape:
        return ": it was broadcast, so its gradient must be summed over the leading axes"
    return ""
