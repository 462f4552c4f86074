r"""Attention that knows how far apart two tokens are (appendix D.4 of the ViT paper; Shaw et al. 2018, 1803.02155).

Forward, for one head
    Instead of a vector for each position, added to the tokens, one for each *offset*: with p_i = i, the place of token
    i in the sequence, query i and key j are p_i - p_j apart, and a row r(p_i - p_j) is learned. The paper has the same
    queries attend to these vectors as keys, and adds the logits to those of the contents before the softmax:

        scores_ij = (q_i @ k_j^T + q_i @ r(i - j)^T) / sqrt(Dh)         (N, N)
        attn      = softmax(scores)                                     (N, N)
        y         = attn @ v                                            (N, Dh)

    The extra logits are those of an attention, hence the factor 1 / sqrt(Dh) of Eq. 6 applies to both terms. All heads
    of a block share the table, and the class token, where there is one, is the first of the sequence.

    The table has 2N - 1 rows; row t belongs to the offset N - 1 - t. The offset i - j therefore stands in the row
    t = N - 1 - i + j: the N rows that query i needs, for its keys j = 0, 1, ..., N - 1, follow each other from row
    N - 1 - i on. So all that queries and offsets can make of each other is one product, and the extra logits of query i
    are N neighbours in its row:

        P        = q @ r^T                              (N, 2N - 1)
        extra_ij = P_{i, N - 1 - i + j}                 (N, N)
        scores   = (q @ k^T + extra) / sqrt(Dh)         (N, N)

        N = 3      P = | .  .  a  b  c |          extra = | a  b  c |
                       | .  d  e  f  . |                  | d  e  f |
                       | g  h  i  .  . |                  | g  h  i |

    Seen in memory, each row of the extra logits begins one number less than a row of P after the one before it: a view.

Backward, for one head, the same lines from the last to the first; dy (N, Dh) is given
    As in `minivit.layers.attention`, with logits for what is divided by sqrt(Dh):

        y = attn @ v                      =>   dattn = dy @ v^T                 dv = attn^T @ dy

        attn = softmax(scores)            =>   dscores = attn * (dattn - row_sum(dattn * attn))

        scores = logits / sqrt(Dh)        =>   dlogits = dscores / sqrt(Dh)

        logits = q @ k^T + extra          =>   dq = dlogits @ k                 dk = dlogits^T @ q
                                               dextra = dlogits

    A sum hands its gradient to both of its terms. Each extra logit is one entry of P, each entry of P at most one
    extra logit; those that are none (the dots above) reach nothing:

        extra_ij = P_{i, N - 1 - i + j}   =>   dP_{i, N - 1 - i + j} = dextra_ij,   zero elsewhere

    which is written through the same view, into zeros. q enters P too, and gets a second term; the table serves every
    image and every head, and its gradient is a sum over them:

        P = q @ r^T                       =>   dq += dP @ r                     dr = sum_images sum_heads dP^T @ q

Where Q < N queries ask, the first Q tokens, the offsets above Q - 1 do not occur: the first N - Q rows of r stay out.
P then has N + Q - 1 columns, and extra_ij = P_{i, Q - 1 - i + j}.

With dropout, y = dropped @ v, and dattn is that of `minivit.options.attention_dropout`.

Example: two tokens, Dh = 1, keys of 0; only the offset 1 (from query 1 to key 0) has a logit, log 3
    >>> import numpy as np
    >>> q, k, v = np.array([[1.0], [1.0]]), np.array([[0.0], [0.0]]), np.array([[4.0], [8.0]])
    >>> r = np.array([[[np.log(3.0)], [0.0], [0.0]]])     # of the offsets 1, 0 and -1
    >>> y, cache = relative_attention_forward(q, k, v, r)
    >>> y.round(9).tolist()                               # the mean of both; 3/4 * 4 + 1/4 * 8
    [[6.0], [5.0]]
    >>> dq, dk, dv, dr = relative_attention_backward(np.array([[0.0], [1.0]]), cache)
    >>> dr.round(9).tolist()                              # query 1 would rather look at key 1, whose value is larger
    [[[-0.75], [0.75], [0.0]]]
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from minivit.base.backend import accelerated, array_module, matmul
from minivit.base.errors import InputError
from minivit.base.pairs import Pair
from minivit.base.params import ParameterSpec, normal
from minivit.layers.dropout import DropoutCache, dropout_backward, dropout_forward
from minivit.layers.softmax import SoftmaxCache, softmax_backward, softmax_forward
from minivit.options.attention_dropout import drop_settings
from minivit.options.option import Option

RELATIVE = "relative"  # the value of ``pos_embed``


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


@accelerated
def relative_attention_forward(q, k, v, r, *, rate=0.0, rng=None):
    """Mix the values by the softmax of the scaled scores of contents and of offsets.

    Math    y = dropout(softmax((q_i @ k_j^T + q_i @ r(i - j)^T) / sqrt(Dh))) @ v           (appendix D.4; Eq. 6-7)
    Shapes  q (..., Q, Dh), k, v (..., N, Dh), r (1, 2N - 1, Dh)  ->  y (..., Q, Dh)
    Cache   q, k, v, r, the attention map (..., Q, N), the dropout mask
    q, k and v may be strided views as long as their last axis is contiguous.
    Source  arXiv:2010.11929, appendix D.4
    """
    array_module(q, k, v, r)  # refuses a mixture
    Q, N = q.shape[-2], k.shape[-2]
    scores = matmul(q, k.swapaxes(-1, -2))  # (..., Q, N)
    scores += by_key(matmul(q, r[0, N - Q :].T), N)  # of (..., Q, N + Q - 1)
    scores *= q.shape[-1] ** -0.5
    attn, softmax_cache = softmax_forward(scores)
    dropped, dropout_cache = dropout_forward(attn, rate=rate, rng=rng)
    y = matmul(dropped, v)  # (..., Q, Dh)
    return y, RelativeAttentionCache(q, k, v, r, softmax_cache, dropout_cache)


@accelerated
def relative_attention_backward(dy, cache):
    """Backward of `relative_attention_forward`.

    Math    dv = attn^T @ dy;  dattn = dy @ v^T;  dlogits = attn * (dattn - row_sum(dattn * attn)) / sqrt(Dh);
            dP_{i, Q - 1 - i + j} = dlogits_ij;  dq = dlogits @ k + dP @ r;  dk = dlogits^T @ q;  dr = sum dP^T @ q
    Shapes  dy (..., Q, Dh)  ->  dq (..., Q, Dh), dk, dv (..., N, Dh), dr (1, 2N - 1, Dh)
    """
    q, k, v, r, softmax_cache, dropout_cache = cache
    xp = array_module(dy)
    Q, N = q.shape[-2], k.shape[-2]
    # y = dropped @ v; the dropped map is made again, as in `minivit.options.attention_dropout`
    dropped = dropout_backward(softmax_cache.y, dropout_cache)
    dv = matmul(dropped.swapaxes(-1, -2), dy)
    ddropped = matmul(dy, v.swapaxes(-1, -2))  # (..., Q, N)
    # dropped = attn * m / (1 - rate)
    dattn = dropout_backward(ddropped, dropout_cache)
    # attn = softmax(scores): dscores = attn * (dattn - row_sum(dattn * attn))
    dscores = softmax_backward(dattn, softmax_cache)
    # scores = logits / sqrt(Dh): from here on, dscores is dlogits
    dscores *= q.shape[-1] ** -0.5
    # logits = q @ k^T + extra
    dq = matmul(dscores, k)
    dk = matmul(dscores.swapaxes(-1, -2), q)
    # extra_ij = P_{i, Q - 1 - i + j}
    dP = xp.zeros((*q.shape[:-1], N + Q - 1), dy.dtype)
    by_key(dP, N)[...] = dscores
    # P = q @ r^T, of those rows of r whose offsets occur
    dq += matmul(dP, r[0, N - Q :])
    dr = xp.zeros(r.shape, dy.dtype)
    dr[0, N - Q :] = matmul(dP.reshape(-1, N + Q - 1).T, q.reshape(-1, q.shape[-1]))
    return dq, dk, dv, dr


@dataclass(frozen=True)
class Settings:
    """It has no fields: it is a value of ``pos_embed``."""


def check(config):
    """Raises InputError where registers are, which have no place in the sequence."""
    if config.pos_embed == RELATIVE and config.registers:
        raise InputError('pos_embed "relative" counts along the tokens, where registers have no place: take 0 of them')


def rows(config):
    """A table of offsets, that of each block or that of all."""
    if config.pos_embed != RELATIVE:
        return {}
    shape = (1, 2 * config.sequence_length - 1, config.width // config.num_heads)
    every = config.pos_at == "every"
    spec = ParameterSpec("attn.rel_pos" if every else "rel_pos", shape, normal(0.02), False)
    return {"block" if every else "positions": [spec]}


def attend(pair, config, place):
    """Attention that knows offsets."""
    if config.pos_embed != RELATIVE:
        return pair
    forward = partial(relative_attention_forward, **drop_settings(config, place))
    name = "attn.rel_pos" if config.pos_at == "every" else "/rel_pos"
    return Pair(forward, relative_attention_backward, (name,), {"relative": True})


OPTION = Option(Settings, check, rows, attend=attend, positions={RELATIVE: ("every", "shared")})
