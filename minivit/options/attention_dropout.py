r"""Dropout of the attention map (the official code's ``attention_dropout_rate``).

Forward, for one head (the leading axes, images and heads, only repeat it)
    Between softmax and the product with the values, each entry of the map is dropped by chance and the rest scaled:

        scores  = q @ k^T / sqrt(Dh)                (Q, N)
        attn    = softmax(scores)                   (Q, N)     each row sums to 1
        dropped = attn * m / (1 - rate)             (Q, N)     m_ij in {0, 1}, P(m_ij = 1) = 1 - rate
        y       = dropped @ v                       (Q, Dh)

    A row of the dropped map sums to 1 only in expectation.

Backward, the same lines from the last to the first; dy (Q, Dh) is given

        y = dropped @ v                   =>   ddropped = dy @ v^T              dv = dropped^T @ dy

        dropped = attn * m / (1 - rate)   =>   dattn = ddropped * m / (1 - rate)

        attn = softmax(scores)            =>   dscores = attn * (dattn - row_sum(dattn * attn))

        scores = q @ k^T / sqrt(Dh)       =>   dq = dscores @ k / sqrt(Dh)      dk = dscores^T @ q / sqrt(Dh)

    The mask m is a constant, so that the second line is linear in attn (`minivit.layers.dropout`); the others are those
    of `minivit.layers.attention`. The dropped map is not kept: the cache has attn and m, and their product makes it
    again, for less than its memory is worth.

`minivit.options.flash_attention` and `minivit.options.relative_attention` drop entries of their maps themselves.

Example: one query, two keys that it likes equally (q @ k^T = 0), Dh = 1; the second key is dropped
    >>> import numpy as np
    >>> q, k, v = np.array([[0.0]]), np.array([[1.0], [-1.0]]), np.array([[2.0], [4.0]])
    >>> y, cache = dropped_attention_forward(q, k, v, rate=0.5, rng=np.random.default_rng(2))
    >>> cache.dropout.mask.tolist(), y.tolist()           # 1/2 * 2 * 2
    ([[True, False]], [[2.0]])
    >>> dq, dk, dv = dropped_attention_backward(np.array([[1.0]]), cache)
    >>> dq.tolist(), dv.tolist()                          # a larger q looks more at the first, the only one that counts
    ([[2.0]], [[1.0], [0.0]])
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from minivit.base.backend import accelerated, matmul
from minivit.base.pairs import Pair
from minivit.base.settings import check_range, setting
from minivit.layers.attention import transpose
from minivit.layers.dropout import DropoutCache, dropout_backward, dropout_forward
from minivit.layers.softmax import SoftmaxCache, softmax_backward, softmax_forward
from minivit.options.option import Option


class DroppedAttentionCache(NamedTuple):
    """What `dropped_attention_backward` reads; ``softmax.y`` is the attention map, before dropout."""

    q: Any  # (..., Q, Dh)
    k: Any  # (..., N, Dh)
    v: Any  # (..., N, Dh)
    softmax: SoftmaxCache  # (..., Q, N)
    dropout: DropoutCache


@accelerated
def dropped_attention_forward(q, k, v, *, rate, rng):
    """Attention with dropout of its map.

    Math    y = dropout(softmax(q @ k^T / sqrt(Dh))) @ v
    Shapes  q (..., Q, Dh), k, v (..., N, Dh)  ->  y (..., Q, Dh)
    Cache   q, k, v, the attention map (..., Q, N), the mask
    """
    scores = matmul(q, transpose(k)) * q.shape[-1] ** -0.5  # (..., Q, N)
    attn, softmax_cache = softmax_forward(scores)  # (..., Q, N)
    dropped, dropout_cache = dropout_forward(attn, rate=rate, rng=rng)  # (..., Q, N)
    y = matmul(dropped, v)  # (..., Q, Dh)
    return y, DroppedAttentionCache(q, k, v, softmax_cache, dropout_cache)


@accelerated
def dropped_attention_backward(dy, cache):
    """Backward of `dropped_attention_forward`.

    Math    ddropped = dy @ v^T;  dv = dropped^T @ dy;  dattn = ddropped * m / (1 - rate);
            dscores = attn * (dattn - row_sum(dattn * attn));  dq = dscores @ k / sqrt(Dh);
            dk = dscores^T @ q / sqrt(Dh)
    Shapes  dy (..., Q, Dh)  ->  dq (..., Q, Dh), dk, dv (..., N, Dh)
    """
    q, k, v, softmax_cache, dropout_cache = cache
    # y = dropped @ v; the dropped map is made again: dropout and its backward are both attn * m / (1 - rate)
    dropped = dropout_backward(softmax_cache.y, dropout_cache)  # (..., Q, N)
    ddropped = matmul(dy, transpose(v))  # (..., Q, N)
    dv = matmul(transpose(dropped), dy)  # (..., N, Dh)
    # dropped = attn * m / (1 - rate)
    dattn = dropout_backward(ddropped, dropout_cache)  # (..., Q, N)
    # attn = softmax(scores), and the factor of the line before it, scores = q @ k^T * Dh^(-1/2)
    dscores = softmax_backward(dattn, softmax_cache) * q.shape[-1] ** -0.5  # (..., Q, N)
    # scores = q @ k^T * Dh^(-1/2), whose factor dscores has already
    dq = matmul(dscores, k)  # (..., Q, Dh)
    dk = matmul(transpose(dscores), q)  # (..., N, Dh)
    return dq, dk, dv


@dataclass(frozen=True)
class Settings:
    """Fields of the configuration."""

    attention_dropout: float = setting(0.0, "dropout rate of the attention maps")


def check(config):
    """Raises InputError unless the rate lies in [0, 1)."""
    check_range(config, 0.0, 1.0, "attention_dropout", open_high=True)


def drop_settings(config, place):
    """The settings ``rate`` and ``rng`` of attention that drops entries of its map; {} where none are dropped."""
    if place.rng is None or config.attention_dropout == 0.0:
        return {}
    return {"rate": config.attention_dropout, "rng": place.rng}


def attend(pair, config, place):
    """Attention with dropout, in training."""
    settings = drop_settings(config, place)
    if not settings:
        return pair
    forward = partial(dropped_attention_forward, **settings)
    return Pair(forward, dropped_attention_backward, about={"attention_dropout": config.attention_dropout})


OPTION = Option(Settings, check, attend=attend)
