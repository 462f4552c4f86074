r"""Scaled dot-product attention of one or many heads (Vaswani et al. 2017; Eq. 6-7 of the ViT paper).

Forward, for one head; q has a row for each of Q queries, k and v one for each of N keys (Q = N in the paper)

        scores = q @ k^T / sqrt(Dh)       (Q, N)    row i: how well each key fits query i
        attn   = softmax(scores)          (Q, N)    of each row, which then sums to 1                    (Eq. 6)
        y      = attn @ v                 (Q, Dh)   row i: the mean of all values, weighted by row i     (Eq. 7)

    If the entries of q and k are independent, of mean 0 and variance 1, an entry of q @ k^T is a sum of Dh products of
    variance 1 and has variance Dh; divided by sqrt(Dh) it has variance 1 again, whatever the size of a head.

    Images and heads are leading axes, which only repeat all this.

Backward, the same lines from the last to the first; dy (Q, Dh) is given
    Two of the lines are matrix products. Y = A @ B has dA = dY @ B^T and dB = A^T @ dY (see `minivit.layers.linear`).

    1.  y = attn @ v, so A = attn and B = v:

            dattn = dy @ v^T            (Q, N)
            dv    = attn^T @ dy         (N, Dh)

    2.  attn = softmax(scores). Row i of attn depends on row i of scores alone. As in `minivit.layers.softmax`, the
        derivative of attn_ij by scores_im is [j = m] * attn_ij - attn_ij * attn_im, so

            dscores_im = sum_j dattn_ij * ([j = m] * attn_ij - attn_ij * attn_im)
                       = attn_im * (dattn_im - sum_j dattn_ij * attn_ij)

        or, for the whole matrix,

            dscores = attn * (dattn - row_sum(dattn * attn))            (Q, N)

        where both products are elementwise, and row_sum gives one number for each query.

    3.  scores = q @ k^T / sqrt(Dh), so A = q, B = k^T and B^T = k. A^T @ dY is the gradient of k^T, and its transpose
        that of k; the constant factor goes along:

            dq     = dscores @ k / sqrt(Dh)                             (Q, Dh)
            d(k^T) = q^T @ dscores / sqrt(Dh)                           (Dh, N)
            dk     = dscores^T @ q / sqrt(Dh)                           (N, Dh)

Example: one query, two keys that it likes equally (q @ k^T = 0), Dh = 1
    >>> import numpy as np
    >>> q, k, v = np.array([[0.0]]), np.array([[1.0], [-1.0]]), np.array([[2.0], [4.0]])
    >>> y, cache = attention_forward(q, k, v)
    >>> y.tolist()                                        # the mean of both values
    [[3.0]]
    >>> dq, dk, dv = attention_backward(np.array([[1.0]]), cache)
    >>> dq.tolist(), dv.tolist()                          # a larger q looks more at the first value, the smaller one
    ([[-1.0]], [[0.5], [0.5]])
    >>> dk.tolist()                                       # q = 0: the keys do not matter
    [[0.0], [0.0]]
"""

from typing import Any, NamedTuple

from minivit.base.backend import accelerated
from minivit.base.pairs import Pair
from minivit.layers.softmax import SoftmaxCache, softmax_backward, softmax_forward


class AttentionCache(NamedTuple):
    """What `attention_backward` reads; ``softmax.y`` is the attention map."""

    q: Any  # (..., Q, Dh)
    k: Any  # (..., N, Dh)
    v: Any  # (..., N, Dh)
    softmax: SoftmaxCache  # softmax.y is (..., Q, N)


def transpose(x):
    """The last two axes exchanged: x (..., n, m)  ->  (..., m, n), a view."""
    return x.swapaxes(-1, -2)


@accelerated
def attention_forward(q, k, v):
    """Mix the values by the softmax of the scaled scores.

    Math    y = softmax(q @ k^T / sqrt(Dh)) @ v                                                         (Eq. 6-7)
    Shapes  q (..., Q, Dh), k, v (..., N, Dh)  ->  y (..., Q, Dh);  Q = N, except where only some tokens ask
    Cache   q, k, v, the attention map (..., Q, N)
    """
    scores = q @ transpose(k) * q.shape[-1] ** -0.5  # (..., Q, N)
    attn, softmax_cache = softmax_forward(scores)  # (..., Q, N)
    y = attn @ v  # (..., Q, Dh)
    return y, AttentionCache(q, k, v, softmax_cache)


@accelerated
def attention_backward(dy, cache):
    """Backward of `attention_forward`.

    Math    dattn = dy @ v^T;  dv = attn^T @ dy;  dscores = attn * (dattn - row_sum(dattn * attn));
            dq = dscores @ k / sqrt(Dh);  dk = dscores^T @ q / sqrt(Dh)
    Shapes  dy (..., Q, Dh)  ->  dq (..., Q, Dh), dk, dv (..., N, Dh)
    """
    q, k, v, softmax_cache = cache
    attn = softmax_cache.y
    # y = attn @ v
    dattn = dy @ transpose(v)  # (..., Q, N)
    dv = transpose(attn) @ dy  # (..., N, Dh)
    # attn = softmax(scores), so dscores = attn * (dattn - row_sum(dattn * attn))
    dscores = softmax_backward(dattn, softmax_cache)  # (..., Q, N)
    # scores = q @ k^T / sqrt(Dh)
    dq = dscores @ k * q.shape[-1] ** -0.5  # (..., Q, Dh)
    dk = transpose(dscores) @ q * q.shape[-1] ** -0.5  # (..., N, Dh)
    return dq, dk, dv


ATTENTION = Pair(attention_forward, attention_backward, about={"attention": "plain"})
