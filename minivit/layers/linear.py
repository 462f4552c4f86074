r"""Linear: an affine map of the last axis, y = x @ W + b.

Forward
    Rows are samples: x is (n, d), W is (d, m), b is (m,), so that

        y[i, k] = sum_j x[i, j] * W[j, k] + b[k].

Backward
    Let dy[i, k] be the derivative of the loss with respect to y[i, k]; it is given. An entry of x, W or b reaches the
    loss only through y, so by the chain rule

        dx[i, j] = sum_k dy[i, k] * W[j, k]        y[i, k] changes by W[j, k] with x[i, j],    so    dx = dy @ W^T
        dW[j, k] = sum_i dy[i, k] * x[i, j]        y[i, k] changes by x[i, j] with W[j, k],    so    dW = x^T @ dy
        db[k]    = sum_i dy[i, k]                  y[i, k] changes by 1 with b[k], in every row i

    A batch of images and a row of tokens only add leading axes: they are more rows.

Example
    >>> import numpy as np
    >>> x, W, b = np.array([[1.0, 2.0]]), np.array([[1.0, 0.0], [3.0, -1.0]]), np.array([0.5, 0.0])
    >>> y, cache = linear_forward(x, W, b)
    >>> y.tolist()                                        # [1 * 1 + 2 * 3 + 0.5, 1 * 0 - 2 * 1]
    [[7.5, -2.0]]
    >>> dx, dW, db = linear_backward(np.array([[1.0, 10.0]]), cache)
    >>> dx.tolist(), dW.tolist(), db.tolist()             # dx = [1 * 1 + 10 * 0, 1 * 3 - 10 * 1]
    ([[1.0, -7.0]], [[1.0, 10.0], [2.0, 20.0]], [1.0, 10.0])

How every layer is written
    ``y, cache = X_forward(x, *parameters)`` and ``dx, *dparameters = X_backward(dy, cache)``. The cache is a tuple of
    exactly what the backward reads. The backward goes through the forward's statements from the last to the first,
    each of them quoted in a comment, and multiplies what comes in by the derivative of that statement.

    ``@accelerated`` says that a quicker function of the same name in `minivit.kernels` may do the work, its *twin*. The
    body here is the definition: twins are tested against it, and ``with plain():`` switches them all off.

    The functions take complex numbers too, and are analytic in them: no ``abs``, no ``max`` of values. So a derivative
    can be had without any rounding from a difference, by the *complex step*: for f analytic and real on real numbers,

        f(x + i h) = f(x) + i h f'(x) - h^2 f''(x) / 2 - ...        hence        f'(x) = Im f(x + i h) / h + O(h^2),

    exact to the last bits for h = 1e-20. That is what `minivit.laboratory.gradcheck` compares every backward with.
"""

from typing import Any, NamedTuple

from minivit.base.backend import accelerated


class LinearCache(NamedTuple):
    """What `linear_backward` reads: the input and the weight, both by reference."""

    x: Any  # (..., d)
    W: Any  # (d, m)


def rows(x):
    """All leading axes as one: x (..., d) as rows (n, d)."""
    return x.reshape(-1, x.shape[-1])


@accelerated
def linear_forward(x, W, b):
    """Affine map of the last axis.

    Math    y = x @ W + b                                         (the dense layers of Eq. 1, 5, 8 and of the MLP)
    Shapes  x (..., d), W (d, m), b (m,)  ->  y (..., m)
    Cache   x, W
    """
    y = x @ W + b  # (..., m)
    return y, LinearCache(x, W)


@accelerated
def linear_backward(dy, cache):
    """Backward of `linear_forward`.

    Math    dx = dy @ W^T,  dW = x^T @ dy,  db = sum of the rows of dy
    Shapes  dy (..., m)  ->  dx (..., d), dW (d, m), db (m,)
    """
    x, W = cache
    # y = x @ W + b
    dx = dy @ W.T  # (..., d)
    dW = rows(x).T @ rows(dy)  # (d, m)
    db = rows(dy).sum(axis=0)  # (m,)
    return dx, dW, db
