r"""From tokens to class scores: the final LayerNorm and the linear head, read from the class token (Eq. 4).

Forward
        y      = LN(z_L^0)                 (D,)     the class token is row 0 of each image                (Eq. 4)
        logits = y @ W + b                 (K,)     one score for each class

    LayerNorm works token by token, so that only the token that is read is normalised: the same numbers for 1/N of the
    work.

Backward
        logits = y @ W + b     =>   dy, dW, db are the linear map's
        y = LN(z[:, 0])        =>   dz is LayerNorm's in row 0, and zero in all other rows: nothing was read there

Example: two tokens of D = 2; LayerNorm of two numbers gives -1 and 1
    >>> import numpy as np
    >>> z = np.array([[[0.0, 2.0], [5.0, 7.0]]])
    >>> logits, cache = head_forward(z, np.ones(2), np.zeros(2), np.eye(2), np.zeros(2), eps=0.0)
    >>> logits.tolist()
    [[-1.0, 1.0]]
    >>> dz, *_ = head_backward(np.array([[1.0, 1.0]]), cache)
    >>> dz.shape, bool(dz.any())                          # a common shift of the token has no effect
    ((1, 2, 2), False)
"""

from typing import NamedTuple

from minivit.base.backend import accelerated, array_module
from minivit.base.pairs import Pair
from minivit.layers.layernorm import LayerNormCache, layernorm_backward, layernorm_forward
from minivit.layers.linear import LinearCache, linear_backward, linear_forward

NORM = ("norm.weight", "norm.bias")
HEAD_LINEAR = ("head.weight", "head.bias")


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
    Cache   of both steps, N
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


HEAD = Pair(head_forward, head_backward, NORM + HEAD_LINEAR)
