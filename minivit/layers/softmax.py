r"""Softmax over the last axis.

Forward
    e_j = exp(x_j - max(x)),    y_j = e_j / sum_i e_i.

    Adding a constant to a whole row changes nothing, as its exponential cancels. So the row's maximum is taken off
    first: the largest exponential is then exp(0) = 1, and nothing overflows.

Backward
    With s = sum_i e_i it is y_i = e_i / s. Where x_k grows, e_k grows by e_k and so does s. By the quotient rule y_i
    changes with x_k at the rate ([i = k] is 1 for i = k and 0 else)

        [i = k] * e_i / s - e_i * e_k / s^2  =  [i = k] * y_i - y_i * y_k

    and by the chain rule, summed over all y_i that x_k moves,

        dx_k = sum_i dy_i * ([i = k] * y_i - y_i * y_k)
             = dy_k * y_k - y_k * sum_i dy_i * y_i
             = y_k * (dy_k - sum_i dy_i * y_i)

    The (n, n) matrix of derivatives is never made: one sum for each row replaces it. Each row of dx sums to 0, for the
    same reason as the maximum drops out: a common shift of the row changes nothing.

Example
    >>> import numpy as np
    >>> y, cache = softmax_forward(np.log([[1.0, 2.0, 5.0]]))
    >>> y.round(9).tolist()
    [[0.125, 0.25, 0.625]]
    >>> softmax_backward(np.array([[8.0, 0.0, 0.0]]), cache).round(9).tolist()     # y * (dy - 1)
    [[0.875, -0.25, -0.625]]
"""

from typing import Any, NamedTuple

from minivit.base.backend import accelerated, array_module


class SoftmaxCache(NamedTuple):
    """What `softmax_backward` reads: the probabilities alone."""

    y: Any  # (..., n)


def row_sum(x):
    """The sum of each row, kept as an axis: x (..., n)  ->  (..., 1)."""
    return x.sum(axis=-1, keepdims=True)


@accelerated
def softmax_forward(x):
    """Probabilities over the last axis.

    Math    y = exp(x - max(x)) / sum exp(x - max(x))                                      (the softmax of Eq. 6)
    Shapes  x (..., n)  ->  y (..., n)
    Cache   y
    """
    highest = x.real.max(axis=-1, keepdims=True)  # of the real parts, so that the complex step stays exact
    e = array_module(x).exp(x - highest)  # (..., n)
    y = e / row_sum(e)  # (..., n)
    return y, SoftmaxCache(y)


@accelerated
def softmax_backward(dy, cache):
    """Backward of `softmax_forward`.

    Math    dx = y * (dy - sum_i dy_i * y_i)
    Shapes  dy (..., n)  ->  dx (..., n)
    """
    (y,) = cache
    # y = e / sum(e), e = exp(x - max(x))
    dx = y * (dy - row_sum(dy * y))
    return dx
