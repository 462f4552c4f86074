r"""GELU, the Gaussian error linear unit, in its tanh form (Hendrycks & Gimpel 2016, arXiv:1606.08415).

Forward
    GELU is x * Phi(x), where Phi(x) is the probability that a standard normal random number is below x: a factor that
    goes smoothly from 0 for very negative x to 1 for large x. The official ViT code approximates it:

        u = C * (x + A * x^3),      C = sqrt(2/pi), A = 0.044715
        t = tanh(u)
        y = x * (1 + t) / 2

    It differs from the exact form (`minivit.options.exact_gelu`, timm's) by up to 4.7e-4, at |x| = 2.7. That is little,
    but a model that was trained with one form should be evaluated with the same.

Backward, entry by entry, from the last line to the first; every product is elementwise
    y depends on x directly and through t, so dx is a sum of two parts:

        dt             = dy * x / 2                        the derivative of y by t, x fixed
        dx (direct)    = dy * (1 + t) / 2                  the derivative of y by x, t fixed
        du             = dt * (1 - t^2)                    since tanh' = 1 - tanh^2
        dx (through u) = du * C * (1 + 3 * A * x^2)        the derivative of C * (x + A * x^3)
        dx             = dx (direct) + dx (through u)

Example
    >>> import numpy as np
    >>> y, cache = gelu_forward(np.array([-1.0, 0.0, 1.0]))
    >>> y.round(4).tolist()
    [-0.1588, 0.0, 0.8412]
    >>> gelu_backward(np.ones(3), cache).round(4).tolist()     # the slope: 1/2 at 0, a little over 1 at 1
    [-0.083, 0.5, 1.083]
"""

import math
from typing import Any, NamedTuple

from minivit.base.backend import accelerated, array_module
from minivit.base.pairs import Pair

C = math.sqrt(2.0 / math.pi)
A = 0.044715


class GeluCache(NamedTuple):
    """What `gelu_backward` reads: tanh is the expensive part of the forward, so it is kept."""

    x: Any  # (...)
    t: Any  # (...)  tanh(u)


@accelerated
def gelu_forward(x):
    """Gaussian error linear unit, elementwise, in its tanh form.

    Math    y = x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 * x^3))) / 2
    Shapes  x (...)  ->  y (...)
    Cache   x, the tanh
    Source  arXiv:1606.08415, section 2
    """
    u = C * (x + A * x * x * x)
    t = array_module(x).tanh(u)
    y = x * (1.0 + t) / 2.0
    return y, GeluCache(x, t)


@accelerated
def gelu_backward(dy, cache):
    """Backward of `gelu_forward`.

    Math    dx = dy * (1 + t) / 2 + dy * x / 2 * (1 - t^2) * sqrt(2/pi) * (1 + 3 * 0.044715 * x^2)
    Shapes  dy (...)  ->  dx (...)
    """
    x, t = cache
    # y = x * (1 + t) / 2
    dt = dy * x / 2.0
    dx_direct = dy * (1.0 + t) / 2.0
    # t = tanh(u)
    du = dt * (1.0 - t * t)
    # u = C * (x + A * x * x * x)
    dx = dx_direct + du * C * (1.0 + 3.0 * A * x * x)
    return dx


GELU = Pair(gelu_forward, gelu_backward, about={"gelu": "tanh"})
