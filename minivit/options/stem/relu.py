r"""The rectifier (Nair & Hinton 2010).

Forward, entry by entry, with [x > 0] = 1 where x > 0 and 0 elsewhere
        y = x * [x > 0]

Backward, entry by entry; dy is given
    The slope is 1 where x > 0 and 0 where x < 0. At x = 0 there is none; 0 is taken, as PyTorch and JAX do. y is
    positive exactly where x is, so that y, which the next layer keeps anyway, tells the slope:

        dx = dy * [x > 0] = dy * [y > 0]

    Complex numbers (the complex step of `minivit.laboratory.gradcheck`) are told apart by their real parts.

Example
    >>> import numpy as np
    >>> y, cache = relu_forward(np.array([-2.0, 0.0, 3.0]))
    >>> y.tolist() == [0.0, 0.0, 3.0]
    True
    >>> relu_backward(np.array([10.0, 10.0, 10.0]), cache).tolist()
    [0.0, 0.0, 10.0]
"""

from typing import Any, NamedTuple

from minivit.base.backend import accelerated


class ReLUCache(NamedTuple):
    """What `relu_backward` reads: not x, whose memory is free once y is made."""

    y: Any  # like x


@accelerated
def relu_forward(x):
    """Set the negative entries to zero.

    Math    y = x * [x > 0]
    Shapes  x (...)  ->  y (...)
    Cache   y
    """
    y = x * (x.real > 0)
    return y, ReLUCache(y)


@accelerated
def relu_backward(dy, cache):
    """Backward of `relu_forward`.

    Math    dx = dy * [y > 0]
    Shapes  dy (...)  ->  dx (...)
    """
    # y = x * [x > 0]
    return dy * (cache.y.real > 0)
