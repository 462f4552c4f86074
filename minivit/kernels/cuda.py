"""Twins for CuPy arrays: whole steps of the model as a few CUDA kernels and cuBLAS products each.

`kernels.cu` holds the kernels with their equations; this file is the order in which they run. Twins cover float32 with
a width and head size that are multiples of 4; other cases return NotImplemented, and the plain bodies run.

Every product and kernel goes through the `Machine` in use, a GPU's by default. The tests put another in its place
that runs the same kernels on the CPU.
"""

from __future__ import annotations

import functools
import math
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minivit.backend import array_module
from minivit.kernels.cublas import WORKSPACE, Cublas
from minivit.layers.block import ATTN, MLP, NORM1, NORM2
from minivit.layers.drop_path import dropout_mask
from minivit.loss import CrossEntropyCache, soft_targets

SOURCE = Path(__file__).with_name("kernels.cu")
MAX_WIDTH = 1024  # a warp holds a row in registers
FUSED_TOKENS = 96  # attention up to so many tokens stays in shared memory
WARPS = 8  # rows that a block of the row kernels works on at a time
PRECISIONS = ("float32", "tf32")


class Machine:
    """A GPU: compiled kernels, matrix products, and the precision of the products' factors."""

    def __init__(self):
        import cupy
        from cuda.pathfinder import load_nvidia_dynamic_lib

        self.cupy = cupy
        self.precision = "float32"
        self.processors = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["multiProcessorCount"]
        library = load_nvidia_dynamic_lib("cublas").abs_path
        self._blas = Cublas(library, lambda array: array.data.ptr, workspace=cupy.empty(WORKSPACE, np.uint8))

    @functools.cache  # noqa: B019  there is one machine for each device
    def _module(self, sizes):
        options = ("-std=c++17", *(f"-D{name}={value}" for name, value in sizes))
        return self.cupy.RawModule(code=SOURCE.read_text(), options=options)

    @functools.cache  # noqa: B019
    def _kernel(self, name, sizes, shared):
        kernel = self._module(sizes).get_function(name)
        if shared > 48 << 10:  # more than every GPU has without asking
            kernel.max_dynamic_shared_size_bytes = shared
        return kernel

    def launch(self, name, grid, block, arguments, *, sizes=(("ROWS", 1),), shared=0):
        """Run a kernel of kernels.cu. ``sizes`` are its constants; Python numbers become int and float."""
        converted = tuple(map(_argument, arguments))
        self._kernel(name, sizes, shared)(grid, block, converted, shared_mem=shared)

    def matmul(self, a, b, out, *, alpha=1.0, add=False):
        """out = alpha a b, or out += alpha a b; see `Cublas.matmul`."""
        self._blas.use_stream(self.cupy.cuda.get_current_stream().ptr)
        self._blas.matmul(a, b, out, alpha=alpha, add=add, compute=self.precision)


class Size(int):
    """An integer that a kernel takes as size_t."""


def _argument(value):
    if isinstance(value, Size):
        return np.uint64(value)
    if isinstance(value, int):
        return np.int32(value)
    return np.float32(value) if isinstance(value, float) else value


@functools.cache
def _machine_of(device):
    return Machine()


_replacement = None


def machine():
    """The machine in use."""
    if _replacement is not None:
        return _replacement
    import cupy

    return _machine_of(cupy.cuda.Device().id)


@contextmanager
def using(other):
    """While active, kernels and products run on another machine."""
    global _replacement
    previous, _replacement = _replacement, other
    try:
        yield other
    finally:
        _replacement = previous


class PathFactors:
    """Stochastic depth's factors of a batch, drawn beforehand: what a captured graph takes in place of a Generator.

    ``factors`` (2 L, B) holds m / (1 - rate) of both branches of each block, in the order of the forward.
    """

    def __init__(self, factors):
        self.factors, self.used = factors, 0

    def next(self):
        """The factors of the next branch, (B,)."""
        self.used += 1
        return self.factors[self.used - 1]

    @staticmethod
    def draw(rng, rates, B):
        """The factors (2 L, B) that the plain blocks would draw from a Generator, on the host."""
        rows = []
        for rate in rates:
            for _ in range(2):
                mask = dropout_mask((B, 1, 1), rate, rng).reshape(B) if rate > 0.0 else np.ones(B, bool)
                rows.append(mask * np.float32(1.0 / (1.0 - rate)))
        return np.array(rows, np.float32)


