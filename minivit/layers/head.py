r"""From tokens to class scores: final LayerNorm, pooling, the optional pre-logits layer, the linear head (Eq. 4).

Forward
        y      = LN(z_L)[:, 0]             pooling "cls": the class token                              (Eq. 4)
        y      = mean_N LN(z_L)            pooling "mean": the average over tokens                     (appendix D.3)
        y      = LN(mean_N z_L)            pooling "avg": the same two the other way round               (timm)
        y      = pool(LN(z_L))             pooling "seq": a learned weighted mean, see `sequence_pool`
        y      = tanh(y W_pre + b_pre)     only with a pre-logits layer (the paper's pre-training head)
        logits = y W_head + b_head

    LayerNorm works token by token, so that only the tokens that are read are normalised: with "cls" the class token
    alone, the same numbers for 1/N of the work; with the others the patches, without registers in front of them. Mean
    and LayerNorm do not commute: the norms of the tokens weigh with "avg", and do not with "mean".

Backward
        y = tanh(u)          =>   du = dy (1 - y^2)
        y = mean_N x         =>   dx = dy / N for every token: each one had the weight 1/N
        x = LN(z[:, read])   =>   dz is LayerNorm's in the rows that were read and zero elsewhere

Like `block`, this is glue: parameters come by name, gradients are added by name.
"""

from typing import Any, NamedTuple

from minivit.base.backend import array_module
from minivit.layers.layernorm import LayerNormCache, layernorm_backward, layernorm_forward, layernorm_jvp
from minivit.layers.linear import LinearCache, linear_backward, linear_forward, linear_jvp
from minivit.options.sequence_pool import (
    SequencePoolCache,
    sequence_pool_backward,
    sequence_pool_forward,
    sequence_pool_jvp,
)

POOLINGS = ("cls", "mean", "avg", "seq")


class HeadCache(NamedTuple):
    """What `head_backward` reads; ``pool``, ``pre_logits`` and ``tanh`` are None in a head without them."""

    norm: LayerNormCache
    pool: SequencePoolCache | None
    pre_logits: LinearCache | None
    tanh: Any  # (B, R): the layer's output, all that tanh's derivative needs
    head: LinearCache
    pooling: str
    read: Any  # which of the tokens are read: 0, or the slice of the patches
    shape: tuple  # (B, N, D) of the tokens


def head_forward(z, params, *, pooling="cls", registers=0, eps=1e-6):
    """Tokens to logits.

    Math    logits = pool(LN(z)) W + b, through tanh(. W_pre + b_pre) if params has "pre_logits.weight"       (Eq. 4)
    Shapes  z (B, N, D)  ->  logits (B, K)
    Cache   of each step
    Where there is no class token, the first ``registers`` tokens are left out.
    """
    xp = array_module(z)
    pool = pre_logits = tanh = None
    read = 0 if pooling == "cls" else slice(registers, None)
    y = z[:, read]  # (B, D) or (B, n, D)
    if pooling == "avg":
        y = y.mean(axis=1)  # (B, D)
    y, norm = layernorm_forward(y, params["norm.weight"], params["norm.bias"], eps=eps)
    if pooling == "mean":
        y = y.mean(axis=1)  # (B, D)
    elif pooling == "seq":
        y, pool = sequence_pool_forward(y, params["attention_pool.weight"], params["attention_pool.bias"])  # (B, D)
    if "pre_logits.weight" in params:
        u, pre_logits = linear_forward(y, params["pre_logits.weight"], params["pre_logits.bias"])  # (B, R)
        y = tanh = xp.tanh(u)
    logits, head = linear_forward(y, params["head.weight"], params["head.bias"])  # (B, K)
    return logits, HeadCache(norm, pool, pre_logits, tanh, head, pooling, read, z.shape)


def head_backward(dlogits, cache, grads):
    """Backward of `head_forward`.

    Shapes  dlogits (B, K)  ->  dz (B, N, D);  the parameter gradients are added into ``grads``
    """
    B, N, D = cache.shape
    xp = array_module(dlogits)

    def add(name, dW, db):
        grads[f"{name}.weight"] += dW
        grads[f"{name}.bias"] += db

    def spread(dy):
        # y = mean_n x
        n = N - cache.read.start
        dx = xp.empty((B, n, D), dy.dtype)
        dx[...] = dy[:, None] / n
        return dx

    # logits = y W_head + b_head
    dy, dW, db = linear_backward(dlogits, cache.head)  # (B, D), or (B, R) with pre-logits
    add("head", dW, db)
    # y = tanh(y W_pre + b_pre)
    if cache.pre_logits is not None:
        du = dy * (1.0 - cache.tanh * cache.tanh)
        dy, dW, db = linear_backward(du, cache.pre_logits)  # (B, D)
        add("pre_logits", dW, db)
    if cache.pooling == "mean":
        # y = mean_n x
        dy = spread(dy)
    elif cache.pooling == "seq":
        # y = pool(x)
        dy, dW, db = sequence_pool_backward(dy, cache.pool)  # (B, n, D)
        add("attention_pool", dW, db)
    # x = LN(z[:, read])
    dread, dw, db = layernorm_backward(dy, cache.norm)
    add("norm", dw, db)
    if cache.pooling == "avg":
        # the x of LN is mean_n z[:, read]
        dread = spread(dread)
    if dread.shape == cache.shape:  # every token was read
        return dread
    dz = xp.zeros((B, N, D), dy.dtype)
    dz[:, cache.read] = dread
    return dz


def head_jvp(zdot, paramsdot, cache):
    """Forward-mode derivative of `head_forward`.

    Shapes  zdot (B, N, D), paramsdot like params  ->  logitsdot (B, K)
    """

    def take(name):
        return paramsdot[f"{name}.weight"], paramsdot[f"{name}.bias"]

    # x = LN(z[:, read]), or LN(mean_n z[:, read])
    xdot = zdot[:, cache.read]
    xdot = xdot.mean(axis=1) if cache.pooling == "avg" else xdot
    ydot = layernorm_jvp(xdot, *take("norm"), cache.norm)
    if cache.pooling == "mean":
        # y = mean_n x
        ydot = ydot.mean(axis=1)
    elif cache.pooling == "seq":
        # y = pool(x)
        ydot = sequence_pool_jvp(ydot, *take("attention_pool"), cache.pool)
    # y = tanh(y W_pre + b_pre)
    if cache.pre_logits is not None:
        ydot = linear_jvp(ydot, *take("pre_logits"), cache.pre_logits) * (1.0 - cache.tanh * cache.tanh)
    # logits = y W_head + b_head
    return linear_jvp(ydot, *take("head"), cache.head)
