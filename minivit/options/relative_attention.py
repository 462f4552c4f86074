r"""Attention that knows how far apart two tokens are (appendix D.4 of the ViT paper; Shaw et al. 2018, 1803.02155).

Forward, for one head
    Instead of a vector for each position, added to the tokens, one for each *offset*: with p_i = i, the place of token
    i in the sequence, a query and a key are p_q - p_k apart, and r(p_q - p_k) is learned. The paper has the same
    queries attend to these vectors as keys, and adds the logits to those of the contents before the softmax:

        scores_ij = (q_i k_j^T + q_i r(i - j)^T) / sqrt(Dh)         attn = softmax(scores)         y = attn v

    The extra logits are those of an attention, hence the factor 1 / sqrt(Dh) of Eq. 6 applies to both terms. All heads
    of a block share the table, and the class token, where there is one, is the first of the sequence.

    The table has 2N - 1 rows; row t belongs to the offset N - 1 - t. In this order the N rows that query i needs, for
    its keys 0, 1, ..., N - 1, follow each other from row N - 1 - i on. So all that queries and offsets can make of
    each other is one product, P = q r^T (N, 2N - 1), and the extra logits of query i are row i from there on:

        N = 3      P = | .  .  a  b  c |          extra = | a  b  c |
                       | .  d  e  f  . |                  | d  e  f |
                       | g  h  i  .  . |                  | g  h  i |

    Seen in memory, each row of the extra logits begins one number less than a row of P after the one before it: a view.

Backward
    That of `attention`, and what the second term adds. Each extra logit is one entry of P, hence dP is dscores in the
    same view of zeros; the table serves every picture and head, and its gradient is a sum over them:

        P = q r^T      =>   dq += dP r / sqrt(Dh),     dr = sum_{B, h} dP^T q / sqrt(Dh)

Where Q < N queries ask, the first Q tokens, the offsets above Q - 1 do not occur: the first N - Q rows of r stay out.
"""

from typing import Any, NamedTuple

from minivit.base.backend import array_module, matmul
from minivit.layers.dropout import DropoutCache, dropout_backward, dropout_forward, dropout_jvp
from minivit.layers.softmax import SoftmaxCache, softmax_backward, softmax_forward, softmax_jvp


class RelativeAttentionCache(NamedTuple):
    """What `relative_attention_backward` reads; ``softmax.y`` is the attention map."""

    q: Any  # (..., Q, Dh)
    k: Any  # (..., N, Dh)
    v: Any  # (..., N, Dh)
    r: Any  # (1, 2N - 1, Dh)
    softmax: SoftmaxCache  # (..., Q, N)
    dropout: DropoutCache


def by_key(products, N):
    """What each query and key have in products of queries and offsets, as a view that may be written to.

    Math    extra_ij = P_{i, Q - 1 - i + j}
    Shapes  products (..., Q, N + Q - 1)  ->  (..., Q, N)
    """
    Q = products.shape[-2]
    *outer, row, column = products.strides
    view = array_module(products).lib.stride_tricks.as_strided
    return view(products[..., Q - 1 :], (*products.shape[:-1], N), (*outer, row - column, column))


def relative_attention_forward(q, k, v, r, *, dropout=0.0, rng=None, out=None):
    """Mix the values by the softmax of the scaled scores of contents and of offsets.

    Math    y = dropout(softmax((q_i k_j^T + q_i r(i - j)^T) / sqrt(Dh))) v                   (appendix D.4; Eq. 6-7)
    Shapes  q (..., Q, Dh), k, v (..., N, Dh), r (1, 2N - 1, Dh)  ->  y (..., Q, Dh)
    Cache   q, k, v, r, the attention map (..., Q, N), the dropout mask
    ``out`` receives y; q, k, v and out may be strided views as long as their last axis is contiguous.
    Source  arXiv:2010.11929, appendix D.4
    """
    array_module(q, k, v, r)  # refuses a mixture
    Q, N = q.shape[-2], k.shape[-2]
    scores = matmul(q, k.swapaxes(-1, -2))  # (..., Q, N)
    scores += by_key(matmul(q, r[0, N - Q :].T), N)  # of (..., Q, N + Q - 1)
    scores *= q.shape[-1] ** -0.5
    attn, softmax_cache = softmax_forward(scores, out=scores)
    dropped, dropout_cache = dropout_forward(attn, rate=dropout, rng=rng)
    y = matmul(dropped, v, out=out)  # (..., Q, Dh)
    return y, RelativeAttentionCache(q, k, v, r, softmax_cache, dropout_cache)


