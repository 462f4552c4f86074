"""Twins for CuPy arrays: whole steps of the model as a few CUDA kernels and cuBLAS products each.

`kernels.cu` holds the kernels with their equations; this file is the order in which they run. Twins cover float32 with
a width and head size that are multiples of 4; other cases return NotImplemented, and the plain bodies run.

The machine's precision says how numbers are multiplied and stored:

    float32     all of it in float32
    tf32        the factors of matrix products are rounded to 10 bits of mantissa, sums and storage are float32
    bf16        activations and their gradients inside a block are stored as bfloat16, 7 bits of mantissa, and so are
                the copies of the matrices that products take; parameters, gradients, the residual stream, LayerNorm's
                and softmax's arithmetic, the head and the loss stay float32

NumPy has no bfloat16: such arrays are uint16, the upper halves of float32 numbers.

Every product and kernel goes through the `Machine` in use, a GPU's by default. The tests put another in its place
that runs the same kernels on the CPU.
"""

from __future__ import annotations

import functools
import math
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minivit.base.backend import array_module, kernels_wanted
from minivit.kernels.cpu import (  # noqa: F401  twins that need no kernel of their own
    attention_backward,
    attention_forward,
    gelu_backward,
    gelu_forward,
    msa_backward,
    msa_forward,
    softmax_backward,
    softmax_forward,
)
from minivit.kernels.cublas import WORKSPACE, ArrayProducts, Cublas
from minivit.layers.block import BLOCK_PARAMETERS, NORM1, NORM2
from minivit.layers.dropout import DropoutCache, dropout_mask
from minivit.layers.loss import soft_targets
from minivit.layers.mlp import MLP, MLP_NAMES
from minivit.layers.msa import MSA, MSA_NAMES
from minivit.layers.patch_embed import unpatchify
from minivit.optim import NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS

SOURCE = Path(__file__).with_name("kernels.cu")
MAX_WIDTH = 1024  # a warp holds a row in registers
FUSED_TOKENS = 96  # attention up to so many tokens stays in shared memory
TENSOR_TILES = {8: 28, 16: 24, 32: 20, 64: 13, 128: 6}  # Dh: tiles of 16 tokens for which a block has the registers
WARPS = 8  # rows that a block of the row kernels works on at a time
PRECISIONS = ("float32", "tf32", "bf16")
ROWS = (("ROWS", 1),)


