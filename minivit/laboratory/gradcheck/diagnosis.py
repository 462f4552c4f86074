"""What kind of mistake the pattern of a wrong gradient suggests."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np


def sizes_of(shapes):
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


def diagnose_factor(factor, sizes):
    """What a constant factor between two gradients may come from, in words; None if nothing fits."""
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
        return diagnose_factor(factor, sizes)
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
