r"""QK-norm: LayerNorm of each head's queries and keys (Henry et al. 2020, arXiv:2010.04245; as here: Dehghani et al.
2023, arXiv:2302.05442).

Forward, for one head
    Where the scores grow, softmax saturates and training diverges. LayerNorm of each query and each key over its Dh
    entries, with a weight and a bias of their own that all heads share, bounds them:

        qn = LN(q; wq, bq)                         (N, Dh)
        kn = LN(k; wk, bk)                         (N, Dh)
        y  = softmax(qn @ kn^T / sqrt(Dh)) @ v     (N, Dh)

    At w = 1 and b = 0 the rows of qn and of kn have the length sqrt(Dh) (but for eps), and a product of two rows is at
    most that of their lengths: no score is larger than Dh / sqrt(Dh) = sqrt(Dh).

    A common positive factor of all that makes q, or k (columns of U_qkv and entries of b_qkv), then changes nothing
    (but for eps). The bias that never matters (see `minivit.layers.msa`) is now bk, that of the keys' LayerNorm: it
    adds the same number, qn_i @ bk, to a whole row of scores.

Backward, the same lines from the last to the first; dy (N, Dh) is given

        y  = attend(qn, kn, v)     =>   dqn, dkn and dv are the attention's (`minivit.layers.attention`)
        kn = LN(k; wk, bk)         =>   dk, dwk, dbk are LayerNorm's (`minivit.layers.layernorm`) with dkn for its dy
        qn = LN(q; wq, bq)         =>   dq, dwq, dbq likewise, with dqn

    All heads, tokens and images share the weights and biases: LayerNorm's sums over rows are sums over all of them.

Example: LayerNorm of two numbers gives -1 and 1, so the scores are 2 / sqrt(2) and -2 / sqrt(2)
    >>> import numpy as np
    >>> q, k, v = np.array([[0.0, 2.0]]), np.array([[0.0, 2.0], [2.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 1.0]])
    >>> one, zero = np.ones(2), np.zeros(2)
    >>> y, cache = normed_attention_forward(q, k, v, one, zero, one, zero)
    >>> y.round(4).tolist()                               # 1 / (1 + exp(-2 * sqrt(2))), and the rest
    [[0.9442, 0.0558]]
    >>> normed_attention_forward(100 * q, k, v, one, zero, one, zero)[0].round(4).tolist()
    [[0.9442, 0.0558]]
    >>> *_, dwk, dbk = normed_attention_backward(np.array([[1.0, 0.0]]), cache)
    >>> dwk.round(4).tolist(), bool(abs(dbk).max() < 1e-12)       # longer keys sharpen the choice
    ([0.0745, 0.0745], True)
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from minivit.base.backend import accelerated
from minivit.base.errors import InputError
from minivit.base.pairs import Pair
from minivit.base.params import ParameterSpec, ones, zeros
from minivit.base.settings import setting
from minivit.layers.attention import ATTENTION
from minivit.layers.layernorm import LayerNormCache, layernorm_backward, layernorm_forward
from minivit.options.option import Option

QK_NORM = ("attn.q_norm.weight", "attn.q_norm.bias", "attn.k_norm.weight", "attn.k_norm.bias")


class NormedAttentionCache(NamedTuple):
    """What `normed_attention_backward` reads: the caches of its steps."""

    q_norm: LayerNormCache
    k_norm: LayerNormCache
    attention: Any


@accelerated
def normed_attention_forward(q, k, v, wq, bq, wk, bk, *extra, eps=1e-6, attend=ATTENTION):
    """Attention of normalised queries and keys.

    Math    qn = LN(q; wq, bq);  kn = LN(k; wk, bk);  y = attend(qn, kn, v)
    Shapes  q (..., Q, Dh), k, v (..., N, Dh), wq, bq, wk, bk (Dh,)  ->  y (..., Q, Dh)
    Cache   of each step
    """
    qn, q_norm_cache = layernorm_forward(q, wq, bq, eps=eps)  # (..., Q, Dh)
    kn, k_norm_cache = layernorm_forward(k, wk, bk, eps=eps)  # (..., N, Dh)
    y, attention_cache = attend.forward(qn, kn, v, *extra)  # (..., Q, Dh)
    return y, NormedAttentionCache(q_norm_cache, k_norm_cache, attention_cache)


@accelerated
def normed_attention_backward(dy, cache, *, attend=ATTENTION):
    """Backward of `normed_attention_forward`.

    Math    dqn, dkn, dv are the attention's;  dk, dwk, dbk are LayerNorm's for dkn;  dq, dwq, dbq for dqn
    Shapes  dy (..., Q, Dh)  ->  dq (..., Q, Dh), dk, dv (..., N, Dh), dwq, dbq, dwk, dbk (Dh,), *dextra
    """
    # y = attend(qn, kn, v)
    dqn, dkn, dv, *dextra = attend.backward(dy, cache.attention)
    # kn = LN(k; wk, bk)
    dk, dwk, dbk = layernorm_backward(dkn, cache.k_norm)
    # qn = LN(q; wq, bq)
    dq, dwq, dbq = layernorm_backward(dqn, cache.q_norm)
    return dq, dk, dv, dwq, dbq, dwk, dbk, *dextra


@dataclass(frozen=True)
class Settings:
    """Fields of the configuration."""

    qk_norm: bool = setting(False, "LayerNorm of each head's queries and keys")


def check(config):
    """Raises InputError where heads have a single dimension."""
    if config.qk_norm and config.width == config.num_heads:
        raise InputError("qk_norm needs heads of more than one dimension: LayerNorm of a single number is nothing")


def rows(config):
    """Weight and bias of both norms, in every block."""
    shape = (config.width // config.num_heads,)
    inits = (ones, zeros, ones, zeros)
    specs = [ParameterSpec(name, shape, init, False) for name, init in zip(QK_NORM, inits, strict=True)]
    return {"attention": specs if config.qk_norm else []}


def attend(pair, config, place):
    """The attention with normalised queries and keys."""
    if not config.qk_norm:
        return pair
    return Pair(
        partial(normed_attention_forward, eps=config.layernorm_eps, attend=pair),
        partial(normed_attention_backward, attend=pair),
        QK_NORM + pair.names,
        pair.about | {"qk_norm": True},
    )


OPTION = Option(Settings, check, rows, attend=attend)
