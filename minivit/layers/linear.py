r"""Linear: an affine map of the last axis, y = x W + b.

Forward
    Rows are samples: x is (n, d), W is (d, m), b is (m,), so that

        y[i, k] = sum_j x[i, j] W[j, k] + b[k].

Backward
    Let dy[i, k] be the derivative of a scalar loss with respect to y[i, k]. Each entry of x, W and b reaches
    the loss only through y, so by the chain rule

        dW[j, k] = sum_i x[i, j] dy[i, k]       dW = x^T dy
        db[k]    = sum_i dy[i, k]               db = 1^T dy      (b was broadcast over the rows: a sum over them)
        dx[i, j] = sum_k dy[i, k] W[j, k]       dx = dy W^T

    A batch or a row of tokens only adds leading axes; they are flattened into the rows.
"""

from typing import Any, NamedTuple

from minivit.base.backend import accelerated, column_sum, matmul, matmul_rows


class LinearCache(NamedTuple):
    """What `linear_backward` reads: the input and the weight (both by reference)."""

    x: Any  # (..., d)
    W: Any  # (d, m)


@accelerated
def linear_forward(x, W, b):
    """Affine map of the last axis.

    Math    y = x W + b                                           (the dense layers of Eq. 1, 5, 8 and of the MLP)
    Shapes  x (..., d), W (d, m), b (m,)  ->  y (..., m)
    Cache   x, W
    """
    y = matmul_rows(x, W)  # (..., m)
    y += b
    return y, LinearCache(x, W)


@accelerated
def linear_backward(dy, cache, *, need_dx=True):
    """Backward of `linear_forward`.

    Math    dW = x^T dy,  db = 1^T dy,  dx = dy W^T
    Shapes  dy (..., m)  ->  dx (..., d), dW (d, m), db (m,)
    With ``need_dx=False`` dx is None and its product is saved (the first layer of a network has nobody to
    hand it to).
    """
    x, W = cache
    dy_rows = dy.reshape(-1, dy.shape[-1])  # (n, m)
    # y += b
    db = column_sum(dy_rows)
    # y = x W
    dW = matmul(x.reshape(-1, x.shape[-1]).T, dy_rows)
    dx = matmul_rows(dy, W.T) if need_dx else None
    return dx, dW, db


def linear_jvp(xdot, Wdot, bdot, cache):
    """Forward-mode derivative of `linear_forward`: how y moves when x, W and b move along xdot, Wdot and bdot.

    Math    ydot = xdot W + x Wdot + bdot
    Shapes  xdot (..., d), Wdot (d, m), bdot (m,)  ->  ydot (..., m)
    """
    x, W = cache
    ydot = matmul_rows(xdot, W)
    ydot += matmul_rows(x, Wdot)
    ydot += bdot
    return ydot
