r"""Linear: an affine map of the last axis, y = x @ W + b.

Forward
    Rows are samples: x is (n, d), W is (d, m), b is (m,), so that

        y[i, k] = sum_j x[i, j] * W[j, k] + b[k].

Backward
    Let dy[i, k] be the derivative of the loss with respect to y[i, k]; it is given. By the chain rule the gradient of
    an entry of x, W or b is a sum over all entries of y that depend on it:

        the derivative of y[i, k] by x[i, j] is W[j, k], for every k:    dx[i, j] = sum_k dy[i, k] * W[j, k]
        the derivative of y[i, k] by W[j, k] is x[i, j], for every i:    dW[j, k] = sum_i x[i, j] * dy[i, k]
        the derivative of y[i, k] by b[k] is 1, for every i:             db[k]    = sum_i dy[i, k]

    and these sums are matrix products:

        dx = dy @ W^T          dW = x^T @ dy          db = sum of the rows of dy

    This holds for any product of two matrices: Y = A @ B has dA = dY @ B^T and dB = A^T @ dY. Where x is also used
    elsewhere, its gradient is the sum of what all uses give; dx here is the part that comes through y.

    With more leading axes, as (images, tokens, d), all of them together count as rows. dy @ W^T keeps them as they are;
    dW and db are sums over all rows, so the axes are made one first.

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
    ``y, cache = X_forward(x, *parameters)`` and ``dx, dW, ... = X_backward(dy, cache)``: dx, then the gradient of each
    parameter in the forward's order (dx alone, not a tuple, where there is no parameter). ``dx`` is always the
    gradient of the loss with respect to ``x``, of the same shape. The cache is a tuple of exactly what the backward
    reads. The backward goes through the forward's statements from the last to the first, quotes in a comment the one
    (or the few) that the next lines belong to, and multiplies what comes in by their derivative.

    In derivations ``*`` is elementwise, ``@`` is the matrix product, [a, b] stands side by side, [a; b] one above the
    other. In Math, Shapes and code a leading "..." is any number of axes.

    ``@accelerated`` says that a quicker function of the same name in `minivit.kernels` may do the work, its *twin*: in
    float32 and float64 it usually does. The body here is the definition: twins are tested against it, and a forward
    inside ``with plain():`` runs the body, and so does its backward.

    The functions take complex numbers too, and are analytic in them (``abs`` and ``max`` are not: what is compared is
    the real part). So a derivative can be had without the rounding error of a difference, by the *complex step*: for f
    analytic, and real on real numbers,

        f(x + i h) = f(x) + i h f'(x) - h^2 f''(x) / 2 - ...        hence        f'(x) = Im f(x + i h) / h + O(h^2),

    exact to the last bits for h = 1e-20. That is what `minivit.laboratory.gradcheck` compares every backward with.
"""

from typing import Any, NamedTuple

from minivit.base.backend import accelerated


class LinearCache(NamedTuple):
    """What `linear_backward` reads: the input and the weight, not copied."""

    x: Any  # (..., d)
    W: Any  # (d, m)


def rows(x):
    """All leading axes as one: x (..., d) as rows (n, d)."""
    return x.reshape(-1, x.shape[-1])


@accelerated
def linear_forward(x, W, b):
    """Affine map of the last axis.

    Math    y = x @ W + b                                         (Eq. 1, 5, 8, the MLP, the head)
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
