r"""Attention whose memory grows linearly with the number of tokens (Rabe & Staats 2021, arXiv:2112.05682; Dao et al.
2022, arXiv:2205.14135): what `minivit.layers.attention` computes, without ever holding the (N, N) map.

Forward, for one head
    The keys are taken in blocks. With scores = q @ k^T / sqrt(Dh), and v_j and y_i for rows of v and y, a softmax over
    all keys

        y_i = sum_j exp(scores_ij - m_i) * v_j / l_i,      m_i = max_j scores_ij,      l_i = sum_j exp(scores_ij - m_i)

    can be summed block by block although m_i is known only at the end, since for any two shifts m and m'

        exp(s - m') = exp(s - m) * exp(m - m')

    So each query carries the maximum so far, m (at first -infinity), the sum so far, l, and the mixture so far, y (both
    at first 0). For each block of keys,

        m' = max(m, max_{j in block} scores_ij)
        l <- exp(m - m') * l + sum_{j in block} exp(scores_ij - m')
        y <- exp(m - m') * y + sum_{j in block} exp(scores_ij - m') * v_j
        m <- m'

    and in the end y <- y / l. All that the backward needs of the map is one number for each query,
    logsum_i = m_i + log(l_i), since

        attn_ij = exp(scores_ij - m_i) / l_i = exp(scores_ij - m_i - log(l_i)) = exp(scores_ij - logsum_i)

Backward, for one head; dy (N, Dh) is given
    The lines are those of `minivit.layers.attention`, for one block of keys after the other; k, v, dk and dv are here
    the rows, scores and attn the columns that belong to the block. Its part of the map is made again:

        attn    = exp(q @ k^T / sqrt(Dh) - logsum)

        y += attn @ v                  =>   dattn = dy @ v^T                    dv = attn^T @ dy
        attn = softmax(scores)         =>   dscores = attn * (dattn - row_sum(dattn * attn))
        scores = q @ k^T / sqrt(Dh)    =>   dq += dscores @ k / sqrt(Dh)        dk = dscores^T @ q / sqrt(Dh)

    The row sum runs over all keys, and one block does not know the others. But it is known beforehand. With
    dattn_ij = sum_c dy_ic * v_jc, and the order of the two sums exchanged,

        sum_j dattn_ij * attn_ij = sum_j sum_c dy_ic * v_jc * attn_ij
                                 = sum_c dy_ic * (sum_j attn_ij * v_jc)
                                 = sum_c dy_ic * y_ic

    hence row_sum(dattn * attn) = row_sum(dy * y). It costs one more product than `minivit.layers.attention` (the
    scores, again) and keeps N^2 numbers less.

    With dropout, dropped = attn * mask / (1 - rate) and y = dropped @ v. Then dattn = (dy @ v^T) * mask / (1 - rate),
    hence dattn * attn = (dy @ v^T) * dropped, and the same sums, with dropped_ij in the place of attn_ij, give the same
    row_sum(dy * y). The mask is not kept either: each block draws it from a generator of its own, seeded by a number in
    the cache.

Example: one query, and keys one at a time, with scores 0 and log 3
    >>> import numpy as np
    >>> q, k, v = np.array([[1.0]]), np.array([[0.0], [np.log(3.0)]]), np.array([[2.0], [6.0]])
    >>> y, cache = flash_attention_forward(q, k, v, keys=1)

    After the first key m = 0, l = 1 and y = 2. The second one raises m to log 3: l = 1/3 * 1 + 1 = 4/3 and
    y = 1/3 * 2 + 6 = 20/3. In the end y / l = 5, and logsum = log 3 + log 4/3 = log 4.

    >>> y.round(9).tolist(), np.exp(cache.logsum).round(9).tolist()
    ([[5.0]], [[4.0]])
    >>> dq, dk, dv = flash_attention_backward(np.array([[1.0]]), cache)
    >>> dk.round(9).tolist(), dv.round(9).tolist()        # dscores = [1/4 * (2 - 5), 3/4 * (6 - 5)], times q = 1
    ([[-0.75], [0.75]], [[0.25], [0.75]])
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

    Math    y = dropout(softmax(q @ k^T / sqrt(Dh))) @ v                                               (Eq. 6-7)
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
        # weights = exp(scores - m')
        weights -= raised
        xp.exp(weights, out=weights)
        # l <- exp(m - m') * l + row_sum(weights)
        shrink = xp.exp(highest - raised)
        total *= shrink
        total += row_sum(weights)
        # y <- exp(m - m') * y + dropout(weights) @ v
        dropped, _ = dropout_forward(weights, rate=rate, rng=generator(seed, block))
        y *= shrink
        y += matmul(dropped, v[..., block, :])
        highest = raised
    y /= total
    return y, FlashAttentionCache(q, k, v, y, highest + xp.log(total), rate, seed, keys)


@accelerated
def flash_attention_backward(dy, cache):
    """Backward of `flash_attention_forward`.

    Math    for each block of keys: attn = exp(q @ k^T / sqrt(Dh) - logsum);  dv = attn^T @ dy;
            dscores = attn * (dy @ v^T - row_sum(dy * y));  dq += dscores @ k / sqrt(Dh);
            dk = dscores^T @ q / sqrt(Dh)
    Shapes  dy (..., N, Dh)  ->  dq, dk, dv (..., N, Dh)
    """
    q, k, v, y, logsum, rate, seed, keys = cache
    xp = array_module(dy)
    dq, dk, dv = xp.zeros(q.shape, dy.dtype), xp.empty(k.shape, dy.dtype), xp.empty(v.shape, dy.dtype)
    scale = q.shape[-1] ** -0.5
    q_scaled = q * scale
    along = row_sum(dy * y)  # (..., N, 1) = row_sum(dattn * attn)
    for block in blocks(k.shape[-2], keys):
        attn = attention_block(q_scaled, k[..., block, :], logsum)  # (..., N, keys)
        dropped, dropout_cache = dropout_forward(attn, rate=rate, rng=generator(seed, block))
        # y += dropped @ v, with the map already divided by l
        matmul(dropped.swapaxes(-1, -2), dy, out=dv[..., block, :])
        ddropped = matmul(dy, v[..., block, :].swapaxes(-1, -2))  # (..., N, keys)
        # dropped = dropout(attn)
        dscores = dropout_backward(ddropped, dropout_cache)
        # attn = softmax(scores): dscores = attn * (dattn - row_sum(dattn * attn))
        dscores -= along
        dscores *= attn
        # scores = q_scaled @ k^T
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