def relative_attention_backward(dy, cache, *, out=(None, None, None)):
    """Backward of `relative_attention_forward`.

    Math    dv = attn^T dy;  dattn = dy v^T;  dscores = attn (dattn - rowsum(dattn attn)) / sqrt(Dh);
            dq = dscores k + dP r;  dk = dscores^T q;  dr = sum dP^T q
    Shapes  dy (..., Q, Dh)  ->  dq (..., Q, Dh), dk, dv (..., N, Dh), dr (1, 2N - 1, Dh)
    ``out`` may name three arrays that receive dq, dk and dv.
    """
    q, k, v, r, softmax_cache, dropout_cache = cache
    xp = array_module(dy)
    out_dq, out_dk, out_dv = out
    Q, N = q.shape[-2], k.shape[-2]
    # y = dropped v; the dropped map is made again, as in `attention`
    dropped = dropout_backward(softmax_cache.y, dropout_cache)
    dv = matmul(dropped.swapaxes(-1, -2), dy, out=out_dv)
    ddropped = matmul(dy, v.swapaxes(-1, -2))  # (..., Q, N)
    # dropped = dropout(attn)
    dattn = dropout_backward(ddropped, dropout_cache)
    # attn = softmax(scores)
    dscores = softmax_backward(dattn, softmax_cache, out=dattn)
    # scores = (q k^T + extra) / sqrt(Dh)
    dscores *= q.shape[-1] ** -0.5
    dq = matmul(dscores, k, out=out_dq)
    dk = matmul(dscores.swapaxes(-1, -2), q, out=out_dk)
    # extra_ij = P_{i, Q - 1 - i + j}
    dP = xp.zeros((*q.shape[:-1], N + Q - 1), dy.dtype)
    by_key(dP, N)[...] = dscores
    # P = q r^T, of those rows of r whose offsets occur
    dq += matmul(dP, r[0, N - Q :])
    dr = xp.zeros(r.shape, dy.dtype)
    dr[0, N - Q :] = matmul(dP.reshape(-1, N + Q - 1).T, q.reshape(-1, q.shape[-1]))
    return dq, dk, dv, dr


def relative_attention_jvp(qdot, kdot, vdot, rdot, cache):
    """Forward-mode derivative of `relative_attention_forward`.

    Math    scoresdot = (qdot k^T + q kdot^T + extra(qdot r^T + q rdot^T)) / sqrt(Dh);  attndot = softmax'(scoresdot);
            ydot = dropout(attndot) v + dropout(attn) vdot
    Shapes  qdot (..., Q, Dh), kdot, vdot (..., N, Dh), rdot (1, 2N - 1, Dh)  ->  ydot (..., Q, Dh)
    """
    q, k, v, r, softmax_cache, dropout_cache = cache
    Q, N = q.shape[-2], k.shape[-2]
    # scores = (q k^T + extra) / sqrt(Dh)
    scoresdot = qdot @ k.swapaxes(-1, -2)
    scoresdot += q @ kdot.swapaxes(-1, -2)
    scoresdot += by_key(qdot @ r[0, N - Q :].T + q @ rdot[0, N - Q :].T, N)
    scoresdot *= q.shape[-1] ** -0.5
    # attn = softmax(scores)
    attndot = softmax_jvp(scoresdot, softmax_cache)
    # y = dropout(attn) v
    return dropout_jvp(attndot, dropout_cache) @ v + dropout_jvp(softmax_cache.y, dropout_cache) @ vdot
