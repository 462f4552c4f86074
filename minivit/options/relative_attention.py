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
    same view of zeros; the table serves every image and head, and its gradient is a sum over them:

        P = q r^T      =>   dq += dP r / sqrt(Dh),     dr = sum_{B, h} dP^T q / sqrt(Dh)

Where Q < N queries ask, the first Q tokens, the offsets above Q - 1 do not occur: the first N - Q rows of r stay out.
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

    Math    y = dropout(softmax((q_i k_j^T + q_i r(i - j)^T) / sqrt(Dh))) v                   (appendix D.4; Eq. 6-7)
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

    Math    dv = attn^T dy;  dattn = dy v^T;  dscores = attn (dattn - rowsum(dattn attn)) / sqrt(Dh);
            dq = dscores k + dP r;  dk = dscores^T q;  dr = sum dP^T q
    Shapes  dy (..., Q, Dh)  ->  dq (..., Q, Dh), dk, dv (..., N, Dh), dr (1, 2N - 1, Dh)
    """
    q, k, v, r, softmax_cache, dropout_cache = cache
    xp = array_module(dy)
    Q, N = q.shape[-2], k.shape[-2]
    # y = dropped v; the dropped map is made again, as in `attention`
    dropped = dropout_backward(softmax_cache.y, dropout_cache)
    dv = matmul(dropped.swapaxes(-1, -2), dy)
    ddropped = matmul(dy, v.swapaxes(-1, -2))  # (..., Q, N)
    # dropped = dropout(attn)
    dattn = dropout_backward(ddropped, dropout_cache)
    # attn = softmax(scores)
    dscores = softmax_backward(dattn, softmax_cache)
    # scores = (q k^T + extra) / sqrt(Dh)
    dscores *= q.shape[-1] ** -0.5
    dq = matmul(dscores, k)
    dk = matmul(dscores.swapaxes(-1, -2), q)
    # extra_ij = P_{i, Q - 1 - i + j}
    dP = xp.zeros((*q.shape[:-1], N + Q - 1), dy.dtype)
    by_key(dP, N)[...] = dscores
    # P = q r^T, of those rows of r whose offsets occur
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