def _covered(*arrays):
    return all(x is None or (x.dtype == np.float32 and x.flags.c_contiguous) for x in arrays)


def _blocks(n, size):
    return -(-n // size)


def _grid(size, threads=256):
    """Blocks for a loop over ``size`` elements: enough to fill any GPU, few enough to start quickly."""
    return (min(_blocks(size, threads), 4096),)


def _width(D):
    return (("WIDTH", D),)


# ---- sums over rows, products ----------------------------------------------------------------------------------------


def _chunks(rows):
    return max(1, min(64, rows // 64))


def _add_partials(partial, outs, cols):
    outs = [*outs, *[None] * (3 - len(outs))]
    used = partial.shape[1] if partial.ndim == 3 else 1
    machine().launch("add_partials", (_blocks(cols, 32), used), (32, 16), (partial, *outs, len(partial), cols))


def _add_column_sum(x, out, path=None, tokens=1):
    """out += the sum over the rows of x (rows, cols), each times its picture's factor."""
    rows, cols = x.shape
    partial = array_module(x).empty((_chunks(rows), cols), np.float32)
    arguments = (x, path, partial, rows, cols, tokens)
    machine().launch("column_sum", (_blocks(cols, 32), len(partial)), (32, 8), arguments)
    _add_partials(partial, [out], cols)


def _product(a, b):
    out = array_module(a).empty((a.shape[0], b.shape[1]), np.float32)
    machine().matmul(a, b, out)
    return out


class CudaLinearCache(NamedTuple):
    """What `linear_backward` reads."""

    x: Any  # (..., d)
    W: Any  # (d, m)


def linear_forward(x, W, b):
    """Twin of `minivit.layers.linear.linear_forward`."""
    if not _covered(x, W, b):
        return NotImplemented
    y = _product(x.reshape(-1, x.shape[-1]), W)
    machine().launch("add_bias", _grid(y.size), (256,), (y, b, Size(y.size), len(b)))
    return y.reshape(*x.shape[:-1], len(b)), CudaLinearCache(x, W)


def linear_backward(dy, cache, *, need_dx=True):
    """Twin of `minivit.layers.linear.linear_backward`."""
    x, W = cache
    xp = array_module(dy)
    rows = xp.ascontiguousarray(dy).reshape(-1, dy.shape[-1])
    db = xp.zeros(rows.shape[1], np.float32)
    _add_column_sum(rows, db)
    dW = _product(x.reshape(-1, x.shape[-1]).T, rows)
    dx = _product(rows, W.T).reshape(x.shape) if need_dx else None
    return dx, dW, db


# ---- LayerNorm -------------------------------------------------------------------------------------------------------


class CudaLayerNormCache(NamedTuple):
    """What `layernorm_backward` reads."""

    xhat: Any  # (..., D)
    rstd: Any  # (rows,)
    w: Any  # (D,)


def _layernorm(z, w, b, eps, *, u=None, bu=None, path1=None, bnext=None, path2=None, tokens=1):
    """The kernel layernorm_forward over z (rows, D): y, out (None without u), cache."""
    xp = array_module(z)
    rows, D = z.shape
    y, xhat, rstd = xp.empty_like(z), xp.empty_like(z), xp.empty(rows, np.float32)
    out = None if u is None else xp.empty_like(z)
    arguments = (z, u, bu, path1, bnext, path2, w, b, out, y, xhat, rstd, rows, tokens, float(eps))
    machine().launch("layernorm_forward", (_blocks(rows, WARPS),), (32 * WARPS,), arguments, sizes=_width(D))
    return y, out, CudaLayerNormCache(xhat, rstd, w)


def _layernorm_backward(dy, cache, *, residual=None, path=None, tokens=1):
    """The kernel layernorm_backward over dy (rows, D): dz, and the partial sums (blocks, 3, D)."""
    xp = array_module(dy)
    rows, D = dy.shape
    dz, blocks = xp.empty_like(dy), min(_blocks(rows, WARPS), 2 * machine().processors)
    partial = xp.empty((blocks, 3, D), np.float32)
    arguments = (dy, cache.xhat, cache.rstd, cache.w, residual, path, dz, partial, rows, tokens)
    machine().launch("layernorm_backward", (blocks,), (32 * WARPS,), arguments, sizes=_width(D))
    return dz, partial


def layernorm_forward(x, w, b, *, eps=1e-6):
    """Twin of `minivit.layers.layernorm.layernorm_forward`."""
    if x.dtype != np.float32 or not _covered(w, b) or x.shape[-1] % 4 or x.shape[-1] > MAX_WIDTH:
        return NotImplemented
    y, _, cache = _layernorm(array_module(x).ascontiguousarray(x).reshape(-1, x.shape[-1]), w, b, eps)
    return y.reshape(x.shape), cache


def layernorm_backward(dy, cache):
    """Twin of `minivit.layers.layernorm.layernorm_backward`."""
    xp = array_module(dy)
    D = dy.shape[-1]
    dx, partial = _layernorm_backward(xp.ascontiguousarray(dy).reshape(-1, D), cache)
    sums = xp.zeros((2, D), np.float32)
    _add_partials(partial, sums, D)
    return dx.reshape(dy.shape), sums[0], sums[1]


# ---- attention -------------------------------------------------------------------------------------------------------


def _attention_launch(name, arguments, B, N, heads, Dh, arrays, maps):
    """One block per head and picture; ``arrays`` (N, Dh) and ``maps`` (N, N) lie in shared memory."""
    tiles = _blocks(N, 4)
    threads = 32 * _blocks(min(max(tiles * tiles, tiles * Dh // 4), 512), 32)
    shared = 4 * (arrays * 4 * tiles * (Dh + 4) + maps * 4 * tiles * (4 * tiles + 4))
    sizes = (("TOKENS", N), ("HEAD", Dh))
    machine().launch(name, (B * heads,), (threads,), (*arguments, heads), sizes=sizes, shared=shared)


def _split(qkv, heads):
    """q, k, v of a packed (B, N, 3D) array: lists of h views (B, N, Dh) each."""
    B, N, width = qkv.shape
    views = qkv.reshape(B, N, 3, heads, -1)
    return [[views[:, :, part, head] for head in range(heads)] for part in range(3)]


def _attention_forward(qkv, bias, path, heads):
    """qkv (B, N, 3D), the product without its bias  ->  y (B, N, D), and what the backward needs: p, or None."""
    xp = array_module(qkv)
    B, N, width = qkv.shape
    D = width // 3
    Dh = D // heads
    y = xp.empty((B, N, D), np.float32)
    if N <= FUSED_TOKENS:
        _attention_launch("attention_forward", (qkv, bias, path, y), B, N, heads, Dh, 3, 1)
        return y, None
    machine().launch("add_bias", _grid(qkv.size), (256,), (qkv, bias, Size(qkv.size), width))
    q, k, v = _split(qkv, heads)
    p = xp.empty((heads, B, N, N), np.float32)
    for h in range(heads):
        machine().matmul(q[h], k[h].swapaxes(1, 2), p[h], alpha=Dh**-0.5)
    rows = p.size // N
    machine().launch("softmax_forward", (_blocks(rows, WARPS),), (32 * WARPS,), (p, rows, N))
    for h, out in enumerate(_heads(y, heads)):
        machine().matmul(p[h], v[h], out)
    if path is not None:
        y *= path[:, None, None]
    return y, p


def _heads(y, heads):
    views = y.reshape(*y.shape[:2], heads, -1)
    return [views[:, :, head] for head in range(heads)]


def _attention_backward(dy, qkv, bias, path, p, heads):
    """dy (B, N, D)  ->  dqkv (B, N, 3D)."""
    xp = array_module(qkv)
    B, N, width = qkv.shape
    Dh = width // 3 // heads
    dqkv = xp.empty_like(qkv)
    if p is None:
        _attention_launch("attention_backward", (qkv, bias, path, dy, dqkv), B, N, heads, Dh, 4, 2)
        return dqkv
    if path is not None:
        dy = dy * path[:, None, None]
    (q, k, v), (dq, dk, dv), dys = _split(qkv, heads), _split(dqkv, heads), _heads(dy, heads)
    dp = xp.empty_like(p)
    for h in range(heads):
        machine().matmul(p[h].swapaxes(1, 2), dys[h], dv[h])
        machine().matmul(dys[h], v[h].swapaxes(1, 2), dp[h])
    rows = p.size // N
    machine().launch("softmax_backward", (_blocks(rows, WARPS),), (32 * WARPS,), (p, dp, Dh**-0.5, rows, N))
    for h in range(heads):
        machine().matmul(dp[h], k[h], dq[h])
        machine().matmul(dp[h].swapaxes(1, 2), q[h], dk[h])
    return dqkv


# ---- the encoder block -----------------------------------------------------------------------------------------------


class CudaBlockCache(NamedTuple):
    """What `block_backward` reads: about 16 numbers per token and width, and the attention map beyond 96 tokens."""

    params: dict
    num_heads: int
    erf_form: bool
    path1: Any  # (B,) factors of stochastic depth, or None
    path2: Any
    norm1: CudaLayerNormCache
    y1: Any  # (rows, D) what goes into U_qkv
    qkv: Any  # (B, N, 3D)
    attention: Any  # (h, B, N, N), or None where the backward makes it again
    heads: Any  # (rows, D) what goes into U_msa
    norm2: CudaLayerNormCache
    y2: Any  # (rows, D) what goes into W1
    hidden: Any  # (rows, M) y2 W1, without its bias
    gelu: Any  # (rows, M) what goes into W2


def block_forward(
    z, params, *, num_heads, gelu="tanh", eps=1e-6, dropout=0.0, attention_dropout=0.0, drop_path=0.0, rng=None
):
    """Twin of `minivit.layers.block.block_forward`, without elementwise dropout."""
    B, N, D = z.shape
    M = params["mlp.fc1.bias"].shape[0]
    drops = rng is not None and (dropout > 0.0 or attention_dropout > 0.0)
    if drops or D % 4 or D > MAX_WIDTH or M % 4 or (D // num_heads) % 4 or not _covered(z, *params.values()):
        return NotImplemented
    xp, erf_form = array_module(z), gelu == "erf"
    path1 = path2 = None
    if rng is not None and drop_path > 0.0:
        if not isinstance(rng, PathFactors):
            rng = PathFactors(xp.asarray(PathFactors.draw(rng, [drop_path], B)))
        path1, path2 = rng.next(), rng.next()
    elif isinstance(rng, PathFactors):
        rng.next(), rng.next()
    wn1, bn1 = (params[name] for name in NORM1)
    wqkv, bqkv, wproj, bproj = (params[name] for name in ATTN)
    wn2, bn2 = (params[name] for name in NORM2)
    w1, b1, w2, b2 = (params[name] for name in MLP)
    rows = z.reshape(B * N, D)
    # Eq. 2
    y1, _, norm1 = _layernorm(rows, wn1, bn1, eps)
    qkv = _product(y1, wqkv).reshape(B, N, 3 * D)
    heads, attention = _attention_forward(qkv, bqkv, path1, num_heads)
    heads = heads.reshape(B * N, D)
    u = _product(heads, wproj)
    # Eq. 3; out = z' + path2 b2, on which the last product is added
    y2, out, norm2 = _layernorm(
        rows, wn2, bn2, eps, u=u, bu=bproj, path1=path1, bnext=b2, path2=path2, tokens=N
    )  # fmt: skip
    hidden = _product(y2, w1)
    activated = xp.empty_like(hidden)
    arguments = (hidden, b1, path2, activated, B * N, M, N, int(erf_form))
    machine().launch("bias_gelu_forward", _grid(hidden.size // 4), (256,), arguments)
    machine().matmul(activated, w2, out, add=True)
    cache = CudaBlockCache(
        params, num_heads, erf_form, path1, path2, norm1, y1, qkv, attention, heads, norm2, y2, hidden, activated
    )
    return out.reshape(B, N, D), cache


def block_backward(dz, cache, grads):
    """Twin of `minivit.layers.block.block_backward`."""
    c, p = cache, cache.params
    B, N, D = dz.shape
    rows, M = B * N, c.hidden.shape[1]
    xp = array_module(dz)
    dz = xp.ascontiguousarray(dz).reshape(rows, D)
    # z'' = z' + path2 (gelu(y2 W1 + b1) W2 + b2)
    _add_column_sum(dz, grads["mlp.fc2.bias"], c.path2, N)
    machine().matmul(c.gelu.T, dz, grads["mlp.fc2.weight"], add=True)
    dhidden = _product(dz, p["mlp.fc2.weight"].T)  # (rows, M), before the slope of the GELU
    partial = xp.empty((_chunks(rows), M), np.float32)
    arguments = (c.hidden, p["mlp.fc1.bias"], c.path2, dhidden, dhidden, partial, rows, M, N, int(c.erf_form))
    machine().launch("bias_gelu_backward", (_blocks(M, 128), len(partial)), (32, 8), arguments)
    _add_partials(partial, [grads["mlp.fc1.bias"]], M)
    machine().matmul(c.y2.T, dhidden, grads["mlp.fc1.weight"], add=True)
    dy2 = _product(dhidden, p["mlp.fc1.weight"].T)
    # y2 = LN(z'), z' = z + path1 (heads W_msa + b_msa)
    dz, partial = _layernorm_backward(dy2, c.norm2, residual=dz, path=c.path1, tokens=N)
    _add_partials(partial, [grads["norm2.weight"], grads["norm2.bias"], grads["attn.proj.bias"]], D)
    machine().matmul(c.heads.T, dz, grads["attn.proj.weight"], add=True)
    dheads = _product(dz, p["attn.proj.weight"].T)
    # heads = attention(y1 W_qkv + b_qkv)
    dqkv = _attention_backward(
        dheads.reshape(B, N, D), c.qkv, p["attn.qkv.bias"], c.path1, c.attention, c.num_heads
    ).reshape(rows, 3 * D)
    _add_column_sum(dqkv, grads["attn.qkv.bias"])
    machine().matmul(c.y1.T, dqkv, grads["attn.qkv.weight"], add=True)
    dy1 = _product(dqkv, p["attn.qkv.weight"].T)
    # y1 = LN(z)
    dz, partial = _layernorm_backward(dy1, c.norm1, residual=dz)
    _add_partials(partial, [grads["norm1.weight"], grads["norm1.bias"]], D)
    return dz.reshape(B, N, D)


# ---- the two ends ----------------------------------------------------------------------------------------------------


class CudaPatchEmbedCache(NamedTuple):
    """What `patch_embed_backward` reads."""

    patches: Any  # (rows, P P C), the class token's rows zero
    shape: tuple  # (B, N, D)
    prefix: int
    has_position: bool


def patch_embed_forward(images, W, b, cls_token=None, pos_embed=None, *, patch_size):
    """Twin of `minivit.layers.patch_embed.patch_embed_forward`."""
    if not _covered(images, W, b, cls_token, pos_embed):
        return NotImplemented
    xp = array_module(images)
    B, H, width, C = images.shape
    P, D, prefix = patch_size, W.shape[1], int(cls_token is not None)
    N = prefix + (H // P) * (width // P)
    patches = xp.empty((B * N, P * P * C), np.float32)
    machine().launch("patchify", _grid(patches.size), (256,), (images, patches, B, H, width, C, P, prefix))
    z = _product(patches, W)
    machine().launch("embed", _grid(z.size), (256,), (z, b, cls_token, pos_embed, B, N, D, prefix))
    return z.reshape(B, N, D), CudaPatchEmbedCache(patches, (B, N, D), prefix, pos_embed is not None)


def patch_embed_backward(dz, cache, *, need_dimages=True):
    """Twin of `minivit.layers.patch_embed.patch_embed_backward`, for training: the pictures' gradient is not made.

    Raises  NotImplementedError: it is asked for; use `minivit.backend.plain`.
    """
    if need_dimages:
        raise NotImplementedError("the pictures' gradient needs the plain functions: with minivit.backend.plain()")
    xp = array_module(dz)
    B, N, D = cache.shape
    dz = xp.ascontiguousarray(dz)
    sums = xp.zeros((1, N, D), np.float32)  # over the batch
    _add_column_sum(dz.reshape(B, N * D), sums.reshape(-1))
    db = xp.zeros(D, np.float32)
    _add_column_sum(sums[0, cache.prefix :], db)
    dW = _product(cache.patches.T, dz.reshape(B * N, D))
    dcls_token = sums[:, :1] if cache.prefix else None
    return None, dW, db, dcls_token, sums if cache.has_position else None


def softmax_cross_entropy_forward(logits, labels, *, label_smoothing=0.0, denominator=None):
    """Twin of `minivit.loss.softmax_cross_entropy_forward`."""
    if not _covered(logits) or logits.ndim != 2 or len(labels) != len(logits):
        return NotImplemented  # the plain body says what is wrong
    xp = array_module(logits, labels)
    B, K = logits.shape
    targets = soft_targets(labels, K, label_smoothing, np.float32, xp)
    p, weights, losses = xp.empty_like(logits), xp.empty((B, 1), np.float32), xp.empty(B, np.float32)
    arguments = (logits, targets, p, weights, losses, B, K)
    machine().launch("cross_entropy_forward", (_blocks(B, WARPS),), (32 * WARPS,), arguments)
    denominator = float(B if denominator is None else denominator)
    return losses.sum() / denominator, CrossEntropyCache(p, targets, weights, denominator)


def augmented(images, rows, rng, *, crop_padding=0, flip=False, **affine):
    """Twin of `minivit.data.loader.augmented`, for crops and flips; the random numbers are the plain function's."""
    if any(affine.values()) or not (crop_padding or flip):
        return NotImplemented
    xp = array_module(images)
    _, H, W, C = images.shape
    B = len(rows)
    moves = np.zeros((3, B), np.int32)  # down, right, mirrored
    if crop_padding:
        moves[:2] = rng.integers(0, 2 * crop_padding + 1, size=(2, B))
    if flip:
        moves[2] = rng.random(B) < 0.5
    out = xp.empty((B, H, W, C), np.uint8)
    arguments = (images, rows.astype(np.int32), *xp.asarray(moves), out, B, H, W, C, crop_padding)
    machine().launch("crop_flip", _grid(B * H * W), (256,), arguments)
    return out


# ---- the update ------------------------------------------------------------------------------------------------------


def gradient_norm(grad):
    """The Euclidean norm of a flat gradient, () on the device."""
    xp = array_module(grad)
    blocks = min(_blocks(grad.size, 2048), 1024)
    partial, norm = xp.empty(blocks, np.float32), xp.empty((), np.float32)
    machine().launch("sum_squares", (blocks,), (256,), (grad, partial, Size(grad.size)))
    machine().launch("norm_of_partials", (1,), (32,), (partial, norm, blocks))
    return norm


def adam_step(optimizer, flat, grad, hyper, norm, max_norm):
    """One step of Adam or AdamW with clipping.

    ``hyper`` on the device holds what changes from step to step, (lr, 1 - b1^t, sqrt(1 - b2^t), ...): see `hyper_of`.
    The step is not counted here.
    """
    beta1, beta2 = optimizer.betas
    arguments = (
        flat, grad, optimizer.state["m"], optimizer.state["v"], optimizer.decay_mask, norm, hyper, float(beta1),
        float(beta2), float(optimizer.eps), float(optimizer.weight_decay), float(max_norm), int(optimizer.decoupled),
        Size(flat.size),
    )  # fmt: skip
    machine().launch("adam", _grid(flat.size), (256,), arguments)


def hyper_of(optimizer, lr, average=None):
    """The figures of the step to come: (lr, 1 - b1^t, sqrt(1 - b2^t), weight of the new parameters in the average)."""
    t = optimizer.steps + 1
    beta1, beta2 = optimizer.betas
    weight = 1.0 - average.decay_at(average.steps + 1) if average else 0.0
    return np.array([lr, 1.0 - beta1**t, math.sqrt(1.0 - beta2**t), weight], np.float32)
