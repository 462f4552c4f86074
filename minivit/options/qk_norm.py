r"""QK-norm: LayerNorm of each head's queries and keys (Henry et al. 2020, arXiv:2010.04245; as here: Dehghani et al.
2023, arXiv:2302.05442).

Forward
    Where the scores grow, softmax saturates and training diverges. LayerNorm of each query and each key over its Dh
    entries, with a weight and a bias of their own that all heads share, bounds them:

        SA_i = softmax(LN(q_i) @ LN(k_i)^T / sqrt(Dh)) @ v_i,      |LN(q)| = |LN(k)| = sqrt(Dh) at w = 1, b = 0.

    A common factor of the columns of U_qkv that make q_i, or k_i, then changes nothing (but for eps). The bias that
    never matters is now that of the keys' LayerNorm.

Backward
    The attention's, and then LayerNorm's for queries and for keys; values pass by.
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

    Math    y = attend(LN(q; wq, bq), LN(k; wk, bk), v)
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

    Math    the attention's, then LayerNorm's of q and of k
    Shapes  dy (..., Q, Dh)  ->  dq (..., Q, Dh), dk, dv (..., N, Dh), dwq, dbq, dwk, dbk (Dh,), *dextra
    """
    # y = attend(qn, kn, v)
    dqn, dkn, dv, *dextra = attend.backward(dy, cache.attention)
    # kn = LN(k)
    dk, dwk, dbk = layernorm_backward(dkn, cache.k_norm)
    # qn = LN(q)
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
