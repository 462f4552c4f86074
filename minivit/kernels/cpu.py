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

from typing import Any, NamedTuple

from minivit.base.backend import array_module, column_sum, matmul, matmul_rows, row_mean, row_sum
from minivit.layers.attention import ATTENTION, transpose
from minivit.layers.gelu import A, C
from minivit.layers.linear import linear_backward as any_linear_backward
from minivit.layers.linear import linear_forward as any_linear_forward
from minivit.layers.linear import rows
from minivit.layers.msa import split_heads
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


class LayerNormCache(NamedTuple):
    """What `layernorm_backward` reads."""

    xhat: Any  # (..., D)
    rstd: Any  # (..., 1)
    w: Any  # (D,)


def layernorm_forward(x, w, b, *, eps=1e-6):
    """Twin of `minivit.layers.layernorm.layernorm_forward`: means are products with ones."""
    if not covers(x, w, b):
        return NotImplemented
    xhat = x - row_mean(x)  # (..., D), centred
    rstd = (row_mean(xhat * xhat) + eps) ** -0.5  # (..., 1)
    xhat *= rstd
    y = xhat * w
    y += b
    return y, LayerNormCache(xhat, rstd, w)


def layernorm_backward(dy, cache):
    """Twin of `minivit.layers.layernorm.layernorm_backward`: dw and mean(dxhat * xhat) from one array of products."""
    xhat, rstd, w = cache
    # y = xhat * w + b
    product = dy * xhat  # (..., D)
    dw = column_sum(rows(product))
    db = column_sum(rows(dy))
    dx = dy * w  # (..., D), dxhat
    # xhat = (x - mean(x)) * rstd
    product *= w  # dxhat * xhat
    dx -= row_mean(dx)
    dx -= xhat * row_mean(product)
    dx *= rstd
    return dx, dw, db


# ---- gelu ------------------------------------------------------------------------------------------------------------


class GeluCache(NamedTuple):
    """What `gelu_backward` reads."""

    x: Any  # (...)
    t: Any  # (...)


def gelu_forward(x):
    """Twin of `minivit.layers.gelu.gelu_forward`: u = x * (C + C A x^2) and all that follows in two arrays."""
    if not covers(x):
        return NotImplemented
    t = x * x
    t *= C * A
    t += C
    t *= x
    array_module(x).tanh(t, out=t)
    y = t + 1.0
    y *= x
    y *= 0.5
    return y, GeluCache(x, t)


def gelu_backward(dy, cache):
    """Twin of `minivit.layers.gelu.gelu_backward`: dx = dy * (1 + t + x * (1 - t^2) * u') / 2 in two arrays."""
    x, t = cache
    # u = C * (x + A * x^3)
    dx = x * x
    dx *= 3.0 * C * A
    dx += C  # u'
    # t = tanh(u)
    slope = t * t
    slope -= 1.0  # -(1 - t^2): the signs of this factor and of the next line cancel in the last ones
    dx *= slope
    # y = x * (1 + t) / 2
    dx *= x
    dx -= t
    dx -= 1.0
    dx *= -0.5
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


def msa_forward(x, Wqkv, bqkv, Wproj, bproj, *own, num_heads, attend=ATTENTION):
    """Twin of `minivit.layers.msa.msa_forward` with the book's attention, of all queries or of the first ones.

    The attention writes its result as (B, Q, h, Dh), so that joining the heads is a reshape.
    """
    if not covers(x, Wqkv) or attend.names or attend.about.keys() - {"reads"}:
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
