r"""Scaled dot-product attention of one or many heads (Vaswani et al. 2017; Eq. 6-7 of the ViT paper).

Forward, for one head (the leading axes, images and heads, only repeat it)

        scores = q @ k^T / sqrt(Dh)       (N, N)    how much query i wants of key j
        attn   = softmax(scores)          (N, N)    each row sums to 1                                   (Eq. 6)
        y      = attn @ v                 (N, Dh)   each token's mixture of values                       (Eq. 7)

    Dividing by sqrt(Dh) keeps the variance of the scores at 1 where the entries of q and k are independent, of mean 0
    and variance 1.

Backward, the same lines from the last to the first; dy (N, Dh) is given
    Both matrix products are of the form Y = A @ B, for which (see `minivit.layers.linear`) dA = dY @ B^T and
    dB = A^T @ dY. So

        y = attn @ v                   =>   dattn = dy @ v^T                    dv = attn^T @ dy

        attn = softmax(scores)         =>   dscores = attn * (dattn - row_sum(dattn * attn))

    Row i of attn depends on row i of scores alone, and the line above is softmax's backward for each row: attn_ij
    changes with scores_im at the rate [j = m] * attn_ij - attn_ij * attn_im (see `minivit.layers.softmax`), hence

        dscores_im = sum_j dattn_ij * ([j = m] * attn_ij - attn_ij * attn_im)
                   = attn_im * (dattn_im - sum_j dattn_ij * attn_ij)

    All products in it are elementwise, and row_sum gives one number for each query.

        scores = q @ k^T / sqrt(Dh)    =>   dq = dscores @ k / sqrt(Dh)         dk = dscores^T @ q / sqrt(Dh)

Example: one query, two keys that it likes equally (q @ k^T = 0), Dh = 1
    >>> import numpy as np
    >>> q, k, v = np.array([[0.0]]), np.array([[1.0], [-1.0]]), np.array([[2.0], [4.0]])
    >>> y, cache = attention_forward(q, k, v)
    >>> y.tolist()                                        # the mean of both values
    [[3.0]]
    >>> dq, dk, dv = attention_backward(np.array([[1.0]]), cache)
    >>> dq.tolist(), dv.tolist()                          # a larger q looks more at the first, smaller value
    ([[-1.0]], [[0.5], [0.5]])
"""

from typing import Any, NamedTuple

from minivit.base.backend import accelerated
from minivit.base.pairs import Pair
from minivit.layers.softmax import SoftmaxCache, softmax_backward, softmax_forward


class AttentionCache(NamedTuple):
    """What `attention_backward` reads; ``softmax.y`` is the attention map."""

    q: Any  # (..., N, Dh)
    k: Any  # (..., N, Dh)
    v: Any  # (..., N, Dh)
    softmax: SoftmaxCache  # (..., N, N)


def transpose(x):
    """The last two axes exchanged: x (..., n, m)  ->  (..., m, n), a view."""
    return x.swapaxes(-1, -2)


@accelerated
def attention_forward(q, k, v):
    """Mix the values by the softmax of the scaled scores.

    Math    y = softmax(q @ k^T / sqrt(Dh)) @ v                                                         (Eq. 6-7)
    Shapes  q (..., Q, Dh), k, v (..., N, Dh)  ->  y (..., Q, Dh);  Q = N but where only some tokens have a query
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
    # attn = softmax(scores): dscores = attn * (dattn - row_sum(dattn * attn))
    dscores = softmax_backward(dattn, softmax_cache)  # (..., Q, N)
    # scores = q @ k^T / sqrt(Dh)
    dq = dscores @ k * q.shape[-1] ** -0.5  # (..., Q, Dh)
    dk = transpose(dscores) @ q * q.shape[-1] ** -0.5  # (..., N, Dh)
    return dq, dk, dv


ATTENTION = Pair(attention_forward, attention_backward, about={"attention": "plain"})
