"""Twins for NumPy arrays: what `minivit.layers` says, quicker.

Each has the name and the signature of a function of the book and gives its numbers to rounding; the tests hold them
side by side, in float32 and float64, forward and every gradient. Four things make them quick:

* memory is written where it lies: a new array of some megabytes costs more than the arithmetic that fills it;
* all rows are one matrix: a product of a batch with one matrix would be cut into many small ones;
* sums over rows and columns are products with ones: BLAS is quicker at them than ``sum``;
* heads are views of one array, into which the products write; nothing is moved to split or to join them.

They are written for any array library and take float32 and float64; complex numbers go to the book. Twins of CuPy
arrays (`minivit.kernels.cuda`) that have no kernel of their own are these.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from minivit.base.backend import array_module, column_sum, matmul, matmul_rows, row_sum
from minivit.base.pairs import add_gradients
from minivit.layers.attention import ATTENTION, transpose
from minivit.layers.block import NORM1, NORM2, take
from minivit.layers.gelu import A, C
from minivit.layers.linear import linear_backward as any_linear_backward
from minivit.layers.linear import linear_forward as any_linear_forward
from minivit.layers.linear import rows
from minivit.layers.mlp import MLP, MLP_NAMES
from minivit.layers.msa import MSA, MSA_NAMES, split_heads
from minivit.layers.patch_embed import patchify, scale_pixels


def covers(*arrays):
    """Whether all are arrays of the same real type."""
    return all(a.dtype.kind == "f" and a.dtype == arrays[0].dtype for a in arrays)


# ---- linear ----------------------------------------------------------------------------------------------------------


class LinearCache(NamedTuple):
    """What `linear_backward` reads."""

    x: Any  # (..., d)
    W: Any  # (d, m)


def linear_forward(x, W, b):
    """Twin of `minivit.layers.linear.linear_forward`: one product of all rows, and the bias added where it lies."""
    if not covers(x, W, b):
        return NotImplemented
    y = matmul_rows(x, W)  # (..., m)
    y += b
    return y, LinearCache(x, W)


def linear_backward(dy, cache):
    """Twin of `minivit.layers.linear.linear_backward`."""
    x, W = cache
    dy_rows = rows(dy)  # (n, m)
    # y = x @ W + b
    dx = matmul_rows(dy, W.T)
    dW = matmul(rows(x).T, dy_rows)
    db = column_sum(dy_rows)
    return dx, dW, db


# ---- layernorm -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def ones(n, dtype):
    """A vector of ones, made once, for sums as products."""
    vector = np.ones(n, dtype)
    vector.flags.writeable = False
    return vector


class LayerNormCache(NamedTuple):
    """What `layernorm_backward` reads."""

    xhat: Any  # (n, D), the rows as a matrix
    rstd: Any  # (n, 1)
    w: Any  # (D,)


def layernorm_forward(x, w, b, *, eps=1e-6):
    """Twin of `minivit.layers.layernorm.layernorm_forward`: means are products, and a square root is not a power."""
    if not covers(x, w, b):
        return NotImplemented
    D = x.shape[-1]
    x_rows = rows(x)  # (n, D)
    mean = x_rows @ ones(D, x.dtype)  # (n,), times D
    mean *= 1.0 / D
    xhat = x_rows - mean[:, None]  # centred
    rstd = np.einsum("ij,ij->i", xhat, xhat)  # (n,), D times the variance
    rstd *= 1.0 / D
    rstd += eps
    np.sqrt(rstd, out=rstd)
    rstd = np.divide(1.0, rstd, out=rstd)[:, None]
    xhat *= rstd
    y = xhat * w
    y += b
    return y.reshape(x.shape), LayerNormCache(xhat, rstd, w)


def layernorm_backward(dy, cache):
    """Twin of `minivit.layers.layernorm.layernorm_backward`: means of dy * w and dy * w * xhat are products with w."""
    xhat, rstd, w = cache
    n, D = xhat.shape
    dy_rows = dy.reshape(n, D)
    # y = xhat * w + b
    product = dy_rows * xhat  # (n, D)
    db = ones(n, dy.dtype) @ dy_rows
    dw = ones(n, dy.dtype) @ product
    # xhat = (x - mean(x)) * rstd, with dxhat = dy * w
    w_over_D = w * (1.0 / D)
    mean_dxhat = dy_rows @ w_over_D  # (n,)
    mean_product = product @ w_over_D  # (n,), mean(dxhat * xhat)
    dx = dy_rows * w
    np.multiply(xhat, mean_product[:, None], out=product)
    dx -= product
    dx -= mean_dxhat[:, None]
    dx *= rstd
    return dx.reshape(dy.shape), dw, db


# ---- gelu ------------------------------------------------------------------------------------------------------------


class GeluCache(NamedTuple):
    """What `gelu_backward` reads."""

    x: Any  # (...)
    s: Any  # (...)  1 / (1 + exp(-2u)) = (1 + tanh(u)) / 2


def gelu_forward(x):
    """Twin of `minivit.layers.gelu.gelu_forward`: (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)); exp is quicker than tanh."""
    if not covers(x):
        return NotImplemented
    s = x * x
    s *= -2.0 * C * A
    s -= 2.0 * C
    s *= x  # -2u
    with np.errstate(over="ignore"):  # exp(-2u) may be infinite: s is then 0, as it should be
        array_module(x).exp(s, out=s)
    s += 1.0
    array_module(x).divide(1.0, s, out=s)
    return x * s, GeluCache(x, s)


def gelu_backward(dy, cache):
    """Twin of `minivit.layers.gelu.gelu_backward`: dx = dy * s * (1 + x * (1 - s) * 2u'), as s' = s * (1 - s) * 2u'."""
    x, s = cache
    # u = C * (x + A * x^3)
    dx = x * x
    dx *= 6.0 * C * A
    dx += 2.0 * C
    dx *= x  # x 2u'
    # y = x * s
    dx *= 1.0 - s
    dx += 1.0
    dx *= s
    dx *= dy
    return dx


# ---- softmax, attention, heads ---------------------------------------------------------------------------------------


class SoftmaxCache(NamedTuple):
    """What `softmax_backward` reads."""

    y: Any  # (..., n)


def softmax_in_place(x):
    """Softmax of the last axis, written over x."""
    xp = array_module(x)
    x -= x.max(axis=-1, keepdims=True)
    xp.exp(x, out=x)
    x /= row_sum(x)
    return x


def softmax_backward_in_place(dy, y):
    """The gradient of softmax's input, written over dy."""
    dy -= row_sum(dy * y)
    dy *= y
    return dy


def softmax_forward(x):
    """Twin of `minivit.layers.softmax.softmax_forward`."""
    if not covers(x):
        return NotImplemented
    xp = array_module(x)
    y = x - x.max(axis=-1, keepdims=True)
    xp.exp(y, out=y)
    y /= row_sum(y)
    return y, SoftmaxCache(y)


def softmax_backward(dy, cache):
    """Twin of `minivit.layers.softmax.softmax_backward`."""
    (y,) = cache
    # y = exp(x) / sum exp(x)
    dx = dy - row_sum(dy * y)
    dx *= y
    return dx


class AttentionCache(NamedTuple):
    """What `attention_backward` reads."""

    q: Any  # (..., Q, Dh)
    k: Any  # (..., N, Dh)
    v: Any  # (..., N, Dh)
    attn: Any  # (..., Q, N)


def attention_forward(q, k, v, *, out=None):
    """Twin of `minivit.layers.attention.attention_forward`; ``out`` receives y, in any strides."""
    if not covers(q, k, v):
        return NotImplemented
    scores = matmul(q, transpose(k))  # (..., Q, N)
    scores *= q.shape[-1] ** -0.5
    attn = softmax_in_place(scores)
    return matmul(attn, v, out=out), AttentionCache(q, k, v, attn)


def attention_backward(dy, cache, *, out=(None, None, None)):
    """Twin of `minivit.layers.attention.attention_backward`; ``out`` receives dq, dk and dv."""
    q, k, v, attn = cache
    dq, dk, dv = out
    # y = attn @ v
    dv = matmul(transpose(attn), dy, out=dv)
    dattn = matmul(dy, transpose(v))  # (..., Q, N)
    # attn = softmax(scores)
    dscores = softmax_backward_in_place(dattn, attn)
    # scores = q @ k^T / sqrt(Dh)
    dscores *= q.shape[-1] ** -0.5
    dq = matmul(dscores, k, out=dq)
    dk = matmul(transpose(dscores), q, out=dk)
    return dq, dk, dv


class MSACache(NamedTuple):
    """What `msa_backward` reads."""

    qkv: Any  # of the linear maps
    attention: AttentionCache
    proj: Any
    num_heads: int
    num_tokens: int


def is_plain(attend):
    """Whether an attention is the book's, of all queries or of the first ones."""
    return attend.about.get("attention") == "plain" and attend.about.keys() <= {"attention", "reads"}


def msa_forward(x, Wqkv, bqkv, Wproj, bproj, *extra, num_heads, attend=ATTENTION):
    """Twin of `minivit.layers.msa.msa_forward` with the book's attention, of all queries or of the first ones.

    The attention writes its result as (B, Q, h, Dh), so that joining the heads is a reshape.
    """
    if not covers(x, Wqkv) or not is_plain(attend):
        return NotImplemented
    B, N, D = x.shape
    Q = attend.about.get("reads", N)
    qkv, qkv_cache = any_linear_forward(x, Wqkv, bqkv)  # (B, N, 3D)
    q, k, v = split_heads(qkv, num_heads)  # (B, h, N, Dh) each, views
    heads = array_module(x).empty((B, Q, num_heads, D // num_heads), x.dtype)
    _, attention_cache = attention_forward(q[:, :, :Q], k, v, out=heads.transpose(0, 2, 1, 3))
    y, proj_cache = any_linear_forward(heads.reshape(B, Q, D), Wproj, bproj)  # (B, Q, D)
    return y, MSACache(qkv_cache, attention_cache, proj_cache, num_heads, N)


def msa_backward(dy, cache, *, attend=ATTENTION):
    """Twin of `minivit.layers.msa.msa_backward`: dq, dk and dv are written through views into one array."""
    B, Q, D = dy.shape
    # y = heads @ Wproj + bproj
    dheads, dWproj, dbproj = any_linear_backward(dy, cache.proj)  # (B, Q, D)
    (dheads,) = split_heads(dheads, cache.num_heads, parts=1)  # (B, h, Q, Dh)
    # heads = attention(q[:Q], k, v)
    dqkv = array_module(dy).empty((B, cache.num_tokens, 3 * D), dy.dtype)
    dq, dk, dv = split_heads(dqkv, cache.num_heads)  # (B, h, N, Dh) each, views
    attention_backward(dheads, cache.attention, out=(dq[:, :, :Q], dk, dv))
    dq[:, :, Q:] = 0.0  # queries that were not asked
    # qkv = x @ Wqkv + bqkv
    dx, dWqkv, dbqkv = any_linear_backward(dqkv, cache.qkv)
    return dx, dWqkv, dbqkv, dWproj, dbproj


# ---- block -----------------------------------------------------------------------------------------------------------


class BlockCache(NamedTuple):
    """What `block_backward` reads."""

    norm1: LayerNormCache
    msa: MSACache
    norm2: LayerNormCache
    fc1: LinearCache
    gelu: GeluCache
    fc2: LinearCache


def block_forward(z, params, *, num_heads, reads=None, msa=MSA, mlp=MLP, eps=1e-6):
    """Twin of `minivit.layers.block.block_forward` without options: the sums are made where a branch ends.

    With ``reads`` it is that of `minivit.options.first_tokens.first_tokens_forward`.
    """
    plain = is_plain(msa) and mlp.about == {"gelu": "tanh"} and msa.names + mlp.names == MSA_NAMES + MLP_NAMES
    if not plain or not covers(z):
        return NotImplemented
    W1, b1, W2, b2 = take(params, MLP_NAMES)
    # Eq. 2
    y, norm1 = layernorm_forward(z, *take(params, NORM1), eps=eps)  # (B, N, D)
    z1, msa_cache = msa.forward(y, *take(params, MSA_NAMES), num_heads=num_heads)  # (B, Q, D)
    z1 += z[:, :reads]
    # Eq. 3
    y1, norm2 = layernorm_forward(z1, *take(params, NORM2), eps=eps)  # (B, Q, D)
    hidden, fc1 = linear_forward(y1, W1, b1)  # (B, Q, M)
    active, gelu = gelu_forward(hidden)  # (B, Q, M)
    z2, fc2 = linear_forward(active, W2, b2)  # (B, Q, D)
    z2 += z1
    return z2, BlockCache(norm1, msa_cache, norm2, fc1, gelu, fc2)


def block_backward(dz2, cache, grads, *, msa=MSA, mlp=MLP):
    """Twin of `minivit.layers.block.block_backward`."""

    # z2 = MLP(LN(z1)) + z1
    dactive, *dfc2 = linear_backward(dz2, cache.fc2)  # (B, Q, M)
    add_gradients(grads, MLP_NAMES[2:], dfc2)
    dy1, *dfc1 = linear_backward(gelu_backward(dactive, cache.gelu), cache.fc1)  # (B, Q, D)
    add_gradients(grads, MLP_NAMES[:2], dfc1)
    dz1, *dnorm2 = layernorm_backward(dy1, cache.norm2)  # (B, Q, D)
    add_gradients(grads, NORM2, dnorm2)
    dz1 += dz2
    # z1 = MSA(LN(z)) + z
    dy, *dmsa = msa.backward(dz1, cache.msa)  # (B, N, D)
    add_gradients(grads, MSA_NAMES, dmsa)
    dz, *dnorm1 = layernorm_backward(dy, cache.norm1)  # (B, N, D)
    add_gradients(grads, NORM1, dnorm1)
    dz[:, : dz1.shape[1]] += dz1
    return dz


def first_tokens_forward(z, params, *, num_heads, reads, msa=MSA, mlp=MLP, eps=1e-6):
    """Twin of `minivit.options.first_tokens.first_tokens_forward`: the block's, for the tokens that are read."""
    return block_forward(z, params, num_heads=num_heads, reads=reads, msa=msa, mlp=mlp, eps=eps)


def first_tokens_backward(dz2, cache, grads, *, msa=MSA, mlp=MLP):
    """Twin of `minivit.options.first_tokens.first_tokens_backward`."""
    return block_backward(dz2, cache, grads, msa=msa, mlp=mlp)


# ---- patch embedding -------------------------------------------------------------------------------------------------


class PatchEmbedCache(NamedTuple):
    """What `patch_embed_backward` reads."""

    patches: Any  # (B, n, P*P*C)
    prefix: int


def patch_embed_forward(images, W, b, cls_token, pos_embed, *, patch_size):
    """Twin of `minivit.layers.patch_embed.patch_embed_forward` for bytes, of which nobody wants a gradient."""
    if images.dtype.kind != "u" or not covers(W, b, cls_token, pos_embed):
        return NotImplemented
    prefix = cls_token.shape[1]
    patches = scale_pixels(patchify(images, patch_size), W.dtype)  # (B, n, P*P*C)
    B, n, _ = patches.shape
    z = array_module(W).empty((B, prefix + n, W.shape[1]), W.dtype)
    z[:, :prefix] = cls_token
    z[:, prefix:] = matmul_rows(patches, W)
    z[:, prefix:] += b
    z += pos_embed
    return z, PatchEmbedCache(patches, prefix)


def patch_embed_backward(dz, cache):
    """Twin of `minivit.layers.patch_embed.patch_embed_backward`; the gradient of the bytes is None."""
    # z = [cls_token; patches @ W + b] + pos_embed
    dpos_embed = dz.sum(axis=0, keepdims=True)  # (1, N, D)
    dcls_token = dpos_embed[:, : cache.prefix]
    dtokens = rows(dz[:, cache.prefix :])  # (B n, D)
    dW = matmul(rows(cache.patches).T, dtokens)
    db = column_sum(dtokens)
    return None, dW, db, dcls_token, dpos_embed
