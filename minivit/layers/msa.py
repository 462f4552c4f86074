r"""Multi-head self-attention (Eq. 5-8 of the ViT paper; Vaswani et al. 2017).

Forward
    One matrix makes queries, keys and values of all h heads, each head attends in its own Dh = D / h
    dimensions, and the heads' results, side by side, are mixed by the output projection:

        [q, k, v] = x U_qkv + b_qkv                      (N, 3D), read as (N, 3, h, Dh)                  (Eq. 5)
        SA_i      = softmax(q_i k_i^T / sqrt(Dh)) v_i    (N, Dh) for each head i                         (Eq. 6-7)
        y         = [SA_1, ..., SA_h] U_msa + b_msa      (N, D)                                          (Eq. 8)

    The paper writes no biases, its code has them. The bias of the keys never matters: it adds the same number
    to a whole row of scores, and softmax ignores that, so its gradient is exactly zero.

Backward
    The three steps in reverse. Splitting and joining heads only relabels axes: q, k and v are views of the
    (B, N, 3D) product, and their gradients are written through the same views into one (B, N, 3D) array, with
    no copies in between.

QK-norm (Henry et al. 2020, arXiv:2010.04245; as here: Dehghani et al. 2023, arXiv:2302.05442)
    Where the scores grow, softmax saturates and training diverges. LayerNorm of each query and each key over its Dh
    entries, with a weight and a bias of their own that all heads share, bounds them:

        SA_i = softmax(LN(q_i) LN(k_i)^T / sqrt(Dh)) v_i,      |LN(q)| = |LN(k)| = sqrt(Dh) at w = 1, b = 0.

    A common factor of the columns of U_qkv that make q_i, or k_i, then changes nothing (but for eps); the bias that
    never matters is now that of the keys' LayerNorm. The gradients of q and k go back through LayerNorm's own.

Long sequences take `flash_attention` in place of `attention`: the same function of q, k and v, in linear memory. Where
there is a table of relative positions, sequences of any length take `relative_attention`, which keeps its map.
"""

from typing import NamedTuple

from minivit.base.backend import array_module
from minivit.layers.attention import AttentionCache, attention_backward, attention_forward, attention_jvp
from minivit.layers.layernorm import LayerNormCache, layernorm_backward, layernorm_forward, layernorm_jvp
from minivit.layers.linear import LinearCache, linear_backward, linear_forward, linear_jvp
from minivit.options.flash_attention import (
    FlashAttentionCache,
    flash_attention_backward,
    flash_attention_forward,
    flash_attention_jvp,
)
from minivit.options.relative_attention import (
    RelativeAttentionCache,
    relative_attention_backward,
    relative_attention_forward,
    relative_attention_jvp,
)

# Queries of a picture from which on the attention map is not kept. About there (at D / h = 64) the map would outweigh
# all else that a block keeps, and making it twice costs little: 1.09 of `attention` at 1,025 tokens, 0.97 at 2,049.
LONG = 1024


class MSACache(NamedTuple):
    """What `msa_backward` reads: the caches of its steps; q_norm and k_norm are None without QK-norm."""

    qkv: LinearCache
    q_norm: LayerNormCache | None
    k_norm: LayerNormCache | None
    attention: AttentionCache | FlashAttentionCache | RelativeAttentionCache
    proj: LinearCache


