r"""Softmax over the last axis.

Forward
    y_i = exp(x_i) / sum_j exp(x_j). Adding a constant to all x_i of a row changes nothing, so the row's
    maximum is taken off first: the largest exponent is then exp(0) = 1 and nothing overflows.

Backward
    With s = sum_j exp(x_j), dy_i/dx_k = y_i (delta_ik - y_k), so

        dx_k = sum_i dy_i y_i (delta_ik - y_k) = y_k (dy_k - sum_i dy_i y_i).

    The Jacobian is never built: one row-wise sum replaces it. The shift drops out of the derivative because
    softmax does not depend on it; for the same reason each row of dx sums to zero.
"""

from typing import Any, NamedTuple

from minivit.base.backend import array_module, row_sum


class SoftmaxCache(NamedTuple):
    """What `softmax_backward` reads: the probabilities alone."""

    y: Any  # (..., n)


def softmax_forward(x, *, out=None):
    """Probabilities over the last axis.

    Math    y = exp(x - max x) / sum exp(x - max x)                                        (the softmax of Eq. 6)
    Shapes  x (..., n)  ->  y (..., n)
    Cache   y
    ``out`` may be x itself when the caller owns it.
    """
    xp = array_module(x)
    shift = x.real.max(axis=-1, keepdims=True)  # .real: a real shift keeps the complex step exact
    y = xp.subtract(x, shift, out=out)
    xp.exp(y, out=y)
    y /= row_sum(y)
    return y, SoftmaxCache(y)


def softmax_backward(dy, cache, *, out=None):
    """Backward of `softmax_forward`.

    Math    dx = y (dy - sum_i dy_i y_i)
    Shapes  dy (..., n)  ->  dx (..., n)
    ``out`` may be dy itself when the caller owns it.
    """
    (y,) = cache
    xp = array_module(dy)
    # y = exp(x) / sum exp(x)
    dx = xp.subtract(dy, row_sum(dy * y), out=out)
    dx *= y
    return dx


def softmax_jvp(xdot, cache):
    """Forward-mode derivative of `softmax_forward`.

    Math    ydot = y (xdot - sum_i y_i xdot_i): the Jacobian diag(y) - y y^T is symmetric, so this is the backward too
    Shapes  xdot (..., n)  ->  ydot (..., n)
    """
    (y,) = cache
    return y * (xdot - row_sum(y * xdot))
