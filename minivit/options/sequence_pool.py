r"""Sequence pooling: a learned weighted mean of the tokens (Hassani et al. 2021, arXiv:2104.05704).

Forward, for one image
    A linear map scores each token, and softmax over the N tokens of an image makes weights of the scores:

        scores = x @ W + b                (N, 1)    W (D, 1)
        attn   = softmax(scores^T)        (1, N)    sums to 1
        y      = attn @ x                 (1, D)    the mixture of the tokens

    It is attention with a single query, W^T, the same for every image, and with the tokens as keys and values. With
    W = 0 it is the mean. b adds the same number to all scores of an image, which softmax ignores: its gradient is
    exactly zero (the paper's code has b, and so it is here).

Backward, the same lines from the last to the first; dy (1, D) is given
    x enters twice, as what is mixed and through its scores, and its gradient is the sum of both:

        y = attn @ x                 =>   dattn = dy @ x^T              dx (directly) = attn^T @ dy

        attn = softmax(scores^T)     =>   dscores^T = attn * (dattn - row_sum(dattn * attn))

        scores = x @ W + b           =>   dx (through the scores) = dscores @ W^T
                                          dW = x^T @ dscores            db = sum of dscores

    W and b serve every image: dW and db are sums over the images too.

Example: one image, two tokens of D = 1; with W = 0 both count alike
    >>> import numpy as np
    >>> x = np.array([[[1.0], [3.0]]])
    >>> y, cache = sequence_pool_forward(x, np.zeros((1, 1)), np.zeros(1))
    >>> y.tolist()
    [[2.0]]
    >>> dx, dW, db = sequence_pool_backward(np.array([[1.0]]), cache)
    >>> dx.tolist(), dW.tolist(), db.tolist()             # a larger W gives the larger token more weight
    ([[[0.5], [0.5]]], [[1.0]], [0.0])
"""

from typing import NamedTuple

from minivit.base.backend import accelerated, matmul
from minivit.layers.linear import LinearCache, linear_backward, linear_forward
from minivit.layers.softmax import SoftmaxCache, softmax_backward, softmax_forward


class SequencePoolCache(NamedTuple):
    """What `sequence_pool_backward` reads; ``scores.x`` are the tokens, ``softmax.y`` their weights (B, 1, N)."""

    scores: LinearCache
    softmax: SoftmaxCache


@accelerated
def sequence_pool_forward(x, W, b):
    """The tokens of each image in one.

    Math    y = softmax((x @ W + b)^T) @ x
    Shapes  x (B, N, D), W (D, 1), b (1,)  ->  y (B, D)
    Cache   of the scores and of softmax
    Source  arXiv:2104.05704
    """
    scores, scores_cache = linear_forward(x, W, b)  # (B, N, 1)
    attn, softmax_cache = softmax_forward(scores.swapaxes(1, 2))  # (B, 1, N)
    y = matmul(attn, x)[:, 0]  # (B, D)
    return y, SequencePoolCache(scores_cache, softmax_cache)


@accelerated
def sequence_pool_backward(dy, cache):
    """Backward of `sequence_pool_forward`.

    Math    dattn = dy @ x^T;  dscores^T = attn * (dattn - row_sum(dattn * attn));
            dx = attn^T @ dy + dscores @ W^T;  dW = x^T @ dscores;  db = sum of dscores
    Shapes  dy (B, D)  ->  dx (B, N, D), dW (D, 1), db (1,)
    """
    x, attn = cache.scores.x, cache.softmax.y
    dy = dy[:, None]  # (B, 1, D)
    # y = attn @ x
    dattn = matmul(dy, x.swapaxes(1, 2))  # (B, 1, N)
    dx = matmul(attn.swapaxes(1, 2), dy)  # (B, N, D)
    # attn = softmax(scores^T): dscores^T = attn * (dattn - row_sum(dattn * attn))
    dscores = softmax_backward(dattn, cache.softmax).swapaxes(1, 2)  # (B, N, 1)
    # scores = x @ W + b
    dx_of_scores, dW, db = linear_backward(dscores, cache.scores)
    dx += dx_of_scores
    return dx, dW, db
