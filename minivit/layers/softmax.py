r"""Softmax over the last axis.

Forward
    e_j = exp(x_j - max(x)),    y_j = e_j / sum_i e_i.

    Subtracting any number c from a whole row changes nothing: exp(x_j - c) = exp(x_j) * exp(-c), and exp(-c) cancels.
    With c = max(x) the largest exponential is exp(0) = 1, and nothing overflows. And since y does not depend on c,
    the backward may take it for a constant.

Backward
    Let s = sum_i e_i, so that y_i = e_i / s. With [i = k] for 1 where i = k and 0 otherwise, the derivatives by x_k are

        de_i / dx_k = [i = k] * e_i                 ds / dx_k = e_k

    and by the quotient rule

        dy_i / dx_k = [i = k] * e_i / s - e_i * e_k / s^2  =  [i = k] * y_i - y_i * y_k

    From here on dy and dx are gradients of the loss again. Every y_i of the row depends on x_k, so

        dx_k = sum_i dy_i * ([i = k] * y_i - y_i * y_k)
             = dy_k * y_k - y_k * sum_i dy_i * y_i
             = y_k * (dy_k - sum_i dy_i * y_i)

    The (n, n) matrix of derivatives is never made: one sum for each row replaces it. Each row of dx sums to 0,
    because adding the same number to a whole row of x changes nothing.

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
    # y = e / row_sum(e), e = exp(x - highest)
    dx = y * (dy - row_sum(dy * y))
    return dx
