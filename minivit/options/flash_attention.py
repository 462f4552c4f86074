r"""Attention whose memory grows linearly with the number of tokens (Rabe & Staats 2021, arXiv:2112.05682; Dao et al.
2022, arXiv:2205.14135): what `attention` computes, without ever holding the (N, N) map.

Forward
    The keys are taken in blocks. With s_ij = q_i k_j^T / sqrt(Dh), a softmax over all keys

        y_i = sum_j exp(s_ij - m_i) v_j / l_i,      m_i = max_j s_ij,      l_i = sum_j exp(s_ij - m_i)

    can be summed block by block although m_i is known only at the end: for any two shifts,
    exp(s - m') = exp(s - m) exp(m - m'). So each query carries the maximum so far, m, the sum so far, l, and the
    mixture so far, y; where a block raises the maximum to m', l and y are first multiplied by exp(m - m') <= 1:

        l <- exp(m - m') l + sum_{j in block} exp(s_ij - m')
        y <- exp(m - m') y + sum_{j in block} exp(s_ij - m') v_j,      and in the end y <- y / l.

    All that the backward needs of the map is one number per query, logsum_i = m_i + log l_i, since

        attn_ij = exp(s_ij) / sum_j exp(s_ij) = exp(s_ij - logsum_i).

Backward
    The lines are those of `attention`, block by block, with the map made again:

        attn = exp(scores - logsum);   dv = attn^T dy;   dattn = dy v^T;   dscores = attn (dattn - rowsum(dattn attn))

    The row sum runs over all keys, and one block does not know the others. But it is known beforehand:

        sum_j dattn_ij attn_ij = sum_j (dy_i v_j^T) attn_ij = dy_i (sum_j attn_ij v_j)^T = dy_i y_i^T.

    One more product than `attention` (the scores, again) for N^2 numbers less.

    With dropout, y = dropout(attn) v, and dattn attn = (dy v^T) dropout(attn), so the identity holds as it stands. The
    mask is not kept either: each block draws it from a generator of its own, seeded by a number in the cache.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from minivit.base.backend import accelerated, array_module, matmul, row_sum
from minivit.base.pairs import Pair
from minivit.layers.attention import transpose
from minivit.layers.dropout import dropout_backward, dropout_forward
from minivit.layers.softmax import softmax_forward
from minivit.options.attention_dropout import drop_settings
from minivit.options.option import Option

# Queries of an image from which on the attention map is not kept. About there (at D / h = 64) the map would outweigh
# all else that a block keeps, and making it twice costs little: 1.09 of `attention` at 1,025 tokens, 0.97 at 2,049.
LONG = 1024
KEYS = 256  # keys per block: fewer cost time, more cost memory


class FlashAttentionCache(NamedTuple):
    """What `flash_attention_backward` reads: nothing of size (N, N)."""

    q: Any  # (..., N, Dh)
    k: Any  # (..., N, Dh)
    v: Any  # (..., N, Dh)
    y: Any  # (..., N, Dh)
    logsum: Any  # (..., N, 1)  log sum_j exp(scores_ij)
    rate: float  # of dropout
    seed: int | None  # of the dropout masks; None without dropout
    keys: int  # keys per block


@accelerated
def flash_attention_forward(q, k, v, *, rate=0.0, rng=None, keys=KEYS):
    """Mix the values by the softmax of the scaled scores, a block of keys at a time.

    Math    y = dropout(softmax(q k^T / sqrt(Dh))) v                                                   (Eq. 6-7)
    Shapes  q, k, v (..., N, Dh)  ->  y (..., N, Dh)
    Cache   q, k, v, y, the logarithm of each row's sum of exponentials, the seed of the dropout masks
    q, k and v may be strided views as long as their last axis is contiguous.
    """
    xp = array_module(q, k, v)
    seed = int(rng.integers(1 << 63)) if rng is not None and rate else None
    y = xp.zeros((*q.shape[:-1], v.shape[-1]), q.dtype)
    highest = xp.full((*q.shape[:-1], 1), -np.inf, q.real.dtype)  # m
    total = xp.zeros((*q.shape[:-1], 1), q.dtype)  # l
    q_scaled = q * q.shape[-1] ** -0.5
    for block in blocks(k.shape[-2], keys):
        weights = matmul(q_scaled, k[..., block, :].swapaxes(-1, -2))  # (..., N, keys), the scores
        raised = xp.maximum(highest, weights.real.max(axis=-1, keepdims=True))  # m'; .real: see `softmax`
        weights -= raised
        xp.exp(weights, out=weights)
        shrink = xp.exp(highest - raised)
        total *= shrink
        total += row_sum(weights)
        dropped, _ = dropout_forward(weights, rate=rate, rng=generator(seed, block))
        y *= shrink
        y += matmul(dropped, v[..., block, :])
        highest = raised
    y /= total
    return y, FlashAttentionCache(q, k, v, y, highest + xp.log(total), rate, seed, keys)


@accelerated
def flash_attention_backward(dy, cache):
    """Backward of `flash_attention_forward`.

    Math    per block of keys: attn = exp(q k^T / sqrt(Dh) - logsum);  dv = attn^T dy;
            dscores = attn (dy v^T - rowsum(dy y));  dq += dscores k / sqrt(Dh);  dk = dscores^T q / sqrt(Dh)
    Shapes  dy (..., N, Dh)  ->  dq, dk, dv (..., N, Dh)
    """
    q, k, v, y, logsum, rate, seed, keys = cache
    xp = array_module(dy)
    dq, dk, dv = xp.zeros(q.shape, dy.dtype), xp.empty(k.shape, dy.dtype), xp.empty(v.shape, dy.dtype)
    scale = q.shape[-1] ** -0.5
    q_scaled = q * scale
    along = row_sum(dy * y)  # (..., N, 1) = rowsum(dattn attn)
    for block in blocks(k.shape[-2], keys):
        attn = attention_block(q_scaled, k[..., block, :], logsum)  # (..., N, keys)
        dropped, dropout_cache = dropout_forward(attn, rate=rate, rng=generator(seed, block))
        # y = sum over blocks of dropped v
        matmul(dropped.swapaxes(-1, -2), dy, out=dv[..., block, :])
        ddropped = matmul(dy, v[..., block, :].swapaxes(-1, -2))  # (..., N, keys)
        # dropped = dropout(attn)
        dscores = dropout_backward(ddropped, dropout_cache)
        # attn = softmax(scores)
        dscores -= along
        dscores *= attn
        # scores = q_scaled k^T
        dq += matmul(dscores, k[..., block, :])
        matmul(dscores.swapaxes(-1, -2), q_scaled, out=dk[..., block, :])
    # q_scaled = q / sqrt(Dh)
    dq *= scale
    return dq, dk, dv


def blocks(n, keys):
    """The slices of n keys; the last one may reach beyond them."""
    return [slice(start, start + keys) for start in range(0, n, keys)]


def attention_block(q_scaled, k, logsum):
    """The columns of the attention map that belong to some keys.

    Shapes  q_scaled (..., N, Dh), k (..., keys, Dh), logsum (..., N, 1)  ->  attn (..., N, keys)
    """
    attn = matmul(q_scaled, k.swapaxes(-1, -2))
    attn -= logsum
    return array_module(attn).exp(attn, out=attn)


def generator(seed, block):
    """The Generator of a block's dropout mask, or None without dropout."""
    return None if seed is None else np.random.default_rng([seed, block.start])


def attention_map(q, k):
    """The whole map, for those who want to see it.

    Shapes  q (..., Q, Dh), k (..., N, Dh)  ->  (..., Q, N)
    """
    attn, _ = softmax_forward(matmul(q, transpose(k)) * q.shape[-1] ** -0.5)
    return attn


@dataclass(frozen=True)
class Settings:
    """It has no fields: the number of tokens decides."""


def attend(pair, config, place):
    """Attention in linear memory, for long sequences."""
    if (place.reads or config.sequence_length) < LONG:
        return pair
    forward = partial(flash_attention_forward, **drop_settings(config, place))
    return Pair(forward, flash_attention_backward, about=pair.about | {"flash": True})


OPTION = Option(Settings, attend=attend)
