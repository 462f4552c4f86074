r"""Sequence pooling: a learned weighted mean of the tokens (Hassani et al. 2021, arXiv:2104.05704).

Forward
    A linear map scores each token, and softmax over the N tokens of an image makes weights of the scores:

        scores = x w + b                  (N, 1)
        attn   = softmax(scores^T)        (1, N)    sums to 1
        y      = attn x                   (D,)      the mixture of the tokens

    It is attention with a single query, w, the same for every image, and with the tokens as keys and values. With
    w = 0 it is the mean. b adds the same number to all scores of an image, which softmax ignores: its gradient is
    exactly zero (the paper's code has it, and so have we).

Backward
    x enters twice, as what is mixed and through its scores, and its gradient is the sum of both:

        y = attn x                   =>   dattn = dy x^T,      dx = attn^T dy
        attn = softmax(scores^T)     =>   dscores^T = attn (dattn - sum(dattn attn))
        scores = x w + b             =>   dw = x^T dscores,    db = sum dscores,    dx += dscores w^T
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

    Math    y = softmax((x W + b)^T) x
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

    Math    dattn = dy x^T;  dscores = attn (dattn - sum(dattn attn));  dx = attn^T dy + dscores W^T
    Shapes  dy (B, D)  ->  dx (B, N, D), dW (D, 1), db (1,)
    """
    x, attn = cache.scores.x, cache.softmax.y
    dy = dy[:, None]  # (B, 1, D)
    # y = attn x
    dattn = matmul(dy, x.swapaxes(1, 2))  # (B, 1, N)
    dx = matmul(attn.swapaxes(1, 2), dy)  # (B, N, D)
    # attn = softmax(scores^T)
    dscores = softmax_backward(dattn, cache.softmax).swapaxes(1, 2)  # (B, N, 1)
    # scores = x W + b
    dx_of_scores, dW, db = linear_backward(dscores, cache.scores)
    dx += dx_of_scores
    return dx, dW, db
