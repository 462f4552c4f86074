"""Whether x lies on a kink of the forward, where no difference can tell what the gradient is.

At a kink, such as that of ReLU at 0 or of a maximum of equal numbers, the derivative to the left and the one to the
right differ. A central difference gives their mean, a backward gives one of them, or something between, and all of
these are right: the subgradients. What tells a kink from a wrong gradient and from a strong curvature is how the gap
between the one-sided differences

    right(h) = (L(x + h d) - L(x)) / h          left(h) = (L(x) - L(x - h d)) / h

changes with h. Where L is smooth, right(h) - left(h) = h L''(x) + O(h^3): a quarter of h gives a quarter of the gap. On
a kink the gap stays what it is, and where a kink lies less than h beside x, it suddenly goes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from minivit.laboratory.gradcheck.arguments import copies
from minivit.laboratory.gradcheck.methods import METHODS

REACH = {"five-point": 2.0}  # how many steps away from x a method looks; the others one
NOISE = 20.0  # times the rounding of a difference is what it may be off by
RESOLVED = 0.05  # how much of a gap that may be; where it is more, the gap says nothing
QUARTER = (0.15, 0.4)  # what the gap of a smooth function is multiplied by at a quarter of the step


class Kink(NamedTuple):
    """The one-sided differences at a kink."""

    left: float
    right: float


def kink_at(forward, args, index, direction, dy, analytic, method, step=None):
    """The `Kink` on or beside x along a direction, if that is why a method's value is not the analytic one; else None.

    Shapes  direction like args[index], dy like y; ``analytic`` is the backward's derivative along the direction
    """
    method = "central" if method == "complex" else method  # its own step is too short for a difference
    h = (METHODS[method].step if step is None else step) * REACH.get(method, 1.0)

    def y(multiple):
        moved = copies(args)
        moved[index] = args[index] + multiple * direction
        return forward(*moved)[0]

    middle = y(0.0)
    rounding, gaps = NOISE * np.finfo(np.float64).eps * float(np.abs(dy * middle).sum()), []
    for length in (h, h / 4, h / 16):
        right = float((dy * (y(length) - middle)).sum() / length)
        left = float((dy * (middle - y(-length))).sum() / length)
        if not gaps:
            kink, slack = Kink(left, right), rounding / length
            if not min(kink) - slack <= analytic <= max(kink) + slack:
                return None
        elif not rounding / length <= RESOLVED * gaps[0] * length / h:  # what a smooth function leaves of the gap
            break
        gaps.append(abs(right - left))
    shrinks = [b / a for a, b in zip(gaps, gaps[1:], strict=False) if a]
    smooth = all(QUARTER[0] <= shrink <= QUARTER[1] for shrink in shrinks)
    return None if smooth or not np.isfinite(gaps).all() else kink
