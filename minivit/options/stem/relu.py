r"""The rectifier (Nair & Hinton 2010).

Forward
        y = x where x > 0, else 0

Backward
    The slope is 1 where x > 0 and 0 where x < 0. At x = 0 there is none; 0 is taken, as PyTorch and JAX do. y is
    positive exactly where x is, so that y, which the next layer keeps anyway, tells the slope:

        dx = dy [y > 0].

    Complex numbers (the complex step of `minivit.laboratory.gradcheck`) are told apart by their real parts.
"""

from typing import Any, NamedTuple

from minivit.base.backend import accelerated


class ReLUCache(NamedTuple):
    """What `relu_backward` reads: not x, whose memory is free once y is made."""

    y: Any  # like x


@accelerated
def relu_forward(x):
    """Set the negative entries to zero.

    Math    y = x [x > 0]
    Shapes  x (...)  ->  y (...)
    Cache   y
    """
    y = x * (x.real > 0)
    return y, ReLUCache(y)


@accelerated
def relu_backward(dy, cache):
    """Backward of `relu_forward`.

    Math    dx = dy [y > 0]
    Shapes  dy (...)  ->  dx (...)
    """
    # y = x [x > 0]
    return dy * (cache.y.real > 0)