class Machine:
    """A GPU: compiled kernels, matrix products, and the precision of the products' factors."""

    def __init__(self):
        import cupy

        self.cupy = cupy
        self.precision = "float32"
        attributes = cupy.cuda.Device().attributes
        self.processors = attributes["MultiProcessorCount"]
        self.shared_memory = attributes["MaxSharedMemoryPerBlockOptin"]
        self.has_tf32 = int(cupy.cuda.Device().compute_capability) >= 80
        try:
            from cuda.pathfinder import load_nvidia_dynamic_lib

            library = load_nvidia_dynamic_lib("cublas").abs_path
            self._blas = Cublas(library, self.address, workspace=cupy.empty(WORKSPACE, np.uint8))
        except (ImportError, OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            warnings.warn(
                f"cuBLAS cannot be called ({reason}): products go through cupy.matmul, in float32 and without a CUDA "
                "graph, which is slower",
                stacklevel=2,
            )
            self._blas = ArrayProducts()

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

    @staticmethod
    def address(array):
        """Where an array begins."""
        return array.data.ptr

    def launch(self, name, grid, block, arguments, *, sizes=ROWS, shared=0):
        """Run a kernel of kernels.cu. ``sizes`` are its constants; Python numbers become int and float."""
        converted = tuple(map(_argument, arguments))
        self._kernel(name, sizes, shared)(grid, block, converted, shared_mem=shared)

    def blas(self):
        """What makes products, on the stream in use: `Cublas`, or `ArrayProducts` where it cannot be loaded."""
        self._blas.use_stream(self.cupy.cuda.get_current_stream().ptr)
        return self._blas


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


class Draws:
    """A batch's random numbers, drawn beforehand: what a captured graph takes in place of a Generator.

    ``factors`` (n, B) holds stochastic depth's m / (1 - rate) of both branches of each block that has any,
    ``keys`` (n,) uint64 the Philox key of each dropout; both on the device, in the order of the forward.
    """

    def __init__(self, factors, keys=None):
        self.factors, self.keys = factors, keys
        self.used, self.keys_used = 0, 0

    def __deepcopy__(self, memo):
        copy = Draws(self.factors, self.keys)  # nobody writes to them
        copy.used, copy.keys_used = self.used, self.keys_used
        return copy

    def next(self):
        """The factors of the next branch, (B,)."""
        self.used += 1
        return self.factors[self.used - 1]

    def next_key(self):
        """The key of the next dropout, (1,)."""
        self.keys_used += 1
        return self.keys[self.keys_used - 1 : self.keys_used]

    @staticmethod
    def draw(rng, rates, B, keys=0):
        """Factors (n, B), those that the plain blocks would draw from a Generator, and ``keys`` keys; on the host."""
        rows = []
        for rate in rates:
            for _ in range(2 if rate > 0.0 else 0):
                mask = dropout_mask((B, 1, 1), rate, rng).reshape(B)
                rows.append(mask * np.float32(1.0 / (1.0 - rate)))
        return np.array(rows, np.float32).reshape(len(rows), B), rng.integers(0, 2**64, keys, np.uint64)


def _covered(*arrays):
    return all(x is None or (x.dtype == np.float32 and x.flags.c_contiguous) for x in arrays)


def _blocks(n, size):
    return -(-n // size)


def _grid(size, threads=256):
    """Blocks for a loop over ``size`` elements: enough to fill any GPU, few enough to start quickly."""
    return (min(_blocks(size, threads), 4096),)


def _sizes(real, **constants):
    """A kernel's constants; ``real`` is the type of stored activations, np.float32 or np.uint16 for bfloat16."""
    return (*constants.items(), *((("BF16", 1),) if real == np.uint16 else ()))


def _real():
    """The type in which a block stores its activations."""
    return np.uint16 if machine().precision == "bf16" else np.float32


# ---- sums over rows, products ----------------------------------------------------------------------------------------


def _chunks(rows, column_blocks):
    """How many chunks of rows to sum apart: enough blocks to fill the GPU, each with some rows to do."""
    return max(1, min(_blocks(8 * machine().processors, column_blocks), rows // 64))


def _add_partials(partial, outs, cols):
    outs = [*outs, *[None] * (3 - len(outs))]
    used = partial.shape[1] if partial.ndim == 3 else 1
    machine().launch("add_partials", (_blocks(cols, 32), used), (32, 16), (partial, *outs, len(partial), cols))


def _add_column_sum(x, out, path=None, tokens=1, *, copy=False):
    """out += the sum over the rows of x (rows, cols), each times its image's factor; x, or its copy for products."""
    xp, (rows, cols) = array_module(x), x.shape
    partial = xp.empty((_chunks(rows, _blocks(cols, 32)), cols), np.float32)
    grid, block = (_blocks(cols, 32), len(partial)), (32, 8)
    if copy and _real() == np.uint16:
        copied = xp.empty(x.shape, np.uint16)
        arguments = (x, path, copied, partial, rows, cols, tokens)
        machine().launch("column_sum_copy", grid, block, arguments, sizes=_sizes(np.uint16, ROWS=1))
        x = copied
    else:
        arguments = (x, path, partial, rows, cols, tokens)
        machine().launch("column_sum", grid, block, arguments, sizes=_sizes(x.dtype, ROWS=1))
    _add_partials(partial, [out], cols)
    return x


def _matmul(a, b, out, *, add=False):
    """out = a b or out += a b, in the machine's precision; see `Cublas.matmul`."""
    machine().blas().matmul(a, b, out, add=add, compute="float32" if machine().precision == "float32" else "tf32")


def _product(a, b, dtype=None):
    out = array_module(a).empty((a.shape[0], b.shape[1]), dtype or a.dtype)
    _matmul(a, b, out)
    return out


def _products(a, b, out, *, alpha=1.0):
    """out = alpha a b for stacks of matrices (B, h, ., .) in any strides, such as the heads of a packed array.

    In float32, not TF32, where cuBLAS could not read 16 bytes at a time, as it then does if k is a multiple of 8.
    """
    xp, (B, heads) = array_module(a), a.shape[:2]
    addresses = xp.empty((3, B * heads), np.uint64)
    starts = [Size(machine().address(x)) for x in (a, b, out)]
    strides = [int(stride) for x in (a, b, out) for stride in x.strides[:2]]
    machine().launch("matrix_addresses", _grid(B * heads), (256,), (*starts, *strides, heads, B * heads, addresses))
    aligned = a.shape[-1] % 8 or not any(where % 16 for where in (*starts, *strides))
    compute = "tf32" if aligned and machine().precision != "float32" else "float32"
    machine().blas().matmul_of_addresses(a, b, out, addresses, alpha=alpha, compute=compute)


def matmul(a, b, *, out=None):
    """Twin of `minivit.base.backend.matmul`, of views of up to two axes before the matrices'.

    A product with a vector is a sum, which is taken in float32 whatever the machine's precision.
    """
    if any(x is not None and x.dtype != np.float32 for x in (a, b, out)) or 0 in (*a.shape, *b.shape):
        return NotImplemented
    if a.ndim == 1 and b.ndim == 3:  # for each matrix; nobody asks for other products with a vector
        y = array_module(a).empty((len(b), 1, b.shape[2]), np.float32)
        rows = array_module(a).broadcast_to(a, (len(b), 1, len(a)))
        machine().blas().matmul(rows, _side_by_side(b), y)
        return y[:, 0]
    if min(a.ndim, b.ndim) < 2 or max(a.ndim, b.ndim) > 4:
        return NotImplemented
    if b.ndim == 2 and out is None:
        rows = a if a.ndim == 2 else a.reshape(-1, a.shape[-1])
        return _product(_side_by_side(rows), _side_by_side(b)).reshape(*a.shape[:-1], -1)
    xp, batch = array_module(a), np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    out = xp.empty((*batch, a.shape[-2], b.shape[-1]), np.float32) if out is None else out
    stacks = [xp.broadcast_to(_side_by_side(x), (*batch, *x.shape[-2:])) for x in (a, b)]
    _products(*(x[(None,) * (4 - x.ndim)] for x in (*stacks, out)))
    return out


def _side_by_side(x):
    """The matrices x (..., n, m), copied where in neither axis the numbers lie side by side, as cuBLAS wants them."""
    (n, m), strides = x.shape[-2:], x.strides[-2:]
    fits = (strides[1] == 4 or m == 1) and strides[0] >= 4 * m or (strides[0] == 4 or n == 1) and strides[1] >= 4 * n
    return x if fits or n == m == 1 else array_module(x).ascontiguousarray(x)


def row_sum(x):
    """Twin of `minivit.base.backend.row_sum`: a sum, in float32 whatever the machine's precision."""
    return x.sum(axis=-1, keepdims=True) if x.dtype == np.float32 else NotImplemented


def column_sum(x):
    """Twin of `minivit.base.backend.column_sum`."""
    return x.sum(axis=0) if x.dtype == np.float32 else NotImplemented


_rounded = []  # (address, size, rounded copy) of the flat parameters that `rounded` blocks hold


@contextmanager
def rounded(flat):
    """While active, products in bf16 take the parameters from one copy of the flat buffer, which is rounded here.

    Nobody may change the parameters meanwhile. Without it each matrix is rounded whenever it is used.
    """
    if not kernels_wanted() or _real() == np.float32:
        yield
        return
    _rounded.append((machine().address(flat), flat.size, _round(flat)))
    try:
        yield
    finally:
        _rounded.pop()


def _round(x):
    copy = array_module(x).empty(x.shape, np.uint16)
    arguments = (x, copy, Size(x.size))
    machine().launch("round_copy", _grid(x.size), (256,), arguments, sizes=_sizes(np.uint16, ROWS=1))
    return copy


def _factor(W):
    """A matrix of parameters as products take it."""
    if _real() == np.float32:
        return W
    for start, size, copy in _rounded:
        first = (machine().address(W) - start) // 4
        if 0 <= first < size:
            return copy[first : first + W.size].reshape(W.shape)
    return _round(W)


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


def linear_backward(dy, cache):
    """Twin of `minivit.layers.linear.linear_backward`."""
    x, W = cache
    xp = array_module(dy)
    rows = xp.ascontiguousarray(dy).reshape(-1, dy.shape[-1])
    db = xp.zeros(rows.shape[1], np.float32)
    _add_column_sum(rows, db)
    dW = _product(x.reshape(-1, x.shape[-1]).T, rows)
    dx = _product(rows, W.T).reshape(x.shape)
    return dx, dW, db


# ---- LayerNorm -------------------------------------------------------------------------------------------------------


class CudaLayerNormCache(NamedTuple):
    """What `layernorm_backward` reads."""

    xhat: Any  # (..., D)
    rstd: Any  # (rows,)
    w: Any  # (D,)


def _layernorm(z, w, b, eps, real, *, u=None, bu=None, path1=None, bnext=None, path2=None, tokens=1):
    """The kernel layernorm_forward over z (rows, D): y, out (None without u), cache."""
    xp = array_module(z)
    rows, D = z.shape
    y, xhat, rstd = xp.empty(z.shape, real), xp.empty(z.shape, real), xp.empty(rows, np.float32)
    out = None if u is None else xp.empty_like(z)
    arguments = (z, u, bu, path1, bnext, path2, w, b, out, y, xhat, rstd, rows, tokens, float(eps))
    grid, block = (_blocks(rows, WARPS),), (32 * WARPS,)
    machine().launch("layernorm_forward", grid, block, arguments, sizes=_sizes(real, WIDTH=D))
    return y, out, CudaLayerNormCache(xhat, rstd, w)


def _layernorm_backward(dy, cache, *, residual=None, path=None, tokens=1):
    """The kernel layernorm_backward over dy (rows, D): dz, dz as products take it, the partial sums (blocks, 3, D)."""
    xp = array_module(dy)
    rows, D = dy.shape
    dz, blocks = xp.empty(dy.shape, np.float32), min(_blocks(rows, WARPS), 2 * machine().processors)
    copy = xp.empty_like(dy) if dy.dtype == np.uint16 else None
    partial = xp.empty((blocks, 3, D), np.float32)
    arguments = (dy, cache.xhat, cache.rstd, cache.w, residual, path, dz, copy, partial, rows, tokens)
    sizes = _sizes(dy.dtype, WIDTH=D)
    machine().launch("layernorm_backward", (blocks,), (32 * WARPS,), arguments, sizes=sizes)
    return dz, dz if copy is None else copy, partial


def takes_layernorm(w, b):
    """Whether the kernels take a LayerNorm of this weight and bias (D,)."""
    return _covered(w, b) and len(w) % 4 == 0 and len(w) <= MAX_WIDTH


def layernorm_forward(x, w, b, *, eps=1e-6):
    """Twin of `minivit.layers.layernorm.layernorm_forward`."""
    if x.dtype != np.float32 or not takes_layernorm(w, b):
        return NotImplemented
    rows = array_module(x).ascontiguousarray(x).reshape(-1, x.shape[-1])
    y, _, cache = _layernorm(rows, w, b, eps, np.float32)
    return y.reshape(x.shape), cache


def layernorm_backward(dy, cache):
    """Twin of `minivit.layers.layernorm.layernorm_backward`."""
    xp = array_module(dy)
    D = dy.shape[-1]
    dx, _, partial = _layernorm_backward(xp.ascontiguousarray(dy).reshape(-1, D), cache)
    sums = xp.zeros((2, D), np.float32)
    _add_partials(partial, sums, D)
    return dx.reshape(dy.shape), sums[0], sums[1]


# ---- dropout ---------------------------------------------------------------------------------------------------------


class CudaDropoutCache(NamedTuple):
    """What `dropout_backward` reads: no mask, but the key that makes it again."""

    key: Any  # (1,) uint64
    rate: float


def _dropout(x, key, rate):
    xp = array_module(x)
    x = xp.ascontiguousarray(x)
    y = xp.empty_like(x)
    arguments = (x, key, y, float(rate), 1.0 / (1.0 - rate), Size(x.size))
    machine().launch("dropout", _grid(_blocks(x.size, 4)), (256,), arguments)
    return y


def dropout_forward(x, *, rate=0.0, rng=None, mask=None):
    """Twin of `minivit.layers.dropout.dropout_forward`, with a mask of its own: a key is drawn in its place."""
    if x.dtype != np.float32 or mask is not None or rng is None or not 0.0 < rate < 1.0:
        return NotImplemented
    if isinstance(rng, Draws):
        key = rng.next_key()
    else:
        key = array_module(x).asarray(rng.integers(0, 2**64, 1, np.uint64))
    return _dropout(x, key, rate), CudaDropoutCache(key, rate)


def dropout_backward(dy, cache):
    """Twin of `minivit.layers.dropout.dropout_backward`."""
    return _dropout(dy, cache.key, cache.rate)


def drop_path_forward(x, *, rate=0.0, rng=None, mask=None):
    """Twin of `minivit.layers.drop_path.drop_path_forward`, for factors that were drawn beforehand."""
    if mask is not None or not isinstance(rng, Draws):
        return NotImplemented
    factors = rng.next().reshape((len(x),) + (1,) * (x.ndim - 1))
    return x * factors, DropoutCache(factors, 1.0)


# ---- attention -------------------------------------------------------------------------------------------------------


class AttentionCache(NamedTuple):
    """What the backward of attention reads beside qkv."""

    y: Any  # (B, N, D), on tensor cores
    logsum: Any  # (B h, N), on tensor cores
    p: Any  # (B, h, N, N'), through products


def _tensor_cores(N, Dh):
    """Threads, and bytes of shared memory of forward and backward, of attention on tensor cores; None if unfit."""
    tiles = _blocks(N, 16)
    array = 4 * 16 * tiles * (Dh + 4)
    shared = 2 * array, 4 * array + 2 * 4 * 16 * tiles
    fits = tiles <= TENSOR_TILES.get(Dh, 0) and shared[1] <= machine().shared_memory
    return (32 * tiles, *shared) if fits and machine().has_tf32 and machine().precision != "float32" else None


def _fused(N, Dh):
    """The same of attention in float32, with q, k, v (and dy) and the map (and its gradient) in shared memory."""
    tiles = _blocks(N, 4)
    threads = 32 * _blocks(min(max(tiles * tiles, tiles * Dh // 4), 512), 32)
    array, scores = 4 * 4 * tiles * (Dh + 4), 4 * 4 * tiles * (4 * tiles + 4)
    shared = 3 * array + scores, 4 * array + 2 * scores
    return (threads, *shared) if N <= FUSED_TOKENS and shared[1] <= machine().shared_memory else None


def _heads(packed, heads):
    """Views (B, h, N, Dh) of each of the arrays in a packed one (B, N, k D)."""
    B, N, width = packed.shape
    return packed.reshape(B, N, heads, -1).transpose(0, 2, 1, 3)


def _padded(N):
    """The stride of rows of N scores: tensor cores want rows that begin at multiples of 16 bytes."""
    return 8 * _blocks(N, 8)


def _attention_forward(qkv, bias, path, heads):
    """qkv (B, N, 3D), the product without its bias  ->  y (B, N, D), AttentionCache.

    On tensor cores where factors may be rounded; else in float32, up to 96 tokens in shared memory if it is large
    enough for the backward too, beyond through products of stacks, which leave the map in the cache.
    """
    xp, real = array_module(qkv), qkv.dtype
    B, N, width = qkv.shape
    D = width // 3
    Dh = D // heads
    y = xp.empty((B, N, D), real)
    if fit := _tensor_cores(N, Dh):
        threads, shared, _ = fit
        logsum = xp.empty((B * heads, N), np.float32)
        arguments = (qkv, bias, path, y, logsum, heads)
        sizes = _sizes(real, TENSOR=1, TOKENS=N, HEAD=Dh)
        machine().launch("attention_forward", (B * heads,), (threads,), arguments, sizes=sizes, shared=shared)
        return y, AttentionCache(y, logsum, None)
    if fit := _fused(N, Dh):
        threads, shared, _ = fit
        arguments = (qkv, bias, path, y, heads)
        sizes = _sizes(real, TOKENS=N, HEAD=Dh)
        machine().launch("attention_forward", (B * heads,), (threads,), arguments, sizes=sizes, shared=shared)
        return y, AttentionCache(None, None, None)
    arguments = (qkv, bias, Size(qkv.size), width)
    machine().launch("add_bias", _grid(qkv.size), (256,), arguments, sizes=_sizes(real, ROWS=1))
    q, k, v = (_heads(qkv[:, :, i * D : (i + 1) * D], heads) for i in range(3))
    scores = xp.empty((B, heads, N, _padded(N)), np.float32)
    p = scores if real == np.float32 else xp.empty(scores.shape, real)
    _products(q, k.swapaxes(2, 3), scores[..., :N], alpha=Dh**-0.5)
    rows = B * heads * N
    arguments = (scores, p, path, rows, N, _padded(N), heads * N)
    grid, block = (_blocks(rows, WARPS),), (32 * WARPS,)
    machine().launch("softmax_forward", grid, block, arguments, sizes=_sizes(real, ROWS=1))
    _products(p[..., :N], v, _heads(y, heads))
    return y, AttentionCache(None, None, p)


def _attention_backward(dy, qkv, bias, path, cache, heads):
    """dy (B, N, D)  ->  dqkv (B, N, 3D)."""
    xp, real = array_module(qkv), qkv.dtype
    B, N, width = qkv.shape
    D = width // 3
    Dh = D // heads
    dqkv = xp.empty_like(qkv)
    p = cache.p
    if cache.y is not None:
        threads, _, shared = _tensor_cores(N, Dh)
        arguments = (qkv, bias, path, cache.y, cache.logsum, dy, dqkv, heads)
        sizes = _sizes(real, TENSOR=1, TOKENS=N, HEAD=Dh)
        machine().launch("attention_backward", (B * heads,), (threads,), arguments, sizes=sizes, shared=shared)
        return dqkv
    if p is None:
        threads, _, shared = _fused(N, Dh)
        arguments = (qkv, bias, path, dy, dqkv, heads)
        sizes = _sizes(real, TOKENS=N, HEAD=Dh)
        machine().launch("attention_backward", (B * heads,), (threads,), arguments, sizes=sizes, shared=shared)
        return dqkv
    (q, k, v), (dq, dk, dv) = (
        [_heads(packed[:, :, i * D : (i + 1) * D], heads) for i in range(3)] for packed in (qkv, dqkv)
    )
    dy = _heads(dy, heads)
    dp = xp.empty(p.shape, np.float32)
    ds = dp if real == np.float32 else xp.empty(p.shape, real)
    _products(p[..., :N].swapaxes(2, 3), dy, dv)
    _products(dy, v.swapaxes(2, 3), dp[..., :N])
    rows = B * heads * N
    arguments = (p, dp, path, ds, Dh**-0.5, rows, N, _padded(N), heads * N)
    grid, block = (_blocks(rows, WARPS),), (32 * WARPS,)
    machine().launch("softmax_backward", grid, block, arguments, sizes=_sizes(real, ROWS=1))
    _products(ds[..., :N], k, dq)
    _products(ds[..., :N].swapaxes(2, 3), q, dk)
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
    attention: AttentionCache
    heads: Any  # (rows, D) what goes into U_msa
    norm2: CudaLayerNormCache
    y2: Any  # (rows, D) what goes into W1
    hidden: Any  # (rows, M) y2 W1, without its bias
    gelu: Any  # (rows, M) what goes into W2


KNOWN = {"attention", "gelu", "drop_path", "flash", "reads"}  # what a block may consist of for these kernels


def block_forward(z, params, *, num_heads, reads=None, msa=MSA, mlp=MLP, eps=1e-6):
    """Twin of `minivit.layers.block.block_forward`, with stochastic depth and either GELU; no other options."""
    about, names = msa.about | mlp.about, msa.names + mlp.names
    if about.keys() - KNOWN or not {"attention", "gelu"} <= about.keys() or names != MSA_NAMES + MLP_NAMES:
        return NotImplemented
    params = {name: params[name] for name in BLOCK_PARAMETERS}
    B, N, D = z.shape
    Q = min(reads or N, N)
    M, Dh = params["mlp.fc1.bias"].shape[0], D // num_heads
    if D % 4 or D > MAX_WIDTH or M % 4 or Dh % 4 or not _covered(z, *params.values()):
        return NotImplemented
    if _real() == np.uint16 and Dh % 8 and not _fused(N, Dh):
        return NotImplemented  # heads in stacks must begin at multiples of 16 bytes, or cuBLAS may stop at an address
    xp, erf_form = array_module(z), about.get("gelu") == "erf"
    path1 = path2 = None
    if "drop_path" in about:
        rate, rng = about["drop_path"]
        if not isinstance(rng, Draws):
            rng = Draws(xp.asarray(Draws.draw(rng, [rate], B)[0]))
        path1, path2 = rng.next(), rng.next()
    wn1, bn1 = (params[name] for name in NORM1)
    wqkv, bqkv, wproj, bproj = (params[name] for name in MSA_NAMES)
    wn2, bn2 = (params[name] for name in NORM2)
    w1, b1, w2, b2 = (params[name] for name in MLP_NAMES)
    rows, real = z.reshape(B * N, D), _real()
    # Eq. 2
    y1, _, norm1 = _layernorm(rows, wn1, bn1, eps, real)
    qkv = _product(y1, _factor(wqkv)).reshape(B, N, 3 * D)
    heads, attention = _attention_forward(qkv, bqkv, path1, num_heads)
    heads = xp.ascontiguousarray(heads[:, :Q]).reshape(B * Q, D)
    u = _product(heads, _factor(wproj))
    # Eq. 3; out = z' + path2 b2, on which the last product is added
    rows = xp.ascontiguousarray(z[:, :Q]).reshape(B * Q, D)
    y2, out, norm2 = _layernorm(
        rows, wn2, bn2, eps, real, u=u, bu=bproj, path1=path1, bnext=b2, path2=path2, tokens=Q
    )  # fmt: skip
    hidden = _product(y2, _factor(w1))
    activated = xp.empty_like(hidden)
    arguments = (hidden, b1, path2, activated, B * Q, M, Q, int(erf_form))
    machine().launch("bias_gelu_forward", _grid(hidden.size // 4), (256,), arguments, sizes=_sizes(real, ROWS=1))
    _matmul(activated, _factor(w2), out, add=True)
    cache = CudaBlockCache(
        params, num_heads, erf_form, path1, path2, norm1, y1, qkv, attention, heads, norm2, y2, hidden, activated
    )
    return out.reshape(B, Q, D), cache


def _with_zeros(x, N):
    """x (B, Q, D) with the gradient of what nobody read: rows of zeros up to N."""
    B, Q, D = x.shape
    if Q == N:
        return x
    full = array_module(x).zeros((B, N, D), x.dtype)
    full[:, :Q] = x
    return full


def first_tokens_forward(z, params, **settings):
    """Twin of `minivit.options.first_tokens.first_tokens_forward`: the same kernels, for the tokens that are read."""
    return block_forward(z, params, **settings)


def first_tokens_backward(dz, cache, grads, **branches):
    """Twin of `minivit.options.first_tokens.first_tokens_backward`."""
    return block_backward(dz, cache, grads)


def block_backward(dz, cache, grads, **branches):
    """Twin of `minivit.layers.block.block_backward`."""
    c, p = cache, cache.params
    B, N, _ = c.qkv.shape
    Q, D = dz.shape[1:]
    rows, M = B * Q, c.hidden.shape[1]
    xp = array_module(dz)
    dz = xp.ascontiguousarray(dz).reshape(rows, D)
    # z'' = z' + path2 (gelu(y2 W1 + b1) W2 + b2); "rounded" is dz as products take it
    rounded_dz = _add_column_sum(dz, grads["mlp.fc2.bias"], c.path2, Q, copy=True)
    _matmul(c.gelu.T, rounded_dz, grads["mlp.fc2.weight"], add=True)
    dhidden = _product(rounded_dz, _factor(p["mlp.fc2.weight"]).T)  # (rows, M), before the slope of the GELU
    partial = xp.empty((_chunks(rows, _blocks(M, 128)), M), np.float32)
    arguments = (c.hidden, p["mlp.fc1.bias"], c.path2, dhidden, dhidden, partial, rows, M, Q, int(c.erf_form))
    grid, block = (_blocks(M, 128), len(partial)), (32, 8)
    machine().launch("bias_gelu_backward", grid, block, arguments, sizes=_sizes(dhidden.dtype, ROWS=1))
    _add_partials(partial, [grads["mlp.fc1.bias"]], M)
    _matmul(c.y2.T, dhidden, grads["mlp.fc1.weight"], add=True)
    dy2 = _product(dhidden, _factor(p["mlp.fc1.weight"]).T)
    # y2 = LN(z'), z' = z + path1 (heads W_msa + b_msa)
    dz, rounded_dz, partial = _layernorm_backward(dy2, c.norm2, residual=dz, path=c.path1, tokens=Q)
    _add_partials(partial, [grads["norm2.weight"], grads["norm2.bias"], grads["attn.proj.bias"]], D)
    _matmul(c.heads.T, rounded_dz, grads["attn.proj.weight"], add=True)
    dheads = _product(rounded_dz, _factor(p["attn.proj.weight"]).T)
    # heads = attention(y1 W_qkv + b_qkv)
    dheads, dz = (_with_zeros(array.reshape(B, Q, D), N) for array in (dheads, dz))
    dqkv = _attention_backward(
        dheads, c.qkv, p["attn.qkv.bias"], c.path1, c.attention, c.num_heads
    ).reshape(B * N, 3 * D)  # fmt: skip
    _add_column_sum(dqkv, grads["attn.qkv.bias"])
    _matmul(c.y1.T, dqkv, grads["attn.qkv.weight"], add=True)
    dy1 = _product(dqkv, _factor(p["attn.qkv.weight"]).T)
    # y1 = LN(z)
    dz, _, partial = _layernorm_backward(dy1, c.norm1, residual=dz.reshape(B * N, D))
    _add_partials(partial, [grads["norm1.weight"], grads["norm1.bias"]], D)
    return dz.reshape(B, N, D)


# ---- the two ends ----------------------------------------------------------------------------------------------------


class CudaPatchEmbedCache(NamedTuple):
    """What `patch_embed_backward` reads."""

    patches: Any  # (rows, P P C), the class token's rows zero
    W: Any  # (P P C, D)
    shape: tuple  # (B, N, D)
    image_shape: tuple  # (B, H, W, C)
    patch_size: int
    prefix: int
    is_bytes: bool  # of which nobody wants a gradient


PATCHIFY = {np.dtype(np.float32): "patchify", np.dtype(np.uint8): "patchify_bytes"}


def patch_embed_forward(images, W, b, cls_token, pos_embed, *, patch_size):
    """Twin of `minivit.layers.patch_embed.patch_embed_forward`."""
    cls_token = cls_token if cls_token.size else None
    if images.dtype not in PATCHIFY or not _covered(W, b, cls_token, pos_embed):
        return NotImplemented
    xp = array_module(images)
    B, H, width, C = images.shape
    P, D, prefix = patch_size, W.shape[1], int(cls_token is not None)
    N = prefix + (H // P) * (width // P)
    patches = xp.empty((B * N, P * P * C), _real())
    arguments = (xp.ascontiguousarray(images), patches, B, H, width, C, P, prefix)
    kernel, sizes = PATCHIFY[images.dtype], _sizes(patches.dtype, ROWS=1)
    machine().launch(kernel, _grid(patches.size), (256,), arguments, sizes=sizes)
    z = _product(patches, _factor(W), np.float32)
    machine().launch("embed", _grid(z.size), (256,), (z, b, cls_token, pos_embed, B, N, D, prefix))
    is_bytes = images.dtype == np.uint8
    return z.reshape(B, N, D), CudaPatchEmbedCache(patches, W, (B, N, D), images.shape, P, prefix, is_bytes)


def patch_embed_backward(dz, cache):
    """Twin of `minivit.layers.patch_embed.patch_embed_backward`; the gradient of bytes is None."""
    xp = array_module(dz)
    B, N, D = cache.shape
    sums = xp.zeros((1, N, D), np.float32)  # over the batch
    dz = _add_column_sum(xp.ascontiguousarray(dz).reshape(B, N * D), sums.reshape(-1), copy=True)
    db = xp.zeros(D, np.float32)
    _add_column_sum(sums[0, cache.prefix :], db)
    dW = _product(cache.patches.T, dz.reshape(B * N, D), np.float32)
    dcls_token = sums[:, : cache.prefix]
    dimages = None
    if not cache.is_bytes:
        dpatches = _product(dz.reshape(B * N, D), _factor(cache.W).T, np.float32).reshape(B, N, -1)
        dimages = unpatchify(dpatches[:, cache.prefix :], cache.image_shape, cache.patch_size)
    return dimages, dW, db, dcls_token, sums


class CudaCrossEntropyCache(NamedTuple):
    """What `softmax_cross_entropy_backward` reads."""

    probabilities: Any  # (B, K)
    targets: Any  # (B, K)
    weights: Any  # (B, 1)
    denominator: float


def softmax_cross_entropy_forward(logits, labels, *, label_smoothing=0.0, denominator=None):
    """Twin of `minivit.layers.loss.softmax_cross_entropy_forward`."""
    if not _covered(logits) or logits.ndim != 2 or len(labels) != len(logits):
        return NotImplemented  # the plain body says what is wrong
    xp = array_module(logits, labels)
    B, K = logits.shape
    targets = soft_targets(labels, K, label_smoothing, np.float32, xp)
    p, weights, losses = xp.empty_like(logits), xp.empty((B, 1), np.float32), xp.empty(B, np.float32)
    arguments = (logits, targets, p, weights, losses, B, K)
    machine().launch("cross_entropy_forward", (_blocks(B, WARPS),), (32 * WARPS,), arguments)
    denominator = float(B if denominator is None else denominator)
    return losses.sum() / denominator, CudaCrossEntropyCache(p, targets, weights, denominator)


def softmax_cross_entropy_backward(dloss, cache):
    """Twin of `minivit.layers.loss.softmax_cross_entropy_backward`, for a gradient that is a number of the host."""
    p, targets, weights, denominator = cache
    dlogits = array_module(p).empty_like(p)
    arguments = (p, targets, weights, dlogits, float(dloss) / denominator, p.size, p.shape[1])
    machine().launch("cross_entropy_backward", _grid(p.size), (256,), arguments)
    return dlogits


def augment_rows(
    images, rows, rng, *, crop_padding=0, crop_mode="zero", flip=False, policy="none", rand_count=0, rand_magnitude=0,
    **others,
):  # fmt: skip
    """Twin of `minivit.data.loader.augment_rows`, for black-edged crops and flips.

    It draws the same random numbers as the plain function; any other augmentation is left to it.
    """
    if policy != "none" or any(others.values()) or not (crop_padding or flip) or (crop_padding and crop_mode != "zero"):
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


def orthogonalise(matrices):
    """Twin of `minivit.optim.orthogonalise`: the products by cuBLAS, which a graph can hold."""
    if matrices.dtype != np.float32:
        return NotImplemented
    xp = array_module(matrices)
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    shape = matrices.swapaxes(-1, -2).shape if tall else matrices.shape
    x = xp.ascontiguousarray(matrices.swapaxes(-1, -2) if tall else matrices).reshape(-1, *shape[-2:])
    x = x / (xp.sqrt((x * x).sum(axis=(1, 2), keepdims=True)) + np.float32(1e-12))
    count, n, _ = x.shape
    gram, polynomial, y = xp.empty((count, n, n), np.float32), xp.empty((count, n, n), np.float32), xp.empty_like(x)
    for _ in range(NEWTON_SCHULZ_STEPS):
        _matmul(x, x.swapaxes(1, 2), gram)
        _matmul(gram, gram, polynomial)
        polynomial *= c
        polynomial += b * gram
        _matmul(polynomial, x, y)
        y += a * x
        x, y = y, x
    x = x.reshape(shape)
    return x.swapaxes(-1, -2) if tall else x


def muon_step(optimizer, flat, grad, hyper, norm, max_norm):
    """One step of Muon with clipping, in which the gradient is scaled in place; see `adam_step`."""
    if max_norm:
        grad *= array_module(grad).minimum(np.float32(1.0), max_norm / (norm + np.float32(1e-12)))
    for piece in optimizer.others:
        adam_step(optimizer, flat, grad, hyper, norm, 0.0, piece=piece)
    optimizer.update_matrices(flat, grad, hyper[0])


def adam_step(optimizer, flat, grad, hyper, norm, max_norm, *, piece=slice(None)):
    """One step of Adam or AdamW with clipping, for a piece of the entries.

    ``hyper`` on the device holds what changes from step to step, (lr, 1 - b1^t, sqrt(1 - b2^t), ...): see `hyper_of`.
    The step is not counted here.
    """
    beta1, beta2 = optimizer.betas
    vectors = (flat, grad, optimizer.state["m"], optimizer.state["v"], optimizer.decay_mask)
    size = flat[piece].size
    arguments = (
        *(vector[piece] for vector in vectors), norm, hyper, float(beta1), float(beta2), float(optimizer.eps),
        float(optimizer.weight_decay), float(max_norm), int(optimizer.decoupled), Size(size),
    )  # fmt: skip
    machine().launch("adam", _grid(size), (256,), arguments)


def hyper_of(optimizer, lr, average=None):
    """The figures of the step to come: (lr, 1 - b1^t, sqrt(1 - b2^t), weight of the new parameters in the average)."""
    t = optimizer.steps + 1
    beta1, beta2 = optimizer.betas
    weight = 1.0 - average.decay_at(average.steps + 1) if average else 0.0
    return np.array([lr, 1.0 - beta1**t, math.sqrt(1.0 - beta2**t), weight], np.float32)