def split_heads(qkv, num_heads):
    """Views q, k, v (B, h, N, Dh) of a fused array (B, N, 3D) whose columns are ordered (3, h, Dh)."""
    B, N, width = qkv.shape
    return qkv.reshape(B, N, 3, num_heads, width // (3 * num_heads)).transpose(2, 0, 3, 1, 4)


def msa_forward(
    x, Wqkv, bqkv, Wproj, bproj, wq=None, bq=None, wk=None, bk=None, r=None, *, num_heads, queries=None, eps=1e-6,
    attention_dropout=0.0, rng=None,
):  # fmt: skip
    """Multi-head self-attention over the tokens of each picture.

    Math    [q, k, v] = x Wqkv + bqkv;  y = [SA_1, ..., SA_h] Wproj + bproj                            (Eq. 5-8)
    Shapes  x (B, N, D), Wqkv (D, 3D), bqkv (3D,), Wproj (D, D), bproj (D,)  ->  y (B, N, D)
    Cache   of the two linear maps, of the attention, and of QK-norm
    With ``queries`` = Q, only the first Q tokens ask, each among all N, and y is (B, Q, D).
    With wq, bq, wk, bk (Dh,), SA_i takes q_i = LN(q_i; wq, bq) and k_i = LN(k_i; wk, bk): QK-norm, with ``eps``.
    With r (1, 2N - 1, Dh), the scores count relative positions too: see `relative_attention`.
    """
    B, N, D = x.shape
    xp = array_module(x)
    qkv, qkv_cache = linear_forward(x, Wqkv, bqkv)  # (B, N, 3D)
    q, k, v = split_heads(qkv, num_heads)  # (B, h, N, Dh) each, views
    q = q[:, :, :queries]  # (B, h, Q, Dh)
    q_norm = k_norm = None
    if wq is not None:  # in place: qkv is ours, and nobody reads it again
        q[...], q_norm = layernorm_forward(q, wq, bq, eps=eps)
        k[...], k_norm = layernorm_forward(k, wk, bk, eps=eps)
    Q = q.shape[2]
    heads = xp.empty((B, Q, num_heads, D // num_heads), x.dtype)
    settings = {"dropout": attention_dropout, "rng": rng}
    settings["out"] = heads.transpose(0, 2, 1, 3)  # written as (B, Q, h, Dh), so that joining the heads is a reshape
    if r is not None:
        _, attention_cache = relative_attention_forward(q, k, v, r, **settings)
    else:
        attend = flash_attention_forward if Q >= LONG else attention_forward
        _, attention_cache = attend(q, k, v, **settings)
    y, proj_cache = linear_forward(heads.reshape(B, Q, D), Wproj, bproj)  # (B, Q, D)
    return y, MSACache(qkv_cache, q_norm, k_norm, attention_cache, proj_cache)


def msa_backward(dy, cache):
    """Backward of `msa_forward`.

    Math    Eq. 8, then Eq. 7-6 per head, then Eq. 5, each by its own backward
    Shapes  dy (B, Q, D)  ->  dx (B, N, D), dWqkv (D, 3D), dbqkv (3D,), dWproj (D, D), dbproj (D,), dwq, dbq, dwk, dbk
            (Dh,), these four None without QK-norm, dr (1, 2N - 1, Dh), None without relative positions
    """
    B, N, D = cache.qkv.x.shape
    Q = dy.shape[1]
    xp = array_module(dy)
    num_heads = cache.attention.q.shape[1]
    # y = heads Wproj + bproj
    dheads, dWproj, dbproj = linear_backward(dy, cache.proj)  # (B, Q, D)
    dheads = dheads.reshape(B, Q, num_heads, D // num_heads).transpose(0, 2, 1, 3)  # (B, h, Q, Dh), a view
    # heads = attention(q, k, v)
    dqkv = xp.empty((B, N, 3 * D), dy.dtype)
    dq, dk, dv = split_heads(dqkv, num_heads)  # (B, h, N, Dh) each, views
    dr, out = None, (dq[:, :, :Q], dk, dv)
    if isinstance(cache.attention, RelativeAttentionCache):
        *_, dr = relative_attention_backward(dheads, cache.attention, out=out)
    elif isinstance(cache.attention, FlashAttentionCache):
        flash_attention_backward(dheads, cache.attention, out=out)
    else:
        attention_backward(dheads, cache.attention, out=out)
    # q = LN(q), k = LN(k)
    dwq = dbq = dwk = dbk = None
    if cache.q_norm is not None:
        dq[:, :, :Q], dwq, dbq = layernorm_backward(dq[:, :, :Q], cache.q_norm)
        dk[...], dwk, dbk = layernorm_backward(dk, cache.k_norm)
    dq[:, :, Q:] = 0.0  # what the other tokens would have asked, nobody read
    # qkv = x Wqkv + bqkv
    dx, dWqkv, dbqkv = linear_backward(dqkv, cache.qkv)
    return dx, dWqkv, dbqkv, dWproj, dbproj, dwq, dbq, dwk, dbk, dr


def attention_map(cache):
    """The attention map (B, h, N, N) of an `MSACache`; made again where it was not kept."""
    attention = cache.attention
    if isinstance(attention, FlashAttentionCache):
        _, attention = attention_forward(attention.q, attention.k, attention.v)
    return attention.softmax.y


def msa_jvp(xdot, Wqkvdot, bqkvdot, Wprojdot, bprojdot, wqdot, bqdot, wkdot, bkdot, rdot, cache):
    """Forward-mode derivative of `msa_forward`.

    Math    Eq. 5, then Eq. 6-7 per head, then Eq. 8, each by its own derivative
    Shapes  tangents like the forward's arguments, None for what was not given  ->  ydot (B, Q, D)
    """
    _, num_heads, Q, _ = cache.attention.q.shape
    # qkv = x Wqkv + bqkv
    qkvdot = linear_jvp(xdot, Wqkvdot, bqkvdot, cache.qkv)
    qdot, kdot, vdot = split_heads(qkvdot, num_heads)
    qdot = qdot[:, :, :Q]
    # q = LN(q), k = LN(k)
    if cache.q_norm is not None:
        qdot = layernorm_jvp(qdot, wqdot, bqdot, cache.q_norm)
        kdot = layernorm_jvp(kdot, wkdot, bkdot, cache.k_norm)
    # heads = attention(q, k, v)
    if isinstance(cache.attention, RelativeAttentionCache):
        headsdot = relative_attention_jvp(qdot, kdot, vdot, rdot, cache.attention)  # (B, h, Q, Dh)
    else:
        attend_jvp = attention_jvp if isinstance(cache.attention, AttentionCache) else flash_attention_jvp
        headsdot = attend_jvp(qdot, kdot, vdot, cache.attention)  # (B, h, Q, Dh)
    # y = heads Wproj + bproj
    return linear_jvp(headsdot.transpose(0, 2, 1, 3).reshape(cache.proj.x.shape), Wprojdot, bprojdot, cache.proj)
