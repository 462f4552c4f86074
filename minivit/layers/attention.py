r"""Scaled dot-product attention of one or many heads (Vaswani et al. 2017; Eq. 6-7 of the ViT paper).

Forward, for one head (the leading axes, pictures and heads, only repeat it)

        scores = q k^T / sqrt(Dh)         (N, N)    how much query i asks of key j
        attn   = softmax(scores)          (N, N)    each row sums to 1                                   (Eq. 6)
        y      = attn v                   (N, Dh)   each token's mixture of values                       (Eq. 7)

    Dividing by sqrt(Dh) keeps the scores' variance at 1 when the entries of q and k are independent, of mean 0
    and variance 1.

Backward, the same lines from the last to the first

        y = attn v                   =>   dv    = attn^T dy,          dattn = dy v^T
        attn = softmax(scores)       =>   dscores = attn (dattn - rowsum(dattn attn))
        scores = q k^T / sqrt(Dh)    =>   dq = dscores k / sqrt(Dh),  dk = dscores^T q / sqrt(Dh)

    Attention dropout sits between softmax and product: y = dropout(attn) v.
"""

from typing import Any, NamedTuple

from minivit.base.backend import array_module, matmul
from minivit.layers.dropout import DropoutCache, dropout_backward, dropout_forward, dropout_jvp
from minivit.layers.softmax import SoftmaxCache, softmax_backward, softmax_forward, softmax_jvp


class AttentionCache(NamedTuple):
    """What `attention_backward` reads; ``softmax.y`` is the attention map."""

    q: Any  # (..., N, Dh)
    k: Any  # (..., N, Dh)
    v: Any  # (..., N, Dh)
    softmax: SoftmaxCache  # (..., N, N)
    dropout: DropoutCache


def attention_forward(q, k, v, *, dropout=0.0, rng=None, out=None):
    """Mix the values by the softmax of the scaled scores.

    Math    y = dropout(softmax(q k^T / sqrt(Dh))) v                                                   (Eq. 6-7)
    Shapes  q, k, v (..., N, Dh)  ->  y (..., N, Dh)
    Cache   q, k, v, the attention map (..., N, N), the dropout mask
    ``out`` receives y; q, k, v and out may be strided views as long as their last axis is contiguous.
    """
    array_module(q, k, v)  # refuses a mixture
    scores = matmul(q, k.swapaxes(-1, -2))  # (..., N, N)
    scores *= q.shape[-1] ** -0.5
    attn, softmax_cache = softmax_forward(scores, out=scores)
    dropped, dropout_cache = dropout_forward(attn, rate=dropout, rng=rng)
    y = matmul(dropped, v, out=out)  # (..., N, Dh)
    return y, AttentionCache(q, k, v, softmax_cache, dropout_cache)


def attention_backward(dy, cache, *, out=(None, None, None)):
    """Backward of `attention_forward`.

    Math    dv = attn^T dy;  dattn = dy v^T;  dscores = attn (dattn - rowsum(dattn attn));
            dq = dscores k / sqrt(Dh);  dk = dscores^T q / sqrt(Dh)
    Shapes  dy (..., N, Dh)  ->  dq, dk, dv (..., N, Dh)
    ``out`` may name three arrays that receive dq, dk and dv.
    """
    q, k, v, softmax_cache, dropout_cache = cache
    out_dq, out_dk, out_dv = out
    # y = dropped v; the dropped map is made again rather than kept: a product with the mask is cheaper than its memory
    dropped = dropout_backward(softmax_cache.y, dropout_cache)  # the same linear map, m / (1 - rate), applied to attn
    dv = matmul(dropped.swapaxes(-1, -2), dy, out=out_dv)
    ddropped = matmul(dy, v.swapaxes(-1, -2))  # (..., N, N)
    # dropped = dropout(attn)
    dattn = dropout_backward(ddropped, dropout_cache)
    # attn = softmax(scores)
    dscores = softmax_backward(dattn, softmax_cache, out=dattn)
    # scores = q k^T / sqrt(Dh)
    dscores *= q.shape[-1] ** -0.5
    dq = matmul(dscores, k, out=out_dq)
    dk = matmul(dscores.swapaxes(-1, -2), q, out=out_dk)
    return dq, dk, dv


def attention_jvp(qdot, kdot, vdot, cache):
    """Forward-mode derivative of `attention_forward`.

    Math    scoresdot = (qdot k^T + q kdot^T) / sqrt(Dh);  attndot = softmax'(scoresdot);
            ydot = dropout(attndot) v + dropout(attn) vdot
    Shapes  qdot, kdot, vdot (..., N, Dh)  ->  ydot (..., N, Dh)
    """
    q, k, v, softmax_cache, dropout_cache = cache
    # scores = q k^T / sqrt(Dh)
    scoresdot = qdot @ k.swapaxes(-1, -2)
    scoresdot += q @ kdot.swapaxes(-1, -2)
    scoresdot *= q.shape[-1] ** -0.5
    # attn = softmax(scores)
    attndot = softmax_jvp(scoresdot, softmax_cache)
    # y = dropout(attn) v
    return dropout_jvp(attndot, dropout_cache) @ v + dropout_jvp(softmax_cache.y, dropout_cache) @ vdot
