r"""From tokens to class scores: the final LayerNorm and the linear head, read from the class token (Eq. 4).

Forward
        y      = LN(z[0])                  (D,)     z after the last block; its row 0 is the class token  (Eq. 4)
        logits = y @ W + bias              (K,)     one score for each class

    LayerNorm works token by token, so only the token that is read is normalised: the same numbers for 1/N of the work.
    W starts at zero (as in the official code), so all logits of a new model are 0, and in the very first step only W
    and bias have a gradient: dy = dlogits @ W^T = 0.

Backward
        logits = y @ W + bias     =>   dy, dW, dbias as in `minivit.layers.linear`
        y = LN(z[0])              =>   row 0 of dz is LayerNorm's dx; all other rows are zero, they were not read

Example: one image of two tokens, D = 4; the head reads entries 1 and 2 of the normalised class token
    >>> import numpy as np
    >>> z = np.array([[[1.0, 5.0, 3.0, 3.0], [9.0, 7.0, 5.0, 0.0]]])
    >>> logits, cache = head_forward(z, np.ones(4), np.zeros(4), np.eye(4)[:, :2], np.zeros(2), eps=0.0)
    >>> (logits * 2**0.5).round(9).tolist()               # times sqrt(2), the token's standard deviation
    [[-2.0, 2.0]]
    >>> dz, *_ = head_backward(np.array([[1.0, 0.0]]), cache)
    >>> (dz * 2**0.5).round(9).tolist()                   # the first row as in `minivit.layers.layernorm`
    [[[0.25, 0.25, -0.25, -0.25], [0.0, 0.0, 0.0, 0.0]]]
"""

from typing import NamedTuple

from minivit.base.backend import accelerated, array_module
from minivit.layers.layernorm import LayerNormCache, layernorm_backward, layernorm_forward
from minivit.layers.linear import LinearCache, linear_backward, linear_forward

NORM = ("norm.weight", "norm.bias")
HEAD_LINEAR = ("head.weight", "head.bias")
HEAD_NAMES = NORM + HEAD_LINEAR


class HeadCache(NamedTuple):
    """What `head_backward` reads."""

    norm: LayerNormCache
    head: LinearCache
    num_tokens: int  # N


@accelerated
def head_forward(z, w, b, W, bias, *, eps=1e-6):
    """Tokens to logits.

    Math    logits = LN(z[:, 0]) @ W + bias                                                               (Eq. 4)
    Shapes  z (B, N, D), w (D,), b (D,) of the LayerNorm, W (D, K), bias (K,)  ->  logits (B, K)
    Cache   of both lines, N
    """
    y, norm_cache = layernorm_forward(z[:, 0], w, b, eps=eps)  # (B, D)
    logits, head_cache = linear_forward(y, W, bias)  # (B, K)
    return logits, HeadCache(norm_cache, head_cache, z.shape[1])


@accelerated
def head_backward(dlogits, cache):
    """Backward of `head_forward`.

    Math    dy = dlogits @ W^T;  dz[:, 0] = LayerNorm's dx, zero elsewhere
    Shapes  dlogits (B, K)  ->  dz (B, N, D), dw (D,), db (D,), dW (D, K), dbias (K,)
    """
    # logits = y @ W + bias
    dy, dW, dbias = linear_backward(dlogits, cache.head)  # (B, D)
    # y = LN(z[:, 0])
    dfirst, dw, db = layernorm_backward(dy, cache.norm)  # (B, D)
    B, D = dfirst.shape
    dz = array_module(dy).zeros((B, cache.num_tokens, D), dy.dtype)  # (B, N, D)
    dz[:, 0] = dfirst
    return dz, dw, db, dW, dbias
